"""What the files of runs say about them: nothing is written, whoever writes them meanwhile, and wherever."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch import lock, runs
from launch.config import intended_run_directory
from launch.errors import ConfigError

RUNS = Path("runs")  # where recipes put them, unless run.output_dir says something else
# One of these stands in every directory that a command of ours has begun to fill.
_MARKS = {"status.json", "recipe.yaml", "metrics.jsonl", "environment.json", "data", runs.SUBMITTED_FILE, lock.NAME}
_RECENT_RECORDS = 6  # of training, whose mean is the speed
_SQUEUE_SECONDS = 5.0


@dataclass(frozen=True)
class Figures:
    """What was measured after a step."""

    step: int
    loss: float | None  # None: not finite
    token_accuracy: float | None


@dataclass(frozen=True)
class RunStatus:
    """A run, as far as its files tell. None: they do not."""

    directory: str
    state: str  # one of runs.State, or: killed, silent, prepared, not started, unknown
    reason: str = ""
    state_seconds: float | None = None  # since then
    step: int | None = None
    total_steps: int | None = None
    step_seconds: float | None = None  # since the last step was done
    training: Figures | None = None
    num_skipped_steps: int = 0  # since their gradients were not finite
    evaluation: Figures | None = None
    tokens_per_second: float | None = None
    seconds_per_step: float | None = None
    num_restarts: int = 0
    num_lost_steps: int = 0  # done again, since a kill came after the last save
    num_restarts_in_vain: int = 0
    checkpoint_step: int | None = None
    checkpoint_seconds: float | None = None  # since it was written
    owner: str | None = None  # the process whose directory it is
    owner_silent_seconds: float | None = None
    slurm_job_id: str | None = None
    queue_state: str | None = None
    queue_reason: str | None = None
    log: str | None = None  # what its jobs have printed, where Slurm started them
    has_recipe: bool = False
    has_merged: bool = False
    faults: tuple[str, ...] = ()  # what cannot be read

    @property
    def is_alive(self) -> bool:
        """Whether a process of it is at work."""
        return self.state in ("starting", "running")

    @property
    def seconds_left(self) -> float | None:
        """Of training, at the speed of the last steps."""
        if self.step is None or self.total_steps is None or self.seconds_per_step is None or self.state == "finished":
            return None
        return max(0, self.total_steps - self.step) * self.seconds_per_step


def find_runs(names: Sequence[str]) -> list[Path]:
    """The run directories that are meant by directories, names in runs/, recipes, and directories of runs.

    Without any, those in runs/. Raises ConfigError for what is none of these.
    """
    if not names:
        return _inside(RUNS)
    found = []
    for name in names:
        path = Path(name)
        if path.suffix in (".yaml", ".yml"):
            path = intended_run_directory([name])
        places = [place for place in (path, RUNS / name) if place.is_dir()]
        runs_there = [[place] if _is_run(place) else _inside(place) for place in places]
        if not any(runs_there):
            raise ConfigError(
                f"There is no run {name}; give a run's directory, its name in {RUNS}/, its recipe, or a directory of "
                "runs."
            )
        found += next(filter(None, runs_there))
    return list(dict.fromkeys(found))


def _inside(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.is_dir() and _is_run(path))
    except OSError:
        return []


def _is_run(directory: Path) -> bool:
    try:
        return not _MARKS.isdisjoint(os.listdir(directory))  # noqa: PTH208 - names are enough
    except PermissionError:
        return True  # another user's, which is said
    except OSError:
        return False


def read_runs(directories: Sequence[Path]) -> list[RunStatus]:
    """Each run as its files, and Slurm where it is there, say at this moment."""
    found = [_read_run(directory) for directory in directories]
    queue = _ask_queue(sorted({run.slurm_job_id for run in found if run.slurm_job_id and run.state != "finished"}))
    return [_with_queue(run, queue) for run in found]


def _read_run(directory: Path) -> RunStatus:
    try:
        os.listdir(directory)  # noqa: PTH208 - for its error
        status, fault, sight = _status_and_owner(directory)
    except OSError as error:
        return RunStatus(str(directory), "unknown", faults=(f"it cannot be read: {error.strerror or error}",))
    now = time.time()
    environment, fault_of_environment = _read_object(directory / "environment.json")
    submitted, fault_of_submitted = _read_object(directory / runs.SUBMITTED_FILE)
    starts = [start for start in (*_listed(environment.get("earlier")), environment) if isinstance(start, dict)]
    state, reason = _state(directory, status, sight, is_damaged=bool(fault))
    state_seconds = _since(now, status.get("unix_seconds"))
    if state in ("killed", "silent"):  # since the last sign of life
        state_seconds = max(0.0, sight.silent_seconds) if sight else None
    run = RunStatus(
        str(directory),
        state,
        reason,
        state_seconds,
        num_restarts=max(0, len(starts) - 1),
        num_lost_steps=sum(_whole(start.get("lost_steps")) or 0 for start in starts),
        num_restarts_in_vain=_whole(status.get("restarts_in_vain")) or 0,
        slurm_job_id=_slurm_job_of(status, sight, submitted),
        log=str(log) if (log := directory / runs.JOB_LOG).is_file() else None,
        has_recipe=(directory / "recipe.yaml").is_file(),
        has_merged=(directory / "merged").is_dir(),
        faults=tuple(filter(None, (fault, fault_of_environment, fault_of_submitted))),
    )
    if sight is not None and sight.lives is not False:
        owner = str(sight.owner or "an owner whose record cannot be read")
        run = replace(run, owner=owner, owner_silent_seconds=sight.silent_seconds)
    return _with_progress(_with_checkpoint(run, directory, now), directory, status, now)


def _status_and_owner(directory: Path) -> tuple[dict[str, Any], str, lock.Sight | None]:
    """(status.json, what is wrong with it, whose the directory is) of one moment: a run may begin or end meanwhile."""
    path = directory / "status.json"
    status, fault = _read_object(path)
    while True:
        sight, before = lock.look(directory), status
        status, fault = _read_object(path)
        if status == before:
            return status, fault, sight


def _state(
    directory: Path, status: Mapping[str, Any], sight: lock.Sight | None, *, is_damaged: bool
) -> tuple[str, str]:
    """(state, reason): what status.json says, unless it says of a process that it runs, and it does not."""
    said = status.get("state")
    if is_damaged:
        return "unknown", ""
    if not isinstance(said, str):
        is_prepared = (directory / "data" / "prepared.json").is_file()
        return ("prepared", "its rows are prepared") if is_prepared else ("not started", "")
    if said not in ("starting", "running"):
        return said, str(status.get("reason", ""))
    owner = sight.owner if sight else None
    if sight is None or sight.lives is False or (owner is not None and owner.pid != status.get("pid")):
        is_gone = sight is not None and sight.lives is False
        who = f"{owner} is gone" if is_gone and owner else "no process has the directory any more"
        return "killed", f"it was {said}, but {who}"
    if sight.lives is None and sight.silent_seconds > lock.Times().silent_seconds:
        return "silent", f"it was {said}, but nothing was heard of {owner or 'its owner'} for long"
    return said, str(status.get("reason", ""))


def _with_progress(run: RunStatus, directory: Path, status: Mapping[str, Any], now: float) -> RunStatus:
    """How far it is, and how fast; a step that was done before the last kill is none that counts."""
    try:
        found = runs.last_metrics(directory, {"train": _RECENT_RECORDS, "start": 1, "evaluation": 1})
    except OSError as error:
        return replace(run, faults=(*run.faults, f"metrics.jsonl cannot be read: {error.strerror or error}"))
    training, evaluation = (_figures(found[kind]) for kind in ("train", "evaluation"))
    progress = runs.read_progress(directory)
    done, total, when = progress or (None, None, None)
    if done is None:  # the last start has not come as far as its first step
        known = (training.step if training else None, run.checkpoint_step, _whole(status.get("step")))
        done = max((step for step in known if step is not None), default=None)
    return replace(
        run,
        step=done,
        total_steps=total if total is not None else (done if run.state == "finished" else None),
        step_seconds=_since(now, when),
        training=training,
        num_skipped_steps=_whole(found["train"][0].get("skipped_steps")) or 0 if training else 0,
        evaluation=evaluation,
        tokens_per_second=_number(found["train"][0].get("tokens_per_second")) if training else None,
        seconds_per_step=_seconds_per_step(found["train"], found["start"]),
    )


def _figures(records: Sequence[Mapping[str, Any]]) -> Figures | None:
    """Of the latest record."""
    if not records:
        return None
    record = records[0]
    return Figures(record["step"], _number(record.get("loss")), _number(record.get("token_accuracy")))


def _seconds_per_step(records: Sequence[Mapping[str, Any]], starts: Sequence[Mapping[str, Any]]) -> float | None:
    """The mean over records of training, the latest first; each is of the steps since the one before, or the start."""
    begins = sorted({record["step"] for record in (*records, *starts)})
    seconds, num_steps = 0.0, 0
    for record in records:
        begin = max((step for step in begins if step < record["step"]), default=None)
        tokens, rate = (_number(record.get(name)) for name in ("trained_tokens", "trained_tokens_per_second"))
        if begin is not None and tokens and rate:
            seconds += tokens / rate
            num_steps += record["step"] - begin
    return seconds / num_steps if num_steps else None


def _with_checkpoint(run: RunStatus, directory: Path, now: float) -> RunStatus:
    """The newest one, by its name; what it holds is verified by who resumes it."""
    try:
        published = runs.published_checkpoints(directory)
    except OSError as error:
        return replace(run, faults=(*run.faults, f"checkpoints/ cannot be read: {error.strerror or error}"))
    if not published:
        return run
    step, path = published[-1]
    try:
        written = (path / "manifest.json").stat().st_mtime
    except OSError:
        return replace(run, checkpoint_step=step, faults=(*run.faults, f"{path.name} has no manifest.json"))
    return replace(run, checkpoint_step=step, checkpoint_seconds=_since(now, written))


# ---- Slurm ----


def _slurm_job_of(status: Mapping[str, Any], sight: lock.Sight | None, submitted: Mapping[str, Any]) -> str | None:
    """Of the owner; of a run that waits in the queue, which has none, that which was submitted or started last."""
    if sight is not None and sight.owner is not None and sight.owner.slurm_job_id:
        return sight.owner.slurm_job_id
    # runs.this_job: address, port, and under Slurm the job and, but for its first start, its restarts
    parts = str(status.get("job", "")).split(" ")
    started = parts[2] if len(parts) in (3, 4) and parts[2].isalnum() else None
    job_id = str(submitted.get("job_id", ""))
    is_later = (_number(submitted.get("unix_seconds")) or 0) > (_number(status.get("unix_seconds")) or 0)
    return job_id if job_id.isalnum() and (is_later or started is None) else started


def _ask_queue(job_ids: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(state, reason) of the jobs that Slurm knows; of none where it is not there or does not answer."""
    if not job_ids:
        return {}
    asked = ("-h", "-t", "all", "-j", ",".join(job_ids), "-o", "%A|%T|%r")
    done = lock.ask_squeue(*asked, seconds=_SQUEUE_SECONDS)
    if done is None or done.returncode != 0:
        return {}
    lines = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {line[0].strip(): (line[1].strip(), line[2].strip()) for line in lines if len(line) == 3}


def _with_queue(run: RunStatus, queue: Mapping[str, tuple[str, str]]) -> RunStatus:
    if run.slurm_job_id is None or run.slurm_job_id not in queue:
        return run
    state, reason = queue[run.slurm_job_id]
    run = replace(run, queue_state=state, queue_reason="" if reason == "None" else reason)
    if state in lock.ENDED_JOB_STATES and (run.is_alive or run.state == "silent"):
        return replace(
            run, state="killed", reason=f"it was at work, but Slurm says that its job is {state}", owner=None
        )
    return run


# ---- files that anybody may have damaged ----


def _read_object(path: Path) -> tuple[dict[str, Any], str]:
    """(its keys, what is wrong with it); a file that is not there has none, and nothing is wrong."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return {}, f"{path.name} cannot be read: {error.strerror or error}"
    except (ValueError, RecursionError):
        return {}, f"{path.name} is damaged: it holds no JSON"
    return (value, "") if isinstance(value, dict) else ({}, f"{path.name} is damaged: it holds no keys")


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None  # type: ignore[arg-type]


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _since(now: float, value: object) -> float | None:
    """Clocks of two machines may differ: nothing is in the future."""
    then = _number(value)
    return None if then is None else max(0.0, now - then)
