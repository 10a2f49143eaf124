"""The files of a base, looked at before a weight is read: they are all there, whole, safe, and in a form to train on.

Of safetensors files the headers are read, of a base on the hub that is not here yet what the hub lists. Which tensors
the model itself wants is not compared: transformers renames, splits and joins them while it loads (and `load_base` then
refuses what is missing), so that their names in the files say too little.
"""

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from launch.errors import ModelError
from launch.findings import Finding
from launch.hub import fetch, is_offline, list_files
from launch.recipe import TINY_MODEL_NAME, ModelBlock
from launch.shapes import quantised_sentence, read_config
from launch.weight_files import (
    INDEX_ENDING,
    POINTER_BEGINS,
    WEIGHT_FILES,
    Entry,
    loaded_file,
    quantised_as,
    read_header,
    read_index,
)

# What other programs write, and transformers does not load from here.
_OTHER_WEIGHTS = ("*.gguf", "*.safetensors", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.onnx")
# What a download leaves beside, or below, a file that it has not finished: the hub's, ModelScope's, aria2's.
_UNFINISHED = ("*.incomplete", ".cache/huggingface/download/*.incomplete", "._____temp/*", "*.aria2", "*.part")
_NUMBERS = ("F64", "F32", "F16", "BF16")  # of weights; others are packed and need to be unpacked with their scales
_OF_RANKS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # of torch's distributed checkpoints
_POSITIONS = ("max_position_embeddings", "n_positions", "seq_length", "model_max_length", "max_seq_len")
_POINTER_BYTES = 1000  # at most


def find_model_files(name: str, directory: Path, commit: str | None) -> Iterator[Finding]:
    """Of the base `name`, which is in `directory`; `commit` is the hub's, None for a directory of the user's own.

    A base on the hub may be there in part: then what the hub lists is looked at, or that it cannot be had is said.
    """
    yield from _find_in_config(name, directory)
    if commit is None or _is_fetched(directory):
        yield from _find_in_directory(directory, is_on_hub=commit is not None)
    else:
        yield from _find_on_hub(name, commit)


def _find_in_config(name: str, directory: Path) -> Iterator[Finding]:
    config = read_config(directory / "config.json")
    if quantised := quantised_as(config):
        yield Finding(quantised_sentence(name, quantised), error=ModelError)
    if config.get("transformers_weights"):
        yield _stops(
            f"config.json of {name} names the file of its weights itself (transformers_weights = "
            f"{config['transformers_weights']!r}), which a merge would not find; take that key out, and call the file "
            f"{WEIGHT_FILES[0]}."
        )
    if (directory / "adapter_config.json").is_file():
        yield _stops(
            f"{name} has an adapter_config.json beside its config.json, and transformers would put that adapter on the "
            "base before yours; merge it first, or move adapter_config.json away to train without it."
        )


def _is_fetched(directory: Path) -> bool:
    """Whether a snapshot of the hub has every file of the weights: they come one by one."""
    first = loaded_file(_names(directory))
    if first is None:
        return False
    try:
        return all((directory / name).exists() for name in _weight_files(directory, first))
    except (OSError, ValueError):
        return True  # the index is here, and what is wrong with it is said


# ---- here ----


def _find_in_directory(directory: Path, *, is_on_hub: bool) -> Iterator[Finding]:
    # What the cache has under its name is not fetched again.
    again = f"remove {directory.parent.parent} and run python -m launch prepare" if is_on_hub else "fetch it again"
    names = _names(directory)
    pointers = [name for name in names if _is_pointer(directory / name)]
    if pointers:
        yield _stops(
            f"{directory}: {_and_others(pointers)} is a git-LFS pointer and not the file; run git lfs pull there."
        )
    first = loaded_file(names)
    if first is None:
        yield _without_weights(str(directory), names)
        return
    if any(_OF_RANKS.fullmatch(name) for name in names):
        yield _stops(
            f"{directory} has the shards of ranks (shard-*.safetensors), which transformers loads before {first}, and "
            "a merge does not; consolidate them with transformers, or move them away."
        )
    if first in pointers:
        return
    try:
        files = _weight_files(directory, first)
    except (OSError, ValueError) as error:
        yield _stops(f"{directory / first} is no index that can be used: {error}; {again}.")
        return
    headers, faults = _read(directory, [name for name in files if name not in pointers])
    for reason, faulty in faults.items():
        yield _stops(f"{directory}: {_and_others(faulty)} {reason}; {again}.")
    if not first.startswith("model"):
        yield _of_pickles(str(directory), first)
        return
    if first.endswith(INDEX_ENDING):
        yield from _find_misplaced(directory, first, headers, again)
    if not quantised_as(read_config(directory / "config.json")):
        yield from _find_packed(directory, headers)


def _weight_files(directory: Path, first: str) -> list[str]:
    """Those that are loaded, given the first that is. Raises ValueError for an index that is none."""
    return sorted(set(read_index(directory / first).values())) if first.endswith(INDEX_ENDING) else [first]


def _read(directory: Path, files: Sequence[str]) -> tuple[dict[str, dict[str, Entry]], dict[str, list[str]]]:
    """(the headers of the safetensors files that are whole, the files that are not by what is wrong with them).

    A link is followed wherever it leads: the hub's cache consists of links, and what is read is taken for nothing but
    tensors.
    """
    unfinished = {path.name for pattern in _UNFINISHED for path in directory.glob(pattern)}
    broken_off = next((name for name in sorted(unfinished) if not name.endswith(".aria2")), None)
    headers: dict[str, dict[str, Entry]] = {}
    faults: dict[str, list[str]] = {}
    for name in files:
        path, reason = directory / name, None
        if not path.exists():
            reason = "is a link to a file that is missing" if path.is_symlink() else "is missing"
            reason += f", and {broken_off} says that a download was broken off" if broken_off else ""
        elif f"{name}.aria2" in unfinished:  # which gives a file its full length at once
            reason = f"has not been fetched to its end, as {name}.aria2 beside it says"
        else:
            try:
                with path.open("rb") as file:
                    if path.suffix == ".safetensors":
                        headers[name] = read_header(file)
                    else:
                        _check_pickle(file)
            except (OSError, ValueError) as error:
                reason = f"cannot be used: {error}"
        if reason:
            faults.setdefault(reason, []).append(name)
    return headers, faults


def _check_pickle(file: BinaryIO) -> None:
    """Raises ValueError when it is not whole; of the older format, a plain pickle, nothing tells before it is read."""
    beginning = file.read(2)
    if not beginning:
        raise ValueError("it is empty")
    if beginning == b"PK" and not zipfile.is_zipfile(file):
        raise ValueError("it is cut off, for the list of what it holds would be at its end")


def _find_misplaced(
    directory: Path, index_name: str, headers: Mapping[str, Mapping[str, Entry]], again: str
) -> Iterator[Finding]:
    """Tensors that are not in the file where the index has them."""
    absent: dict[str, list[str]] = {}
    for tensor, name in read_index(directory / index_name).items():
        if name in headers and tensor not in headers[name]:
            absent.setdefault(name, []).append(tensor)
    for name, tensors in sorted(absent.items()):
        yield _stops(
            f"{directory / name} has no {_and_others(sorted(tensors))}, which {index_name} puts there, so that they "
            f"are not of one model; {again}."
        )


def _find_packed(directory: Path, headers: Mapping[str, Mapping[str, Entry]]) -> Iterator[Finding]:
    """Numbers that are no weights without their scales, where config.json does not say how they are quantised."""
    for name, header in headers.items():
        for tensor, entry in header.items():
            if entry.dtype.startswith("F") and entry.dtype not in _NUMBERS:
                how = f"{tensor} of {name} is in {entry.dtype}"
                yield _stops(quantised_sentence(str(directory), how))
                return


def _is_pointer(path: Path) -> bool:
    """What git leaves in the place of a large file, be it of weights or the tokenizer's."""
    try:
        if not path.is_file() or path.stat().st_size > _POINTER_BYTES:
            return False
        with path.open("rb") as file:
            return file.read(len(POINTER_BEGINS)) == POINTER_BEGINS
    except OSError:
        return False


# ---- on the hub ----


def _find_on_hub(name: str, commit: str) -> Iterator[Finding]:
    sizes = list_files(name, commit)
    if sizes is None:
        how = "HF_HUB_OFFLINE forbids to ask the hub" if is_offline() else "the hub does not answer"
        yield Finding(
            f"The weights of {name} at {commit} are not all in the cache, and {how}; fetch them with python -m launch "
            "prepare where there is a network.",
            stops=is_offline(),
            error=ModelError,
        )
        return
    first = loaded_file(sizes)
    if first is None:
        yield _without_weights(f"{name} at {commit}", sorted(sizes))
        return
    directory = fetch("model.name_or_path", name, [first], commit, ModelError)[0] if INDEX_ENDING in first else Path()
    try:
        files = _weight_files(directory, first)
    except (OSError, ValueError) as error:
        yield _stops(f"{first} of {name} at {commit} is no index that can be used: {error}; choose another base.")
        return
    for reason, faulty in (
        ("is not there", [file for file in files if file not in sizes]),
        ("is empty", [file for file in files if sizes.get(file) == 0]),
    ):
        if faulty:
            yield _stops(f"{name} at {commit}: {_and_others(faulty)} {reason}; choose another base, or revision.")
    if not first.startswith("model"):
        yield _of_pickles(f"{name} at {commit}", first)


# ---- what it can be given ----


def base_directory(model: ModelBlock) -> Path:
    """Where its config.json is, and what else of it has been fetched."""
    return fetch("model.name_or_path", model.name_or_path, ["config.json"], model.revision, ModelError)[0]


def base_config(model: ModelBlock) -> dict[str, Any]:
    """config.json of the base; nothing of one that has none: the tiny one, which need not be built, and a factory's."""
    if model.name_or_path == TINY_MODEL_NAME or model.factory is not None:
        return {}
    return read_config(base_directory(model) / "config.json")


def find_positions(name: str, config: Mapping[str, Any], max_length: int, num_virtual_tokens: int) -> Iterator[Finding]:
    """Whether samples may be longer than what the base `name` was made for.

    Only a note: no row may be as long as that, and rotary positions go on behind the last that was trained.
    """
    parts = [part for part in (config.get("text_config"), config) if isinstance(part, Mapping)]
    found = next(((key, part[key]) for part in parts for key in _POSITIONS if isinstance(part.get(key), int)), None)
    if found is None:
        return
    key, positions = found
    scaled = config.get("rope_parameters") or config.get("rope_scaling")
    scaling = scaled if isinstance(scaled, Mapping) else {}
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if isinstance(factor, int | float) and isinstance(original, int | float):
        positions = max(positions, int(factor * original))
    if max_length + num_virtual_tokens > positions:
        virtual = f" and {num_virtual_tokens:,} virtual tokens" if num_virtual_tokens else ""
        yield Finding(
            f"data.max_length = {max_length:,}{virtual} is more than the {positions:,} positions of {name} ({key}): it "
            "has learned nothing about those behind them, or has none; lower data.max_length, or be sure that no row "
            "is as long.",
            stops=False,
        )


# ---- sentences ----


def _without_weights(where: str, names: Sequence[str]) -> Finding:
    others = [name for name in names if any(Path(name).match(pattern) for pattern in _OTHER_WEIGHTS)]
    held = f" It has {_and_others(others)}, which transformers does not load." if others else ""
    return _stops(f"{where} has no weights that transformers loads: {', '.join(WEIGHT_FILES)} are not there.{held}")


def _of_pickles(where: str, first: str) -> Finding:
    """Verified of transformers and of the merge: both give torch.load weights_only=True."""
    return Finding(
        f"{where} has its weights in pickles only ({first}); they are read weights-only, so that no code in them runs, "
        "but a base in safetensors is the safer choice.",
        stops=False,
    )


def _stops(sentence: str) -> Finding:
    return Finding(sentence, error=ModelError)


def _and_others(names: Sequence[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
