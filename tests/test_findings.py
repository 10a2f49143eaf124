"""Findings: all at once, each a sentence; what depends on another is not made when that one fails."""

import pytest
from conftest import World
from typer.testing import CliRunner

from launch.__main__ import app
from launch.errors import ModelError, PreflightError
from launch.findings import Finding, after, collect, settle


def _raises() -> list[Finding]:
    raise ModelError("there is no base.")


def test_all_are_found_and_dependent_ones_left_out() -> None:
    note = Finding("a note.", stops=False)
    never = Finding("of a model that is not there.")
    found = collect([after(_raises, [lambda: [never]]), lambda: [note], after(lambda: [note], [lambda: [never]])])
    assert [finding.sentence for finding in found] == ["there is no base.", "a note.", "a note.", never.sentence]
    assert [finding.error for finding in found if finding.stops] == [ModelError, PreflightError]


def test_one_is_raised_as_it_is_and_many_as_a_list() -> None:
    said: list[str] = []
    settle([Finding("a.", stops=False)], said.append)
    assert said == ["Note: a."]
    with pytest.raises(ModelError, match=r"^there is no base\.$"):
        settle(collect([_raises]), said.append)
    with pytest.raises(PreflightError, match=r"^2 things stand in the way\.\n  1\. there is no base\.\n  2\. b\.$"):
        settle([*collect([_raises]), Finding("b.")], said.append)


def test_check_says_all_that_is_wrong_with_a_recipe(world: World) -> None:
    recipe = world.recipe(
        "all",
        run={"report_to": ["foo"]},
        adapter={"target_modules": ["no_such"], "init_from": "/nowhere"},
        data={"template": "nothing"},
    )
    done = CliRunner().invoke(app, ["check", str(recipe)])
    lines = done.stderr.splitlines()
    assert done.exit_code == 2 and lines[0] == "Refused: 4 things stand in the way."
    for number, part in enumerate(("no_such", "'nothing'", "'foo'", "/nowhere"), start=1):
        assert lines[number].startswith(f"  {number}. ") and part in lines[number], lines


def test_check_does_not_repeat_that_a_base_is_missing(world: World) -> None:
    done = CliRunner().invoke(app, ["check", str(world.recipe("none")), "model.name_or_path=/nowhere"])
    assert done.exit_code == 2
    assert (
        done.stderr
        == "Refused: model.name_or_path = /nowhere does not exist; give a directory or a hub id (owner/name).\n"
    )
