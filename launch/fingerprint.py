"""What tells whether something on disk is still the same: digests, and what is cheaper for files that are large."""

import ast
import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from launch.errors import ModelError
from launch.hub import fetch
from launch.recipe import TINY_MODEL_NAME, ModelBlock

TINY_ROWS = Path("configs/data/tiny_chat.jsonl")
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "safetensors", "tokenizers")
_NUM_BLOCKS, _BLOCK_BYTES = 64, 65536  # of a weight file, in the quick fingerprint
_READ_BYTES = 1 << 24
# Everything a tokenizer is made of, remote code included.
TOKENIZER_FILES = (
    "token*",
    "vocab*",
    "merges*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "config.json",
    "*.py",
    "*.tiktoken",
)


def fingerprint_tiny() -> str:
    """Of what the tiny base is made of."""
    made_of = Path(__file__).with_name("tiny.py").read_bytes() + TINY_ROWS.read_bytes()
    return hashlib.sha256(made_of).hexdigest()[:8]


def fingerprint_tokenizer(model: ModelBlock) -> str:
    """Of the tokenizer's files, which a hub id has in the cache."""
    name = model.tokenizer_name_or_path
    if name == TINY_MODEL_NAME:
        return f"{TINY_MODEL_NAME} {fingerprint_tiny()}"
    directory, _ = fetch("The tokenizer", name, TOKENIZER_FILES, model.revision, ModelError)
    digest = hashlib.sha256()
    for path in sorted({path for pattern in TOKENIZER_FILES for path in directory.glob(pattern) if path.is_file()}):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def fingerprints(base: str, model: ModelBlock, *, show_progress: bool = False) -> dict[str, Any]:
    """All of a base, by the names that same_run.identity_of_run gives them. Raises ModelError."""
    return {
        "base": fingerprint_base(base, model),
        "weights": hash_weights(base, model, show_progress=show_progress),
        "code": fingerprint_code(model.factory),
        "tokenizer": fingerprint_tokenizer(model),
    }


def fingerprint_base(base: str, model: ModelBlock) -> str:
    """Tells two bases under one name apart: the hub's commit, or a digest of config, code and parts of the weights."""
    directory = Path(base)
    if model.factory is not None:
        code = [Path(model.factory.rpartition(":")[0]).expanduser()]
    elif directory.is_dir():
        code = [directory / "config.json", *(sorted(directory.rglob("*.py")) if model.trust_remote_code else ())]
    else:
        return f"commit {fetch('model.name_or_path', base, ['config.json'], model.revision, ModelError)[1]}"
    digest = hashlib.sha256()
    for path in code:
        digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    for path in _weight_files(directory):
        size_bytes = path.stat().st_size
        digest.update(f"{path.name} {size_bytes}".encode())
        with path.open("rb") as file:
            for block in range(_NUM_BLOCKS):  # the header is in the first one
                file.seek(block * size_bytes // _NUM_BLOCKS)
                digest.update(file.read(_BLOCK_BYTES))
    return f"sha256 {digest.hexdigest()}"


def hash_weights(base: str, model: ModelBlock, *, show_progress: bool = False) -> dict[str, str] | None:
    """SHA-256 of every byte of each weight file, by its name; None when the recipe does not ask for that.

    Raises ModelError for a base on the hub, whose commit says as much.
    """
    if not model.hash_weights:
        return None
    if not Path(base).exists():
        raise ModelError(
            f"model.hash_weights is true, but model.name_or_path = {base} is on the hub, where its commit names every "
            "byte; leave it out, or give a directory."
        )
    paths = _weight_files(Path(base))
    digests = {}
    num_bytes = sum(path.stat().st_size for path in paths)
    with tqdm(
        total=num_bytes, desc="hashing weights", unit="B", unit_scale=True, leave=False, disable=not show_progress
    ) as bar:
        for path in paths:
            digest = hashlib.sha256()
            with path.open("rb", buffering=0) as file:
                while block := file.read(_READ_BYTES):
                    digest.update(block)
                    bar.update(len(block))
            digests[path.name] = digest.hexdigest()
    return digests


def _weight_files(base: Path) -> list[Path]:
    return sorted([*base.glob("*.safetensors"), *base.glob("*.bin")]) if base.is_dir() else [base]


def fingerprint_code(factory: str | None) -> dict[str, str]:
    """SHA-256 of a factory's file and of those beside and below it that it imports, by their paths from there."""
    if factory is None:
        return {}
    first = Path(factory.rpartition(":")[0]).expanduser().resolve()
    digests: dict[str, str] = {}
    waiting = [first]
    while waiting:
        path = waiting.pop()
        name = str(path.relative_to(first.parent)) if path.is_relative_to(first.parent) else ""
        if not name or name in digests:
            continue
        source = path.read_bytes()
        digests[name] = hashlib.sha256(source).hexdigest()
        for node in _nodes(source):
            if isinstance(node, ast.Import):
                waiting += [file for alias in node.names for file in _files_of_module(first.parent, alias.name)]
            elif isinstance(node, ast.ImportFrom):
                folder = path.parents[node.level - 1] if node.level else first.parent
                names = [".".join(filter(None, (node.module, alias.name))) for alias in node.names]
                waiting += [file for name in names for file in _files_of_module(folder, name)]
    return dict(sorted(digests.items()))


def _nodes(source: bytes) -> Iterator[ast.AST]:
    """None of what is no Python: a factory that runs does not need it."""
    try:
        yield from ast.walk(ast.parse(source))
    except SyntaxError:
        return


def _files_of_module(folder: Path, name: str) -> list[Path]:
    """What stands in `folder` of the module and of the packages around it; the last part may be a name in it."""
    parts = name.split(".")
    stems = [folder.joinpath(*parts[:end]) for end in range(1, len(parts) + 1)]
    files = [file for stem in stems for file in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py")]
    return [file for file in files if file.is_file()]


def fingerprint_file(path: Path) -> list[str | int]:
    """Of a file that may be too large to read: where it stands, its size and its times, which a rewriting changes."""
    status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def digest_of(value: object) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):  # bitsandbytes need not be installed
            found[library] = version(library)
    return found
