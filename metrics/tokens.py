"""Loss and token accuracy as sums, so that no packing, padding or number of ranks changes them."""

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class TokenCounts:
    """Sums over trained tokens, divided only here."""

    loss_sum: float  # nats
    num_correct: int
    num_tokens: int

    @property
    def loss(self) -> float:
        """Mean loss per trained token, in nats; NaN where there is none."""
        return self.loss_sum / self.num_tokens if self.num_tokens else float("nan")

    @property
    def token_accuracy(self) -> float:
        """Share of the trained tokens whose most likely prediction is right; NaN where there is none."""
        return self.num_correct / self.num_tokens if self.num_tokens else float("nan")


def loss_and_sums(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross-entropy (fp32, differentiable) and `[loss sum, correct, tokens]` (float64, on the device).

    `logits` [positions, vocab] at the positions that predict a trained token, `targets` [positions] int64. Sums add
    over micro-batches and ranks; counts in float64 are exact up to 2**53. Without any target the loss is a zero that
    still reaches `logits`, so that the backward pass of an empty micro-batch makes the same collectives as a full one.
    """
    if targets.numel() == 0:
        return logits.float().sum() * 0.0, torch.zeros(3, dtype=torch.float64, device=logits.device)
    loss_sum = functional.cross_entropy(logits.float(), targets, reduction="sum")
    num_correct = (logits.argmax(dim=-1) == targets).sum()
    num_tokens = torch.tensor(targets.numel(), device=logits.device)
    return loss_sum, torch.stack([loss_sum.detach().double(), num_correct.double(), num_tokens.double()])


def sums_of_judged(judged: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of positions that are judged: `judged` [positions, 2] (fp32), negative log-likelihood and 1 if right.

    Without any token `judged` has one row, which counts for nothing.
    """
    if num_tokens == 0:
        return judged[:, 0].sum() * 0.0, torch.zeros(3, dtype=torch.float64, device=judged.device)
    sums = judged.detach().sum(dim=0, dtype=torch.float64)  # [2]
    return judged[:, 0].sum(), torch.cat([sums, sums.new_full((1,), num_tokens)])


def counts_from_sums(sums: torch.Tensor) -> TokenCounts:
    """`[loss sum, correct, tokens]`, added over everything, as counts."""
    loss_sum, num_correct, num_tokens = sums.tolist()
    return TokenCounts(loss_sum, int(num_correct), int(num_tokens))
