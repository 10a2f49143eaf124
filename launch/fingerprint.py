"""What tells whether something on disk is still the same, from small files and times, without loading it."""

import hashlib
import json
from pathlib import Path

from launch.errors import ModelError
from launch.hub import fetch
from launch.recipe import TINY_MODEL_NAME, ModelBlock

TINY_ROWS = Path("configs/data/tiny_chat.jsonl")
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


def fingerprint_file(path: Path) -> list[str | int]:
    """Of a file that may be too large to read: where it stands, its size and its times, which a rewriting changes."""
    status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def digest_of(value: object) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
