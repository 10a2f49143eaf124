"""The run directory: who owns it, what state it is in, and its metrics.

Files appear whole or not at all; only metrics.jsonl grows, a line at a time.
"""

import errno
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from launch import lock
from launch.errors import PreflightError
from launch.modes import as_at_start

SAVING, DELETING = ".saving-", ".deleting-"  # how the names of directories begin that are not whole
_TEMPORARY_FILE = re.compile(r"\..+\.\d+\.tmp")  # of write_text
State = Literal["starting", "running", "preempted", "finished", "failed", "refused"]


@contextmanager
def open_run(directory: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Make the directory, own it alone while the block runs, and remove what dead owners left half-done in it.

    Raises PreflightError when it cannot be written, RunInUseError when it is another process's who may be alive.
    """
    try:
        with as_at_start():  # runs of other users may stand beside this one
            directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(exist_ok=True)
        for path in (directory, *(path for path in directory.iterdir() if path.is_dir())):
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):  # not hours later, with the first save
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        lock.acquire(directory, say)
    except FileExistsError as error:  # directories, and links to them, are no error
        what = "a link to nowhere" if Path(error.filename).is_symlink() else "no directory"
        raise PreflightError(
            f"The run directory {directory} cannot be made: {error.filename} is {what}; remove it, or give this run "
            "another run.name or run.output_dir."
        ) from None
    except OSError as error:
        raise PreflightError(
            f"The run directory {directory} cannot be written: {error.strerror or error} ({error.filename}); set "
            "run.output_dir to a place that you can write to."
        ) from None
    try:
        _remove_leftovers(directory)
        yield
    finally:
        lock.release()


def _remove_leftovers(directory: Path) -> None:
    """What an interrupted write, save, deletion, export or merge left."""
    for path in [*directory.glob(".*"), *directory.glob("checkpoints/.*")]:
        if path.name.startswith((SAVING, DELETING)):
            shutil.rmtree(path, ignore_errors=True)
        elif _TEMPORARY_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write through a temporary file and a rename, on disk before the rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # A lone surrogate in somebody's row becomes its JSON escape.
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: object) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_status(directory: Path, state: State, reason: str, **facts: Any) -> None:
    """status.json, which launchers and people read: exit codes are flattened on the way through `accelerate launch`."""
    lock.end_if_lost()
    write_json(directory / "status.json", {"state": state, "reason": reason, "unix_seconds": time.time(), **facts})


def leave(directory: Path, state: State, reason: str) -> None:
    """The status of a process that ends at once, and its lock: on another host nobody would know that it has ended."""
    write_status(directory, state, reason)
    lock.release()


def write_end(directory: Path, state: State, reason: str) -> None:
    """The status of a start that came to nothing, unless the directory cannot be written or is another job's."""
    try:
        with open_run(directory):
            write_status(directory, state, reason)
    except PreflightError:
        return


def read_status(directory: Path) -> dict[str, Any]:
    """status.json, or an empty dict before the first run, and when a power cut or the like has left no status in it."""
    try:
        status = json.loads((directory / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def append_metrics(directory: Path, record: Mapping[str, Any]) -> None:
    """One line of metrics.jsonl; NaN and infinity, which JSON has not, are null."""
    record = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    with (directory / "metrics.jsonl").open("ab", buffering=0) as file:
        size_bytes = file.seek(0, os.SEEK_END)
        line = json.dumps(record).encode() + b"\n"
        if file.write(line) != len(line):  # the disk is full
            file.truncate(size_bytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a kill cut off or a power cut damaged is left out."""
    return [record for record in _metrics_lines(directory) if record is not None]


def _metrics_lines(directory: Path) -> list[dict[str, Any] | None]:
    path = directory / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [_record(line) for line in lines]


def _record(line: bytes) -> dict[str, Any] | None:
    """None for what is no record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"kind", "step"} <= record.keys() else None


def best_step(evaluations: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """The evaluated step with the lowest loss or the highest accuracy, the earliest of equals; None for none.

    Step 0 is the base model, of which there is no checkpoint.
    """
    sign = 1 if metric == "loss" else -1
    values = [(record[metric], record["step"]) for record in evaluations if record["step"] > 0]
    usable = [(sign * value, step) for value, step in values if value is not None and math.isfinite(value)]
    return min(usable)[1] if usable else None


def rewind_metrics(directory: Path, step: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Forget what was measured after `step`, which a resumed run does again; returns what is left."""
    lines = _metrics_lines(directory)
    if num_bad := lines.count(None):
        say(f"{num_bad} damaged lines of {directory / 'metrics.jsonl'} are left out.")
    kept = [record for record in lines if record is not None and record["step"] <= step]
    write_text(directory / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
    return kept
