"""The base model: partitioned while it loads, whole or refused; and the shipped recipes on a tiny model."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, World, launch, run_ranks
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from launch import engine as engines
from launch import runs
from launch.config import load_recipe
from launch.errors import ModelError
from launch.model import load_base, serving_generation_config


def load_under_zero_init(recipe_path: Path, base: Path) -> tuple[int, int]:
    """(elements of the model, elements that this rank keeps)."""
    recipe = load_recipe(recipe_path)
    engines.quiet_libraries()
    engines.create_accelerator(recipe, "fp32")
    model = load_base(str(base), recipe.model, "fp32")
    whole = sum(torch.Size(engines.whole_shape(parameter)).numel() for parameter in model.parameters())
    return whole, sum(parameter.ds_tensor.numel() for parameter in model.parameters())


def test_each_rank_holds_its_share_from_the_start(world: World) -> None:
    results = run_ranks(4, load_under_zero_init, world.recipe("zero-init"), world.base)
    for whole, kept in results:
        assert whole / 4 <= kept < whole / 3


def test_weights_with_a_hole_are_refused(world: World) -> None:
    """transformers alone would fill the hole with random numbers and say nothing at this verbosity."""
    holed = world.directory / "holed"
    shutil.copytree(world.base, holed)
    tensors = load_file(holed / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, holed / "model.safetensors", metadata={"format": "pt"})
    recipe = load_recipe(world.recipe("holed"))
    with pytest.raises(ModelError, match=r"not whole: model\.layers\.1\.self_attn\.q_proj\.weight is missing"):
        load_base(str(holed), recipe.model, "fp32")


def test_the_serving_generation_config_stops_at_what_was_trained_and_can_be_saved(world: World, tmp_path: Path) -> None:
    model = load_base(str(world.base), load_recipe(world.recipe("generation")).model, "fp32")
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=7)
    model.generation_config.temperature = 0.6  # some published models have this, and transformers refuses to save it
    config = serving_generation_config(model, [2])
    assert config.eos_token_id == [2, 7]
    config.save_pretrained(str(tmp_path))
    assert GenerationConfig.from_pretrained(str(tmp_path)).temperature == 0.6


@pytest.mark.slow
def test_the_flagship_recipe_runs_on_a_tiny_model(world: World) -> None:
    """Everything of the recipe but the model, the rows and the number of steps."""
    overrides = [
        f"model.name_or_path={world.base}",
        f"data.train={world.rows}",
        "train.max_steps=2",
        f"run.output_dir={world.directory / 'runs'}",
    ]
    launch(ROOT / "configs/recipes/qwen1.5-14b-lora.yaml", 2, *overrides)
    directory = world.run_directory("qwen1.5-14b-lora")
    assert runs.read_status(directory)["state"] == "finished"
    assert (directory / "merged" / "model.safetensors").exists()
