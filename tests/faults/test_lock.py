"""Whose a run directory is: the fault matrix, rows 12, 25 and 26."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import World, launch, run_ranks, start_ranks

import train
from launch import checkpoint, lock, runs
from launch.errors import RunInUseError
from launch.lock import Owner, Times

FORK = multiprocessing.get_context("fork")
QUICK = Times(beat_seconds=0.02, silent_seconds=600)


def in_child(function: Callable[..., None], *arguments: Any) -> Any:
    """A forked process that has just begun this; exit code 1 when it raises."""
    child = FORK.Process(target=function, args=arguments, daemon=True)
    child.start()
    return child


def hold(directory: Path, ready: Any, seconds: float = 60) -> None:
    """Own the directory, until it is killed or so much time has gone."""
    lock.acquire(directory, print, QUICK)
    ready.set()
    time.sleep(seconds)
    lock.release()


def held_by_child(directory: Path) -> Any:
    """A process that owns the directory."""
    ready = FORK.Event()
    child = in_child(hold, directory, ready)
    assert ready.wait(10)
    return child


def write_owner(directory: Path, owner: Owner, silent_seconds: float = 0) -> None:
    """As if this owner had been silent for so long."""
    path = directory / lock.NAME
    path.write_text(json.dumps(asdict(owner)), encoding="utf-8")
    now = time.time()  # of the same clock as that of a local file system
    os.utime(path, (now - silent_seconds, now - silent_seconds))


def elsewhere(**facts: Any) -> Owner:
    """An owner of whose process nothing can be seen from here."""
    return replace(Owner.this_process(), **({"host": "node7", "boot_id": "b"} | facts))


def take(directory: Path, times: Times = QUICK) -> str:
    """Take the lock and let it go; what was said."""
    said: list[str] = []
    lock.acquire(directory, said.append, times)
    assert [path.name for path in directory.iterdir()] == [lock.NAME]
    lock.release()
    assert not list(directory.iterdir())
    return "\n".join(said)


# ---- who may take over ----


def test_a_killed_owner_is_taken_over_at_once(tmp_path: Path) -> None:
    """Also while nobody has taken note of its end (a zombie)."""
    child = held_by_child(tmp_path)
    with pytest.raises(RunInUseError, match=rf"running in .*: process {child.pid} on .*; wait for it, or give this"):
        take(tmp_path)
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    said = take(tmp_path)
    assert f"was left by process {child.pid} on " in said and said.endswith(
        "that process is gone. This process takes over."
    )
    assert "\n" not in said


def test_an_owner_on_this_machine_that_is_stopped_is_alive(tmp_path: Path) -> None:
    child = held_by_child(tmp_path)
    os.kill(child.pid, signal.SIGSTOP)
    os.utime(tmp_path / lock.NAME, (0, 0))
    with pytest.raises(RunInUseError):
        take(tmp_path)
    child.kill()


def test_a_pid_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    own = Owner.this_process()
    write_owner(tmp_path, replace(own, start_ticks=own.start_ticks - 1, token="t"))
    assert "that process is gone" in take(tmp_path)


def test_the_lock_goes_with_the_block_however_it_ends(tmp_path: Path) -> None:
    for end in (KeyboardInterrupt, RunInUseError("x")):
        with contextlib.suppress(KeyboardInterrupt, RunInUseError), runs.open_run(tmp_path / "run"):
            assert (tmp_path / "run" / lock.NAME).exists()
            raise end
        assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("owner", "silent_seconds", "outcome"),
    [
        (elsewhere(), 500, None),
        (elsewhere(), 610, "it was last heard of 61"),
        (elsewhere(), -86_400, " s in the future"),  # the clock was set back
        (elsewhere(host=Owner.this_process().host), 0.5, "it was last heard of"),  # a reboot, many beats ago
        (elsewhere(host=Owner.this_process().host), 0, None),  # or another machine of the same name
        (replace(Owner.this_process(), pid_namespace="pid:[1]", pid=2**22 + 1), 500, None),  # a container's
    ],
)
def test_what_cannot_be_seen_is_dead_after_a_silence(
    tmp_path: Path, owner: Owner, silent_seconds: float, outcome: str | None
) -> None:
    write_owner(tmp_path, owner, silent_seconds)
    if outcome is None:
        with pytest.raises(RunInUseError, match="if you know it to be dead, start again in"):
            take(tmp_path, Times())
    else:
        assert outcome in take(tmp_path)


def test_an_owner_that_is_heard_in_spite_of_a_wrong_clock_is_alive(tmp_path: Path) -> None:
    write_owner(tmp_path, elsewhere(), -86_400)
    beats = threading.Timer(0.1, lambda: os.utime(tmp_path / lock.NAME))
    beats.start()
    with pytest.raises(RunInUseError):
        take(tmp_path, Times(beat_seconds=0.3))


@pytest.mark.parametrize("content", [b"", b"\0\0\0\0", b'{"host": "a"}', b"[]"])
def test_a_lock_that_says_nothing_need_not_be_removed_by_hand(tmp_path: Path, content: bytes) -> None:
    (tmp_path / lock.NAME).write_bytes(content)
    with pytest.raises(RunInUseError, match="an owner whose record cannot be read, last heard of"):
        take(tmp_path)
    os.utime(tmp_path / lock.NAME, (0, 0))
    assert "an owner whose record cannot be read" in take(tmp_path)


# ---- what Slurm knows ----


@pytest.mark.parametrize(
    ("job_id", "restart", "cluster", "outcome"),
    [
        ("12", "1", "one", "that job was requeued, and this is its next start"),
        ("12", "0", "one", None),
        ("13", "1", "one", None),
        ("12", "1", "two", None),
    ],
)
def test_a_requeued_job_takes_over_from_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job_id: str, restart: str, cluster: str, outcome: str | None
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job_id)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", cluster)
    write_owner(tmp_path, elsewhere(slurm_job_id="12", slurm_restart_count=0, slurm_cluster="one"))
    if outcome is None:
        with pytest.raises(RunInUseError, match="Slurm job 12"):
            take(tmp_path)
    else:
        assert outcome in take(tmp_path)


@pytest.mark.parametrize(
    ("squeue", "outcome"),
    [
        ("echo COMPLETED", "Slurm says that job is COMPLETED"),
        ("echo NODE_FAIL; echo CANCELLED", "Slurm says that job is NODE_FAIL"),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", "Slurm knows no such job any more"),
        ("echo RUNNING", None),
        ("echo COMPLETING", None),
        ("echo COMPLETED; echo RUNNING", None),  # an array
        ("true", None),
        ("echo slurm_load_jobs error: Unable to contact slurm controller '(connect failure)' >&2; exit 1", None),
    ],
)
def test_slurm_is_asked_about_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, outcome: str | None
) -> None:
    """By a program in the place of squeue, which says what Slurm's says."""
    programs, directory = tmp_path / "bin", tmp_path / "run"
    programs.mkdir()
    directory.mkdir()
    asked = '[ "$*" = "-h -t all -j 12 -o %T" ] || exit 3'
    (programs / "squeue").write_text(f"#!/bin/sh\n{asked}\n{squeue}\n", encoding="utf-8")
    (programs / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    write_owner(directory, elsewhere(slurm_job_id="12"))
    if outcome is None:
        with pytest.raises(RunInUseError):
            take(directory)
    else:
        assert outcome in take(directory)


# ---- many at once ----


def loiter(chance: random.Random) -> None:
    """Wait a little before every change of a file, so that processes overlap in all ways."""

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event in ("os.link", "os.rename", "os.remove", "open") and chance.random() < 0.3:
            time.sleep(chance.random() * 0.003)

    sys.addaudithook(hook)


def race(directory: Path, start: Any, end: Any, seed: int) -> None:
    """One newcomer; exit code 0 when it was refused, 3 when it got the directory."""
    loiter(random.Random(seed))
    start.wait()
    try:
        lock.acquire(directory, lambda text: None, QUICK)
    except RunInUseError:
        end.wait()
        os._exit(0)
    end.wait()  # until all have tried
    lock.end_if_lost()
    lock.release()
    os._exit(3)


@pytest.mark.parametrize("seed", range(3))
def test_of_many_newcomers_one_takes_over(tmp_path: Path, seed: int) -> None:
    write_owner(tmp_path, replace(Owner.this_process(), start_ticks=0))
    (tmp_path / ".lock.0123.tmp").touch()
    number = 12
    start, end = FORK.Barrier(number), FORK.Barrier(number)
    children = [in_child(race, tmp_path, start, end, 100 * seed + index) for index in range(number)]
    for child in children:
        child.join(60)
    assert sorted(child.exitcode for child in children) == [0] * (number - 1) + [3]
    assert not list(tmp_path.iterdir())


def come_and_go(directory: Path, seed: int, until: float) -> None:
    """Own the directory again and again, sometimes to the death; exit code 4 when somebody else was there, too."""
    chance = random.Random(seed)
    loiter(chance)
    inside = directory.with_name("inside")
    while time.monotonic() < until:
        try:
            lock.acquire(directory, lambda text: None, QUICK)
        except RunInUseError:
            continue
        try:
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            os._exit(4)
        lock.end_if_lost()
        with directory.with_name("turns").open("ab") as file:
            file.write(b".")
        inside.unlink()
        if chance.random() < 0.3:
            os.kill(os.getpid(), signal.SIGKILL)
        lock.release()
    os._exit(0)


@pytest.mark.parametrize("seconds", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_there_is_never_more_than_one_owner(tmp_path: Path, seconds: float) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    until, seed = time.monotonic() + seconds, 0
    children: list[Any] = []
    while time.monotonic() < until:
        while len(children) < 6:
            seed += 1
            children.append(in_child(come_and_go, directory, seed, until))
        for child in [child for child in children if not child.is_alive()]:
            assert child.exitcode in (0, -signal.SIGKILL)
            children.remove(child)
        time.sleep(0.01)
    for child in children:
        child.join(60)
        assert child.exitcode in (0, -signal.SIGKILL)
    assert (tmp_path / "turns").stat().st_size > 1, "somebody gets on"


# ---- an owner that was taken for dead ----


def test_who_has_lost_the_lock_ends_at_once_and_leaves_the_other_one_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    child = held_by_child(tmp_path)
    record = json.loads((tmp_path / lock.NAME).read_text(encoding="utf-8"))
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    write_owner(tmp_path, Owner(**(record | {"host": "node7"})), 1000)  # as another host would see it
    lock.acquire(tmp_path, print, QUICK)
    os.kill(child.pid, signal.SIGCONT)
    child.join(10)
    assert child.exitcode == 1
    assert f"was taken over by process {os.getpid()} on " in capfd.readouterr().err
    lock.end_if_lost()  # this one has it
    lock.release()


def measure_what_is_lost(directory: Path) -> None:
    lock.acquire(directory, print, QUICK)
    (directory / lock.NAME).unlink()
    runs.append_metrics(directory, {"kind": "train", "step": 1})
    os._exit(3)


def test_who_has_lost_the_lock_measures_nothing_more(tmp_path: Path) -> None:
    """Its next start, on another node, makes the same steps and writes the same lines."""
    child = in_child(measure_what_is_lost, tmp_path)
    child.join(10)
    assert child.exitcode == 1 and not (tmp_path / "metrics.jsonl").exists()


def test_a_sign_of_life_is_given(tmp_path: Path) -> None:
    child, path = held_by_child(tmp_path), tmp_path / lock.NAME
    os.utime(path, (0, 0))
    for _ in range(1000):
        if lock.seconds_since(path.stat().st_mtime_ns, tmp_path) < 60:
            break
        time.sleep(0.01)
    else:
        raise AssertionError("the lock was not touched")
    child.kill()


def publish_after_loss(directory: Path) -> None:
    lock.acquire(directory, print)  # beats every 30 s: the check before the rename has to notice
    (directory / lock.NAME).unlink()
    write_owner(directory, elsewhere())
    checkpoint.publish(directory / "step-000001", lambda path: (path / "a").touch(), {})


def test_who_has_lost_the_lock_publishes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    child = in_child(publish_after_loss, tmp_path)
    child.join(10)
    assert child.exitcode == 1
    assert "was taken over by process" in capfd.readouterr().err
    assert not (tmp_path / "step-000001").exists()


# ---- two jobs, whole ----


def waiting_in_step_2(go: Path, arguments: list[str]) -> int:
    """train.py's main; before its second step it waits for the file."""
    real_step, steps = train.engines.step, 0

    def step(*given: Any) -> tuple[float, bool]:
        nonlocal steps
        steps += 1
        if steps == 2:
            go.with_suffix(".reached").touch()
            while not go.exists():
                time.sleep(0.02)
        return real_step(*given)

    train.engines.step = step
    return train.main(arguments)


def a_run_in_step_2(world: World, name: str) -> tuple[Path, Any, Path]:
    """(the recipe, rank zero's process and pipe, the file for which it waits)."""
    recipe, go = world.recipe(name), world.directory / f"{name}.go"
    (first,) = start_ranks(1, waiting_in_step_2, go, [str(recipe)])
    for _ in range(3000):
        if go.with_suffix(".reached").exists():
            return recipe, first, go
        time.sleep(0.02)
    raise AssertionError("the first run never got to its second step")


def test_a_second_job_is_refused_and_takes_over_when_the_first_was_killed(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, (first, _), _ = a_run_in_step_2(world, "two")
    directory = world.run_directory("two")
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    assert f"Refused: Another process is running in {directory}: process {first.pid} on " in capfd.readouterr().err
    assert before == {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    first.kill()
    first.join()
    launch(recipe, 1)
    said = capfd.readouterr().out
    assert said.count(f"was left by process {first.pid} on ") == 1 and "This process takes over." in said
    assert runs.read_status(directory)["state"] == "finished"
    assert not (directory / lock.NAME).exists()


@pytest.mark.slow
def test_the_first_job_goes_on_as_if_there_had_been_no_second(world: World) -> None:
    recipe, (_, pipe), go = a_run_in_step_2(world, "unharmed")
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    go.touch()
    assert pipe.poll(120) and pipe.recv() == (True, 0)
    assert runs.read_status(world.run_directory("unharmed"))["state"] == "finished"
