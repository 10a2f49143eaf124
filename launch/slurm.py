"""A run as a Slurm job: its text, which is made of values alone, and the few calls of sbatch, squeue and scontrol."""

import json
import math
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from launch.deadline import Deadline
from launch.errors import ConfigError, PreflightError, SlurmError
from launch.lock import ENDED_JOB_STATES
from launch.modes import as_at_start
from launch.runs import JOB_FILE, SUBMITTED_FILE, write_json
from launch.slurm_options import OURS, OptionValue, directive, literal_path, overriding_variables, seconds_of

# Before the time limit, of a run that has measured no step yet; at most a quarter of the limit.
FIRST_LEAD_SECONDS = 120
# What ends a run besides a step and a save: launchers, and Slurm's own steps.
_ENDING_SECONDS = 30
_LONGEST_LEAD_SECONDS = 65535  # sbatch takes no more
# torch's launcher kills its ranks so much later than Slurm may.
_LAUNCHER_MARGIN_SECONDS = 60
_ANSWER_SECONDS = 60.0
# A job that is submitted from within another takes nothing of that one with it.
_SLURM_VARIABLES_TO_KEEP = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


@dataclass(frozen=True)
class JobText:
    """All that a job's text is made of."""

    run_name: str
    python: str  # which asks Slurm
    rank_python: str  # which trains: the same, or what enters a container
    checkout: str
    log: str
    config_file: str  # of accelerate launch
    arguments: tuple[str, ...]  # of train.py
    options: tuple[tuple[str, OptionValue], ...]  # of sbatch, the user's
    processes_per_node: int | None  # None: the GPUs that a node gives, or one where it gives none
    lead_seconds: int
    grace_seconds: float | None

    @property
    def directives(self) -> list[tuple[str, OptionValue]]:
        """The options of sbatch, ours last."""
        named = dict(self.options)
        return [
            ("job-name", named.pop("job-name", self.run_name)),
            *((name, value) for name, value in named.items() if value is not False),
            ("ntasks-per-node", 1),
            ("chdir", self.checkout),
            ("output", literal_path(self.log)),
            ("open-mode", "append"),
            ("requeue", True),
            ("signal", f"TERM@{self.lead_seconds}"),
        ]

    @property
    def beside(self) -> list[str]:
        """Options that no line of the text can hold, for sbatch's own command line: paths with a line break."""
        return [f"--{name}={value}" for name, value in self.directives if "\n" in str(value)]

    @property
    def launcher_seconds(self) -> int:
        """How long torch's launcher gives its ranks after SIGTERM: longer than Slurm, which then decides."""
        return math.ceil(max(self.lead_seconds, self.grace_seconds or 0)) + _LAUNCHER_MARGIN_SECONDS

    def render(self) -> str:
        """The text for sbatch. Raises ConfigError for names that are no UTF-8, which no text can hold."""
        environment = jinja2.Environment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["quoted"] = shlex.quote
        template = environment.from_string(Path(__file__).with_name("job.sbatch.j2").read_text(encoding="utf-8"))
        text = template.render(
            job=self, directives=[directive(name, value) for name, value in self.directives if "\n" not in str(value)]
        )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            name = text[error.start : error.end]
            raise ConfigError(f"A path or an argument has {name!r}, which is no UTF-8; rename it.") from None
        return text


def lead_seconds(records: Iterable[Mapping[str, Any]], time_limit: OptionValue | None) -> tuple[int, str]:
    """(how long before its time limit a job is asked to stop, why); `records` are those of metrics.jsonl."""
    deadline = Deadline(None)
    deadline.recall(records)
    if deadline.stop_seconds:
        lead = min(math.ceil(2 * deadline.stop_seconds) + _ENDING_SECONDS, _LONGEST_LEAD_SECONDS)
        return lead, f"twice a step and a save as measured, and {_ENDING_SECONDS} s"
    limit_seconds = None if time_limit is None else seconds_of(time_limit)
    quarter = math.inf if limit_seconds is None else limit_seconds // 4
    if quarter < FIRST_LEAD_SECONDS:
        return int(quarter), "a quarter of the time limit, for no step was measured yet"
    return FIRST_LEAD_SECONDS, "for no step was measured yet"


# ---- the edge ----


@dataclass(frozen=True)
class QueuedJob:
    """What Slurm says of a job that it knows."""

    state: str  # RUNNING, PENDING, COMPLETING ...
    reason: str  # why it waits, or ended: Priority, TimeLimit ...
    num_restarts: int
    is_preempted: bool  # it was asked to go, and may still be running
    seconds_left: float = math.inf  # of its time limit, which an admin may change while it runs

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it can be running, now or later."""
        return self.state in ENDED_JOB_STATES


def submit(text: JobText, run_directory: Path) -> str:
    """Hand `<run>/job.sbatch` to sbatch; the number of the job, which is also put on record in the run directory.

    Raises SlurmError with sbatch's own words, or when there can be no such record.
    """
    names = [*OURS, *(name for name, _ in text.options)]
    dropped = overriding_variables(names)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in dropped and (not name.startswith("SLURM_") or name in _SLURM_VARIABLES_TO_KEEP)
    }
    path = str((run_directory / JOB_FILE).absolute())
    with as_at_start():  # the job inherits the umask
        said = _call("sbatch", "--parsable", *text.beside, path, environment=environment)
    job_id, _, cluster = said.strip().splitlines()[-1].partition(";")
    record = {"job_id": job_id, "cluster": cluster or None, "unix_seconds": time.time()}
    try:
        write_json(run_directory / SUBMITTED_FILE, record)
    except OSError as error:
        raise SlurmError(
            f"Job {job_id} is in the queue, but {run_directory / SUBMITTED_FILE}, by which a second one is refused, "
            f"cannot be written ({error.strerror}); scancel {job_id}, mend that, and submit it again."
        ) from None
    return job_id


def submitted_job(run_directory: Path) -> tuple[str, QueuedJob | None] | None:
    """(number, what Slurm knows of it) of the job that was submitted last for this run; None when none was."""
    try:
        record = json.loads((run_directory / SUBMITTED_FILE).read_text(encoding="utf-8"))
        job_id, cluster = str(record["job_id"]), record["cluster"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return job_id, queued_job(job_id, cluster)


def queued_job(job_id: str, cluster: str | None = None) -> QueuedJob | None:
    """None when Slurm knows no such job any more. Raises SlurmError when it does not answer."""
    fields = "State:30,RestartCnt:20,PreemptTime:30,TimeLeft:30,Reason:200"  # the last one may have blanks
    where = ["-M", cluster] if cluster else []
    try:
        said = _call("squeue", *where, "-h", "-t", "all", "-j", job_id, "-O", fields)
    except SlurmError as error:
        if "Invalid job id specified" in str(error):
            return None
        raise
    lines = [line.split(maxsplit=4) for line in said.splitlines() if not line.startswith("CLUSTER:")]
    found = [line for line in lines if len(line) == 5]
    if not found:
        return None
    state, restarts, preempted, time_left, reason = found[0]
    seconds_left = 0.0 if time_left == "INVALID" else seconds_of(time_left)  # squeue's word for less than none
    left = math.inf if seconds_left is None else seconds_left  # UNLIMITED
    return QueuedJob(state, reason.strip(), int(restarts), preempted not in ("N/A", "None"), left)


def requeue(job_id: str) -> None:
    """Put a running job back into the queue. Raises SlurmError with scontrol's words."""
    _call("scontrol", "requeue", job_id)


def _call(program: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Its standard output."""
    path = shutil.which(program)
    if path is None:
        raise PreflightError(f"There is no {program} on this machine; that is for the nodes of a Slurm cluster.")
    try:
        done = subprocess.run(
            [path, *arguments], capture_output=True, text=True, timeout=_ANSWER_SECONDS, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{program} did not answer in {_ANSWER_SECONDS:.0f} s; is the controller well?") from None
    if done.returncode != 0:
        words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise SlurmError(f"{program} says: {words.rstrip('.')}.")
    return done.stdout
