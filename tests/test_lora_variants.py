"""DoRA, rsLoRA, patterns, LoRA+ and trained tokens: all as plain PEFT has them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World, build_base, deepspeed_json, launch, make_rows, run_ranks
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from test_reference import ADAPTER, assert_our_step_is_theirs, perturb
from test_resume import SETTINGS, dtypes_under_fp16, largest_difference, stop_at
from transformers import AutoModelForCausalLM

import train
from launch.adapter import add_adapter, check_targets, trained_kinds
from launch.checkpoint import Resumable, check_same_run, identity_of_run
from launch.config import dump_recipe, load_recipe
from launch.errors import CheckpointError, ConfigError
from launch.merge import add_lora
from launch.model import load_base
from launch.recipe import LoraBlock, Recipe

TOKENS = [1, 2, 300]
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 8, r"layers\.1\..*v_proj": 2},
        "alpha_pattern": {"v_proj": 5},
    },
    "tokens": {"trainable_token_indices": TOKENS},
}
ALL_OF_THEM = ADAPTER | VARIANTS["dora"] | VARIANTS["patterns"] | VARIANTS["tokens"]


@pytest.fixture(scope="module")
def tied_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("tied")
    rows = make_rows(50)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = build_base(directory / "base", [row["input"] + row["output"] for row in rows], tied=True)
    return World(directory, base, directory / "rows.jsonl")


# ---- the step is PEFT's ----


@pytest.mark.parametrize("num_ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["dora", pytest.param("patterns", marks=pytest.mark.slow), "tokens"])
def test_loss_and_gradients_are_those_of_peft(world: World, name: str, num_ranks: int) -> None:
    adapter = ADAPTER | VARIANTS[name]
    assert_our_step_is_theirs(world.recipe(name, adapter=adapter, train={"max_tokens_per_micro_batch": 128}), num_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_with_gradient_checkpointing(world: World, num_ranks: int) -> None:
    """DoRA and trained tokens read weights that ZeRO-3 has partitioned in the middle of a forward pass."""
    settings = {"max_tokens_per_micro_batch": 128, "gradient_checkpointing": True}
    assert_our_step_is_theirs(world.recipe("recomputed", adapter=ALL_OF_THEM, train=settings), num_ranks)


@pytest.mark.slow
def test_tokens_of_tied_embeddings(tied_world: World) -> None:
    adapter = {"trainable_token_indices": TOKENS}
    assert_our_step_is_theirs(tied_world.recipe("tied", adapter=adapter), 2)


def magnitudes_of_dora(path: Path) -> dict[str, torch.Tensor]:
    """As they are before the first step, from weights that ZeRO-3 has partitioned."""
    recipe = load_recipe(path)
    train.engines.create_accelerator(recipe, "fp32")
    base = load_base(recipe.model.name_or_path, recipe.model, "fp32")
    assert all(parameter.numel() == 0 for parameter in base.parameters())
    model = add_adapter(base, recipe.adapter, base="", seed=0, dtype=torch.float32)
    return {name: p.detach().numpy().tolist() for name, p in model.named_parameters() if "magnitude" in name}


def test_the_magnitudes_of_dora_are_the_norms_of_the_whole_rows(world: World) -> None:
    path = world.recipe("magnitudes", adapter=VARIANTS["dora"])
    base = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32).state_dict()
    for found in run_ranks(2, magnitudes_of_dora, path):
        assert len(found) == 4
        for name, magnitudes in found.items():
            weight = base[name.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight"]
            torch.testing.assert_close(torch.tensor(magnitudes), weight.norm(dim=1))


# ---- what is trained ----


def test_of_the_base_nothing_is_trained(world: World) -> None:
    recipe = load_recipe(world.recipe("kinds", adapter=ALL_OF_THEM))
    base = load_base(str(world.base), recipe.model, "fp32")
    model = add_adapter(base, recipe.adapter, base=str(world.base), seed=0, dtype=torch.float32)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    kinds = ["trainable_tokens_delta", "lora_A", "lora_B", "lora_magnitude_vector", "lm_head"]
    assert trained_kinds(names) == kinds
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            with pytest.raises(AssertionError, match="belongs to the base model and must not be trained"):
                trained_kinds([*names, name])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_fp16_trains_and_merges(world: World, stage: int) -> None:
    """Losses stay near those in fp32, and every trained tensor has an fp32 master."""
    config = deepspeed_json(world.directory, stage, initial_scale_power=10)
    blocks: dict[str, Any] = {"adapter": ALL_OF_THEM, "run": {"merge": True}}
    exact = world.recipe(f"fp32-{stage}", train={"max_steps": 4}, **blocks)
    launch(exact, 2, deepspeed=config)
    half = world.recipe(f"fp16-{stage}", train={"max_steps": 4, "precision": "fp16"}, **blocks)
    results = run_ranks(2, lambda a: stop_at(0, a, fp16=True), [str(half)], deepspeed=config)
    assert [code for code, _ in results] == [0, 0]
    losses = [[record["loss"] for record in world.metrics(f"{kind}-{stage}", "train")] for kind in ("fp16", "fp32")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)
    if stage == 3:
        dtypes = run_ranks(2, dtypes_under_fp16, half, deepspeed=config)
        assert dtypes == [{"masters": {torch.float32}, "weights": {torch.float16}}] * 2


# ---- merging and resuming ----


def test_merged_rows_of_dora_are_those_of_peft(world: World) -> None:
    """In fp32, where nothing is rounded; tests/test_merge.py has the whole way in 16 bits."""
    base = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    perturb(model)
    layer = base.model.layers[0].self_attn.q_proj
    weight, scaling = layer.weight.detach().clone(), layer.scaling["default"]
    a, b, magnitude = (
        held["default"].weight.detach() for held in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    )
    layer.merge(safe_merge=True)
    torch.testing.assert_close(add_lora(weight, a, b, scaling, torch.float32, magnitude), layer.weight)
    assert (weight.norm(dim=1) - layer.weight.norm(dim=1)).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "tied"), [(2, False), (3, False), (3, True)])
def test_two_then_three_ranks_with_several_learning_rates(
    world: World, tied_world: World, stage: int, tied: bool
) -> None:
    """DoRA, patterns, trained tokens, a whole head (which tied tokens exclude) and LoRA+ in one run."""
    world = tied_world if tied else world
    adapter = ALL_OF_THEM | ({"modules_to_save": []} if tied else {})
    blocks: dict[str, Any] = {"adapter": adapter, "train": SETTINGS | {"loraplus_lr_ratio": 4.0}}
    config = deepspeed_json(world.directory, stage)
    launch(world.recipe(f"straight-{stage}", **blocks), 2, deepspeed=config)
    recipe = world.recipe(f"elastic-{stage}", **blocks)
    assert [code for code, _ in run_ranks(2, stop_at, 4, [str(recipe)], deepspeed=config)] == [0, 0]
    launch(recipe, 3, deepspeed=config)
    assert 0 < largest_difference(world, f"straight-{stage}", f"elastic-{stage}") < 1e-5


def test_a_checkpoint_from_before_these_keys_is_still_resumed(world: World) -> None:
    """What a saved recipe lacks has the default, in the form in which it would have been saved."""
    path = world.recipe("older", adapter={"r": 4})
    facts: dict[str, Any] = {"precision": "fp32", "base_fingerprint": "", "data_sha256": []}
    saved = json.loads(json.dumps(identity_of_run(load_recipe(path), **facts)))
    for key in ("modules_to_save", "use_dora", "rank_pattern", "trainable_token_indices"):
        del saved["recipe"]["adapter"][key]
    del saved["recipe"]["train"]["loraplus_lr_ratio"]
    checkpoint = Resumable(path, {"step": 1, "identity": saved})
    check_same_run(checkpoint, identity_of_run(load_recipe(path), **facts))
    changed = load_recipe(path, ["adapter.rank_pattern={q_proj: 2}", "train.loraplus_lr_ratio=2.0"])
    with pytest.raises(
        CheckpointError, match=r"rank_pattern was {} and is {'q_proj': 2}; train\.loraplus_lr_ratio was"
    ):
        check_same_run(checkpoint, identity_of_run(changed, **facts))


# ---- what cannot work ----


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        ({"rank_pattern": {"k_proj": 2}}, "adapter.rank_pattern: 'k_proj' matches the path of no module that LoRA"),
        ({"alpha_pattern": {"proj": 2}}, "adapter.alpha_pattern: 'proj' matches the path of no module that LoRA"),
        (
            {"rank_pattern": {".*_proj": 2, "q_proj": 4}},
            "'q_proj' decides nothing, since keys before it match all that",
        ),
        ({"rank_pattern": {"(q": 2}}, "adapter.rank_pattern: '(q' is not a regular expression: missing )"),
        ({"trainable_token_indices": [5, 100_000]}, "trainable_token_indices has 100000, but the model has embeddings"),
        (
            {"trainable_token_indices": [5], "modules_to_save": ["embed_tokens"]},
            "trains rows of model.embed_tokens, which adapter.modules_to_save trains as well; keep one",
        ),
        (
            {"trainable_token_indices": [5], "target_modules": ["q_proj", "embed_tokens"]},
            "trains rows of model.embed_tokens, which adapter.target_modules trains as well; keep one",
        ),
        (
            {"trainable_token_indices": [5], "modules_to_save": ["lm_head"]},
            "trains rows of lm_head, which adapter.modules_to_save trains as well; keep one",
        ),
    ],
)
def test_patterns_and_tokens_that_cannot_be(tied_world: World, adapter: dict[str, Any], sentence: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied_world.base)
    with pytest.raises(ConfigError) as caught:
        check_targets(model, LoraBlock.model_validate({"target_modules": ["q_proj", "v_proj"], **adapter}))
    assert sentence in str(caught.value)


def test_patterns_match_as_those_of_peft(world: World) -> None:
    """What passes the check changes a rank, under all-linear too."""
    adapter = LoraBlock.model_validate({"target_modules": "all-linear", "r": 4, "rank_pattern": {"mlp.*": 2}})
    check_targets(AutoModelForCausalLM.from_pretrained(world.base), adapter)
    base = AutoModelForCausalLM.from_pretrained(world.base)
    config = LoraConfig(r=4, target_modules="all-linear", rank_pattern={"mlp.*": 2})
    ranks = {name: p.shape[0] for name, p in get_peft_model(base, config).named_parameters() if "lora_A" in name}
    assert {name: rank for name, rank in ranks.items() if rank == 2}.keys() == {n for n in ranks if ".mlp." in n}


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        ({"adapter": {"rank_pattern": ["q_proj"]}}, "maps modules to whole numbers from 1, as in {q_proj: 16}, but"),
        ({"adapter": {"alpha_pattern": {"q_proj": 0}}}, "maps modules to whole numbers from 1"),
        ({"adapter": {"trainable_token_indices": [3, 3]}}, "adapter.trainable_token_indices has 3 twice; keep one"),
        (
            {"adapter": {"type": "p_tuning"}, "train": {"loraplus_lr_ratio": 16.0}},
            "train.loraplus_lr_ratio is for the B matrices of LoRA, and p_tuning has none; leave it out",
        ),
        ({"train": {"loraplus_lr_ratio": 0.5}}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_work_is_refused(blocks: dict[str, Any], sentence: str) -> None:
    tree = {"model": {"name_or_path": "x"}, "data": {"train": "x.jsonl", "template": "chatml"}, "run": {"name": "x"}}
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(tree | copy.deepcopy(blocks))
    assert sentence in str(caught.value)


def test_a_recipe_of_everything_dumps_to_itself_and_stays_frozen(world: World) -> None:
    path = world.recipe("everything", adapter=ALL_OF_THEM, train={"loraplus_lr_ratio": 16.0})
    recipe = load_recipe(path)
    assert isinstance(recipe.adapter, LoraBlock)
    assert recipe.adapter.model_dump()["rank_pattern"] == VARIANTS["patterns"]["rank_pattern"]
    assert hash(recipe) == hash(load_recipe(path)), "nothing in it can change"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
