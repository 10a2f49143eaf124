"""One merged tensor: what it is made of, by which rule, and the proof that it is right.

The rule: the base tensor is cast to the output type, scaling * B A is formed and added in fp32 from the fp32 masters,
DoRA scales the rows of the sum to its magnitudes, and the result is rounded once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft.tuners import lora as peft_lora
from peft.tuners.trainable_tokens import TrainableTokensLayer

from launch import engine as engines
from launch.adapter import ADAPTER_NAME
from launch.errors import MergeError
from launch.shards import Layout, row_blocks

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_PROBE_TOLERANCE = 1e-5  # of |W| |x|, for sums in fp32


@dataclass(frozen=True)
class Slab:
    """Rows of a matrix, or of an expert's, in a tensor in which transformers keeps what files have apart."""

    expert: int | None  # None: it is one matrix
    first: int
    last: int


@dataclass(frozen=True)
class Part:
    """One tensor of the merged model and what it is made of."""

    name: str  # in the model
    base: torch.Tensor | None  # a parameter or buffer that is copied or added to
    trained: torch.nn.Parameter | None = None  # a whole copy that replaces it (modules_to_save, biases)
    lora: Any = None  # PEFT's layer, whose A and B are added to its weight
    added_bias: torch.nn.Parameter | None = None  # of B (lora_bias), times the layer's scaling
    tokens: TrainableTokensLayer | None = None  # rows of it are replaced (trainable_token_indices)
    # (name, shape) of what the model's files have for it: transformers renames on loading, and fuses experts.
    published: tuple[tuple[str, tuple[int, ...]], ...] = ()
    slabs: tuple[Slab, ...] = ()  # of what is written, in its order, where that is not simply the tensor

    @property
    def masters(self) -> list[torch.nn.Parameter]:
        """The trained parameters that it is made of: the copy, the rows, or A, B and DoRA's magnitudes."""
        if self.tokens is not None:
            return [self.tokens.trainable_tokens_delta[ADAPTER_NAME]]
        if self.added_bias is not None:
            return [self.added_bias]
        if self.lora is None:
            return [] if self.trained is None else [self.trained]
        if isinstance(self.lora, peft_lora.Embedding):
            return [self.lora.lora_embedding_A[ADAPTER_NAME], self.lora.lora_embedding_B[ADAPTER_NAME]]
        held = [self.lora.lora_A, self.lora.lora_B, self.lora.lora_magnitude_vector]
        return [by_adapter[ADAPTER_NAME].weight for by_adapter in held if ADAPTER_NAME in by_adapter]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the merged tensor."""
        tensor = self.trained if self.base is None else self.base
        assert tensor is not None
        return engines.whole_shape(tensor)

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is [in, out], as in an embedding and in GPT-2's Conv1D."""
        if isinstance(self.lora, peft_lora.ParamWrapper):  # of experts [in, out], as in GPT-OSS
            return self.lora._param_ndim == 3 and not self.lora._did_swap_in_out_features
        return isinstance(self.lora, peft_lora.Embedding) or bool(getattr(self.lora, "fan_in_fan_out", False))

    def layouts(self, dtype: torch.dtype) -> list[Layout]:
        """Its place in a file when numbers are written as `dtype`."""
        tensor = self.trained if self.base is None else self.base
        assert tensor is not None
        published = self.published or ((self.name, self.shape),)
        return [Layout(name, dtype if tensor.is_floating_point() else tensor.dtype, shape) for name, shape in published]


@dataclass(frozen=True)
class Pieces:
    """What a merged tensor is made of, on the CPU of the one that writes it."""

    rows: Callable[[int, int], torch.Tensor]  # [first, last) of the base, or of the trained copy
    masters: Sequence[torch.Tensor] = ()
    apart: Sequence[Callable[[int, int], torch.Tensor]] = ()  # the same of each slab, when they are apart in files


Opener = Callable[[Part], AbstractContextManager[Pieces]]


def choose_dtype(wanted: str, precision: str) -> str:
    """float16 | bfloat16 | float32. `auto` is the trained type; what was trained in fp32 becomes float16."""
    return wanted if wanted != "auto" else {"bf16": "bfloat16"}.get(precision, "float16")


@dataclass
class Proof:
    """What was seen while the tensors were made: by name, the largest rounding error and the probe's deviation."""

    matrices: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, name: str, rounding_error: float, deviation: float) -> None:
        """A block of a matrix to which something was added."""
        seen = self.matrices.setdefault(name, {"rounding_error": 0.0, "probe_deviation": 0.0})
        self.matrices[name] = {
            "rounding_error": max(seen["rounding_error"], rounding_error),
            "probe_deviation": max(seen["probe_deviation"], deviation),
        }

    def as_report(self) -> dict[str, Any]:
        """For merge_report.json: the largest of each, and all of them."""
        largest = {
            f"largest_{name}": max((seen[name] for seen in self.matrices.values()), default=0.0)
            for name in ("rounding_error", "probe_deviation")
        }
        return {"merged_matrices": len(self.matrices), **largest, "matrices": self.matrices}


def add_lora(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """W [out, in] + scaling * B [out, r] A [r, in], its rows of DoRA's magnitude [out], before it is rounded.

    All are in fp32. Of rows of W, with those rows of B and of the magnitude.
    """
    merged = weight + (lora_b @ lora_a).mul_(scaling)
    if magnitude is not None:
        merged *= (magnitude / torch.linalg.norm(merged, dim=1))[:, None]
    return merged


def _deviation(
    merged: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    magnitude: torch.Tensor | None,
) -> float:
    """Of merged @ x from W x + scaling * B (A x) for random x, in terms of |W| |x|, row by row; all are in fp32."""
    x = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0))
    expected = weight @ x + scaling * (lora_b @ (lora_a @ x))
    if magnitude is not None:  # each row of the merged matrix has its length
        expected *= magnitude / torch.linalg.norm(weight + scaling * lora_b @ lora_a, dim=1)
    lengths = torch.linalg.vector_norm(merged, dim=1) + torch.linalg.vector_norm(weight, dim=1)  # [out]
    size = (lengths * torch.linalg.vector_norm(x)).clamp_min_(1e-30)
    return float(((merged @ x - expected).abs_() / size).max())


def _largest(tensor: torch.Tensor) -> float:
    """Of the numbers without their signs; not finite if one of them is not. isfinite() takes far longer in fp16."""
    low, high = torch.aminmax(tensor) if tensor.numel() else (torch.zeros(()),) * 2
    return max(-float(low), float(high))


def merged_blocks(part: Part, pieces: Pieces, dtype: torch.dtype, proof: Proof) -> Iterator[torch.Tensor]:
    """The rows of a merged tensor, block by block, as they are written.

    Raises MergeError for a block that is not finite in `dtype`, or is not what the adapter makes of the base.
    """
    for number in range(len(part.slabs)):
        yield from merged_blocks(*_matrix_of(part, pieces, number), dtype, proof)
    if part.slabs:
        return
    blocks = row_blocks(part.shape)
    is_matrix = part.lora is not None and part.added_bias is None
    scaling = float(part.lora.scaling[ADAPTER_NAME]) if part.lora is not None else 0.0
    if is_matrix and part.is_transposed and len(pieces.masters) > 2:
        blocks = iter([(0, part.shape[0])])  # DoRA's magnitudes belong to columns here, and want all rows
    for first, last in blocks:
        value = pieces.rows(first, last)
        if part.added_bias is not None:
            value = (value.to(dtype).float() + scaling * pieces.masters[0][first:last].float()).to(dtype)
        elif is_matrix:
            lora_a, lora_b, *magnitudes = (master.float() for master in pieces.masters)
            magnitude = magnitudes[0] if magnitudes else None
            if part.is_transposed:
                weight = value.t()  # [out, rows]
                lora_a = lora_a[:, first:last]
            else:
                weight, lora_b = value, lora_b[first:last]
                magnitude = None if magnitude is None else magnitude[first:last]
            weight = weight.to(dtype).float()
            merged = add_lora(weight, lora_a, lora_b, scaling, magnitude)
            deviation = _deviation(merged, weight, lora_a, lora_b, scaling, magnitude)
            if not deviation <= _PROBE_TOLERANCE and math.isfinite(_largest(merged)):
                raise MergeError(
                    f"{part.name}: for a random x the merged matrix gives {deviation:.1e} (of its size) else than base "
                    "and adapter do; nothing was written, and this is a fault of the merge to be reported."
                )
            merged = merged.t() if part.is_transposed else merged
            value = merged.to(dtype)
            proof.add(part.name, _largest(value - merged), deviation)
        elif value.is_floating_point():
            value = value.to(dtype)
        if part.tokens is not None:
            value = value.clone()
            for row, index in enumerate(part.tokens.token_indices[ADAPTER_NAME]):
                if first <= index < last:
                    value[index - first] = pieces.masters[0][row].to(dtype)
        if value.is_floating_point() and not math.isfinite(_largest(value)):
            raise MergeError(
                f"{part.name} is not finite in {str(dtype).removeprefix('torch.')}; "
                "set run.merge_dtype (or --dtype) to bfloat16 or float32 and run the same command again."
            )
        yield value


def _matrix_of(part: Part, pieces: Pieces, number: int) -> tuple[Part, Pieces]:
    """A slab as a matrix of its own, with what is added to those rows."""
    slab, masters = part.slabs[number], list(pieces.masters)
    if pieces.apart:
        rows = pieces.apart[number]
    elif slab.expert is not None:
        matrix = pieces.rows(slab.expert, slab.expert + 1)[0][slab.first : slab.last]
        rows = lambda first, last: matrix[first:last]  # noqa: E731
    else:
        rows = lambda first, last: pieces.rows(slab.first + first, slab.first + last)  # noqa: E731
    if slab.expert is not None and masters:  # A [experts * r, in], B [out, r * experts], as PEFT keeps them
        lora_a, lora_b = masters
        masters = [
            lora_a.reshape(part.lora.num_experts, -1, lora_a.shape[1])[slab.expert],
            lora_b.reshape(lora_b.shape[0], -1, part.lora.num_experts)[:, :, slab.expert],
        ]
    if masters and part.is_transposed:
        masters[0] = masters[0][:, slab.first : slab.last]
    elif masters:
        masters[1:] = [master[slab.first : slab.last] for master in masters[1:]]
    base = torch.empty(slab.last - slab.first, part.shape[-1], device="meta")
    return replace(part, base=base, published=(), slabs=()), Pieces(rows, masters)
