"""What to lower when the memory of a rank does not suffice: one sentence, by the formulas of the plan; no torch."""

import math
from dataclasses import dataclass, replace

from launch import plan
from launch.activations import MicroBatch
from launch.forecast import terms_of, what_plan_chooses
from launch.memory import Sharding
from launch.plan import Case
from launch.plan_report import changes
from launch.recipe import PrefixTuningBlock, Recipe
from launch.table import format_bytes

SAFE_SHARE = 0.75  # of what the formulas say that fits, but did not
_NAMED_SHARE = 0.02  # of the whole; smaller terms are not named


@dataclass(frozen=True)
class Device:
    """The memory that was asked for too much, at that moment."""

    is_gpu: bool
    total_bytes: int  # a GPU's; of the host what this process could have
    free_bytes: int
    own_bytes: int  # of this process


@dataclass(frozen=True)
class Tried:
    """What a rank did."""

    where: str  # "in a trial of the largest micro-batches"
    num_tokens: int  # the most that a micro-batch of the run has; of a padded one, cells
    num_targets: int  # the most trained ones
    longest_tokens: int  # the longest sample of the run, virtual tokens included
    longest_of_batch_tokens: int  # that of the micro-batch with the most tokens


def sentence(tried: Tried, device: Device, case: Case, sharding: Sharding) -> str:
    """Which term is too large, and what makes it smaller by how much."""
    batch = case.sizes(tried.num_tokens, tried.longest_of_batch_tokens, tried.num_targets)
    terms = terms_of(case, sharding, batch, is_gpu=device.is_gpu)
    needed = sum(terms.values())
    large = sorted((term for term in terms.items() if term[1] >= needed * _NAMED_SHARE), key=lambda term: -term[1])
    listed = ", ".join(f"{name} {format_bytes(count)}" for name, count in large)
    start = f"{_start(tried, device)}; by the plan that takes {format_bytes(needed)} ({listed})"
    if not device.is_gpu:  # other ranks, and whatever else runs there, share it
        return f"{start}: {_less(tried, case.recipe)}."
    if needed > device.total_bytes:
        return f"{start}: {_what_fits(tried, case, sharding)}."
    return f"{start}, which should have fitted: end other processes that use this GPU, or {_less(tried, case.recipe)}."


def sentence_without_plan(tried: Tried, device: Device, recipe: Recipe, why: str) -> str:
    """The same for a model that the plan does not know; `why` it does not."""
    return f"{_start(tried, device)}: {_less(tried, recipe)} (no plan can say more: {why.rstrip('.')})."


def sentence_of_start(device: Device) -> str:
    """Before there is a micro-batch."""
    what, others = ("GPU memory", ", or end other processes that use this GPU") if device.is_gpu else ("memory", "")
    return (
        f"No {what} was left while base and engine were made; this rank had {format_bytes(device.own_bytes)}, and "
        f"{format_bytes(device.free_bytes)} of {format_bytes(device.total_bytes)} were free: take a layout that shares "
        f"out or offloads more (python -m launch plan RECIPE names one), or more GPUs{others}."
    )


def _start(tried: Tried, device: Device) -> str:
    what = "GPU memory" if device.is_gpu else "memory"
    there = f" of {format_bytes(device.total_bytes)}" if device.is_gpu else ""
    return (
        f"No {what} was left {tried.where}, of at most {tried.num_tokens:,} tokens and "
        f"{tried.num_targets:,} trained ones; this rank had {format_bytes(device.own_bytes)}, and "
        f"{format_bytes(device.free_bytes)}{there} were free"
    )


def _what_fits(tried: Tried, case: Case, sharding: Sharding) -> str:
    """In the order of what it costs: smaller micro-batches, activations made again, another layout, shorter samples."""
    settings = case.recipe.train
    budget = _largest_budget(tried, case, sharding, settings.gradient_checkpointing)
    if budget >= tried.num_tokens:  # as full a one of samples that are all alike would fit
        return _less(tried, case.recipe)
    if budget:
        return f"set {_budget(case.recipe, tried, budget)}, the largest that fits by the plan"
    may_checkpoint = not settings.gradient_checkpointing and not isinstance(case.recipe.adapter, PrefixTuningBlock)
    budget = _largest_budget(tried, case, sharding, True) if may_checkpoint else 0
    if budget:
        also = f" and {_budget(case.recipe, tried, budget)}" if budget < tried.num_tokens else ""
        return f"set train.gradient_checkpointing=true{also}, for no budget fits without"
    chosen = what_plan_chooses(case)
    if chosen is not None:
        changed = "".join(f" {key}={str(value).lower()}" for key, value in changes(case.recipe, chosen).items())
        return f"start with --config_file {chosen.accelerate_file}{changed}, for no budget fits this layout"
    again = settings.gradient_checkpointing or may_checkpoint
    longest = plan.largest_that_fits(lambda tokens: _fits(case, sharding, _single(case, tokens), again), 8)
    shorter = longest - case.recipe.adapter.num_virtual_tokens
    if shorter < 8:
        return "nothing of it fits in any layout; take more GPUs, or larger ones"
    also = " train.gradient_checkpointing=true" if may_checkpoint else ""
    return f"set data.max_length={shorter}{also}, for a sample of {tried.longest_tokens:,} tokens fits in no layout"


def _less(tried: Tried, recipe: Recipe) -> str:
    """The same where the formulas cannot say how much."""
    budget = int(tried.num_tokens * SAFE_SHARE)
    if budget >= tried.longest_tokens:
        return f"set {_budget(recipe, tried, budget)}, three quarters of it"
    if not recipe.train.gradient_checkpointing and not isinstance(recipe.adapter, PrefixTuningBlock):
        return "set train.gradient_checkpointing=true"
    virtual = recipe.adapter.num_virtual_tokens
    shorter = max(int(tried.longest_tokens * SAFE_SHARE) - virtual, 8)
    return f"set data.max_length={shorter}, three quarters of the longest sample's, or take a layout that shares more"


def _budget(recipe: Recipe, tried: Tried, budget: int) -> str:
    """With the data.max_length that goes with it; no sample is longer."""
    virtual = recipe.adapter.num_virtual_tokens
    named = f"train.max_tokens_per_micro_batch={budget}"
    return named if recipe.data.max_length + virtual <= budget else f"{named} data.max_length={budget - virtual}"


def _largest_budget(tried: Tried, case: Case, sharding: Sharding, gradient_checkpointing: bool) -> int:
    """0 when the longest sample does not fit."""

    def fits(tokens: int) -> bool:
        cells = tokens if case.packed else tokens // tried.longest_tokens * tried.longest_tokens
        batch = case.sizes(cells, tried.longest_tokens, math.ceil(cells * case.trained_share))
        return _fits(case, sharding, batch, gradient_checkpointing)

    largest = plan.largest_that_fits(fits, tried.longest_tokens)
    return min(largest, tried.num_tokens)


def _single(case: Case, tokens: int) -> MicroBatch:
    """A sample by itself."""
    return case.sizes(tokens, tokens, math.ceil(tokens * case.trained_share))


def _fits(case: Case, sharding: Sharding, batch: MicroBatch, gradient_checkpointing: bool) -> bool:
    settings = case.recipe.train.model_copy(update={"gradient_checkpointing": gradient_checkpointing})
    so = replace(case, recipe=case.recipe.model_copy(update={"train": settings}))
    return sum(terms_of(so, sharding, batch, is_gpu=True).values()) <= case.hardware.gpu.memory_bytes
