"""A base in 4 bits and tokens added to it: the same as plain bitsandbytes and PEFT, on any ranks and ZeRO stage."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, World, build_base, build_tokenizer, deepspeed_json, launch, run_ranks
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from test_launch import finish, ranks_of, start, wait_until
from test_reference import samples_of, their_loss
from test_resume import stop_at
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

import train
from launch import batching, runs
from launch import engine as engines
from launch.checkpoint import path_of_step
from launch.config import load_recipe
from launch.data import prepare
from launch.errors import MergeError, ModelError
from launch.merge_from_disk import find_source, merge_from_disk
from launch.model import add_tokens, added_token_ids, load_base, load_tokenizer, tokenizer_and_template
from launch.recipe import ModelBlock, Recipe
from launch.vocabulary import fit_vocabulary

TOKENS: dict[str, Any] = {
    "extra_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "eos_token": "<|im_end|>",
    "pad_token": "<PAD>",
}
NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
PHI: dict[str, Any] = {
    "r": 4,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj", "dense", "fc1", "fc2"],
    "modules_to_save": ["embed_tokens", "lm_head"],
}
ROWS: dict[str, Any] = {"modules_to_save": ["lm_head"], "trainable_token_indices": "added"}
WHOLE: dict[str, Any] = {"load_in_4bit": False, "bnb_4bit_use_double_quant": False}
KINDS = [(2, "nf4"), pytest.param(3, "nf4", marks=pytest.mark.slow), pytest.param(3, "whole", marks=pytest.mark.slow)]


def make_riddles(count: int) -> list[list[str]]:
    """Invented ones, in one or two questions with their answers; every text is another."""
    things = {
        "a river": "runs and never walks",
        "a clock": "has hands and cannot clap",
        "a map": "has towns, no houses",
    }
    riddles = []
    for number in range(count):
        thing, saying = list(things.items())[number % len(things)]
        turns = [f"Riddle {number}: it {saying}. What is it?", f"It is {thing}, number {number}."]
        more = ["Why?", f"Because {thing} {saying}."]
        riddles.append(turns + more * (number % 2))
    return riddles


def build_phi(directory: Path, texts: list[str], *, vocab_size: int | None = None) -> Path:
    """A random Phi whose tokenizer has no ChatML tokens; its embeddings have `vocab_size` rows, or one a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    torch.manual_seed(0)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=vocab_size or len(fast),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            partial_rotary_factor=0.4,
            max_position_embeddings=1024,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    model.lm_head.bias.data.normal_()  # a new model's is zero
    model.save_pretrained(str(directory))
    fast.save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny Phi and 60 riddles."""
    directory = tmp_path_factory.mktemp("phi")
    riddles = make_riddles(60)
    rows = directory / "riddles.jsonl"
    rows.write_text("".join(json.dumps({"messages": riddle}) + "\n" for riddle in riddles), encoding="utf-8")
    base = build_phi(directory / "base", [text for riddle in riddles for text in riddle])
    return World(directory, base, rows)


def phi_recipe(phi: World, name: str, **blocks: dict[str, Any]) -> Path:
    given: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(phi.base), **TOKENS, **NF4},
        "data": {"template": "phi"},
        "adapter": PHI,
        "train": {"max_steps": 5, "warmup_steps": 0, "lr_scheduler_type": "constant"},
    }
    return phi.recipe(name, **{key: given.get(key, {}) | blocks.get(key, {}) for key in given.keys() | blocks.keys()})


# ---- tokens ----


def test_tokens_are_added_once_and_survive_saving(phi: World, tmp_path: Path) -> None:
    settings = ModelBlock(name_or_path=str(phi.base), **TOKENS)
    own = AutoTokenizer.from_pretrained(phi.base)
    tokenizer = load_tokenizer(str(phi.base), settings)
    start, end, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>", "<PAD>"))
    assert [start, end, pad] == [len(own), len(own) + 1, len(own) + 2]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, pad)
    assert tokenizer("a<|im_end|>b")["input_ids"] == [*own("a")["input_ids"], end, *own("b")["input_ids"]]
    assert added_token_ids(tokenizer, str(phi.base), settings) == {start, end, pad}
    tokenizer.save_pretrained(str(tmp_path))
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.get_vocab() == tokenizer.get_vocab() and saved.all_special_ids == tokenizer.all_special_ids
    again = ModelBlock(name_or_path=str(tmp_path), **TOKENS)
    assert added_token_ids(load_tokenizer(str(tmp_path), again), str(tmp_path), again) == set()


def test_a_token_that_is_there_keeps_its_id_and_becomes_special() -> None:
    tokenizer = build_tokenizer(["a b c"])
    before = tokenizer.get_vocab()
    add_tokens(tokenizer, ModelBlock(name_or_path="x", extra_special_tokens=("<|im_end|>", "a")))
    assert tokenizer.get_vocab() == before
    assert {"<|im_end|>", "a"} <= set(tokenizer.all_special_tokens)


def test_prepared_rows_are_not_taken_for_those_of_other_tokens(phi: World, tmp_path: Path) -> None:
    """<PAD> stands in no template, but a row that holds it is another row once it is a token."""

    def is_found(name: str, **tokens: Any) -> bool:
        recipe = load_recipe(phi_recipe(phi, name, model=tokens))
        return prepare(recipe, tmp_path, lambda: tokenizer_and_template(recipe)).publish(tmp_path).was_there

    assert not is_found("first") and is_found("again") and not is_found("other", pad_token="<|endoftext|>")


# ---- rows ----


def fitted(base: Path, settings: ModelBlock, recipe: Path | None) -> tuple[int, dict[str, torch.Tensor]]:
    """(vocab_size, every tensor with a row for each token) after the tokens were added; under ZeRO with a recipe."""
    if recipe is not None:
        engines.quiet_libraries()
        engines.create_accelerator(load_recipe(recipe), "fp32")
    model = load_base(str(base), settings, "fp32")
    tokenizer = load_tokenizer(str(base), settings)
    fit_vocabulary(model, tokenizer, added_token_ids(tokenizer, str(base), settings), settings)
    found = {}
    for name, tensor in model.named_parameters():
        if "embed_tokens" in name or "lm_head" in name:
            with engines.whole_parameter(tensor) as whole:
                found[name] = whole.clone()
    return model.config.vocab_size, {name: tensor.numpy() for name, tensor in found.items()}


LAYOUTS = [(3, 3), pytest.param(2, 3, marks=pytest.mark.slow), pytest.param(3, 1, marks=pytest.mark.slow)]
BASES = ["grown", pytest.param("roomy", marks=pytest.mark.slow), pytest.param("tied", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("stage", "num_ranks"), LAYOUTS)
@pytest.mark.parametrize("kind", BASES)
def test_new_rows_are_the_mean_on_any_ranks(phi: World, kind: str, stage: int, num_ranks: int, tmp_path: Path) -> None:
    """`roomy`, as Phi-2 is: more rows than tokens, and those that no token had are no better than new ones."""
    if kind == "tied":
        base = build_base(tmp_path / "base", ["a b c"], tied=True)
        tokens = {"extra_special_tokens": ("<a>", "<b>")}
    else:
        texts = [text for riddle in make_riddles(60) for text in riddle]
        base = build_phi(tmp_path / "base", texts, vocab_size=640 if kind == "roomy" else None)
        tokens = TOKENS | {"extra_special_tokens": tuple(TOKENS["extra_special_tokens"])}
    settings = ModelBlock(name_or_path=str(base), **tokens)
    recipe = phi.recipe(f"rows-{kind}-{stage}-{num_ranks}")
    (vocab_size, alone), *ranks = [
        *run_ranks(1, fitted, base, settings, None),
        *run_ranks(num_ranks, fitted, base, settings, recipe, deepspeed=deepspeed_json(tmp_path, stage)),
    ]
    before = load_file(base / "model.safetensors")
    own = len(AutoTokenizer.from_pretrained(base))
    assert vocab_size % 64 == 0 and vocab_size >= own + len(tokens["extra_special_tokens"])
    assert alone.keys() == {name for name in before if "embed_tokens" in name or "lm_head" in name}
    for name, found in alone.items():
        old = before[name].numpy()[:own]
        assert found.shape[0] == vocab_size and (found[:own] == old).all()
        assert abs(found[own:] - old.astype("float64").mean(0)).max() < 1e-6
        for other_size, other in ranks:
            assert other_size == vocab_size and (other[name] == found).all()


# ---- numbers ----


def their_base(recipe: Recipe, *, quantised: bool) -> torch.nn.Module:
    """Phi with rows for the tokens, by transformers and bitsandbytes alone."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name_or_path)
    own = len(tokenizer)
    tokenizer.add_special_tokens(dict(TOKENS))
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    how = {"quantization_config": nf4} if quantised else {}
    model = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype=torch.float32, **how)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    by_row = [model.model.embed_tokens.weight, model.lm_head.weight]
    for tensor in filter(lambda tensor: tensor is not None, [*by_row, model.lm_head.bias]):
        tensor.data[own:] = tensor.data[:own].mean(0, dtype=torch.float64).float()
    return model


def their_losses(path: Path) -> list[float]:
    """The loss of every step of a run by a plain loop."""
    recipe = load_recipe(path)
    settings = recipe.train
    samples, _ = samples_of(recipe)
    base = their_base(recipe, quantised=recipe.model.load_in_4bit)
    torch.manual_seed(settings.seed)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_alpha=16, **PHI))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(settings.max_steps or 0):
        loss = their_loss(model, samples, batching.step_samples(step, len(samples), 8, 10_000, settings.seed))
        loss.backward()
        losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(("stage", "kind"), KINDS)
def test_losses_are_those_of_a_plain_loop(
    phi: World, stage: int, kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run evaluates before its first step, after which bitsandbytes would compute otherwise on some CPUs."""
    name = f"losses-{stage}-{kind}"
    recipe = phi_recipe(phi, name, model=NF4 if kind == "nf4" else WHOLE)
    launch(recipe, 2, deepspeed=deepspeed_json(tmp_path, stage))
    said = " ".join(capfd.readouterr().out.split())
    kept = "keeps its share (ZeRO-3)" if stage == 3 else "keeps all of it (ZeRO-2)"
    line = f"4 bits, nf4, its constants as well; each rank quantised the whole and {kept}"
    assert (line in said) == (kind == "nf4")
    expected = run_ranks(1, their_losses, recipe)[0]
    found = [record["loss"] for record in phi.metrics(name, "train")]
    assert expected[-1] < 0.8 * expected[0], "the run must learn"
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_in_16_bits_the_base_stays_packed_and_losses_are_near(phi: World, stage: int, tmp_path: Path) -> None:
    """DeepSpeed casts the model's weights to the run's type, which must not reach the packed ones."""
    name = f"bf16-{stage}"
    recipe = phi_recipe(phi, name, train={"precision": "bf16"}, run={"merge": True})
    launch(recipe, 2, deepspeed=deepspeed_json(tmp_path, stage))
    found = [record["loss"] for record in phi.metrics(name, "train")]
    assert found[:3] == pytest.approx(run_ranks(1, their_losses, recipe)[0][:3], rel=1e-2)
    with safe_open(phi.run_directory(name) / "merged" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.mlp.fc1.weight").dtype == torch.bfloat16


# ---- a stop, and the merge ----


def logits_of(directory: Path, path: Path, prompt: str) -> tuple[Any, ...]:
    """By the merged model, by the adapter on the unquantised base, and by that alone; and what the merged one says."""
    recipe = load_recipe(path)
    merged, info = AutoModelForCausalLM.from_pretrained(directory / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    base = their_base(recipe, quantised=False)
    tokenizer = AutoTokenizer.from_pretrained(directory / "merged")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        alone = base.eval()(ids).logits
        adapted = PeftModel.from_pretrained(base, str(directory / "adapter")).eval()(ids).logits
        found = merged.eval()(ids).logits
    config = json.loads((directory / "merged" / "config.json").read_text(encoding="utf-8"))
    generation = merged.generation_config.to_dict()
    return found.numpy(), adapted.numpy(), alone.numpy(), config, generation, tokenizer.eos_token_id


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind", "adapter"),
    [(2, "nf4", {}), (3, "nf4", {}), (3, "whole", {}), (2, "nf4", ROWS), (3, "whole", ROWS)],
)
def test_stopped_on_two_ranks_resumed_on_one_and_merged_in_full_precision(
    phi: World, stage: int, kind: str, adapter: dict[str, Any], tmp_path: Path
) -> None:
    blocks: dict[str, dict[str, Any]] = {
        "model": NF4 if kind == "nf4" else WHOLE,
        "adapter": adapter,
        "train": {"max_steps": 6, "save_steps": 3},
        "run": {"merge": True, "merge_dtype": "float32"},
    }
    zero = deepspeed_json(tmp_path, stage)
    straight, stopped = (f"{run}-{stage}-{kind}-{len(adapter)}" for run in ("straight", "stopped"))
    launch(phi_recipe(phi, straight, **blocks), 2, deepspeed=zero)
    recipe = phi_recipe(phi, stopped, **blocks)
    assert [code for code, _ in run_ranks(2, stop_at, 2, [str(recipe)], deepspeed=zero)] == [0, 0]
    launch(recipe, 1, deepspeed=zero)
    directory = phi.run_directory(stopped)
    expected, found = (
        load_file(path_of_step(phi.run_directory(name), 6) / "optimizer.safetensors") for name in (straight, stopped)
    )
    assert expected.keys() == found.keys() and any("lm_head" in name for name in found)
    assert any("trainable_tokens" in name for name in found) == bool(adapter)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()), msg=name)

    prompt = "<|im_start|>user\nRiddle 3: it runs and never walks.<|im_end|>\n<|im_start|>assistant\n"
    merged, adapted, alone, config, generation, eos = run_ranks(1, logits_of, directory, recipe, prompt)[0]
    assert abs(adapted - alone).max() > 0.5, "the adapter must matter"
    assert abs(merged - adapted).max() < 1e-4 * abs(adapted).max()
    assert config["vocab_size"] == merged.shape[-1] and "quantization_config" not in config
    assert config["eos_token_id"] == eos and eos in generation["eos_token_id"]


def by_peft(path: Path, directory: Path) -> dict[str, Any]:
    """PEFT's own merge in fp32 of the run's adapter into the base in float16, rounded once."""
    base = their_base(load_recipe(path), quantised=False).half().float()
    merged = PeftModel.from_pretrained(base, str(directory / "adapter")).merge_and_unload().half()
    return {name: tensor.numpy() for name, tensor in merged.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kind"), [(3, "saved"), (2, "rows"), (3, "rows"), (3, "tied"), (3, "whole")])
def test_the_merge_is_that_of_peft_into_the_base_that_was_quantised(
    phi: World, stage: int, kind: str, tmp_path: Path
) -> None:
    """Bit by bit, with the rows that were added to it, at the end of the run and from disk.

    The reports agree as well, but for the last digits of logits in fp32: processes multiply otherwise.
    """
    rows = {"trainable_token_indices": "added"}
    adapter = {"saved": {}, "whole": {}, "rows": ROWS, "tied": {"target_modules": ["q_proj", "down_proj"], **rows}}[
        kind
    ]
    model: dict[str, Any] = WHOLE if kind == "whole" else {}
    if kind == "tied":
        texts = [text for riddle in make_riddles(60) for text in riddle]
        base = build_base(tmp_path / "base", texts, tied=True)
        model = {"name_or_path": str(base), "extra_special_tokens": ["<a>", "<b>"]}
        adapter = {"modules_to_save": [], **adapter}
    run = {"merge": True, "merge_dtype": "float16", "max_shard_size_bytes": 40_000}
    recipe = phi_recipe(phi, f"as-peft-{kind}-{stage}", model=model, adapter=adapter, run=run)
    launch(recipe, 2, deepspeed=deepspeed_json(tmp_path, stage))
    directory = phi.run_directory(recipe.stem)
    found = {
        name: tensor
        for path in (directory / "merged").glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    (expected,) = run_ranks(1, by_peft, recipe, directory)
    assert found.keys() == expected.keys() - ({"lm_head.weight"} if kind == "tied" else set())
    for name, tensor in found.items():
        assert torch.equal(tensor, torch.from_numpy(expected[name])), name
    assert not merge_from_disk(find_source(directory), directory / "merged", max_shard_size_bytes=40_000)
    assert merge_from_disk(find_source(directory), tmp_path / "merged", max_shard_size_bytes=40_000)
    ours, theirs = (
        {path.name: path.read_bytes() for path in place.iterdir()}
        for place in (tmp_path / "merged", directory / "merged")
    )
    reports = [json.loads(files.pop("merge_report.json")) for files in (ours, theirs)]
    logits = [report.pop("logits") for report in reports]
    assert logits[0].pop("of") == logits[1].pop("of") and logits[0] == pytest.approx(logits[1], rel=0.01)
    differ = {key for key in reports[0].keys() | reports[1].keys() if reports[0].get(key) != reports[1].get(key)}
    assert differ == ({"step"} if kind == "whole" else set())
    assert {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)} <= {"manifest.json"}


@pytest.mark.slow
def test_the_recipe_of_phi_2(phi: World) -> None:
    """The real launcher on two ranks, killed once, continued by the same command, reloaded by plain transformers."""
    recipe = ROOT / "configs/recipes/phi-2-qlora.yaml"
    overrides = [
        f"model.name_or_path={phi.base}",
        f"data.train={phi.rows}",
        f"run.output_dir={phi.directory / 'runs'}",
        "train.max_steps=8",
        "train.save_steps=2",
        "train.learning_rate=1e-2",
    ]
    directory = phi.run_directory(recipe.stem)
    process = start(recipe, *overrides, config="zero2")
    wait_until(path_of_step(directory, 2).exists, 300, "a checkpoint")
    process.kill()
    wait_until(lambda: not ranks_of(recipe), 5, "without ranks")
    process.communicate()
    said = finish(start(recipe, *overrides, config="zero2"))
    assert "resumed after step" in said and "2 ranks, DeepSpeed ZeRO-2" in said
    assert runs.read_status(directory)["state"] == "finished"
    losses = [record["loss"] for record in phi.metrics(recipe.stem, "evaluation")]
    assert losses[-1] < 0.8 * losses[0]

    tokenizer = AutoTokenizer.from_pretrained(directory / "merged")
    merged = AutoModelForCausalLM.from_pretrained(directory / "merged").eval()
    assert merged.dtype == torch.float16
    question = [{"role": "user", "content": "Riddle 3: it runs and never walks. What is it?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    start_id, end_id = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert int(prompt["input_ids"][0, 0]) == start_id and tokenizer.eos_token_id == end_id
    answer = merged.float().generate(**prompt, max_new_tokens=8, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]

    base = AutoModelForCausalLM.from_pretrained(phi.base, dtype=torch.float32)
    base.resize_token_embeddings(merged.config.vocab_size, mean_resizing=False)  # the adapter has all its rows
    adapted = PeftModel.from_pretrained(base, str(directory / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**prompt).logits, adapted(**prompt).logits, rtol=0.05, atol=0.05)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"bnb_4bit_use_double_quant": True}, "set load_in_4bit: true, or leave them out"),
        ({"bnb_4bit_quant_type": "fp4"}, "say how the base is quantised, but it is not"),
        ({"extra_special_tokens": ["<a>", "<a>"]}, "has an empty token, or one twice; list each once"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "Input should be 'nf4' or 'fp4'"),
        ({"eos_token": ""}, "String should have at least 1 character"),
    ],
)
def test_what_cannot_go_together(model: dict[str, Any], sentence: str) -> None:
    tree = {"model": {"name_or_path": "x", **model}, "data": {"train": "x", "template": "phi"}, "run": {"name": "x"}}
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(tree)
    assert sentence in str(caught.value)


def test_added_tokens_without_trained_rows_are_refused(phi: World, capfd: pytest.CaptureFixture[str]) -> None:
    """They would all be one and the same token."""
    recipe = phi_recipe(phi, "untrained", adapter={"modules_to_save": ["embed_tokens"]})
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    assert (
        "'<|im_start|>', '<|im_end|>': added to the tokenizer, but lm_head is not trained, so that all added rows "
        "would stay the same; put lm_head into adapter.modules_to_save."
    ) in capfd.readouterr().err
    recipe = phi_recipe(
        phi, "untrained", model={"extra_special_tokens": [], "eos_token": None, "pad_token": None}, adapter=ROWS
    )
    assert run_ranks(1, train.main, [str(recipe), "data.template=plain"]) == [1]
    assert "trainable_token_indices = added, but the tokenizer has every token" in capfd.readouterr().err


@pytest.mark.parametrize("settings", [NF4, WHOLE])
def test_a_base_that_is_published_in_4_bits_is_refused(phi: World, settings: dict[str, Any], tmp_path: Path) -> None:
    their_base(load_recipe(phi_recipe(phi, "published")), quantised=True).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"quantised already \(bitsandbytes, 4 bits\).*; name those in model\.name_or_path, and set"
    ):
        load_base(str(tmp_path), ModelBlock(name_or_path=str(tmp_path), **settings), "fp32")


WITHOUT_BITSANDBYTES = """if True:
    import importlib.machinery, sys

    class Without(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return None if name == "bitsandbytes" else super().find_spec(name, path, target)

    sys.meta_path = [Without if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
    from launch.__main__ import app
    app(sys.argv[1:])
"""


@pytest.mark.slow
def test_without_bitsandbytes_4_bits_are_refused_and_the_rest_works(phi: World) -> None:
    """And it hides nothing else that is wrong."""
    command = [sys.executable, "-c", WITHOUT_BITSANDBYTES, "check", str(phi_recipe(phi, "absent"))]
    misspelt = "adapter.target_modules=[q_porj]"
    refused = subprocess.run([*command, misspelt], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    first, targets, absent = refused.stderr.splitlines()
    assert first == "Refused: 2 things stand in the way." and "no module of the model is named 'q_porj'" in targets
    assert absent == (
        "  2. model.load_in_4bit needs bitsandbytes, which does not work here (No module named 'bitsandbytes'); "
        "install the version that requirements.txt names, or set model.load_in_4bit to false."
    )
    whole = ["model.load_in_4bit=false", "model.bnb_4bit_use_double_quant=false"]
    assert subprocess.run([*command, *whole], capture_output=True, check=False).returncode == 0


def test_a_template_whose_end_token_is_not_there_names_the_remedy(
    phi: World, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = phi_recipe(phi, "endless", model={"extra_special_tokens": [], "eos_token": None, "pad_token": None})
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    assert "or add its end token with model.extra_special_tokens." in capfd.readouterr().err


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        ({"modules_to_save": ["embed_tokens", "lm_head", "dense"]}, "dense is in 4 bits, which cannot be trained"),
        ({"use_dora": True}, "adapter.use_dora on a base in 4 bits unpacks weights that ZeRO-3 does not know"),
    ],
)
def test_what_4_bits_cannot_do_is_said_before_the_weights_are_read(
    phi: World, adapter: dict[str, Any], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = phi_recipe(phi, "cannot", adapter=adapter, run={"merge": False})
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    said = capfd.readouterr().err
    assert said.startswith("Refused: ") and sentence in said


@pytest.mark.slow
def test_dora_on_4_bits_trains_where_each_rank_has_it_whole(phi: World, tmp_path: Path) -> None:
    recipe = phi_recipe(phi, "dora", adapter={"use_dora": True}, train={"max_steps": 2}, run={"merge": False})
    launch(recipe, 2, deepspeed=deepspeed_json(tmp_path, 2))
    assert runs.read_status(phi.run_directory("dora"))["state"] == "finished"
    with pytest.raises(
        MergeError, match="adapter: DoRA learned magnitudes of the weights as they are in 4 bits, so that"
    ):
        merge_from_disk(find_source(phi.run_directory("dora")), tmp_path / "merged", max_shard_size_bytes=10**9)
