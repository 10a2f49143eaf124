"""Stopped and resumed equals straight: bitwise on as many ranks, within rounding on another number."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World, deepspeed_json, engine_of, launch, run_ranks
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from safetensors.torch import load_file

import train
from launch import engine as engines
from launch import runs
from launch.checkpoint import find_resumable, path_of_step
from launch.config import load_recipe
from launch.errors import CheckpointError
from launch.report import Stopwatch

STEPS = 9
SETTINGS = {"max_steps": STEPS, "save_steps": 3, "eval_steps": 4}


def stop_at(step: int, arguments: list[str], *, fp16: bool = False) -> tuple[int, list[tuple[float, bool]]]:
    """train.py's main; this rank gets SIGTERM in step number `step` (0: never). Returns what every step returned."""
    if fp16:
        CPU_Accelerator.is_fp16_supported = lambda self: True
    seen: list[tuple[float, bool]] = []
    real_step = engines.step

    def watched_step(*arguments: Any) -> tuple[float, bool]:
        seen.append(real_step(*arguments))
        if len(seen) == step and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return seen[-1]

    engines.step = watched_step
    return train.main(arguments), seen


def dtypes_under_fp16(recipe_path: Path) -> dict[str, set[torch.dtype]]:
    """Of the masters that Adam updates, and of all weights that the model computes with."""
    CPU_Accelerator.is_fp16_supported = lambda self: True
    recipe = load_recipe(recipe_path)
    engines.quiet_libraries()
    engine = engine_of(recipe, "fp16")
    masters = {group.dtype for group in engine.optimizer.fp32_partitioned_groups_flat}
    return {"masters": masters, "weights": {parameter.dtype for parameter in engine.module.parameters()}}


def training_state(world: World, name: str) -> dict[str, torch.Tensor]:
    return load_file(path_of_step(world.run_directory(name), STEPS) / "optimizer.safetensors")


def largest_difference(world: World, one: str, other: str) -> float:
    first, second = training_state(world, one), training_state(world, other)
    assert first.keys() == second.keys()
    return max(
        float((first[name] - second[name]).abs().max() / first[name].abs().max().clamp_min(1e-12)) for name in first
    )


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_stopped_and_resumed_is_bitwise_straight_with_dropout(world: World, stage: int) -> None:
    config = deepspeed_json(world.directory, stage)
    blocks: dict[str, Any] = {"train": SETTINGS, "adapter": {"lora_dropout": 0.1, "modules_to_save": ["lm_head"]}}
    launch(world.recipe(f"straight-{stage}", **blocks), 2, deepspeed=config)
    name = f"stopped-{stage}"
    recipe = str(world.recipe(name, **blocks))
    run_ranks(2, stop_at, 4, [recipe], deepspeed=config)
    status = runs.read_status(world.run_directory(name))
    assert (status["state"], status["step"]) == ("preempted", 4)
    run_ranks(2, stop_at, 3, [recipe], deepspeed=config)
    assert runs.read_status(world.run_directory(name))["step"] == 7
    launch(Path(recipe), 2, deepspeed=config)
    assert runs.read_status(world.run_directory(name))["state"] == "finished"
    assert largest_difference(world, f"straight-{stage}", name) == 0
    for kind in ("train", "evaluation"):
        ours, theirs = world.metrics(name, kind), world.metrics(f"straight-{stage}", kind)
        assert [(r["step"], r["loss"]) for r in ours] == [(r["step"], r["loss"]) for r in theirs]
    starts = world.metrics(name, "start")
    assert [record["step"] for record in starts] == [0, 4, 7]
    for record in starts:
        parts = {key: value for key, value in record.items() if key.endswith("_seconds")}
        assert record["seconds"] == pytest.approx(sum(parts.values())) and min(parts.values()) >= 0
        assert {"imports_seconds", "rows_seconds", "base_seconds", "resume_seconds"} < parts.keys()


def slow_to_begin() -> tuple[dict[str, float], float]:
    """(what was timed, what both stretches of the second part took)."""
    time.sleep(0.3)
    stopwatch = Stopwatch()
    stopwatch.end("imports")
    begin = time.monotonic()
    time.sleep(0.1)
    stopwatch.end("first step")
    time.sleep(0.1)
    stopwatch.end("first step")
    return stopwatch.seconds, time.monotonic() - begin


def test_a_start_is_timed_from_the_making_of_the_process() -> None:
    ((seconds, took),) = run_ranks(1, slow_to_begin)
    assert 0.3 <= seconds["imports"] < 30
    assert seconds["first step"] == pytest.approx(took, abs=0.05)


def test_the_steps_after_a_checkpoint_are_forgotten_and_the_starts_are_not(tmp_path: Path) -> None:
    for kind, step in (("start", 0), ("train", 1), ("train", 2), ("start", 2), ("train", 3)):
        runs.append_metrics(tmp_path, {"kind": kind, "step": step})
    kept = [(record["kind"], record["step"]) for record in runs.rewind_metrics(tmp_path, 1, say=print)]
    assert kept == [("start", 0), ("train", 1), ("start", 2)]


@pytest.mark.slow
def test_four_then_two_then_three_ranks(world: World) -> None:
    launch(world.recipe("four", train=SETTINGS), 4)
    recipe = str(world.recipe("elastic", train=SETTINGS))
    run_ranks(4, stop_at, 3, [recipe])
    run_ranks(2, stop_at, 3, [recipe])
    launch(Path(recipe), 3)
    assert 0 < largest_difference(world, "four", "elastic") < 1e-5


@pytest.mark.slow
def test_zero2_resumes_what_zero3_saved(world: World) -> None:
    launch(world.recipe("zero3", train=SETTINGS), 2)
    recipe = str(world.recipe("zero3-then-2", train=SETTINGS))
    run_ranks(2, stop_at, 5, [recipe])
    launch(Path(recipe), 2, deepspeed=deepspeed_json(world.directory, 2))
    assert largest_difference(world, "zero3", "zero3-then-2") < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_fp16_overflow_skips_alike_and_resume_keeps_the_scaler(world: World, stage: int) -> None:
    """2**18 times a loss overflows fp16 gradients; the scaler halves until they fit."""
    config = deepspeed_json(world.directory, stage, initial_scale_power=18, hysteresis=1, loss_scale_window=3)
    blocks = {"train": {**SETTINGS, "precision": "fp16"}}
    name = f"fp16-{stage}"
    results = run_ranks(2, lambda a: stop_at(0, a, fp16=True), [str(world.recipe(name, **blocks))], deepspeed=config)
    skips = [[skipped for _, skipped in seen] for _, seen in results]
    assert skips[0] == skips[1]
    assert skips[0][0] and not skips[0][-1], "the first step must overflow and the last must not"
    curve = world.metrics(name, "train")
    assert curve[-1]["skipped_steps"] == sum(skips[0])
    assert curve[-1]["loss_scale"] < 2**18
    state = json.loads((path_of_step(world.run_directory(name), STEPS) / "state.json").read_text())
    assert state["adam_step"] == STEPS - sum(skips[0])
    assert stage < 3 or (
        run_ranks(2, dtypes_under_fp16, world.recipe("dtypes", **blocks), deepspeed=config)
        == [{"masters": {torch.float32}, "weights": {torch.float16}}] * 2
    )

    recipe = str(world.recipe(f"{name}-stopped", **blocks))
    run_ranks(2, lambda a: stop_at(5, a, fp16=True), [recipe], deepspeed=config)
    run_ranks(2, lambda a: stop_at(0, a, fp16=True), [recipe], deepspeed=config)
    resumed = json.loads((path_of_step(world.run_directory(f"{name}-stopped"), STEPS) / "state.json").read_text())
    assert {key: resumed[key] for key in ("scaler", "adam_step", "skipped_steps")} == {
        key: state[key] for key in ("scaler", "adam_step", "skipped_steps")
    }
    assert largest_difference(world, name, f"{name}-stopped") == 0


@pytest.mark.slow
def test_bf16_stopped_and_resumed_is_bitwise_straight_and_merges(world: World) -> None:
    blocks: dict[str, Any] = {"train": {**SETTINGS, "precision": "bf16"}, "run": {"merge": True}}
    launch(world.recipe("bf16", **blocks), 2)
    recipe = str(world.recipe("bf16-stopped", **blocks))
    run_ranks(2, stop_at, 4, [recipe])
    launch(Path(recipe), 2)
    assert largest_difference(world, "bf16", "bf16-stopped") == 0
    merged = [
        load_file(world.run_directory(name) / "merged" / "model.safetensors") for name in ("bf16", "bf16-stopped")
    ]
    assert all(tensor.dtype == torch.bfloat16 for tensor in merged[0].values())
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_fp16_without_a_dynamic_scaler_is_refused(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    config = deepspeed_json(world.directory, 3, loss_scale=1.0)
    recipe = str(world.recipe("static", train={"precision": "fp16"}))
    results = run_ranks(1, lambda a: stop_at(0, a, fp16=True), [recipe], deepspeed=config)
    assert results[0][0] == 1
    assert "fp16.loss_scale = 1.0 is a static one" in capfd.readouterr().err


def test_a_bad_checkpoint_is_named_and_the_one_before_it_is_used(world: World) -> None:
    recipe = world.recipe("damaged", train={"max_steps": 6, "save_steps": 3})
    launch(recipe, 1)
    run_directory = world.run_directory("damaged")
    damaged = path_of_step(run_directory, 6) / "optimizer.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    said: list[str] = []
    found = find_resumable(run_directory, said.append)
    assert found is not None and found.step == 3
    assert "SHA-256 of optimizer.safetensors" in said[0] and "step-000006.corrupt" in said[0]
    (path_of_step(run_directory, 3) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="Every checkpoint in"):
        find_resumable(run_directory, said.append)


def test_a_finished_run_says_so(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe("twice", train={"max_steps": 2})
    launch(recipe, 1)
    before = sorted(path.stat().st_mtime_ns for path in world.run_directory("twice").rglob("*"))
    capfd.readouterr()
    launch(recipe, 2)
    assert "is finished" in capfd.readouterr().out
    assert sorted(path.stat().st_mtime_ns for path in world.run_directory("twice").rglob("*")) == before
