"""The parameters of a base model by name, from config.json or the headers of its safetensors files; no weight is read.

Names and shapes are those of transformers 5 (models/<family>/modeling_<family>.py); tests/test_shapes.py compares them
with the classes themselves, on the meta device. BlueLM, Baichuan and ChatGLM have code of their own beside their
weights: theirs were read in public copies (the files in deep_training 0.3.0 from PyPI, which docs/models.md tells of),
and are compared with tensors that those copies made and with the published numbers of parameters.
"""

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.errors import ModelError
from launch.weight_files import INDEX_ENDING, loaded_file, quantised_as, read_header, read_index

Shapes = dict[str, tuple[int, ...]]

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
OWN_CODE = ("BlueLM", "baichuan", "chatglm")  # models with code of their own beside the weights
FAMILIES = (*LLAMA_LIKE, "phi", *OWN_CODE)

# What config.json calls a figure: the first of these that is there. ChatGLM's vocab_size is sometimes the tokenizer's.
_NAMES: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_key_value_heads", "multi_query_group_num", "num_kv_heads", "n_head_kv"),
    "intermediate_size": ("intermediate_size", "ffn_hidden_size", "inner_hidden_size", "ffn_dim", "n_inner"),
    "head_dim": ("head_dim", "kv_channels"),
    "vocab_size": ("padded_vocab_size", "vocab_size"),
}
# What says that a layer has several experts, of which a token goes through some.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_HEADS = ("lm_head", "output_layer", "embed_out", "output")  # what heads are called


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
    buffer_numbers: int  # of the tables that no checkpoint has, where they are large (ALiBi)
    shapes: Shapes  # every parameter once, in the order of the modules
    layer_prefix: str = "model.layers."  # what the names of the decoder layers begin with
    embedding: str = "model.embed_tokens"  # the path of the input embeddings
    head: str = "lm_head"  # that of the head; of a tied one there is no parameter
    window_tokens: int = 0  # that a token sees at most, in some layers; 0: all before it

    @property
    def is_known(self) -> bool:
        """Whether its layers are told here; of another base all is from its files and config.json."""
        return self.family in FAMILIES

    @property
    def num_parameters(self) -> int:
        """All of them, a tied head counted once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @functools.cached_property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of every linear layer of the decoder by its path, the head left out."""
        found = {name.removesuffix(".weight"): shape for name, shape in self.shapes.items() if len(shape) == 2}
        return {path: (i, o) for path, (o, i) in found.items() if path.startswith(self.layer_prefix)}


def base_of_config(config: Mapping[str, Any], where: str, shapes: Shapes | None = None) -> Base:
    """The base that a config.json describes; `shapes` are those of the headers, if there are any.

    With those any architecture of dense layers will do. Raises ModelError for another, without them for one whose
    layers are not known here, and for a key that is missing.
    """
    family = str(config.get("model_type"))
    _check_dense(config, family, where)
    if family not in FAMILIES and shapes is None:
        raise ModelError(
            f"{where}: plan does not know the layers of model_type {family!r}, and there are no safetensors files here "
            f"to read their sizes from; the known ones are {', '.join(FAMILIES)}. Fetch its safetensors files, or plan "
            "a known model of its size."
        )
    try:
        heads, hidden = _figure(config, "num_attention_heads"), _figure(config, "hidden_size")
        key_heads = _figure(config, "num_key_value_heads", heads)
        if family == "chatglm" and not config.get("multi_query_attention"):
            key_heads = heads  # the number of groups is there all the same
        is_known = family in FAMILIES
        base = Base(
            family=family,
            hidden_size=hidden,
            intermediate_size=_figure(config, "intermediate_size") if is_known else _widest_input(shapes or {}),
            num_layers=_figure(config, "num_hidden_layers"),
            num_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=_figure(config, "head_dim", 128 if family == "qwen3" else hidden // heads),
            vocab_size=_figure(config, "vocab_size"),
            hidden_dropout=float(config.get("resid_pdrop") or 0.0) if family == "phi" else 0.0,
            attention_dropout=float(config.get("attention_dropout") or 0.0),
            has_own_code=family in OWN_CODE or (not is_known and bool(config.get("auto_map"))),
            buffer_numbers=_alibi_numbers(config, heads) if family == "baichuan" else 0,
            shapes={},
            window_tokens=_window_tokens(config, family),
        )
    except KeyError as error:
        raise ModelError(f"{where}: config.json has no {error.args[0]}, which a {family} must have.") from None
    if shapes is not None:  # old files have tables of positions
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("inv_freq")}
    if family not in FAMILIES:
        assert shapes is not None
        return _from_files(base, shapes, where)
    base, computed = _known_shapes(base, config)
    return replace(base, shapes=computed if shapes is None else _in_order(base, computed, shapes, where))


def _check_dense(config: Mapping[str, Any], family: str, where: str) -> None:
    if quantised := quantised_as(config):
        raise ModelError(quantised_sentence(where, quantised))
    experts = next((f"{key} = {config[key]}" for key in _EXPERTS if (config.get(key) or 0) > 1), None)
    if experts is not None:
        raise ModelError(
            f"{where}: this {family} has layers of experts ({experts}), which plan's formulas are not made for; train "
            "it without a plan."
        )


def _figure(config: Mapping[str, Any], name: str, otherwise: int | None = None) -> int:
    """KeyError with the usual name where there is none."""
    for key in _NAMES[name]:
        if config.get(key):
            return int(config[key])
    if otherwise is None:
        raise KeyError(name)
    return otherwise


def _widest_input(shapes: Shapes) -> int:
    """Of the matrices in the layers: that of the one behind the activation function; configs call it by many names."""
    return max((shape[1] for name, shape in shapes.items() if len(shape) == 2 and _layer(name)), default=0)


def _layer(name: str) -> tuple[str, int] | None:
    """What stands before the first number in a tensor's name, and that number."""
    found = re.match(r"(.*?\.)(\d+)\.", f".{name}")
    return (found[1].removeprefix("."), int(found[2])) if found else None


def _from_files(base: Base, shapes: Shapes, where: str) -> Base:
    """The base whose layers are not known here: what its files name by a number, as many as config.json says.

    A matrix of as many rows as the vocabulary has is the embedding, a second one the head. Raises ModelError when there
    are no such layers.
    """
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if found := _layer(name):
            sizes[found[0]] = sizes.get(found[0], 0) + math.prod(shape)
    prefix = max(sizes, key=lambda one: sizes[one], default="")
    layers = {found[1] for name in shapes if (found := _layer(name)) and found[0] == prefix}
    if len(layers) != base.num_layers:
        raise ModelError(
            f"{where}: its safetensors files have {len(layers)} layers and config.json says {base.num_layers}, so plan "
            f"does not understand this {base.family}; plan a known model of its size."
        )
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] >= base.vocab_size]
    wide = [name.removesuffix(".weight") for name in matrices if _layer(name) is None]
    head = next((path for path in wide if path.rpartition(".")[2] in _HEADS), "lm_head")
    embedding = next((path for path in wide if path != head), head)

    def place(name: str) -> tuple[int, int]:
        owner, found = name.rpartition(".")[0], _layer(name)
        if found and found[0] == prefix:
            return 1, found[1]
        return (0 if owner == embedding else 3 if owner == head else 2), 0

    ordered = {name: shapes[name] for name in sorted(shapes, key=place)}
    return replace(base, shapes=ordered, layer_prefix=prefix, embedding=embedding, head=head)


def _in_order(base: Base, computed: Shapes, shapes: Shapes, where: str) -> Shapes:
    """The shapes of the files in the order of the modules, which files do not keep; a tied head counts once."""
    missing = next((name for name in computed if name not in shapes), None)
    if missing is not None and not base.has_own_code:
        raise ModelError(f"{where}: its safetensors files have no {missing}, which a {base.family} must have.")
    known = {name: shapes[name] for name in computed if name in shapes}
    tied = () if f"{base.head}.weight" in computed else (f"{base.head}.weight",)
    return known | {name: shape for name, shape in shapes.items() if name not in tied}


def _window_tokens(config: Mapping[str, Any], family: str) -> int:
    """Qwen's have a width in config.json, and use it only where they say so."""
    is_used = config.get("use_sliding_window", family not in ("qwen2", "qwen3"))
    return int(config.get("sliding_window") or 0) if is_used else 0


def _alibi_numbers(config: Mapping[str, Any], heads: int) -> int:
    """Baichuan's of 13B parameters have ALiBi instead of rotary positions, and no max_position_embeddings.

    They keep its table for all heads and pairs of positions (modeling_baichuan.py, future_mask).
    """
    longest = int(config.get("model_max_length") or 0)
    return 0 if config.get("max_position_embeddings") else heads * longest * longest


def _known_shapes(base: Base, config: Mapping[str, Any]) -> tuple[Base, Shapes]:
    """The base with the paths of its family, and its shapes."""
    if base.family == "phi":
        return base, _phi_shapes(base, config)
    if base.family != "chatglm":
        return base, _llama_shapes(base, config)
    if "ffn_hidden_size" not in config:
        base = replace(base, layer_prefix="transformer.layers.", embedding="transformer.word_embeddings")
        return base, _chatglm_6b_shapes(base, config)
    base = replace(
        base,
        layer_prefix="transformer.encoder.layers.",
        embedding="transformer.embedding.word_embeddings",
        head="transformer.output_layer",
    )
    return base, _chatglm_shapes(base, config)


def _llama_shapes(base: Base, config: Mapping[str, Any]) -> Shapes:
    """Llama, and what differs from it by biases and norms only (qwen2, qwen3, mistral).

    BlueLM has a norm behind the embeddings, Baichuan one matrix for queries, keys and values.
    """
    hidden, inner = base.hidden_size, base.intermediate_size
    query, key = base.num_heads * base.head_dim, base.num_key_value_heads * base.head_dim
    attention_bias = bool(config.get("attention_bias")) and base.family in ("llama", "qwen3")
    input_bias = attention_bias or base.family == "qwen2"  # of q, k and v
    mlp_bias = bool(config.get("mlp_bias")) and base.family == "llama"
    shapes: Shapes = {f"{base.embedding}.weight": (base.vocab_size, hidden)}
    if base.family == "BlueLM" and config.get("use_stable_embedding", True):
        _norm(shapes, "model.embed_layer_norm", hidden)
    for layer in range(base.num_layers):
        attention, mlp = f"{base.layer_prefix}{layer}.self_attn", f"{base.layer_prefix}{layer}.mlp"
        inputs = {"q_proj": query, "k_proj": key, "v_proj": key}
        for name, size in ({"W_pack": 3 * hidden} if base.family == "baichuan" else inputs).items():
            _linear(shapes, f"{attention}.{name}", hidden, size, input_bias)
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


def _chatglm_6b_shapes(base: Base, config: Mapping[str, Any]) -> Shapes:
    """The first ChatGLM: LayerNorms, biases everywhere, an MLP without a gate; a tied head, transformers' default."""
    hidden, inner = base.hidden_size, base.intermediate_size
    shapes: Shapes = {f"{base.embedding}.weight": (base.vocab_size, hidden)}
    for layer in range(base.num_layers):
        path = f"{base.layer_prefix}{layer}"
        _norm(shapes, f"{path}.input_layernorm", hidden)
        _linear(shapes, f"{path}.attention.query_key_value", hidden, 3 * hidden, True)
        _linear(shapes, f"{path}.attention.dense", hidden, hidden, True)
        _norm(shapes, f"{path}.post_attention_layernorm", hidden)
        _linear(shapes, f"{path}.mlp.dense_h_to_4h", hidden, inner, True)
        _linear(shapes, f"{path}.mlp.dense_4h_to_h", inner, hidden, True)
    _norm(shapes, "transformer.final_layernorm", hidden)
    if not config.get("tie_word_embeddings", True):
        _linear(shapes, base.head, hidden, base.vocab_size, False)
    return shapes


def _chatglm_shapes(base: Base, config: Mapping[str, Any]) -> Shapes:
    """ChatGLM2, ChatGLM3 and GLM-4's own code: gate and up are one matrix, several heads share keys and values."""
    hidden, inner, bias = base.hidden_size, base.intermediate_size, bool(config.get("add_bias_linear"))
    query, key = base.num_heads * base.head_dim, base.num_key_value_heads * base.head_dim
    shapes: Shapes = {f"{base.embedding}.weight": (base.vocab_size, hidden)}
    for layer in range(base.num_layers):
        path = f"{base.layer_prefix}{layer}"
        shapes[f"{path}.input_layernorm.weight"] = (hidden,)
        has_bias = bias or bool(config.get("add_qkv_bias"))
        _linear(shapes, f"{path}.self_attention.query_key_value", hidden, query + 2 * key, has_bias)
        _linear(shapes, f"{path}.self_attention.dense", query, hidden, bias)
        shapes[f"{path}.post_attention_layernorm.weight"] = (hidden,)
        _linear(shapes, f"{path}.mlp.dense_h_to_4h", hidden, 2 * inner, bias)
        _linear(shapes, f"{path}.mlp.dense_4h_to_h", inner, hidden, bias)
    shapes["transformer.encoder.final_layernorm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        _linear(shapes, base.head, hidden, base.vocab_size, False)
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
