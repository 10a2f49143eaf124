"""How long from the command to the first optimizer step: the first command of the README, with a warm cache.

A first launch, which is not counted, builds the base and prepares the rows; every other one is the same run in a
directory of its own. The times count only when all launches make the same first step. See benchmarks/README.md.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from checkpoint import CONFIG, ROOT, finish, parts_of, spread
from prepare_rows import machine

sys.path.insert(0, str(ROOT))

from launch import runs
from launch.fingerprint import versions

MAX_SECONDS = 15.0
UNCOUNTED = "uncounted"
Launch = dict[str, Any]  # seconds, parts, and loss and gradient norm of the first step


def launch(output: Path, name: str, num_ranks: int) -> Launch:
    """`accelerate launch train.py` without a recipe, for one step."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIG]
    command += ["--num_processes", str(num_ranks), "train.py"]
    command += [f"run.output_dir={output}", f"run.name={name}", "train.max_steps=1"]
    seconds = finish(subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    records = {record["kind"]: record for record in runs.read_metrics(output / name)}
    first_step = {key: records["train"][key] for key in ("loss", "gradient_norm")}
    return {"seconds": seconds, "parts": parts_of(seconds, records["start"]), **first_step}


def first_difference(found: Launch, expected: Launch) -> str | None:
    """In words."""
    for key in ("loss", "gradient_norm"):
        if found[key] != expected[key]:
            return f"a {key.replace('_', ' ')} of {found[key]!r} against {expected[key]!r}"
    return None


# ---- the whole ----


def measure(options: argparse.Namespace, output: Path) -> list[Launch]:
    """One launch that is not counted, then those that are."""
    expected = launch(output, UNCOUNTED, options.ranks)
    print(f"uncounted: {expected['seconds']:.1f} s", file=sys.stderr, flush=True)
    found = []
    for repeat in range(1, options.repeats + 1):
        name = f"repeat-{repeat}"
        shutil.copytree(output / UNCOUNTED / "data", output / name / "data")  # as `python -m launch prepare` leaves it
        one = launch(output, name, options.ranks)
        print(f"{repeat}/{options.repeats}: {one['seconds']:.1f} s", file=sys.stderr, flush=True)
        if difference := first_difference(one, expected):
            sys.exit(f"The first step of launch {repeat} is not that of the uncounted one: {difference}")
        found.append({"repeat": repeat, **one})
    return found


def table(found: list[Launch]) -> str:
    """The whole beside what it must not exceed, and its parts; 80 columns."""
    whole = [one["seconds"] for one in found]
    rows = [("command to first step", *spread(whole), f"< {MAX_SECONDS:.0f} s")]
    for part in found[0]["parts"]:
        seconds = [one["parts"][part] for one in found]
        if statistics.median(seconds) >= 0.005:
            rows.append((f"  {part}", *spread(seconds), ""))
    lines = [f"{'':28}{'median':>10}{'min - max':>18}{'wanted':>10}"]
    lines += [f"{name:28}{median:>10}{between:>18}{wanted:>10}" for name, median, between, wanted in rows]
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="launches that are counted")
    parser.add_argument("--json", type=Path, help="write every launch here")
    options = parser.parse_args()
    about, installed = machine(), versions()
    print(f"{about['cpu']}, {about['cores']} cores, {about['platform']}, torch {installed['torch']}")
    print(f"no recipe, {options.ranks} ranks, ZeRO-3; the first step is the same in every launch\n", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        found = measure(options, Path(directory))
    print(table(found))
    if options.json:
        measured = {"ranks": options.ranks, "repeats": options.repeats}
        result = {"machine": about, "versions": installed, "options": measured, "runs": found}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
