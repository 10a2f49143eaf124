"""When a checkpoint is saved, and how: gathered by all ranks, written by rank zero beside the next steps."""

import functools
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from launch import checkpoint as checkpoints
from launch.errors import CheckpointError
from launch.job import Job
from launch.report import RunLog

MEAN_SECONDS_TO_FAILURE = 4 * 3600.0
LONGEST_INTERVAL_SECONDS = 240.0


def interval_seconds(seconds_of_a_save: float) -> float:
    """Young's interval (1974), sqrt(2 * cost of a save * mean time to failure), but at most four minutes."""
    return min(math.sqrt(2 * seconds_of_a_save * MEAN_SECONDS_TO_FAILURE), LONGEST_INTERVAL_SECONDS)


@dataclass(frozen=True)
class Written:
    """A save that has ended."""

    step: int
    seconds: float  # of writing and hashing
    fault: str  # why it came to nothing; empty when it did not


class Saves:
    """The checkpoints of a run. The gather is the only stall, unless the save before it is still being written.

    A save that fails (the disk is full, or broken) leaves nothing, and the training goes on without it until
    `max_failed_saves` in a row have failed.
    """

    def __init__(
        self,
        job: Job,
        log: RunLog,
        writer: ThreadPoolExecutor,
        evaluations: list[dict[str, Any]],
        *,
        facts: Mapping[str, Any],
        first_step: int,
    ) -> None:
        self.job = job
        self.log = log
        self.evaluations = evaluations  # all so far; they decide which checkpoint is kept however old it is
        self.facts = facts
        self.recipe = job.recipe
        self.settings = job.recipe.train
        self.saved_step = first_step  # gathered; known on every rank
        self.good_step = first_step  # on disk; known on rank zero
        self._failed_in_a_row = 0
        self._stall_seconds = 0.0
        self._interval_seconds = self.settings.save_seconds or LONGEST_INTERVAL_SECONDS
        self._since = time.monotonic()
        self._writer = writer
        self._writing: Future[Written] | None = None
        self._write_last: Callable[[], None] | None = None

    def is_due_by_the_clock(self) -> bool:
        """Rank zero's clock, which the others hear of in the step's reduction."""
        is_writing = self._writing is not None and not self._writing.done()  # the next one would wait for it
        return dist.get_rank() == 0 and not is_writing and time.monotonic() - self._since >= self._interval_seconds

    def save(self, done: int, *, skipped_steps: int) -> None:
        """Save the state after `done` steps, unless that has been done; a collective.

        Raises CheckpointError when too many saves in a row have failed.
        """
        if done == self.saved_step:
            return
        self.saved_step = done
        start = time.monotonic()
        self._settle()  # two gathered copies at once might not fit
        self._write_last = None
        facts = {"step": done, "skipped_steps": skipped_steps, "evaluations": list(self.evaluations), **self.facts}
        snapshot = checkpoints.take_snapshot(self.job.engine, self.job.model, self.job.tokenizer, facts)
        self._stall_seconds = time.monotonic() - start
        if snapshot is not None:
            directory, settings = self.recipe.run_directory, self.settings
            known = list(self.evaluations) if settings.load_best_model_at_end else []
            best = functools.partial(checkpoints.best_on_disk, directory, known, settings.metric_for_best_model)
            self._write_last = functools.partial(
                checkpoints.write_snapshot, directory, snapshot, keep=settings.save_total_limit, best=best
            )
            self._writing = self._writer.submit(_timed, done, self._write_last)
        self.log.saving(done, self._stall_seconds)
        self._since = time.monotonic()

    def finish(self) -> None:
        """Wait until the last save is on disk; a collective. Raises CheckpointError when it is not."""
        self._settle()
        if self.good_step != self.saved_step and self._write_last is not None:  # once more: room may have been made
            self._writing = self._writer.submit(_timed, self.saved_step, self._write_last)
            self._settle()
        if dist.get_rank() == 0 and self.good_step != self.saved_step:
            raise CheckpointError(
                f"Step {self.saved_step} could not be saved{self.last_good()}. Make room in "
                f"{self.recipe.run_directory} and run the same command again."
            )
        dist.barrier()

    def last_good(self) -> str:
        """What a sentence about an end adds; only rank zero knows."""
        if dist.get_rank() != 0:
            return ""
        there_is = f"the last good checkpoint is that of step {self.good_step}"
        return f"; {there_is if self.good_step else 'there is no checkpoint'}"

    def _settle(self) -> None:
        """Wait for what is being written."""
        if self._writing is None:
            return
        written, self._writing = self._writing.result(), None
        self.log.written(written.step, written.seconds, written.fault)
        if not written.fault:
            self.job.deadline.saves.add(self._stall_seconds + written.seconds)
            self.good_step, self._failed_in_a_row, self._write_last = written.step, 0, None
            if self.settings.save_seconds is None:
                self._interval_seconds = interval_seconds(written.seconds)
            return
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self.recipe.run.max_failed_saves:
            raise CheckpointError(
                f"{self._failed_in_a_row} saves in a row failed, the last one with: {written.fault}{self.last_good()}. "
                "Make room, or raise run.max_failed_saves."
            )


def _timed(step: int, write: Callable[[], None]) -> Written:
    start = time.monotonic()
    fault = ""
    try:
        write()
    except Exception as error:  # OSError, and what the libraries make of it: tokenizers raise an Exception as such
        fault = " ".join(str(error).split()) or type(error).__name__
    return Written(step, time.monotonic() - start, fault)
