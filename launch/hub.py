"""What a recipe names by a directory or a hub id, as a directory."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tqdm import tqdm

from launch.errors import LaunchError, first_line
from launch.modes import as_at_start

# Of the first that a repository has, its weights are fetched: others are the same in another format, such as Mistral's
# consolidated.safetensors, or pickles.
_WEIGHTS = (("model*.safetensors", "adapter_model.safetensors"), ("*.safetensors",), ("*.bin",))
_BESIDE_WEIGHTS = ("*.json", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jinja")


class _Silent(tqdm):  # type: ignore[misc]  # untyped
    """A progress bar for what takes no time."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **{**named, "disable": True})


def fetch(
    key: str, name: str, files: Sequence[str], revision: str | None, error_class: type[LaunchError]
) -> tuple[Path, str | None]:
    """(the directory, its commit on the hub or None for one of the user's own) with those of `files` that there are.

    `key` is the recipe's, for the sentence of an `error_class` when there is neither a directory nor a repository.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path, None
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise error_class(f"{key} = {name} does not exist; give a directory or a hub id (owner/name).")
    from huggingface_hub import snapshot_download  # here, since it takes a quarter of a second
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        with as_at_start():
            snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise error_class(
            f"{key} = {name} is no directory here and cannot be had from the hub: {first_line(error)}."
        ) from None
    return snapshot, snapshot.name  # a snapshot is named after its commit


def fetch_model(key: str, name: str, revision: str | None, error_class: type[LaunchError]) -> tuple[Path, str | None]:
    """`fetch` of all that a model or an adapter is made of; of weights in several formats, those that are loaded."""
    for weights in _WEIGHTS:
        found = fetch(key, name, (*_BESIDE_WEIGHTS, *weights), revision, error_class)
        if found[1] is None or any(path for pattern in weights for path in found[0].glob(pattern)):
            break
    return found


def header_shapes(name: str, revision: str | None) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of a hub id's tensors from the headers of its safetensors files, of which no more is fetched.

    None when it has no such files, or the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        files = HfApi().get_safetensors_metadata(name, revision=revision).files_metadata.values()
    except (OSError, HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError):
        return None
    return {path: tuple(tensor.shape) for file in files for path, tensor in file.tensors.items()}


def missing_bytes(name: str, revision: str | None) -> int | None:
    """What `fetch_model` would fetch of a hub id; None when the hub does not say."""
    from huggingface_hub import snapshot_download

    try:
        for weights in _WEIGHTS:
            patterns = [*_BESIDE_WEIGHTS, *weights]
            with as_at_start():
                files = snapshot_download(
                    name, revision=revision, allow_patterns=patterns, dry_run=True, tqdm_class=_Silent
                )
            if any(fnmatch(file.filename, pattern) for file in files for pattern in weights):
                break
    except OSError:  # DryRunError is one: there is no network, and what is in the cache is all there is
        return None
    return sum(file.file_size or 0 for file in files if file.will_download)


def list_files(name: str, commit: str) -> dict[str, int] | None:
    """The size in bytes of each file of a repository; None when the hub does not say."""
    import httpx2
    from huggingface_hub import HfApi, RepoFile

    try:
        entries = list(HfApi().list_repo_tree(name, revision=commit))
    except (OSError, httpx2.HTTPError):  # there is no network, or none is to be used
        return None
    return {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE keeps this process from asking the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cache_directory() -> Path:
    """Where the hub's files are kept on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
