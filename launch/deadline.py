"""How long a stop takes, and how long it may take: between SIGTERM and SIGKILL, and until the job's end."""

import math
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

# How long torch's launcher waits for its ranks after SIGTERM (torch.distributed.launcher.api), in seconds.
LAUNCHER_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
LAUNCHER_DEFAULT_SECONDS = 30.0
JOB_END_VARIABLE = "SLURM_JOB_END_TIME"  # Unix seconds


class Deadline:
    """The longest step, save and evaluation so far, held against the time that a stop is given.

    Only rank zero's is asked: its answers travel in a reduction, since a rank that decided alone would hang the others.
    """

    def __init__(self, grace_seconds: float | None, environment: Mapping[str, str] = os.environ) -> None:
        of_launcher = float(environment.get(LAUNCHER_VARIABLE, LAUNCHER_DEFAULT_SECONDS))
        self.grace_seconds = min(of_launcher, grace_seconds or math.inf)
        self._limit = "run.grace_seconds" if grace_seconds and grace_seconds <= of_launcher else LAUNCHER_VARIABLE
        self._job_end = float(environment.get(JOB_END_VARIABLE, math.inf))  # Unix seconds
        self.step_seconds = 0.0
        self.save_seconds = 0.0  # gathered and written
        self.evaluation_seconds = 0.0

    def recall(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take what earlier starts of the run measured, from the records of metrics.jsonl."""
        stall_seconds = 0.0
        for record in records:
            if record["kind"] == "train":
                self.stepped(record.get("longest_step_seconds", 0.0))
            elif record["kind"] == "save":
                stall_seconds = record["stall_seconds"]
            elif record["kind"] == "written":
                self.saved(stall_seconds + record["seconds"])
            elif record["kind"] == "evaluation":
                self.evaluated(record["seconds"])

    def stepped(self, seconds: float) -> None:
        """A step took so long."""
        self.step_seconds = max(self.step_seconds, seconds)

    def saved(self, seconds: float) -> None:
        """Gathering and writing a checkpoint took so long."""
        self.save_seconds = max(self.save_seconds, seconds)

    def evaluated(self, seconds: float) -> None:
        """An evaluation took so long."""
        self.evaluation_seconds = max(self.evaluation_seconds, seconds)

    @property
    def is_tight(self) -> bool:
        """Whether a stop may not have the time to end the step that it comes in."""
        return self.step_seconds + self.save_seconds > self.grace_seconds

    def drops(self, share_left: float, heard_seconds: float) -> bool:
        """Whether this share of a step and a save take longer than what is left of the time since the signal."""
        return share_left * self.step_seconds + self.save_seconds > self.grace_seconds - heard_seconds

    def is_near(self, *, evaluation: bool = False) -> bool:
        """Whether the job ends before one more step (or an evaluation), and a stop after it, are over."""
        more = self.evaluation_seconds if evaluation else self.step_seconds
        return time.time() + more + self.step_seconds + self.save_seconds > self._job_end

    def budget_line(self) -> str:
        """For the banner: the time, who gives it, and when the job ends."""
        line = f"{self.grace_seconds:,.0f} s from SIGTERM to SIGKILL ({self._limit})"
        if self._job_end < math.inf:
            line += f"; the job ends in {max(self._job_end - time.time(), 0) / 60:,.0f} min"
        return line

    def warning(self) -> str:
        """One line when a step and a save do not fit; empty when they do, or nothing was measured yet."""
        if not self.is_tight:
            return ""
        what, seconds, lost = "A save takes", self.save_seconds, "what was done since the last save"
        if self.save_seconds <= self.grace_seconds:
            what, lost = "A step and a save take", "the step that it comes in"
            seconds += self.step_seconds
        return (
            f"{what} {seconds:,.1f} s, but a stop is given {self.grace_seconds:,.1f} s ({self._limit}), so it may lose "
            f"{lost}; raise {self._limit} if the cluster allows it."
        )
