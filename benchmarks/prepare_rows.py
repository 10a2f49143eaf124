"""How long rows take from a JSONL file to token ids and masks on disk: cairn, datasets and TRL, gated on equal results.

Every run is a fresh process (sides.py). See benchmarks/README.md.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from sides import CORES, FILES, ROOT, SIDES, Arrays, trl

AGAIN = "cairn, second start"
WANTED, MAX_AGAIN_SECONDS = 2.0, 2  # times as many tokens a second as each other side; of a second start


def start_process(python: str, work: Path, *arguments: str) -> None:
    """sides.py, offline and with an empty cache; what it says is shown when it fails."""
    offline = {"HF_HOME": str(work / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [python, str(Path(__file__).with_name("sides.py")), str(work), *arguments]
    done = subprocess.run(command, env=os.environ | offline, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stderr[-4000:]}\n{' '.join(arguments)} failed.")


# ---- the gate ----


def load(run: Path) -> Arrays:
    """What a run left."""
    return {name: np.load(run / f"{name}.npy", mmap_mode="r") for name in ("ids", "is_trained", "lengths")}


def first_difference(found: Arrays, expected: Arrays) -> str | None:
    """Where two results part, in words."""
    if len(found["lengths"]) != len(expected["lengths"]):
        return f"{len(found['lengths']):,} rows against {len(expected['lengths']):,}"
    if all(np.array_equal(found[name], expected[name]) for name in expected):
        return None
    starts = [np.concatenate([[0], np.cumsum(arrays["lengths"])]) for arrays in (found, expected)]
    for row in range(len(expected["lengths"])):
        for name in ("ids", "is_trained"):
            one, other = (a[name][s[row] : s[row + 1]] for a, s in zip((found, expected), starts, strict=True))
            if not np.array_equal(one, other):
                length = min(len(one), len(other))
                place = next(iter(np.flatnonzero(one[:length] != other[:length])), length)
                part = slice(max(place - 3, 0), place + 5)
                return (
                    f"{name} of row {row + 1} (line of rows.jsonl), from token {place} on "
                    f"(shown from {part.start}): {one[part].tolist()} against {other[part].tolist()}"
                )
    raise AssertionError("equal after all")


# ---- the whole ----


def table(runs: list[dict[str, Any]], num_tokens: int) -> str:
    """Medians by side, the spread of the seconds, and the peaks of memory; 80 columns."""
    lines = [f"{'':24}{'seconds':>9}{'min - max':>16}{'CPU s':>8}{'tokens/s':>11}{'MiB':>12}"]
    for side in dict.fromkeys(run["side"] for run in runs):
        of_side = [run for run in runs if run["side"] == side]
        seconds, cpu = (statistics.median(run[key] for run in of_side) for key in ("seconds", "cpu_seconds"))
        spread = " - ".join(f"{choose(run['seconds'] for run in of_side):.2f}" for choose in (min, max))
        rate = "" if side == AGAIN else f"{num_tokens / seconds:,.0f}"
        peaks = " + ".join(f"{max(run[key] for run in of_side):.0f}" for key in ("peak_mib", "peak_mib_of_a_child"))
        lines.append(f"{side:24}{seconds:>9.2f}{spread:>16}{cpu:>8.2f}{rate:>11}{peaks:>12}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return {"platform": platform.platform(), "cpu": cpu[1] if cpu else platform.processor(), "cores": CORES}


def main() -> int:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--source", type=Path, default=ROOT.parent / "shared/data", help=f"holds {' and '.join(FILES)}")
    parser.add_argument("--trl-python", help="python of an environment with TRL (benchmarks/README.md)")
    parser.add_argument("--json", type=Path, help="write every run here")
    options = parser.parse_args()
    missing = [str(options.source / name) for name in FILES if not (options.source / name).is_file()]
    if missing:
        print(f"There is no {missing[0]}; give the directory of {' and '.join(FILES)} as --source.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as directory:
        return measure(options, Path(directory))


def measure(options: argparse.Namespace, work: Path) -> int:
    """Every side in turn, `--repeats` times over."""
    start_process(sys.executable, work, "make", str(options.source.resolve()), str(options.rows))
    pythons = {side: options.trl_python if function is trl else sys.executable for side, function in SIDES.items()}
    sides = [side for side, python in pythons.items() if python]
    runs: list[dict[str, Any]] = []
    expected: Arrays = {}
    for repeat in range(options.repeats):
        for side in sides:
            run = work / "run"
            run.mkdir()
            for name in (side, AGAIN) if side == "cairn" else (side,):
                os.sync()  # nobody waits for what another has written
                start_process(pythons[side], work, side, str(run))
                figures = json.loads((run / "figures.json").read_text(encoding="utf-8"))
                runs.append({"side": name, "repeat": repeat + 1, **figures})
                print(f"{repeat + 1}/{options.repeats} {name}: {figures['seconds']:.2f} s", file=sys.stderr, flush=True)
                found = load(run)
                expected = expected or {key: np.array(array) for key, array in found.items()}
                difference = first_difference(found, expected)
                if difference:
                    print(f"{name} and {sides[0]} differ: {difference}", file=sys.stderr)
                    return 1
            shutil.rmtree(run)
    num_tokens, num_trained = len(expected["ids"]), int(expected["is_trained"].sum())
    about = machine()
    environments = {run["side"]: run["versions"] for run in runs}
    texts = [f"{about['cpu']}, {CORES} cores, {about['platform']}"]
    texts += [
        f"{side}: {', '.join(f'{name} {number}' for name, number in environments[side].items())}"
        for side in dict.fromkeys([sides[0], sides[-1]])  # the last one has its own environment when it is TRL
    ]
    print("\n".join(line for text in texts for line in textwrap.wrap(text, 80)))
    print(f"{options.rows:,} rows, {num_tokens:,} tokens, {num_trained:,} of them trained; equal on all sides\n")
    print(table(runs, num_tokens))
    if options.json:
        medians = {
            side: statistics.median(run["seconds"] for run in runs if run["side"] == side)
            for side in dict.fromkeys(run["side"] for run in runs)
        }
        result = {
            "machine": about,
            "rows": options.rows,
            "tokens": num_tokens,
            "trained_tokens": num_trained,
            "median_seconds": medians,
            "runs": runs,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
