"""What a run says: the start-up banner, one calm line per logging interval, metrics.jsonl, the trackers."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from tqdm import tqdm

from launch import batching, runs
from launch import engine as engines
from launch.adapter import trained_kinds
from launch.attention import attention_in_use
from launch.collectives import network_line
from launch.config import LAUNCH_COMMAND
from launch.job import Job
from launch.outlook import Outlook, peak_memory_bytes
from launch.packing import Probed
from launch.quantisation import quantised_line
from launch.recipe import TINY_MODEL_NAME, Recipe
from launch.table import format_bytes, format_table
from metrics.tokens import TokenCounts

FLAGSHIP = "configs/recipes/qwen1.5-14b-lora.yaml"


class Stopwatch:
    """The seconds of a start, part by part, from the moment this process was made: its imports count, too."""

    def __init__(self) -> None:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        made_at = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # starttime of proc(5), in ticks since the machine booted
        self._since = time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - made_at)
        self.seconds: dict[str, float] = {}

    def end(self, part: str) -> None:
        """All since the last call belongs to this part, which may have had other stretches before."""
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now


class RunLog:
    """Rank zero's voice: the progress bar, the lines, metrics.jsonl and the trackers. Other ranks say nothing.

    Figures between two log lines are sums over the steps in between, divided once.
    """

    def __init__(
        self,
        directory: Path,
        accelerator: Accelerator,
        stopwatch: Stopwatch,
        *,
        total_steps: int,
        first_step: int,
        logging_steps: int,
    ) -> None:
        self.directory = directory
        self.accelerator = accelerator
        self.is_rank_zero = accelerator.is_main_process
        self.total_steps = total_steps
        self.logging_steps = logging_steps
        self._stopwatch: Stopwatch | None = stopwatch  # until the first step is done
        self._tracks = True
        self._progress(first_step)
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
        self._longest_step_seconds = 0.0
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
        seconds: float,
        is_last: bool,
    ) -> None:
        """Add a step: [loss sum, correct, tokens, cells] over all ranks, and its tokens without padding."""
        if self._stopwatch is not None:
            self._started(done - 1, self._stopwatch)
            self._stopwatch = None
        self._bar.update()
        self._progress(done)
        self._sums += torch.tensor(sums, dtype=torch.float64)
        self._num_tokens += num_tokens
        self._longest_step_seconds = max(self._longest_step_seconds, seconds)
        if done % self.logging_steps and not is_last:
            return
        loss_sum, correct, trained, cells = self._sums.tolist()
        counts = TokenCounts(loss_sum, int(correct), int(trained))
        interval_seconds = time.monotonic() - self._since
        record: dict[str, float | int | None] = {
            "loss": counts.loss,
            "token_accuracy": counts.token_accuracy,
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "trained_tokens": counts.num_tokens,
            "trained_tokens_per_second": counts.num_tokens / interval_seconds,
            "tokens_per_second": self._num_tokens / interval_seconds,
            "longest_step_seconds": self._longest_step_seconds,
            "padding_share": 1 - self._num_tokens / cells,
            "peak_memory_bytes": peak_memory_bytes(),
            "skipped_steps": skipped_steps,
        }
        if loss_scale is not None:
            record["loss_scale"] = loss_scale
        self._write("train", done, record)
        skipped = f"  skipped {skipped_steps}" if skipped_steps else ""
        self.say(
            f"step {done:>{len(str(self.total_steps))}}/{self.total_steps}  loss {counts.loss:6.4f}  "
            f"accuracy {counts.token_accuracy:.3f}  lr {learning_rate:.2e}  norm {gradient_norm:.3g}  "
            f"{self._num_tokens / interval_seconds:,.0f} tok/s{skipped}"
        )
        self._start_interval()

    def _started(self, first_step: int, stopwatch: Stopwatch) -> None:
        """What the start was made of; parts that took no time are in the record only."""
        stopwatch.end("first step")
        parts = stopwatch.seconds
        total_seconds = sum(parts.values())
        of_parts = {f"{part.replace(' ', '_')}_seconds": seconds for part, seconds in parts.items()}
        self._record("start", first_step, {"seconds": total_seconds, **of_parts})
        named = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items() if seconds >= 0.05)
        self.say(f"start-up {total_seconds:.1f} s: {named}")

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

    def left_evaluation(self, done: int) -> None:
        """An evaluation was begun and left."""
        self._record("left evaluation", done, {})

    def saving(self, done: int, stall_seconds: float) -> None:
        """A checkpoint has been gathered; the training stood still for so long."""
        self._write("save", done, {"stall_seconds": stall_seconds})

    def written(self, done: int, seconds: float, fault: str) -> None:
        """What became of a checkpoint that was written beside the training."""
        if fault:
            self.say(f"save {done:>{len(str(self.total_steps))}}/{self.total_steps}  failed: {fault}; training goes on")
        self._record("failed save" if fault else "written", done, {"seconds": seconds})  # trackers know no way back

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.is_rank_zero:
            # A log on a disk that is full takes nothing more, and training does not end for want of words.
            with suppress(OSError):
                self._bar.clear()
                print(text, flush=True)
                self._bar.refresh()

    def close(self) -> None:
        """Take the progress bar away."""
        self._bar.close()

    def _progress(self, done: int) -> None:
        """For `launch status`, and for the next start, which counts what a kill cost."""
        if self.is_rank_zero:
            with suppress(OSError):  # metrics.jsonl knows nearly as much
                runs.write_progress(self.directory, done, self.total_steps)

    def _write(self, kind: str, done: int, record: Mapping[str, float | int | None]) -> None:
        self._record(kind, done, record)
        if self._tracks:
            try:
                self.accelerator.log({f"{kind}/{name}": value for name, value in record.items()}, step=done)
            except Exception as error:  # whatever a tracker raises: a full disk, a lost network
                self._tracks = False
                self.say(f"The trackers get nothing more from step {done} on: {type(error).__name__}: {error}")

    def _record(self, kind: str, done: int, record: Mapping[str, float | int | None]) -> None:
        """A line of metrics.jsonl, which is no reason to lose the training."""
        if self.is_rank_zero:
            try:
                runs.append_metrics(self.directory, {"kind": kind, "step": done, **record})
            except OSError as error:
                self.say(f"metrics.jsonl cannot be written: {error.strerror}; the figures of step {done} are lost")


def start_up_banner(
    job: Job,
    precision: str,
    network: Mapping[str, float],
    rows_line: str,
    probed: Probed,
    outlook: Outlook,
    resumed_after: int | None,
) -> str:
    """The batch arithmetic, the precision and why, and what each rank holds; `resumed_after` a step, or None."""
    recipe, settings, samples = job.recipe, job.recipe.train, job.samples
    first_ids = batching.step_samples(0, len(samples), settings.global_batch_size, job.total_samples, settings.seed)
    trainable, total = engines.count_parameters(job.engine.module)
    kinds = trained_kinds(name for name, _ in engines.trainable_parameters(job.engine))
    held = engines.bytes_on_this_rank(job.engine)
    stage = job.engine.zero_optimization_stage()
    start = "from step 0" if resumed_after is None else f"resumed after step {resumed_after}"
    rows = [
        ("run", f"{recipe.run_directory}, {start}"),
        ("layout", f"{dist.get_world_size()} ranks, DeepSpeed ZeRO-{stage}, {job.accelerator.device.type}"),
        *([("network", network_line(network))] if network else []),
        ("precision", precision),
        *([("base", quantised_line(recipe.model, stage))] if recipe.model.load_in_4bit else []),
        ("rows", f"{rows_line}; data_report.json has every one"),
        ("steps", f"{job.total_steps:,} of {settings.global_batch_size} samples; an epoch has {len(samples):,}"),
        (
            "first step",
            f"{len(first_ids)} samples, {int(samples.lengths[first_ids].sum()):,} tokens, "
            f"{int(samples.num_trained[first_ids].sum()):,} trained, in {len(job.micro_batches(samples, first_ids))} "
            f"micro-batch(es) a rank of at most {settings.max_tokens_per_micro_batch:,} tokens",
        ),
        ("attention", attention_in_use(job.model.get_base_model(), recipe.model.attn_implementation)[1]),
        ("packing", probed.packing),
        ("logits", probed.logits),
        ("trainable", f"{trainable:,} of {total:,} parameters ({trainable / total:.2%}): {', '.join(kinds)}"),
        ("a stop gets", job.deadline.budget_line()),
        ("a rank holds", f"{format_bytes(held['weights'])} of weights, {format_bytes(held['optimizer'])} of optimizer"),
        *outlook.rows(),
    ]
    warning = job.deadline.warning()
    return f"\n{format_table(rows)}\n" + (f"\n{warning}\n" if warning else "")


def closing_lines(recipe: Recipe) -> str:
    """Where everything is, and what to do next."""
    directory = recipe.run_directory
    rows = [("adapter", str(directory / "adapter")), ("metrics", str(directory / "metrics.jsonl"))]
    if recipe.merges:
        rows.insert(0, ("merged model", str(directory / "merged")))
    lines = ["", format_table(rows)]
    if recipe.model.factory is None:
        lines += ["Held-out rows, answered:", f"  python -m launch generate {directory / 'recipe.yaml'}"]
    if recipe.model.name_or_path == TINY_MODEL_NAME:
        lines += ["A real model:", f"  {LAUNCH_COMMAND} \\\n    {FLAGSHIP} data.train=ROWS.jsonl"]
    return "\n".join(lines)
