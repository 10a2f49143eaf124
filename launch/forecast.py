"""What a start will hold by the plan's formulas, beside what there is, and what the plan would have chosen for it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launch.activations import MicroBatch, adapter_bytes, logits_bytes, passing_bytes, saved_bytes
from launch.findings import Finding
from launch.hardware import CPU, GPUS, MIB, Gpu, Hardware, known_gpu
from launch.memory import Sharding
from launch.plan import (
    RESERVED_SHARE,
    Case,
    Choice,
    adapted_of,
    choices,
    fixed_gpu_bytes,
    host_bytes,
    read_sharding,
    recommend,
    way_of,
)
from launch.plan_report import layout_name
from launch.table import format_bytes

_NO_TENSORS = ("CUDA and NCCL", "fragmentation")  # of the terms, what torch's allocator does not count


@dataclass(frozen=True)
class Forecast:
    """The bytes of one rank by the plan's names, with the largest micro-batch of the run."""

    terms: dict[str, int]
    limit_bytes: int | None  # of its GPU; None on a CPU

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(self.terms.values())

    @property
    def counted_bytes(self) -> int:
        """What a measured peak counts: torch's tensors on a GPU, all that is resident on a CPU."""
        return sum(count for name, count in self.terms.items() if name not in _NO_TENSORS)

    def line(self) -> str:
        """For the banner, with its two largest terms."""
        largest = sorted(self.terms.items(), key=lambda term: -term[1])[:2]
        where = "a rank" if self.limit_bytes is None else f"of a GPU's {format_bytes(self.limit_bytes)}"
        named = ", ".join(f"{name} {format_bytes(count)}" for name, count in largest)
        return f"{format_bytes(self.total_bytes)} {where} by the plan's formulas: {named}, ..."

    def compared(self, peak_bytes: int) -> tuple[str, dict[str, float]]:
        """(a line for the end of a run, the same for metrics.jsonl)."""
        error = self.counted_bytes / peak_bytes - 1
        than = f"{abs(error):.0%} {'more' if error > 0 else 'less'} than it was"
        line = f"memory  {format_bytes(peak_bytes)} at most; forecast {format_bytes(self.counted_bytes)}, {than}"
        return line, {"peak_bytes": peak_bytes, "forecast_bytes": self.counted_bytes, "forecast_error": error}


def hardware_of_run(gpu: tuple[str, int] | None, num_ranks: int, ranks_per_node: int, host_bytes: int) -> Hardware:
    """Of ranks with this GPU each, by its name and memory; None: on CPUs. How GPUs are joined is not known: PCIe."""
    if gpu is None:
        kind = CPU
    else:
        name, memory_bytes = gpu
        known = known_gpu(name)
        unknown = Gpu(name, 0, 0, 0, 0, 0, True, "")
        kind = replace(known or unknown, memory_mib=memory_bytes // MIB)
    return Hardware(kind, ranks_per_node, num_ranks // ranks_per_node, host_bytes, "pcie")


def terms_of(case: Case, sharding: Sharding, batch: MicroBatch, *, is_gpu: bool) -> dict[str, int]:
    """Bytes by name of a rank with this micro-batch; on a CPU, where what is offloaded is in the same memory."""
    model, checkpointing = case.model(case.recipe.model.load_in_4bit), case.recipe.train.gradient_checkpointing
    if not is_gpu:  # memory that nothing is written to is not resident, such as the end of a bucket
        bucket = min(sharding.reduce_bucket_size, model.num_trained)
        sharding = replace(sharding, offload_optimizer=False, offload_param=False, reduce_bucket_size=bucket)
    way = way_of(case, sharding, model.load_in_4bit, checkpointing)
    adapters = adapter_bytes(case.base, adapted_of(case), way, is_masked=batch.is_masked)
    terms = fixed_gpu_bytes(case, model, sharding, checkpointing) | {
        "activations": saved_bytes(case.base, adapters, batch, way),
        "logits or backward": max(passing_bytes(case.base, adapters, batch, way), logits_bytes(case.base, batch, way)),
    }
    return {name: count for name, count in terms.items() if is_gpu or name not in _NO_TENSORS}


def forecast(case: Case, sharding: Sharding, batch: MicroBatch, resident_bytes: int | None) -> Forecast:
    """Of this layout and micro-batch. `resident_bytes`: on a CPU, what the process has before its model; else None."""
    if resident_bytes is None:
        return Forecast(terms_of(case, sharding, batch, is_gpu=True), case.hardware.gpu.memory_bytes)
    terms = terms_of(case, sharding, batch, is_gpu=False)
    return Forecast({"Python and libraries": resident_bytes, **terms}, None)


def what_plan_chooses(case: Case) -> Choice | None:
    """None when nothing fits, on a CPU, and where the plan knows no figures of the GPU."""
    return recommend(case, choices(case)) if case.hardware.gpu.name in GPUS else None


def findings(
    case: Case, sharding: Sharding, expected: Forecast, chosen: Choice | None, host_available_bytes: int
) -> Iterator[Finding]:
    """What a GPU run has too little memory for; it stops only where what must be there is more than there is."""
    limit = expected.limit_bytes
    if limit is None:
        return
    remedy = f"plan would choose {_name(chosen)}; see python -m launch plan"
    if expected.total_bytes > limit:
        words, total = (
            f"train.max_tokens_per_micro_batch = {case.recipe.train.max_tokens_per_micro_batch} takes",
            expected.total_bytes,
        )
        least = sum(expected.terms[name] for name in ("weights", "adapter", "gradients", "optimizer"))
        if least > limit:
            words, total = "weights, adapter, gradients and optimizer take", least
        yield Finding(
            f"Here {words} {format_bytes(total)} of a GPU by the plan's formulas, which has {format_bytes(limit)}; "
            f"{remedy}.",
            stops=least > limit,
        )
    model = case.model(case.recipe.model.load_in_4bit)
    needed = sum(host_bytes(case, model, sharding).values())
    if needed > host_available_bytes:
        yield Finding(
            f"A node's ranks take {format_bytes(needed)} of its memory by the plan's formulas, and "
            f"{format_bytes(host_available_bytes)} are left here; ask Slurm for more (--mem); {remedy}.",
            stops=False,
        )


def plan_line(case: Case, sharding: Sharding, chosen: Choice | None) -> str:
    """Whether the plan would choose what runs, for the banner; empty where it knows no figures of the GPU."""
    if case.hardware.gpu.name not in GPUS:
        return ""
    train = case.recipe.train
    is_same = (
        chosen is not None
        and read_sharding(chosen.layout) == sharding
        and chosen.gradient_checkpointing == train.gradient_checkpointing
        and chosen.load_in_4bit == case.recipe.model.load_in_4bit
        and train.max_tokens_per_micro_batch <= chosen.largest_budget_tokens
        and train.max_tokens_per_micro_batch >= chosen.budget_tokens * (1 - RESERVED_SHARE)
    )
    return "chooses this, too" if is_same else f"would choose {_name(chosen)}; see python -m launch plan"


def _name(chosen: Choice | None) -> str:
    return "nothing here" if chosen is None else f"{layout_name(chosen)}, {chosen.budget_tokens:,} tokens a micro-batch"
