"""Faults while a checkpoint is written: the fault matrix, rows 4 to 7, 17 and 18 to 21."""

import ctypes
import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, World, killed_before, launch, run_ranks
from safetensors.torch import load_file
from test_launch import command
from test_resume import stop_at

import train
from launch import runs
from launch.checkpoint import checkpoints_directory, find_resumable, path_of_step, verify

SETTINGS = {"max_steps": 6, "save_steps": 2, "save_seconds": 1e6}


def interrupted_at(number: int, arguments: list[str]) -> int:
    """train.py's main; the process kills itself before the `number`th thing that it does in `checkpoints`."""
    return killed_before(number, "checkpoints", lambda: train.main(arguments))


@pytest.fixture(scope="module")
def stopped(world: World) -> Path:
    """A run directory with the checkpoints of steps 2 and 4, of 6; the straight run beside it."""
    launch(world.recipe("straight", train=SETTINGS), 1)
    run_ranks(1, stop_at, 4, [str(world.recipe("stopped", train=SETTINGS))])
    directory = world.run_directory("stopped")
    assert sorted(path.name for path in checkpoints_directory(directory).iterdir()) == ["step-000002", "step-000004"]
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(path_of_step(directory, 6) / "optimizer.safetensors")


def assert_is_straight(world: World, directory: Path) -> None:
    """Finished with the weights of a run that nothing happened to, and nothing left over."""
    assert runs.read_status(directory)["state"] == "finished"
    expected, found = weights(world.run_directory("straight")), weights(directory)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    left = {path.name for path in checkpoints_directory(directory).iterdir() if path.suffix != ".corrupt"}
    # An old one stays where the kill came between the rename and its deletion, and no save followed.
    assert {"step-000006"} < left <= {"step-000002", "step-000004", "step-000006"}


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_save_leaves_whole_checkpoints(world: World, stopped: Path, tmp_path: Path) -> None:
    recipe = str(world.recipe("killed", train=SETTINGS))
    directory = world.run_directory("killed")
    shutil.copytree(stopped, directory)
    (num_moments,) = run_ranks(1, interrupted_at, 0, [recipe])
    assert num_moments > 10
    for number in range(1, num_moments + 1):
        shutil.rmtree(directory)
        shutil.copytree(stopped, directory)
        with pytest.raises(AssertionError, match="exit code -9"):
            run_ranks(1, interrupted_at, number, [recipe])
        shutil.copytree(directory, tmp_path / "seen")
        found = find_resumable(tmp_path / "seen", say=print)
        assert found is not None and found.step in (4, 6)
        verify(found.path)
        assert not list(checkpoints_directory(tmp_path / "seen").glob("*.corrupt")), "nothing half-written has a name"
        shutil.rmtree(tmp_path / "seen")
        launch(Path(recipe), 1)
        assert_is_straight(world, directory)


def limited(max_file_bytes: int, arguments: list[str]) -> int:
    """train.py's main where no file may grow beyond so many bytes, as on a disk that is full, in steps 1 to 4."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real_step = train.engines.step
    steps = 0

    def counted_step(*given: Any) -> tuple[float, bool]:
        nonlocal steps
        steps += 1
        if steps == 5:
            time.sleep(0.5)  # for the save of step 4 to fail
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes if steps <= 4 else soft, hard))
        return real_step(*given)

    train.engines.step = counted_step
    return train.main(arguments)


@pytest.mark.parametrize("max_file_bytes", [900, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_failed_save_is_said_and_training_goes_on(
    world: World, max_file_bytes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    name = f"full-{max_file_bytes}"
    recipe = world.recipe(name, train=SETTINGS)
    assert run_ranks(1, limited, max_file_bytes, [str(recipe)]) == [0]
    said = capfd.readouterr().out
    directory = world.run_directory(name)
    if max_file_bytes > 900:  # otherwise there was no room for words either
        assert "save 2/6  failed: " in said and "File too large" in said and "training goes on" in said
    failed = [record["step"] for record in world.metrics(name, "failed save")]
    assert failed == [2, 4] or (failed == [4] and max_file_bytes == 900), "what had room is in metrics.jsonl"
    assert [path.name for path in checkpoints_directory(directory).iterdir()] == ["step-000006"]
    assert runs.read_status(directory)["state"] == "finished"


@pytest.fixture
def small_disk(world: World) -> Iterator[Path]:
    """The run directory of `on-a-small-disk` is a file system of one megabyte."""
    directory = world.run_directory("on-a-small-disk")
    directory.mkdir(parents=True, exist_ok=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(directory).encode(), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip(f"no mount here: {os.strerror(ctypes.get_errno())}")
    try:
        yield directory
    finally:
        libc.umount2(str(directory).encode(), 2)  # MNT_DETACH: a rank that failed may not be gone yet


def filled(directory: Path, free_bytes: int, arguments: list[str]) -> int:
    """train.py's main on a disk that has so much room left in steps 1 to 4."""
    real_step = train.engines.step
    steps = 0

    def counted_step(*given: Any) -> tuple[float, bool]:
        nonlocal steps
        steps += 1
        filler = directory / "logs" / "filler"
        if steps == 5:
            time.sleep(0.5)  # for the save of step 4 to fail
        if steps in (1, 5):
            filler.parent.mkdir(exist_ok=True)
            filler.unlink(missing_ok=True)
        if steps == 1:
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(directory).free - free_bytes)
        return real_step(*given)

    train.engines.step = counted_step
    return train.main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("free_kilobytes", [0, 4, 8, 12, 16, 24, 32, 40, 48])
def test_a_disk_that_is_full_at_any_file_of_a_save(
    world: World, small_disk: Path, free_kilobytes: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """4 kB is the least that a file takes; with a little more room, a later file is the one that fails."""
    recipe = world.recipe("on-a-small-disk", train=SETTINGS)
    assert run_ranks(1, filled, small_disk, free_kilobytes * 1024, [str(recipe)]) == [0]
    said = capfd.readouterr().out
    assert said.count("failed: ") == 2 and "No space left on device" in said
    assert [path.name for path in checkpoints_directory(small_disk).iterdir()] == ["step-000006"]
    verify(path_of_step(small_disk, 6))
    assert runs.read_status(small_disk)["state"] == "finished"


def test_saves_that_keep_failing_end_the_run(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe("always-full", train=SETTINGS | {"save_steps": 1}, run={"max_failed_saves": 3})
    assert run_ranks(1, limited, 3000, [str(recipe)]) == [1]
    assert "Failed: 3 saves in a row failed, the last one with: " in capfd.readouterr().err
    assert runs.read_status(world.run_directory("always-full"))["state"] == "failed"


def with_little_room(arguments: list[str]) -> int:
    """train.py's main on a disk that has 100 kB left."""
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5)
    return train.main(arguments)


def test_a_disk_without_room_is_refused_before_the_first_step(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe("little-room", train=SETTINGS, run={"merge": True})
    assert run_ranks(1, with_little_room, [str(recipe)]) == [1]
    said = capfd.readouterr().err
    sentence = "has room for 100 kB, but 4 checkpoints of 14.3 kB and the merged model"
    assert "Refused: " in said and sentence in said
    assert runs.read_status(world.run_directory("little-room"))["state"] == "refused"


@pytest.mark.slow
def test_the_best_step_whose_save_failed_is_not_missed_for_ever(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    """The next best one that is on disk is taken, and said."""
    settings = {"eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.3, "warmup_steps": 2}
    recipe = world.recipe("best-lost", train=SETTINGS | settings | {"lr_scheduler_type": "constant_with_warmup"})
    assert run_ranks(1, limited, 3000, [str(recipe)]) == [0]
    losses = {r["step"]: r["loss"] for r in world.metrics("best-lost", "evaluation") if r["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best < 6, "otherwise the best step was saved"
    assert f"Step {best} has the best held-out loss, but no checkpoint; 6 is the best" in capfd.readouterr().out
    assert runs.read_status(world.run_directory("best-lost"))["state"] == "finished"


@pytest.mark.slow
def test_a_tracker_that_fails_takes_nothing_with_it(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe("tracked", train=SETTINGS, run={"report_to": ["tensorboard"]})
    assert run_ranks(1, limited, 0, [str(recipe)]) == [0]
    assert runs.read_status(world.run_directory("tracked"))["state"] == "finished"


# `1234 fsync(3</path>) = 0`: the thread, the call, and the path of its file descriptor or its first argument.
CALL = re.compile(r'(\d+) +(\w+)\((?:AT_FDCWD<[^>]*>, )?(?:\d+<([^>]*)>|"([^"]*)")(.*)')
TRACED = "openat,write,writev,pwrite64,ftruncate,fsync,fdatasync,rename,renameat,renameat2,mkdir"


@pytest.mark.slow
def test_every_file_is_on_disk_before_the_name_that_it_is_read_by(world: World, tmp_path: Path) -> None:
    """The system calls of a real run: file, directory, rename, parent, in this order for each checkpoint."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run(["strace", "-o", "/dev/null", "true"], check=False, capture_output=True).returncode:
        pytest.skip("strace may not trace here (ptrace is not allowed)")
    recipe = world.recipe("traced", train=SETTINGS)
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "-qq", "--seccomp-bpf", "-y", "-s", "200", "-e", f"trace={TRACED}", "-o", str(trace)]
    subprocess.run(
        [*strace, *command(), "--num_processes", "1", "train.py", str(recipe)], cwd=ROOT, check=True, timeout=300
    )
    checkpoints = str(checkpoints_directory(world.run_directory("traced")))
    calls = [match for line in trace.read_text(errors="replace").splitlines() if (match := CALL.match(line))]
    published, unsynced, awaits_parent = [], set[str](), ""
    for thread, name, of_descriptor, of_name, rest in (match.groups() for match in calls):
        path = of_descriptor or of_name
        if thread == awaits_parent:
            assert path == checkpoints and name in ("openat", "fsync"), "the parent comes next"
            awaits_parent = "" if name == "fsync" else thread
        if not path.startswith(f"{checkpoints}/.saving-"):
            continue
        if name in ("fsync", "fdatasync"):
            unsynced.discard(path)
        elif name.startswith("rename"):
            (target,) = re.findall(r'"([^"]*)"', rest)
            if Path(path).parent == Path(checkpoints):
                assert not unsynced, f"{target} got its name before these were on disk: {unsynced}"
                published.append(Path(target).name)
                awaits_parent = thread
            else:  # within the hidden directory
                unsynced |= {str(Path(path).parent)} | ({target} if path in unsynced else set())
                unsynced.discard(path)
        elif name != "mkdir" and (name != "openat" or re.search("O_WRONLY|O_RDWR", rest)):
            unsynced |= {path, str(Path(path).parent)}
    assert published == ["step-000002", "step-000004", "step-000006"] and not awaits_parent
