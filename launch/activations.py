"""Bytes that a micro-batch needs: activations, logits, what passes; arithmetic, each formula with its source.

What autograd keeps was read off torch 2.13's saved tensors for the modules of transformers 5.23 and PEFT 0.21;
tests/test_activations.py counts them again. A bool of dropout is a byte on a GPU and a value on a CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from launch.shapes import LLAMA_LIKE, Base

FP32_BYTES = 4
LOGITS_AT_ONCE = 1 << 25  # that a head makes for the loss (launch/head.py)
LOGITS_PEAK_BYTES = 3 * FP32_BYTES  # log-probabilities, their gradient and that of the logits, all in fp32
LOGITS_AT_ONCE_BYTES = 10  # of each: logits in 16 bits, the same in fp32, log-probabilities in fp32; in fp32 fewer


class OwnLayer(NamedTuple):
    """What autograd keeps of a token in a layer of a model's own code."""

    hidden: int  # values as wide as the layer, its norms' fp32 ones counted twice
    inner: int  # values as wide as the MLP
    pair_bytes: int = 0  # for each head and column
    column_bytes: int = 0  # for each column


# Counted in November 2026 with the public copies that docs/models.md tells of, in bf16, at eight sizes and three
# lengths, and fitted to the byte; the code is not here, so no test counts again. Not counted but taken to be alike:
# Baichuan-7B, which needs xformers (like Baichuan2-7B), Baichuan2-13B (like Baichuan-13B) and GLM-4, of whose code
# there was no copy (like ChatGLM3).
_BLUELM, _BAICHUAN_7B, _BAICHUAN_13B = OwnLayer(9, 3, 8), OwnLayer(12, 3), OwnLayer(9, 3, 4)
_CHATGLM_6B, _CHATGLM = OwnLayer(10, 7, 6), OwnLayer(10, 3, 0, 2)


@dataclass(frozen=True)
class Adapted:
    """What LoRA does to the layers: (inputs, r) of each adapted layer, by path; empty for a soft prompt."""

    layers: dict[str, tuple[int, int]]
    dropout: float
    use_dora: bool = False


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch as the model sees it."""

    num_tokens: int  # cells: rows x columns
    num_columns: int  # that a token may look at: those of its row, or of its sample
    num_targets: int  # positions that predict a trained token
    num_logit_rows: int  # positions that the head is computed at
    is_masked: bool = True  # False: packed samples are attended one by one (launch/sample_attention.py)
    is_judged_in_head: bool = False  # the loss is computed within the head (launch/head.py)


@dataclass(frozen=True)
class Way:
    """How the layers are run."""

    value_bytes: int
    mask_bytes: int  # of one dropped or kept number
    eager: bool  # attention: the matrix of all pairs is made
    gradient_checkpointing: bool
    keeps_linear_inputs: bool  # ZeRO-3's linear layers keep their inputs (zero/linear.py); in 4 bits they do not
    groups_heads: bool = True  # without a mask, sdpa takes fewer heads of keys and values as they are


def layer_saved_bytes(base: Base, adapter_bytes: int, batch: MicroBatch, way: Way) -> int:
    """What autograd keeps of one decoder layer whose adapter keeps so many bytes a token."""
    own = _own_layer(base)
    if own is None:
        kept = _norm_bytes(base, way) + _attention_bytes(base, batch, way) + _mlp_bytes(base, way)
    else:
        kept = (own.hidden * base.hidden_size + own.inner * base.intermediate_size) * way.value_bytes
        kept += (own.pair_bytes * base.num_heads + own.column_bytes) * batch.num_columns
        kept += FP32_BYTES * (base.num_heads + base.head_dim + 6)  # the little ones: at least what they are
    return batch.num_tokens * (kept + adapter_bytes)


def _own_layer(base: Base) -> OwnLayer | None:
    if base.family == "BlueLM":
        return _BLUELM
    if base.family == "baichuan":
        return _BAICHUAN_13B if base.buffer_numbers else _BAICHUAN_7B
    if base.family == "chatglm":
        return _CHATGLM_6B if base.layer_prefix == "transformer.layers." else _CHATGLM
    return None


def _makes_pairs(base: Base, way: Way) -> bool:
    """Whether attention makes the matrix of all pairs."""
    own = _own_layer(base)
    return way.eager if own is None else own.pair_bytes > 0


def _norm_bytes(base: Base, way: Way) -> int:
    """Those of a layer: two RMSNorms, of Phi one LayerNorm, of Qwen3 one for each head's queries and keys as well."""
    if base.family == "phi":
        return _one_norm_bytes(base, way)
    heads = base.num_heads + base.num_key_value_heads if base.family == "qwen3" else 0
    return 2 * _one_norm_bytes(base, way) + heads * FP32_BYTES * (base.head_dim + 1)


def _one_norm_bytes(base: Base, way: Way) -> int:
    """RMSNorm: its input in fp32 and a number a token. LayerNorm: its input and two numbers."""
    if base.family == "phi":
        return way.value_bytes * (base.hidden_size + 2)
    return FP32_BYTES * (base.hidden_size + 1)


def _attention_bytes(base: Base, batch: MicroBatch, way: Way) -> int:
    """sdpa: queries, keys and values (both for every head, unless heads are grouped), the output, a sum a head, and the
    mask, if there is one, in the layer's type.

    eager: queries, keys, values, and for all pairs the fp32 probabilities and their copy in the layer's type.
    """
    wide = way.value_bytes * base.num_heads * base.head_dim
    if way.eager:
        copy_bytes = way.value_bytes % FP32_BYTES  # none under fp32
        return 3 * wide + base.num_heads * batch.num_columns * (FP32_BYTES + copy_bytes)
    if batch.is_masked:
        return 4 * wide + FP32_BYTES * base.num_heads + batch.num_columns * way.value_bytes
    keys = way.value_bytes * base.num_key_value_heads * base.head_dim if way.groups_heads else wide
    return 2 * (wide + keys) + FP32_BYTES * base.num_heads


def _mlp_bytes(base: Base, way: Way) -> int:
    """Gated: gate, its activation, up. Phi: what NewGELU keeps, and the masks of the dropouts behind both branches.

    Of a family that is not known the larger of both.
    """
    if base.family not in LLAMA_LIKE:
        masks = 2 * base.hidden_size * way.mask_bytes if base.hidden_dropout else 0
        return 4 * base.intermediate_size * way.value_bytes + masks
    return 3 * base.intermediate_size * way.value_bytes


def adapter_bytes(base: Base, adapted: Adapted, way: Way, *, is_masked: bool) -> list[int]:
    """Of each decoder layer and token: A x of each adapted linear layer, and the inputs x that are kept.

    With dropout each has its own copy of x and the mask; else x is kept once where several read the same. ZeRO-3's
    linear layers keep x in any case. The attention's output is kept by sdpa already, but for Phi's, which is copied,
    and for samples that are attended one by one, which are put together.
    In a family that is not known each layer is taken to read a tensor of its own.
    DoRA keeps two results, that of the base and that of LoRA, each to be scaled (peft/tuners/lora/dora.py).
    """
    is_kept = is_masked and not _makes_pairs(base, way) and base.family != "phi"
    sizes = {
        "norm": base.hidden_size,
        "second norm": base.hidden_size,
        "attention": 0 if is_kept else base.num_heads * base.head_dim,
        "mlp": base.intermediate_size,
    }
    totals, read = [0] * base.num_layers, [dict[str, int]() for _ in range(base.num_layers)]
    for path, (inputs, outputs) in base.linear_layers.items():
        layer = int(path.removeprefix(base.layer_prefix).partition(".")[0])
        _, r = adapted.layers.get(path, (0, 0))
        totals[layer] += r * way.value_bytes
        if r and adapted.use_dora:
            totals[layer] += 2 * outputs * way.value_bytes
        if r and adapted.dropout:
            totals[layer] += inputs * (way.value_bytes + way.mask_bytes)
        if way.keeps_linear_inputs or (r and not adapted.dropout):
            name = _input_of(base, path)
            read[layer][name] = sizes.get(name, inputs)
    return [total + sum(widths.values()) * way.value_bytes for total, widths in zip(totals, read, strict=True)]


def _input_of(base: Base, path: str) -> str:
    """Which tensor a linear layer reads."""
    leaf = path.rpartition(".")[2]
    if not base.is_known:
        return leaf
    if leaf in ("q_proj", "k_proj", "v_proj", "W_pack", "query_key_value"):
        return "norm"
    if leaf in ("o_proj", "dense"):
        return "attention"
    if leaf in ("down_proj", "fc2", "dense_4h_to_h"):
        return "mlp"
    return "norm" if base.family == "phi" else "second norm"  # gate, up, fc1


def saved_bytes(base: Base, adapters: Sequence[int], batch: MicroBatch, way: Way) -> int:
    """Activations that are kept from the forward pass to the backward pass; `adapters` are the `adapter_bytes`.

    With gradient checkpointing of each layer its input; besides, what the final norm keeps, the mask (a byte for each
    pair of columns) and the tables of rotary positions.
    """
    size, hidden = way.value_bytes, base.hidden_size
    mask_bytes = batch.num_columns if batch.is_masked else 0
    fixed = batch.num_tokens * (_one_norm_bytes(base, way) + mask_bytes + 2 * base.head_dim * size)
    if way.keeps_linear_inputs and not batch.is_judged_in_head:
        fixed += batch.num_logit_rows * hidden * size
    if way.gradient_checkpointing:
        return fixed + base.num_layers * batch.num_tokens * hidden * size
    return fixed + sum(layer_saved_bytes(base, adapter, batch, way) for adapter in adapters)


def passing_bytes(base: Base, adapters: Sequence[int], batch: MicroBatch, way: Way) -> int:
    """What comes on top of the saved ones in the backward pass of a layer: the layer made again, and gradients.

    The gradients are largest within the MLP (two tensors of its width, two of the layer's) or, with eager attention, of
    all pairs (one in fp32). Measured, not derived: at least what it was for the models of tests/test_activations.py.
    """
    again = layer_saved_bytes(base, max(adapters), batch, way) if way.gradient_checkpointing else 0
    wide = 2 * (base.intermediate_size + base.hidden_size) * way.value_bytes
    if _makes_pairs(base, way):
        wide = max(wide, base.num_heads * batch.num_columns * FP32_BYTES)
    return again + batch.num_tokens * wide


def logits_bytes(base: Base, batch: MicroBatch, way: Way) -> int:
    """The logits and what the loss makes of them at its worst.

    Within the head (launch/head.py): those of some positions at a time, and of all of them the hidden states that the
    model picks, those that the head picks of them, and the gradient. Outside (metrics.tokens.loss_and_sums): at the
    positions of trained tokens three fp32 numbers a token of the vocabulary, in the backward pass. Where the head is
    computed at more positions than those, these logits stand beside them, in fp32 with code of the model's own.
    """
    if batch.is_judged_in_head:
        at_once = min(batch.num_targets, max(LOGITS_AT_ONCE // base.vocab_size, 1)) * base.vocab_size
        kept = 3 * batch.num_targets * base.hidden_size * way.value_bytes
        return at_once * LOGITS_AT_ONCE_BYTES + kept
    other = FP32_BYTES if base.has_own_code else way.value_bytes
    beside = max(batch.num_logit_rows - batch.num_targets, 0) * other * base.vocab_size
    return batch.num_targets * base.vocab_size * LOGITS_PEAK_BYTES + beside
