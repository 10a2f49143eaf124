"""Samples -> tensors -> the loss of a micro-batch, packed or padded, with logits at the predicting positions only."""

import inspect
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from launch.samples import Samples
from metrics.tokens import loss_and_sums

# Largest difference, relative to the largest logit, between a sample packed behind another and the same sample
# alone. Rounding stays below; a leak changes logits by tenths.
LEAK_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 8e-2}


@dataclass(frozen=True)
class Batch:
    """A micro-batch as tensors. Packed: one row, positions restarting at each sample. Padded: one row a sample."""

    input_ids: torch.Tensor  # [batch, seq]; batch is 1 when packed
    position_ids: torch.Tensor | None  # [1, seq], packed only
    attention_mask: torch.Tensor | None  # [batch, seq], padded only
    row_index: torch.Tensor  # [positions] which row predicts
    column_index: torch.Tensor  # [positions] at which column
    targets: torch.Tensor  # [positions] the token that is predicted there


def collate(samples: Samples, ids: Sequence[int], device: torch.device, *, packed: bool) -> Batch:
    """Lay the samples into tensors; an empty micro-batch is one token that predicts nothing."""
    rows = [samples.sample(index) for index in ids]
    if not rows:
        rows = [(np.zeros(1, np.int64), np.zeros(1, np.bool_))]

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    if packed:
        token_ids = np.concatenate([token_ids for token_ids, _ in rows])  # [seq]
        positions = np.concatenate([np.arange(len(token_ids)) for token_ids, _ in rows])
        trained = np.flatnonzero(np.concatenate([is_trained for _, is_trained in rows]))
        return Batch(
            input_ids=tensor(token_ids)[None],
            position_ids=tensor(positions)[None],
            attention_mask=None,
            row_index=tensor(np.zeros_like(trained)),
            column_index=tensor(trained - 1),
            targets=tensor(token_ids[trained]),
        )
    longest = max(len(token_ids) for token_ids, _ in rows)
    table = np.zeros((len(rows), longest), np.int64)  # the padding token does not matter: it is masked
    mask = np.zeros((len(rows), longest), np.int64)
    is_target = np.zeros((len(rows), longest), np.bool_)
    for row, (token_ids, is_trained) in enumerate(rows):
        table[row, : len(token_ids)] = token_ids
        mask[row, : len(token_ids)] = 1
        is_target[row, : len(token_ids)] = is_trained
    row_index, trained = np.nonzero(is_target)
    return Batch(
        input_ids=tensor(table),
        position_ids=None,
        attention_mask=tensor(mask),
        row_index=tensor(row_index),
        column_index=tensor(trained - 1),
        targets=tensor(table[row_index, trained]),
    )


def batch_loss(
    model: torch.nn.Module, batch: Batch, *, accepts: Collection[str], virtual_columns: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`loss_and_sums` of a micro-batch; `accepts` are the `forward_arguments` of the base model.

    `virtual_columns`: so many columns of the logits stand before the first token, those of a soft prompt.
    """
    logits = logits_of_targets(model, batch, accepts=accepts, virtual_columns=virtual_columns)
    return loss_and_sums(logits, batch.targets)


def forward_arguments(model: torch.nn.Module) -> frozenset[str]:
    """What the base model's forward can be given by name."""
    parameters = inspect.signature(model.forward).parameters
    names = frozenset(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        names |= {"attention_mask", "use_cache"}  # the others change what comes out: whoever heeds them names them
    return names


def choose_packing(
    wanted: str,
    num_virtual_tokens: int,
    engine: torch.nn.Module,
    base: torch.nn.Module,
    samples: Samples,
    device: torch.device,
) -> tuple[bool, str]:
    """(packed, why): the real model is probed for leaks between packed samples. Call on all ranks."""
    if wanted == "off":
        return False, "padded: the recipe says so"
    if num_virtual_tokens:
        return False, f"padded: {num_virtual_tokens} virtual tokens stand before each sample"
    accepts = forward_arguments(base)
    if not {"position_ids", "logits_to_keep"} <= accepts:
        return False, f"padded: {type(base).__name__} takes no position_ids or logits_to_keep"
    engine.eval()
    found = leak_between_samples(engine, samples, device, accepts=accepts)
    leak = torch.tensor(found, device=device).nan_to_num(nan=math.inf)
    engine.train()
    torch.distributed.all_reduce(leak, torch.distributed.ReduceOp.MAX)
    tolerance = LEAK_TOLERANCE[next(base.parameters()).dtype]
    if leak > tolerance:
        return False, f"padded: packed samples of {type(base).__name__} see each other (logits change by {leak:.1%})"
    return True, f"packed: packed samples do not see each other (logits change by {leak:.1g}, allowed {tolerance:g})"


@torch.no_grad()
def leak_between_samples(
    model: torch.nn.Module, samples: Samples, device: torch.device, *, accepts: Collection[str], longest: int = 64
) -> float:
    """Relative change of a sample's logits when another is packed before it; call on all ranks, in eval mode.

    A signature is no evidence: some architectures take `position_ids` and let packed samples see each other. The
    packed pass also selects its logits, the other does not, so that both ways are compared.
    """
    first, second = (samples.sample(index % len(samples))[0][:longest] for index in (0, 1))
    packed = torch.from_numpy(np.concatenate([first, second])).to(device)[None]  # [1, seq]
    positions = torch.from_numpy(np.concatenate([np.arange(len(first)), np.arange(len(second))])).to(device)
    columns = torch.arange(len(first), len(first) + len(second), device=device)
    cache = {"use_cache": False} if "use_cache" in accepts else {}
    output = model(input_ids=packed, position_ids=positions[None], logits_to_keep=columns, **cache)
    together = _logits_of(output)[0]  # [second, vocab]
    alone = _logits_of(model(input_ids=torch.from_numpy(second).to(device)[None], **cache))[0]
    return float((together.float() - alone.float()).abs().max() / alone.float().abs().max().clamp_min(1e-12))


def logits_of_targets(
    model: torch.nn.Module, batch: Batch, *, accepts: Collection[str], virtual_columns: int = 0
) -> torch.Tensor:
    """[positions, vocab], what predicts the targets.

    A micro-batch without targets gives the one row that its backward pass starts from.
    """
    rows, columns = batch.row_index, batch.column_index + virtual_columns
    if batch.targets.numel() == 0:
        rows = columns = torch.zeros(1, dtype=torch.int64, device=batch.input_ids.device)
    given = {"position_ids": batch.position_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    arguments = {name: value for name, value in given.items() if value is not None and name in accepts}
    if batch.position_ids is not None:
        output = model(input_ids=batch.input_ids, logits_to_keep=columns, **arguments)
        return _logits_of(output).squeeze(0)  # of [1, positions, vocab]; [0] would copy all of its gradient
    if "logits_to_keep" in accepts:
        kept, column_of = torch.unique(columns, return_inverse=True)
        arguments["logits_to_keep"], columns = kept, column_of
    return _logits_of(model(input_ids=batch.input_ids, **arguments))[rows, columns]  # of [batch, columns, vocab]


def _logits_of(output: Any) -> torch.Tensor:
    """[batch, columns, vocab] of what a forward returns: logits, (logits, ...) or an object that has them."""
    if isinstance(output, torch.Tensor):
        return output
    logits: torch.Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits
