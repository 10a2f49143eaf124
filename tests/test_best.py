"""The best evaluated step is kept, exported and merged, stopped and resumed or not."""

import json
from typing import Any

import pytest
import torch
from conftest import World, launch, run_ranks
from peft import PeftModel
from safetensors.torch import load_file
from test_resume import stop_at
from transformers import AutoModelForCausalLM

from launch.checkpoint import path_of_step
from launch.config import load_recipe
from launch.errors import ConfigError
from launch.runs import best_step

SETTINGS = {
    "max_steps": 8,
    "eval_steps": 2,
    "save_steps": 1,
    "learning_rate": 0.3,  # too high: the loss rises again, by a tenth
    "warmup_steps": 4,
    "lr_scheduler_type": "constant_with_warmup",
    "load_best_model_at_end": True,
}


def evaluation(step: int, loss: float | None, token_accuracy: float | None = 0.5) -> dict[str, Any]:
    return {"step": step, "loss": loss, "token_accuracy": token_accuracy}


def test_the_best_step() -> None:
    records = [evaluation(0, 1.0, 0.9), evaluation(2, 3.0, 0.1), evaluation(4, 2.0, 0.3), evaluation(6, 2.0, 0.3)]
    assert best_step(records, "loss") == best_step(records, "token_accuracy") == 4, (
        "the first of equals, and not step 0"
    )
    assert best_step(records[:1], "loss") is None
    assert best_step([evaluation(2, float("nan")), evaluation(4, None), evaluation(6, 9.0)], "loss") == 6


def adapter_of(world: World, name: str, *parts: str) -> dict[str, torch.Tensor]:
    return load_file(world.run_directory(name).joinpath(*parts) / "adapter_model.safetensors")


@pytest.mark.slow
def test_the_best_step_is_kept_and_merged(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe("best", train=SETTINGS, run={"merge": True})
    launch(recipe, 2)
    best = best_step(world.metrics("best", "evaluation"), "loss")
    assert best is not None and best < 8, "the loss was to rise again"
    assert f"Step {best} has the best held-out loss; its weights are used." in capfd.readouterr().out
    directory = world.run_directory("best")
    kept = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert kept == [f"step-{step:06d}" for step in (best, 7, 8)], "the newest two and the best"
    for export, step in (("adapter", best), ("endpoint", 8)):
        expected = load_file(path_of_step(directory, step) / "adapter_model.safetensors")
        found = adapter_of(world, "best", export)
        assert all(torch.equal(found[key], expected[key]) for key in expected | found)
    assert json.loads((directory / "merged" / "merge_report.json").read_text())["step"] == best
    ids = torch.arange(5, 25)[None]
    merged = AutoModelForCausalLM.from_pretrained(directory / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, directory / "adapter")(ids).logits
    difference = (merged(ids).logits - expected).abs().max() / expected.abs().max()
    assert difference < 5e-3

    stopped = world.recipe("best-stopped", train=SETTINGS)
    assert [code for code, _ in run_ranks(2, stop_at, best + 1, [str(stopped)])] == [0, 0]
    launch(stopped, 2)
    straight, resumed = (adapter_of(world, name, "adapter") for name in ("best", "best-stopped"))
    assert all(torch.equal(straight[key], resumed[key]) for key in straight | resumed)


def test_there_must_be_evaluations_to_choose_from(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"load_best_model_at_end needs evaluations to choose from; set train\.eval_st"
    ):
        load_recipe(world.recipe("none", train={"load_best_model_at_end": True}))
    import train

    recipe = world.recipe("no-rows", data={"test_size": 0}, train=SETTINGS)
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    assert "train.load_best_model_at_end has no rows to evaluate; set data.test_size" in capfd.readouterr().err
