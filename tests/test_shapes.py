"""Names and shapes without a weight: those that transformers' classes and PEFT make, and those of safetensors files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, build_base
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from launch.adapter import peft_config
from launch.errors import ConfigError, ModelError
from launch.recipe import LoraBlock, Recipe
from launch.shapes import Base, base_of_config, read_config, shapes_of_files
from launch.trained_shapes import adapted_layers, trained_shapes

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": False,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "tests" / "model_configs").glob("*.json"))
}
NUM_PARAMETERS = {
    "qwen1.5-14b-chat": 14_167_290_880,
    "qwen2-7b-instruct": 7_615_616_512,
    "phi-2": 2_779_683_840,
    "llama-3-8b": 8_030_261_248,
}
OWN_CODE = {
    "baichuan-7b": 7_000_559_616,
    "baichuan-13b": 13_264_901_120,
    "baichuan2-7b": 7_000_559_616 + 2 * (125_696 - 64_000) * 4096,
    "baichuan2-13b": 13_264_901_120 + 2 * (125_696 - 64_000) * 5120,
    "bluelm-7b-chat": 2 * 100_096 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096) + 3 * 4096,
    "chatglm-6b": 6_173_286_400,
    "chatglm3-6b": 6_243_584_000,
    "glm-4-9b-chat": 9_399_951_360,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2": TINY | {"model_type": "qwen2"},
    "qwen2-tied": TINY | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": TINY | {"model_type": "qwen3", "head_dim": 16},
    "llama-biased": TINY | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": TINY | {"model_type": "mistral", "head_dim": 16},
    "phi": TINY | {"model_type": "phi", "qk_layernorm": True},
}


def skeleton(config: dict[str, Any]) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return model


def tiny_recipe(adapter: dict[str, Any], **model: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name_or_path": "base", **model},
            "data": {"train": "rows.jsonl", "template": "chatml"},
            "adapter": adapter,
            "run": {"name": "r"},
        }
    )


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 512}, 512),
        ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "llama"}, 0),
        ({"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False}, 0),
        ({"model_type": "qwen2", "sliding_window": 512}, 0),
        ({"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": True}, 512),
    ],
)
def test_a_window_counts_where_it_is_used(config: dict[str, Any], window: int) -> None:
    assert base_of_config(TINY | config, "here").window_tokens == window


def tiny_base(name: str = "qwen2") -> Base:
    return base_of_config(VARIANTS[name], name)


@pytest.mark.parametrize("name", [*sorted(PUBLISHED.keys() - OWN_CODE.keys()), *VARIANTS])
def test_shapes_of_a_config_are_those_of_the_class(name: str) -> None:
    config = PUBLISHED.get(name) or VARIANTS[name]
    base = base_of_config(config, name)
    theirs = {path: tuple(parameter.shape) for path, parameter in skeleton(config).named_parameters()}
    assert base.shapes == theirs and list(base.shapes) == list(theirs)
    assert base.num_parameters == NUM_PARAMETERS.get(name, base.num_parameters)


@pytest.mark.parametrize("name", OWN_CODE)
def test_models_with_code_of_their_own_have_the_published_number_of_parameters(name: str) -> None:
    base = base_of_config(PUBLISHED[name], name)
    assert (base.num_parameters, base.has_own_code) == (OWN_CODE[name], True)
    adapted = adapted_layers(LoraBlock(), base)
    per_layer = {"BlueLM": 7, "baichuan": 1, "chatglm": 1}[base.family]
    assert len(adapted) == per_layer * base.num_layers


def tiny(family: str, **sizes: int | bool) -> dict[str, tuple[int, ...]]:
    """The embeddings and the first layer, without that layer's prefix, of two of 32 numbers and four heads."""
    given = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "vocab_size": 512, "model_type": family}
    base = base_of_config(given | sizes, family)
    assert base.num_layers == 2 and base.shapes[f"{base.embedding}.weight"] == (512, 32)
    first, second = (f"{base.layer_prefix}{layer}." for layer in (0, 1))
    return {name.removeprefix(first): shape for name, shape in base.shapes.items() if second not in name}


def test_tensors_of_code_of_their_own() -> None:
    """Those that the public copies named in launch/shapes.py made at these sizes, by name."""
    assert tiny("baichuan", intermediate_size=48) == {
        "model.embed_tokens.weight": (512, 32),
        "self_attn.W_pack.weight": (96, 32),
        "self_attn.o_proj.weight": (32, 32),
        "mlp.gate_proj.weight": (48, 32),
        "mlp.up_proj.weight": (48, 32),
        "mlp.down_proj.weight": (32, 48),
        "input_layernorm.weight": (32,),
        "post_attention_layernorm.weight": (32,),
        "model.norm.weight": (32,),
        "lm_head.weight": (512, 32),
    }
    blue = tiny("BlueLM", intermediate_size=48)
    assert blue["model.embed_layer_norm.bias"] == (32,) and blue["self_attn.v_proj.weight"] == (32, 32)
    assert tiny("chatglm", inner_hidden_size=48) == {
        "transformer.word_embeddings.weight": (512, 32),
        "input_layernorm.weight": (32,),
        "input_layernorm.bias": (32,),
        "attention.query_key_value.weight": (96, 32),
        "attention.query_key_value.bias": (96,),
        "attention.dense.weight": (32, 32),
        "attention.dense.bias": (32,),
        "post_attention_layernorm.weight": (32,),
        "post_attention_layernorm.bias": (32,),
        "mlp.dense_h_to_4h.weight": (48, 32),
        "mlp.dense_h_to_4h.bias": (48,),
        "mlp.dense_4h_to_h.weight": (32, 48),
        "mlp.dense_4h_to_h.bias": (32,),
        "transformer.final_layernorm.weight": (32,),
        "transformer.final_layernorm.bias": (32,),
    }
    groups = {"multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 8, "add_qkv_bias": True}
    assert tiny("chatglm", ffn_hidden_size=48, padded_vocab_size=512, **groups | {"vocab_size": 500}) == {
        "transformer.embedding.word_embeddings.weight": (512, 32),
        "input_layernorm.weight": (32,),
        "self_attention.query_key_value.weight": (64, 32),
        "self_attention.query_key_value.bias": (64,),
        "self_attention.dense.weight": (32, 32),
        "post_attention_layernorm.weight": (32,),
        "mlp.dense_h_to_4h.weight": (96, 32),
        "mlp.dense_4h_to_h.weight": (32, 48),
        "transformer.encoder.final_layernorm.weight": (32,),
        "transformer.output_layer.weight": (512, 32),
    }


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        (TINY | {"model_type": "gemma", "head_dim": 8}, "model.layers."),
        (TINY | {"model_type": "phi3", "pad_token_id": 0}, "model.layers."),
        (TINY | {"model_type": "internlm3", "tie_word_embeddings": True}, "model.layers."),
        ({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100}, "transformer.h."),
        ({"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "vocab_size": 100, "max_position_embeddings": 64, "word_embed_proj_dim": 32}, "model.decoder.layers."),
    ],
    ids=["gemma", "phi3", "internlm3", "bloom", "opt"],
)  # fmt: skip
def test_any_architecture_is_planned_by_its_files(config: dict[str, Any], prefix: str) -> None:
    """By the names and shapes in them, whatever config.json calls its figures; PEFT trains what is said."""
    model = skeleton(config)
    shapes = {path: tuple(parameter.shape) for path, parameter in model.named_parameters()}
    base = base_of_config(AutoConfig.for_model(**config).to_dict() | config, "base", dict(sorted(shapes.items())))
    assert (base.is_known, base.layer_prefix, base.shapes) == (False, prefix, shapes)
    inner = max(shape[1] for path, shape in shapes.items() if path.startswith(prefix) and len(shape) == 2)
    assert (base.num_layers, base.num_heads, base.intermediate_size) == (2, 4, inner)
    embedding = model.get_input_embeddings().weight
    assert dict(model.named_parameters())[f"{base.embedding}.weight"] is embedding
    recipe = tiny_recipe({"r": 4, "target_modules": "all-linear"})
    tuned = get_peft_model(model, peft_config(recipe.adapter, base.family, "base"), autocast_adapter_dtype=False)
    theirs = {path: tuple(p.shape) for path, p in tuned.named_parameters() if p.requires_grad}
    assert trained_shapes(recipe, base) == theirs


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("qwen2", {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "the family's targets": ("qwen2", {"r": 4}),
    "all linear": ("phi", {"r": 4, "target_modules": "all-linear"}),
    "an expression": ("qwen3", {"r": 4, "target_modules": r".*layers\.1\..*(k|o)_proj"}),
    "the head, too": ("qwen2", {"r": 4, "target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "dora, patterns": (
        "llama-biased",
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_dora": True, "rank_pattern": {"layers.1.*v_proj": 9}},
    ),
    "modules to save": ("phi", {"r": 4, "target_modules": ["fc1"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "token rows": ("qwen2", {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 8]}),
    "prompt tuning": ("qwen2", {"type": "prompt_tuning", "num_virtual_tokens": 7}),
    "p-tuning, mlp": ("qwen2", {"type": "p_tuning", "encoder_hidden_size": 24}),
    "p-tuning, lstm": (
        "qwen2",
        {
            "type": "p_tuning",
            "encoder_reparameterization_type": "LSTM",
            "encoder_num_layers": 3,
            "encoder_hidden_size": 24,
        },
    ),
    "prefix": ("qwen2", {"type": "prefix_tuning"}),
    "prefix, projected": ("qwen2", {"type": "prefix_tuning", "prefix_projection": True}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_trained_shapes_are_those_that_peft_trains(name: str) -> None:
    family, adapter = ADAPTERS[name]
    recipe, base = tiny_recipe(adapter), tiny_base(family)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**VARIANTS[family]))
    tuned = get_peft_model(model, peft_config(recipe.adapter, base.family, "base"), autocast_adapter_dtype=False)
    theirs = {path: tuple(p.shape) for path, p in tuned.named_parameters() if p.requires_grad}
    assert trained_shapes(recipe, base) == theirs


def test_a_target_that_the_base_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"named 'query_key_value'; it has down_proj, .*, v_proj\."):
        trained_shapes(tiny_recipe({"target_modules": ["query_key_value"]}), tiny_base())


def test_headers_give_the_shapes_that_the_config_gives(tmp_path: Path) -> None:
    """Of one file and of several with an index."""
    config = read_config(build_base(tmp_path / "base", ["a cairn"]) / "config.json")
    base, in_file = base_of_config(config, "base"), shapes_of_files(tmp_path / "base")
    assert in_file == base.shapes and list(in_file) != list(base.shapes)
    assert list(base_of_config(config, "base", in_file).shapes) == list(base.shapes)
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}  # in files of old
    assert base_of_config(config, "base", in_file | table) == base
    with pytest.raises(ModelError, match=r"have no model\.norm\.weight, which a qwen2 must have"):
        base_of_config(config, "base", {name: s for name, s in in_file.items() if name != "model.norm.weight"})
    AutoModelForCausalLM.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert shapes_of_files(tmp_path / "parts") == shapes_of_files(tmp_path / "base")
    assert shapes_of_files(tmp_path) is None


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"layers of model_type 'bloom'.* the known ones are llama, .*phi, BlueLM"):
        base_of_config({"model_type": "bloom"}, "bigscience/bloom")
    with pytest.raises(ModelError, match=r"this mixtral has layers of experts \(num_local_experts = 8\)"):
        base_of_config({"model_type": "mixtral", "num_local_experts": 8}, "x", {})
    with pytest.raises(ModelError, match=r"have 0 layers and config.json says 2, so plan does not understand this opt"):
        base_of_config(TINY | {"model_type": "opt"}, "x", {"embed.weight": (100, 32)})
    with pytest.raises(ModelError, match=r"x: config.json has no vocab_size, which a qwen2 must have"):
        base_of_config({key: value for key, value in VARIANTS["qwen2"].items() if key != "vocab_size"}, "x")
    with pytest.raises(ModelError, match=r"weights of x are quantised already \(gptq\)"):
        base_of_config(VARIANTS["qwen2"] | {"quantization_config": {"quant_method": "gptq"}}, "x")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 16)
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be used: it has no header"):
        shapes_of_files(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=r"names '\.\./elsewhere\.safetensors', which is not beside it"):
        shapes_of_files(tmp_path)
