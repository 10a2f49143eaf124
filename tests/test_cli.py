"""python -m launch and the refusals of train.py: one sentence, the right exit code, status.json."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, World, launch, run_ranks
from safetensors.torch import save_file
from typer.testing import CliRunner

import train
from launch import runs
from launch.__main__ import app


def python_m_launch(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    return done.exit_code, done.stdout, done.stderr


def test_preview_marks_what_is_trained(world: World) -> None:
    code, out, _ = python_m_launch("preview", world.recipe("preview"), "--rows", "2")
    rows = [json.loads(line) for line in world.rows.read_text(encoding="utf-8").splitlines()]
    assert code == 0
    assert out.count("── rows.jsonl:") == 2 and "template chatml" in out
    for row in rows[:2]:
        assert f"<|im_start|>user\n{row['input']}<|im_end|>\n<|im_start|>assistant\n«{row['output']}<|im_end|>»" in out


def test_check_says_what_a_run_would_find(world: World) -> None:
    recipe = world.recipe("check")
    code, out, _ = python_m_launch("check", recipe, "train.max_steps=3")
    assert (code, out.splitlines()[-3:]) == (
        0,
        [
            "The recipe, its layout, the base model's files, the adapter's targets and every row pass.",
            "Start it:",
            f"  accelerate launch --config_file configs/accelerate/zero3.yaml train.py {recipe} train.max_steps=3",
        ],
    )
    assert "Rows 50: 40 trained, 10 evaluated; " in out
    assert not world.run_directory("check").exists(), "a check leaves nothing behind"


def test_data_says_what_became_of_every_row(world: World) -> None:
    rows = world.rows.read_text(encoding="utf-8") + '{"input": "a"}\n{"input": "b", "output": ""}\nno JSON\n'
    path = world.directory / "some-bad.jsonl"
    path.write_text(rows, encoding="utf-8")
    recipe = world.recipe("data", data={"train": str(path), "max_dropped_share": 0.1})
    directory = world.run_directory("data")
    code, out, err = python_m_launch("data", recipe)
    assert (code, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines() if str(directory) not in line)
    for line in (
        "  rows                53 in some-bad.jsonl",
        "    trained           40   75.5%",
        "    evaluated         10   18.9%",
        "    empty answer       1    1.9%, some-bad.jsonl:52",
        "    malformed          2    3.8%, some-bad.jsonl:51, some-bad.jsonl:53",
        "  answers             50 trained, 100.0% end with <|im_end|>",
    ):
        assert line in out.splitlines()
    assert f"{directory}: now prepared" in out.splitlines()[-1]
    reasons = [json.loads(line)["reason"] for line in (directory / "quarantine.jsonl").read_text().splitlines()]
    assert reasons == ["malformed", "empty answer", "malformed"]
    assert len((directory / "evaluation_rows.txt").read_text().splitlines()) == 10
    code, again, _ = python_m_launch("data", recipe)
    assert code == 0 and again.splitlines()[:-1] == out.splitlines()[:-1]
    assert f"{directory}: as prepared before" in again
    code, _, err = python_m_launch("data", recipe, "--strict")
    assert (code, err) == (1, "--strict: 3 rows were dropped.\n")
    code, _, err = python_m_launch("data", recipe, "data.max_dropped_share=0.05")
    assert code == 2 and err.startswith("Refused: 3 of 53 rows are dropped (1 empty answer, 2 malformed), more than")
    assert python_m_launch("data", world.recipe("clean"), "--strict")[0] == 0


def test_data_then_a_run_prepares_once(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe("once", train={"max_steps": 2})
    assert python_m_launch("data", recipe)[0] == 0
    store = world.run_directory("once") / "data" / "token_ids.int32"
    before = store.stat().st_mtime_ns
    launch(recipe, 2)
    assert store.stat().st_mtime_ns == before
    assert "  rows          50: 40 trained, 10 evaluated; data_report.json has every one" in capfd.readouterr().out


def test_data_of_a_busy_run_are_left_alone(world: World) -> None:
    recipe = world.recipe("in-use")
    with runs.open_run(world.run_directory("in-use")):
        code, _, err = python_m_launch("data", recipe)
    assert code == 2 and "Another process is running in" in err


BAD = [
    ("train.learning_rte=1", "train.learning_rte is not a recipe key"),
    ("train.global_batch_size=0", "train.global_batch_size = 0 is not valid"),
    ("train.seed=soon", "train.seed = 'soon' is not valid"),
    ("data.train=nowhere.jsonl", "There is no data file nowhere.jsonl"),
    ("data.train={directory}/broken.jsonl", "broken.jsonl:2: not JSON: "),
    ("data.train={directory}/empty.jsonl", "holds no rows"),
    ("data.prompt_template=alpaca", "templates/prompt/alpaca.jinja names a missing column: 'instruction'"),
    ("data.template=lama2", "There is no chat template 'lama2'; the valid names are"),
    ("model.name_or_path=./nowhere", "model.name_or_path = ./nowhere does not exist"),
    ("run.report_to=[paper]", "'paper' is not a tracker"),
    ("adapter.target_modules=[q_proj,v_porj]", "no module of the model is named 'v_porj'; did you mean v_proj?"),
    ("data.template=tokenizer", "this model has no chat template of its own; name one"),
]


@pytest.mark.parametrize(("override", "sentence"), BAD, ids=[override for override, _ in BAD])
def test_bad_input_is_refused_before_a_weight_is_read(
    world: World, capfd: pytest.CaptureFixture[str], override: str, sentence: str
) -> None:
    """The base has none of the weights that it needs, so reading them would be another error."""
    hollow = world.directory / "hollow"
    if not hollow.exists():
        hollow.mkdir()
        for path in world.base.iterdir():
            if path.suffix != ".safetensors":
                (hollow / path.name).write_bytes(path.read_bytes())
        save_file({"nothing": torch.zeros(1)}, hollow / "model.safetensors")
    (world.directory / "broken.jsonl").write_text('{"input": "a", "output": "b"}\n{"input": "a', encoding="utf-8")
    (world.directory / "empty.jsonl").write_text("", encoding="utf-8")
    name = f"bad-{BAD.index((override, sentence))}"
    override = override.format(directory=world.directory) if "{directory}" in override else override
    recipe = World(world.directory, hollow, world.rows).recipe(name)
    assert run_ranks(1, train.main, [str(recipe), override]) == [1]
    said = capfd.readouterr().err
    assert said.count("Refused: ") == 1 and sentence in said
    status = runs.read_status(world.run_directory(name))
    assert status["state"] == "refused" and sentence in status["reason"]


@pytest.mark.parametrize("override", ["data.train=nowhere.jsonl", "train.global_batch_size=0"])
def test_check_refuses_with_exit_code_2(world: World, override: str) -> None:
    code, out, err = python_m_launch("check", world.recipe("check-bad"), override)
    assert (code, out) == (2, "")
    assert err.startswith("Refused: ") and err.count("\n") == 1


def on_a_machine_with_one_gpu(arguments: list[str]) -> int:
    """train.py's main as the first of two processes where torch counts one GPU."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    torch.cuda.device_count = lambda: 1
    return train.main(arguments)


def test_a_launch_with_too_many_processes_is_refused(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(1, on_a_machine_with_one_gpu, [str(world.recipe("crowded"))]) == [1]
    assert capfd.readouterr().err.count("Refused: 2 processes were launched but this machine has 1 GPU(s); add") == 1
    assert runs.read_status(world.run_directory("crowded"))["state"] == "refused"


@pytest.mark.slow
def test_train_without_accelerate_launch_is_refused(world: World) -> None:
    done = subprocess.run(
        [sys.executable, "train.py", world.recipe("bare")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "start it with accelerate launch --config_file configs/accelerate/zero3.yaml train.py" in done.stderr


def test_two_jobs_in_one_run_directory(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe("busy")
    with runs.open_run(world.run_directory("busy")):
        runs.write_status(world.run_directory("busy"), "running", "training", pid=1)
        assert run_ranks(1, train.main, [str(recipe)]) == [1]
    assert "Refused: Another process is running in" in capfd.readouterr().err
    assert runs.read_status(world.run_directory("busy"))["state"] == "running", "the other job's status is its own"


def test_a_refusal_after_a_killed_run_is_a_refusal(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe("was-killed")
    with runs.open_run(world.run_directory("was-killed")):
        pass
    runs.write_status(world.run_directory("was-killed"), "running", "training", pid=1)
    assert run_ranks(1, train.main, [str(recipe), "train.global_batch_size=0"]) == [1]
    assert "Refused: " in capfd.readouterr().err
    assert runs.read_status(world.run_directory("was-killed"))["state"] == "refused"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("adapter.target_modules=[nonsense]", "no module of the model is named 'nonsense'; it has "),
        ("adapter.trainable_token_indices=[99999999]", "adapter.trainable_token_indices has 99999999, but the model"),
        ("adapter.modules_to_save=lm_head", "should be a list, as in [a, b]"),
        ("adapter.trainable_token_indices=addd", "adapter.trainable_token_indices = 'addd' is not valid"),
        ("model.name_or_path=README.md", "README.md is a file, which only a model.factory can be filled from."),
    ],
)
def test_check_looks_at_the_adapter_of_the_default_recipe(override: str, sentence: str) -> None:
    code, _, error = python_m_launch("check", override)
    assert code == 2
    assert sentence in error
