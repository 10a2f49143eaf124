"""The ways that a process ends: killed in each part of a step, by itself, with a full disk (rows 1 to 3, 27, 32)."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World, launch, run_ranks
from safetensors.torch import load_file
from test_bad_steps import SETTINGS as BAD
from test_bad_steps import poisoned

import train
from launch import engine as engines
from launch import job, lock, preemption, runs
from launch.checkpoint import path_of_step
from launch.report import RunLog
from launch.watchdog import Watchdog

SETTINGS = {"max_steps": 6, "save_steps": 2, "save_seconds": 1e6, "max_tokens_per_micro_batch": 128}
# In the fourth step: a forward, a backward, before the update, after it and before the reduction, after that. Five
# forwards and five reductions came before the first one, in the trials of the network and of the largest micro-batches.
PLACES: dict[str, tuple[Any, str, int]] = {
    "forward": (job, "batch_loss", 16),
    "backward": (engines, "backward", 9),
    "update": (engines, "step", 4),
    "reduction": (torch.distributed, "all_reduce", 17),
    "count": (RunLog, "step", 4),
}


@pytest.fixture(scope="module")
def straight(world: World) -> dict[str, torch.Tensor]:
    launch(world.recipe("straight", train=SETTINGS), 2)
    return load_file(path_of_step(world.run_directory("straight"), 6) / "optimizer.safetensors")


def killed_at(place: str, arguments: list[str]) -> int:
    """train.py's main; the last rank kills itself there."""
    module, name, call = PLACES[place]
    real: Callable[..., Any] = getattr(module, name)
    calls = 0

    def watched(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)

    setattr(module, name, watched)
    return train.main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_rank_killed_in_any_part_of_a_step_costs_no_update(
    world: World, straight: dict[str, torch.Tensor], place: str
) -> None:
    recipe = world.recipe(f"killed-in-{place}", train=SETTINGS)
    with pytest.raises(AssertionError, match=r"exit code -9|[Cc]onnection|gloo/transport"):
        run_ranks(2, killed_at, place, [str(recipe)])
    directory = world.run_directory(recipe.stem)
    assert not path_of_step(directory, 6).exists(), "it was killed before the end"
    status = runs.read_status(directory)
    assert (status["state"], status["may_go_on"]) == ("failed", True), "the peer's death is no fault of the run"
    launch(recipe, 2)
    found = load_file(path_of_step(directory, 6) / "optimizer.safetensors")
    assert all(torch.equal(found[name], straight[name]) for name in straight)
    assert [record["step"] for record in world.metrics(recipe.stem, "train")] == [1, 2, 3, 4, 5, 6]


def late_to_the_end(arguments: list[str]) -> int:
    """train.py's main; the last rank asks late which step was chosen."""
    real = engines.after_rank_zero

    def late(what: str, *work: Callable[[], str]) -> str:
        if what == "choose" and os.environ["RANK"] == "1":
            time.sleep(1.5)
        return real(what, *work)

    engines.after_rank_zero = late
    return train.main(arguments)


@pytest.mark.slow
def test_a_rank_that_is_late_at_the_end_still_finds_the_others(world: World) -> None:
    """Rank zero may be the server of the store in which they meet."""
    assert run_ranks(2, late_to_the_end, [str(world.recipe("late", train={"max_steps": 1}))]) == [0, 0]


# ---- ends that need no rank ----


def forked(function: Callable[[], None]) -> int:
    """Exit code of a process that does this, or 99 when it is still there after five seconds."""
    child = os.fork()
    if child == 0:
        function()
        time.sleep(10)
        os._exit(98)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 99


def no_room(*given: str) -> None:
    raise OSError("No space left on device")


@pytest.mark.filterwarnings("ignore")
def test_whoever_was_asked_to_end_ends_when_no_word_can_be_written(tmp_path: Path) -> None:
    def before_the_first_step() -> None:
        preemption.end_when_asked(no_room)
        os.kill(os.getpid(), signal.SIGTERM)

    def interrupted_twice() -> None:
        preemption.remember_signals(no_room)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.2)

    def hung() -> None:
        (tmp_path / "logs").write_text("a file in the place of the directory", encoding="utf-8")
        Watchdog(0.3, tmp_path / "logs" / "stacks.txt", no_room)

    assert [forked(end) for end in (before_the_first_step, interrupted_twice, hung)] == [143, 130, 1]


@pytest.mark.slow
def test_a_job_that_was_suspended_is_no_hang(tmp_path: Path) -> None:
    """It stood still for longer than it may be silent, and goes on."""
    child = os.fork()
    if child == 0:
        watchdog = Watchdog(1.5, tmp_path / "stacks.txt", lambda reason: None)
        for _ in range(30):
            time.sleep(0.1)
            watchdog.hear()
        os._exit(7)
    time.sleep(0.5)
    os.kill(child, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not (tmp_path / "stacks.txt").exists()


def test_who_ends_at_once_leaves_no_lock(tmp_path: Path) -> None:
    """On another host nobody could know that the process is gone."""

    def ends(leave: Callable[[], None]) -> None:
        lock.acquire(tmp_path, print)
        runs.begin(tmp_path, 0, "recipe")
        leave()
        os._exit(1)

    def failed() -> None:
        ends(lambda: runs.leave_hung(tmp_path, "no progress"))

    def stopped() -> None:
        ends(lambda: runs.leave(tmp_path, "preempted", "interrupted twice"))

    for end, state in ((failed, "failed"), (stopped, "preempted")):
        assert forked(end) == 1
        assert runs.read_status(tmp_path)["state"] == state
        assert not (tmp_path / lock.NAME).exists()


def test_an_evaluation_that_is_left_twice_is_given_up() -> None:
    left = {"kind": "left evaluation", "step": 4}
    known = {"kind": "evaluation", "step": 2, "loss": 1.0, "token_accuracy": 0.5}
    assert runs.known_evaluations([], [known, left]) == [known]
    given_up = {"step": 4, "loss": None, "token_accuracy": None}
    assert runs.known_evaluations([], [known, left, left]) == [known, given_up]
    assert runs.best_step([known, given_up], "loss") == 2


def bad_steps(failed: Path, arguments: list[str]) -> int:
    """Too many of them; the last rank gets SIGTERM, as from its launcher, when rank zero has failed."""
    if os.environ["RANK"] == "1" and os.fork() == 0:
        rank = os.getppid()
        while os.getppid() == rank and not failed.exists():
            time.sleep(0.1)
        time.sleep(1)  # it is waiting by now
        os.kill(rank, signal.SIGTERM)
        os._exit(0)
    exit_code = poisoned(range(3, 7), "fp32", arguments)
    failed.touch()
    return exit_code


@pytest.mark.slow
def test_too_many_bad_steps_are_told_by_rank_zero_alone(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The others know of no checkpoint, and end when the launcher says so."""
    recipe = world.recipe("bad-on-two", train=BAD)
    start = time.monotonic()
    with pytest.raises(AssertionError, match="exit code -15"):
        run_ranks(2, bad_steps, tmp_path / "failed", [str(recipe)])
    assert time.monotonic() - start < 60
    said = capfd.readouterr().err
    assert said.count("steps were skipped") == 1 and "the last good checkpoint is that of step 4" in said
