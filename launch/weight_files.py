"""Which files hold a model's weights, and what their headers and indexes say of them; no weight is read.

A safetensors file (https://huggingface.co/docs/safetensors) is eight bytes with the length of a JSON header, the header
(dtype, shape and place of each tensor), then the tensors one after the other.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

INDEX_ENDING = ".index.json"
# In transformers' order: of several, the first is loaded.
WEIGHT_FILES = (
    *("model.safetensors", f"model.safetensors{INDEX_ENDING}"),
    *("pytorch_model.bin", f"pytorch_model.bin{INDEX_ENDING}"),
)
LONGEST_HEADER_BYTES = 100_000_000  # of the format
POINTER_BEGINS = b"version https://git-lfs"  # what git leaves in the place of a large file
_BITS = {
    name: bits
    for bits, names in (
        (64, "F64 I64 U64 C64"),
        (32, "F32 I32 U32"),
        (16, "F16 BF16 I16 U16"),
        (8, "I8 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0"),
        (4, "F4"),
    )
    for name in names.split()
}


@dataclass(frozen=True)
class Entry:
    """A tensor as the header of its file describes it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


def loaded_file(names: Collection[str]) -> str | None:
    """Of the files of a model, the one that is loaded, or the index of those that are; None when there is none."""
    return next((name for name in WEIGHT_FILES if name in names), None)


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor. Raises ValueError for what transformers cannot use, or should not.

    That is a file which does not stand beside the index, or which is of another kind: an index of safetensors files
    that names a pickle.
    """
    index = json.loads(path.read_text(encoding="utf-8"))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError("it has no weight_map from tensors to files")
    if not weight_map:
        raise ValueError("it names no file")
    ending = Path(path.name.removesuffix(INDEX_ENDING)).suffix
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise ValueError(f"it names {name!r}, which is not beside it")
        if Path(name).suffix != ending:
            raise ValueError(f"it names {name!r}, which is no {ending} file")
    if not isinstance(index.get("metadata"), dict):
        raise ValueError("it has no metadata, without which transformers does not read it")
    return weight_map


def read_header(file: BinaryIO) -> dict[str, Entry]:
    """The tensors of an open safetensors file. Raises ValueError when the file is not whole, or none."""
    size_bytes = file.seek(0, 2)
    file.seek(0)
    beginning = file.read(len(POINTER_BEGINS))
    if not beginning:
        raise ValueError("it is empty")
    if beginning == POINTER_BEGINS:
        raise ValueError("it is a git-LFS pointer and not the file")
    file.seek(0)
    header_bytes = int.from_bytes(file.read(8), "little")
    start = 8 + header_bytes
    if not 2 <= header_bytes <= LONGEST_HEADER_BYTES:
        raise ValueError("it has no header")
    if start > size_bytes:
        raise ValueError("it ends in its header")
    try:
        header = json.loads(file.read(header_bytes))
    except ValueError:
        raise ValueError("its header is no JSON") from None
    try:
        entries = {name: _entry(name, told, start) for name, told in header.items() if name != "__metadata__"}
    except (KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("its header is none of a safetensors file") from None
    end = max((entry.end for entry in entries.values()), default=start)
    if end != size_bytes:
        raise ValueError(f"it has {size_bytes:,} bytes, and its header speaks of {end:,}")
    return entries


def _entry(name: str, told: Mapping[str, Any], start: int) -> Entry:
    (begin, end), shape, dtype = told["data_offsets"], tuple(told["shape"]), told["dtype"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"{name} has a shape or a place that is none")
    bits = _BITS.get(dtype)
    if end < begin or (bits is not None and (end - begin) * 8 != math.prod(shape) * bits):
        raise ValueError(f"{name} has {end - begin:,} bytes, which are not those of its shape")
    return Entry(dtype, shape, start + begin, start + end)


def quantised_as(config: Mapping[str, Any]) -> str | None:
    """`gptq, 4 bits`: how the weights are quantised that belong to this config.json; None when they are not."""
    if bits := config.get("quantization_bit"):  # of ChatGLM
        return f"quantization_bit, {bits} bits"
    of_text = config.get("text_config")
    for told in (config, of_text if isinstance(of_text, Mapping) else {}):
        found = told.get("quantization_config") or told.get("compression_config")
        if found:
            return _quantised_as(found) if isinstance(found, Mapping) else str(found)
    return None


def _quantised_as(found: Mapping[str, Any]) -> str:
    bits = next((number for number in (4, 8) if found.get(f"load_in_{number}bit")), found.get("bits"))
    method = found.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in found else "by an unnamed method")
    return f"{method}, {bits} bits" if bits else str(method)
