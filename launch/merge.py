"""Adapter + base -> a directory that serving tools load, one tensor at a time: peak memory is one shard and one tensor.

One rounding rule: the base tensor is cast to the output type, scaling * B A is formed and added in fp32 from the fp32
masters, and the sum is rounded once.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from launch import engine as engines
from launch.adapter import ADAPTER_NAME
from launch.checkpoint import publish
from launch.errors import MergeError
from launch.runs import write_json

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Part:
    """One tensor of the merged model and what it is made of."""

    name: str  # in the merged model, which is the base model's own
    base: torch.Tensor | None  # a parameter or buffer that is copied or added to
    trained: torch.nn.Parameter | None = None  # a whole copy that replaces it (modules_to_save)
    lora: LoraLinear | None = None


def choose_dtype(wanted: str, precision: str) -> str:
    """float16 | bfloat16 | float32. `auto` is the trained type; what was trained in fp32 becomes float16."""
    return wanted if wanted != "auto" else {"bf16": "bfloat16"}.get(precision, "float16")


def plan_merge(model: PeftModel) -> tuple[list[Part], bool]:
    """(the tensors of the merged model in order, whether input and output embeddings are still one tensor).

    Raises MergeError for a kind of adapter layer that this merge does not know, or a trained tensor left over.
    """
    base = model.get_base_model()
    modules = dict(base.named_modules())
    parts: list[Part] = []
    seen: set[int] = set()  # base tensors that are copied, by identity: a second name of one is a tie
    tied = False
    tensors = [*base.named_parameters(remove_duplicate=False), *_persistent_buffers(base)]
    for path, tensor in tensors:
        owner, _, leaf = path.rpartition(".")
        if ".original_module." in path or ".lora_" in path:
            continue
        if f".modules_to_save.{ADAPTER_NAME}." in path:
            assert isinstance(tensor, torch.nn.Parameter)
            parts.append(Part(path.replace(f".modules_to_save.{ADAPTER_NAME}", ""), None, trained=tensor))
            continue
        lora = None
        name = path
        if ".base_layer." in path:
            wrapper = owner.removesuffix(".base_layer")
            name = f"{wrapper}.{leaf}"
            if leaf == "weight":
                layer = modules[wrapper]
                if type(layer) is not LoraLinear or layer.fan_in_fan_out or layer.use_dora.get(ADAPTER_NAME):
                    raise MergeError(
                        f"{wrapper}: a {type(layer).__name__} layer cannot be merged yet; set run.merge=false."
                    )
                lora = layer
        if lora is None and id(tensor) in seen:
            tied = True
            continue
        seen.add(id(tensor))
        parts.append(Part(name, tensor, lora=lora))
    _check_all_used(model, parts)
    return parts, tied


def merge(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig,
    target: Path,
    *,
    dtype_name: str,
    max_shard_size_bytes: int,
    facts: dict[str, object],
) -> None:
    """Merge the live model into `target`, which appears whole or not at all. A collective; rank zero writes.

    Raises MergeError when a merged tensor is not finite in the output type.
    """
    parts, tied = plan_merge(model)
    merged = _merged_tensors(parts, DTYPES[dtype_name])
    if torch.distributed.get_rank() != 0:
        for _ in merged:  # takes part in the gathering
            pass
        return
    config = copy.deepcopy(model.get_base_model().config)
    config.dtype = DTYPES[dtype_name]
    config.tie_word_embeddings = bool(config.tie_word_embeddings and tied)

    def write_files(directory: Path) -> None:
        progress = tqdm(merged, total=len(parts), desc="merge", unit="tensor", leave=False, disable=None)
        _write_shards(directory, progress, max_shard_size_bytes)
        _write_code(directory, model.get_base_model(), config)
        config.save_pretrained(str(directory))
        generation_config.save_pretrained(str(directory))
        tokenizer.save_pretrained(str(directory))
        merged_matrices = sum(part.lora is not None for part in parts)
        report = {"dtype": dtype_name, "tensors": len(parts), "merged_matrices": merged_matrices, **facts}
        write_json(directory / "merge_report.json", report)

    publish(target, write_files, {})


def add_lora(
    weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, dtype: torch.dtype
) -> torch.Tensor:
    """W [out, in] + scaling * B [out, r] A [r, in], by the one rounding rule."""
    product = lora_b.float() @ lora_a.float()
    return (weight.to(dtype).float() + scaling * product).to(dtype)


def _merged_tensors(parts: Sequence[Part], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, merged tensor on the CPU); every rank iterates, the values are whole on rank zero."""
    is_writer = torch.distributed.get_rank() == 0
    for part in parts:
        matrices = (part.lora.lora_A, part.lora.lora_B) if part.lora else ()
        lora = [engines.whole_master(matrix[ADAPTER_NAME].weight) for matrix in matrices]
        value = torch.empty(0)
        if part.trained is not None:
            value = engines.whole_master(part.trained).cpu()
        elif part.base is not None:
            with engines.whole_parameter(part.base) as whole:
                value = whole.to("cpu", copy=True) if is_writer else value
        if is_writer:
            if part.lora is not None:
                lora_a, lora_b = (matrix.cpu() for matrix in lora)
                value = add_lora(value, lora_a, lora_b, part.lora.scaling[ADAPTER_NAME], dtype)
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


def _write_code(directory: Path, base: PreTrainedModel, config: PretrainedConfig) -> None:
    """The remote code of the base, if it is such, and an auto_map of what is in the directory alone."""
    if base._auto_class is None:
        return
    custom_object_save(base, directory, config=config)
    classes = {name: ref.rpartition("--")[2] for name, ref in config.auto_map.items() if isinstance(ref, str)}
    config.auto_map = {name: ref for name, ref in classes.items() if (directory / f"{ref.split('.')[0]}.py").exists()}


def _check_all_used(model: PeftModel, parts: Sequence[Part]) -> None:
    used = {id(part.trained) for part in parts}
    for part in parts:
        if part.lora is not None:
            used |= {id(p) for p in (part.lora.lora_A[ADAPTER_NAME].weight, part.lora.lora_B[ADAPTER_NAME].weight)}
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in used]
    if left:
        raise MergeError(
            f"The merge does not know what to do with {left[0]} ({len(left)} such tensors); set run.merge=false."
        )


def _persistent_buffers(base: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    saved = base.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in base.named_buffers() if name in saved]
