"""The command of the README: it learns, merges, and what it merged answers questions it has not seen."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_launch import command
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import runs

pytestmark = pytest.mark.slow


def run_the_default_recipe(output_dir: Path) -> str:
    default = [*command(), "train.py", f"run.output_dir={output_dir}"]
    done = subprocess.run(default, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run directory, what was printed)."""
    output_dir = tmp_path_factory.mktemp("demo")
    return output_dir / "tiny", run_the_default_recipe(output_dir)


def test_it_learns_what_it_has_not_seen(demo: tuple[Path, str]) -> None:
    directory, _ = demo
    evaluations = [record for record in runs.read_metrics(directory) if record["kind"] == "evaluation"]
    assert evaluations[0]["step"] == 0 and evaluations[0]["token_accuracy"] < 0.1
    assert len(evaluations) > 2 and evaluations[-1]["token_accuracy"] >= 0.9


def test_its_last_lines_say_what_to_do_next(demo: tuple[Path, str]) -> None:
    directory, printed = demo
    last = "\n".join(printed.strip().splitlines()[-8:])
    assert "merged model" in last and str(directory / "merged") in "".join(last.split())
    assert "configs/recipes/qwen1.5-14b-lora.yaml data.train=ROWS.jsonl" in last
    assert f"python -m launch generate {directory}/recipe.yaml" in last
    assert (directory / "merged" / "config.json").exists()
    assert "is finished" in run_the_default_recipe(directory.parent)


def test_the_merged_model_answers_held_out_rows(demo: tuple[Path, str]) -> None:
    directory, _ = demo
    held_out = (directory / "evaluation_rows.txt").read_text(encoding="utf-8").splitlines()
    rows = (ROOT / "configs/data/tiny_chat.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = AutoTokenizer.from_pretrained(directory / "merged")
    model = AutoModelForCausalLM.from_pretrained(directory / "merged")
    assert model.dtype == torch.float16
    model = model.float()
    right = []
    for row_id in held_out:
        messages: list[dict[str, Any]] = json.loads(rows[int(row_id.rpartition(":")[2]) - 1])["messages"]
        prompt = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert answer[-1] == tokenizer.eos_token_id, f"{row_id}: the answer does not end"
        right.append(tokenizer.decode(answer, skip_special_tokens=True) == messages[-1]["content"])
    share = sum(right) / len(right)
    print(f"{sum(right)} of {len(right)} held-out answers are right, {share:.0%}")
    assert share >= 0.8


def test_generate_shows_what_it_learned(demo: tuple[Path, str]) -> None:
    directory, _ = demo
    generate = [sys.executable, "-m", "launch", "generate", str(directory / "recipe.yaml"), "--rows", "8"]
    out = subprocess.run(generate, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    answers = [re.findall(r"^  (?:answer|reference) +(.*)$", part, re.MULTILINE) for part in out.split("── ")[1:]]
    assert len(answers) == 8
    assert sum(answer == reference for answer, reference in answers) >= 6
