"""The parameters of a base model by name, from config.json or the headers of its safetensors files; no weight is read.

Names and shapes are those of transformers 5 (models/<family>/modeling_<family>.py); tests/test_shapes.py compares them
with the classes themselves, on the meta device.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.errors import ModelError
from launch.weight_files import INDEX_ENDING, loaded_file, quantised_as, read_header, read_index

Shapes = dict[str, tuple[int, ...]]

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
# Models with code of their own whose layers have Llama's names and sizes, as far as their recipes know.
OWN_CODE_LIKE_LLAMA = ("BlueLM",)
FAMILIES = (*LLAMA_LIKE, "phi", *OWN_CODE_LIKE_LLAMA)


@dataclass(frozen=True)
class Base:
    """What the arithmetic needs to know of a base model."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    hidden_dropout: float  # behind attention and MLP (Phi)
    attention_dropout: float
    has_own_code: bool
    shapes: Shapes  # every parameter once, in the order of the modules

    @property
    def num_parameters(self) -> int:
        """All of them, a tied head counted once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def layer_prefix(self) -> str:
        """What the names of the decoder layers begin with."""
        return "model.layers."

    @functools.cached_property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of every linear layer of the decoder by its path, the head left out."""
        found = {name.removesuffix(".weight"): shape for name, shape in self.shapes.items() if len(shape) == 2}
        return {path: (i, o) for path, (o, i) in found.items() if path.startswith(self.layer_prefix)}


def base_of_config(config: Mapping[str, Any], where: str, shapes: Shapes | None = None) -> Base:
    """The base that a config.json describes; `shapes` are those of the headers, if there are any.

    Raises ModelError for a family whose layers are not known here, or a key that is missing.
    """
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise ModelError(
            f"{where}: plan does not know the layers of model_type {family!r}, so it cannot say what they need; the "
            f"known ones are {', '.join(FAMILIES)}. Train it without a plan, or plan a known model of its size."
        )
    if quantised := quantised_as(config):
        raise ModelError(quantised_sentence(where, quantised))
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        base = Base(
            family=family,
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or (128 if family == "qwen3" else hidden // heads)),
            vocab_size=int(config["vocab_size"]),
            hidden_dropout=float(config.get("resid_pdrop") or 0.0) if family == "phi" else 0.0,
            attention_dropout=float(config.get("attention_dropout") or 0.0),
            has_own_code=family in OWN_CODE_LIKE_LLAMA,
            shapes={},
        )
    except KeyError as error:
        raise ModelError(f"{where}: config.json has no {error.args[0]}, which a {family} must have.") from None
    computed = _phi_shapes(base, config) if family == "phi" else _llama_shapes(base, config)
    return replace(base, shapes=computed if shapes is None else _in_order(base, computed, shapes, where))


def _in_order(base: Base, computed: Shapes, shapes: Shapes, where: str) -> Shapes:
    """The shapes of the files in the order of the modules, which files do not keep, and without tables of positions."""
    missing = next((name for name in computed if name not in shapes), None)
    if missing is not None and not base.has_own_code:
        raise ModelError(f"{where}: its safetensors files have no {missing}, which a {base.family} must have.")
    known = {name: shapes[name] for name in computed if name in shapes}
    others = {name: shape for name, shape in shapes.items() if not name.endswith(".inv_freq")}
    return known | others


def _llama_shapes(base: Base, config: Mapping[str, Any]) -> Shapes:
    """Llama, and what differs from it by biases and norms only (qwen2, qwen3, mistral)."""
    hidden, inner = base.hidden_size, base.intermediate_size
    query, key = base.num_heads * base.head_dim, base.num_key_value_heads * base.head_dim
    attention_bias = bool(config.get("attention_bias")) and base.family in ("llama", "qwen3")
    input_bias = attention_bias or base.family == "qwen2"  # of q, k and v
    mlp_bias = bool(config.get("mlp_bias")) and base.family == "llama"
    shapes: Shapes = {"model.embed_tokens.weight": (base.vocab_size, hidden)}
    for layer in range(base.num_layers):
        attention, mlp = f"{base.layer_prefix}{layer}.self_attn", f"{base.layer_prefix}{layer}.mlp"
        for name, size, bias in (("q", query, input_bias), ("k", key, input_bias), ("v", key, input_bias)):
            _linear(shapes, f"{attention}.{name}_proj", hidden, size, bias)
        _linear(shapes, f"{attention}.o_proj", query, hidden, attention_bias)
        if base.family == "qwen3":
            shapes |= {f"{attention}.{name}_norm.weight": (base.head_dim,) for name in ("q", "k")}
        _linear(shapes, f"{mlp}.gate_proj", hidden, inner, mlp_bias)
        _linear(shapes, f"{mlp}.up_proj", hidden, inner, mlp_bias)
        _linear(shapes, f"{mlp}.down_proj", inner, hidden, mlp_bias)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{base.layer_prefix}{layer}.{norm}.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (base.vocab_size, hidden)
    return shapes


def _phi_shapes(base: Base, config: Mapping[str, Any]) -> Shapes:
    """Phi-1, 1.5 and 2: attention and MLP side by side behind one norm, biases everywhere, the head's included."""
    hidden, inner = base.hidden_size, base.intermediate_size
    query, key = base.num_heads * base.head_dim, base.num_key_value_heads * base.head_dim
    shapes: Shapes = {"model.embed_tokens.weight": (base.vocab_size, hidden)}
    for layer in range(base.num_layers):
        attention = f"{base.layer_prefix}{layer}.self_attn"
        for name, size in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            _linear(shapes, f"{attention}.{name}", hidden, size, True)
        _linear(shapes, f"{attention}.dense", query, hidden, True)
        if config.get("qk_layernorm"):
            for name in ("q_layernorm", "k_layernorm"):
                _norm(shapes, f"{attention}.{name}", hidden // base.num_heads)
        _linear(shapes, f"{base.layer_prefix}{layer}.mlp.fc1", hidden, inner, True)
        _linear(shapes, f"{base.layer_prefix}{layer}.mlp.fc2", inner, hidden, True)
        _norm(shapes, f"{base.layer_prefix}{layer}.input_layernorm", hidden)
    _norm(shapes, "model.final_layernorm", hidden)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (base.vocab_size, hidden)
    shapes["lm_head.bias"] = (base.vocab_size,)
    return shapes


def _linear(shapes: Shapes, path: str, inputs: int, outputs: int, has_bias: bool) -> None:
    shapes[f"{path}.weight"] = (outputs, inputs)
    if has_bias:
        shapes[f"{path}.bias"] = (outputs,)


def _norm(shapes: Shapes, path: str, size: int) -> None:
    shapes |= {f"{path}.weight": (size,), f"{path}.bias": (size,)}


def read_config(path: Path) -> dict[str, Any]:
    """A config.json. Raises ModelError when it cannot be read."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as a config.json: {error}.") from None
    return config


def quantised_sentence(base: str, quantised: str) -> str:
    """Why a base that is quantised as `weight_files.quantised_as` says is refused."""
    return (
        f"The weights of {base} are quantised already ({quantised}), and an adapter can only be merged into the ones "
        "that they were made of; name those in model.name_or_path, and set model.load_in_4bit to true."
    )


def shapes_of_files(directory: Path) -> Shapes | None:
    """Names and shapes from the safetensors files of a directory, their headers only; None when there are none.

    Raises ModelError for an index or a header that is broken, or names a file outside the directory.
    """
    first = loaded_file([path.name for path in directory.iterdir() if path.is_file()])
    if first is None or ".safetensors" not in first:
        return None
    path = directory / first
    try:
        files = sorted(set(read_index(path).values())) if first.endswith(INDEX_ENDING) else [first]
        found: Shapes = {}
        for path in (directory / name for name in files):
            with path.open("rb") as file:
                found |= {tensor: entry.shape for tensor, entry in read_header(file).items()}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be used: {error}.") from None
    return found
