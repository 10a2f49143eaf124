"""Adapter + base -> a directory that serving tools load, one block of rows at a time, and the proof that it is right.

The live engine and the disk (merge_from_disk.py) differ only in where the numbers come from.
"""

import copy
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from launch import engine as engines
from launch.checkpoint import Identity, identity_of_file, publish
from launch.errors import MergeError, first_line
from launch.merge_output import check_replaceable
from launch.merge_plan import plan_merge
from launch.merge_rule import DTYPES, Opener, Part, Pieces, Proof, merged_blocks
from launch.quantisation import is_quantised
from launch.runs import free_bytes, write_json
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
) -> None:
    """Merge the live model into `target`, which appears whole or not at all. A collective; rank zero writes.

    A model of transformers becomes what `from_pretrained` reads, any other `model.pth`, a state dict like its own. Rank
    zero alone asks for the `facts` of merge_report.json, and makes the last `check` of what it wrote: the other ranks
    have returned by then. A quantised base is not what is merged into: that is on disk.
    Raises MergeError when a merged tensor is not finite in the output type.
    """
    base = model.get_base_model()
    assert not is_quantised(base), "merge_from_disk is for these"
    parts, ties = plan_merge(model)
    if torch.distributed.get_rank() != 0:
        shards = plan_shards(parts, DTYPES[dtype_name], max_shard_size_bytes)
        for part in [part for shard in shards for part in shard]:  # takes part in the gathering
            with _live(part):
                pass
        return
    engines.end_zero_init()  # what is written is loaded again, by this rank alone
    write_merged(
        target,
        parts,
        ties,
        _live,
        base=base,
        tokenizer=tokenizer,
        generation_config=generation_config,
        dtype_name=dtype_name,
        max_shard_size_bytes=max_shard_size_bytes,
        facts=facts(),
        check=check,
    )


@contextmanager
def _live(part: Part) -> Iterator[Pieces]:
    """A part's pieces while inside, whole on rank zero; a collective.

    In which nobody waits: rank zero comes to it from writing the part before, which takes as long as the disk does.
    """
    engines.after_rank_zero(f"merge {part.name}")
    masters = [engines.whole_master(parameter).cpu() for parameter in part.masters]
    if part.base is None:
        yield Pieces(lambda first, last: _rows(masters[0], first, last))
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
    check_replaceable(target)
    missing = [path for path in target.parents if not path.exists()]
    _check_room(target.parents[len(missing)], total_bytes)

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
    except BaseException as error:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        if not isinstance(error, OSError) and type(error) is not Exception:  # as such it is tokenizers' OSError
            raise
        raise MergeError(
            f"{target} could not be written: {getattr(error, 'strerror', None) or error}; nothing was kept, and the "
            "same command begins it again."
        ) from error


def _check_room(directory: Path, total_bytes: int) -> None:
    room_bytes = free_bytes(directory)
    if total_bytes > room_bytes:
        raise MergeError(
            f"{directory} has room for {format_bytes(room_bytes)}, and the merged model has "
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
    _keep_freed_memory()
    closing: dict[str, Future[Identity]] = {}
    layouts = [[layout for part in shard for layout in part.layouts(dtype)] for shard in shards]
    with (
        _one_thread(),
        ThreadPoolExecutor(1, "sync") as syncer,
        ThreadPoolExecutor(1, "write") as writer,
        ThreadPoolExecutor(1, "sha256") as hasher,
    ):
        for name, shard, places in zip(shard_names(len(shards)), shards, layouts, strict=True):
            file = ShardFile(directory / name, places, writer=writer, hasher=hasher, syncer=syncer)
            for part, rows in zip(shard, blocks, strict=False):
                if len(part.published) > 1 and not part.slabs:  # in another order in files: whole, and taken apart
                    whole = torch.cat(list(rows))
                    rows = iter(revert_weight_conversion(base, {part.name: whole}).values())
                for block in rows:
                    file.append(block)
            closing[name] = file.close()
        next(blocks, None)  # ends the progress bar
        identities = {name: identity.result() for name, identity in closing.items()}
    if len(shards) > 1:
        write_json(directory / "model.safetensors.index.json", index_of(layouts))
    return identities


@contextmanager
def _one_thread() -> Iterator[None]:
    """Of torch's: a block is too small to be shared out, and the threads that hash and write want the other cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """Let the blocks share their memory: what malloc gave back and took again cost a quarter of a merge's CPU time.

    glibc keeps as much as twice the largest block that it has seen freed, up to 32 MB (mallopt(3), M_MMAP_THRESHOLD).
    """
    torch.empty(31 << 20, dtype=torch.uint8)


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
    """Read what was written without its numbers. Raises MergeError when a name or a shape is not the config's.

    Remote code that wants values cannot be made without them, which is said aloud.
    """
    try:
        _, info = type(base).from_pretrained(str(directory), device_map="meta", output_loading_info=True)
    except Exception as error:
        if base._auto_class is None:
            raise
        note = f"{type(base).__name__} cannot be made without weights, so the merged model was not read again"
        print(f"{note}: {type(error).__name__}: {first_line(error)}.", file=sys.stderr, flush=True)
        return
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
