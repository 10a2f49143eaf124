"""What saving and resuming cost: the stall of a save, the interval between saves, verify, load, and a start in parts.

Three launches of train.py on CPU: a straight run, one that is stopped, and the same command again. The times count only
when the resumed run's weights and moments are bitwise the straight one's. See benchmarks/README.md.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from prepare_rows import machine  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import Qwen2ForCausalLM  # noqa: E402

from launch import runs  # noqa: E402
from launch.checkpoint import path_of_step, verify  # noqa: E402
from launch.saving import interval_seconds  # noqa: E402
from launch.table import format_bytes  # noqa: E402
from launch.tiny import build_tiny_tokenizer, tiny_config  # noqa: E402

ROWS = ROOT / "configs/data/tiny_chat.jsonl"
CONFIG = "configs/accelerate/zero3.yaml"
ALL_LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
STEPS, SAVE_STEPS = 6, 2
MAX_STALL_SHARE = 0.02
MAX_READ_SECONDS = 5.0


def make(work: Path, options: argparse.Namespace) -> Path:
    """A wide random Qwen2, and a recipe that trains LoRA on all of its linear layers."""
    tokenizer = build_tiny_tokenizer(ROWS)
    config = tiny_config(tokenizer)
    config.hidden_size, config.intermediate_size = options.width, options.width * 11 // 4
    config.num_hidden_layers = options.layers
    config.num_attention_heads = config.num_key_value_heads = options.width // 64
    config.layer_types = ["full_attention"] * options.layers
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    recipe = {
        "model": {"name_or_path": str(work / "base")},
        "data": {"train": str(ROWS), "template": "qwen2", "test_size": 0.0, "max_length": 256},
        "adapter": {"r": options.r, "lora_alpha": options.r, "lora_dropout": 0.0, "target_modules": ALL_LINEAR},
        "train": {
            "global_batch_size": 8,
            "max_tokens_per_micro_batch": 1024,
            "max_steps": STEPS,
            "save_steps": SAVE_STEPS,
            "learning_rate": 1e-4,
            "logging_steps": 1,
        },
        "run": {"name": "straight", "output_dir": str(work / "runs"), "merge": False},
    }
    path = work / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


# ---- the launches ----


def start(recipe: Path, name: str, num_ranks: int) -> subprocess.Popen[str]:
    """`accelerate launch train.py`, as a user would."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIG]
    command += ["--num_processes", str(num_ranks), "train.py", str(recipe), f"run.name={name}"]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str]) -> float:
    """Seconds from now to the line that tells of the first step. What was said is shown when the run failed."""
    begin, first_step_seconds, said = time.monotonic(), float("nan"), []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if line.startswith("start-up "):
            first_step_seconds = time.monotonic() - begin
    if process.wait():
        sys.exit(f"{''.join(said)[-4000:]}\nThe launch failed.")
    return first_step_seconds


def stop_after_a_save(process: subprocess.Popen[str], directory: Path) -> None:
    """SIGTERM to the launcher when the first checkpoint is there."""
    while not path_of_step(directory, SAVE_STEPS).exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    status = runs.read_status(directory)
    if status.get("state") != "preempted":
        sys.exit(f"The run was to be preempted and is {status}.")


def read_seconds(path: Path) -> tuple[float, float]:
    """Of verifying a checkpoint, and of loading its masters and moments whole."""
    begin = time.monotonic()
    verify(path)
    verified = time.monotonic()
    for tensor in load_file(path / "optimizer.safetensors").values():
        tensor.clone()  # what is mapped is read only then
    return verified - begin, time.monotonic() - verified


def first_difference(one: Path, other: Path) -> str | None:
    """The first tensor of two checkpoints that is not the same in every bit."""
    expected, found = (load_file(path / "optimizer.safetensors") for path in (one, other))
    same = {name: name in found and torch.equal(expected[name], found[name]) for name in expected}
    return next((name for name, is_same in same.items() if not is_same), None)


# ---- the whole ----


def seconds_of(records: list[dict[str, Any]], kind: str, key: str) -> list[float]:
    """One figure of every record of a kind."""
    return [record[key] for record in records if record["kind"] == kind]


def main() -> int:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--r", type=int, default=512, help="rank of the LoRA matrices")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        return measure(options, Path(directory))


def measure(options: argparse.Namespace, work: Path) -> int:
    """The three launches, the gate, the table."""
    recipe = make(work, options)
    straight, stopped = (work / "runs" / name for name in ("straight", "stopped"))
    finish(start(recipe, "straight", options.ranks))
    stop_after_a_save(start(recipe, "stopped", options.ranks), stopped)
    whole_seconds = finish(start(recipe, "stopped", options.ranks))
    difference = first_difference(*(path_of_step(run, STEPS) for run in (straight, stopped)))
    if difference:
        print(f"{difference} of the resumed run is not the straight one's.", file=sys.stderr)
        return 1
    records = [record for run in (straight, stopped) for record in runs.read_metrics(run)]
    stalls, writes = seconds_of(records, "save", "stall_seconds"), seconds_of(records, "written", "seconds")
    last = path_of_step(stopped, STEPS)
    verify_seconds, load_seconds = read_seconds(last)
    resumed = [record for record in runs.read_metrics(stopped) if record["kind"] == "start"][-1]
    result = {
        "machine": machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "state_bytes": (last / "optimizer.safetensors").stat().st_size,
        "checkpoint_bytes": sum(path.stat().st_size for path in last.iterdir()),
        "ranks": options.ranks,
        "stall_seconds": stalls,
        "write_seconds": writes,
        "interval_seconds": interval_seconds(statistics.median(writes)),
        "verify_seconds": verify_seconds,
        "load_seconds": load_seconds,
        "command_to_first_step_seconds": whole_seconds,
        "start": resumed,
    }
    print(report(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def report(result: dict[str, Any]) -> str:
    """Machine, sizes, and the figures beside what they must not exceed; 80 columns."""
    about, start = result["machine"], result["start"]
    share = statistics.median(result["stall_seconds"]) / result["interval_seconds"]
    read_seconds = result["verify_seconds"] + result["load_seconds"]
    whole = result["command_to_first_step_seconds"]
    parts = parts_of(whole, start)
    named = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items() if seconds >= 0.05)
    sizes = f"{format_bytes(result['state_bytes'])} of masters and moments, {format_bytes(result['checkpoint_bytes'])}"
    texts = [
        f"{about['cpu']}, {len(os.sched_getaffinity(0))} cores, {about['platform']}, torch {torch.__version__}",
        f"{sizes} a checkpoint, {result['ranks']} ranks, ZeRO-3; resumed, the weights are bitwise the straight run's",
    ]
    rows = [
        ("gather (the stall)", *spread(result["stall_seconds"]), ""),
        ("write, beside the steps", *spread(result["write_seconds"]), ""),
        ("default interval", f"{result['interval_seconds']:.0f} s", "", ""),
        ("stall / interval", f"{share:.2%}", "", f"< {MAX_STALL_SHARE:.0%}"),
        ("verify + load", f"{read_seconds:.2f} s", "", f"< {MAX_READ_SECONDS:.0f} s"),
        ("command to first step", f"{whole:.1f} s", "", ""),
    ]
    lines = [line for text in texts for line in textwrap.wrap(text, 80)]
    lines += ["", f"{'':28}{'median':>10}{'min - max':>18}{'wanted':>10}"]
    lines += [f"{name:28}{median:>10}{between:>18}{wanted:>10}" for name, median, between, wanted in rows]
    lines += ["", *textwrap.wrap(f"the resumed start, in seconds: {named}", 80)]
    return "\n".join(line.rstrip() for line in lines)


def parts_of(seconds: float, record: dict[str, Any]) -> dict[str, float]:
    """What a start of so many seconds was made of: the launcher, then what rank zero's own record tells."""
    named = {key.removesuffix("_seconds"): value for key, value in record.items() if key.endswith("_seconds")}
    launcher_seconds = seconds - record["seconds"]
    return {"launcher": launcher_seconds, **{name.replace("_", " "): value for name, value in named.items()}}


def spread(seconds: list[float]) -> tuple[str, str]:
    """Median, and what all lie between."""
    return f"{statistics.median(seconds):.2f} s", f"{min(seconds):.2f} - {max(seconds):.2f} s"


if __name__ == "__main__":
    sys.exit(main())
