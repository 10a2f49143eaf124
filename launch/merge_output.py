"""Where a merge may go: what it reads is never touched, and what no merge has written is never deleted."""

import json
import os
from pathlib import Path

from launch.errors import MergeError


def place_of(output: Path, *, base: Path, adapter: Path) -> Path:
    """The directory that `output` means, links followed; it need not be there.

    Raises MergeError for what a directory cannot be renamed to, and for a place in which base or adapter would suffer.
    """
    try:
        if output.is_symlink() and not output.exists():
            raise MergeError(f"{output} is a link to nowhere; remove it, or give another --output.")
        place = output.resolve()
        nearest = next(path for path in (place, *place.parents) if path.exists())
        if not nearest.is_dir():
            raise MergeError(f"{nearest} is a file, and the merged model a directory; give another --output.")
    except (OSError, RuntimeError) as error:  # the second is what a link to itself raises
        fault = getattr(error, "strerror", None) or "its links have no end"
        raise MergeError(f"{output} cannot be looked at: {fault}; give another --output.") from None
    if os.path.ismount(place):
        raise MergeError(
            f"{output} is where a file system is mounted, which no finished directory can be renamed to; give a "
            "directory in it as --output."
        )
    # Files of a base may be links, such as those of a snapshot of the hub.
    of_base = {base.resolve(), *(path.resolve().parent for path in base.iterdir())}
    for what, directories in (("base", of_base), ("adapter", {adapter.resolve()})):
        for directory in sorted(directories):
            if directory.is_relative_to(place):
                raise MergeError(
                    f"{output} has the {what} in it ({directory}), which is only read; give another --output."
                )
    if place.is_relative_to(base.resolve()):
        raise MergeError(f"{output} is in the base, which is only read; give an --output outside of {base}.")
    return place


def check_replaceable(place: Path) -> None:
    """Raises MergeError when something stands there that no merge has written: it is not ours to delete."""
    there = {path.name for path in place.iterdir()} if place.is_dir() else set()
    if not there:
        return
    try:
        written = {*json.loads((place / "manifest.json").read_text(encoding="utf-8"))["files"], "manifest.json"}
    except (OSError, ValueError, KeyError, TypeError):
        written = set()
    if "merge_report.json" not in written:
        raise MergeError(
            f"{place} is there and is no merge, so that it is not replaced; move it elsewhere, or merge into another "
            "directory."
        )
    others = sorted(there - written)
    if others:
        raise MergeError(
            f"{place} is not replaced, since {others[0]} ({len(others)} such) was not written by the merge that is "
            "there; move that elsewhere, or merge into another directory."
        )
