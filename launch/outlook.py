"""The memory of a run on this machine: before its weights are read, by the plan's formulas; at its end, as it was."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch import batching, runs
from launch.activations import MicroBatch as Sizes
from launch.errors import ConfigError, ModelError
from launch.findings import Finding
from launch.forecast import Forecast, findings, forecast, hardware_of_run, plan_line, what_plan_chooses
from launch.free_memory import available_bytes
from launch.plan import Case, base_at, is_packed, sharding_of
from launch.recipe import Recipe
from launch.samples import Samples


@dataclass(frozen=True)
class Outlook:
    """What rank zero expects to hold, or why it does not know."""

    expected: Forecast | None
    plan: str  # whether the plan would choose this; empty on a CPU
    not_known: str
    findings: tuple[Finding, ...]

    def rows(self) -> Iterator[tuple[str, str]]:
        """Of the start-up banner."""
        yield "memory", self.expected.line() if self.expected else f"no forecast: {self.not_known}"
        if self.plan:
            yield "plan", self.plan

    def compare(self, directory: Path, step: int, say: Callable[[str], None]) -> None:
        """Put the forecast, if there is one, beside the peak: in metrics.jsonl, and aloud."""
        if self.expected is not None:
            line, record = self.expected.compared(peak_memory_bytes())
            say(line)
            try:
                runs.append_metrics(directory, {"kind": "memory", "step": step, **record})
            except OSError as error:  # no reason to lose the run
                say(f"metrics.jsonl cannot be written: {error.strerror}; these figures are lost")


def look_ahead(
    recipe: Recipe, base_name: str, precision: str, samples: Samples, deepspeed: Mapping[str, Any]
) -> Outlook:
    """Of this rank, on this machine and with this DeepSpeed configuration; the peak is counted from here on."""
    host_available_bytes, on_gpu = available_bytes(), torch.cuda.is_available()
    try:
        case = case_of_run(recipe, base_name, precision, trained_share=1.0)
        sharding, batch = sharding_of(deepspeed), _largest(case, samples)
        expected = forecast(case, sharding, batch, None if on_gpu else _resident_bytes())
    except (ConfigError, ModelError) as error:  # of models that no formula covers
        return Outlook(None, "", str(error).rstrip("."), ())
    case = replace(case, trained_share=batch.num_targets / batch.num_tokens)
    chosen = what_plan_chooses(case)
    found = tuple(findings(case, sharding, expected, chosen, host_available_bytes))
    _forget_peak()
    return Outlook(expected, plan_line(case, sharding, chosen), "", found)


def case_of_run(
    recipe: Recipe,
    base_name: str,
    precision: str,
    trained_share: float,
    *,
    packed: bool | None = None,
    judged: bool | None = None,
) -> Case:
    """For the plan's formulas; `packed` and `judged` are what the model's probe said, None: as is likely.

    Raises ConfigError or ModelError for what no formula covers.
    """
    if recipe.model.factory is not None:
        raise ModelError(f"only the code of {recipe.model.factory} knows its layers")
    gpu = (torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else None
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    hardware = hardware_of_run(gpu, dist.get_world_size(), ranks_per_node, available_bytes())
    base = base_at(base_name, recipe.model.revision)
    packed = is_packed(recipe, base) if packed is None else packed
    return Case(recipe, base, hardware, precision, packed, trained_share, judged)


def peak_memory_bytes() -> int:
    """Of this process: torch's tensors where there is a GPU, resident memory otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM")


def _largest(case: Case, samples: Samples) -> Sizes:
    """Of the whole run: its most tokens with its most trained ones."""
    settings, lengths = case.recipe.train, samples.lengths + case.recipe.adapter.num_virtual_tokens
    most_trained, most_tokens = batching.largest_micro_batches(
        lengths,
        samples.num_trained,
        global_batch_size=settings.global_batch_size,
        total_samples=batching.samples_in_run(
            len(samples), settings.global_batch_size, settings.num_train_epochs, settings.max_steps
        ),
        seed=settings.seed,
        max_tokens=settings.max_tokens_per_micro_batch,
        num_ranks=dist.get_world_size(),
        padded=not case.packed,
    )
    of_most = lengths[most_tokens]
    num_tokens = batching.num_cells(of_most, padded=not case.packed)
    return case.sizes(num_tokens, int(of_most.max()), int(samples.num_trained[most_trained].sum()))


def _resident_bytes() -> int:
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    """Of /proc/self/status, in kB there (proc(5))."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _forget_peak() -> None:
    """What rows took before does not count."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # a kernel without it counts from the start
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
