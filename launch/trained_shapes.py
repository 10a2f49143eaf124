"""The parameters that an adapter trains, by PEFT's names (0.21), on a base whose shapes are known; no torch."""

import re
from collections.abc import Sequence

from launch.errors import ConfigError
from launch.recipe import LoraBlock, PrefixTuningBlock, PromptTuningBlock, PTuningBlock, Recipe
from launch.shapes import Base, Shapes

# Targets of LoRA when the recipe names none, by config.model_type; other families get all linear layers but the head.
_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILY_TARGETS: dict[str, tuple[str, ...]] = {
    "qwen2": _SEVEN,
    "qwen3": _SEVEN,
    "llama": _SEVEN,
    "chatglm": ("query_key_value",),
    "baichuan": ("W_pack",),
}


def trained_shapes(recipe: Recipe, base: Base) -> Shapes:
    """What the recipe's adapter trains on this base. Raises ConfigError for a target that is no module of it."""
    adapter = recipe.adapter
    if isinstance(adapter, LoraBlock):
        return _lora_shapes(adapter, base, _num_added_tokens(recipe))
    prefix = "prompt_encoder.default"
    if isinstance(adapter, PromptTuningBlock):
        return {f"{prefix}.embedding.weight": (adapter.num_virtual_tokens, base.hidden_size)}
    if isinstance(adapter, PTuningBlock):
        return {f"{prefix}.{name}": shape for name, shape in _p_tuning_shapes(adapter, base.hidden_size).items()}
    return {f"{prefix}.{name}": shape for name, shape in _prefix_shapes(adapter, base).items()}


def adapted_layers(adapter: LoraBlock, base: Base) -> dict[str, tuple[int, int, int]]:
    """(inputs, outputs, r) of every linear layer that LoRA adapts, by its path."""
    linear = {**base.linear_layers, **_head(base)}
    targets: Sequence[str] | str = adapter.target_modules or FAMILY_TARGETS.get(base.family) or "all-linear"
    if targets == "all-linear":
        paths = list(base.linear_layers)
    elif isinstance(targets, str):
        paths = [path for path in linear if re.fullmatch(targets, path)]
    else:
        paths = [path for path in linear if any(_is_named(path, target) for target in targets)]
        for target in targets:
            if not _is_named(base.embedding, target) and not any(_is_named(path, target) for path in paths):
                names = sorted({path.rpartition(".")[2] for path in linear})
                raise ConfigError(
                    f"adapter.target_modules: no module of the model is named {target!r}; it has {', '.join(names)}."
                )
    return {path: (*linear[path], _rank_of(adapter, path)) for path in paths}


def _lora_shapes(adapter: LoraBlock, base: Base, num_added_tokens: int) -> Shapes:
    shapes: Shapes = {}
    for path, (inputs, outputs, r) in adapted_layers(adapter, base).items():
        if any(_is_named(path, name) for name in adapter.modules_to_save):
            continue
        name = f"base_model.model.{path}"
        shapes[f"{name}.lora_A.default.weight"] = (r, inputs)
        shapes[f"{name}.lora_B.default.weight"] = (outputs, r)
        if adapter.use_dora:
            shapes[f"{name}.lora_magnitude_vector.default.weight"] = (outputs,)
    listed = adapter.target_modules if isinstance(adapter.target_modules, tuple) else ()
    embedding = f"base_model.model.{base.embedding}"
    if any(_is_named(base.embedding, target) for target in listed):
        r = _rank_of(adapter, base.embedding)
        shapes[f"{embedding}.lora_embedding_A.default"] = (r, base.vocab_size)
        shapes[f"{embedding}.lora_embedding_B.default"] = (base.hidden_size, r)
    for saved in adapter.modules_to_save:
        for name, shape in base.shapes.items():
            owner, _, leaf = name.rpartition(".")
            if _is_named(owner, saved):
                shapes[f"base_model.model.{owner}.modules_to_save.default.{leaf}"] = shape
    ids = adapter.trainable_token_indices
    num_rows = num_added_tokens if ids == "added" else len(ids)
    if num_rows:
        shapes[f"{embedding}.token_adapter.trainable_tokens_delta.default"] = (num_rows, base.hidden_size)
    return shapes


def _num_added_tokens(recipe: Recipe) -> int:
    """At most so many; the tokenizer, which is not asked here, may have some of them already."""
    model = recipe.model
    return len({*model.extra_special_tokens, *filter(None, (model.eos_token, model.pad_token))})


def _p_tuning_shapes(adapter: PTuningBlock, width: int) -> Shapes:
    """peft.tuners.p_tuning.model.PromptEncoder."""
    inner = adapter.encoder_hidden_size or width
    shapes: Shapes = {"embedding.weight": (adapter.num_virtual_tokens, width)}
    if adapter.encoder_reparameterization_type == "MLP":
        sizes = [(inner, width), (inner, inner), (width, inner)]
    else:
        for layer in range(adapter.encoder_num_layers):
            inputs = 2 * inner if layer else width
            for direction in ("", "_reverse"):
                suffix = f"l{layer}{direction}"
                shapes |= {
                    f"lstm_head.weight_ih_{suffix}": (4 * inner, inputs),
                    f"lstm_head.weight_hh_{suffix}": (4 * inner, inner),
                    f"lstm_head.bias_ih_{suffix}": (4 * inner,),
                    f"lstm_head.bias_hh_{suffix}": (4 * inner,),
                }
        sizes = [(2 * inner, 2 * inner), (width, 2 * inner)]
    for number, size in enumerate(sizes):
        shapes |= {f"mlp_head.{2 * number}.weight": size, f"mlp_head.{2 * number}.bias": size[:1]}
    return shapes


def _prefix_shapes(adapter: PrefixTuningBlock, base: Base) -> Shapes:
    """peft.tuners.prefix_tuning.model.PrefixEncoder, as wide as the keys of all heads that have keys."""
    width = base.head_dim * base.num_key_value_heads
    made = base.num_layers * 2 * width
    if not adapter.prefix_projection:
        return {"embedding.weight": (adapter.num_virtual_tokens, made)}
    inner = adapter.encoder_hidden_size or width
    return {
        "embedding.weight": (adapter.num_virtual_tokens, width),
        "transform.0.weight": (inner, width),
        "transform.0.bias": (inner,),
        "transform.2.weight": (made, inner),
        "transform.2.bias": (made,),
    }


def _head(base: Base) -> dict[str, tuple[int, int]]:
    shape = base.shapes.get(f"{base.head}.weight")
    return {base.head: (shape[1], shape[0])} if shape else {}


def _rank_of(adapter: LoraBlock, path: str) -> int:
    """By PEFT's rule: the first pattern that matches the end of the path decides."""
    return next((r for key, r in adapter.rank_pattern if re.match(rf"(.*\.)?({key})$", path)), adapter.r)


def _is_named(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
