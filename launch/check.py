"""launch check: what can be known about a run before a weight is read, where there is a GPU and where there is none."""

import functools
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import transformers

from launch import layout_files, preflight
from launch.data import Tools, prepare
from launch.data_report import outcomes_line
from launch.findings import Check, Finding, collect, settle
from launch.machine_findings import checks_of_machine
from launch.model import checks_of_base, tokenizer_and_template
from launch.recipe import Recipe
from launch.room import find_room
from launch.starting_adapter import fingerprint_starting_adapter


def check(recipe: Recipe, config_file: Path, arguments: Sequence[str]) -> None:
    """Make every check of the run that accelerate launch would start with this file, and say what became of the rows.

    `arguments` are those that give train.py this recipe. Raises a LaunchError that names all that stops the run.
    """
    transformers.logging.set_verbosity_error()  # remote code gives it much to remark on
    said: list[str] = []

    def rows(known: Recipe, tools: Callable[[], Tools]) -> None:
        with tempfile.TemporaryDirectory() as directory:
            report = prepare(known, Path(directory), tools).report
        said.append(f"Rows {outcomes_line(report)}; {report['train']['trained_tokens']:,} trained tokens.")

    settle(collect([*checks_of_machine(recipe.train.precision), *checks_of_run(recipe, config_file, rows)]), print)
    print(*said, "The recipe, its layout, the base model's files, the adapter's targets and every row pass.", sep="\n")
    start = ["accelerate", "launch", "--config_file", str(config_file), "train.py", *arguments]
    print(f"Start it:\n  {shlex.join(start)}")


def checks_of_run(
    recipe: Recipe, config_file: Path, rows: Callable[[Recipe, Callable[[], Tools]], None]
) -> list[Check]:
    """Of the recipe, of what it names and of its layout.

    `rows` looks at those and raises a LaunchError; it is given the recipe with its base's commit, and what loads the
    base's tokenizer, once.
    """

    def of_base() -> list[Finding]:
        known = preflight.as_prepared(recipe)
        tools = functools.cache(lambda: tokenizer_and_template(known))

        def of_rows() -> list[Finding]:
            rows(known, tools)
            return []

        return collect(checks_of_base(known, tools, rows=[of_rows]))

    def starting_adapter() -> list[Finding]:
        fingerprint_starting_adapter(recipe.adapter)
        return []

    def layout() -> list[Finding]:
        return layout_files.check(recipe, layout_files.layout_of_file(config_file))

    of_recipe = preflight.checks(recipe, of_model=[of_base], of_weights=[lambda: find_room(recipe)])
    return [*of_recipe, starting_adapter, layout]
