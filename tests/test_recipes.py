"""Every shipped recipe loads, is complete, and says how it is run and whether it was measured."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from launch.config import DEFAULT_RECIPE, dump_recipe, load_recipe

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_is_written_back_equal(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.run.name == path.stem
    (tmp_path / path.name).write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / path.name) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_begins_with_its_command_and_whether_it_was_measured(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").split("\n")
    header = "\n".join(line for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")])
    name = "" if path == ROOT / DEFAULT_RECIPE else rf" configs/recipes/{re.escape(path.name)} "
    command = re.search(rf"^#   accelerate launch --config_file (\S+) train\.py{name}", header, re.MULTILINE)
    assert command, header
    assert re.search(r"Not measured\.|Measured on ", header), header
    configuration = yaml.safe_load((ROOT / command[1]).read_text(encoding="utf-8"))
    json.loads((ROOT / configuration["deepspeed_config"]["deepspeed_config_file"]).read_text(encoding="utf-8"))
