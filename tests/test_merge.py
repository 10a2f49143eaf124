"""The merged directory is base + adapter, and plain transformers loads it."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import World, build_base, launch, make_rows, run_ranks
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

import train
from launch import runs
from launch.merge_from_disk import find_source, merge_from_disk
from launch.merge_rule import add_lora

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["untied", "tied"])
def any_world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("merge")
    rows = make_rows(50)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = build_base(directory / "base", [row["input"] + row["output"] for row in rows], tied=request.param)
    return World(directory, base, directory / "rows.jsonl")


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "dora": {"use_dora": True},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 8, r"layers\.1\..*_proj": 2},
        "alpha_pattern": {"v_proj": 5},
    },
    "tokens": {"trainable_token_indices": [1, 2, 300]},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_merged_logits_are_those_of_base_and_adapter(any_world: World, kind: str) -> None:
    name = f"merge-{kind}"
    adapter = {"target_modules": ALL, **KINDS[kind]}
    train = {"max_steps": 6, "learning_rate": 3e-2}
    shards = {"merge": True, "merge_dtype": "float16", "max_shard_size_bytes": 20_000}
    launch(any_world.recipe(name, adapter=adapter, train=train, run=shards), 2)
    run_directory = any_world.run_directory(name)
    assert merge_from_disk(find_source(run_directory), run_directory / "from-disk", max_shard_size_bytes=20_000)
    assert not merge_from_disk(find_source(run_directory), run_directory / "merged", max_shard_size_bytes=20_000)
    for path in (run_directory / "merged").iterdir():
        if path.name in ("manifest.json", "merge_report.json"):
            continue  # they tell the step, and from where
        assert path.read_bytes() == (run_directory / "from-disk" / path.name).read_bytes(), "the same, to the last byte"
    merged, info = AutoModelForCausalLM.from_pretrained(run_directory / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert merged.dtype == torch.float16
    assert len(list((run_directory / "merged").glob("model-*.safetensors"))) > 1
    base = AutoModelForCausalLM.from_pretrained(any_world.base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(run_directory / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(run_directory / "merged")
    messages = [{"role": "user", "content": "cairn stone 石头"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    assert tokenizer.decode(ids[0]) == "<|im_start|>user\ncairn stone 石头<|im_end|>\n<|im_start|>assistant\n"
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(any_world.base, dtype=torch.float32)(ids).logits
        expected, found = tuned(ids).logits, merged.float()(ids).logits
    assert (expected - before).abs().max() > 0.5, "the adapter must matter"
    assert (expected - found).abs().max() < 0.003 * expected.abs().max()
    assert merged.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
    is_tied = merged.config.tie_word_embeddings
    was_tied = base.config.tie_word_embeddings
    assert is_tied == (was_tied and "modules_to_save" not in adapter)


def files_of(directory: Path) -> dict[str, bytes]:
    """All but those that tell where the merge came from."""
    told = {"manifest.json", "merge_report.json"}
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in told}


@pytest.mark.slow
def test_four_ranks_write_what_the_merge_from_disk_writes(any_world: World) -> None:
    """Of a base in fp32 that was trained in bf16, too, though the merged model has room for more."""
    adapter = {"target_modules": ALL, "use_dora": True, "modules_to_save": ["lm_head"]}
    run = {"merge": True, "merge_dtype": "float32", "max_shard_size_bytes": 40_000}
    train = {"precision": "bf16", "learning_rate": 3e-2}
    launch(any_world.recipe("four", adapter=adapter, train=train, run=run), 4)
    directory = any_world.run_directory("four")
    assert merge_from_disk(find_source(directory), directory / "from-disk", max_shard_size_bytes=40_000)
    found, expected = files_of(directory / "merged"), files_of(directory / "from-disk")
    assert len([name for name in found if name.endswith(".safetensors")]) > 3
    assert found.keys() == expected.keys() and [name for name in found if found[name] != expected[name]] == []


@pytest.mark.slow
def test_rows_are_added_to_a_head_that_has_another_name_in_the_files(world: World, tmp_path: Path) -> None:
    """GPT-NeoX's, which transformers renames on loading."""
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = {"name_or_path": str(tmp_path / "base"), "pad_token": "<PAD>"}
    adapter = {"target_modules": ["query_key_value"]}
    launch(world.recipe("neox", model=model, adapter=adapter, run={"merge": True}), 2)
    directory = world.run_directory("neox")
    assert merge_from_disk(find_source(directory), directory / "from-disk", max_shard_size_bytes=10**9)
    found, expected = files_of(directory / "merged"), files_of(directory / "from-disk")
    assert found.keys() == expected.keys() and [name for name in found if found[name] != expected[name]] == []
    with safe_open(directory / "merged" / "model.safetensors", "pt") as file:
        assert file.get_tensor("embed_out.weight").shape[0] > len(tokenizer)


def on_a_slow_disk(arguments: list[str]) -> int:
    """train.py's main; rank zero's disk stands still for 12 s in the middle of the tensors, and behind them."""

    def stand_still(event: str, details: tuple[Any, ...]) -> None:
        if event == "open" and Path(str(details[0])).name.startswith(("model-00002-of", "generation_config")):
            time.sleep(12 if isinstance(details[2], int) and details[2] & os.O_WRONLY else 0)

    if os.environ["RANK"] == "0":
        sys.addaudithook(stand_still)
    return train.main(arguments)


@pytest.mark.slow
def test_the_other_ranks_wait_longer_than_a_collective_may_take(world: World) -> None:
    run = {"merge": True, "max_shard_size_bytes": 40_000, "process_group_timeout_seconds": 10}
    recipe = world.recipe("slow-disk", train={"max_steps": 1}, run=run)
    assert run_ranks(2, on_a_slow_disk, [str(recipe)]) == [0, 0]
    assert list((world.run_directory("slow-disk") / "merged").glob("model-00002-of-*.safetensors"))


def test_one_rounding_rule() -> None:
    """The base is cast first, the product is added in fp32, the sum is rounded once."""
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*shape, generator=generator) for shape in ((16, 8), (2, 8), (16, 2)))
    expected = (weight.half().double() + 0.5 * (b.double() @ a.double())).half()
    found = add_lora(weight.half().float(), a, b, 0.5).half()
    assert (found != expected).float().mean() < 0.02  # fp32 and float64 differ at ties only
    twice_rounded = weight.half() + (0.5 * (b @ a)).half()
    assert (twice_rounded != expected).float().mean() > 0.1


@pytest.mark.slow
def test_what_the_merge_would_not_replace_is_refused_before_the_first_step(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = world.recipe("mine", run={"merge": True})
    mine = world.run_directory("mine") / "merged" / "model.gguf"
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    assert "merged is there and is no merge, so that it is not replaced" in capfd.readouterr().err
    assert mine.exists() and runs.read_status(world.run_directory("mine"))["state"] == "refused"


@pytest.mark.slow
def test_overflow_is_refused_and_leaves_nothing(any_world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """A weight that float16 cannot hold: one sentence, no directory, and the same command with bfloat16 merges."""
    base = AutoModelForCausalLM.from_pretrained(any_world.base, dtype=torch.float32)
    base.model.layers[0].self_attn.k_proj.weight.data[0, 0] = 1e6
    huge = any_world.directory / "huge"
    base.save_pretrained(huge)
    AutoTokenizer.from_pretrained(any_world.base).save_pretrained(huge)
    world = World(any_world.directory, huge, any_world.rows)
    recipe = world.recipe("huge", run={"merge": True, "merge_dtype": "float16"}, train={"max_steps": 1})
    assert run_ranks(1, train.main, [str(recipe)]) == [1]
    assert "k_proj.weight is not finite in float16" in capfd.readouterr().err
    directory = world.run_directory("huge")
    assert not [path.name for path in directory.iterdir() if "merged" in path.name]
    launch(recipe, 1, "run.merge_dtype=bfloat16")
    with safe_open(directory / "merged" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.self_attn.k_proj.weight").dtype == torch.bfloat16
