"""launch prepare: what a job needs of the network, fetched where there is one, and its rows."""

import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch import preflight, runs
from launch.config import LAUNCH_COMMAND
from launch.data import prepare
from launch.data_report import outcomes_line
from launch.errors import ModelError
from launch.hub import cache_directory, fetch_model
from launch.modes import keep_private
from launch.recipe import TINY_MODEL_NAME, ModelBlock, Recipe
from launch.room import check_cache
from launch.table import format_bytes, format_table

if TYPE_CHECKING:
    from launch.data import Tools


def prepare_ahead(recipe: Recipe, arguments: Sequence[str]) -> str:
    """Put base, adapter and tokenizer into the hub's cache and the rows into the run directory, which is then ready.

    Returns what is there now, and what to do next; `arguments` are those that gave the recipe. What is there already is
    left. No status is written: the first start is still to come. Raises RunInUseError when the run is at work.
    """
    keep_private(group_readable=recipe.run.group_readable)
    preflight.check(recipe)
    directory = recipe.run_directory
    with runs.open_run(directory):
        identity = preflight.saved_identity(directory)
        commit = preflight.commit_of_base(recipe.model, identity, runs.read_pinned_base(directory))
        pinned = preflight.with_revision(recipe, commit)
        rows = [("run", str(directory)), ("base", _fetch_base(pinned.model, commit))]
        is_on_hub = commit is not None and pinned.model.factory is None
        if is_on_hub and recipe.model.revision is None:
            assert commit is not None
            runs.pin_base(directory, recipe.model.name_or_path, commit)
        if init_from := getattr(recipe.adapter, "init_from", None):
            from launch.starting_adapter import fingerprint_starting_adapter  # imports torch

            fingerprint_starting_adapter(recipe.adapter)
            rows.append(("adapter", f"{init_from}, which the run starts from"))
        cache = cache_directory()
        rows += [("cache", f"{cache}, {format_bytes(runs.free_bytes(cache))} free")] if is_on_hub else []
        rows.append(("rows", _prepare_rows(pinned, directory)))
    if elsewhere := [tracker for tracker in recipe.run.report_to if tracker != "tensorboard"]:
        rows.append(("trackers", f"{', '.join(elsewhere)}: what they need of a network is theirs, and not prepared"))
    # Without it, each question that nobody answers is asked again for half a minute.
    offline = "HF_HUB_OFFLINE=1 " if is_on_hub else ""
    when = "With HF_HUB_OFFLINE=1 the job needs no network" if is_on_hub else "The job needs no network"
    start = "python -m launch submit" if shutil.which("sbatch") else LAUNCH_COMMAND
    return f"\n{format_table(rows)}\n\n{when}. Start it:\n  {offline}{start} {shlex.join(arguments)}".rstrip()


def _fetch_base(model: ModelBlock, commit: str | None) -> str:
    """What it is, how large, and how it came here. Raises PreflightError when there is no room for it."""
    name = model.name_or_path
    if name == TINY_MODEL_NAME:
        return f"{name}, which the run builds itself"
    if model.factory is not None:
        return f"{name}, filled into {model.factory}; tokenizer {model.tokenizer}"
    if commit is None:
        size_bytes = _size_bytes(Path(name).expanduser())
        return f"{name}: {format_bytes(size_bytes)}, where it is"
    missing = check_cache(name, commit)
    start = time.monotonic()
    snapshot, fetched = fetch_model("model.name_or_path", name, commit, ModelError)
    how = f"{format_bytes(missing)} fetched now ({time.monotonic() - start:.1f} s)" if missing else "there already"
    return f"{name} at {fetched}: {format_bytes(_size_bytes(snapshot))}, {how}"


def _prepare_rows(recipe: Recipe, directory: Path) -> str:
    """The outcomes, and whether they had been prepared."""

    def load() -> "Tools":
        from launch.model import tokenizer_and_template  # imports torch, which prepared rows do without

        return tokenizer_and_template(recipe)

    start = time.monotonic()
    prepared = prepare(recipe, directory, load).publish(directory)
    how = "as prepared before" if prepared.was_there else f"prepared now ({time.monotonic() - start:.1f} s)"
    return f"{outcomes_line(prepared.report)}; {how}"


def _size_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
