"""Attention of packed samples one by one, instead of a matrix of all pairs of tokens that masks most of them.

`AttentionInterface` and `AttentionMaskInterface` are the seams that transformers documents for other attention
functions. Those of the name sdpa are taken: outside of `one_by_one` they are transformers' own.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import and_masks, packed_sequence_mask_function, sdpa_mask

from launch.errors import ModelError

_packed: ContextVar[tuple[int, ...]] = ContextVar("lengths of the packed samples", default=())


@contextmanager
def one_by_one(lengths: Sequence[int]) -> Iterator[None]:
    """Forward passes inside are of one row in which samples of these lengths are packed.

    Their backward passes may come later: what the layers are given in place of a mask says it all.
    """
    _register()
    token = _packed.set(tuple(lengths))
    try:
        yield
    finally:
        _packed.reset(token)


@functools.cache
def _register() -> None:
    AttentionInterface.register("sdpa", _attention)
    AttentionMaskInterface.register("sdpa", _mask)
    # It prepares a plan for each length, and keeps them all; FlashAttention, which is next in line, takes any.
    torch.backends.cuda.enable_cudnn_sdp(False)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_bidirectional_skip: bool = False,
    **given: Any,
) -> torch.Tensor | None:
    """The lengths, [1, 1, 1, samples] int64, where the mask asked for is causal within each sample; else that mask.

    A window (`local_size`) no sample is longer than hides nothing; with a shorter one the mask is kept within the
    samples, which not every model tells it. `use_vmap` stands for patterns of a model's own.
    """
    lengths = _packed.get()
    if (
        _hands_masks_on(type(given.get("config")).__module__)
        and batch_size == 1
        and q_length == kv_length == sum(lengths)
        and attention_mask is None
        and not use_vmap
        and not allow_is_bidirectional_skip
    ):
        if local_size is None or local_size >= max(lengths):
            return torch.tensor(lengths)[None, None, None]  # on the CPU, where no layer waits for a GPU to read it
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None].to(given["device"])
        given["mask_function"] = and_masks(given["mask_function"], packed_sequence_mask_function(numbers))
        given["allow_is_causal_skip"] = False
    mask: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **given,
    )
    return mask


@functools.cache
def _hands_masks_on(module_of_config: str) -> bool:
    """Whether the model's layers ask for an attention function by name; others would compute with the lengths."""
    code = sys.modules.get(module_of_config.replace("configuration_", "modeling_"))
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in vars(code)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """[1, seq, heads, head_dim] of query, key and value [1, heads, seq, head_dim]; these may have fewer heads.

    Raises ModelError for what transformers' sdpa would do besides, and this does not.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        given |= {"dropout": dropout, "scaling": scaling}
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
        return whole
    asked = [name for name in ("position_bias", "softcap") if given.get(name) is not None]
    asked += ["is_causal=False"] if given.get("is_causal") is False else []
    if asked:
        raise ModelError(
            f"{type(module).__name__} asks its attention for {asked[0]}, which packed samples attended one by one do "
            "not have; set train.packing=off."
        )
    num_groups = query.shape[1] // key.shape[1]
    if num_groups > 1 and not groups_heads(query, value):
        key, value = (tensor.repeat_interleave(num_groups, dim=1) for tensor in (key, value))
    lengths = attention_mask.flatten().tolist()
    attend = functools.partial(
        scaled_dot_product_attention,
        dropout_p=dropout,
        scale=scaling,
        is_causal=True,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    samples = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([attend(*sample).transpose(1, 2) for sample in samples], dim=1), None


def groups_heads(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether sdpa has a kernel for fewer heads of keys and values that makes no matrix of all pairs.

    A CPU's is one, and FlashAttention: in 16 bits, heads alike and at most 256 wide, as of compute capability 8.0
    (torch's sdp_utils.cpp).
    """
    if query.device.type != "cuda":
        return True
    fits = query.dtype != torch.float32 and query.shape[-1] == value.shape[-1] <= 256
    return fits and torch.cuda.get_device_capability(query.device) >= (8, 0)
