"""The real accelerate launch, end to end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, World, launch

from launch import runs
from launch.checkpoint import path_of_step

pytestmark = pytest.mark.slow
SETTINGS = {"max_steps": 40, "save_steps": 10, "eval_steps": 20}
ACCELERATE = Path(sys.executable).with_name("accelerate")


def command(config: str = "zero3") -> list[str | Path]:
    return [ACCELERATE, "launch", "--config_file", f"configs/accelerate/{config}.yaml", "--main_process_port", "0"]


def start(recipe: Path, *arguments: str, num_ranks: int = 2, config: str = "zero3") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command(config), "--num_processes", str(num_ranks), "train.py", str(recipe), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], expected_code: int = 0) -> str:
    """What it printed, on one line: the banner is wrapped to the width of a terminal."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expected_code, output
    return " ".join(output.split())


def ranks_of(recipe: Path) -> list[int]:
    """Processes that run train.py on this recipe, launcher excluded."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it has just ended
            if str(recipe).encode() in command and b"launch" not in command:
                found.append(int(entry.name))
    return found


def wait_until(condition: object, seconds: float, what: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s: not {what}"
        time.sleep(0.05)


def test_sigterm_to_the_launcher_saves_and_continues(world: World) -> None:
    recipe = world.recipe("preempted", train=SETTINGS)
    process = start(recipe)
    wait_until(path_of_step(world.run_directory("preempted"), 10).exists, 300, "a checkpoint")
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    status = runs.read_status(world.run_directory("preempted"))
    assert status["state"] == "preempted"
    assert path_of_step(world.run_directory("preempted"), status["step"]).exists()
    assert f"resumed after step {status['step']}" in finish(start(recipe, num_ranks=3))


def test_a_refusal_is_one_sentence_from_one_rank(world: World) -> None:
    recipe = world.recipe("refused", data={"train": "no/such/rows.jsonl"})
    output = finish(start(recipe, num_ranks=4), expected_code=1)
    assert output.count("Refused: There is no data file no/such/rows.jsonl") == 1
    assert output.count("Traceback") == 1, "only the launcher's own"
    status = runs.read_status(world.run_directory("refused"))
    assert status["state"] == "refused" and "no/such/rows.jsonl" in status["reason"]


@pytest.mark.parametrize("layout", sorted(path.stem for path in (ROOT / "configs" / "deepspeed").glob("*.json")))
def test_no_layout_needs_a_compiler(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """On ranks that find no program at all."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    deepspeed = ROOT / "configs" / "deepspeed" / f"{layout}.json"
    launch(world.recipe(f"uncompiled-{layout}", train={"max_steps": 2}), 1, deepspeed=deepspeed)
    assert runs.read_status(world.run_directory(f"uncompiled-{layout}"))["state"] == "finished"
    assert not (tmp_path / "extensions").exists()
