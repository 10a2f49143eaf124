"""The disks: what a run will leave on them, by formula or by what its model turned out to have, beside what is free."""

from collections.abc import Iterator
from pathlib import Path

from launch.errors import LaunchError, PreflightError
from launch.findings import Finding
from launch.hub import cache_directory, missing_bytes
from launch.memory import checkpoint_bytes, numel
from launch.plan import find_base
from launch.preflight import as_prepared
from launch.recipe import TINY_MODEL_NAME, Recipe
from launch.runs import free_bytes
from launch.table import format_bytes
from launch.trained_shapes import trained_shapes


def find_room(recipe: Recipe, *, is_start: bool = False) -> Iterator[Finding]:
    """What stops a run for want of room.

    Of a base that no formula covers it is said that the run compares; `is_start`: this is the run, which does so then.
    """
    name, model = recipe.model.name_or_path, recipe.model
    is_here = model.factory is not None or name == TINY_MODEL_NAME or Path(name).expanduser().exists()
    known = as_prepared(recipe)
    if not is_here and known == recipe:  # what is prepared, or was trained on, is fetched
        check_cache(name, model.revision)
    try:
        base = find_base(known, None)
        num_trained = numel(trained_shapes(recipe, base).values())
    except LaunchError as error:
        if not is_start and name != TINY_MODEL_NAME:
            yield Finding(f"The disk is compared when the run starts, and not now: {error}", stops=False)
        return
    value_bytes = 4 if recipe.run.merge_dtype == "float32" else 2
    check_room(recipe, num_trained, numel(base.shapes.values()) * value_bytes)


def check_cache(name: str, revision: str | None) -> int | None:
    """The bytes of a hub id that are still to be fetched; None when the hub does not say.

    Raises PreflightError when there is no room for them.
    """
    missing, cache = missing_bytes(name, revision), cache_directory()
    if missing and missing > free_bytes(cache):
        raise PreflightError(
            f"model.name_or_path = {name} needs {format_bytes(missing)} in {cache}, which has room for "
            f"{format_bytes(free_bytes(cache))}; make room, or set HF_HOME to a place that has it, here and in the job."
        )
    return missing


def check_room(recipe: Recipe, num_trained: int, merged_bytes: int) -> None:
    """Raises PreflightError when a disk has no room for what the run will keep; `num_trained` numbers are saved.

    Besides the `train.save_total_limit` newest checkpoints there may be the best one and one that is being written. The
    merged model may be on another disk, where merged/ is a link.
    """
    directory, keep = recipe.run_directory, recipe.train.save_total_limit + 2
    each = checkpoint_bytes(num_trained)
    there = sum(path.stat().st_size for path in directory.glob("checkpoints/*/*"))
    needs = {directory: max(keep * each - there, each)}
    what = {directory: f"{keep} checkpoints of {format_bytes(each)}"}
    if recipe.merges:
        merged = (directory / "merged").resolve()
        place = merged.parent if (directory / "merged").is_symlink() else directory
        needs[place] = needs.get(place, 0) + merged_bytes
        words = f"the merged model of {format_bytes(merged_bytes)}"
        what[place] = f"{what[place]} and {words}" if place in what else words
    for place, needed in needs.items():
        if needed > free_bytes(place):
            fewer = ", or lower train.save_total_limit" if place == directory else ""
            raise PreflightError(
                f"{place} has room for {format_bytes(free_bytes(place))}, but {what[place]} of this run need "
                f"{format_bytes(needed)} more; make room{fewer}."
            )
