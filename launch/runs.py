"""The run directory: who owns it, what state it is in, and its metrics.

Files appear whole or not at all; only metrics.jsonl grows, a line at a time.
"""

import errno
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml

from launch import lock
from launch.errors import NoProgressError, PreflightError
from launch.modes import as_at_start

JOB_FILE, JOB_LOG, SUBMITTED_FILE = "job.sbatch", "logs/job.log", "submitted.json"  # under Slurm
SAVING, DELETING = ".saving-", ".deleting-"  # how the names of directories begin that are not whole
_TEMPORARY_FILE = re.compile(r"\..+\.[0-9a-f]+\.tmp")  # of write_text
_CHECKPOINT = re.compile(r"step-(\d{6,})")
_PROGRESS, _PROGRESS_BYTES = "progress.json", 64
_BLOCK_BYTES = 1 << 16
State = Literal["starting", "running", "preempted", "finished", "failed", "refused", "no progress"]
MAX_RESTARTS_IN_VAIN = 3
_OF_THE_START = ("job", "newest_step", "recipe_sha256", "restarts_in_vain")  # in status.json until the next start


@contextmanager
def open_run(directory: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Make the directory, own it alone while the block runs, and remove what dead owners left half-done in it.

    Raises PreflightError when it cannot be written, RunInUseError when it is another process's who may be alive.
    """
    with _refused(directory):
        with as_at_start():  # runs of other users may stand beside this one
            directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(exist_ok=True)
        _check_writable(directory, *directory.iterdir())
        lock.acquire(directory, say)
    try:
        _remove_leftovers(directory)
        yield
    finally:
        lock.release()


def check_writable(directory: Path) -> None:
    """Raises the PreflightError of `open_run` for a place that it could not make or write; nothing is made."""
    with _refused(directory):
        there = next(place for place in (directory, *directory.absolute().parents) if os.path.lexists(place))
        if not there.is_dir():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), there)
        _check_writable(there, *(there.iterdir() if there == directory else ()))


def _check_writable(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not os.access(path, os.R_OK | os.W_OK | os.X_OK):  # not hours later, with the first save
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


@contextmanager
def _refused(directory: Path) -> Iterator[None]:
    """What the system says of a run directory, as a PreflightError."""
    try:
        yield
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


def _remove_leftovers(directory: Path) -> None:
    """What an interrupted write, save, deletion, export or merge left."""
    for path in [*directory.glob(".*"), *directory.glob("checkpoints/.*"), *directory.glob("data/.tmp*")]:
        if path.name.startswith((SAVING, DELETING)):
            shutil.rmtree(path, ignore_errors=True)
        elif path.parent.name == "data" or _TEMPORARY_FILE.fullmatch(path.name):  # .tmp* is of safetensors
            path.unlink(missing_ok=True)


def free_bytes(path: Path) -> int:
    """Of the disk where a directory is, or will be made."""
    there = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    return shutil.disk_usage(there).free


def write_text(path: Path, text: str) -> None:
    """Write through a temporary file and a rename, on disk before the rename."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # threads and nodes write the same file
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
    of_the_start = {name: value for name, value in read_status(directory).items() if name in _OF_THE_START}
    status = {"state": state, "reason": reason, "unix_seconds": time.time(), **of_the_start, **facts}
    write_json(directory / "status.json", status)


def begin(directory: Path, newest_step: int, recipe: str) -> None:
    """The status of a start of this recipe, in YAML, that finds this step saved.

    Raises NoProgressError after too many restarts, one after the other, that left no newer step. One that was preempted
    before its first step does not count, nor does one that was refused, or had another recipe.
    """
    last = read_status(directory)
    state, in_vain = last.get("state"), 0
    has_ended_by_itself = state in ("starting", "running", "failed") or (state == "preempted" and "step" in last)
    start = {"newest_step": newest_step, "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest()}
    if {name: last.get(name) for name in start} == start:
        in_vain = last["restarts_in_vain"] + has_ended_by_itself if state != "no progress" else 0
    if in_vain > MAX_RESTARTS_IN_VAIN:
        how = "was killed" if state in ("starting", "running") else f"ended as {state}: {last.get('reason')}"
        raise NoProgressError(
            f"{MAX_RESTARTS_IN_VAIN} restarts in a row left nothing newer than step {newest_step}; the last one {how}. "
            "Look at what it printed, then run the same command again."
        )
    facts = {"job": this_job(), **start, "restarts_in_vain": in_vain}
    write_status(directory, "starting", "the job has started", pid=os.getpid(), **facts)


def this_job(environment: Mapping[str, str] = os.environ) -> str:
    """The same for every rank of a job, on whatever node, and another for any other job."""
    address = environment.get("MASTER_ADDR", "localhost")
    address = platform.node() if address in ("127.0.0.1", "localhost", "::1") else address
    slurm = [environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")]
    return " ".join([address, environment.get("MASTER_PORT", ""), *slurm]).strip()


def write_failure(directory: Path, reason: str, **facts: Any) -> None:
    """The first rank of this job to end tells the cause: the others only lose their peer.

    `may_go_on` among the facts: the cause is none that the next start will surely meet again.
    """
    status = read_status(directory)
    if status.get("state") in ("starting", "running") and status.get("job") == this_job():
        write_status(directory, "failed", f"rank {os.environ.get('RANK', '0')}: {reason}", **facts)


def leave_hung(directory: Path, reason: str) -> None:
    """`write_failure` of a process that ends since it hangs, which another start may not; and its lock, if any."""
    write_failure(directory, reason, may_go_on=True)
    lock.release()


def is_finished(directory: Path, recipe: str) -> bool:
    """Whether the run of this very recipe, in YAML, has nothing left to do; how Slurm starts it makes no other."""
    if read_status(directory).get("state") != "finished":
        return False
    try:
        was = yaml.safe_load((directory / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(was, dict) and was | {"slurm": {}} == yaml.safe_load(recipe) | {"slurm": {}}


def leave(directory: Path, state: State, reason: str) -> None:
    """The status of a process that ends at once, and its lock: on another host nobody would know that it has ended.

    A rank that has failed has told the cause, and the launcher then asks the others to end.
    """
    status = read_status(directory)
    if (status.get("state"), status.get("job")) != ("failed", this_job()):
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
    return read_json(directory / "status.json")


def read_json(path: Path) -> dict[str, Any]:
    """The keys of a JSON file; none when it is not there, or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def pin_base(directory: Path, name: str, commit: str) -> None:
    """base.json: the commit of a hub id that this run is prepared for, whatever becomes of the hub's."""
    write_json(directory / "base.json", {name: commit})


def read_pinned_base(directory: Path) -> dict[str, str]:
    """{hub id: commit} of `pin_base`; empty when nothing was prepared."""
    return read_json(directory / "base.json")


def write_environment(directory: Path, facts: Mapping[str, Any]) -> None:
    """environment.json of this start, with those of all earlier ones under `earlier`, the latest last."""
    path = directory / "environment.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        earlier = [*before.pop("earlier", []), before]
    except (FileNotFoundError, ValueError, AttributeError, TypeError):  # none yet, or damaged: nothing depends on it
        earlier = []
    write_json(path, {**facts, "unix_seconds": time.time(), "earlier": earlier})


def published_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of what stands in checkpoints/, oldest first: by step, never by time. Nothing is verified."""
    try:
        paths = list((directory / "checkpoints").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((int(match[1]), path) for path in paths if (match := _CHECKPOINT.fullmatch(path.name)))


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint, by its name alone; 0 for none."""
    published = published_checkpoints(directory)
    return published[-1][0] if published else 0


def write_progress(directory: Path, step: int, total_steps: int) -> None:
    """progress.json, after every step: in place and not synced, which costs microseconds; no kill takes it back."""
    text = json.dumps({"step": step, "total_steps": total_steps}).ljust(_PROGRESS_BYTES - 1) + "\n"
    descriptor = os.open(directory / _PROGRESS, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(descriptor, text.encode(), 0)
    finally:
        os.close(descriptor)


def read_progress(directory: Path) -> tuple[int, int, float] | None:
    """(steps done, of how many, when in Unix seconds); None before the first step of a start."""
    try:
        with (directory / _PROGRESS).open("rb") as file:
            found, when = json.load(file), os.fstat(file.fileno()).st_mtime
        return int(found["step"]), int(found["total_steps"]), when
    except (OSError, ValueError, LookupError, TypeError, OverflowError):
        return None  # not there, or damaged: metrics.jsonl knows nearly as much


def steps_to_repeat(directory: Path, step: int) -> int:
    """How many steps after this one had been done, which a run that resumes there loses. Before `rewind_metrics`."""
    progress = read_progress(directory)
    records = last_metrics(directory, {"train": 1})["train"]
    reached = max([step, *(int(record["step"]) for record in records)])
    return max(reached, progress[0] if progress else 0) - step


def append_metrics(directory: Path, record: Mapping[str, Any]) -> None:
    """One line of metrics.jsonl."""
    lock.end_if_lost()  # the new owner's lines are of the same steps
    with (directory / "metrics.jsonl").open("ab", buffering=0) as file:
        size_bytes = file.seek(0, os.SEEK_END)
        line = json.dumps(finite(record)).encode() + b"\n"
        if file.write(line) != len(line):  # the disk is full
            file.truncate(size_bytes)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with null for NaN and infinity, which JSON has not."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; damaged ones, and a last one that a kill cut off, are left out."""
    return [record for line in _whole_lines(directory) if (record := _record(line)) is not None]


def _whole_lines(directory: Path) -> list[bytes]:
    path = directory / "metrics.jsonl"
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_ours = isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)
    return record if is_ours else None


def last_metrics(directory: Path, wanted: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    """The last so many records of each kind, the latest first; of a long file no more is read than that takes."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in wanted}
    begins = {f'{{"kind": "{kind}"'.encode(): kind for kind in wanted}
    lacking = tuple(begins)
    try:
        for line in _lines_backwards(directory / "metrics.jsonl"):
            if not line.startswith(lacking) or (record := _record(line)) is None:
                continue
            found[record["kind"]].append(record)
            lacking = tuple(begin for begin, kind in begins.items() if len(found[kind]) < wanted[kind])
            if not lacking:
                break
    except FileNotFoundError:
        pass
    return found


def _lines_backwards(path: Path) -> Iterator[bytes]:
    """Whole lines, the last one first."""
    with path.open("rb") as file:
        end, rest = file.seek(0, os.SEEK_END), b""
        is_cut_off = True  # what follows the last line end
        while end > 0:
            begin = max(0, end - _BLOCK_BYTES)
            file.seek(begin)
            first, *lines = (file.read(end - begin) + rest).split(b"\n")
            if lines and is_cut_off:
                lines.pop()
                is_cut_off = False
            yield from reversed(lines)
            end, rest = begin, first
        if not is_cut_off:
            yield rest


def best_step(evaluations: Sequence[Mapping[str, Any]], metric: str) -> int | None:
    """The evaluated step with the lowest loss or the highest accuracy, the earliest of equals; None for none.

    Step 0 is the base model, of which there is no checkpoint.
    """
    sign = 1 if metric == "loss" else -1
    values = [(record[metric], record["step"]) for record in evaluations if record["step"] > 0]
    usable = [(sign * value, step) for value, step in values if value is not None and math.isfinite(value)]
    return min(usable)[1] if usable else None


def rewind_metrics(
    directory: Path, step: int, *, same_held_out: bool = True, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Forget what was done and measured after `step`, which a resumed run does again; returns what is left.

    That there was a start, and what it cost, stays true. Evaluations of other held-out rows get another kind, so that
    nobody compares them.
    """
    records = read_metrics(directory)
    num_damaged = len(_whole_lines(directory)) - len(records)
    if num_damaged:
        aside = directory / "metrics.jsonl.corrupt"
        aside.write_bytes((directory / "metrics.jsonl").read_bytes())
        say(f"Damaged lines of metrics.jsonl, which are left out: {num_damaged}; {aside.name} has them all.")
    kept = [record for record in records if record["step"] <= step or record["kind"] == "start"]
    if not same_held_out:
        others = "evaluation of other rows"
        kept = [record | {"kind": others} if record["kind"] == "evaluation" else record for record in kept]
    write_text(directory / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
    (directory / _PROGRESS).unlink(missing_ok=True)
    return kept


def known_evaluations(saved: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By step: those that a checkpoint knows of, and those of metrics.jsonl besides, which may have been lost.

    One that was begun and left for the second time is known as one without a result: jobs that are shorter than it
    would come no further.
    """
    left = Counter(record["step"] for record in metrics if record["kind"] == "left evaluation")
    given_up = {step: {"step": step, "loss": None, "token_accuracy": None} for step, count in left.items() if count > 1}
    measured = {record["step"]: dict(record) for record in metrics if record["kind"] == "evaluation"}
    known = given_up | measured | {record["step"]: dict(record) for record in saved}
    return [known[step] for step in sorted(known)]
