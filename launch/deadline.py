"""How long a stop takes, and how long it may take: between SIGTERM and SIGKILL, and until the job's end."""

import math
import os
import statistics
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

# How long torch's launcher waits for its ranks after SIGTERM (torch.distributed.launcher.api), in seconds.
LAUNCHER_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
LAUNCHER_DEFAULT_SECONDS = 30.0
# How long Slurm waits after SIGTERM unless its admin says otherwise (KillWait); a job cannot ask.
SLURM_DEFAULT_SECONDS = 30.0
_UNLIMITED_SECONDS = 300 * 86400.0  # Slurm gives a job without a limit an end in a year
JOB_VARIABLE, JOB_END_VARIABLE = "SLURM_JOB_ID", "SLURM_JOB_END_TIME"  # the second in Unix seconds


class Recent:
    """The median of the last durations, so that one step on a bad day decides nothing; 0 for none.

    What an earlier start measured holds until this one has measured: it may have had other ranks.
    """

    def __init__(self, count: int) -> None:
        self._seconds: deque[float] = deque(maxlen=count)
        self._is_recalled = False

    def recall(self, seconds: float) -> None:
        """One of an earlier start."""
        self._seconds.append(seconds)
        self._is_recalled = True

    def add(self, seconds: float) -> None:
        """One of this start."""
        if self._is_recalled:
            self._seconds.clear()
            self._is_recalled = False
        self._seconds.append(seconds)

    @property
    def seconds(self) -> float:
        """What the next one will take."""
        return statistics.median(self._seconds) if self._seconds else 0.0


class Deadline:
    """What a step, a save and an evaluation take, held against the time that a stop is given.

    Only rank zero's is asked: its answers travel in a reduction, since a rank that decided alone would hang the others.
    """

    def __init__(self, grace_seconds: float | None, environment: Mapping[str, str] = os.environ) -> None:
        limits = {LAUNCHER_VARIABLE: float(environment.get(LAUNCHER_VARIABLE, LAUNCHER_DEFAULT_SECONDS))}
        if grace_seconds is not None:
            limits["run.grace_seconds"] = grace_seconds
        elif JOB_VARIABLE in environment:
            limits["Slurm's usual KillWait; set run.grace_seconds to yours"] = SLURM_DEFAULT_SECONDS
        self._limit, self.grace_seconds = min(reversed(limits.items()), key=lambda limit: limit[1])
        self._job_end = float(environment.get(JOB_END_VARIABLE, math.inf))  # Unix seconds
        self.steps, self.saves, self.evaluations = Recent(20), Recent(5), Recent(1)

    def recall(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take what earlier starts of the run measured, from the records of metrics.jsonl."""
        stall_seconds = 0.0
        for record in records:
            if record["kind"] == "train":
                self.steps.recall(record.get("longest_step_seconds", 0.0))
            elif record["kind"] == "save":
                stall_seconds = record["stall_seconds"]
            elif record["kind"] == "written":
                self.saves.recall(stall_seconds + record["seconds"])
            elif record["kind"] == "evaluation":
                self.evaluations.recall(record["seconds"])

    @property
    def stop_seconds(self) -> float:
        """What a stop takes that comes at the beginning of a step: the step, and its save."""
        return self.steps.seconds + self.saves.seconds

    @property
    def is_tight(self) -> bool:
        """Whether a stop may not have the time to end the step that it comes in."""
        return self.stop_seconds > self.grace_seconds

    def drops_step(self, share_left: float, heard_seconds: float) -> bool:
        """Whether this share of a step and a save take longer than what is left of the time since the signal."""
        return share_left * self.steps.seconds + self.saves.seconds > self.grace_seconds - heard_seconds

    def is_near(self, *, evaluation: bool = False) -> bool:
        """Whether the job ends before one more step (or an evaluation), and a stop after it, are over."""
        more = self.evaluations if evaluation else self.steps
        return time.time() + more.seconds + self.stop_seconds > self._job_end

    def budget_line(self) -> str:
        """For the banner: the time, who gives it, and when the job ends."""
        line = f"{self.grace_seconds:,.0f} s from SIGTERM to SIGKILL ({self._limit})"
        if self._job_end - time.time() < _UNLIMITED_SECONDS:
            line += f"; the job ends in {max(self._job_end - time.time(), 0) / 60:,.0f} min"
        return line

    def warning(self) -> str:
        """One line when a step and a save do not fit; empty when they do, or nothing was measured yet."""
        if not self.is_tight:
            return ""
        what, seconds, lost = "A save takes", self.saves.seconds, "what was done since the last save"
        if seconds <= self.grace_seconds:
            what, seconds, lost = "A step and a save take", self.stop_seconds, "the step that it comes in"
        return (
            f"{what} {seconds:,.1f} s, but a stop is given {self.grace_seconds:,.1f} s ({self._limit}), so it may lose "
            f"{lost}; give it more if the cluster allows that."
        )
