"""The place and the room of a run, before anything of it is there."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import World
from typer.testing import CliRunner

from launch import hub, preflight
from launch.__main__ import app
from launch.config import load_recipe
from launch.errors import PreflightError
from launch.findings import Finding
from launch.recipe import Recipe
from launch.room import find_room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB, if this user may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("this user may not mount")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def recipe_of(world: World, name: str, **run: object) -> Recipe:
    return load_recipe(world.recipe(name, run={"merge": True, **run}))


def test_check_says_that_a_disk_is_too_small(world: World, small_disk: Path) -> None:
    done = CliRunner().invoke(
        app, ["check", str(world.recipe("small")), f"run.output_dir={small_disk}", "train.save_total_limit=100"]
    )
    assert (
        done.exit_code == 2 and "has room for 1.05 MB, but 102 checkpoints of 14.3 kB of this run need" in done.stderr
    )
    assert list(small_disk.iterdir()) == []


def test_the_merged_model_may_be_on_another_disk(world: World, small_disk: Path) -> None:
    recipe = recipe_of(world, "linked", max_shard_size_bytes=100_000)
    assert list(find_room(recipe)) == []
    recipe.run_directory.mkdir(parents=True)
    (recipe.run_directory / "merged").symlink_to(small_disk / "merged")
    assert list(find_room(recipe)) == [], "a tiny model fits"
    (small_disk / "other").write_bytes(b"0" * 1_040_000)
    with pytest.raises(
        PreflightError,
        match=rf"^{small_disk} has room for .* but the merged model of 84.9 kB of this run need .* more; make room\.$",
    ):
        list(find_room(recipe))


def test_a_place_that_cannot_be_written(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, what in (("file", "no directory"), ("link", "a link to nowhere")):
        if what != "no directory":
            (tmp_path / place).symlink_to(tmp_path / "nowhere")
        with pytest.raises(PreflightError, match=f"{place} is {what}; remove it"):
            preflight.check(recipe_of(world, "nowhere", output_dir=str(tmp_path / place)))
    if os.geteuid() != 0:
        (tmp_path / "mine").mkdir(mode=0o555)
        with pytest.raises(PreflightError, match="Permission denied"):
            preflight.check(recipe_of(world, "denied", output_dir=str(tmp_path / "mine")))
    assert sorted(path.name for path in tmp_path.iterdir()) in (["file", "link"], ["file", "link", "mine"])


def test_a_disk_that_is_mounted_read_only(world: World, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(PreflightError, match=r"The run directory .* cannot be written: Permission denied \(.*small\)"):
        preflight.check(recipe_of(world, "x", output_dir=str(small_disk / "runs")))


def test_a_base_without_formulas_is_compared_by_the_run(world: World, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    recipe = load_recipe(world.recipe("unknown", model={"name_or_path": str(tmp_path)}))
    (note,) = find_room(recipe)
    assert (
        isinstance(note, Finding) and not note.stops and note.sentence.startswith("The disk is compared when the run")
    )
    assert list(find_room(recipe, is_start=True)) == []
    assert list(find_room(load_recipe(Path("configs/recipes/tiny.yaml")))) == [], "which fits anywhere"


def test_a_fault_of_the_weights_is_said_once(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.base, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    recipe = world.recipe("half", model={"name_or_path": str(tmp_path / "base")})
    done = CliRunner().invoke(app, ["check", str(recipe), "run.output_dir=/dev/null"])
    assert done.exit_code == 2 and "Note: " not in done.output
    assert done.stderr.count("model.safetensors") == 1, done.stderr
    assert "/dev/null is no directory; remove it" in done.stderr, "the place is looked at in any case"


def test_a_cache_without_room_for_the_base(world: World, monkeypatch: pytest.MonkeyPatch, small_disk: Path) -> None:
    """What the hub says of its files is the only thing here that is not real."""
    monkeypatch.setattr("launch.room.missing_bytes", lambda name, revision: 28_000_000_000)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(small_disk))
    recipe = load_recipe(world.recipe("hub"), ["model.name_or_path=owner/large"])
    with pytest.raises(
        PreflightError, match=r"owner/large needs 28 GB in .*small, which has room for 1.05 MB; make room"
    ):
        list(find_room(recipe))
    assert hub.cache_directory() == small_disk
