"""The run directory before and after a run: the fault matrix, rows 12 and 26, and O4."""

import ctypes
import json
import multiprocessing
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import World, launch, run_ranks

import train
from launch import preflight, runs
from launch.config import dump_recipe, load_recipe
from launch.errors import PreflightError
from launch.modes import as_at_start, keep_private

NOBODY = 65534
SECRETS = {"HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUv", "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567"}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount, and be another user")


# ---- what is refused ----


def refused(directory: Path) -> str:
    """The sentence; it is said before anything is written."""
    with pytest.raises(PreflightError) as error, runs.open_run(directory):
        pass
    return str(error.value)


def a_file(path: Path) -> Path:
    (path / "run").touch()
    return path / "run"


def below_a_file(path: Path) -> Path:
    (path / "file").touch()
    return path / "file" / "runs" / "run"


def a_dangling_link(path: Path) -> Path:
    (path / "run").symlink_to(path / "nowhere")
    return path / "run"


def below_a_dangling_link(path: Path) -> Path:
    (path / "runs").symlink_to(path / "purged")
    return path / "runs" / "run"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (a_file, "run is no directory; remove it, or give this run another run.name or run.output_dir."),
        (below_a_file, "cannot be written: Not a directory"),
        (a_dangling_link, "run is a link to nowhere; remove it"),
        (below_a_dangling_link, "runs is a link to nowhere; remove it"),
        (lambda path: Path("/proc/runs/run"), "set run.output_dir to a place that you can write to."),
    ],
    ids=["file", "below a file", "dangling link", "below a dangling link", "a file system of the kernel"],
)
def test_a_place_that_cannot_be_a_run_directory(tmp_path: Path, make: Callable[[Path], Path], sentence: str) -> None:
    directory = make(tmp_path)
    said = refused(directory)
    assert said.startswith(f"The run directory {directory} cannot be ") and sentence in said


def test_a_refused_place_costs_no_model(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """The base has no files at all, so looking at it would be another error."""
    recipe = World(world.directory, world.directory / "no-base", world.rows).recipe("in-a-file")
    (world.directory / "runs").mkdir(exist_ok=True)
    world.run_directory("in-a-file").touch()
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    said = capfd.readouterr().err
    assert said.count("Refused: The run directory ") == 1 and "in-a-file is no directory" in said


@pytest.fixture
def read_only_mount(tmp_path: Path) -> Iterator[Path]:
    """A file system that is mounted read-only, with a run in it."""
    libc, where = ctypes.CDLL(None, use_errno=True), str(tmp_path).encode()
    read_only, remount = 1, 32  # MS_RDONLY, MS_REMOUNT
    if libc.mount(b"tmpfs", where, b"tmpfs", 0, None) != 0:
        pytest.skip(f"no mount here: {os.strerror(ctypes.get_errno())}")
    try:
        (tmp_path / "run").mkdir()
        assert libc.mount(b"tmpfs", where, b"tmpfs", remount | read_only, None) == 0
        yield tmp_path
    finally:
        libc.umount(where)


@as_root
def test_a_disk_that_is_read_only(read_only_mount: Path) -> None:
    for name in ("run", "new"):
        said = refused(read_only_mount / name)
        assert said.startswith(f"The run directory {read_only_mount / name} cannot be written: ")
        assert said.endswith("; set run.output_dir to a place that you can write to.")


def opened_by(user: int, groups: list[int], directory: Path, answer: Any) -> None:
    os.setgroups(groups)
    os.setgid(user)
    os.setuid(user)
    try:
        with runs.open_run(directory):
            answer.put("opened")
    except PreflightError as error:
        answer.put(str(error))


@as_root
@pytest.mark.parametrize(
    ("mode", "mode_of_checkpoints", "groups", "outcome"),
    [
        (0o755, None, [], "cannot be written: Permission denied"),
        (0o700, None, [], "cannot be written: Permission denied"),
        (0o775, None, [0], "opened"),
        (0o775, 0o775, [0], "opened"),
        (0o775, 0o755, [0], "checkpoints"),  # which would fail with the first save
    ],
)
def test_the_directory_of_another_user(
    mode: int, mode_of_checkpoints: int | None, groups: list[int], outcome: str
) -> None:
    directory = Path(tempfile.mkdtemp())  # pytest's own are closed to others
    try:
        directory.chmod(mode)
        if mode_of_checkpoints is not None:
            (directory / "checkpoints").mkdir()
            (directory / "checkpoints").chmod(mode_of_checkpoints)
        context = multiprocessing.get_context("fork")
        answer = context.SimpleQueue()
        child = context.Process(target=opened_by, args=(NOBODY, groups, directory, answer))
        child.start()
        assert outcome in answer.get()
        child.join()
    finally:
        shutil.rmtree(directory)


def test_a_missing_parent_is_made_and_a_link_to_a_directory_is_followed(tmp_path: Path) -> None:
    with runs.open_run(tmp_path / "a" / "b" / "run"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "run")
    with runs.open_run(tmp_path / "link"):
        assert (tmp_path / "a" / "b" / "run" / ".lock").exists()


# ---- what dead owners left ----


def test_what_was_left_half_done_is_removed(tmp_path: Path) -> None:
    for name in (".saving-merged", ".saving-adapter-01234567", "checkpoints/.deleting-step-000002-01234567", "data"):
        (tmp_path / name / "below").mkdir(parents=True)
    for name in (".status.json.4711.tmp", ".recipe.yaml.1.tmp", ".lock.0123.tmp", ".mine", "status.json"):
        (tmp_path / name).touch()
    with runs.open_run(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "data", ".mine", "status.json"}
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"\xff\xfe", b"[1]", b'{"state": "runn'])
def test_a_status_that_a_power_cut_damaged_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "status.json").write_bytes(content)
    assert runs.read_status(tmp_path) == {}


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 200, b"\xff\xfe", b"[1]", b'{"kind": "tr{"kind": "train", "step": 3}']
)
def test_damaged_metrics_are_counted_and_left_out(tmp_path: Path, content: bytes) -> None:
    first, last = {"kind": "train", "step": 1}, {"kind": "train", "step": 2}
    lines = [json.dumps(first).encode(), content, json.dumps(last).encode(), b'{"kind": "train", "st']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    said: list[str] = []
    assert runs.read_metrics(tmp_path) == runs.rewind_metrics(tmp_path, 2, say=said.append) == [first, last]
    assert said == ["Damaged lines of metrics.jsonl, which are left out: 1; metrics.jsonl.corrupt has them all."]
    assert runs.rewind_metrics(tmp_path, 2, say=said.append) == [first, last] and len(said) == 1


# ---- what torch leaves when it is killed while it compiles ----


@pytest.mark.parametrize("is_given", [True, False], ids=["TORCH_EXTENSIONS_DIR", "default"])
def test_the_lock_of_a_killed_compilation_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_given: bool
) -> None:
    from torch.utils.cpp_extension import _get_build_directory
    from torch.utils.file_baton import FileBaton

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    if is_given:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    old, young, open_one = (Path(_get_build_directory(name, False), "lock") for name in ("old", "young", "open"))
    old.touch()
    young.touch()
    baton = FileBaton(str(open_one))
    assert baton.try_acquire()
    hour_ago = time.time() - 3600
    for path in (old, open_one):
        os.utime(path, (hour_ago, hour_ago))
    said: list[str] = []
    preflight.remove_stale_build_locks(said.append)
    assert (old.exists(), young.exists(), open_one.exists()) == (False, True, True)
    assert said == [f"{old} was left by a process that was killed while it compiled; it is removed."]
    assert [path.name for path in old.parent.iterdir()] == []
    baton.release()


# ---- who may read it ----


def modes(directory: Path) -> set[tuple[bool, int]]:
    """(is a directory, permissions) of everything in it, itself included."""
    found = [(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in (directory, *directory.rglob("*"))]
    return set(found)


@pytest.fixture(scope="module")
def finished(world: World) -> Path:
    """The directory of a run that leaves everything that a run can leave, with secrets in its environment."""
    recipe = world.recipe(
        "private", train={"max_steps": 3, "save_steps": 1}, run={"merge": True, "report_to": ["tensorboard"]}
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.chdir(Path(train.__file__).parent)
        for name, value in SECRETS.items():
            environment.setenv(name, value)
        launch(recipe, 2)
    return world.run_directory("private")


def test_a_run_is_its_users_alone(finished: Path) -> None:
    for part in ("merged", "adapter", "checkpoints", "data", "metrics.jsonl"):
        assert (finished / part).exists()
    assert list(finished.rglob("events.out.tfevents*"))
    assert modes(finished) == {(True, 0o700), (False, 0o600)}


def test_no_secret_is_written(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files for secret in SECRETS.values() if secret.encode() in path.read_bytes()]


def test_nothing_is_left_over(finished: Path) -> None:
    assert not list(finished.rglob(".*"))


def privately(directory: Path) -> None:
    """What a start does first, then what it fetches for all."""
    os.umask(0o022)
    keep_private(group_readable=False)
    with runs.open_run(directory / "runs" / "run"):
        (directory / "runs" / "run" / "file").touch()
    with as_at_start():
        (directory / "fetched").touch()


def test_what_users_may_share_is_made_as_it_would_be_without_a_run(tmp_path: Path) -> None:
    """The cache of the hub, and the directory in which others' runs may stand."""
    child = multiprocessing.get_context("fork").Process(target=privately, args=(tmp_path,))
    child.start()
    child.join()
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert found == {"runs": 0o755, "run": 0o700, "file": 0o600, "fetched": 0o644}


@pytest.mark.slow
def test_a_run_that_the_group_may_read(world: World) -> None:
    launch(world.recipe("shared", train={"max_steps": 2}, run={"merge": True, "group_readable": True}), 2)
    assert modes(world.run_directory("shared")) == {(True, 0o750), (False, 0o640)}


def test_a_finished_run_without_its_recipe_is_run_to_the_end_again(finished: Path, world: World) -> None:
    recipe = load_recipe(world.directory / "private.yaml")
    assert runs.is_finished(finished, dump_recipe(recipe))
    for damage in (b"\xff\xfe", None):
        if damage is None:
            (finished / "recipe.yaml").unlink()
        else:
            (finished / "recipe.yaml").write_bytes(damage)
        assert not runs.is_finished(finished, dump_recipe(recipe))


def test_ranks_of_a_job_that_was_refused_say_nothing_in_the_place_of_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lose their rank zero, and would tell that as the failure of the job that runs there."""
    monkeypatch.setenv("MASTER_PORT", "29500")
    runs.begin(tmp_path, 0, "recipe")
    runs.write_status(tmp_path, "running", "training")
    monkeypatch.setenv("MASTER_PORT", "29501")
    runs.write_failure(tmp_path, "the store is gone")
    assert runs.read_status(tmp_path)["state"] == "running"
    monkeypatch.setenv("MASTER_PORT", "29500")
    runs.write_failure(tmp_path, "no memory")
    assert runs.read_status(tmp_path)["reason"] == "rank 0: no memory"


def test_a_job_is_told_from_another_on_any_host(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"MASTER_ADDR": "node-7", "MASTER_PORT": "29500", "SLURM_JOB_ID": "12"}
    assert runs.this_job(node) == runs.this_job({**node, "RANK": "5", "LOCAL_RANK": "1"})
    assert runs.this_job(node) != runs.this_job(node | {"SLURM_RESTART_COUNT": "1"})
    local = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    here = runs.this_job(local)
    monkeypatch.setattr("platform.node", lambda: "another-host")
    assert runs.this_job(local) != here
