"""Systems that people run, each by its shipped recipe on a tiny model of the same architecture and on real rows.

The real launcher on two ranks, killed once, continued by the same command, reloaded by plain transformers and PEFT.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHARED_DATA, build_base, build_remote_base
from peft import PeftModel
from test_launch import finish, ranks_of, start, wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import runs
from launch.checkpoint import path_of_step
from launch.samples import Samples

pytestmark = pytest.mark.slow
NUM_ROWS = 200


SMALL = ("train.max_steps=8", "train.save_steps=2", "train.learning_rate=1e-2")


def real_rows(name: str, directory: Path) -> tuple[list[dict[str, str]], Path]:
    """(the first rows of a real file, a file of them alone)."""
    source = SHARED_DATA / name
    if not source.exists():
        pytest.skip(f"{source} is not there")
    rows = json.loads(source.read_text(encoding="utf-8"))[:NUM_ROWS]
    path = directory / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return rows, path


def killed_and_continued(recipe: Path, overrides: Sequence[str], directory: Path) -> str:
    """What the second launch printed: the first is killed after a checkpoint, the same command ends the run."""
    process = start(recipe, *overrides)
    wait_until(path_of_step(directory, 2).exists, 120, "a checkpoint")
    process.kill()
    wait_until(lambda: not ranks_of(recipe), 5, "without ranks")
    process.communicate()
    said = finish(start(recipe, *overrides))
    assert "resumed after step" in said
    assert runs.read_status(directory)["state"] == "finished"
    steps = [record["step"] for record in runs.read_metrics(directory) if record["kind"] == "evaluation"]
    assert steps == [0, 8]
    return said


@pytest.mark.parametrize("method", ["lora", "p-tuning", "prefix-tuning", "prompt-tuning"])
def test_qwen2_on_chinese_alpaca_rows(method: str, tmp_path: Path) -> None:
    rows, path = real_rows("alpaca_zh_demo.json", tmp_path)
    texts = [row["instruction"] + row["input"] + row["output"] for row in rows]
    base = build_base(tmp_path / "base", texts, vocab_size=2000)
    recipe = ROOT / f"configs/recipes/qwen2-7b-{method}.yaml"
    overrides = [
        f"model.name_or_path={base}",
        f"data.train={path}",
        f"run.output_dir={tmp_path / 'runs'}",
        *SMALL,
        "data.max_dropped_share=1",  # what is long in 2,000 tokens is not in Qwen2's 150,000
    ]
    directory = tmp_path / "runs" / recipe.stem
    killed_and_continued(recipe, overrides, directory)

    tokenizer = AutoTokenizer.from_pretrained(directory / "adapter")
    question = [{"role": "user", "content": rows[0]["instruction"]}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, directory / "adapter").eval()
    answer = adapted.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
    assert (directory / "merged").exists() == (method == "lora")
    if method == "lora":
        merged = AutoModelForCausalLM.from_pretrained(directory / "merged", dtype=torch.float32)
        torch.testing.assert_close(merged(**prompt).logits, adapted(**prompt).logits, rtol=0.05, atol=0.05)


def test_bluelm_on_the_lines_of_one_character(tmp_path: Path) -> None:
    """Remote code with a slow tokenizer and its own checkpointing; begin and end are ids; the result answers."""
    rows, path = real_rows("huanhuan.json", tmp_path)
    base = build_remote_base(tmp_path / "base", [row["instruction"] + row["output"] for row in rows])
    recipe = ROOT / "configs/recipes/bluelm-7b-lora.yaml"
    overrides = [f"model.name_or_path={base}", f"data.train={path}", f"run.output_dir={tmp_path / 'runs'}", *SMALL]
    directory = tmp_path / "runs" / recipe.stem
    said = killed_and_continued(recipe, overrides, directory)
    assert said.count("Warning: model.trust_remote_code lets configuration_tiny.py, modeling_tiny.py, tokeniz") == 1
    assert "padded: TinyForCausalLM takes no position_ids or logits_to_keep" in said

    samples = Samples.load(directory / "data", "train")
    tokenizer = AutoTokenizer.from_pretrained(directory / "merged", trust_remote_code=True)
    for index in range(len(samples)):
        ids, is_trained = samples.sample(index)
        assert (ids[0], ids[-1], is_trained[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id, True)
    question = [{"role": "user", "content": rows[0]["instruction"]}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(prompt["input_ids"][0]) == f"<s>[|Human|]:{rows[0]['instruction']}[|AI|]:"
    model = AutoModelForCausalLM.from_pretrained(directory / "merged", trust_remote_code=True, dtype=torch.float32)
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]
    base_model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base_model, directory / "adapter").eval()
    torch.testing.assert_close(model(**prompt).logits, adapted(**prompt).logits, rtol=0.05, atol=0.05)

    command = [sys.executable, "-m", "launch", "generate", recipe, *overrides, "--rows", "2", "--max-new-tokens", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    held_out = (directory / "evaluation_rows.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in done.stdout.splitlines() if line.startswith("──")] == [
        f"── {row_id}: merged model, fp32 on cpu" for row_id in held_out[:2]
    ]
