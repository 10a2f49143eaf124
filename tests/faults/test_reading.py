"""Checkpoints that were damaged after they were written: the fault matrix, rows 18 to 21, 24 and 35."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import World, run_ranks
from test_resume import stop_at

from launch.checkpoint import checkpoints_directory, find_resumable, path_of_step
from launch.errors import CheckpointError

FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "manifest.json",
    "optimizer.safetensors",
    "state.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Malice(path.with_name("ran"))))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: tuple[Callable[[Path], None], ...] = (halved, shortened, emptied, flipped, Path.unlink, pickled)


@pytest.fixture(scope="module")
def saved(world: World) -> Path:
    """A run directory with the checkpoints of steps 2 and 4."""
    recipe = world.recipe("saved", train={"max_steps": 6, "save_steps": 2, "save_seconds": 1e6})
    run_ranks(1, stop_at, 4, [str(recipe)])
    assert sorted(path.name for path in path_of_step(world.run_directory("saved"), 4).iterdir()) == sorted(FILES)
    return world.run_directory("saved")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_found_named_and_the_checkpoint_before_it_is_used(
    saved: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    damage(path_of_step(directory, 4) / name)
    said: list[str] = []
    found = find_resumable(directory, said.append)
    if name == "manifest.json" and damage is shortened:
        assert found is not None and found.step == 4, "without its last newline the manifest says what it said"
        return
    assert found is not None and found.step == 2
    assert len(said) == 1 and name in said[0] and "step-000004.corrupt" in said[0]
    assert not list(directory.rglob("ran")), "nothing is unpickled"


def test_when_every_checkpoint_is_bad_nothing_starts_at_step_0(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    for step in (2, 4):
        flipped(path_of_step(directory, step) / "optimizer.safetensors")
    for _ in range(2):  # and not the second time either
        with pytest.raises(CheckpointError, match=r"Every checkpoint in .* is bad; restore one from a backup, or give"):
            find_resumable(directory, lambda text: None)


def test_the_order_is_that_of_the_steps_whatever_the_clock_says(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    for path in checkpoints_directory(directory).rglob("*"):
        is_newest = "step-000004" in str(path)
        os.utime(path, (0, 0) if is_newest else (2**31, 2**31))
    found = find_resumable(directory, lambda text: None)
    assert found is not None and found.step == 4
