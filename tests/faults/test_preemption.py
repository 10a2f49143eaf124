"""Signals at every stage of a run: the fault matrix, rows 8 to 13, 15, 32 and 34."""

import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ROOT, World, launch, run_ranks
from safetensors.torch import load_file
from test_launch import command, ranks_of, wait_until
from test_resume import stop_at

import train
from launch import checkpoint as checkpoints
from launch import data, finish, job, runs
from launch.checkpoint import checkpoints_directory, path_of_step

THRICE = [signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM]
SETTINGS = {"max_steps": 6, "save_steps": 3, "eval_steps": 2, "max_tokens_per_micro_batch": 128}


def signalled_at(name: str, call: int, numbers: list[int], module: Any, arguments: list[str]) -> int:
    """train.py's main; the last rank gets these signals before the `call`th call of `module.name`."""
    real: Callable[..., Any] = getattr(module, name)
    calls = 0

    def watched(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            for number in numbers:
                os.kill(os.getpid(), number)
            time.sleep(0.2)
        return real(*given, **named)

    setattr(module, name, watched)
    return train.main(arguments)


@pytest.fixture(scope="module")
def straight(world: World) -> dict[str, torch.Tensor]:
    launch(world.recipe("straight", train=SETTINGS), 2)
    return load_file(path_of_step(world.run_directory("straight"), 6) / "optimizer.safetensors")


@pytest.mark.parametrize(
    ("name", "module", "call", "numbers", "step"),
    [
        pytest.param("evaluate", train, 2, [signal.SIGTERM], 2, marks=pytest.mark.slow),
        pytest.param("evaluate", train, 1, [signal.SIGTERM], 0, marks=pytest.mark.slow),
        pytest.param("evaluate", train, 4, [signal.SIGTERM], 6, marks=pytest.mark.slow),
        pytest.param("batch_loss", job, 17, THRICE, None, marks=pytest.mark.slow),
    ],
    ids=["evaluation", "first evaluation", "last evaluation", "within a step, thrice"],
)
def test_a_stop_in_the_middle_loses_nothing(
    world: World,
    straight: dict[str, torch.Tensor],
    name: str,
    module: Any,
    call: int,
    numbers: list[int],
    step: int | None,
) -> None:
    recipe = world.recipe(f"stopped-{name}-{call}", train=SETTINGS)
    directory = world.run_directory(recipe.stem)
    assert run_ranks(2, signalled_at, name, call, numbers, module, [str(recipe)]) == [0, 0]
    status = runs.read_status(directory)
    assert status["state"] == "preempted"
    assert step in (None, status["step"])
    launch(recipe, 2)
    found = load_file(path_of_step(directory, 6) / "optimizer.safetensors")
    assert all(torch.equal(found[key], straight[key]) for key in straight)
    ours, theirs = world.metrics(recipe.stem, "evaluation"), world.metrics("straight", "evaluation")
    assert [(r["step"], r["loss"]) for r in ours] == [(r["step"], r["loss"]) for r in theirs]


def stopped_dead(step: int, arguments: list[str]) -> int:
    """train.py's main; the last rank stops itself, as a debugger or a bad node would, before it makes this step."""
    real_step, steps = train.engines.step, 0

    def watched_step(*given: Any) -> tuple[float, bool]:
        nonlocal steps
        steps += 1
        if steps == step and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            os.kill(os.getpid(), signal.SIGSTOP)
        return real_step(*given)

    train.engines.step = watched_step
    return train.main(arguments)


@pytest.mark.slow
def test_a_rank_that_waits_for_a_stopped_one_ends_with_its_stacks(world: World) -> None:
    recipe = world.recipe("hung", train=SETTINGS, run={"hang_seconds": 3})
    start = time.monotonic()
    with pytest.raises(AssertionError, match="exit code 1 and no result"):
        run_ranks(2, stopped_dead, 3, [str(recipe)])
    assert time.monotonic() - start < 60
    directory = world.run_directory("hung")
    status = runs.read_status(directory)
    assert status["state"] == "failed"
    told = re.match(r"rank 0: no progress for (\d+) s; the stacks are in ", status["reason"])
    assert told and 3 <= int(told[1]) < 10, status["reason"]
    stacks = (directory / "logs" / "stacks-of-rank-0.txt").read_text(encoding="utf-8")
    assert "in optimizer_steps" in stacks
    launch(recipe, 2)
    assert runs.read_status(directory)["state"] == "finished"


def ended_in_the_merge(arguments: list[str]) -> None:
    signalled_at("merge", 1, [signal.SIGTERM], finish.merging, arguments)


@pytest.mark.slow
def test_a_stop_during_the_merge_leaves_the_merge_to_do(world: World) -> None:
    recipe = world.recipe("merging", train=SETTINGS, run={"merge": True})
    with pytest.raises(AssertionError, match="exit code 143"):
        run_ranks(1, ended_in_the_merge, [str(recipe)])
    directory = world.run_directory("merging")
    status = runs.read_status(directory)
    assert (status["state"], status["reason"]) == ("preempted", "asked to stop while merging; every step is saved")
    assert not (directory / "merged").exists()
    assert not (directory / ".lock").exists()
    launch(recipe, 1)
    assert (directory / "merged" / "model.safetensors").exists()
    assert runs.read_status(directory)["state"] == "finished"


def ended_in_preparation(arguments: list[str]) -> None:
    signalled_at("publish", 1, [signal.SIGTERM], data.Prepared, arguments)


def test_a_stop_before_the_first_step_ends_at_once(world: World) -> None:
    recipe = world.recipe("early", train=SETTINGS)
    start = time.monotonic()
    with pytest.raises(AssertionError, match="exit code 143"):
        run_ranks(1, ended_in_preparation, [str(recipe)])
    assert time.monotonic() - start < 20
    directory = world.run_directory("early")
    status = runs.read_status(directory)
    assert (status["state"], status["reason"]) == (
        "preempted",
        "asked to stop before the first step; there was nothing to save yet",
    )
    assert not checkpoints_directory(directory).exists()
    assert not (directory / ".lock").exists(), "on another host nobody would know that its owner has ended"
    launch(recipe, 1)
    assert runs.read_status(directory)["state"] == "finished"


def interrupted_within(seconds: float, arguments: list[str]) -> None:
    """train.py's main; the third step is a long call into C, in which Ctrl-C comes twice, so far apart."""
    real_step, steps = train.engines.step, 0

    def stuck_step(*given: Any) -> tuple[float, bool]:
        nonlocal steps
        steps += 1
        if steps == 3:
            parent = os.getpid()
            if os.fork() == 0:
                for _ in range(2):
                    os.kill(parent, signal.SIGINT)
                    time.sleep(seconds)
                os._exit(0)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # other threads get it, this one sleeps on
            ctypes.CDLL(None).sleep(5)
        return real_step(*given)

    train.engines.step = stuck_step
    train.main(arguments)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(world: World) -> None:
    recipe = world.recipe("interrupted", train=SETTINGS)
    directory = world.run_directory("interrupted")
    run_ranks(1, interrupted_within, 0.3, [str(recipe)])  # the terminal's and the launcher's
    status = runs.read_status(directory)
    assert (status["state"], status["step"]) == ("preempted", 3)
    recipe = world.recipe("interrupted-twice", train=SETTINGS)
    directory = world.run_directory("interrupted-twice")
    with pytest.raises(AssertionError, match="exit code 130"):
        run_ranks(1, interrupted_within, 1.5, [str(recipe)])
    status = runs.read_status(directory)
    assert status["state"] == "preempted" and status["reason"].startswith("interrupted twice, so it ended at once")
    launch(recipe, 1)
    assert runs.read_status(directory)["state"] == "finished"


@pytest.mark.slow
def test_a_stop_during_a_save_waits_for_it_and_saves_each_step_once(
    world: World, straight: dict[str, torch.Tensor]
) -> None:
    recipe = world.recipe("saving", train=SETTINGS)
    directory = world.run_directory("saving")
    numbers = [signal.SIGTERM]
    assert run_ranks(2, signalled_at, "take_snapshot", 1, numbers, checkpoints, [str(recipe)]) == [0, 0]
    step = runs.read_status(directory)["step"]
    saved = [record["step"] for record in world.metrics("saving", "written")]
    assert saved == [3, step] and step == 4
    assert [path.name for path in sorted(checkpoints_directory(directory).iterdir())] == ["step-000003", "step-000004"]
    launch(recipe, 2)
    found = load_file(path_of_step(directory, 6) / "optimizer.safetensors")
    assert all(torch.equal(found[key], straight[key]) for key in straight)


@pytest.mark.slow
def test_stopped_in_the_last_step_only_what_is_left_is_done(world: World) -> None:
    recipe = world.recipe("at-the-end", train=SETTINGS, run={"merge": True})
    directory = world.run_directory("at-the-end")
    run_ranks(1, stop_at, 6, [str(recipe)])
    status = runs.read_status(directory)
    assert (status["state"], status["step"]) == ("preempted", 6)
    assert not (directory / "merged").exists()
    ((exit_code, steps),) = run_ranks(1, stop_at, 0, [str(recipe)])
    assert (exit_code, steps) == (0, [])
    assert runs.read_status(directory)["state"] == "finished"
    assert (directory / "merged" / "model.safetensors").exists()
    assert [record["step"] for record in world.metrics("at-the-end", "evaluation")] == [0, 2, 4, 6]


@pytest.mark.slow
def test_usr1_through_a_job_wrapper_stops_as_sigterm_does(world: World) -> None:
    """A launcher that does not ignore USR1 dies of it, and torch's does not."""
    recipe = world.recipe("usr1", train={"max_steps": 400, "save_steps": 10})
    directory = world.run_directory("usr1")
    wrapped = ["bash", "-c", "trap '' USR1; exec \"$@\"", "job", *command(), "--num_processes", "2", "train.py"]
    process = subprocess.Popen([*wrapped, str(recipe)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until(path_of_step(directory, 10).exists, 300, "a checkpoint")
    for member in [process.pid, *ranks_of(recipe)]:  # as Slurm does
        os.kill(member, signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert runs.read_status(directory)["state"] == "preempted"
    assert not ranks_of(recipe)
