"""python -m launch selftest: it passes where a run survives, and tells where a bit is not the same."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, World
from safetensors.numpy import save_file

from launch import runs
from launch.selftest import StageError, compare

SELFTEST = [sys.executable, "-m", "launch", "selftest"]


def a_run(directory: Path, *, bit: int = 0, last_loss: float | None = 0.5) -> Path:
    """A run directory with two tensors and three losses; bit 1 is the lowest of one number."""
    values = np.array([[0.5, 1.0], [2.0, -4.0]], np.float32)
    values.view(np.uint32)[1, 0] ^= bit
    checkpoint = directory / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    save_file({"a.master": np.ones(3, np.float32), "b.exp_avg": values}, checkpoint / "optimizer.safetensors")
    for kind, step, loss in (("evaluation", 0, 3.0), ("train", 1, 2.0), ("train", 2, last_loss)):
        runs.append_metrics(directory, {"kind": kind, "step": step, "loss": loss})
    return directory


def test_one_bit_is_a_difference_and_it_says_where(tmp_path: Path) -> None:
    straight = a_run(tmp_path / "straight")
    assert not compare(straight, a_run(tmp_path / "same"))
    found = compare(straight, a_run(tmp_path / "one-bit", bit=1))
    assert found.where == "b.exp_avg: 1 of 4, the first at [1, 0]"
    assert found.relative == pytest.approx(2**-22 / 4)
    assert compare(straight, a_run(tmp_path / "sign", bit=1 << 31)).relative == 1.0


def test_losses_are_compared_and_each_step_stands_once(tmp_path: Path) -> None:
    straight = a_run(tmp_path / "straight")
    found = compare(straight, a_run(tmp_path / "other-loss", last_loss=0.6))
    assert found.where == "the loss of train 2: 0.5 and 0.6" and found.relative == pytest.approx(0.2)
    nan = compare(straight, a_run(tmp_path / "nan", bit=1, last_loss=None))
    assert nan.where.startswith("the loss of train 2") and not nan.relative <= 1, "it is larger than any number"
    twice = a_run(tmp_path / "twice")
    runs.append_metrics(twice, {"kind": "train", "step": 2, "loss": 0.5})
    with pytest.raises(StageError, match="has train 2 twice"):
        compare(straight, twice)
    more = a_run(tmp_path / "more")
    runs.append_metrics(more, {"kind": "train", "step": 3, "loss": 0.5})
    with pytest.raises(StageError, match=r"not the same lines of metrics\.jsonl: \('train', 3\)"):
        compare(straight, more)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--steps", "3"], "--steps 3 leaves no room"),
        (["--config-file", "no.yaml"], "--config-file: there is no no.yaml"),
        (["--keep", "tests"], "--keep tests is there already"),
    ],
)
def test_what_it_cannot_begin_with_is_refused(world: World, arguments: list[str], word: str) -> None:
    done = subprocess.run([*SELFTEST, str(world.recipe("r")), *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"Refused: {word}")


@pytest.mark.slow
def test_it_passes_here_and_leaves_nothing(world: World) -> None:
    recipe = world.recipe("survives", adapter={"lora_dropout": 0.1})
    done = subprocess.run(
        [*SELFTEST, str(recipe), "--num-processes", "2", "--steps", "40"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights, moments and every loss are bitwise the same" in done.stdout
    assert "Passed" in done.stdout and "left over     no process, no temporary file" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if str(world.directory) not in line)
    assert list((world.directory / "runs").iterdir()) == []


@pytest.mark.slow
def test_a_failure_shows_the_log_and_keeps_it(world: World) -> None:
    recipe = world.recipe("fails", data={"train": "no/such/rows.jsonl"})
    done = subprocess.run([*SELFTEST, str(recipe), "--num-processes", "2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "  | Refused: There is no data file no/such/rows.jsonl" in done.stdout
    said = " ".join(done.stdout.split())
    assert "status.json says: refused, There is no data file no/such/rows.jsonl" in said
    (kept,) = (world.directory / "runs").glob(".selftest-*")
    assert f"the runs and their logs are in {kept}." in said and (kept / "straight.log").exists()


@pytest.mark.slow
def test_ctrl_c_ends_and_removes_everything(world: World) -> None:
    output = world.directory / "interrupted"
    recipe = world.recipe("interrupted", run={"output_dir": str(output)})
    process = subprocess.Popen([*SELFTEST, str(recipe), "--num-processes", "2"], cwd=ROOT, stdout=subprocess.DEVNULL)

    def ranks() -> list[str]:
        return [str(p) for p in Path("/proc").glob("[0-9]*/cmdline") if f"run.output_dir={output}" in read(p)]

    deadline = time.monotonic() + 60
    while len(ranks()) < 3:  # the launcher and both
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert ranks() == [] and list(output.iterdir()) == []


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
