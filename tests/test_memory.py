"""The bytes of a rank: equal to what DeepSpeed, bitsandbytes and the engine hold for tiny models, term by term."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World, deepspeed_json, engine_of, run_ranks

from launch import engine as engines
from launch import memory
from launch.config import load_recipe
from launch.memory import Model, Sharding
from launch.plan import sharding_of
from launch.shapes import base_of_config, read_config
from launch.trained_shapes import trained_shapes

LORA = {"r": 3, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}
AHEAD = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 500, "stage3_max_live_parameters": 4000}
SAVED = LORA | {"modules_to_save": ["lm_head"]}


def model_of(recipe_path: Path, value_bytes: int = 4) -> Model:
    recipe = load_recipe(recipe_path)
    base = base_of_config(read_config(Path(recipe.model.name_or_path) / "config.json"), "base")
    trained = trained_shapes(recipe, base)
    groups = memory.group_names(trained, has_loraplus=recipe.train.loraplus_lr_ratio is not None)
    return Model(base, trained, groups, value_bytes, recipe.model.load_in_4bit, recipe.model.bnb_4bit_use_double_quant)


def held_by_a_rank(recipe_path: str) -> dict[str, int]:
    """Starts the engine as a run does, makes two micro-batches, and counts what this rank holds."""
    recipe = load_recipe(Path(recipe_path))
    engine = engine_of(recipe, "fp32")
    held = engines.bytes_on_this_rank(engine)
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        held["gradient sums"] = optimizer.grad_partitions_flat_buffer.nbytes
        held["handed gradients"] = sum(group.grad.nbytes for group in optimizer.fp32_partitioned_groups_flat)
        held["gathered"] = most_gathered(engine)
    else:
        held["handed gradients"] = sum(group.grad.nbytes for group in optimizer.single_partition_of_fp32_groups)
        held["16-bit copies"] = sum(copy.nbytes for copy in optimizer.param_buffer_of_bit16_for_cpu_offload_groups)
        held["room for a gradient"] = optimizer.temp_grad_buffer_for_cpu_offload.nbytes
    return held


def most_gathered(engine: Any) -> int:
    """The most bytes of parameters that are whole at a time, in the third of three micro-batches.

    Looked at whenever a module's parameters have been fetched.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    fetch, parameters, seen = coordinator.fetch_sub_module, list(engine.module.parameters()), [0]

    def watched(*arguments: Any, **named: Any) -> None:
        fetch(*arguments, **named)
        whole = [p for p in parameters if p.ds_status.name != "NOT_AVAILABLE"]
        seen.append(sum(p.ds_numel * p.element_size() for p in whole))

    coordinator.fetch_sub_module = watched
    ids = torch.arange(40)[None] % 100
    for _ in range(3):
        seen.clear()
        loss = engine(input_ids=ids, use_cache=False).logits.sum()
        engines.backward(engine, loss, is_last=True)
        engines.step(engine, 0.0)
    return max(seen)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("adapter", "num_ranks"),
    [(LORA, 1), (LORA, 2), (LORA, 3), (SAVED, 3)],
    ids=["lora-1", "lora-2", "lora-3", "with a head-3"],
)
def test_bytes_of_a_rank_are_deepspeeds(
    world: World, tmp_path: Path, stage: int, num_ranks: int, adapter: dict[str, Any]
) -> None:
    """Tensors whose sizes divide by no number of ranks among them; LoRA+ has two groups."""
    ratio = {"loraplus_lr_ratio": 4.0} if adapter is LORA else {}
    recipe = world.recipe(f"held-{tmp_path.name}", adapter=adapter, train=ratio)
    deepspeed = deepspeed_json(tmp_path, stage)
    sharding, model = sharding_of(json.loads(deepspeed.read_text(encoding="utf-8"))), model_of(recipe)
    held = run_ranks(num_ranks, held_by_a_rank, str(recipe), deepspeed=deepspeed)
    share = memory.trained_share(model, num_ranks, stage)
    for rank in held:
        assert rank["weights"] == memory.parameter_bytes(model, num_ranks, stage)
        assert rank["optimizer"] == memory.optimizer_bytes(model, num_ranks, stage)
        if stage == 3:
            assert rank["gradient sums"] + rank["handed gradients"] == 2 * share * 4
            predicted = memory.gathered_bytes(model, sharding, gradient_checkpointing=False)
            assert rank["gathered"] == predicted
        else:
            largest = max(map(math.prod, model.trained.values()))
            pinned = rank["optimizer"] // 3 + rank["handed gradients"] + rank["16-bit copies"]
            pinned += rank["room for a gradient"] + model.num_trained * 4
            assert pinned == sum(memory.pinned_buffers(model, sharding, num_ranks))
            assert rank["room for a gradient"] == largest * 4


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_bytes_of_a_base_in_four_bits(world: World, tmp_path: Path, stage: int) -> None:
    """ZeRO-3 shares the packed numbers out, two in a byte; three ranks."""
    recipe = world.recipe(f"nf4-{tmp_path.name}", adapter=LORA, model={"load_in_4bit": True})
    held = run_ranks(3, held_by_a_rank, str(recipe), deepspeed=deepspeed_json(tmp_path, stage))
    assert {rank["weights"] for rank in held} == {memory.parameter_bytes(model_of(recipe), 3, stage)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "gradient_checkpointing"),
    [
        ({"stage3_max_reuse_distance": 20_000, "stage3_prefetch_bucket_size": 0}, True),
        (AHEAD, False),
        (AHEAD, True),
        ({"stage3_param_persistence_threshold": 200, "stage3_max_reuse_distance": 5000}, True),
    ],
    ids=["kept for reuse", "fetched ahead", "fetched ahead, recomputed", "small ones always"],
)
def test_gathered_is_what_deepspeed_gathers(
    world: World, tmp_path: Path, settings: dict[str, int], gradient_checkpointing: bool
) -> None:
    train = {"gradient_checkpointing": gradient_checkpointing}
    recipe = world.recipe(f"gathered-{tmp_path.name}", adapter=LORA, train=train)
    deepspeed = deepspeed_json(tmp_path)
    tree = json.loads(deepspeed.read_text(encoding="utf-8"))
    tree["zero_optimization"] |= settings
    deepspeed.write_text(json.dumps(tree), encoding="utf-8")
    model = model_of(recipe)
    predicted = memory.gathered_bytes(model, sharding_of(tree), gradient_checkpointing=gradient_checkpointing)
    for rank in run_ranks(2, held_by_a_rank, str(recipe), deepspeed=deepspeed):
        assert abs(predicted - rank["gathered"]) <= 0.02 * rank["gathered"]


def sharding(**changes: Any) -> Sharding:
    given: dict[str, Any] = {
        "stage": 3,
        "offload_optimizer": False,
        "offload_param": False,
        "overlap_comm": True,
        "reduce_bucket_size": 1000,
        "prefetch_bucket_size": 0,
        "persistence_threshold": 0,
        "max_live_parameters": 10**9,
        "max_reuse_distance": 0,
    }
    return Sharding(**given | changes)


@pytest.fixture(name="model")
def _model(world: World) -> Model:
    return model_of(world.recipe("terms", adapter=LORA), value_bytes=2)


def test_gathered_is_the_largest_tensor_and_what_is_kept_beside_it(model: Model) -> None:
    """Hidden 32, MLP 48, 600 tokens: embeddings and head have 19,200 numbers each, an MLP matrix 1,536."""
    head = math.prod(model.base.shapes["lm_head.weight"]) * 2
    assert memory.gathered_bytes(model, sharding(stage=2), gradient_checkpointing=False) == 0
    assert memory.gathered_bytes(model, sharding(), gradient_checkpointing=False) == head
    small = sum(math.prod(s) for s in [*model.base.shapes.values(), *model.trained.values()] if math.prod(s) <= 100) * 2
    persistent = sharding(persistence_threshold=100)
    assert memory.gathered_bytes(model, persistent, gradient_checkpointing=False) == head + small
    everything = memory.parameter_bytes(model, 1, 3)  # but the embeddings, which the backward pass does not want
    kept = sharding(max_reuse_distance=10**9)
    assert memory.gathered_bytes(model, kept, gradient_checkpointing=False) == everything - head


def test_prefetching_runs_ahead_up_to_the_live_parameters(model: Model) -> None:
    """Each module fetches a bucket more, until so many are whole; the last one may go beyond."""
    alone = memory.gathered_bytes(model, sharding(), gradient_checkpointing=True)
    head = math.prod(model.base.shapes["lm_head.weight"])
    ahead = sharding(prefetch_bucket_size=500, max_live_parameters=3000)
    assert alone == head * 2
    assert alone < memory.gathered_bytes(model, ahead, gradient_checkpointing=True) <= (3000 + head) * 2


def test_gradients_and_optimizer_go_where_the_layout_says(model: Model) -> None:
    """Two buckets under ZeRO-2, the largest gradient by itself when it is larger than a bucket."""
    trained, largest = model.num_trained, max(map(math.prod, model.trained.values()))
    share = memory.trained_share(model, 4, 2)
    assert share == math.ceil(trained / 8) * 2
    reduced = trained * 2 + math.ceil(trained / 4) * 4
    whole = sharding(stage=2, reduce_bucket_size=10_000)
    assert largest < trained < 10_000
    assert memory.gradient_bytes(model, whole, 4) == 2 * 10_000 * 2 + reduced + 2 * share * 4
    offloaded = sharding(stage=2, reduce_bucket_size=10_000, offload_optimizer=True)
    assert memory.gradient_bytes(model, offloaded, 4) == 2 * 10_000 * 2 + reduced + largest * 2
    assert memory.host_optimizer_bytes(model, whole, 4) == memory.pinned_bytes(model, whole, 4) == 0
    small = sharding(reduce_bucket_size=10)
    assert memory.gradient_bytes(model, small, 1) >= 10 * 2 + largest * 4


def test_host_memory_of_offloaded_parameters(model: Model) -> None:
    kept = sharding(offload_param=True, offload_optimizer=True)
    share = memory.trained_share(model, 2, 3)
    asked = memory.pinned_buffers(model, kept, 2)
    assert sum(asked) == memory.parameter_bytes(model, 2, 3) + share * (2 + 8)
    given = memory.pinned_bytes(model, kept, 2)  # powers of two
    assert sum(asked) < given < 2 * sum(asked)
    assert given == sum(2 ** math.ceil(math.log2(count)) for count in asked)
    assert memory.host_optimizer_bytes(model, kept, 2) == share * 12
    whole = model.base.num_parameters * 2
    assert memory.loading_bytes(model, kept, 4) == whole
    assert memory.loading_bytes(model, sharding(stage=2), 4) == 5 * whole


def test_checkpoints_take_what_check_room_wants() -> None:
    assert memory.checkpoint_bytes(1000) == 1000 * 4 * (2 + len(engines.MOMENTS))


@pytest.mark.parametrize("double_quant", [False, True])
def test_four_bits_take_what_bitsandbytes_holds(double_quant: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(97, 331)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    assert packed.nbytes == math.ceil(weight.numel() / 2)
    held = state.absmax.nbytes + state.code.nbytes
    if double_quant:
        held += state.state2.absmax.nbytes + state.state2.code.nbytes + state.offset.nbytes
    assert memory.nf4_constants_bytes(weight.numel(), double_quant=double_quant) == held


def test_only_the_layers_matrices_are_in_four_bits(world: World) -> None:
    """Embeddings, head, norms and biases stay as they are."""
    quantised = model_of(world.recipe("nf4", adapter=LORA, model={"load_in_4bit": True}), value_bytes=2)
    whole = model_of(world.recipe("whole", adapter=LORA), value_bytes=2)
    matrices = memory.numel(quantised.base.linear_layers.values())
    saved = memory.parameter_bytes(whole, 1, 2) - memory.parameter_bytes(quantised, 1, 2)
    assert saved == matrices * 2 - matrices // 2
    assert memory.unpacked_bytes(quantised) == 32 * 48 * 2 and memory.unpacked_bytes(whole) == 0
