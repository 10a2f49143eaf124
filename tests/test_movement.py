"""A run whose adapter does not move stops after ten updates, and says what stands still."""

from pathlib import Path

import own_model
import pytest
import torch
from conftest import World, deepspeed_json, engine_of, run_ranks
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from test_adapters import SOFT
from test_resume import stop_at

import train
from launch import engine as engines
from launch import movement, runs
from launch.config import load_recipe
from launch.errors import TrainingError

LONG = {"max_steps": 20, "save_steps": 100, "weight_decay": 0.1}  # which moves A, though nothing is learned


def dead_recipe(world: World, name: str, built_by: str) -> Path:
    """LoRA on a module of the user's own model that no logit depends on."""
    torch.save(own_model.build_with_a_dead_end().state_dict(), world.directory / "dead.pth")
    model = {
        "name_or_path": str(world.directory / "dead.pth"),
        "factory": f"{Path(own_model.__file__).resolve()}:{built_by}",
        "tokenizer": str(world.base),
    }
    adapter = {"r": 4, "lora_dropout": 0.0, "target_modules": ["dead_end"]}
    return world.recipe(name, model=model, adapter=adapter, train=LONG)


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_an_adapter_that_cannot_learn_ends_after_ten_updates(
    world: World, stage: int, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = dead_recipe(world, f"dead-{stage}", "build_with_a_dead_end")
    config = deepspeed_json(world.directory, stage)
    stopped_after = 6 if stage == 2 else 0  # a resumed run begins to count anew
    if stopped_after:
        assert run_ranks(1, stop_at, stopped_after, [str(recipe)], deepspeed=config)[0][0] == 0
    assert run_ranks(1, train.main, [str(recipe)], deepspeed=config) == [1]
    said = capfd.readouterr().err
    assert "Failed: The adapter has not moved after 10 updates: every gradient was exactly zero. Nothing" in said
    directory = world.run_directory(f"dead-{stage}")
    progress = runs.read_progress(directory)
    assert progress is not None
    assert progress[0] == stopped_after + 10 + (not stopped_after)  # the learning rate of the first step of all is zero
    assert runs.read_status(directory)["state"] == "failed"


def test_an_adapter_that_no_loss_depends_on_is_one_sentence(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = dead_recipe(world, "unused", "build_with_an_unused_module")
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    assert "Failed: Nothing that is trained reaches the loss: the forward pass does not use" in capfd.readouterr().err


def looked_at(recipe_path: Path, precision: str) -> dict[str, str]:
    """What is said of an engine that trains, and of one where something stands still."""
    CPU_Accelerator.is_fp16_supported = lambda self: True
    movement.UPDATES_BEFORE_THE_LOOK = 3
    recipe = load_recipe(recipe_path)
    engines.quiet_libraries()
    engine = engine_of(recipe, precision)
    ids = torch.arange(3, 40)[None]

    def three_steps(learning_rate: float, loses_master_of: str = "") -> str:
        seen = movement.Movement(engine)
        try:
            for _ in range(3):
                loss = 1e-3 * engine(input_ids=ids, labels=ids, use_cache=False).loss.float()
                engines.backward(engine, loss, is_last=True)
                norm, skipped = engines.step(engine, learning_rate)
                for name, parameter in engines.trainable_parameters(engine):
                    is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
                    if is_last and loses_master_of and loses_master_of in name:
                        getattr(parameter, "ds_tensor", parameter).data.add_(1)
                seen.after_step(gradient_norm=norm, learning_rate=1e-3, skipped=skipped)
        except TrainingError as error:
            return str(error)
        return ""

    return {
        "good": three_steps(1e-3),
        "tiny": three_steps(1e-10),
        "stands": three_steps(0.0),
        "stale": three_steps(1e-3, "layers.1.self_attn.q_proj.lora_B"),
    }


@pytest.mark.parametrize(
    ("num_ranks", "stage", "precision"),
    [
        (1, 3, "fp16"),
        pytest.param(2, 3, "bf16", marks=pytest.mark.slow),
        pytest.param(2, 2, "fp16", marks=pytest.mark.slow),
        pytest.param(3, 1, "fp32", marks=pytest.mark.slow),
    ],
)
def test_masters_that_stand_and_copies_that_are_not_theirs_are_told_apart(
    world: World, num_ranks: int, stage: int, precision: str
) -> None:
    config = deepspeed_json(world.directory, stage, initial_scale_power=8)
    recipe = world.recipe(f"looked-{stage}")
    for said in run_ranks(num_ranks, looked_at, recipe, precision, deepspeed=config):
        assert said["good"] == said["tiny"] == "", said
        assert (
            "not moved after 3 updates, though it has gradients: no fp32 master has changed by a bit" in said["stands"]
        )
        assert " is not what was trained after 3 updates: what the forward pass uses" in said["stale"]
    assert said["stale"].endswith("zero2.yaml.") and "layers.1.self_attn.q_proj.lora_B.default.weight" in said["stale"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prompt", "mlp", "prefix", "lora", "dora", "tokens"])
def test_what_learns_goes_on(world: World, name: str) -> None:
    lora = {
        "lora": {"r": 4, "modules_to_save": ["lm_head"]},
        "dora": {"r": 4, "use_dora": True},
        "tokens": {"r": 4, "trainable_token_indices": [3, 70]},
    }
    adapter = (SOFT | lora)[name]
    train_block = {"max_steps": 12, "learning_rate": 1e-6, "max_grad_norm": 0, "precision": "bf16"}
    recipe = world.recipe(f"learns-{name}", adapter=adapter, data={"test_size": 0}, train=train_block)
    assert run_ranks(2, train.main, [str(recipe)]) == [0, 0]
