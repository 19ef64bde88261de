"""wandb's side: its offline files, and a server on the loopback that knows as much of its protocol as a run needs."""

import json
import struct
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from wandb.proto import wandb_internal_pb2


def wandb_records(path):
    """The records of a .wandb file: a LevelDB-style log of protobuf messages."""
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, last
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def offline_folders(folder):
    """The offline runs of a run's folder, oldest first."""
    return sorted(folder.glob("wandb/offline-run-*"))


def newest_records(folder, kind):
    """Those of a kind of the newest offline run in a run's folder."""
    (path,) = offline_folders(folder)[-1].glob("run-*.wandb")
    return [getattr(record, kind) for record in wandb_records(path) if record.WhichOneof("record_type") == kind]


def wandb_history(folder):
    """What the newest offline run in a run's folder logged."""
    items = [record.item for record in newest_records(folder, "history")]
    history = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in item} for item in items]
    return [_own(line) for line in history]


def _own(line):
    return {name: value for name, value in line.items() if not name.startswith("_")}


class WandbServer:
    """history: run id -> the lines it has, as wandb sends them."""

    def __init__(self):
        self.history, self._port = {}, 0

    def lines(self, run_id):
        return [_own(json.loads(line)) for line in self.history[run_id]]

    @property
    def environment(self):
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self._port}", "WANDB_API_KEY": "a" * 40}

    @contextmanager
    def reachable(self):
        """Inside, the server answers; at the same address each time."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = json.dumps(outer._answer(self.path, request)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args):
                pass

        with ThreadingHTTPServer(("127.0.0.1", self._port), Handler) as server:
            self._port = server.server_address[1]
            threading.Thread(target=server.serve_forever, args=(0.05,)).start()
            try:
                yield
            finally:
                server.shutdown()

    def _answer(self, path, request):
        if path.endswith("/file_stream"):  # /files/ENTITY/PROJECT/ID/file_stream
            for name, chunk in request.get("files", {}).items():
                if name == "wandb-history.jsonl":
                    self.history[path.split("/")[-2]][chunk["offset"] :] = chunk["content"]
            return {}
        operation, run_id = request["operationName"], request["variables"].get("name")
        project = {"id": "p", "name": "sbp", "entity": {"id": "e", "name": "me"}}
        lines = self.history.get(run_id)
        if operation == "RunResumeStatus":
            bucket = lines is not None and {
                **{"id": run_id, "name": run_id, "displayName": run_id, "config": "{}", "summaryMetrics": "{}"},
                **{"historyLineCount": len(lines), "historyTail": json.dumps(lines[-1:])},
                **{
                    "eventsLineCount": 0,
                    "eventsTail": "[]",
                    "logLineCount": 0,
                    "tags": [],
                    "wandbConfig": json.dumps({"t": 1}),
                },
            }
            return {"data": {"model": project | {"bucket": bucket or None}}}
        if operation == "UpsertBucket":
            self.history.setdefault(run_id, [])
            bucket = {"id": run_id, "name": run_id, "displayName": run_id, "config": "{}", "project": project}
            bucket["historyLineCount"] = len(self.history[run_id])
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": lines is None}}}
        return {"data": None, "errors": [{"message": f"this server knows no {operation}"}]}
