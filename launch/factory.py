"""A user's own model: a function in a Python file builds the module, a `.pth` state dict has its weights.

`model.factory: FILE.py:FUNCTION` is called without arguments and returns a `torch.nn.Module` with

    forward(input_ids, ...)  # [batch, seq] int64 -> logits [batch, seq, vocab], (logits, ...) or an object with .logits

which may also take `attention_mask` [batch, seq] (1 for a token, 0 for the padding to its right) and, to be given
packed rows, `position_ids` [batch, seq] and `logits_to_keep` [columns] int64.
"""

import importlib.util
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from launch import engine as engines
from launch.errors import ModelError, first_line


def load_factory(factory: str) -> Callable[[], object]:
    """The function that `FILE.py:FUNCTION` names; the file's own directory can be imported from, as by a script.

    Raises ModelError when the file has no such function, or cannot be run.
    """
    file_name, _, function_name = factory.rpartition(":")
    path = Path(file_name).expanduser()
    spec = importlib.util.spec_from_file_location(f"factory_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent.resolve()) not in sys.path:
        sys.path.append(str(path.parent.resolve()))  # last: its files must not stand in for installed ones
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModelError(f"model.factory = {factory}: the file raised {_told(error)}.") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ModelError(
            f"model.factory = {factory}: {path.name} has no function {function_name}; it has "
            f"{', '.join(functions) or 'none'}."
        )
    built: Callable[[], object] = function
    return built


def build_skeleton(factory: str) -> torch.nn.Module:
    """The user's module without weights, on the meta device. Raises ModelError when it cannot be built."""
    with torch.device("meta"):
        return _build(factory)


def build_filled(factory: str, path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The user's module with its weights in `dtype`, frozen as it is; a collective.

    Rank zero alone reads the file, mapped, one tensor at a time; under ZeRO-3 each rank holds its share only. Buffers
    keep the type that the factory gives them.
    """
    with engines.partitioned_while_built():
        module = _build(factory)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    _check_buffer_types(module, factory)
    state = read_state_dict(path) if dist.get_rank() == 0 else {}
    filled: set[int] = set()
    for name, tensor in _whole_state(module).items():
        if id(tensor) in filled:
            continue  # tied, and check_weights has seen that both names have the same values
        filled.add(id(tensor))
        with engines.filled_by_rank_zero(tensor) as whole:
            if dist.get_rank() == 0:
                whole.copy_(state[name])
    return module


def build_alone(factory: str, path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The same on this rank alone, whole."""
    module = _build(factory)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    module.load_state_dict(read_state_dict(path))
    return module


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that `torch.save(model.state_dict(), path)` wrote, mapped; nothing else is unpickled.

    Raises ModelError for any other file.
    """
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"model.name_or_path = {path} holds more than tensors, and code is not unpickled; "
            "write it with torch.save(model.state_dict(), PATH)."
        ) from None
    except (OSError, RuntimeError, EOFError) as error:
        raise ModelError(f"model.name_or_path = {path} cannot be read as a state dict: {first_line(error)}.") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        held = f"a {type(state).__name__}"
        if isinstance(state, Mapping):
            held += " with " + ", ".join(map(str, list(state)[:5]))
        raise ModelError(
            f"model.name_or_path = {path} is no state dict of tensors but {held}; "
            "write it with torch.save(model.state_dict(), PATH)."
        )
    return dict(state)


def check_weights(skeleton: torch.nn.Module, path: Path, factory: str) -> None:
    """Every tensor of the module stands in the file with its shape, and no other. Raises ModelError otherwise."""
    state, wanted = read_state_dict(path), _whole_state(skeleton)
    for name, tensor in wanted.items():
        if name not in state:
            missing = len(wanted.keys() - state.keys())
            raise ModelError(
                f"{path} has no {name}, which the model of {factory} needs ({missing} such tensors); "
                f"the file has {_some(state)}."
            )
        if state[name].shape != tensor.shape:
            raise ModelError(
                f"{name} is {list(state[name].shape)} in {path} and {list(tensor.shape)} in the model of {factory}."
            )
    unexpected = [name for name in state if name not in wanted]
    if unexpected:
        raise ModelError(
            f"{path} has {unexpected[0]}, which the model of {factory} does not ({len(unexpected)} such tensors); "
            f"the model has {_some(wanted)}."
        )
    first_names: dict[int, str] = {}
    for name, tensor in wanted.items():
        first = first_names.setdefault(id(tensor), name)
        if first != name and not torch.equal(state[first], state[name]):
            raise ModelError(f"{first} and {name} are one tensor in the model of {factory}, but two in {path}.")


def _build(factory: str) -> torch.nn.Module:
    function = load_factory(factory)
    try:
        module = function()
    except Exception as error:
        raise ModelError(f"model.factory = {factory} raised {_told(error)}.") from error
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"model.factory = {factory} returned a {type(module).__name__}, not a torch.nn.Module.")
    return module


def _check_buffer_types(module: torch.nn.Module, factory: str) -> None:
    """zero.Init may have made a buffer 16-bit: one that the file brings is widened again, any other is refused."""
    plain = dict(build_skeleton(factory).named_buffers())
    in_file = _whole_state(module)
    for name, buffer in module.named_buffers():
        if buffer.dtype == plain[name].dtype:
            continue
        if name not in in_file:
            raise ModelError(
                f"model.factory = {factory}: the buffer {name} is made in {plain[name].dtype}, but under ZeRO-3 in "
                f"{buffer.dtype} with rounded values; compute it from torch.arange, or register it with "
                "persistent=True."
            )
        buffer.data = buffer.data.to(plain[name].dtype)


def _whole_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a state dict of the module has, the very tensors of the module."""
    return dict(module.state_dict(keep_vars=True))


def _told(error: BaseException) -> str:
    """`TypeError: ... (model.py line 12)`."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {reason} ({Path(frame.filename).name} line {frame.lineno})"


def _some(names: Mapping[str, object]) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")
