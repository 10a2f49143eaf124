"""A micro-batch in the engine, as a run makes it: the peak of torch's allocator on two ranks, and the plan's sum."""

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, engine_of, run_ranks
from test_activations import peak_bytes
from transformers import Qwen2Config, Qwen2ForCausalLM

from launch import engine as engines
from launch import memory
from launch.activations import (
    LOGITS_AT_ONCE,
    Adapted,
    MicroBatch,
    Way,
    adapter_bytes,
    logits_bytes,
    passing_bytes,
    saved_bytes,
)
from launch.config import load_recipe
from launch.head import LossHead, find_head
from launch.memory import Model
from launch.packing import batch_loss, collate, forward_arguments
from launch.plan import sharding_of
from launch.samples import Samples
from launch.shapes import base_of_config, read_config
from launch.trained_shapes import adapted_layers, trained_shapes

pytestmark = pytest.mark.slow
NUM_TOKENS, NUM_TARGETS = 512, 64
# The shipped buckets are larger than all of this model.
SMALL = {"reduce_bucket_size": 100_000}
SMALL_3 = {
    "stage3_prefetch_bucket_size": 200_000,
    "stage3_max_live_parameters": 1_000_000,
    "stage3_max_reuse_distance": 1_000_000,
    "stage3_param_persistence_threshold": 300,
}


def peak_of_a_micro_batch(recipe_path: str) -> int:
    """That of a micro-batch of two samples in the third step, when DeepSpeed knows the order of the modules."""
    recipe = load_recipe(Path(recipe_path))
    engine = engine_of(recipe, "bf16")
    base = engine.module.get_base_model()
    accepts, head = forward_arguments(base), find_head(base)[0]
    assert head is not None
    is_trained = np.arange(NUM_TOKENS) % (NUM_TOKENS // NUM_TARGETS) == 1
    lengths = np.full(2, NUM_TOKENS // 2)
    samples = Samples(np.arange(NUM_TOKENS, dtype=np.int32) % 100, is_trained, lengths * (0, 1), lengths, lengths)
    batch = collate(samples, [0, 1], engine.device, packed=True)

    def micro_batch(is_last: bool) -> None:
        loss, _ = batch_loss(engine, batch, accepts=accepts, head=LossHead(head, LOGITS_AT_ONCE // 2000))
        engines.backward(engine, loss, is_last=is_last)

    for _ in range(2):
        micro_batch(False)
        micro_batch(True)
        engines.step(engine, 0.0)
    gc.collect()
    return peak_bytes(lambda: micro_batch(False))


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_micro_batch_takes_at_most_what_was_planned(stage: int, gradient_checkpointing: bool, tmp_path: Path) -> None:
    """Gradient buckets stand before it, in part; so the sum is a little more than what it adds."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    Qwen2ForCausalLM(config).save_pretrained(str(tmp_path / "base"))
    tree: dict[str, Any] = {
        "model": {"name_or_path": str(tmp_path / "base")},
        "data": {"train": "rows.jsonl", "template": "chatml"},
        "adapter": {"r": 4, "lora_dropout": 0.1},
        "train": {"gradient_checkpointing": gradient_checkpointing},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    deepspeed = json.loads((ROOT / f"configs/deepspeed/zero{stage}_no_offload.json").read_text(encoding="utf-8"))
    deepspeed["zero_optimization"] |= SMALL | (SMALL_3 if stage == 3 else {})
    (tmp_path / "zero.json").write_text(json.dumps(deepspeed), encoding="utf-8")
    measured = max(run_ranks(2, peak_of_a_micro_batch, str(tmp_path / "recipe.yaml"), deepspeed=tmp_path / "zero.json"))

    recipe, sharding = load_recipe(tmp_path / "recipe.yaml"), sharding_of(deepspeed)
    base = base_of_config(read_config(tmp_path / "base" / "config.json"), "base")
    trained = trained_shapes(recipe, base)
    model = Model(base, trained, (tuple(trained),), 2, False, False)
    adapted = Adapted({path: (inputs, 4) for path, (inputs, _, _) in adapted_layers(recipe.adapter, base).items()}, 0.1)
    way = Way(2, 2, False, gradient_checkpointing, stage == 3)
    batch = MicroBatch(NUM_TOKENS, NUM_TOKENS // 2, NUM_TARGETS, NUM_TARGETS, is_masked=False, is_judged_in_head=True)
    adapters = adapter_bytes(base, adapted, way, is_masked=False)
    predicted = saved_bytes(base, adapters, batch, way)
    predicted += max(passing_bytes(base, adapters, batch, way), logits_bytes(base, batch, way))
    predicted += memory.gathered_bytes(model, sharding, gradient_checkpointing=gradient_checkpointing)
    predicted += memory.gradient_bytes(model, sharding, 2)
    assert measured <= predicted <= 1.15 * measured
