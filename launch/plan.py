"""What a recipe takes in every layout that ships, and which is the fastest that fits; no weight is read.

The formulas are in memory.py, activations.py and speed.py. Layouts are the accelerate files, whose DeepSpeed JSON says
what is offloaded and how large the buckets are.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch import memory, speed
from launch.activations import Adapted, MicroBatch, Way, adapter_bytes, logits_bytes, passing_bytes, saved_bytes
from launch.errors import ConfigError, ModelError
from launch.hardware import CPU, Hardware
from launch.hub import fetch, header_shapes
from launch.memory import Model, Sharding
from launch.recipe import TINY_MODEL_NAME, LoraBlock, PrefixTuningBlock, Recipe
from launch.shapes import FAMILIES, Base, base_of_config, read_config, shapes_of_files
from launch.trained_shapes import adapted_layers, trained_shapes

ACCELERATE = Path("configs/accelerate")
LAYOUTS = ("zero2_no_offload", "zero2", "zero3_no_offload", "zero3_offload_optimizer", "zero3")
# Assumed, not measured: what CUDA, cuBLAS and NCCL take of a GPU before a tensor is made, the share of a GPU that its
# allocator cannot use for what it is asked, and a rank's Python with its libraries on the host.
CONTEXT_BYTES, FRAGMENTATION_SHARE, PROCESS_BYTES = 1_000_000_000, 0.05, 3_000_000_000
RESERVED_SHARE = 0.1  # of the GPU, that a recommended budget leaves free: the terms have not been measured on one
LARGEST_BUDGET_TOKENS = 65_536


@dataclass(frozen=True)
class Demand:
    """Bytes by name: of a GPU, of a node's memory, of the run directory."""

    gpu: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]

    @property
    def gpu_bytes(self) -> int:
        """Of one GPU."""
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> int:
        """Of one node."""
        return sum(self.host.values())


@dataclass(frozen=True)
class Choice:
    """One layout with one way to run it."""

    layout: str
    load_in_4bit: bool
    gradient_checkpointing: bool
    largest_budget_tokens: int  # that fits; 0: the longest sample does not
    budget_tokens: int  # the fastest that fits, or the longest sample where nothing does; of it are all that follow
    demand: Demand
    work: speed.Work  # of a micro-batch
    num_micro_batches: int  # of a rank, in a step of the longest samples
    seconds: speed.Seconds  # of a step
    is_tight: bool  # it leaves less than RESERVED_SHARE of the GPU free
    obstacle: str  # what there is too little memory for; empty: it runs

    @property
    def accelerate_file(self) -> Path:
        """What accelerate launch is given."""
        return ACCELERATE / f"{self.layout}.yaml"


@dataclass(frozen=True)
class Case:
    """Everything that the choices of one plan have in common."""

    recipe: Recipe
    base: Base
    hardware: Hardware
    precision: str
    packed: bool
    trained_share: float  # of the tokens
    judged: bool | None = None  # whether the loss is computed within the head; None: as is likely

    @property
    def longest_tokens(self) -> int:
        """Of the longest sample that the recipe lets through, virtual tokens included."""
        return self.recipe.data.max_length + self.recipe.adapter.num_virtual_tokens

    @property
    def value_bytes(self) -> int:
        """Of a weight or an activation."""
        return 4 if self.precision == "fp32" else 2

    def model(self, load_in_4bit: bool) -> Model:
        """The base with its adapter, in 4 bits or not."""
        trained = trained_shapes(self.recipe, self.base)
        groups = memory.group_names(trained, has_loraplus=self.recipe.train.loraplus_lr_ratio is not None)
        double_quant = self.recipe.model.bnb_4bit_use_double_quant
        dropout = self.recipe.adapter.lora_dropout if isinstance(self.recipe.adapter, LoraBlock) else 0.0
        return Model(self.base, trained, groups, self.value_bytes, load_in_4bit, double_quant, dropout)

    def micro_batch(self, budget_tokens: int) -> MicroBatch:
        """The fullest that the budget lets through."""
        cells = budget_tokens if self.packed else budget_tokens // self.longest_tokens * self.longest_tokens
        return self.sizes(cells, self.longest_tokens, math.ceil(cells * self.trained_share))

    def sizes(self, num_tokens: int, longest_tokens: int, num_targets: int) -> MicroBatch:
        """One of so many tokens (cells, where padded), its longest sample's and trained ones, as the model sees it."""
        is_masked = self.is_masked(longest_tokens)
        return MicroBatch(
            num_tokens,
            num_columns=num_tokens if self.packed and is_masked else longest_tokens,
            num_targets=num_targets,
            num_logit_rows=num_targets if self.packed or self.is_judged_in_head else num_tokens,
            is_masked=is_masked,
            is_judged_in_head=self.is_judged_in_head,
        )

    def is_masked(self, longest_tokens: int) -> bool:
        """Whether attention has a mask: packed samples that fit into its window are else attended one by one."""
        has_window = 0 < self.base.window_tokens < longest_tokens
        return not self.packed or has_window or self.recipe.model.attn_implementation == "eager"

    @functools.cached_property  # every budget that is tried asks
    def is_judged_in_head(self) -> bool:
        """What a run's probe of the head said, or most likely will: of layers that are not known, that it cannot."""
        if self.judged is not None:
            return self.judged
        trained = trained_shapes(self.recipe, self.base)
        is_trained = any(f".{self.base.head}." in name or "token_adapter" in name for name in trained)
        return self.base.is_known and self.base.family != "chatglm" and not is_trained


# ---- what there is to plan ----


def find_base(recipe: Recipe, config_file: Path | None) -> Base:
    """From the model's own config.json and safetensors headers, or from another config.json.

    Of a model on the hub that is not here config.json alone is fetched, and the headers if its layers are not known.
    Raises ModelError for what cannot be planned.
    """
    name = recipe.model.name_or_path
    if config_file is not None:
        return base_of_config(read_config(config_file), str(config_file))
    if recipe.model.factory is not None:
        raise ModelError(
            f"model.factory = {recipe.model.factory} builds a model of your own, whose layers only its code knows, so "
            "plan cannot say what it needs; give the config.json of a known model of the same sizes with --config."
        )
    if name == TINY_MODEL_NAME:
        raise ModelError(f"model.name_or_path = {name} is built on the spot and fits anywhere; plan a real model.")
    return base_at(name, recipe.model.revision)


def base_at(name: str, revision: str | None) -> Base:
    """That of a directory or a hub id."""
    directory, commit = fetch("model.name_or_path", name, ["config.json"], revision, ModelError)
    config, shapes = read_config(directory / "config.json"), shapes_of_files(directory)
    if shapes is None and commit is not None and config.get("model_type") not in FAMILIES:
        shapes = header_shapes(name, commit)
    return base_of_config(config, name, shapes)


def make_case(recipe: Recipe, base: Base, hardware: Hardware, trained_share: float) -> Case:
    """Raises ConfigError for what the formulas do not cover, and for a precision that the GPU does not have."""
    precision = recipe.train.precision
    if precision == "auto":
        precision = "bf16" if hardware.gpu.has_bf16 else "fp16"
    if precision == "bf16" and not hardware.gpu.has_bf16:
        raise ConfigError(f"train.precision = bf16, which a {hardware.gpu.name} does not do; leave it at auto.")
    return Case(recipe, base, hardware, precision, is_packed(recipe, base), trained_share)


def is_packed(recipe: Recipe, base: Base) -> bool:
    """What a run's probe for leaks will most likely say."""
    return recipe.train.packing == "auto" and not recipe.adapter.num_virtual_tokens and not base.has_own_code


def read_sharding(layout: str) -> Sharding:
    """What the layout's DeepSpeed JSON says."""
    settings = yaml.safe_load((ACCELERATE / f"{layout}.yaml").read_text(encoding="utf-8"))
    path = Path(settings["deepspeed_config"]["deepspeed_config_file"])
    return sharding_of(json.loads(path.read_text(encoding="utf-8")))


def sharding_of(deepspeed: Mapping[str, Any]) -> Sharding:
    """The same of a DeepSpeed configuration; what it leaves out is as in deepspeed/runtime/zero/config.py."""
    zero = deepspeed["zero_optimization"]
    stage = zero["stage"]
    of_stage_3 = {
        "prefetch_bucket_size": zero.get("stage3_prefetch_bucket_size", 50_000_000),
        "persistence_threshold": zero.get("stage3_param_persistence_threshold", 100_000),
        "max_live_parameters": zero.get("stage3_max_live_parameters", 1_000_000_000),
        "max_reuse_distance": zero.get("stage3_max_reuse_distance", 1_000_000_000),
    }
    return Sharding(
        stage=stage,
        offload_optimizer=_is_offloaded(zero.get("offload_optimizer")),
        offload_param=_is_offloaded(zero.get("offload_param")),
        overlap_comm=bool(zero.get("overlap_comm", stage == 3)),
        reduce_bucket_size=int(zero.get("reduce_bucket_size", 500_000_000)),
        **({name: int(count) for name, count in of_stage_3.items()} if stage == 3 else {}),
    )


def _is_offloaded(block: Mapping[str, Any] | None) -> bool:
    return block is not None and block.get("device", "none") != "none"


# ---- one choice ----


def way_of(case: Case, sharding: Sharding, load_in_4bit: bool, gradient_checkpointing: bool) -> Way:
    """How the layers run there."""
    return Way(
        value_bytes=case.value_bytes,
        mask_bytes=1,
        eager=case.recipe.model.attn_implementation == "eager",
        gradient_checkpointing=gradient_checkpointing,
        keeps_linear_inputs=sharding.stage == 3 and not load_in_4bit,
        groups_heads=_groups_heads(case),
    )


def _groups_heads(case: Case) -> bool:
    """What launch/sample_attention.py finds on the hardware itself; FlashAttention came with bf16."""
    gpu = case.hardware.gpu
    return gpu == CPU or (gpu.has_bf16 and case.value_bytes == 2 and case.base.head_dim <= 256)


def adapted_of(case: Case) -> Adapted:
    """What LoRA adapts; nothing, for a soft prompt."""
    adapter = case.recipe.adapter
    if not isinstance(adapter, LoraBlock):
        return Adapted({}, 0.0)
    layers = {path: (inputs, r) for path, (inputs, _, r) in adapted_layers(adapter, case.base).items()}
    return Adapted(layers, adapter.lora_dropout, adapter.use_dora)


def fixed_gpu_bytes(case: Case, model: Model, sharding: Sharding, gradient_checkpointing: bool) -> dict[str, int]:
    """The terms that do not depend on the micro-batch."""
    ranks, stage = case.hardware.num_ranks, sharding.stage
    adapter = memory.adapter_bytes(model, ranks, stage)
    weights = 0 if sharding.offload_param else memory.parameter_bytes(model, ranks, stage) - adapter
    gathered = memory.gathered_bytes(model, sharding, gradient_checkpointing=gradient_checkpointing)
    return {
        "weights": weights + memory.constants_bytes(model),
        "gathered weights": gathered + memory.unpacked_bytes(model) + memory.dora_bytes(model),
        "adapter": 0 if sharding.offload_param else adapter,
        "gradients": memory.gradient_bytes(model, sharding, ranks),
        "optimizer": 0 if sharding.offload_optimizer else memory.optimizer_bytes(model, ranks, stage),
        "CUDA and NCCL": CONTEXT_BYTES,
        "fragmentation": int(case.hardware.gpu.memory_bytes * FRAGMENTATION_SHARE),
    }


def micro_batch_bytes(case: Case, adapters: Sequence[int], way: Way, budget_tokens: int) -> dict[str, int]:
    """The terms that do; the logits are gone when the layers' backward begins, so the larger of both counts."""
    batch = case.micro_batch(budget_tokens)
    largest = max(passing_bytes(case.base, adapters, batch, way), logits_bytes(case.base, batch, way))
    return {"activations": saved_bytes(case.base, adapters, batch, way), "logits or backward": largest}


def host_bytes(case: Case, model: Model, sharding: Sharding) -> dict[str, int]:
    """Of a node. Rank zero gathers a checkpoint, and of a base in 4 bits loads the whole to merge into."""
    per_node, ranks = case.hardware.gpus_per_node, case.hardware.num_ranks
    whole = memory.numel(case.base.shapes.values()) * model.value_bytes
    merging = whole if model.load_in_4bit and case.recipe.merges else 0
    loading = memory.loading_bytes(model, sharding, per_node)
    return {
        "processes": per_node * PROCESS_BYTES,
        "page-locked": per_node * memory.pinned_bytes(model, sharding, ranks),
        "optimizer": per_node * memory.host_optimizer_bytes(model, sharding, ranks),
        "load, save or merge": max(loading, memory.checkpoint_bytes(model.num_trained), merging),
    }


def disk_bytes(case: Case, model: Model) -> dict[str, int]:
    """Of the run directory (room.check_room): the newest checkpoints, the best, one being written, the merged."""
    merged = memory.numel(case.base.shapes.values()) * model.value_bytes if case.recipe.merges else 0
    keep = case.recipe.train.save_total_limit + 2
    return {"checkpoints": keep * memory.checkpoint_bytes(model.num_trained), "merged model": merged}


def choose(case: Case, model: Model, layout: str, *, gradient_checkpointing: bool) -> Choice:
    """Whether it fits, the largest budget that does, and the fastest that leaves RESERVED_SHARE of the GPU free."""
    sharding = read_sharding(layout)
    way = way_of(case, sharding, model.load_in_4bit, gradient_checkpointing)
    fixed = fixed_gpu_bytes(case, model, sharding, gradient_checkpointing)
    adapters = adapter_bytes(case.base, adapted_of(case), way, is_masked=case.is_masked(case.longest_tokens))
    longest, ranks, gpu_bytes = case.longest_tokens, case.hardware.num_ranks, case.hardware.gpu.memory_bytes

    def fits(tokens: int, share: float = 1.0) -> bool:
        needed = sum(fixed.values()) + sum(micro_batch_bytes(case, adapters, way, tokens).values())
        return needed <= gpu_bytes * share

    largest = largest_that_fits(fits, longest)
    per_rank = math.ceil(case.recipe.train.global_batch_size / ranks)  # samples of a step
    budgets = [samples * longest for samples in range(1, per_rank + 1)]
    roomy = [tokens for tokens in budgets if fits(tokens, 1 - RESERVED_SHARE)]
    timed = []
    for tokens in roomy or [longest]:
        work = speed.work_of(model, sharding, ranks, case.micro_batch(tokens), way)
        count = math.ceil(per_rank / (tokens // longest))
        seconds = speed.seconds_of_step(work, case.hardware, count)
        timed.append((seconds.middle, tokens, work, count, seconds))
    _, tokens, work, count, seconds = min(timed, key=lambda one: one[:2])
    demand = Demand(
        fixed | micro_batch_bytes(case, adapters, way, tokens),
        host_bytes(case, model, sharding),
        disk_bytes(case, model),
    )
    return Choice(
        layout=layout,
        load_in_4bit=model.load_in_4bit,
        gradient_checkpointing=gradient_checkpointing,
        largest_budget_tokens=largest,
        budget_tokens=tokens,
        demand=demand,
        work=work,
        num_micro_batches=count,
        seconds=seconds,
        is_tight=not roomy,
        obstacle=_obstacle(case, demand, model),
    )


def largest_that_fits(fits: Callable[[int], bool], smallest: int) -> int:
    """By halves; 0 when the smallest does not fit."""
    if not fits(smallest):
        return 0
    low, high = smallest, max(smallest, LARGEST_BUDGET_TOKENS)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _obstacle(case: Case, demand: Demand, model: Model) -> str:
    """What a choice has too little for; empty if it runs."""
    gpu, host = case.hardware.gpu.memory_bytes, case.hardware.host_memory_bytes
    if demand.gpu_bytes > gpu:
        return "GPU memory"
    if host is not None and demand.host_bytes > host:
        return "host memory"
    whole = memory.parameter_bytes(model, 1, 2) + memory.constants_bytes(model)
    if model.load_in_4bit and whole + CONTEXT_BYTES > gpu:  # each rank quantises the whole on its GPU
        return "loading it"
    return ""


# ---- all of them ----


def choices(case: Case) -> list[Choice]:
    """Every layout, base in the recipe's type first, with and without gradient checkpointing.

    Not in 4 bits what a factory builds, which the recipe does not allow.
    """
    wanted = case.recipe.model.load_in_4bit
    types = (wanted, not wanted) if case.recipe.model.factory is None else (False,)
    ways = (False,) if isinstance(case.recipe.adapter, PrefixTuningBlock) else (False, True)
    return [
        choose(case, model, layout, gradient_checkpointing=gradient_checkpointing)
        for model in map(case.model, types)
        for layout in LAYOUTS
        for gradient_checkpointing in ways
    ]


def recommend(case: Case, found: Sequence[Choice]) -> Choice | None:
    """The fastest that fits with room to spare and the base as the recipe has it; None: nothing fits at all.

    Without room to spare only if need be, and then before another type of base, which changes the results.
    """
    wanted = case.recipe.model.load_in_4bit
    fitting = [one for one in found if not one.obstacle]
    for load_in_4bit, is_tight in ((wanted, False), (wanted, True), (not wanted, False), (not wanted, True)):
        some = [one for one in fitting if (one.load_in_4bit, one.is_tight) == (load_in_4bit, is_tight)]
        if some:
            return min(some, key=lambda one: one.seconds.middle)
    return None
