"""safetensors files, read by rows and written tensor by tensor: no model is ever in memory whole."""

import hashlib
import io
import json
import math
import os
import pickle
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from launch.errors import MergeError, ModelError, first_line
from launch.findings import Finding
from launch.weight_files import INDEX_ENDING, WEIGHT_FILES, Entry, loaded_file, read_header, read_index

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
BLOCK_BYTES = 2 << 20  # of fp32: what is worked on at a time
_BLOCKS_AHEAD = 2  # that wait to be written
_SYNC_BYTES = 64 << 20  # that are written before the disk is asked for them


@dataclass(frozen=True)
class Layout:
    """A tensor of a file that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


# ---- reading ----


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; `rows` reads some of it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[int, int], torch.Tensor]  # [first, last) of its rows

    def whole(self) -> torch.Tensor:
        """All of it."""
        return self.read(0, self.shape[0] if self.shape else 1).reshape(self.shape)


def read_safetensors(path: Path) -> dict[str, Stored]:
    """What is in a file, by name; nothing but the header is read. Raises MergeError when the file is not whole."""
    try:
        file = _HeldFile(path)
        return {name: _stored(file, path, name, entry) for name, entry in read_header(file).items()}
    except (OSError, ValueError) as error:
        raise MergeError(f"{path} is no whole safetensors file: {first_line(error)}.") from None


class _HeldFile(io.FileIO):
    """Open for reading until the last tensor that is read from it is forgotten."""

    def __del__(self) -> None:
        self.close()


def _stored(file: _HeldFile, path: Path, name: str, entry: Entry) -> Stored:
    if entry.dtype not in _DTYPES:
        raise MergeError(
            f"{path}: {name} is in {entry.dtype}, and an adapter can only be merged into {', '.join(_DTYPES)}; give "
            "the weights that these were made of with --base."
        )
    dtype, shape = _DTYPES[entry.dtype], entry.shape
    row_bytes = math.prod(shape[1:]) * dtype.itemsize

    def read(first: int, last: int) -> torch.Tensor:
        block = torch.empty(last - first, *shape[1:], dtype=dtype)
        left, at = block.view(-1).view(torch.uint8).numpy().data, entry.begin + first * row_bytes
        while left:
            num_bytes = os.preadv(file.fileno(), [left], at)
            if not num_bytes:
                raise MergeError(f"{path} became shorter while {name} was read.")
            left, at = left[num_bytes:], at + num_bytes
        return block

    return Stored(name, dtype, shape, read)


def read_pickle(path: Path) -> dict[str, Stored]:
    """The same of a `pytorch_model*.bin`, mapped and read weights-only: nothing in it is executed."""
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever a file that is none makes torch raise
        raise MergeError(f"{path} cannot be read weights-only: {first_line(error)}.") from None

    def stored(name: str, tensor: torch.Tensor) -> Stored:
        return Stored(
            name,
            tensor.dtype,
            tuple(tensor.shape),
            lambda first, last: (tensor if tensor.dim() else tensor[None])[first:last].clone(),
        )

    return {name: stored(name, tensor) for name, tensor in state.items()}


def find_code_in_pickles(directory: Path) -> Iterator[Finding]:
    """What weights-only loading would refuse after minutes, in the pickles that a model is loaded from.

    Only the list of what each holds is read, and nothing in it runs. Of the older format, which has no such list, that
    is left to the loading.
    """
    first = loaded_file([path.name for path in directory.iterdir() if path.is_file()])
    if first is None or ".safetensors" in first:
        return
    try:
        files = sorted(set(read_index(directory / first).values())) if first.endswith(INDEX_ENDING) else [first]
        for name in files:
            if not zipfile.is_zipfile(directory / name):
                continue
            if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(directory / name):
                yield Finding(
                    f"{directory / name} holds more than tensors ({unsafe[0]}), and code is not unpickled; take a base "
                    "in safetensors, or write this one with torch.save(model.state_dict(), PATH).",
                    error=ModelError,
                )
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError):
        return  # a file that is not whole: model_files says so


def read_model(directory: Path) -> dict[str, Stored]:
    """Every tensor of a model's directory, in transformers' order: one file, the shards of an index; safetensors first.

    Raises MergeError when there is none, when one is missing, or when an index names a file of another directory.
    """
    first = loaded_file([path.name for path in directory.iterdir() if path.is_file()])
    if first is None:
        raise MergeError(f"{directory} has none of {', '.join(WEIGHT_FILES)}, so that there is nothing to merge into.")
    read = read_safetensors if ".safetensors" in first else read_pickle
    if not first.endswith(INDEX_ENDING):
        return read(directory / first)
    try:
        weight_map = read_index(directory / first)
    except (OSError, ValueError) as error:
        raise MergeError(f"{directory / first} is no index: {first_line(error)}.") from None
    found: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        found |= read(directory / name)
    missing = sorted(weight_map.keys() - found.keys())
    if missing:
        raise MergeError(f"{directory}: {missing[0]} is in {first}, and in no shard.")
    return found


# ---- writing ----


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[first, last) of the rows of a tensor, of at most BLOCK_BYTES in fp32 each; one block for what has no rows.

    All are as long, give or take a row: few rows are multiplied by another kernel, which on some CPUs rounds otherwise
    than that of the whole matrix does.
    """
    num_rows = shape[0] if shape else 1
    most = max(BLOCK_BYTES // max(math.prod(shape[1:]) * 4, 1), 1)
    count = math.ceil(num_rows / most)
    yield from ((number * num_rows // count, (number + 1) * num_rows // count) for number in range(count))


def shard_names(count: int) -> list[str]:
    """As transformers calls them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_of(shards: Sequence[Sequence[Layout]]) -> dict[str, Any]:
    """What model.safetensors.index.json says of the shards."""
    names = shard_names(len(shards))
    weight_map = {layout.name: name for name, shard in zip(names, shards, strict=True) for layout in shard}
    total_bytes = sum(layout.size_bytes for shard in shards for layout in shard)
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}


class ShardFile:
    """A safetensors file that is written from its first byte to its last, hashed and synced, each in its own thread.

    The threads have one worker each; what one of them raises is raised by the next call, what the disk says by the
    result of `close`.
    """

    def __init__(
        self, path: Path, layouts: Sequence[Layout], *, writer: Executor, hasher: Executor, syncer: Executor
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end_bytes = 0
        for layout in layouts:
            place = [end_bytes, end_bytes := end_bytes + layout.size_bytes]
            header[layout.name] = {
                "dtype": DTYPE_NAMES[layout.dtype],
                "shape": list(layout.shape),
                "data_offsets": place,
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._writer, self._hasher, self._syncer = writer, hasher, syncer
        self._pending: deque[tuple[Future[None], Future[None]]] = deque()
        self._syncs: list[Future[None]] = []
        self._unsynced_bytes = 0
        self._add(memoryview(len(text).to_bytes(8, "little") + text))

    def append(self, block: torch.Tensor) -> None:
        """The next numbers of the tensor that is being written; they stay as they are until they are on their way."""
        if block.numel():
            self._add(block.contiguous().view(-1).view(torch.uint8).numpy().data)

    def close(self) -> Future[dict[str, Any]]:
        """Its size and SHA-256, once it is on disk; the next file may be begun meanwhile."""
        self._settle(0)
        return self._syncer.submit(self._end)

    def _add(self, block: memoryview) -> None:
        self._settle(_BLOCKS_AHEAD)
        self._pending.append((self._writer.submit(self._write, block), self._hasher.submit(self._digest.update, block)))

    def _settle(self, num_left: int) -> None:
        while len(self._pending) > num_left:
            for future in self._pending.popleft():
                future.result()

    def _write(self, block: memoryview) -> None:
        self._unsynced_bytes += len(block)
        while block:
            block = block[self._file.write(block) :]
        if self._unsynced_bytes >= _SYNC_BYTES:  # the disk works beside the arithmetic, and not behind it
            self._unsynced_bytes = 0
            self._syncs.append(self._syncer.submit(os.fdatasync, self._file.fileno()))

    def _end(self) -> dict[str, Any]:
        with self._file:
            for sync in self._syncs:  # an error is told once, and not again by the last one
                sync.result()
            os.fsync(self._file.fileno())
            return {"bytes": self._file.tell(), "sha256": self._digest.hexdigest()}
