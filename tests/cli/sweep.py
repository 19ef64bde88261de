"""A sweep whose jobs end in every way there is: `python sweep.py -m seed=0,1,2 kind=...`; the seed says how."""

import gc
import json
import os
import signal
import sys
import time
import weakref
from dataclasses import asdict
from pathlib import Path

import hydra
import torch

from sbp.cli.job import run_job
from sbp.cli.launch import join_processes
from sbp.training.config.run import Config
from sbp.training.record.status import Preempted, write_status
from sbp.training.runtime import signals


def models() -> list[weakref.ref]:
    """Not a global of this script, which submitit pickles."""
    return vars(sys).setdefault("models", [])


def job(config: Config, folder: Path) -> dict:
    assert not any(model() for model in models()), "a job before this one has left its model in memory"
    print(f"runs seed {config.seed}", flush=True)
    signals.listen()
    gc.disable()
    model = torch.nn.Linear(4, 4)
    model.itself = [model]  # only the garbage collector can free it
    models().append(weakref.ref(model))
    again = (folder / "begun").exists()
    (folder / "begun").touch()
    if config.seed == 1:
        raise torch.OutOfMemoryError("out of memory")
    if config.seed == 2:
        raise RuntimeError("broken")
    if config.seed == 3 and not again:
        write_status(folder, "preempted", step=3, total_steps=4)
        raise Preempted("stopped by SIGTERM")
    if config.seed == 4 and not again:
        raise KeyboardInterrupt
    if config.seed == 5 and not again:
        os.kill(os.getpid(), signal.SIGTERM)  # too late for this job
    if config.seed == 8 and not again:
        write_status(folder, "running")
        while signals.received is None:
            time.sleep(0.05)
        write_status(folder, "preempted")
        raise Preempted(f"stopped by {signals.received.name}")
    summary = {"top1": float(config.seed), "keep_ratio": 0.5, "saved_bytes_per_image": 2**20, "config": asdict(config)}
    (folder / "summary.json").write_text(json.dumps(summary))
    write_status(folder, "completed")
    return summary


@hydra.main(version_base="1.3", config_path="../../configs", config_name="train")
def main(composed):
    return run_job(composed, Config, job)


if __name__ == "__main__":
    sys.path = [path for path in sys.path if path != str(Path(__file__).parent)]
    join_processes()
    main()
