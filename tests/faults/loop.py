"""A run that is ended again and again, at seeded moments, has the weights of one that nothing happened to.

    python tests/faults/loop.py --kills 200                          ranks are forked: about 3 s a kill
    python tests/faults/loop.py --kills 20 --launcher --elastic      the real accelerate launch

At its end every sample was trained on once an epoch, every step stands once in metrics.jsonl, the work was at most a
tenth more than that of the straight run, and no process and no temporary file is left.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent.parent)]

import torch  # noqa: E402
from conftest import ROOT, World, build_base, deepspeed_json, make_rows, run_ranks, start_ranks  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_launch import command, ranks_of  # noqa: E402

import train  # noqa: E402
from launch import batching, runs  # noqa: E402
from launch.checkpoint import checkpoints_directory, path_of_step  # noqa: E402
from launch.table import format_table  # noqa: E402

STEPS_PER_KILL = 30
SAVE_STEPS, EVAL_STEPS = 2, 10
MOST_WORK = 1.1  # steps that were made, for each step of the run
SAMPLES_PER_STEP, NUM_SAMPLES = 8, 40  # an epoch has five whole steps
SIZES = (4, 2, 3, 1)
MOMENTS = ("start-up", "step", "save", "evaluation")
FORKED_WAYS = ("SIGKILL to one rank", "SIGKILL to all", "SIGTERM to one rank", "SIGTERM to all, twice")
WAYS = ("SIGKILL to the launcher", "SIGTERM to the launcher", *FORKED_WAYS)
SECONDS_TO_END = 60.0  # for a start that was asked to, or lost a rank
SECONDS_AFTER_LAUNCHER = 5.0  # for the ranks of one that is gone


def recorded(work: Path, log: Path, arguments: list[str]) -> int:
    """train.py's main, saying to `log`; a line in `work`-RANK for each micro-batch and for each step that was made.

    Each line is one write, which a kill cannot take back.
    """
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    record = os.open(f"{work}-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    real_ids, real_loss, real_step = train.batching.step_samples, train.Job.loss, train.engines.step
    current = -1

    def step_samples(number: int, *given: Any) -> list[int]:
        nonlocal current
        current = number
        return real_ids(number, *given)

    def loss(job: Any, samples: Any, ids: Sequence[int]) -> Any:
        if samples is job.samples and current >= 0:  # not those of an evaluation, or of a trial before the first step
            os.write(record, f"{current} {' '.join(map(str, ids))}\n".encode())
        return real_loss(job, samples, ids)

    def step(*given: Any) -> tuple[float, bool]:
        result = real_step(*given)
        os.write(record, f"{current} made\n".encode())
        return result

    train.batching.step_samples, train.Job.loss, train.engines.step = step_samples, loss, step
    return train.main(arguments)


class Forked:
    """Ranks that are forked from this process, which does with them what a launcher would."""

    def __init__(self, loop: "Loop", turn: int, size: int) -> None:
        given = loop.directory / f"ids-{turn:04d}", loop.log, [str(loop.recipe)]
        self.children = start_ranks(size, recorded, *given, deepspeed=loop.deepspeed)

    def ranks(self) -> list[int]:
        return [child.pid for child, _ in self.children if child.is_alive()]

    def launcher(self) -> list[int]:
        return []

    def is_over(self) -> bool:
        return not self.ranks()

    def end(self) -> float:
        """Ask the others to end when one has failed, and wait for them all."""
        start, asked = time.monotonic(), False
        while not self.is_over():
            if not asked and any(self._has_failed(*child) for child in self.children):
                asked = True
                for rank in self.ranks():
                    os.kill(rank, signal.SIGTERM)
            assert time.monotonic() - start < SECONDS_TO_END, f"ranks {self.ranks()} do not end"
            time.sleep(0.005)
        for child, receiver in self.children:
            child.join()
            receiver.close()
        return 0.0

    @staticmethod
    def _has_failed(child: Any, receiver: Any) -> bool:
        if child.is_alive() or receiver.closed:
            return False
        try:
            return not receiver.poll() or receiver.recv() != (True, 0)
        except EOFError:
            return True
        finally:
            receiver.close()


class Launched:
    """A real accelerate launch."""

    def __init__(self, loop: "Loop", turn: int, size: int) -> None:
        self.recipe = loop.recipe
        with loop.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command(), "--num_processes", str(size), "train.py", str(loop.recipe)],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ranks(self) -> list[int]:
        return ranks_of(self.recipe)

    def launcher(self) -> list[int]:
        return [self.process.pid]

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> float:
        """Wait for the launcher; how long its ranks lived on."""
        self.process.wait(SECONDS_TO_END)
        start = time.monotonic()
        while left := self.ranks():
            assert time.monotonic() - start < SECONDS_AFTER_LAUNCHER, f"ranks {left} outlive their launcher"
            time.sleep(0.01)
        return time.monotonic() - start


@dataclass
class Loop:
    """A run that is being ended, and what was seen of it."""

    directory: Path
    recipe: Path
    run_directory: Path
    deepspeed: Path
    chance: random.Random
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    outlived_seconds: float = 0.0

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def last_step(self) -> int:
        """The last that stands in metrics.jsonl, of which only the end is read: it grows to many thousands of lines."""
        path = self.run_directory / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4000))
            lines = file.read().split(b"\n")[:-1]
        return int(lines[-1].split(b'"step": ')[1].split(b",")[0]) if lines else 0

    def wait_for(self, condition: Callable[[], bool], start: Forked | Launched) -> None:
        """Until the condition holds, or the start is over."""
        deadline = time.monotonic() + 300
        while not condition() and not start.is_over():
            assert time.monotonic() < deadline, "no progress for 300 s"
            time.sleep(0.002)

    def reach(self, moment: str, target: int, start: Forked | Launched, start_up_seconds: float) -> None:
        """Wait for a moment of this kind, `target` steps into the run."""
        if moment == "start-up":
            deadline = time.monotonic() + self.chance.uniform(0, start_up_seconds)
            self.wait_for(lambda: time.monotonic() > deadline, start)
            self.wait_for(lambda: bool(start.ranks()), start)
            return
        if moment == "evaluation":  # the last step before one stands there
            target += -target % EVAL_STEPS
        self.wait_for(lambda: self.last_step() >= target, start)
        if moment == "save":
            checkpoints = checkpoints_directory(self.run_directory)
            self.wait_for(lambda: any(checkpoints.glob(".saving-*")), start)
        time.sleep(self.chance.uniform(0, 0.02 if moment == "save" else 0.1))

    def interrupt(self, start: Forked | Launched, way: str, moment: str) -> None:
        """End it, see that all of it ends, and that a stop has lost nothing."""
        ranks = start.ranks()
        if not ranks or start.is_over():
            start.end()
            assert runs.read_status(self.run_directory)["state"] == "finished", "it ended by itself"
            return
        ended = start.launcher() if "launcher" in way else [self.chance.choice(ranks)] if "one" in way else ranks
        number = signal.SIGKILL if "KILL" in way else signal.SIGTERM
        for turn in range(2 if "twice" in way else 1):
            time.sleep(turn * self.chance.uniform(0, 0.2))
            for process in ended + (start.launcher() if "all" in way else []):
                try:
                    os.kill(process, number)
                except ProcessLookupError:
                    continue
        self.outlived_seconds = max(self.outlived_seconds, start.end())
        self.ends[way, moment] += 1
        status = runs.read_status(self.run_directory)
        if number == signal.SIGTERM and moment != "start-up" and status["state"] != "finished":
            assert status["state"] == "preempted", f"{way} in {moment}: {status}"
            assert path_of_step(self.run_directory, status["step"]).exists() and self.last_step() == status["step"]


def run_loop(directory: Path, *, kills: int, seed: int, elastic: bool, launcher: bool = False) -> list[tuple[str, str]]:
    """What happened, as a table; raises AssertionError when a sample, a step or a bit is lost."""
    began = time.monotonic()
    rows = make_rows(NUM_SAMPLES + 10)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = build_base(directory / "base", [row["input"] + row["output"] for row in rows])
    world = World(directory, base, directory / "rows.jsonl")
    steps = STEPS_PER_KILL * (kills + 1)
    settings = {
        "max_steps": steps,
        "save_steps": SAVE_STEPS,
        "save_seconds": 1e6,
        "eval_steps": EVAL_STEPS,
        "learning_rate": 1e-3,
        "global_batch_size": SAMPLES_PER_STEP,
    }
    straight = world.recipe("straight", train=settings | {"save_steps": steps})  # saves cost time, and change nothing
    ended = world.recipe("ended", train=settings)
    deepspeed = ROOT / "configs/deepspeed/zero3_offload.json" if launcher else deepspeed_json(directory)
    given = directory / "straight", directory / "log", [str(straight)]
    assert run_ranks(2, recorded, *given, deepspeed=deepspeed, timeout_seconds=300 + steps) == [0, 0]
    print(f"straight: {steps} steps, {time.monotonic() - began:.0f} s", flush=True)
    chance = random.Random(seed)
    loop = Loop(directory, ended, world.run_directory("ended"), deepspeed, chance)
    combinations = list(product(WAYS if launcher else FORKED_WAYS, MOMENTS))
    plan: list[tuple[str, str]] = []
    while len(plan) < kills:
        plan += chance.sample(combinations, len(combinations))
    kind = Launched if launcher else Forked
    try:
        for turn, (way, moment) in enumerate(plan[:kills]):
            since = time.monotonic()
            start = kind(loop, turn, SIZES[turn % len(SIZES)] if elastic else 2)
            target = (turn + 1) * STEPS_PER_KILL + chance.randint(-10, 10)
            loop.reach(moment, target, start, 15.0 if launcher else 1.5)
            loop.interrupt(start, way, moment)
            print(
                f"{turn + 1:>{len(str(kills))}}/{kills}  {way} in {moment}: "
                f"step {loop.last_step()}, {time.monotonic() - since:.1f} s",
                flush=True,
            )
        start = kind(loop, kills, 3 if elastic else 2)
        loop.wait_for(start.is_over, start)
        start.end()
        seconds = time.monotonic() - began
        return [*verdict(world, loop, steps, elastic=elastic, launcher=launcher), ("seconds", f"{seconds:,.0f}")]
    except BaseException:
        print("".join(loop.log.read_text(errors="replace").splitlines(keepends=True)[-60:]))
        raise


def verdict(world: World, loop: Loop, steps: int, *, elastic: bool, launcher: bool) -> list[tuple[str, str]]:
    """The rows of the table; raises AssertionError for what must not be."""
    run_directory = loop.run_directory
    assert runs.read_status(run_directory)["state"] == "finished"
    stray = [path for path in run_directory.rglob("*") if path.name.startswith(".") or path.suffix == ".corrupt"]
    assert all(path.name.startswith(".lock") for path in stray), f"left over: {stray}"
    trained = [record["step"] for record in world.metrics("ended", "train")]
    assert trained == list(range(1, steps + 1)), "each step stands once in metrics.jsonl"
    evaluated = [record["step"] for record in world.metrics("ended", "evaluation")]
    assert evaluated == list(range(0, steps + 1, EVAL_STEPS)), "and each evaluation"
    expected, found = (
        load_file(path_of_step(world.run_directory(name), steps) / "optimizer.safetensors")
        for name in ("straight", "ended")
    )
    weights = max(
        float((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-12))
        for name in expected | found
    )
    losses = max(
        abs(one["loss"] - other["loss"]) / one["loss"]
        for kind in ("train", "evaluation")
        for one, other in zip(world.metrics("straight", kind), world.metrics("ended", kind), strict=True)
    )
    allowed = 1e-5 if elastic else 0
    assert max(weights, losses) <= allowed, f"the weights differ by {weights:.1e}, the losses by {losses:.1e}"
    if launcher:  # the log has those of the straight run, too
        made = loop.log.read_text(errors="replace").count("\nstep ") - steps
        samples = "as the losses say"
    else:
        made, samples = check_samples(loop.directory, steps)
    assert made <= MOST_WORK * steps, f"{made} steps of work for {steps}"
    ends = [
        (way, ", ".join(f"{loop.ends[way, moment]} in {moment}" for moment in MOMENTS if loop.ends[way, moment]))
        for way in WAYS
        if any(loop.ends[way, moment] for moment in MOMENTS)
    ]
    if launcher:
        ends.append(("ranks lived on", f"{loop.outlived_seconds:.2f} s at most after their launcher"))
    return [
        *ends,
        ("steps", f"{steps:,}; {made:,} were made, {made / steps:.3f} times as many"),
        ("samples", samples),
        ("largest difference", f"{weights:.1e} of weights and moments, {losses:.1e} of losses"),
    ]


def check_samples(directory: Path, steps: int) -> tuple[int, str]:
    """(steps that were made, what was seen): each sample once an epoch, and the same ones when a step is repeated."""
    executions: dict[int, dict[str, Counter[int]]] = defaultdict(lambda: defaultdict(Counter))  # step, turn, ids
    ranks_that_made: Counter[tuple[int, str]] = Counter()
    ranks_of_turn = Counter(path.name.split("-")[1] for path in directory.glob("ids-*"))
    made = 0
    for path in directory.glob("ids-*"):
        _, turn, rank = path.name.split("-")
        for line in path.read_text().splitlines():
            step, *ids = line.split()
            if ids == ["made"]:
                ranks_that_made[int(step), turn] += 1
                made += rank == "0"
            else:
                executions[int(step)][turn].update(map(int, ids))
    assert sorted(executions) == list(range(steps))
    num_repeats = 0
    for step, by_turn in executions.items():
        own = Counter(batching.step_samples(step, NUM_SAMPLES, SAMPLES_PER_STEP, steps * SAMPLES_PER_STEP, seed=0))
        for turn, ids in by_turn.items():
            is_whole = ranks_that_made[step, turn] == ranks_of_turn[turn]
            assert ids == own if is_whole or turn == max(by_turn) else ids <= own, f"step {step} in turn {turn}: {ids}"
        num_repeats += len(by_turn) - 1
    epoch = NUM_SAMPLES // SAMPLES_PER_STEP
    for first in range(0, steps, epoch):
        seen = sum((executions[step][max(executions[step])] for step in range(first, first + epoch)), Counter[int]())
        assert seen == Counter(range(NUM_SAMPLES)), f"the epoch from step {first} has {seen}"
    return made, f"each once in each of {steps // epoch} epochs; {num_repeats} repeated steps had their own again"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elastic", action="store_true", help="4, 2, 3 and 1 ranks in turn")
    parser.add_argument("--launcher", action="store_true", help="through the real accelerate launch")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as temporary:
        print(format_table(run_loop(Path(temporary), **vars(given))))
