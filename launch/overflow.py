"""Which module overflowed. It is looked for only while steps are skipped: that takes a few kernels for every module."""

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from launch import engine as engines

SKIPS_BEFORE_A_LOOK = 2  # in a row; the scaler's own search for a scale mostly ends before
_NOWHERE, _FORWARD, _BACKWARD = 0, 1, 2
# What PEFT puts into the path of a module of the base.
_OF_PEFT = re.compile(r"\.(?:base_layer|original_module|modules_to_save\.default|default)(?=\.|$)")


@dataclass(frozen=True)
class Overflow:
    """The first value that was not finite, in the order of computation, on the lowest rank that had one."""

    phase: int
    place: str
    largest: float  # infinity, or not a number
    largest_input: float  # negative: there was none
    loss_scale: float | None  # at which that was; None without fp16

    def __str__(self) -> str:
        at_scale = f" at a loss scale of {self.loss_scale:,.0f}" if self.loss_scale is not None else ""
        if self.phase == _NOWHERE:
            return f"every output and gradient of each rank is finite{at_scale}, but the sum of the gradients is not"
        if self.phase == _BACKWARD:
            first = f"from the loss back, first that of {self.place}"
            return f"every output is finite, but{at_scale} a gradient is not: {first}"
        given = f", and its largest input was {_figure(self.largest_input)}" if self.largest_input >= 0 else ""
        if not math.isfinite(self.largest_input):
            given = ", and so was its input, which was computed between two modules"
        what = "is not a number" if math.isnan(self.largest) else "is infinite"
        limit = f" (fp16 ends at {torch.finfo(torch.float16).max:,.0f})" if self.loss_scale is not None else ""
        return f"{self.place} {what}{limit}{given}"


class Overflows:
    """Skipped steps in a row, and from the third one on what overflowed in them."""

    def __init__(self, engine: engines.Engine, say: Callable[[str], None]) -> None:
        self.num_in_a_row = 0
        self._engine, self._say = engine, say
        self._loss_scale = engines.loss_scale(engine)  # of the step to come
        self._watch: _Watch | None = None
        self._found: Overflow | None = None  # in this row of skipped steps

    def after_step(self, done: int, *, skipped: bool) -> None:
        """Every rank calls it with the same; a collective while modules are watched."""
        self.num_in_a_row = self.num_in_a_row + 1 if skipped else 0
        if not skipped and self._watch is not None:
            self._watch.end()
            self._watch = self._found = None
        elif self._watch is not None:
            is_news = self._found is None
            self._found = self._watch.first(self._loss_scale)
            if is_news:
                first_step = done - self.num_in_a_row + 1
                goes_on = "; the scale goes on down" if self._scale_can_go_down(self._found) else ""
                self._say(f"Steps {first_step} to {done} were skipped: {self._found}{goes_on}.")
        elif self.num_in_a_row == SKIPS_BEFORE_A_LOOK:
            self._watch = _Watch(self._engine.module, self._engine.device)
        self._loss_scale = engines.loss_scale(self._engine)

    def sentence(self) -> str:
        """Why the run ends, and the remedy; without a full stop."""
        skipped = f"The last {self.num_in_a_row} steps were skipped, since"
        if self._found is None:
            return (
                f"{skipped} their gradients were not finite; lower train.learning_rate, look at the rows, or raise "
                "train.max_bad_steps"
            )
        return f"{skipped} {self._found}; {self._remedy(self._found)}"

    def _scale_can_go_down(self, found: Overflow) -> bool:
        if found.phase == _FORWARD or found.loss_scale is None:  # a smaller scale changes no output
            return False
        return found.loss_scale > engines.lowest_loss_scale(self._engine)

    def _remedy(self, found: Overflow) -> str:
        if found.loss_scale is None:
            return "lower train.learning_rate, or look at the rows and at the weights of the base"
        if found.phase == _FORWARD:
            wider = (
                "train.precision=bf16"
                if engines.has_bf16_units()
                else "train.precision=fp32 (this device has no bf16; it takes twice the memory of fp16, and more time)"
            )
            return f"start another run.name with {wider}, take another base, or lower train.learning_rate"
        if self._scale_can_go_down(found):
            return "raise train.max_bad_steps, or lower fp16.initial_scale_power in the DeepSpeed JSON"
        return "lower train.learning_rate, or look at the rows"


class _Watch:
    """Hooks on every module; what they see stays on the device until the step is over.

    What gradient checkpointing computes again is no output that counts, and gradients come as they come.
    """

    def __init__(self, model: PeftModel, device: torch.device) -> None:
        self._device = device
        self._places: list[str] = []
        self._is_forward = False
        # By place, in the order in which it was seen first: [largest absolute value, that of the input], of all
        # micro-batches. What is not finite stays, since the maximum of anything with that is not finite either.
        self._outputs: dict[int, torch.Tensor] = {}
        self._gradients: dict[int, torch.Tensor] = {}
        self._hooks = [model.register_forward_pre_hook(self._begin), model.register_forward_hook(self._finish)]
        self._base = base = model.get_base_model()
        wrapping = next(name for name, module in model.named_modules() if module is base)
        for name, module in model.named_modules():
            if name.startswith((wrapping, "prompt_encoder.")):
                path = _path_in_base(name, wrapping) or "the model"
                hook = functools.partial(self._see_output, self._place(f"the output of {path} ({_class_of(module)})"))
                self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                hook = functools.partial(self._see_gradient, self._place(_path_in_base(name, wrapping)))
                self._hooks.append(parameter.register_hook(hook))

    def end(self) -> None:
        """Nothing is watched any more."""
        for hook in self._hooks:
            hook.remove()

    def first(self, loss_scale: float | None) -> Overflow:
        """Of the step that is over, the same on every rank; a collective."""
        mine = torch.zeros(dist.get_world_size(), 4, dtype=torch.float64, device=self._device)
        for phase, seen in ((_BACKWARD, self._gradients), (_FORWARD, self._outputs)):
            found = zip(seen, torch.stack(list(seen.values())).tolist(), strict=True) if seen else ()
            bad = next(((place, *values) for place, values in found if not math.isfinite(values[0])), None)
            if bad is not None:
                mine[dist.get_rank()] = torch.tensor([phase, *bad])
            seen.clear()
        dist.all_reduce(mine)
        rows = [row for row in mine.tolist() if row[0] != _NOWHERE]
        if not rows:
            return Overflow(_NOWHERE, "", math.nan, -1.0, loss_scale)
        phase, place, largest, largest_input = min(rows, key=lambda row: row[0])  # the first of those: the lowest rank
        return Overflow(int(phase), self._places[int(place)], largest, largest_input, loss_scale)

    def _place(self, text: str) -> int:
        self._places.append(text)
        return len(self._places) - 1

    def _begin(self, model: torch.nn.Module, given: object) -> None:
        self._is_forward = model.training  # an evaluation is not the step's

    def _finish(self, model: torch.nn.Module, given: object, output: object) -> None:
        self._is_forward = False

    def _see_output(
        self, place: int, module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        outputs = _tensors(output)
        if outputs and self._is_forward:
            inputs = _tensors([*given, *(value for name, value in named.items() if "mask" not in name)])
            _keep(self._outputs, place, _largest(outputs), _largest(inputs) if inputs else None)
        for tensor in outputs:  # but the model's own, which is that of its head under another name
            if tensor.requires_grad and module is not self._base:
                tensor.register_hook(functools.partial(self._see_gradient, place))  # type: ignore[no-untyped-call]

    def _see_gradient(self, place: int, gradient: torch.Tensor) -> None:
        if gradient.numel():
            _keep(self._gradients, place, _largest([gradient]), None)


def _path_in_base(name: str, wrapping: str) -> str:
    """Without what PEFT puts around the base and into it."""
    return _OF_PEFT.sub("", name.removeprefix(wrapping).removeprefix("."))


def _class_of(module: torch.nn.Module) -> str:
    """That of the base, if the module stands for one of those."""
    if isinstance(module, BaseTunerLayer):
        return f"{type(module.get_base_layer()).__name__} with its adapter"
    return type(getattr(module, "original_module", module)).__name__


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of floating point in what a module takes or gives."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() and value.numel() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (list, tuple)) else []


def _largest(tensors: list[torch.Tensor]) -> torch.Tensor:
    """[] the largest absolute value in fp32; not a number when one is not. isfinite takes thirty times as long."""
    ends = [end.float() for tensor in tensors for end in tensor.detach().aminmax()]
    return torch.stack(ends).abs().max()


def _keep(seen: dict[int, torch.Tensor], place: int, largest: torch.Tensor, largest_input: torch.Tensor | None) -> None:
    both = torch.stack([largest, largest.new_tensor(-1.0) if largest_input is None else largest_input])
    seen[place] = torch.maximum(seen[place], both) if place in seen else both


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
