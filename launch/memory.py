"""How many bytes a rank holds, term by term: pure arithmetic, no torch, each formula with its source.

Sources are the files of DeepSpeed 0.19.8 (deepspeed/runtime/zero/), transformers 5.23, PEFT 0.21 and torch 2.13 that
make the tensors; tests/test_memory.py counts those tensors. A term is what it says and nothing else, so that a
measurement that differs tells which one is wrong.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from launch.shapes import Base, Shapes

FP32_BYTES = 4
MASTER_AND_MOMENTS = 3  # fp32 numbers that AdamW keeps of each trained one
NF4_BLOCK, NF4_CONSTANTS_BLOCK = 64, 256  # of bitsandbytes: numbers that share a constant, constants that share one


@dataclass(frozen=True)
class Sharding:
    """What a DeepSpeed JSON says about memory."""

    stage: int
    offload_optimizer: bool
    offload_param: bool
    overlap_comm: bool
    reduce_bucket_size: int
    prefetch_bucket_size: int = 0
    persistence_threshold: int = 0
    max_live_parameters: int = 0
    max_reuse_distance: int = 0


@dataclass(frozen=True)
class Model:
    """A base with its adapter, as it lies in memory."""

    base: Base
    trained: Shapes
    groups: tuple[tuple[str, ...], ...]  # the names of the trained parameters by optimizer group
    value_bytes: int  # of a weight, a gradient and an activation: 2, or 4 under fp32
    load_in_4bit: bool
    double_quant: bool
    lora_dropout: float = 0.0

    @functools.cached_property
    def num_trained(self) -> int:
        """Trained numbers."""
        return numel(self.trained.values())

    @functools.cached_property
    def num_matrix_numbers(self) -> int:
        """Numbers of the decoder's linear layers."""
        return numel(self.base.linear_layers.values())

    @functools.cached_property
    def num_lora_numbers(self) -> int:
        """Numbers of LoRA's matrices."""
        return numel(shape for name, shape in self.trained.items() if ".lora_" in name and len(shape) == 2)

    @functools.cached_property
    def dora_sizes(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the linear layers that DoRA adapts."""
        end = ".lora_magnitude_vector.default.weight"
        paths = [
            name.removeprefix("base_model.model.").removesuffix(end) for name in self.trained if name.endswith(end)
        ]
        return [(inputs, outputs) for outputs, inputs in (self.base.shapes[f"{path}.weight"] for path in paths)]

    @functools.cached_property
    def quantised(self) -> frozenset[str]:
        """Names of the weights in 4 bits: those of all linear layers but the head."""
        paths = self.base.linear_layers if self.load_in_4bit else ()
        return frozenset(f"{path}.weight" for path in paths)

    def stored(self, name: str) -> tuple[int, int]:
        """(elements, bytes of each) of a parameter as torch has it; bitsandbytes has two numbers in a byte."""
        if name in self.trained:
            return math.prod(self.trained[name]), self.value_bytes
        count = math.prod(self.base.shapes[name])
        return (math.ceil(count / 2), 1) if name in self.quantised else (count, self.value_bytes)

    @functools.cached_property
    def in_order(self) -> list[str]:
        """All parameters in the order of their modules: those of LoRA behind the layer that they adapt."""
        behind: dict[str, list[str]] = {}
        for name in self.trained:
            owner = name.removeprefix("base_model.model.").partition(".lora_")[0]
            behind.setdefault(owner, []).append(name)
        names: list[str] = []
        for name in self.base.shapes:
            owner = name.rpartition(".")[0]
            names.append(name)
            if f"{owner}.bias" not in self.base.shapes or name.endswith(".bias"):
                names += behind.pop(owner, [])
        return names + [name for rest in behind.values() for name in rest]


def numel(shapes: Iterable[tuple[int, ...]]) -> int:
    """Numbers in tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes)


# ---- weights ----


def nf4_constants_bytes(count: int, *, double_quant: bool) -> int:
    """What a 4-bit weight of `count` numbers has besides them (bitsandbytes.functional.quantize_4bit).

    An fp32 constant for 64 numbers and a table of 16; with double quantisation the constants are in 8 bits, with an
    fp32 constant for 256 of them, an offset and a table of 256. They are no parameters, so ZeRO-3 does not share them
    out.
    """
    blocks = math.ceil(count / NF4_BLOCK)
    if not double_quant:
        return blocks * FP32_BYTES + 16 * FP32_BYTES
    return blocks + math.ceil(blocks / NF4_CONSTANTS_BLOCK) * FP32_BYTES + (16 + 256 + 1) * FP32_BYTES


def parameter_bytes(model: Model, num_ranks: int, stage: int) -> int:
    """The parameters that a rank holds between steps, without the constants of those in 4 bits.

    ZeRO-3: of each parameter its share, rounded up (partition_parameters.py, _partition_param: padded to the ranks).
    """
    total = 0
    for name in (*model.base.shapes, *model.trained):
        count, size = model.stored(name)
        total += (math.ceil(count / num_ranks) if stage == 3 else count) * size
    return total


def adapter_bytes(model: Model, num_ranks: int, stage: int) -> int:
    """Of these the trained ones, in the type of the base."""
    counts = [math.prod(shape) for shape in model.trained.values()]
    return sum(math.ceil(count / num_ranks) if stage == 3 else count for count in counts) * model.value_bytes


def unpacked_bytes(model: Model) -> int:
    """The largest matrix of a base in 4 bits, which is unpacked before each product."""
    sizes = [math.prod(model.base.shapes[name]) for name in model.quantised]
    return max(sizes, default=0) * model.value_bytes


def dora_bytes(model: Model) -> int:
    """What DoRA makes of a matrix before each product with it, at most; nothing without DoRA.

    peft/tuners/lora/dora.py multiplies A and B with a unit matrix, scales the product and adds it to the weight, all of
    them there when the sum's norm is taken.
    """
    return max(map(dora_numbers, model.dora_sizes), default=0) * model.value_bytes


def dora_numbers(size: tuple[int, int]) -> int:
    """Of one matrix with so many (inputs, outputs)."""
    inputs, outputs = size
    return inputs * inputs + 3 * inputs * outputs


def constants_bytes(model: Model) -> int:
    """The constants of the weights in 4 bits and the tables that no checkpoint has, whole on every rank."""
    counts = [math.prod(model.base.shapes[name]) for name in model.quantised]
    constants = sum(nf4_constants_bytes(count, double_quant=model.double_quant) for count in counts)
    return constants + model.base.buffer_numbers * model.value_bytes


def gathered_bytes(model: Model, sharding: Sharding, *, gradient_checkpointing: bool) -> int:
    """ZeRO-3: the most that is whole on a GPU at a time, the small parameters that always are included.

    Follows partitioned_param_coordinator.py through a step after the first: a module's parameters are fetched, then the
    next ones up to the prefetch bucket; afterwards they are let go unless they are used again within the reuse
    distance.
    """
    if sharding.stage < 3:
        return 0
    sizes = {name: model.stored(name) for name in model.in_order}
    persistent = [name for name, (count, _) in sizes.items() if count <= sharding.persistence_threshold]
    trace = _trace(model, gradient_checkpointing)
    counts = [sizes[name][0] for name in trace]
    before = [0]  # elements of the trace before each place
    for count in counts:
        before.append(before[-1] + count)
    next_use: list[int | None] = [None] * len(trace)
    last_seen: dict[str, int] = {}
    for place in range(len(trace) - 1, -1, -1):
        next_use[place] = last_seen.get(trace[place])
        last_seen[trace[place]] = place
    # Of those that are not always whole: who is, how many numbers that are, and how many bytes at most so far.
    always, live = set(persistent), set[str]()
    live_count = live_bytes = most = fetched_up_to = 0
    for place, name in enumerate(trace):
        fetched = [] if name in always or name in live else [name]
        fetched_up_to = max(fetched_up_to, place + 1)
        free = sharding.max_live_parameters - live_count - sum(sizes[one][0] for one in fetched)
        room = min(sharding.prefetch_bucket_size, free)
        while fetched_up_to < len(trace) and room > 0:
            other = trace[fetched_up_to]
            if other not in always and other not in live and other not in fetched:
                fetched.append(other)
                room -= sizes[other][0]
            fetched_up_to += 1
        live |= set(fetched)
        live_count += sum(sizes[one][0] for one in fetched)
        live_bytes += sum(math.prod(sizes[one]) for one in fetched)
        most = max(most, live_bytes)
        again = next_use[place]
        is_kept = again is not None and (
            again < fetched_up_to or before[again] - before[place + 1] < sharding.max_reuse_distance
        )
        if name in live and not is_kept:
            live.remove(name)
            live_count -= sizes[name][0]
            live_bytes -= math.prod(sizes[name])
    return most + sum(sizes[name][0] * sizes[name][1] for name in persistent)


def _trace(model: Model, gradient_checkpointing: bool) -> list[str]:
    """The parameters as a step uses them: forward, then backward, with each layer forward again if it is recomputed."""
    prefix = model.base.layer_prefix
    copies = {name.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for name in model.trained}
    names = [name for name in model.in_order if name not in copies]  # where a copy is trained, it is used

    def layer_of(name: str) -> str | None:
        _, found, rest = name.partition(prefix)
        return rest.partition(".")[0] if found else None

    runs: list[list[str]] = []
    for name in names:
        if runs and layer_of(runs[-1][0]) == layer_of(name) is not None:
            runs[-1].append(name)
        else:
            runs.append([name])
    backward: list[str] = []
    for run in reversed(runs):
        if gradient_checkpointing and layer_of(run[0]) is not None:
            backward += run
        backward += reversed(run)
    if names[0] not in model.trained:  # frozen embeddings have no backward pass
        backward.remove(names[0])
    return names + backward


# ---- what the optimizer keeps ----


def trained_share(model: Model, num_ranks: int, stage: int) -> int:
    """Trained numbers whose masters and moments a rank has.

    ZeRO-3: the share of each parameter, rounded up. ZeRO-2: a group is one flat tensor, padded to twice the ranks
    (stage_1_and_2.py, nccl_start_alignment_factor), of which a rank has its part.
    """
    if stage == 3:
        names = [name for group in model.groups for name in group]
        return sum(math.ceil(math.prod(model.trained[name]) / num_ranks) for name in names)
    flat = [numel(model.trained[name] for name in group) for group in model.groups]
    return sum(math.ceil(count / (2 * num_ranks)) * 2 for count in flat)


def optimizer_bytes(model: Model, num_ranks: int, stage: int) -> int:
    """fp32 masters and AdamW's two moments (engine.py, bytes_on_this_rank)."""
    return trained_share(model, num_ranks, stage) * FP32_BYTES * MASTER_AND_MOMENTS


def gradient_bytes(model: Model, sharding: Sharding, num_ranks: int) -> int:
    """Gradients and the buckets that they are reduced in, on the GPU, at most.

    Buckets of `reduce_bucket_size` numbers: one under ZeRO-3 (stage3.py), two under ZeRO-2 where communication overlaps
    (stage_1_and_2.py, setup_buckets), and while one is reduced a copy of what is in it, in fp32 for this rank's share.
    A gradient that is larger than a bucket goes by itself. The fp32 sum of a rank's share stays on the GPU, twice when
    it is handed to the optimizer, unless the optimizer is offloaded; ZeRO-2 then has a buffer for the largest
    parameter.
    """
    size, share = model.value_bytes, trained_share(model, num_ranks, sharding.stage)
    largest = max(math.prod(shape) for shape in model.trained.values())
    buckets = 2 if sharding.stage < 3 and sharding.overlap_comm else 1
    reduced = max(min(model.num_trained, sharding.reduce_bucket_size), largest)
    total = buckets * sharding.reduce_bucket_size * size
    total += reduced * size + math.ceil(reduced / num_ranks) * FP32_BYTES
    total += largest * size if largest > sharding.reduce_bucket_size else 0
    if not sharding.offload_optimizer:
        return total + 2 * share * FP32_BYTES
    return total + (largest * size if sharding.stage < 3 else 0)


# ---- the memory of the host ----


def pinned_buffers(model: Model, sharding: Sharding, num_ranks: int) -> list[int]:
    """The bytes that a rank asks for in page-locked host memory, buffer by buffer.

    offload_param: its share of each weight (partition_parameters.py), of the trained ones a second, flat copy
    (stage3.py, _create_param_groups_fp16_flat_cpu_memory; the first is let go, and counted all the same).
    offload_optimizer: ZeRO-3 two fp32 gradients of its share; ZeRO-2 of each group the fp32 master, its gradient and a
    16-bit copy, room for the largest gradient, and the sum of the micro-batches' whole gradients, each by itself.
    """
    size, buffers = model.value_bytes, []
    shares = [trained_share(replace(model, groups=(group,)), num_ranks, sharding.stage) for group in model.groups]
    if sharding.offload_param:
        stored = [model.stored(name) for name in (*model.base.shapes, *model.trained)]
        buffers += [math.ceil(count / num_ranks) * each for count, each in stored]
        buffers += [share * size for share in shares]
    if sharding.offload_optimizer and sharding.stage == 3:
        buffers += [sum(shares) * FP32_BYTES, *(share * FP32_BYTES for share in shares)]
    elif sharding.offload_optimizer:
        gradients = [math.prod(shape) * size for shape in model.trained.values()]
        buffers += [share * each for share in shares for each in (FP32_BYTES, FP32_BYTES, size)]
        buffers += [max(gradients), *gradients]
    return buffers


def pinned_bytes(model: Model, sharding: Sharding, num_ranks: int) -> int:
    """What a rank keeps in page-locked host memory.

    torch's allocator for it gives a power of two for each buffer (CachingHostAllocator.h, PowerOf2Ceil), up to twice
    what was asked for.
    """
    return sum(1 << max(count - 1, 0).bit_length() for count in pinned_buffers(model, sharding, num_ranks) if count)


def host_optimizer_bytes(model: Model, sharding: Sharding, num_ranks: int) -> int:
    """What an offloaded optimizer keeps on the host besides the page-locked part: moments, ZeRO-3 masters as well."""
    if not sharding.offload_optimizer:
        return 0
    numbers = MASTER_AND_MOMENTS if sharding.stage == 3 else MASTER_AND_MOMENTS - 1
    return trained_share(model, num_ranks, sharding.stage) * FP32_BYTES * numbers


def loading_bytes(model: Model, sharding: Sharding, ranks_on_node: int) -> int:
    """Host memory that loading the base may take on a node, at most; the file cache, which can be given back, included.

    ZeRO-3: rank zero alone reads values (transformers, _load_state_dict_into_zero3_model). ZeRO-2: each rank has the
    whole on the host before DeepSpeed moves it. In 4 bits: from the file to the GPU, tensor by tensor.
    """
    whole = numel(model.base.shapes.values()) * model.value_bytes
    if model.load_in_4bit or sharding.stage == 3:
        return whole
    return whole * (1 + ranks_on_node)


# ---- the disk ----


def checkpoint_bytes(num_trained: int) -> int:
    """Master, two moments and the adapter's copy of each trained number, in fp32 (room.check_room)."""
    return num_trained * FP32_BYTES * (MASTER_AND_MOMENTS + 1)


def group_names(trained: Shapes, *, has_loraplus: bool) -> tuple[tuple[str, ...], ...]:
    """The optimizer's groups; LoRA+ has A, embeddings and B apart (peft.optimizers.create_loraplus_optimizer)."""
    if not has_loraplus:
        return (tuple(trained),)
    groups: dict[str, list[str]] = {"A": [], "embedding": [], "B": []}
    for name, shape in trained.items():
        is_embedding = "lora_embedding" in name
        groups["embedding" if is_embedding else "B" if "lora_B" in name or len(shape) == 1 else "A"].append(name)
    return tuple(tuple(names) for names in groups.values() if names)
