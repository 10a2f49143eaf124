"""A run that is ended again and again, at seeded moments, has the weights of one that nothing happened to.

    python tests/faults/loop.py --kills 200 --seed 0 [--elastic]

Ranks are forked; what is left of them after a kill is ended as a launcher would.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

import torch  # noqa: E402
from conftest import World, build_base, deepspeed_json, launch, make_rows, start_ranks  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import train  # noqa: E402
from launch import runs  # noqa: E402
from launch.checkpoint import checkpoints_directory, path_of_step  # noqa: E402

STEPS_PER_KILL = 12
SAVE_STEPS = 3
WAYS = ("SIGKILL to one rank", "SIGKILL to all", "SIGTERM to one rank", "SIGTERM to all, twice")
SIZES = (4, 2, 3, 1)


def counting(work: Path, arguments: list[str]) -> int:
    """train.py's main; a byte for every step that rank zero makes."""
    real_step = train.engines.step

    def step(*given: Any) -> tuple[float, bool]:
        result = real_step(*given)
        if os.environ["RANK"] == "0":
            with work.open("ab") as file:
                file.write(b".")
        return result

    train.engines.step = step
    return train.main(arguments)


def interrupt(children: list[tuple[Any, Any]], way: str, chance: random.Random) -> None:
    """End them in this way; those that stay behind get SIGKILL, as from a launcher."""
    processes = [child for child, _ in children]
    number = signal.SIGKILL if "KILL" in way else signal.SIGTERM
    for process in [chance.choice(processes)] if "one" in way else processes:
        for _ in range(2 if "twice" in way else 1):
            if process.is_alive():
                os.kill(process.pid, number)
    if number == signal.SIGTERM:
        for process in processes:
            process.join(60)
    for process in processes:
        process.kill()
        process.join()


def run_loop(directory: Path, *, kills: int, seed: int, elastic: bool) -> dict[str, Any]:
    """What happened; raises AssertionError when a sample, a step or a bit is lost."""
    chance = random.Random(seed)
    rows = make_rows(50)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = build_base(directory / "base", [row["input"] + row["output"] for row in rows])
    world = World(directory, base, directory / "rows.jsonl")
    steps = STEPS_PER_KILL * kills
    settings = {
        "max_steps": steps,
        "save_steps": SAVE_STEPS,
        "save_seconds": 1e6,
        "eval_steps": 10,
        "learning_rate": 1e-3,
    }
    straight, ended = (world.recipe(name, train=settings) for name in ("straight", "ended"))
    config = deepspeed_json(directory)
    start = time.monotonic()
    launch(straight, 2, deepspeed=config)
    seconds = time.monotonic() - start
    work = directory / "work"
    work.touch()
    run_directory, ways = world.run_directory("ended"), Counter[str]()
    for turn in range(kills):
        size = SIZES[turn % len(SIZES)] if elastic else 2
        children = start_ranks(size, counting, work, [str(ended)], deepspeed=config)
        time.sleep(chance.uniform(0.2, 2 + seconds / kills))
        way = chance.choice(WAYS)
        interrupt(children, way, chance)
        ways[way] += 1
        if runs.read_status(run_directory).get("state") == "finished":
            break
    children = start_ranks(3 if elastic else 2, counting, work, [str(ended)], deepspeed=config)
    for child, _ in children:
        child.join(600)
    assert runs.read_status(run_directory)["state"] == "finished"
    assert not [path for path in checkpoints_directory(run_directory).iterdir() if path.name.startswith(".")]
    trained = [record["step"] for record in world.metrics("ended", "train")]
    assert trained == list(range(1, steps + 1)), "each step stands once in metrics.jsonl"
    expected, found = (
        load_file(path_of_step(world.run_directory(name), steps) / "optimizer.safetensors")
        for name in ("straight", "ended")
    )
    difference = max(
        float((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-12))
        for name in expected
    )
    assert difference <= (1e-5 if elastic else 0), f"the weights differ by {difference:.1e}"
    done = work.stat().st_size
    hard = sum(count for way, count in ways.items() if "KILL" in way)
    assert done <= steps + hard * SAVE_STEPS + len(ways), f"{done} steps of work for {steps}"
    return {"ends": dict(ways), "steps": steps, "steps of work": done, "largest difference": difference}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elastic", action="store_true", help="4, 2, 3 and 1 ranks in turn")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        for name, value in run_loop(Path(temporary), kills=given.kills, seed=given.seed, elastic=given.elastic).items():
            print(f"{name:20} {value}")
