"""What can be refused without torch and before a weight is read."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch import runs
from launch.errors import ConfigError, ModelError
from launch.findings import Check, Finding, after, collect, settle
from launch.hub import fetch
from launch.lock import seconds_since
from launch.model_files import find_model_files, find_positions
from launch.recipe import TINY_MODEL_NAME, ModelBlock, Recipe
from launch.remote_code import check_remote_code
from launch.shapes import read_config
from launch.trackers import PACKAGES

STALE_BUILD_SECONDS = 600.0


def check(recipe: Recipe) -> None:
    """Raises a LaunchError for what would stop the run later, as far as the recipe itself says."""
    settle(collect(checks(recipe)), print)


def checks(recipe: Recipe, of_model: Sequence[Check] = (), of_weights: Sequence[Check] = ()) -> list[Check]:
    """Of the recipe itself, without torch; `of_model` need the model to be there, `of_weights` whole files of it."""
    found: list[tuple[Path, str | None]] = []
    name, max_length = recipe.model.name_or_path, recipe.data.max_length

    def model() -> list[Finding]:
        found.extend(filter(None, [check_model(as_prepared(recipe).model)]))
        return []

    def files() -> Iterator[Finding]:
        for directory, commit in found:
            yield from find_model_files(name, directory, commit)
            config = read_config(directory / "config.json")
            yield from find_positions(name, config, max_length, recipe.adapter.num_virtual_tokens)

    def place() -> list[Finding]:
        runs.check_writable(recipe.run_directory)
        return []

    return [after(model, [after(files, of_weights), *of_model]), place, lambda: find_trackers(recipe.run.report_to)]


def find_trackers(names: Iterable[str]) -> Iterator[Finding]:
    """Those that are not known, or not installed."""
    for name in names:
        if name not in PACKAGES:
            valid = ", ".join(PACKAGES)
            yield Finding(f"run.report_to: {name!r} is not a tracker; the valid ones are {valid}.", error=ConfigError)
        elif importlib.util.find_spec(PACKAGES[name]) is None:
            yield Finding(
                f"run.report_to: {name} is not installed; run pip install {PACKAGES[name]}.", error=ConfigError
            )


def check_model(model: ModelBlock) -> tuple[Path, str | None] | None:
    """The base model exists: a directory with a config.json, or a hub id whose config.json can be had.

    What it needs of code of its own may run, or is refused. Returns where config.json is, and the hub's commit; None
    for the tiny model and a factory's.
    """
    name = model.name_or_path
    if name == TINY_MODEL_NAME:
        return None
    if model.factory is not None:
        for key, file in (("name_or_path", name), ("factory", model.factory.rpartition(":")[0])):
            if not Path(file).expanduser().is_file():
                raise ModelError(f"model.{key} = {getattr(model, key)}: there is no file {file}.")
        assert model.tokenizer is not None
        files = ["tokenizer_config.json"]
        check_remote_code(model, *fetch("model.tokenizer", model.tokenizer, files, model.revision, ModelError))
        return None
    if Path(name).expanduser().is_file():
        raise ModelError(f"model.name_or_path = {name} is a file, which only a model.factory can be filled from.")
    files = ["config.json", "tokenizer_config.json"]
    directory, commit = fetch("model.name_or_path", name, files, model.revision, ModelError)
    if not (directory / "config.json").is_file():
        raise ModelError(f"model.name_or_path = {name} has no config.json, so that it is no model of transformers.")
    check_remote_code(model, directory, commit)
    return directory, commit


def commit_of_base(model: ModelBlock, identity: Mapping[str, Any] | None, pinned: Mapping[str, str]) -> str | None:
    """The commit of a base on the hub, for all ranks and all starts: a new one upstream is none of this run's.

    Unless the recipe names one, that of the checkpoint with this identity, or that which was prepared for the run. None
    for a base that is not on the hub.
    """
    if _asks_no_hub(model):
        return model.revision
    known = _known_commit(model, identity, pinned)
    return known or fetch("model.name_or_path", model.name_or_path, ["config.json"], None, ModelError)[1]


def _asks_no_hub(model: ModelBlock) -> bool:
    """Which commit it is, for the recipe names it, or the base is not on the hub."""
    is_here = model.name_or_path == TINY_MODEL_NAME or Path(model.name_or_path).expanduser().exists()
    return model.revision is not None or model.factory is not None or is_here


def saved_identity(directory: Path) -> dict[str, Any] | None:
    """Of the newest checkpoint, by its name: what a run began with is what it goes on with."""
    with suppress(OSError):  # who may not read it is told when the place is checked
        for _, path in runs.published_checkpoints(directory)[-1:]:
            identity = runs.read_json(path / "state.json").get("identity")
            return identity if isinstance(identity, dict) else None
    return None


def _known_commit(model: ModelBlock, identity: Mapping[str, Any] | None, pinned: Mapping[str, str]) -> str | None:
    """That of a hub's base which this run has begun with, or is prepared for."""
    if identity is not None and identity["recipe"]["model"]["name_or_path"] == model.name_or_path:
        kind, _, commit = identity["base"].partition(" ")
        if kind == "commit":
            return str(commit)
    return pinned.get(model.name_or_path)


def with_revision(recipe: Recipe, revision: str | None) -> Recipe:
    """The recipe with this model.revision."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": revision})})


def as_prepared(recipe: Recipe) -> Recipe:
    """The recipe with the commit of the base that its run has begun with, or is prepared for, unless it names one."""
    if _asks_no_hub(recipe.model):
        return recipe
    directory = recipe.run_directory
    return with_revision(
        recipe, _known_commit(recipe.model, saved_identity(directory), runs.read_pinned_base(directory))
    )


def remove_stale_build_locks(say: Callable[[str], None]) -> None:
    """Remove what a process left that was killed while torch compiled an extension; others would wait for it for ever.

    No layout that ships compiles anything, so that none is refused for want of a compiler: of DeepSpeed's ops, its own
    Adam, NVMe offload and quantised gathers are compiled on first use, and none is used here; the kernels of
    bitsandbytes for NVIDIA GPUs and CPUs come compiled. Code that a base brings along may compile its own.

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
