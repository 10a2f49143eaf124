"""Every kind of adapter: gradients are PEFT's, runs resume, and what is exported is what was evaluated."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, World, launch, run_ranks
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from test_reference import assert_our_step_is_theirs, samples_of
from test_resume import stop_at
from transformers import AutoModelForCausalLM

from launch.adapter import check_targets
from launch.checkpoint import path_of_step
from launch.config import load_recipe
from launch.errors import ConfigError
from launch.recipe import LoraBlock, Recipe

SOFT: dict[str, dict[str, Any]] = {
    "prompt": {"type": "prompt_tuning", "num_virtual_tokens": 5},
    "text": {
        "type": "prompt_tuning",
        "num_virtual_tokens": 7,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "stone way back",
    },
    "mlp": {"type": "p_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 24},
    "lstm": {
        "type": "p_tuning",
        "num_virtual_tokens": 4,
        "encoder_reparameterization_type": "LSTM",
        "encoder_hidden_size": 16,
        "encoder_num_layers": 5,
    },
    "prefix": {"type": "prefix_tuning", "num_virtual_tokens": 6},
    "projected": {
        "type": "prefix_tuning",
        "num_virtual_tokens": 6,
        "prefix_projection": True,
        "encoder_hidden_size": 24,
    },
}


FEW = [name if name in ("lstm", "projected") else pytest.param(name, marks=pytest.mark.slow) for name in SOFT]


@pytest.mark.parametrize("num_ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FEW)
def test_loss_and_gradients_are_those_of_peft(world: World, name: str, num_ranks: int) -> None:
    path = world.recipe(f"step-{name}", adapter=SOFT[name], train={"max_tokens_per_micro_batch": 160})
    assert_our_step_is_theirs(path, num_ranks)


def evaluate_exported(recipe: Path, directory: Path) -> tuple[int, int, float]:
    """(correct, tokens, loss) of the held-out samples by plain transformers and PEFT, one sample at a time."""
    settings = load_recipe(recipe)
    _, held_out = samples_of(settings)
    base = AutoModelForCausalLM.from_pretrained(settings.model.name_or_path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, directory).eval()
    virtual = settings.adapter.num_virtual_columns
    correct = total = 0
    loss = 0.0
    with torch.no_grad():
        for index in range(len(held_out)):
            ids, trained = (torch.from_numpy(array) for array in held_out.sample(index))
            logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0, virtual:]
            places = torch.nonzero(trained)[:, 0]
            predicted = logits[places - 1].double()
            correct += int((predicted.argmax(-1) == ids[places]).sum())
            loss += float(torch.nn.functional.cross_entropy(predicted, ids[places], reduction="sum"))
            total += len(places)
    return correct, total, loss / total


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "text", "projected"])
def test_what_is_exported_is_what_was_evaluated(world: World, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """With dropout in the encoder, which PEFT's own saving of a model in training would leave in the embeddings."""
    adapter = SOFT[name] | ({"encoder_dropout": 0.5} if name == "lstm" else {})
    recipe = world.recipe(f"run-{name}", adapter=adapter, train={"max_steps": 3}, run={"merge": None})
    launch(recipe, 2)
    said = capfd.readouterr().out
    assert f"padded: {adapter['num_virtual_tokens']} virtual tokens stand before each sample" in " ".join(said.split())
    directory = world.run_directory(f"run-{name}")
    assert not (directory / "merged").exists() and "merged model" not in said
    last = world.metrics(f"run-{name}", "evaluation")[-1]
    correct, total, loss = run_ranks(1, evaluate_exported, recipe, directory / "adapter")[0]
    assert (last["num_correct"], last["num_tokens"]) == (correct, total)
    assert last["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "prefix"])
def test_soft_prompts_resume_bitwise(world: World, name: str) -> None:
    adapter = SOFT[name] | ({"encoder_dropout": 0.3} if name == "lstm" else {})
    settings = {"max_steps": 6, "save_steps": 3}
    launch(world.recipe(f"straight-{name}", adapter=adapter, train=settings), 2)
    recipe = world.recipe(f"stopped-{name}", adapter=adapter, train=settings)
    assert [code for code, _ in run_ranks(2, stop_at, 2, [str(recipe)])] == [0, 0]
    assert path_of_step(world.run_directory(f"stopped-{name}"), 2).exists()
    launch(recipe, 2)
    straight, resumed = (
        load_file(path_of_step(world.run_directory(f"{kind}-{name}"), 6) / "optimizer.safetensors")
        for kind in ("straight", "stopped")
    )
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        pytest.param(
            "all-linear",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
            marks=pytest.mark.slow,
        ),
        (r"model\.layers\.0\..*\.(q|v)_proj", {"q_proj", "v_proj"}),
        pytest.param(["down_proj"], {"down_proj"}, marks=pytest.mark.slow),
    ],
)
def test_targets_of_lora(world: World, targets: Any, expected: set[str]) -> None:
    name = f"targets-{len(str(targets))}"
    launch(world.recipe(name, adapter={"type": "lora", "r": 2, "target_modules": targets}, train={"max_steps": 1}), 1)
    exported = load_file(world.run_directory(name) / "adapter" / "adapter_model.safetensors")
    layers = {key.split(".layers.")[1].split(".")[0] for key in exported}
    assert {key.split(".lora_")[0].rpartition(".")[2] for key in exported} == expected
    assert layers == ({"0"} if isinstance(targets, str) and targets.startswith("model") else {"0", "1"})


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (("q_porj",), "no module of the model is named 'q_porj'; did you mean q_proj?"),
        ("q_proj", "adapter.target_modules = 'q_proj' matches no module; it must match whole paths, such as"),
        ("(q|v", "adapter.target_modules = '(q|v' is neither all-linear nor a regular expression: missing )"),
    ],
)
def test_targets_that_match_nothing(world: World, targets: Any, sentence: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.base)
    with pytest.raises(ConfigError) as caught:
        check_targets(model, LoraBlock(target_modules=targets))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        ({"adapter": {"type": "ia3"}}, "ia3"),
        ({"adapter": {"type": "p_tuning", "r": 8}}, "Extra inputs are not permitted"),
        ({"adapter": SOFT["mlp"], "run": {"merge": True}}, "the soft prompts of p_tuning are no weights of the base"),
        ({"adapter": SOFT["mlp"] | {"encoder_num_layers": 5}}, "set adapter.encoder_reparameterization_type: LSTM"),
        (
            {"adapter": SOFT["prefix"], "train": {"gradient_checkpointing": True}},
            "throws the keys and values away that prefix_tuning is made of",
        ),
        ({"adapter": SOFT["prefix"] | {"encoder_hidden_size": 9}}, "set adapter.prefix_projection: true"),
        (
            {"adapter": {"type": "lora", "use_dora": True}, "model": {"load_in_4bit": True}},
            "adapter.use_dora learns magnitudes of the weights as they are in 4 bits",
        ),
        (
            {"adapter": SOFT["prompt"], "model": {"extra_special_tokens": ["<a>"]}},
            "adds tokens whose rows adapter.type = prompt_tuning does not train",
        ),
        ({"adapter": SOFT["prompt"] | {"prompt_tuning_init": "TEXT"}}, "prompt_tuning_init_text go together; set both"),
        (
            {"adapter": SOFT["prompt"], "train": {"max_tokens_per_micro_batch": 1024}},
            "data.max_length = 1024 and adapter.num_virtual_tokens = 5 are more than train.max_tokens_per_micro_batch",
        ),
    ],
)
def test_what_cannot_work_is_refused(blocks: dict[str, Any], sentence: str) -> None:
    tree = {"model": {"name_or_path": "x"}, "data": {"train": "x.jsonl", "template": "chatml"}, "run": {"name": "x"}}
    for block, values in copy.deepcopy(blocks).items():
        tree[block] = tree.get(block, {}) | values
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(tree)
    assert sentence in str(caught.value)


def test_an_unknown_type_names_the_valid_ones(world: World) -> None:
    with pytest.raises(
        ConfigError, match=r"adapter\.type = 'ia3' is not valid; the valid ones are lora, p_tuning, pre"
    ):
        load_recipe(world.recipe("ia3", adapter={"type": "ia3"}))
    with pytest.raises(
        ConfigError, match=r"adapter\.num_vitual_tokens is not a recipe key; did you mean adapter\.num_virt"
    ):
        load_recipe(world.recipe("typo", adapter={"type": "p_tuning", "num_vitual_tokens": 3}))
    overrides = ["adapter.type=prompt_tuning"]
    with pytest.raises(ConfigError, match=r"belongs to adapter\.type = lora; the valid ones here are num_virtual"):
        load_recipe(world.recipe("other-kind", adapter={"r": 8}), overrides)
    with pytest.raises(ConfigError, match=r"adapter\.r = 0 is not valid"):
        load_recipe(world.recipe("zero", adapter={"r": 0}))


QWEN2_RECIPES = sorted((ROOT / "configs/recipes").glob("qwen2-7b-*.yaml"))


def test_the_recipes_of_qwen2_differ_in_the_adapter_only() -> None:
    trees = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in QWEN2_RECIPES]
    assert [tree.pop("adapter")["type"] for tree in trees] == ["lora", "p_tuning", "prefix_tuning", "prompt_tuning"]
    assert all(tree == trees[0] for tree in trees)
