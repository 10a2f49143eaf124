"""Samples -> tensors -> the loss of a micro-batch, packed or padded, with logits at the predicting positions only."""

import inspect
import math
import re
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from launch.errors import ModelError, first_line
from launch.head import LossHead, Seen, find_head, loss_head, observed
from launch.sample_attention import one_by_one
from launch.samples import Samples
from metrics.tokens import loss_and_sums, sums_of_judged

# Largest difference, relative to the largest logit, between a sample packed behind another and the same sample
# alone. Rounding stays below; a leak changes logits by tenths.
LEAK_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 8e-2}
# In errors of layers that compute with what they are given in place of a mask.
_WITH_A_MASK = re.compile("sizes? of (the )?tensor|attn_mask|masked_fill|shape|same device|index", re.IGNORECASE)


@dataclass(frozen=True)
class Batch:
    """A micro-batch as tensors. Packed: one row, positions restarting at each sample. Padded: one row a sample."""

    lengths: tuple[int, ...]  # [samples]
    input_ids: torch.Tensor  # [batch, seq]; batch is 1 when packed
    position_ids: torch.Tensor | None  # [1, seq], packed only
    attention_mask: torch.Tensor | None  # [batch, seq], padded only
    row_index: torch.Tensor  # [positions] which row predicts
    column_index: torch.Tensor  # [positions] at which column
    targets: torch.Tensor  # [positions] the token that is predicted there


class Probed(NamedTuple):
    """What the real model was found to do, and why not more, in words."""

    packed: bool
    packing: str
    head: LossHead | None  # None: the logits of a micro-batch are made whole
    logits: str


def collate(samples: Samples, ids: Sequence[int], device: torch.device, *, packed: bool) -> Batch:
    """Lay the samples into tensors; an empty micro-batch is one token that predicts nothing."""
    rows = [samples.sample(index) for index in ids]
    if not rows:
        rows = [(np.zeros(1, np.int64), np.zeros(1, np.bool_))]
    lengths = tuple(len(token_ids) for token_ids, _ in rows)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    if packed:
        token_ids = np.concatenate([token_ids for token_ids, _ in rows])  # [seq]
        positions = np.concatenate([np.arange(length) for length in lengths])
        trained = np.flatnonzero(np.concatenate([is_trained for _, is_trained in rows]))
        return Batch(
            lengths=lengths,
            input_ids=tensor(token_ids)[None],
            position_ids=tensor(positions)[None],
            attention_mask=None,
            row_index=tensor(np.zeros_like(trained)),
            column_index=tensor(trained - 1),
            targets=tensor(token_ids[trained]),
        )
    longest = max(lengths)
    table = np.zeros((len(rows), longest), np.int64)  # the padding token does not matter: it is masked
    mask = np.zeros((len(rows), longest), np.int64)
    is_target = np.zeros((len(rows), longest), np.bool_)
    for row, (token_ids, is_trained) in enumerate(rows):
        table[row, : len(token_ids)] = token_ids
        mask[row, : len(token_ids)] = 1
        is_target[row, : len(token_ids)] = is_trained
    row_index, trained = np.nonzero(is_target)
    return Batch(
        lengths=lengths,
        input_ids=tensor(table),
        position_ids=None,
        attention_mask=tensor(mask),
        row_index=tensor(row_index),
        column_index=tensor(trained - 1),
        targets=tensor(table[row_index, trained]),
    )


def batch_loss(
    model: torch.nn.Module,
    batch: Batch,
    *,
    accepts: Collection[str],
    virtual_columns: int = 0,
    head: LossHead | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`loss_and_sums` of a micro-batch; `accepts` are the `forward_arguments` of the base model.

    `virtual_columns`: so many columns of the logits stand before the first token, those of a soft prompt. With a
    `head`, the logits are never whole.
    """
    found = predictions(model, batch, accepts=accepts, virtual_columns=virtual_columns, head=head)
    return loss_and_sums(found, batch.targets) if head is None else sums_of_judged(found, batch.targets.numel())


def forward_arguments(model: torch.nn.Module) -> frozenset[str]:
    """What the base model's forward can be given by name."""
    parameters = inspect.signature(model.forward).parameters
    names = frozenset(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        names |= {"attention_mask", "use_cache"}  # the others change what comes out: whoever heeds them names them
    return names


def probe(
    wanted: str,
    num_virtual_tokens: int,
    engine: torch.nn.Module,
    base: torch.nn.Module,
    samples: Samples,
    device: torch.device,
) -> Probed:
    """The real model is probed for leaks between packed samples, and for what it does with its logits; a collective."""
    accepts = forward_arguments(base)
    head, without_head = find_head(base)
    reason = _reason_for_padding(wanted, num_virtual_tokens, base, accepts)
    engine.eval()
    leak, head_of_loss = _probe_pass(engine, samples, device, accepts=accepts, head=head, packed=not reason)
    engine.train()
    if not reason:
        reduced = torch.tensor(leak, device=device).nan_to_num(nan=math.inf)
        torch.distributed.all_reduce(reduced, torch.distributed.ReduceOp.MAX)
        leak, tolerance = float(reduced), LEAK_TOLERANCE[next(base.parameters()).dtype]
        if leak > tolerance:
            reason = f"packed samples of {type(base).__name__} see each other (logits change by {leak:.1%})"
    packing = f"padded: {reason}"
    if not reason:
        packing = f"packed: packed samples do not see each other (logits change by {leak:.1g}, allowed {tolerance:g})"
    if head_of_loss is not None:
        logits = f"of at most {head_of_loss.positions_at_once:,} positions at a time, within the output head"
    else:
        logits = f"of a whole micro-batch: {without_head or f'{type(base).__name__} changes what its head returns'}"
    return Probed(not reason, packing, head_of_loss, logits)


def _reason_for_padding(
    wanted: str, num_virtual_tokens: int, base: torch.nn.Module, accepts: Collection[str]
) -> str | None:
    """Why packing is out of the question; None where it is to be tried."""
    if wanted == "off":
        return "the recipe says so"
    if num_virtual_tokens:
        return f"{num_virtual_tokens} virtual tokens stand before each sample"
    if not {"position_ids", "logits_to_keep"} <= set(accepts):
        return f"{type(base).__name__} takes no position_ids or logits_to_keep"
    return None


@torch.no_grad()
def _probe_pass(
    model: torch.nn.Module,
    samples: Samples,
    device: torch.device,
    *,
    accepts: Collection[str],
    head: torch.nn.Module | None,
    packed: bool,
    longest: int = 64,
) -> tuple[float, LossHead | None]:
    """(what another sample, packed before it, changes of a sample's logits; the head, where it can have the loss).

    Relative to the largest logit, 0 without `packed`. Call on all ranks, in eval mode.

    A signature is no evidence: some architectures take `position_ids` and let packed samples see each other. The
    packed pass also selects its logits, the other does not, so that both ways are compared.
    """
    if head is None and not packed:
        return 0.0, None  # nothing to learn from it
    first, second = (samples.sample(index % len(samples))[0][:longest] for index in (0, 1))
    given: dict[str, Any] = {"use_cache": False} if "use_cache" in accepts else {}
    token_ids = torch.from_numpy(second).to(device)[None]
    as_trained = {"attention_mask": torch.ones_like(token_ids)} if "attention_mask" in accepts and not packed else {}
    seen: list[Seen] = []
    with observed(head, seen) if head is not None else nullcontext():
        alone = _logits_of(model(input_ids=token_ids, **as_trained, **given))
    head_of_loss = loss_head(head, seen, alone) if head is not None else None
    if not packed:
        return 0.0, head_of_loss
    together = torch.from_numpy(np.concatenate([first, second])).to(device)[None]  # [1, seq]
    positions = torch.from_numpy(np.concatenate([np.arange(len(first)), np.arange(len(second))])).to(device)
    columns = torch.arange(len(first), len(first) + len(second), device=device)
    try:
        with one_by_one((len(first), len(second))):
            output = model(input_ids=together, position_ids=positions[None], logits_to_keep=columns, **given)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        if not _WITH_A_MASK.search(str(error)):
            raise
        # Its layers compute with the mask, which here says how long the samples are.
        raise ModelError(f"This model takes no packed rows ({first_line(error)}); set train.packing=off.") from error
    expected = alone[0].float()  # [second, vocab]
    change = (_logits_of(output)[0].float() - expected).abs().max()
    return float(change / expected.abs().max().clamp_min(1e-12)), head_of_loss


def predictions(
    model: torch.nn.Module,
    batch: Batch,
    *,
    accepts: Collection[str],
    virtual_columns: int = 0,
    head: LossHead | None = None,
) -> torch.Tensor:
    """[positions, vocab], the logits that predict the targets; with a `head` [positions, 2], what it makes of them.

    A micro-batch without targets gives the one row that its backward pass starts from.
    """
    rows, columns, targets = batch.row_index, batch.column_index + virtual_columns, batch.targets
    if targets.numel() == 0:
        rows = columns = targets = torch.zeros(1, dtype=torch.int64, device=batch.input_ids.device)
    given = {"position_ids": batch.position_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    arguments = {name: value for name, value in given.items() if value is not None and name in accepts}
    is_packed, num_columns = batch.position_ids is not None, batch.input_ids.shape[1] + virtual_columns
    if is_packed or "logits_to_keep" in accepts:
        kept = columns
        if is_packed:
            columns = torch.arange(len(kept), device=kept.device)
        else:
            kept, columns = torch.unique(columns, return_inverse=True)
        arguments["logits_to_keep"], num_columns = kept, len(kept)
    with (
        one_by_one(batch.lengths) if is_packed else nullcontext(),
        head.judges(rows, columns, targets, num_columns) if head is not None else nullcontext(),
    ):
        found = _logits_of(model(input_ids=batch.input_ids, **arguments))  # [batch, columns, vocab or 2]
    return found.squeeze(0) if is_packed else found[rows, columns]  # [0] would copy all of the gradient


def _logits_of(output: Any) -> torch.Tensor:
    """[batch, columns, vocab] of what a forward returns: logits, (logits, ...) or an object that has them."""
    if isinstance(output, torch.Tensor):
        return output
    logits: torch.Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits
