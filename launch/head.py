"""The loss within the output head: logits of some positions at a time, so that [positions, vocab] never exists.

While a micro-batch is judged, the model's own head returns two numbers for a position instead of its logits, and the
model hands them on. Forward and backward are computed together, chunk by chunk, in one call of the head: under ZeRO-3
its weights are gathered for that call, however many chunks a rank has.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from launch.activations import LOGITS_AT_ONCE
from launch.errors import ModelError

# Of gradients in fp16, whose smallest number is 6e-8: the loss scale comes only later. A power of two changes no digit.
_FP16_SCALE = 1024.0


@dataclass(frozen=True)
class LossHead:
    """An output head that the loss can be computed in, with so many positions at a time."""

    module: torch.nn.Module
    positions_at_once: int

    @contextmanager
    def judges(
        self, rows: torch.Tensor, columns: torch.Tensor, targets: torch.Tensor, num_columns: int
    ) -> Iterator[None]:
        """Inside, the head returns [batch, columns, 2] (fp32): negative log-likelihood, and 1 for a right prediction.

        Of the cells at `rows` and `columns`, both [positions], whose tokens are `targets`; zeros elsewhere. Raises
        ModelError when the head is given another number of columns.
        """

        def judge(hidden: torch.Tensor) -> torch.Tensor:  # [batch, columns, hidden]
            if hidden.shape[1] != num_columns:
                raise ModelError(
                    f"The model computes its output head at {hidden.shape[1]} positions where {num_columns} are asked "
                    "for by logits_to_keep; take that argument out of its forward, or apply it before the head."
                )
            judged: Callable[..., torch.Tensor] = _Judgement.apply
            found = judged(hidden[rows, columns], targets, logits_of, self.positions_at_once)
            cells = torch.zeros(*hidden.shape[:-1], 2, device=hidden.device)
            return cells.index_put((rows, columns), found)

        logits_of = self.module.forward
        with _instead(self.module, judge):
            yield


def find_head(base: torch.nn.Module) -> tuple[torch.nn.Module | None, str]:
    """(the head that the loss might be computed in, why there is none)."""
    ask = getattr(base, "get_output_embeddings", None)
    head = ask() if ask is not None else None
    if not isinstance(head, torch.nn.Module):
        return None, f"{type(base).__name__} does not say which module is its output head"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return None, "the output head is trained"
    if next(head.children(), None) is not None:  # under ZeRO-3 each would be gathered once a chunk
        return None, "the output head is made of other modules"
    return head, ""


class Seen(NamedTuple):
    """What a head returned."""

    logits: torch.Tensor  # fp32
    version: int  # which another one shows that it was changed in place since


@contextmanager
def observed(head: torch.nn.Module, seen: list[Seen]) -> Iterator[None]:
    """Inside, the head's logits are fp32, and those of each call are put into `seen`."""

    def observe(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = logits_of(hidden).float()
        seen.append(Seen(logits, logits._version))
        return logits

    logits_of = head.forward
    with _instead(head, observe):
        yield


def loss_head(head: torch.nn.Module, seen: list[Seen], logits: torch.Tensor) -> LossHead | None:
    """None where the `logits` of a model are not what its head was `observed` to return.

    Then the model scales or cuts them, or has them in another order, and would do so with what takes their place.
    """
    if len(seen) != 1:
        return None
    (given, version), *_ = seen
    is_same = given.shape == logits.shape and given.data_ptr() == logits.data_ptr() and logits._version == version
    return LossHead(head, max(LOGITS_AT_ONCE // logits.shape[-1], 1)) if is_same else None


@contextmanager
def _instead(module: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Its hooks run as always, those of ZeRO-3 among them."""
    own = vars(module).get("forward")  # mostly it is the class's
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


class _Judgement(torch.autograd.Function):
    """[positions, hidden] -> [positions, 2]; the gradient is that of the first column.

    The cross-entropy of logits z and target t is log(sum(exp(z))) - z_t, and its gradient with respect to z is
    softmax(z) - onehot(t), which goes through the head at once: what is kept is as wide as the hidden states.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        positions_at_once: int,
    ) -> torch.Tensor:
        is_trained = ctx.needs_input_grad[0]
        scale = _FP16_SCALE if hidden.dtype == torch.float16 else 1.0
        found = torch.empty(len(hidden), 2, device=hidden.device)
        gradient = torch.empty_like(hidden) if is_trained else None
        for start in range(0, len(hidden), positions_at_once):
            part = slice(start, start + positions_at_once)
            wanted = targets[part, None]
            with torch.set_grad_enabled(is_trained):
                given = hidden[part].detach().requires_grad_(is_trained)
                logits = logits_of(given)  # [chunk, vocab]
            values = logits.detach()
            found[part, 1:] = values.argmax(dim=-1, keepdim=True) == wanted
            # In place where that has been tried: on a CPU a new tensor of that size costs more than the arithmetic.
            out = values if values.dtype == torch.float32 and values.device.type == "cpu" else None
            values = torch.log_softmax(values, dim=-1, dtype=torch.float32, out=out)
            found[part, :1] = -values.gather(1, wanted)
            if gradient is not None:
                slope = values.exp_().scatter_add_(1, wanted, values.new_full((1, 1), -1.0).expand_as(wanted))
                (gradient[part],) = torch.autograd.grad(logits, given, slope.mul_(scale).to(logits.dtype))
                del slope
            del logits, values  # before the next ones are made
        ctx.scale = scale
        ctx.save_for_backward(gradient)
        return found

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        slope = above[0][:, :1] / ctx.scale  # [positions, 1]
        return (gradient * slope).to(gradient.dtype), None, None, None
