"""Which attention a model computes with: what a recipe may ask for, and what its modules really use."""

import inspect
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def offered(asked: object) -> object:
    """What the recipe has. Raises ValueError for what many recipes elsewhere have, which its list alone would not tell.

    https://github.com/Dao-AILab/flash-attention: version 2 and later need an Ampere GPU; a V100 is older.
    """
    if isinstance(asked, str) and "flash" in asked.lower():
        raise ValueError(
            f"{asked} needs a package that is not among the requirements and a GPU of compute capability 8.0, which a "
            "V100 (7.0) and a T4 (7.5) are not; write sdpa, for which PyTorch brings kernels of its own that write no "
            "attention matrix out, for a V100 as well. The valid ones are sdpa, eager"
        )
    return asked


def attention_in_use(model: "torch.nn.Module", asked: str) -> tuple[bool, str]:
    """(whether the modules of a loaded model compute as `asked`, what they do).

    transformers writes its choice into the config of each module. Code that a model brings along may never look at it,
    and then nobody but that code knows; what it is loaded with is what it may look at.
    """
    modules = _attention_modules(model)
    names = ", ".join(sorted({type(module).__name__ for module in modules})) or type(model).__name__
    chosen = set(_chosen(model, modules))
    if not chosen:
        return True, f"of the model's own code ({names}), which is not told what model.attn_implementation says"
    if any(name != asked for name in chosen):
        return False, f"{', '.join(sorted(chosen))} ({names})"
    sources = {type(module).__module__ for module in modules or [model]}
    if not any(name.startswith("transformers.") or "_attn_implementation" in _source(name) for name in sources):
        return True, f"of the model's own code ({names}), which does not look at model.attn_implementation"
    return True, f"{asked}, as the recipe says ({names})"


def _attention_modules(model: "torch.nn.Module") -> "list[torch.nn.Module]":
    """By their names, which is how transformers and those who follow it call them."""
    found = {type(module): module for module in model.modules() if type(module).__name__.endswith("Attention")}
    return list(found.values())


def _chosen(model: "torch.nn.Module", modules: "list[torch.nn.Module]") -> Iterator[str]:
    for module in (model, *modules):
        found = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if found is not None:
            yield str(found)


def _source(module_name: str) -> str:
    module = sys.modules.get(module_name)
    try:
        return "" if module is None else inspect.getsource(module)
    except (OSError, TypeError):  # it has no file
        return ""
