"""Adapter + base -> a directory that serving tools load, one tensor at a time: peak memory is one shard and one tensor.

One rounding rule: the base tensor is cast to the output type, scaling * B A is formed and added in fp32 from the fp32
masters, DoRA scales the rows of the sum to its magnitudes, and the result is rounded once. A quantised base is read
anew for it, whole, by rank zero.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners import lora as peft_lora
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from launch import engine as engines
from launch.adapter import ADAPTER_NAME
from launch.checkpoint import publish
from launch.errors import MergeError
from launch.quantisation import is_quantised
from launch.runs import write_json

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Part:
    """One tensor of the merged model and what it is made of."""

    name: str  # in the merged model, which is the base model's own
    base: torch.Tensor | None  # a parameter or buffer that is copied or added to
    trained: torch.nn.Parameter | None = None  # a whole copy that replaces it (modules_to_save)
    lora: LoraLinear | None = None
    tokens: TrainableTokensLayer | None = None  # rows of it are replaced (trainable_token_indices)

    @property
    def masters(self) -> list[torch.nn.Parameter]:
        """The trained parameters that it is made of: the copy, the rows, or A, B and DoRA's magnitudes."""
        if self.tokens is not None:
            return [self.tokens.trainable_tokens_delta[ADAPTER_NAME]]
        if self.lora is None:
            return [] if self.trained is None else [self.trained]
        held = [self.lora.lora_A, self.lora.lora_B, self.lora.lora_magnitude_vector]
        return [by_adapter[ADAPTER_NAME].weight for by_adapter in held if ADAPTER_NAME in by_adapter]


def choose_dtype(wanted: str, precision: str) -> str:
    """float16 | bfloat16 | float32. `auto` is the trained type; what was trained in fp32 becomes float16."""
    return wanted if wanted != "auto" else {"bf16": "bfloat16"}.get(precision, "float16")


def plan_merge(model: PeftModel) -> tuple[list[Part], dict[str, str]]:
    """(the tensors of the merged model in order, second name -> first name of those that are still tied).

    Raises MergeError for a kind of adapter layer that this merge does not know, or a trained tensor left over.
    """
    base = model.get_base_model()
    modules = dict(base.named_modules())
    plain = (LoraLinear, peft_lora.Linear4bit) if is_quantised(base) else (LoraLinear,)
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
        lora = tokens = None
        name = path
        if ".base_layer." in path:
            wrapper = owner.removesuffix(".base_layer")
            name = f"{wrapper.removesuffix('.token_adapter')}.{leaf}"
            layer = modules[wrapper]
            if isinstance(layer, TrainableTokensLayer):
                tokens = layer if leaf == "weight" else None
            elif leaf == "weight":
                is_quantised_dora = type(layer) is not LoraLinear and layer.use_dora.get(ADAPTER_NAME)
                if type(layer) not in plain or layer.fan_in_fan_out or is_quantised_dora:
                    raise MergeError(
                        f"{wrapper}: a {type(layer).__name__} layer cannot be merged yet; set run.merge=false."
                    )
                lora = layer
        if lora is None and id(tensor) in seen:
            ties[name] = seen[id(tensor)]
            continue
        seen[id(tensor)] = name
        parts.append(Part(name, tensor, lora=lora, tokens=tokens))
    _check_all_used(model, parts)
    return parts, ties


def merge(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig,
    target: Path,
    *,
    dtype_name: str,
    max_shard_size_bytes: int,
    facts: dict[str, object],
    load_unquantised: Callable[[torch.dtype], PreTrainedModel] | None = None,
) -> None:
    """Merge the live model into `target`, which appears whole or not at all. A collective; rank zero writes.

    A model of transformers becomes what `from_pretrained` reads, any other `model.pth`, a state dict like its own. Of a
    quantised base, what is not trained comes from what `load_unquantised` gives in the output type, on rank zero.
    Raises MergeError when a merged tensor is not finite in the output type.
    """
    parts, ties = plan_merge(model)
    dtype, is_writer = DTYPES[dtype_name], torch.distributed.get_rank() == 0
    base, others = model.get_base_model(), None
    if load_unquantised is not None:
        base = load_unquantised(dtype) if is_writer else base
        others = dict(base.state_dict(keep_vars=True)) if is_writer else {}
    merged = _merged_tensors(parts, dtype, others)
    if not is_writer:
        for _ in merged:  # takes part in the gathering
            pass
        return

    def write_files(directory: Path) -> None:
        progress = tqdm(merged, total=len(parts), desc="merge", unit="tensor", leave=False, disable=None)
        if isinstance(base, PreTrainedModel):
            _write_shards(directory, progress, max_shard_size_bytes)
            config = copy.deepcopy(base.config)
            config.dtype = DTYPES[dtype_name]
            config.tie_word_embeddings = bool(config.tie_word_embeddings and ties)
            _write_code(directory, base, config)
            config.save_pretrained(str(directory))
            generation_config.save_pretrained(str(directory))
        else:
            _write_state_dict(directory, progress, ties)
        tokenizer.save_pretrained(str(directory))
        merged_matrices = sum(part.lora is not None for part in parts)
        report = {"dtype": dtype_name, "tensors": len(parts), "merged_matrices": merged_matrices, **facts}
        write_json(directory / "merge_report.json", report)

    publish(target, write_files, {})


def add_lora(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """W [out, in] + scaling * B [out, r] A [r, in], its rows of DoRA's magnitude [out], by the one rounding rule."""
    product = lora_b.float() @ lora_a.float()
    merged = weight.to(dtype).float() + scaling * product
    if magnitude is not None:
        merged *= (magnitude.float() / torch.linalg.norm(merged, dim=1))[:, None]
    return merged.to(dtype)


def _merged_tensors(
    parts: Sequence[Part], dtype: torch.dtype, others: Mapping[str, torch.Tensor] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, merged tensor on the CPU); every rank iterates, the values are whole on rank zero.

    `others`, if given, has the base's tensors by name, whole on rank zero; the live ones are quantised.
    """
    is_writer = torch.distributed.get_rank() == 0
    for part in parts:
        masters = [engines.whole_master(parameter).cpu() for parameter in part.masters]
        value = masters[0] if part.trained is not None else torch.empty(0)
        if part.base is not None and others is not None:
            value = others[part.name].detach() if is_writer else value
        elif part.base is not None:
            with engines.whole_parameter(part.base) as whole:
                value = whole.to("cpu", copy=True) if is_writer else value
        if is_writer:
            if part.lora is not None:
                lora_a, lora_b, *magnitude = masters
                value = add_lora(value, lora_a, lora_b, part.lora.scaling[ADAPTER_NAME], dtype, *magnitude)
            elif part.tokens is not None:
                value = value.to(dtype)
                value[part.tokens.token_indices[ADAPTER_NAME]] = masters[0].to(dtype)
            elif value.is_floating_point():
                value = value.to(dtype)
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise MergeError(
                    f"{part.name} is not finite in {str(dtype).removeprefix('torch.')}; "
                    "set run.merge_dtype to bfloat16 or float32 and run the same command again."
                )
        yield part.name, value


def _write_shards(directory: Path, tensors: Iterator[tuple[str, torch.Tensor]], max_shard_size_bytes: int) -> None:
    """safetensors shards of at most `max_shard_size_bytes` (a larger tensor stands alone) and their index."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total_bytes = shard_bytes = 0

    def flush() -> None:
        nonlocal shard, shard_bytes
        save_file(shard, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard, shard_bytes = {}, 0

    for name, tensor in tensors:
        size_bytes = tensor.numel() * tensor.element_size()
        if shard and shard_bytes + size_bytes > max_shard_size_bytes:
            flush()
        shard[name] = tensor.contiguous()
        shard_bytes += size_bytes
        total_bytes += size_bytes
    flush()
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number}").rename(directory / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_state_dict(directory: Path, tensors: Iterator[tuple[str, torch.Tensor]], ties: dict[str, str]) -> None:
    """`model.pth` as `torch.save(model.state_dict())` writes it; the tensors wait on the disk, not in memory."""
    waiting = directory / "tensors"
    waiting.mkdir()
    state: dict[str, torch.Tensor] = {}
    for number, (name, tensor) in enumerate(tensors):
        if tensor.numel() == 0:
            state[name] = tensor
            continue
        on_disk = torch.from_file(str(waiting / str(number)), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        state[name] = on_disk.view(tensor.shape).copy_(tensor)
    torch.save(state | {second: state[first] for second, first in ties.items()}, directory / "model.pth")
    shutil.rmtree(waiting)


def _write_code(directory: Path, base: PreTrainedModel, config: PretrainedConfig) -> None:
    """The remote code of the base, if it is such, and an auto_map of what is in the directory alone."""
    if base._auto_class is None:
        return
    custom_object_save(base, directory, config=config)
    classes = {name: ref.rpartition("--")[2] for name, ref in config.auto_map.items() if isinstance(ref, str)}
    config.auto_map = {name: ref for name, ref in classes.items() if (directory / f"{ref.split('.')[0]}.py").exists()}


def _check_all_used(model: PeftModel, parts: Sequence[Part]) -> None:
    used = {id(parameter) for part in parts for parameter in part.masters}
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in used]
    if left:
        raise MergeError(
            f"The merge does not know what to do with {left[0]} ({len(left)} such tensors); set run.merge=false."
        )


def _persistent_buffers(base: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    saved = base.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in base.named_buffers() if name in saved]
