"""What a merged model consists of: its tensors, what each is made of, and what the files on the hub have for it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora as peft_lora
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from launch.adapter import ADAPTER_NAME
from launch.errors import MergeError
from launch.merge_rule import Part, Slab
from launch.quantisation import is_quantised


def plan_merge(model: PeftModel) -> tuple[list[Part], dict[str, str]]:
    """(the tensors of the merged model in order, second name -> first name of those that are still tied).

    Raises MergeError for a kind of adapter layer that this merge does not know, or a trained tensor left over.
    """
    base = model.get_base_model()
    modules = dict(base.named_modules())
    known = (LoraLinear, peft_lora.Embedding, *((peft_lora.Linear4bit,) if is_quantised(base) else ()))
    parts: list[Part] = []
    seen: dict[int, str] = {}  # base tensors that are copied, by identity: a second name of one is a tie
    ties: dict[str, str] = {}
    tensors = [*base.named_parameters(remove_duplicate=False), *_persistent_buffers(base)]
    for path, tensor in tensors:
        owner, _, leaf = path.rpartition(".")
        if ".original_module." in path or ".lora_" in path or ".trainable_tokens_delta." in path:
            continue
        if f".modules_to_save.{ADAPTER_NAME}." in path:
            assert isinstance(tensor, torch.nn.Parameter)
            parts.append(Part(path.replace(f".modules_to_save.{ADAPTER_NAME}", ""), None, trained=tensor))
            continue
        lora = tokens = added_bias = None
        name = path
        if ".base_layer." in path:
            wrapper, layer = _wrapped_by(modules, owner, leaf)
            name = f"{wrapper.removesuffix('.token_adapter')}.{leaf}"
            if isinstance(layer, TrainableTokensLayer):
                tokens = layer if leaf == "weight" else None
            elif isinstance(layer, peft_lora.ParamWrapper):
                lora = layer if leaf == layer.parameter_name else None
            elif type(layer) not in known or _is_unknown_variant(layer):
                kind = type(getattr(layer, "lora_variant", {}).get(ADAPTER_NAME, layer)).__name__
                raise MergeError(
                    f"{wrapper}: PEFT's {kind} layer cannot be merged; train with run.merge=false, and serve base and "
                    "adapter."
                )
            elif leaf == "weight":
                lora = layer
            elif leaf == "bias" and getattr(layer, "lora_bias", {}).get(ADAPTER_NAME):
                lora, added_bias = layer, layer.lora_B[ADAPTER_NAME].bias
        if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad:  # a bias; LoRA's own are in their layers
            parts.append(Part(name, None, trained=tensor))
            continue
        if lora is None and id(tensor) in seen:
            ties[name] = seen[id(tensor)]
            continue
        if lora is None:
            seen[id(tensor)] = name
        parts.append(Part(name, tensor, lora=lora, tokens=tokens, added_bias=added_bias))
    _check_all_used(model, parts)
    return _with_published(base, parts), ties


def _wrapped_by(modules: Mapping[str, torch.nn.Module], owner: str, leaf: str) -> tuple[str, Any]:
    """(the path of PEFT's outermost layer around the one that has the tensor, PEFT's layer that is about the tensor).

    Of several tensors of one module, such as experts, each has a layer; they stand in each other.
    """
    path, layer = owner, None
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
        if layer is None or getattr(modules[path], "parameter_name", "weight") == leaf:
            layer = modules[path]
    return path, layer


def _with_published(base: torch.nn.Module, parts: Sequence[Part]) -> list[Part]:
    """The parts with the names that files on the hub have for them; a module of one's own has no others."""
    if not isinstance(base, PreTrainedModel):
        return list(parts)
    empty = {part.name: torch.empty(part.shape, device="meta") for part in parts}
    in_files = revert_weight_conversion(base, empty)
    is_as_in_memory = all(in_files.get(name) is tensor for name, tensor in empty.items())
    published = []
    for part in parts:
        if is_as_in_memory and not _is_of_experts(part):
            published.append(replace(part, published=((part.name, part.shape),)))
        else:  # one by one, since some become several; each look at a large model takes a while
            published.append(_as_published(base, part))
    return published


def _is_of_experts(part: Part) -> bool:
    return len(part.shape) == 3 and part.lora is not None


def _as_published(base: PreTrainedModel, part: Part) -> Part:
    """The part with what the model's files have for it, and where each of that stands in a fused tensor."""
    empty = torch.empty(part.shape, device="meta")
    reverted = revert_weight_conversion(base, {part.name: empty})
    published = tuple((name, tuple(tensor.shape)) for name, tensor in reverted.items())
    is_fused = len(published) > 1 or _is_of_experts(part)
    slabs = _slabs(base, part, published) if is_fused and len(part.shape) in (2, 3) else ()
    is_turned = len(reverted) == 1 and next(iter(reverted.values())) is not empty
    if (is_turned or (is_fused and part.lora is not None)) and not slabs:
        raise MergeError(
            f"{part.name}: the files have its numbers in another order, in which they cannot be merged; train with "
            "run.merge=false, and serve base and adapter."
        )
    return replace(part, published=published, slabs=slabs)


def _slabs(base: PreTrainedModel, part: Part, published: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[Slab, ...]:
    """Found by sending numbered rows the way that the tensor would go; empty when they do not stay together.

    Of several tensors, each is a matrix.
    """
    *num_experts, num_rows, num_columns = part.shape
    numbers = torch.arange(math.prod(num_experts) * num_rows).view(*num_experts, num_rows, 1)
    found = []
    for (_, shape), rows in zip(published, revert_weight_conversion(base, {part.name: numbers}).values(), strict=True):
        for matrix in rows.reshape(-1, rows.shape[-2], 1) if rows.dim() == 2 or len(published) == 1 else ():
            expert, first = divmod(int(matrix[0]), num_rows)
            last = first + len(matrix)
            stay_together = torch.equal(matrix[:, 0], torch.arange(len(matrix)) + int(matrix[0]))
            if stay_together and last <= num_rows and shape[-1] == num_columns:
                found.append(Slab(expert if num_experts else None, first, last))
    is_all = sum(slab.last - slab.first for slab in found) == numbers.numel()
    return tuple(found) if is_all else ()


def _check_all_used(model: PeftModel, parts: Sequence[Part]) -> None:
    used = {id(parameter) for part in parts for parameter in part.masters}
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in used]
    if left:
        raise MergeError(
            f"The merge does not know what to do with {left[0]} ({len(left)} such tensors); set run.merge=false."
        )


def _is_unknown_variant(layer: Any) -> bool:
    """Whether another thing than B A is added, or not to every token; of DoRA, whether it is that of a plain matrix.

    Its magnitudes are else those of the embeddings, or of the weight in 4 bits.
    """
    variant = layer.lora_variant.get(ADAPTER_NAME)
    return variant is not None and not (isinstance(variant, DoraLinearVariant) and type(layer) is LoraLinear)


def _persistent_buffers(base: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    saved = base.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in base.named_buffers() if name in saved]
