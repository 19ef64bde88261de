"""Text files about files: a file system's names need not be UTF-8, and may hold line breaks.

Python has the bytes of such a name as lone surrogates. Our files get those bytes back; JSON has them as escapes; what
is shown, in a terminal, a log or wandb, has backslashes in their place.
"""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

_ENCODING = {"encoding": "utf-8", "errors": "surrogateescape"}  # whatever the locale's encoding is


def open_text(path: Path, mode: str) -> IO[str]:
    """The file, to write text to or read it from. Raises OSError."""
    return path.open(mode, **_ENCODING)  # type: ignore[call-overload]


def read_text(path: Path) -> str:
    """The content of a file that `open_text` or `write_text` wrote."""
    return path.read_text(**_ENCODING)


def write_text(path: Path, text: str) -> None:
    """Replaces a file as a whole: whatever stops the process or the machine, it holds the old text or the new one."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open_text(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The file's content; {} when there is none, or when a power failure has left it empty or cut."""
    try:
        return json.loads(read_text(path))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        log.warning("%s is damaged: left out", path)
        return {}


def lines(names: Iterable[str]) -> str:
    """One name a line, with backslashes for line breaks within it."""
    return "".join(name.replace("\r", "\\r").replace("\n", "\\n") + "\n" for name in names)


def shown(value: Any) -> Any:
    """A text, or the texts in dictionaries and lists, with backslashes for what is not UTF-8."""
    if isinstance(value, dict):
        return {shown(key): shown(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shown(one) for one in value]
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
