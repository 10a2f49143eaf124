"""Systems that people run, each by its shipped recipe on a tiny model of the same architecture and on real rows.

The real launcher on two ranks, killed once, continued by the same command, reloaded by plain transformers and PEFT.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHARED_DATA, build_base
from peft import PeftModel
from test_launch import finish, ranks_of, start, wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import runs
from launch.checkpoint import path_of_step

pytestmark = pytest.mark.slow
NUM_ROWS = 200


@pytest.mark.parametrize("method", ["lora", "p-tuning", "prefix-tuning", "prompt-tuning"])
def test_qwen2_on_chinese_alpaca_rows(method: str, tmp_path: Path) -> None:
    source = SHARED_DATA / "alpaca_zh_demo.json"
    if not source.exists():
        pytest.skip(f"{source} is not there")
    rows = json.loads(source.read_text(encoding="utf-8"))[:NUM_ROWS]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    texts = [row["instruction"] + row["input"] + row["output"] for row in rows]
    base = build_base(tmp_path / "base", texts, vocab_size=2000)
    recipe = ROOT / f"configs/recipes/qwen2-7b-{method}.yaml"
    overrides = [
        f"model.name_or_path={base}",
        f"data.train={tmp_path / 'rows.json'}",
        f"run.output_dir={tmp_path / 'runs'}",
        "train.max_steps=8",
        "train.save_steps=2",
        "train.learning_rate=1e-2",
        "data.max_dropped_share=1",  # what is long in 2,000 tokens is not in Qwen2's 150,000
    ]
    directory = tmp_path / "runs" / recipe.stem
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
