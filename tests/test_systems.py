"""Systems that people run, each by its shipped recipe on a tiny model of the same architecture and on real rows.

The real launcher on two ranks, killed once, continued by the same command, reloaded by plain transformers and PEFT.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import own_model
import pytest
import torch
from conftest import ROOT, SHARED_DATA, build_base, build_remote_base, build_tokenizer
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


def killed_and_continued(
    recipe: Path,
    overrides: Sequence[str],
    directory: Path,
    *,
    evaluated: Sequence[int] = (0, 8),
    config: str = "zero3",
) -> str:
    """What the second launch printed: the first is killed after a checkpoint, the same command ends the run."""
    process = start(recipe, *overrides, config=config)
    wait_until(path_of_step(directory, 2).exists, 300, "a checkpoint")
    process.kill()
    wait_until(lambda: not ranks_of(recipe), 5, "without ranks")
    process.communicate()
    said = finish(start(recipe, *overrides, config=config))
    assert "resumed after step" in said
    assert runs.read_status(directory)["state"] == "finished"
    steps = [record["step"] for record in runs.read_metrics(directory) if record["kind"] == "evaluation"]
    assert steps == list(evaluated)
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


def test_qwen1_5_keeps_and_merges_the_best_step(tmp_path: Path) -> None:
    """The flagship: evaluated every few steps, the best one merged, the last one beside it where that is another.

    Which one it is depends on the CPU; tests/test_best.py has a run whose last step is never the best.
    """
    rows, path = real_rows("huanhuan.json", tmp_path)
    base = build_base(tmp_path / "base", [row["instruction"] + row["output"] for row in rows], vocab_size=2000)
    recipe = ROOT / "configs/recipes/qwen1.5-14b-lora.yaml"
    overrides = [
        f"model.name_or_path={base}",
        f"data.train={path}",
        "data.format=alpaca",
        f"run.output_dir={tmp_path / 'runs'}",
        *SMALL,
        "train.eval_steps=2",
        "train.warmup_steps=1",
        "train.learning_rate=0.5",  # too high to the end: the loss mostly rises again
        "train.lr_scheduler_type=constant_with_warmup",
    ]
    directory = tmp_path / "runs" / recipe.stem
    killed_and_continued(recipe, overrides, directory, evaluated=[0, 2, 4, 6, 8])
    losses = {r["step"]: r["loss"] for r in runs.read_metrics(directory) if r["kind"] == "evaluation" and r["step"]}
    best = min(losses, key=lambda step: losses[step])
    report = json.loads((directory / "merged/merge_report.json").read_text(encoding="utf-8"))
    assert report["step"] == best
    assert (directory / "endpoint").exists() == (best != 8)
    tokenizer = AutoTokenizer.from_pretrained(directory / "merged")
    question = [{"role": "user", "content": rows[0]["instruction"]}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    merged = AutoModelForCausalLM.from_pretrained(directory / "merged", dtype=torch.float32)
    assert merged.generate(**prompt, max_new_tokens=8, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("config", ["zero3", "zero2"])
def test_a_module_of_ones_own_in_the_manner_of_chatglm(config: str, tmp_path: Path) -> None:
    """Its weights come from a .pth file and end in one, which the user's own class takes."""
    rows, path = real_rows("alpaca_zh_demo.json", tmp_path)
    build_tokenizer([row["instruction"] + row["input"] + row["output"] for row in rows]).save_pretrained(
        tmp_path / "tokenizer"
    )
    torch.manual_seed(0)
    torch.save(own_model.build().state_dict(), tmp_path / "own.pth")
    shipped = ROOT / "configs/recipes/chatglm-6b-own-model.yaml"
    recipe = Path(shutil.copy(shipped, tmp_path))  # two may run at once, whose ranks are told apart by it
    overrides = [
        f"model.factory={own_model.__file__}:build",
        f"model.name_or_path={tmp_path / 'own.pth'}",
        f"model.tokenizer={tmp_path / 'tokenizer'}",
        f"data.train={path}",
        f"run.output_dir={tmp_path / 'runs'}",
        *SMALL,
        "data.max_dropped_share=1",  # what is long in 600 tokens is not in ChatGLM's 130,000
    ]
    directory = tmp_path / "runs" / recipe.stem
    said = killed_and_continued(recipe, overrides, directory, config=config)
    assert "padded: OwnModel takes no position_ids or logits_to_keep" in said
    base, merged = own_model.build(), own_model.build()
    base.load_state_dict(torch.load(tmp_path / "own.pth", weights_only=True))
    merged.load_state_dict(torch.load(directory / "merged/model.pth", weights_only=True))
    prompt = torch.tensor([[5, 17, 30, 8]])
    with torch.no_grad():
        before, found = base(prompt)[0], merged(prompt)[0]
        expected = PeftModel.from_pretrained(base, directory / "adapter").eval()(input_ids=prompt)[0]
    assert (expected - before).abs().max() > 0.05, "the adapter must matter"
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)


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
