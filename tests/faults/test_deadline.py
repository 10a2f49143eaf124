"""Stops that have too little time, and starts that come no further: the fault matrix, rows 14 and 33."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World, launch, run_ranks
from safetensors.torch import load_file
from test_preemption import SETTINGS, signalled_at

import train
from launch import checkpoint as checkpoints
from launch import job, runs
from launch.checkpoint import checkpoints_directory, path_of_step
from launch.deadline import Deadline
from launch.errors import NoProgressError

SAVES_OFTEN = SETTINGS | {"save_steps": 2, "eval_steps": 100}


def weights(world: World, name: str) -> dict[str, torch.Tensor]:
    return load_file(path_of_step(world.run_directory(name), 6) / "optimizer.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- the time between SIGTERM and SIGKILL ----


def test_the_smaller_of_launcher_and_cluster_counts() -> None:
    assert Deadline(None, {}).budget_line() == "30 s from SIGTERM to SIGKILL (TORCH_ELASTIC_SHUTDOWN_TIMEOUT)"
    long_launcher = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"}
    assert Deadline(None, long_launcher).grace_seconds == 300
    assert Deadline(120, long_launcher).budget_line() == "120 s from SIGTERM to SIGKILL (run.grace_seconds)"
    assert Deadline(120, {}).grace_seconds == 30


def test_under_slurm_its_usual_wait_counts_until_the_recipe_says_more() -> None:
    job = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300", "SLURM_JOB_ID": "7"}
    assert (
        Deadline(None, job).budget_line().startswith("30 s from SIGTERM to SIGKILL (Slurm's usual KillWait; set run.")
    )
    assert Deadline(120, job).grace_seconds == 120


def test_a_warning_names_what_a_stop_would_lose() -> None:
    deadline = Deadline(20, {})
    assert deadline.warning() == ""
    deadline.recall(
        [
            {"kind": "train", "longest_step_seconds": 12.0},
            {"kind": "save", "stall_seconds": 1.0},
            {"kind": "written", "seconds": 9.0},
        ]
    )
    assert "A step and a save take 22.0 s, but a stop is given 20.0 s (run.grace_seconds)" in deadline.warning()
    assert "may lose the step that it comes in; give it more" in deadline.warning()
    deadline.saves.add(25)
    assert deadline.warning().startswith("A save takes 25.0 s")
    assert "may lose what was done since the last save" in deadline.warning()


def test_one_step_on_a_bad_day_decides_nothing() -> None:
    """In a job of an hour it would otherwise be the end of each start after one step."""
    deadline = Deadline(None, {"SLURM_JOB_END_TIME": str(time.time() + 3600)})
    deadline.recall([{"kind": "train", "longest_step_seconds": seconds} for seconds in (3, 1850, 3, 3)])
    assert deadline.steps.seconds == 3 and not deadline.is_near() and not deadline.is_tight
    deadline.steps.add(9)
    assert deadline.steps.seconds == 9, "what an earlier start measured may have been on other ranks"


def test_a_step_is_dropped_only_when_its_rest_does_not_fit() -> None:
    deadline = Deadline(20, {})
    deadline.steps.add(16)
    deadline.saves.add(8)
    assert deadline.is_tight
    assert deadline.drops_step(share_left=1.0, heard_seconds=0)
    assert not deadline.drops_step(share_left=0.5, heard_seconds=0)
    assert deadline.drops_step(share_left=0.5, heard_seconds=5)


@pytest.mark.slow
def test_a_stop_without_time_for_the_step_saves_the_one_before_it(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same signal with time enough ends the step that it comes in."""
    launch(world.recipe("straight", train=SAVES_OFTEN), 2)
    stopped_at = {}
    for grace_seconds in (0.001, 60.0):
        name = f"grace-{grace_seconds}"
        recipe = world.recipe(name, train=SAVES_OFTEN, run={"grace_seconds": grace_seconds})
        # the 16th loss is not the last one of its step
        assert run_ranks(2, signalled_at, "batch_loss", 16, [signal.SIGTERM], job, [str(recipe)]) == [0, 0]
        stopped_at[grace_seconds] = runs.read_status(world.run_directory(name))["step"]
        said = capfd.readouterr().out
        assert ("so it may lose" in said) == (grace_seconds < 1)
        launch(recipe, 2)
        assert ("so it may lose" in capfd.readouterr().out) == (grace_seconds < 1), "from the start, the next time"
        assert_equal(weights(world, name), weights(world, "straight"))
    assert stopped_at[0.001] == stopped_at[60.0] - 1 > 0


def killed_in_the_save_of_the_stop(arguments: list[str]) -> int:
    """train.py's main; SIGTERM in the fifth step, and SIGKILL when half of what is then saved is written."""
    real = checkpoints.save_file

    def save_file(*given: Any, **named: Any) -> None:
        if "step-000005" in str(given[1]) and "adapter_model" in str(given[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        real(*given, **named)

    checkpoints.save_file = save_file
    return signalled_at("step", 5, [signal.SIGTERM], train.engines, arguments)


@pytest.mark.slow
def test_killed_in_the_middle_of_the_last_save_the_one_before_it_is_used(world: World) -> None:
    launch(world.recipe("alone", train=SAVES_OFTEN), 1)
    recipe = world.recipe("no-time", train=SAVES_OFTEN)
    with pytest.raises(AssertionError, match="exit code -9"):
        run_ranks(1, killed_in_the_save_of_the_stop, [str(recipe)])
    directory = checkpoints_directory(world.run_directory("no-time"))
    half_written, *whole = sorted(path.name for path in directory.iterdir())
    assert half_written.startswith(".saving-step-000005-") and whole == ["step-000002", "step-000004"]
    launch(recipe, 1)
    assert sorted(path.name for path in directory.iterdir()) == ["step-000004", "step-000006"]
    assert_equal(weights(world, "no-time"), weights(world, "alone"))


# ---- the end of the job ----


def test_nothing_begins_that_cannot_end_before_the_job() -> None:
    deadline = Deadline(None, {"SLURM_JOB_END_TIME": str(time.time() + 100)})
    assert "; the job ends in 2 min" in deadline.budget_line()
    unlimited = Deadline(None, {"SLURM_JOB_END_TIME": str(time.time() + 365 * 86400)})
    assert "ends" not in unlimited.budget_line(), "what Slurm says of a job without a limit"
    deadline.recall([{"kind": "evaluation", "seconds": 90.0}, {"kind": "train", "longest_step_seconds": 4.0}])
    deadline.saves.add(1)
    assert not deadline.is_near() and not deadline.is_near(evaluation=True)
    deadline.saves.add(20)
    deadline.saves.add(20)
    assert not deadline.is_near() and deadline.is_near(evaluation=True)
    deadline.steps.add(46)
    assert deadline.is_near()


def ending_soon(seconds: float, arguments: list[str]) -> float:
    """train.py's main in a job that ends so many seconds after its engine is made; the seconds that were left."""
    real_step, end = train.engines.step, 0.0

    def deadline(grace_seconds: float | None) -> Deadline:
        nonlocal end
        end = time.time() + seconds
        return Deadline(grace_seconds, {"SLURM_JOB_END_TIME": str(end)})

    def slow_step(*given: Any) -> tuple[float, bool]:
        time.sleep(1.0)
        return real_step(*given)

    train.Deadline, train.engines.step = deadline, slow_step
    assert train.main(arguments) == 0
    return end - time.time()


@pytest.mark.slow
def test_a_run_stops_by_itself_before_its_job_ends(world: World) -> None:
    recipe = world.recipe("limited", train=SETTINGS | {"max_steps": 60, "eval_steps": 100})
    left = run_ranks(2, ending_soon, 12.0, [str(recipe)])
    assert min(left) > 0, "all was saved before the end"
    status = runs.read_status(world.run_directory("limited"))
    assert status["state"] == "preempted" and 1 < status["step"] < 60
    assert status["reason"] == f"the job ends soon; step {status['step']} is saved"
    assert path_of_step(world.run_directory("limited"), status["step"]).is_dir()


# ---- starts that come no further ----


def killed_while_preparing(arguments: list[str]) -> int:
    train.prepare_run = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
    return train.main(arguments)


def test_three_restarts_in_vain_are_the_last(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe("in-vain", train={"max_steps": 2})
    directory = world.run_directory("in-vain")
    for _ in range(4):
        with pytest.raises(AssertionError, match="exit code -9"):
            run_ranks(1, killed_while_preparing, [str(recipe)])
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    said = "No progress: 3 restarts in a row left nothing newer than step 0; the last one was killed. Look"
    assert said in capfd.readouterr().err
    assert runs.read_status(directory)["state"] == "no progress"
    launch(recipe, 1)  # somebody has looked, and gives the same command
    assert runs.read_status(directory)["state"] == "finished"


@pytest.mark.parametrize(
    ("ends", "is_over"),
    [
        (["failed"] * 4, True),
        (["running", "starting", "failed", "running"], True),
        (["failed", "refused", "failed", "failed"], False),
        (["preempted"] * 9, False),  # before the first step, by the cluster
        (["preempted, in the loop"] * 4, True),
        (["failed", "failed", "a new step", "failed", "failed"], False),
        (["failed", "failed", "a new step", "failed", "failed", "failed", "failed"], True),
        (["failed"] * 4 + ["no progress", "failed", "failed"], False),
        (["failed"] * 4 + ["another recipe"], False),
    ],
)
def test_what_counts_as_a_restart_in_vain(tmp_path: Path, ends: list[str], is_over: bool) -> None:
    step, recipe = 0, "recipe"
    for end in ends:
        if end == "another recipe":
            recipe = end
            continue
        try:
            runs.begin(tmp_path, step, recipe)
        except NoProgressError:
            assert end == "no progress"
        if end == "a new step":
            step += 5
            runs.write_status(tmp_path, "running", "training")
        else:
            state, _, in_the_loop = end.partition(", ")
            runs.write_status(tmp_path, state, "", **({"step": step} if in_the_loop else {}))  # type: ignore[arg-type]
    if is_over:
        with pytest.raises(NoProgressError, match=f"nothing newer than step {step}"):
            runs.begin(tmp_path, step, recipe)
    else:
        runs.begin(tmp_path, step, recipe)
