"""What a recipe names by a directory or a hub id, as a directory."""

from collections.abc import Sequence
from pathlib import Path

from launch.errors import LaunchError, first_line
from launch.modes import as_at_start

_BESIDE_WEIGHTS = ("*.json", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jinja")


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
    """`fetch` of all that a model or an adapter is made of; of weights in two formats, the safetensors alone."""
    found = fetch(key, name, (*_BESIDE_WEIGHTS, "*.safetensors"), revision, error_class)
    if any(found[0].glob("*.safetensors")):
        return found
    return fetch(key, name, (*_BESIDE_WEIGHTS, "*.bin"), revision, error_class)
