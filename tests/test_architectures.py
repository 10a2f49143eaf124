"""Every architecture that a chat template is for and transformers has: a run, its adapter, its merged weights."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World, build_tokenizer, launch, make_rows, run_ranks
from peft import PeftModel
from safetensors.torch import load_file
from test_reference import assert_our_step_is_theirs
from transformers import AutoConfig, AutoModelForCausalLM

import train
from launch.merge_from_disk import find_source, merge_from_disk

pytestmark = pytest.mark.slow

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that samples matter to each other
}
MIXTURE = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# base_layer: what is around one of two parameters of a module stands in what is around the other.
LATENT_AND_EXPERTS = {*"q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj experts base_layer gate".split()}
FUSED_MLP = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
LORA = {"type": "lora", "r": 4, "lora_dropout": 0.0}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}


@dataclass(frozen=True)
class Case:
    """A tiny configuration, and what a recipe gets that names no targets."""

    sizes: dict[str, Any]
    targets: set[str]
    packed: bool = True
    attention: str = "sdpa"


CASES = {
    "gpt2": Case(GPT, {"c_attn", "c_proj", "c_fc"}),  # transposed: Conv1D
    "qwen2": Case(SIZES, SEVEN),
    "qwen3": Case(SIZES | {"head_dim": 8}, SEVEN),
    "llama": Case(SIZES, SEVEN),
    "mistral": Case(SIZES | {"head_dim": 8, "sliding_window": None}, SEVEN),
    "gemma": Case(SIZES | {"head_dim": 8}, SEVEN),
    "gemma2": Case(SIZES | {"head_dim": 8, "sliding_window": 64}, SEVEN, attention="eager"),
    "phi": Case(SIZES | {"num_key_value_heads": 4}, {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
    "phi3": Case(SIZES | {"pad_token_id": 0}, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "glm": Case(SIZES | {"head_dim": 8}, FUSED_MLP),
    "glm4": Case(SIZES | {"head_dim": 8}, FUSED_MLP),
    "internlm3": Case(SIZES | {"head_dim": 8}, SEVEN),
    "deepseek_v2": Case(SIZES | MIXTURE, LATENT_AND_EXPERTS),
    "deepseek_v3": Case(SIZES | MIXTURE, LATENT_AND_EXPERTS),
    "bloom": Case(
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        packed=False,
        attention="eager",
    ),
    "falcon": Case(
        SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True},
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
        packed=False,
    ),
    "opt": Case(  # its masks know no packed rows, but samples attended one by one need none
        SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.2},
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    ),
}


def world_of(directory: Path, family: str, sizes: dict[str, Any]) -> World:
    """A tiny random model of the architecture, its weights in float32, and 50 rows."""
    rows = make_rows(50)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = build_tokenizer([row["input"] + row["output"] for row in rows])
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **ends | sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(directory / "base"))
    tokenizer.save_pretrained(str(directory / "base"))
    return World(directory, directory / "base", directory / "rows.jsonl")


def logits_of(path: Path, adapter: Path | None, ids: torch.Tensor) -> torch.Tensor:
    """By plain transformers, and PEFT where there is an adapter."""
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(ids).logits
    return logits


@pytest.mark.parametrize("family", CASES)
def test_an_architecture_trains_and_merges(family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two steps under ZeRO-3; the merged logits are those of base and adapter."""
    case = CASES[family]
    world = world_of(tmp_path, family, case.sizes)
    recipe = world.recipe(
        family,
        model={"attn_implementation": case.attention},
        adapter=LORA,
        train={"max_steps": 2, "warmup_steps": 0},
        run={"merge": True, "merge_dtype": "float32"},
    )
    launch(recipe, 2)
    said = " ".join(capfd.readouterr().out.split())
    assert ("packing packed:" in said, "packing padded:" in said) == (case.packed, not case.packed), said
    assert all(math.isfinite(record["loss"]) for record in world.metrics(family, "train"))
    directory = world.run_directory(family)
    exported = load_file(directory / "adapter" / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in exported} == case.targets
    untrained = [name for name, tensor in exported.items() if ".lora_B." in name and not tensor.any()]
    assert untrained == []
    ids = torch.arange(20, 60)[None]
    before, tuned = (logits_of(world.base, adapter, ids) for adapter in (None, directory / "adapter"))
    merged = logits_of(directory / "merged", None, ids)
    assert (tuned - before).abs().max() > 0.01 * before.abs().max(), "the adapter must matter"
    assert (merged - tuned).abs().max() < 1e-4 * tuned.abs().max()
    assert merge_from_disk(find_source(directory), directory / "from-disk", max_shard_size_bytes=10**9)
    live, from_disk = (directory / name / "model.safetensors" for name in ("merged", "from-disk"))
    assert live.read_bytes() == from_disk.read_bytes()


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_gradients_of_glm_are_those_of_peft(family: str, tmp_path: Path) -> None:
    """Fused gate_up_proj, rotary embeddings on half of each head, norms behind the blocks (GLM-4)."""
    world = world_of(tmp_path, family, CASES[family].sizes)
    adapter = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
    assert_our_step_is_theirs(world.recipe(family, adapter=adapter, train={"max_tokens_per_micro_batch": 128}), 1)


def test_what_cannot_be_merged_is_refused_at_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """DoRA on embeddings, with the merge at the end; without it, the same recipe trains."""
    world = world_of(tmp_path, "qwen2", SIZES)
    adapter = LORA | {"use_dora": True, "target_modules": ["embed_tokens"]}
    recipe = world.recipe("dora", adapter=adapter, train={"max_steps": 1}, run={"merge": True})
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    said = "Refused: model.embed_tokens: PEFT's DoraEmbeddingVariant layer cannot be merged; train with run.merge=false"
    assert said in capfd.readouterr().err
    launch(recipe, 1, "run.merge=false")
    assert len(world.metrics("dora", "train")) == 1


def test_dropout_on_experts_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    world = world_of(tmp_path, "deepseek_v3", SIZES | MIXTURE)
    recipe = world.recipe("deepseek_v3", adapter=LORA | {"lora_dropout": 0.1})
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    assert (
        "Refused: adapter: the experts of a DeepseekV3ForCausalLM are one tensor, and lora.ParamWrapper does not work "
        "with lora_dropout != 0; change that, or name adapter.target_modules without the experts."
    ) in capfd.readouterr().err
