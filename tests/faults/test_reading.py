"""Checkpoints that were damaged after they were written: the fault matrix, rows 18 to 21, 24 and 35."""

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import World, run_ranks
from test_resume import stop_at

import train
from launch import checkpoint, runs
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
        with pytest.raises(
            CheckpointError, match=r"Every checkpoint in .* is bad or cannot be read; take \.corrupt off"
        ):
            find_resumable(directory, lambda text: None)


def test_a_file_system_that_does_not_answer_condemns_nothing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it does again, the newest checkpoint is used, and nobody has renamed anything."""
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    real = checkpoint.identity_of_file

    def identity_of_file(path: Path) -> Any:
        if path.name == "optimizer.safetensors":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return real(path)

    said: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "identity_of_file", identity_of_file)
        with pytest.raises(CheckpointError, match="is bad or cannot be read"):
            find_resumable(directory, said.append)
    assert len(said) == 2
    assert all("cannot be read now (Stale file handle). It is left as it is" in one for one in said)
    found = find_resumable(directory, said.append)
    assert found is not None and found.step == 4 and len(said) == 2


def test_a_manifest_that_was_written_for_a_pickle_is_refused_and_runs_nothing(
    world: World, saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = world.run_directory("forged")
    shutil.copytree(saved, directory)
    path = path_of_step(directory, 4)
    pickled(path / "optimizer.safetensors")
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["optimizer.safetensors"] = checkpoint.identity_of_file(path / "optimizer.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    recipe = world.recipe("forged", train={"max_steps": 6, "save_steps": 2, "save_seconds": 1e6})
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    assert "step-000004: optimizer.safetensors is none: " in capfd.readouterr().err
    assert not list(directory.rglob("ran"))


def test_a_start_says_that_every_checkpoint_is_bad(
    world: World, saved: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = world.run_directory("all-bad")
    shutil.copytree(saved, directory)
    for step in (2, 4):
        flipped(path_of_step(directory, step) / "optimizer.safetensors")
    recipe = world.recipe("all-bad", train={"max_steps": 6, "save_steps": 2, "save_seconds": 1e6})
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    assert "Refused: Every checkpoint in" in capfd.readouterr().err
    assert runs.read_status(directory)["state"] == "refused"


def test_the_order_is_that_of_the_steps_whatever_the_clock_says(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    for path in checkpoints_directory(directory).rglob("*"):
        is_newest = "step-000004" in str(path)
        os.utime(path, (0, 0) if is_newest else (2**31, 2**31))
    found = find_resumable(directory, lambda text: None)
    assert found is not None and found.step == 4
