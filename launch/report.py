"""What a run says: the start-up banner, one calm line per logging interval, metrics.jsonl, the trackers."""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from launch import runs
from metrics.tokens import TokenCounts


class RunLog:
    """Rank zero's voice: the progress bar, the lines, metrics.jsonl and the trackers. Other ranks say nothing.

    Figures between two log lines are sums over the steps in between, divided once.
    """

    def __init__(
        self, directory: Path, accelerator: Accelerator, *, total_steps: int, first_step: int, logging_steps: int
    ) -> None:
        self.directory = directory
        self.accelerator = accelerator
        self.is_rank_zero = accelerator.is_main_process
        self.total_steps = total_steps
        self.logging_steps = logging_steps
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc="train",
            unit="step",
            leave=False,
            disable=not (self.is_rank_zero and sys.stderr.isatty()),
        )
        self._start_interval()

    def _start_interval(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)  # loss sum, correct, tokens, cells
        self._num_tokens = 0
        self._since = time.monotonic()

    def step(
        self,
        done: int,
        sums: Sequence[float],
        num_tokens: int,
        *,
        learning_rate: float,
        gradient_norm: float,
        skipped_steps: int,
        loss_scale: float | None,
        is_last: bool,
    ) -> None:
        """Add a step: [loss sum, correct, tokens, cells] over all ranks, and its tokens without padding."""
        self._bar.update()
        self._sums += torch.tensor(sums, dtype=torch.float64)
        self._num_tokens += num_tokens
        if done % self.logging_steps and not is_last:
            return
        loss_sum, correct, trained, cells = self._sums.tolist()
        counts = TokenCounts(loss_sum, int(correct), int(trained))
        seconds = time.monotonic() - self._since
        record: dict[str, float | int | None] = {
            "loss": counts.loss,
            "token_accuracy": counts.token_accuracy,
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "trained_tokens": counts.num_tokens,
            "trained_tokens_per_second": counts.num_tokens / seconds,
            "tokens_per_second": self._num_tokens / seconds,
            "padding_share": 1 - self._num_tokens / cells,
            "peak_memory_bytes": _peak_memory_bytes(),
            "skipped_steps": skipped_steps,
        }
        if loss_scale is not None:
            record["loss_scale"] = loss_scale
        self._write("train", done, record)
        skipped = f"  skipped {skipped_steps}" if skipped_steps else ""
        self.say(
            f"step {done:>{len(str(self.total_steps))}}/{self.total_steps}  loss {counts.loss:6.4f}  "
            f"accuracy {counts.token_accuracy:.3f}  lr {learning_rate:.2e}  norm {gradient_norm:.3g}  "
            f"{self._num_tokens / seconds:,.0f} tok/s{skipped}"
        )
        self._start_interval()

    def evaluation(self, done: int, counts: TokenCounts, seconds: float) -> None:
        """The held-out samples after `done` steps."""
        if counts.num_tokens == 0:
            return
        record = {
            "loss": counts.loss,
            "token_accuracy": counts.token_accuracy,
            "num_correct": counts.num_correct,
            "num_tokens": counts.num_tokens,
            "seconds": seconds,
        }
        self._write("evaluation", done, record)
        self.say(
            f"eval {done:>{len(str(self.total_steps))}}/{self.total_steps}  loss {counts.loss:6.4f}  "
            f"accuracy {counts.token_accuracy:.3f}  ({counts.num_correct:,} of {counts.num_tokens:,} held-out tokens)"
        )
        self._since += seconds  # evaluation is not training time

    def saving(self, done: int, stall_seconds: float) -> None:
        """A checkpoint has been gathered; the training stood still for so long."""
        self._write("save", done, {"stall_seconds": stall_seconds})

    def written(self, done: int, seconds: float, fault: str) -> None:
        """What became of a checkpoint that was written beside the training."""
        if fault:
            self.say(f"save {done:>{len(str(self.total_steps))}}/{self.total_steps}  failed: {fault}; training goes on")
        self._write("failed save" if fault else "written", done, {"seconds": seconds})

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.is_rank_zero:
            self._bar.clear()
            print(text, flush=True)
            self._bar.refresh()

    def close(self) -> None:
        """Take the progress bar away."""
        self._bar.close()

    def _write(self, kind: str, done: int, record: Mapping[str, float | int | None]) -> None:
        if self.is_rank_zero:
            try:
                runs.append_metrics(self.directory, {"kind": kind, "step": done, **record})
            except OSError as error:  # no reason to lose the training, which does not read it
                self.say(f"metrics.jsonl cannot be written: {error.strerror}; the figures of step {done} are lost")
        self.accelerator.log({f"{kind}/{name}": value for name, value in record.items()}, step=done)


def _peak_memory_bytes() -> int:
    """Of this process: GPU memory where there is a GPU, resident memory otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux gives kilobytes
