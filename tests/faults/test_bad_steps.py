"""Gradients that are not finite: the fault matrix, rows 27 and 28 (the scaler's own state is in test_resume.py)."""

import math
import os
import shutil
from typing import Any

import pytest
import torch
from conftest import World, deepspeed_json, run_ranks
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from safetensors.torch import load_file, save_file

import train
from launch import job, runs
from launch.checkpoint import path_of_step

SETTINGS = {"max_steps": 6, "save_steps": 2, "max_bad_steps": 3}
FIRST_GRADIENT = (
    "every output is finite, but a gradient is not: from the loss back, first that of the output of lm_head (Linear)"
)


def poisoned(steps: range, precision: str, arguments: list[str]) -> int:
    """train.py's main; in these steps (from 1) the last rank's loss is not a number."""
    real_step, real_loss = train.engines.step, job.batch_loss
    done = 0

    def counted_step(*given: Any) -> tuple[float, bool]:
        nonlocal done
        done += 1
        return real_step(*given)

    def poisoned_loss(*given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, sums = real_loss(*given, **named)
        is_poisoned = done + 1 in steps and loss.requires_grad
        if is_poisoned and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            return loss * math.nan, sums + torch.tensor([math.nan, 0, 0])
        return loss, sums

    train.engines.step, job.batch_loss = counted_step, poisoned_loss
    if precision == "fp16":
        CPU_Accelerator.is_fp16_supported = lambda self: True
    return train.main([*arguments, f"train.precision={precision}"])


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (3, "fp32"),
        pytest.param(3, "bf16", marks=pytest.mark.slow),
        pytest.param(2, "fp32", marks=pytest.mark.slow),
        pytest.param(2, "bf16", marks=pytest.mark.slow),  # what was not finite stayed in DeepSpeed's buffers
    ],
)
def test_one_bad_step_is_shown_counted_and_skipped_by_all_ranks(world: World, stage: int, precision: str) -> None:
    name = f"one-{stage}-{precision}"
    recipe, config = world.recipe(name, train=SETTINGS), deepspeed_json(world.directory, stage)
    assert run_ranks(2, poisoned, range(3, 4), precision, [str(recipe)], deepspeed=config) == [0, 0]
    curve = world.metrics(name, "train")
    assert [record["step"] for record in curve if record["loss"] is None] == [3]
    assert [record["skipped_steps"] for record in curve] == [0, 0, 1, 1, 1, 1]
    weights = load_file(path_of_step(world.run_directory(name), 6) / "optimizer.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert runs.read_status(world.run_directory(name))["state"] == "finished"


def test_bad_steps_in_a_row_end_the_run(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe("many", train=SETTINGS)
    assert run_ranks(1, poisoned, range(3, 7), "fp32", [str(recipe)]) == [1]
    captured = capfd.readouterr()
    assert "loss    nan" in captured.out
    assert f"Failed: The last 3 steps were skipped, since {FIRST_GRADIENT}; lower train.learning_rate" in captured.err
    assert "the last good checkpoint is that of step 4" in captured.err
    assert runs.read_status(world.run_directory("many"))["state"] == "failed"


@pytest.mark.slow
def test_rank_zero_tells_what_another_rank_found(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe("other-rank", train={"max_steps": 4})
    assert run_ranks(2, poisoned, range(1, 5), "fp32", [str(recipe)]) == [0, 0]
    assert f"Steps 1 to 3 were skipped: {FIRST_GRADIENT}.\n" in capfd.readouterr().out


@pytest.mark.slow
def test_an_overflow_storm_is_bounded_by_the_same_number(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """DeepSpeed's scaler alone would raise when it can go no lower, with the 18th bad step."""
    recipe = world.recipe("storm", train={"max_steps": 30, "max_bad_steps": 20, "save_steps": 100})
    assert run_ranks(1, poisoned, range(1, 31), "fp16", [str(recipe)]) == [1]
    captured = capfd.readouterr()
    assert "skipped 20" in captured.out and "skipped 21" not in captured.out
    assert "Failed: The last 20 steps were skipped" in captured.err and "there is no checkpoint" in captured.err


def test_a_base_that_says_nothing_finite_is_refused(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """A run of few steps would otherwise skip all of them and call itself finished."""
    broken = world.directory / "broken"
    shutil.copytree(world.base, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    recipe = world.recipe("broken", model={"name_or_path": str(broken)}, train=SETTINGS)
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    assert "Failed: The held-out loss is nan before anything is trained" in capfd.readouterr().err
