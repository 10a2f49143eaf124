"""python -m launch generate: what a run has learned, with its own prompt, tokens and end."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import World, launch, run_ranks
from peft import PeftModel
from test_adapters import SOFT
from test_cli import python_m_launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import runs
from launch.config import load_recipe
from launch.generate import Answer, answers


def answered(recipe: Path, num_rows: int, max_new_tokens: int) -> list[Answer]:
    return list(answers(load_recipe(recipe), num_rows, max_new_tokens))


def by_plain_peft(base: Path, directory: Path, prompt: str, max_new_tokens: int) -> str:
    """The greedy answer of base and adapter, token by token without a cache; the tokenizer is the adapter's."""
    tokenizer = AutoTokenizer.from_pretrained(directory / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, directory / "adapter").eval()
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    made: list[int] = []
    with torch.no_grad():
        while len(made) < max_new_tokens and tokenizer.eos_token_id not in made:
            made.append(int(model(input_ids=torch.cat([ids, torch.tensor([made]).long()], 1)).logits[0, -1].argmax()))
    return tokenizer.decode(made, skip_special_tokens=True).strip()


@pytest.mark.slow
def test_answers_are_those_of_base_and_adapter(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """By the merged weights, which are fp32 and so the same, by the adapter, and what is printed."""
    train = {"max_steps": 60, "learning_rate": 3e-2}
    recipe = world.recipe("answers", train=train, run={"merge": True, "merge_dtype": "float32"})
    launch(recipe, 2)
    directory = world.run_directory("answers")
    merged = run_ranks(1, answered, recipe, 3, 24)[0]
    shutil.rmtree(directory / "merged")
    adapted = run_ranks(1, answered, recipe, 3, 24)[0]
    assert [a.row_id for a in adapted] == (directory / "evaluation_rows.txt").read_text().splitlines()[:3]
    assert {a.model for a in merged} == {"merged model, fp32 on cpu"}
    assert {a.model for a in adapted} == {"base and adapter, fp32 on cpu"}
    assert len({a.answer for a in adapted}) > 1, "the same answer to all says little"
    for ours, of_merged in zip(adapted, merged, strict=True):
        assert ours.prompt.startswith("<|im_start|>user\n") and ours.prompt.endswith(
            "<|im_end|>\n<|im_start|>assistant\n"
        )
        theirs = run_ranks(1, by_plain_peft, world.base, directory, ours.prompt, 24)[0]
        assert ours.answer.removesuffix("...") == of_merged.answer.removesuffix("...") == theirs
    capfd.readouterr()
    code, out, _ = python_m_launch("generate", recipe, "--rows", "2", "--max-new-tokens", "4")
    assert code == 0 and out.count("── rows.jsonl:") == out.count("\n  reference   ") == 2
    assert adapted[0].reference in " ".join(out.split())


@pytest.mark.parametrize("name", ["text", pytest.param("projected", marks=pytest.mark.slow)])
def test_soft_prompts_answer_too(world: World, name: str) -> None:
    recipe = world.recipe(f"soft-{name}", adapter=SOFT[name], train={"max_steps": 3}, run={"merge": None})
    launch(recipe, 1)
    found = run_ranks(1, answered, recipe, 1, 8)[0]
    theirs = run_ranks(1, by_plain_peft, world.base, world.run_directory(f"soft-{name}"), found[0].prompt, 8)[0]
    assert found[0].answer.removesuffix("...") == theirs


def test_a_run_without_an_adapter_is_refused(world: World) -> None:
    recipe = world.recipe("not-there")
    with runs.open_run(world.run_directory("not-there")):
        pass
    directory = world.run_directory("not-there")
    sentence = f"Refused: The run in {directory} has no finished adapter (it is %s); run train.py to its end.\n"
    assert python_m_launch("generate", recipe) == (2, "", sentence % "not started")
    runs.write_status(directory, "preempted", "asked to stop")
    assert python_m_launch("generate", recipe) == (2, "", sentence % "preempted")


def test_long_and_wide_texts_keep_to_80_columns() -> None:
    answer = Answer("rows.json:1", "merged model, bf16 on cuda", "x" * 300, "石" * 90 + "\n路", "st\rone")
    lines = answer.as_text().splitlines()
    assert all(len(line) + sum(character in "石路" for character in line) <= 80 for line in lines)
    assert lines[1].startswith("  prompt      ...x") and lines[-1] == "  reference   st�one"
    assert sum(line.count("石") for line in lines) == 90 and lines[-2] == " " * 14 + "路"
