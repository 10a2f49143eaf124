"""DoRA, rsLoRA, patterns, LoRA+, trained tokens, and runs that start from an adapter: all as plain PEFT has them."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World, build_base, deepspeed_json, launch, make_rows, run_ranks
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from test_adapters import evaluate_exported
from test_reference import ADAPTER, assert_our_step_is_theirs, perturb, their_model
from test_resume import SETTINGS, dtypes_under_fp16, largest_difference, stop_at
from transformers import AutoModelForCausalLM

import train
from launch.adapter import add_adapter, check_targets, trained_kinds
from launch.config import dump_recipe, load_recipe
from launch.errors import AdapterError, ConfigError
from launch.merge_rule import add_lora
from launch.model import load_base
from launch.recipe import LoraBlock, Recipe
from launch.starting_adapter import fingerprint_starting_adapter, start_from

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
    torch.testing.assert_close(add_lora(weight, a, b, scaling, magnitude), layer.weight)
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


# ---- starting from an adapter ----


def save_with_peft(path: Path, directory: Path) -> None:
    model = their_model(load_recipe(path))
    perturb(model)
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def started(world: World) -> Path:
    """A LoRA of everything, trained and saved by plain PEFT."""
    run_ranks(1, save_with_peft, world.recipe("first", adapter=ALL_OF_THEM), world.directory / "first")
    return world.directory / "first"


@pytest.mark.parametrize("num_ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_first_step_from_an_adapter_is_that_of_peft(world: World, started: Path, num_ranks: int) -> None:
    path = world.recipe("second", adapter=ALL_OF_THEM | {"init_from": str(started)})
    assert_our_step_is_theirs(path, num_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "prompt_tuning"])
def test_a_run_starts_from_an_adapter_and_resumes_with_no_other(
    world: World, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = ALL_OF_THEM if kind == "lora" else {"type": kind, "num_virtual_tokens": 5}
    start = world.directory / f"start-{kind}"
    run_ranks(1, save_with_peft, world.recipe(f"before-{kind}", adapter=adapter), start)
    recipe = world.recipe(f"after-{kind}", adapter=adapter | {"init_from": str(start)}, train={"save_steps": 2})
    assert [code for code, _ in run_ranks(2, stop_at, 2, [str(recipe)])] == [0, 0]
    first = world.metrics(f"after-{kind}", "evaluation")[0]
    correct, total, loss = run_ranks(1, evaluate_exported, recipe, start)[0]
    assert (first["step"], first["num_correct"], first["num_tokens"]) == (0, correct, total)
    assert first["loss"] == pytest.approx(loss, rel=1e-5)
    shutil.copytree(start, world.directory / f"moved-{kind}")
    run_ranks(1, save_with_peft, world.recipe(f"before-{kind}", train={"seed": 1}, adapter=adapter), start)
    if kind == "lora":
        assert run_ranks(1, train.main, [str(recipe)]) == [1]
        assert "adapter.init_from  was" in capfd.readouterr().err
    launch(recipe, 3, f"adapter.init_from={world.directory / f'moved-{kind}'}")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"r": 16}, "r is 4 in the recipe and 16 in its adapter_config.json; set adapter.r to that."),
        ({"lora_alpha": 8}, "lora_alpha is 16 in the recipe and 8 in its"),
        ({"use_rslora": False}, "use_rslora is True in the recipe and False in its"),
        ({"alpha_pattern": {}}, "alpha_pattern is {'v_proj': 5} in the recipe and {} in its"),
        ({"modules_to_save": None}, "modules_to_save is ['lm_head'] in the recipe and [] in its"),
        ({"trainable_token_indices": [1, 2, 3]}, "trainable_token_indices is [1, 2, 300] in the recipe and [1, 2, 3]"),
        ({"lora_bias": True}, "lora_bias is False in the recipe and True in its adapter_config.json; it cannot be"),
        ({"of_the_future": 1}, "of_the_future is None in the recipe and 1 in its"),
        (
            {"init_lora_weights": "pissa"},
            "begun with init_lora_weights = 'pissa', which changes more than LoRA's weights",
        ),
        ({"peft_type": "LOHA"}, "is a LOHA adapter, and the recipe's is LORA; name"),
        ({"enable_lora": [True, False, True]}, "has enable_lora, a key of PEFT before 0.3; list the modules that LoRA"),
        ({"merge_weights": False}, "has merge_weights, a key of PEFT before 0.3; leave it out, for run.merge decides"),
    ],
)
def test_another_kind_of_adapter_is_refused(
    started: Path, tmp_path: Path, config: dict[str, Any], sentence: str
) -> None:
    directory = shutil.copytree(started, tmp_path / "start")
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | config), encoding="utf-8")
    adapter = LoraBlock.model_validate({"lora_alpha": 16, **ALL_OF_THEM, "init_from": str(directory)})
    with pytest.raises(AdapterError) as caught:
        fingerprint_starting_adapter(adapter)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_an_adapter_that_is_not_there_or_a_pickle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"no/such/place does not exist; give a directory or a hub id"):
        fingerprint_starting_adapter(LoraBlock(init_from="no/such/place"))
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors; a \.bin is a pickle and is not read"):
        fingerprint_starting_adapter(LoraBlock(init_from=str(tmp_path)))


def test_other_targets_are_refused(world: World, started: Path) -> None:
    """They are seen in the names of the weights, whatever way they are written."""
    other = ALL_OF_THEM | {"target_modules": ["q_proj", "v_proj", "o_proj"], "init_from": str(started)}
    adapter = LoraBlock.model_validate({"lora_alpha": 16, **other})
    digest = fingerprint_starting_adapter(adapter)
    assert digest is not None
    base = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    model = add_adapter(base, adapter, base="", seed=0, dtype=torch.float32)
    with pytest.raises(AdapterError, match=r"o_proj\.lora_A\.weight has shape none there and \(4, 32\) in .*6 such te"):
        start_from(adapter, digest, model)


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
        ({"adapter": {"enable_lora": [True]}}, "enable_lora is a key of PEFT before 0.3; list the modules that LoRA"),
        (
            {"adapter": {"merge_weights": True}},
            "merge_weights is a key of PEFT before 0.3; leave it out, for run.merge",
        ),
        ({"adapter": {"type": "p_tuning", "init_from": "x"}}, "init_from cannot go with p_tuning: PEFT keeps what the"),
        (
            {
                "adapter": {
                    "type": "prompt_tuning",
                    "prompt_tuning_init": "TEXT",
                    "prompt_tuning_init_text": "a",
                    "init_from": "x",
                }
            },
            "adapter.prompt_tuning_init: TEXT and adapter.init_from are two beginnings; keep one",
        ),
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
    path = world.recipe("everything", adapter=ALL_OF_THEM | {"init_from": "a/b"}, train={"loraplus_lr_ratio": 16.0})
    recipe = load_recipe(path)
    assert isinstance(recipe.adapter, LoraBlock)
    assert recipe.adapter.model_dump()["rank_pattern"] == VARIANTS["patterns"]["rank_pattern"]
    assert hash(recipe) == hash(load_recipe(path)), "nothing in it can change"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
