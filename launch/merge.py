"""Adapter + base -> a directory that serving tools load, one block of rows at a time, and the proof that it is right.

The live engine and the disk (merge_from_disk.py) differ only in where the numbers come from.
"""

import copy
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora as peft_lora
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.trainable_tokens import TrainableTokensLayer
from tqdm import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from launch import engine as engines
from launch.adapter import ADAPTER_NAME
from launch.checkpoint import Identity, identity_of_file, publish
from launch.errors import MergeError
from launch.merge_rule import DTYPES, Opener, Part, Pieces, Proof, Slab, merged_blocks
from launch.quantisation import is_quantised
from launch.runs import write_json
from launch.shards import ShardFile, index_of, row_blocks, shard_names
from launch.table import format_bytes


def facts_of(adapter: Path, base: str, base_fingerprint: str, max_shard_size_bytes: int) -> dict[str, str | int]:
    """What merge_report.json says of the merge's origin; `adapter` is the file of its tensors."""
    return {
        "adapter_sha256": identity_of_file(adapter)["sha256"],
        "base": base,
        "base_fingerprint": base_fingerprint,
        "max_shard_size_bytes": max_shard_size_bytes,
    }


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
            elif type(layer) not in known or _is_odd_dora(layer):
                raise MergeError(
                    f"{wrapper}: PEFT's {type(layer).__name__} layer cannot be merged; train with run.merge=false, and "
                    "serve base and adapter."
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
    return [_as_published(base, part) for part in parts], ties


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


def _as_published(base: torch.nn.Module, part: Part) -> Part:
    """The part with what the model's files have for it, and where each of that stands in a fused tensor."""
    if not isinstance(base, PreTrainedModel):
        return part
    reverted = revert_weight_conversion(base, {part.name: torch.empty(part.shape, device="meta")})
    published = tuple((name, tuple(tensor.shape)) for name, tensor in reverted.items())
    is_fused = len(published) > 1 or (len(part.shape) == 3 and part.lora is not None)
    slabs = _slabs(base, part, published) if is_fused and len(part.shape) in (2, 3) else ()
    if is_fused and part.lora is not None and not slabs:
        raise MergeError(
            f"{part.name}: the files have it in another order of rows, in which LoRA cannot be merged; train with "
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


# ---- from the live engine ----


def merge(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig,
    target: Path,
    *,
    dtype_name: str,
    max_shard_size_bytes: int,
    facts: Callable[[], Mapping[str, object]],
    check: Callable[[Path], Mapping[str, object]],
    load_unquantised: Callable[[torch.dtype], PreTrainedModel] | None = None,
) -> None:
    """Merge the live model into `target`, which appears whole or not at all. A collective; rank zero writes.

    A model of transformers becomes what `from_pretrained` reads, any other `model.pth`, a state dict like its own. Of a
    quantised base, what is not trained comes from what `load_unquantised` gives in the output type, on rank zero, which
    also asks for the `facts` of merge_report.json, and which alone makes the last `check` of what it wrote: the other
    ranks have returned by then.
    Raises MergeError when a merged tensor is not finite in the output type.
    """
    parts, ties = plan_merge(model)
    dtype, is_writer = DTYPES[dtype_name], torch.distributed.get_rank() == 0
    base, others = model.get_base_model(), None
    if load_unquantised is not None:
        base = load_unquantised(dtype) if is_writer else base
        others = dict(base.state_dict(keep_vars=True)) if is_writer else {}
    if not is_writer:
        shards = plan_shards(parts, dtype, max_shard_size_bytes)
        for part in [part for shard in shards for part in shard]:  # takes part in the gathering
            with _live(part, others, is_writer=False):
                pass
        return
    engines.end_zero_init()  # what is written is loaded again, by this rank alone
    write_merged(
        target,
        parts,
        ties,
        lambda part: _live(part, others, is_writer=True),
        base=base,
        tokenizer=tokenizer,
        generation_config=generation_config,
        dtype_name=dtype_name,
        max_shard_size_bytes=max_shard_size_bytes,
        facts=facts(),
        check=check,
    )


@contextmanager
def _live(part: Part, others: Mapping[str, torch.Tensor] | None, *, is_writer: bool) -> Iterator[Pieces]:
    """A part's pieces while inside, whole on rank zero; a collective.

    `others`, if given, has the base's tensors by name, whole on rank zero; the live ones are quantised.
    """
    masters = [engines.whole_master(parameter).cpu() for parameter in part.masters]
    if part.base is None:
        yield Pieces(lambda first, last: _rows(masters[0], first, last))
    elif others is not None:
        known = others[part.name].detach() if is_writer else torch.empty(0)
        yield Pieces(lambda first, last: _rows(known, first, last), masters)
    else:
        with engines.whole_parameter(part.base) as whole:
            yield Pieces(lambda first, last: _rows(whole, first, last).to("cpu", copy=True), masters)


def _rows(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
    return tensor[first:last] if tensor.dim() else tensor


# ---- what is written ----


def plan_shards(parts: Sequence[Part], dtype: torch.dtype, max_shard_size_bytes: int) -> list[list[Part]]:
    """The parts by name, in shards of at most so many bytes; a larger one stands alone."""
    shards: list[list[Part]] = [[]]
    room_bytes = max_shard_size_bytes
    for part in sorted(parts, key=lambda part: part.layouts(dtype)[0].name):
        if shards[-1] and _size_bytes(part, dtype) > room_bytes:
            shards.append([])
            room_bytes = max_shard_size_bytes
        shards[-1].append(part)
        room_bytes -= _size_bytes(part, dtype)
    # Wide numbers first, so that each tensor is aligned; the order is otherwise the names'.
    return [sorted(shard, key=lambda part: -part.layouts(dtype)[0].dtype.itemsize) for shard in shards]


def _size_bytes(part: Part, dtype: torch.dtype) -> int:
    return sum(layout.size_bytes for layout in part.layouts(dtype))


def write_merged(
    target: Path,
    parts: Sequence[Part],
    ties: Mapping[str, str],
    opener: Opener,
    *,
    base: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig,
    dtype_name: str,
    max_shard_size_bytes: int,
    facts: Mapping[str, object],
    check: Callable[[Path], Mapping[str, object]],
) -> None:
    """Write the merged model's directory, whole or not at all; parts are opened in the order of `plan_shards`.

    `check` sees it before anybody else does: what it returns goes into merge_report.json, and what it raises ends all.
    """
    dtype, proof = DTYPES[dtype_name], Proof()
    shards = plan_shards(parts, dtype, max_shard_size_bytes)
    total_bytes = sum(_size_bytes(part, dtype) for part in parts)
    _check_room(target, total_bytes)

    def blocks() -> Iterator[Iterator[torch.Tensor]]:
        with tqdm(total=total_bytes, desc="merge", unit="B", unit_scale=True, leave=False, disable=None) as progress:
            for part in [part for shard in shards for part in shard]:
                with opener(part) as pieces:
                    yield merged_blocks(part, pieces, dtype, proof)
                progress.update(_size_bytes(part, dtype))

    def write_files(directory: Path) -> dict[str, Identity]:
        identities = {}
        if isinstance(base, PreTrainedModel):
            identities = _write_shards(directory, shards, blocks(), base, dtype)
            config = copy.deepcopy(base.config)
            config.dtype = dtype
            config.tie_word_embeddings = bool(config.tie_word_embeddings and ties)
            _write_code(directory, base, config)
            config.save_pretrained(str(directory))
            generation_config.save_pretrained(str(directory))
        else:
            _write_state_dict(directory, shards, blocks(), ties)
        tokenizer.save_pretrained(str(directory))
        if isinstance(base, PreTrainedModel):
            _check_reload(directory, base)
        report = {"dtype": dtype_name, "tensors": len(parts), **facts, **check(directory), **proof.as_report()}
        write_json(directory / "merge_report.json", report)
        return identities

    try:
        publish(target, write_files, {})
    except Exception as error:
        if not isinstance(error, OSError) and type(error) is not Exception:  # as such it is tokenizers' OSError
            raise
        raise MergeError(
            f"{target} could not be written: {getattr(error, 'strerror', None) or error}; nothing was kept, and the "
            "same command begins it again."
        ) from error


def _check_room(target: Path, total_bytes: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(target.parent).free
    if total_bytes > free_bytes:
        raise MergeError(
            f"{target.parent} has room for {format_bytes(free_bytes)}, and the merged model has "
            f"{format_bytes(total_bytes)}; make room there and run the same command again."
        )


def _write_shards(
    directory: Path,
    shards: Sequence[Sequence[Part]],
    blocks: Iterator[Iterator[torch.Tensor]],
    base: PreTrainedModel,
    dtype: torch.dtype,
) -> dict[str, Identity]:
    """safetensors shards and their index, under the names that the hub's files have."""
    identities: dict[str, Identity] = {}
    layouts = [[layout for part in shard for layout in part.layouts(dtype)] for shard in shards]
    for name, shard, places in zip(shard_names(len(shards)), shards, layouts, strict=True):
        file = ShardFile(directory / name, places)
        for part, rows in zip(shard, blocks, strict=False):
            if len(part.published) > 1 and not part.slabs:  # in another order in files: whole, and taken apart again
                whole = torch.cat(list(rows))
                rows = iter(revert_weight_conversion(base, {part.name: whole}).values())
            for block in rows:
                file.append(block)
        identities[name] = file.close()
    next(blocks, None)  # ends the progress bar
    if len(shards) > 1:
        write_json(directory / "model.safetensors.index.json", index_of(layouts))
    return identities


def _write_state_dict(
    directory: Path,
    shards: Sequence[Sequence[Part]],
    blocks: Iterator[Iterator[torch.Tensor]],
    ties: Mapping[str, str],
) -> None:
    """`model.pth` as `torch.save(model.state_dict())` writes it; the tensors wait on the disk, not in memory."""
    waiting = directory / "tensors"
    waiting.mkdir()
    state: dict[str, torch.Tensor] = {}
    parts = [part for shard in shards for part in shard]
    for number, (part, rows) in enumerate(zip(parts, blocks, strict=True)):
        for (first, last), block in zip(row_blocks(part.shape), rows, strict=True):
            if part.name not in state:
                size = math.prod(part.shape)
                on_disk = torch.from_file(str(waiting / str(number)), shared=True, size=size, dtype=block.dtype)
                state[part.name] = on_disk.view(part.shape) if size else torch.empty(part.shape, dtype=block.dtype)
            (state[part.name][first:last] if part.shape else state[part.name]).copy_(block)
    torch.save(state | {second: state[first] for second, first in ties.items()}, directory / "model.pth")
    shutil.rmtree(waiting)


def _check_reload(directory: Path, base: PreTrainedModel) -> None:
    """Read what was written without its numbers. Raises MergeError when a name or a shape is not the config's."""
    _, info = type(base).from_pretrained(str(directory), device_map="meta", output_loading_info=True)
    for fault, names in info.items():
        if names:
            raise MergeError(
                f"The merged model does not load as it was written ({fault}: {sorted(map(str, names))[0]}); nothing "
                "was kept, and this is a fault of the merge to be reported."
            )


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


def _is_odd_dora(layer: Any) -> bool:
    """DoRA of what is not a plain matrix: its magnitudes are those of the embeddings, or of the weight in 4 bits."""
    return type(layer) is not LoraLinear and bool(layer.use_dora.get(ADAPTER_NAME))


def _persistent_buffers(base: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    saved = base.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in base.named_buffers() if name in saved]
