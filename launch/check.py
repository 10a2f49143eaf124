"""launch check: what can be known about a run before a weight is read, and without a GPU."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import transformers

from launch import preflight
from launch.data import Tools, prepare
from launch.data_report import outcomes_line
from launch.findings import Check, Finding, collect, settle
from launch.model import checks_of_base, resolve_base, tokenizer_and_template
from launch.recipe import TINY_MODEL_NAME, Recipe
from launch.starting_adapter import fingerprint_starting_adapter


def check(recipe: Recipe) -> None:
    """Make every check, and say what became of the rows. Raises a LaunchError that names all that stops the run."""
    transformers.logging.set_verbosity_error()  # remote code gives it much to remark on
    said: list[str] = []

    def rows(known: Recipe, tools: Callable[[], Tools]) -> None:
        with tempfile.TemporaryDirectory() as directory:
            report = prepare(known, Path(directory), tools).report
        said.append(f"Rows {outcomes_line(report)}; {report['train']['trained_tokens']:,} trained tokens.")

    settle(collect(checks_of_recipe(recipe, rows)), print)
    print(*said, "The recipe, the base model's config, the adapter's targets and every row pass.", sep="\n")


def checks_of_recipe(recipe: Recipe, rows: Callable[[Recipe, Callable[[], Tools]], None]) -> list[Check]:
    """Of the recipe and of what it names.

    `rows` looks at those and raises a LaunchError; it is given the recipe with its base's commit, and what loads the
    base's tokenizer, once.
    """

    def of_base() -> list[Finding]:
        known = preflight.as_prepared(recipe)
        base = TINY_MODEL_NAME if known.model.name_or_path == TINY_MODEL_NAME else resolve_base(known)
        tools = functools.cache(lambda: tokenizer_and_template(known))

        def of_rows() -> list[Finding]:
            rows(known, tools)
            return []

        return collect(checks_of_base(known, base, tools, rows=[of_rows]))

    def starting_adapter() -> list[Finding]:
        fingerprint_starting_adapter(recipe.adapter)
        return []

    return [*preflight.checks(recipe, of_model=[of_base]), starting_adapter]
