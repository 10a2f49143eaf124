"""What can be refused without torch and before a weight is read."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from launch.errors import ConfigError, ModelError
from launch.hub import fetch
from launch.lock import seconds_since
from launch.recipe import TINY_MODEL_NAME, ModelBlock, Recipe
from launch.remote_code import check_remote_code
from launch.trackers import PACKAGES

STALE_BUILD_SECONDS = 600.0


def check(recipe: Recipe) -> None:
    """Raises a LaunchError for the first thing that would stop the run later."""
    check_model(recipe.model)
    for tracker in recipe.run.report_to:
        if tracker not in PACKAGES:
            raise ConfigError(f"run.report_to: {tracker!r} is not a tracker; the valid ones are {', '.join(PACKAGES)}.")
        if importlib.util.find_spec(PACKAGES[tracker]) is None:
            raise ConfigError(f"run.report_to: {tracker} is not installed; run pip install {PACKAGES[tracker]}.")


def check_model(model: ModelBlock) -> None:
    """The base model exists: a directory with a config.json, or a hub id whose config.json can be had.

    What it needs of code of its own may run, or is refused.
    """
    name = model.name_or_path
    if name == TINY_MODEL_NAME:
        return
    if model.factory is not None:
        for key, file in (("name_or_path", name), ("factory", model.factory.rpartition(":")[0])):
            if not Path(file).expanduser().is_file():
                raise ModelError(f"model.{key} = {getattr(model, key)}: there is no file {file}.")
        assert model.tokenizer is not None
        files = ["tokenizer_config.json"]
        check_remote_code(model, *fetch("model.tokenizer", model.tokenizer, files, model.revision, ModelError))
        return
    if Path(name).expanduser().is_file():
        raise ModelError(f"model.name_or_path = {name} is a file, which only a model.factory can be filled from.")
    files = ["config.json", "tokenizer_config.json"]
    directory, commit = fetch("model.name_or_path", name, files, model.revision, ModelError)
    if not (directory / "config.json").is_file():
        raise ModelError(f"model.name_or_path = {name} has no config.json, so that it is no model of transformers.")
    check_remote_code(model, directory, commit)


def remove_stale_build_locks(say: Callable[[str], None]) -> None:
    """Remove what a process left that was killed while torch compiled an extension; others would wait for it for ever.

    Torch keeps such a file open as long as it compiles. One that is young, or another user's, is left: its process may
    be on another machine with the same home, or hidden.
    """
    for path in _build_locks():
        try:
            status = path.stat()
            if status.st_uid != os.geteuid() or seconds_since(status.st_mtime_ns, path.parent) < STALE_BUILD_SECONDS:
                continue
            if (status.st_dev, status.st_ino) in _open_files():
                continue
            path.unlink()
        except OSError:  # somebody else has just removed it, or the place cannot be written
            continue
        say(f"{path} was left by a process that was killed while it compiled; it is removed.")


def _build_locks() -> list[Path]:
    """Of torch.utils.cpp_extension (_get_build_directory), which this process does not import."""
    own = os.environ.get("TORCH_EXTENSIONS_DIR")
    if own is not None:
        return sorted(Path(own).glob("*/lock"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return sorted(cache.glob(f"torch_extensions/{python}*/*/lock"))


def _open_files() -> Iterator[tuple[int, int]]:
    """(device, inode) of what the processes of this machine have open, as far as this one may see."""
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):  # it ended, or is another user's
            for path in folder.iterdir():
                with suppress(OSError):  # it was closed
                    status = path.stat()
                    yield status.st_dev, status.st_ino
