"""Jobs of `python -m launch submit` in a real Slurm: whatever ends them, the run ends as if nothing had happened."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import own_model
import pytest
import torch
from cluster import NODES, Cluster, slurm_cluster, wait_for, why_not
from conftest import ROOT, World, build_tokenizer, launch, make_rows
from safetensors.torch import load_file

from launch import runs
from launch.batch_step import read_requeues
from launch.checkpoint import path_of_step

pytestmark = pytest.mark.slow
MAX_STEPS, SAVE_STEPS = 48, 4
SETTINGS = {"max_steps": MAX_STEPS, "save_steps": SAVE_STEPS, "eval_steps": 40}
SECONDS_TO_START = 300.0  # from submitted or requeued to the first step
SECONDS_TO_STOP = 120.0
TOLERANCE = 1e-5  # for the weights of another number of ranks
ONE_RANK_A_NODE = ("--gpus-per-node=4", "--processes-per-node=1")
PERHAPS = "since it was preempted or a node failed"
ONE_NODE = {"NumCPUs": 1, "NumTasks": 1, "NumNodes": 1}  # all three, or a job of two waits for ever
DEEPSPEED = ROOT / "configs" / "deepspeed" / "zero3_offload.json"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes; skipped where there can be none, but never by CI."""
    if reason := why_not():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no Slurm: {reason}")
    with slurm_cluster() as here:
        yield here


@pytest.fixture(autouse=True)
def _nothing_is_left(cluster: Cluster) -> Iterator[None]:
    """The queue is empty and both nodes are there for the next test."""
    yield
    cluster.run("scancel", "--user=root")
    for name in NODES:
        if name not in cluster.nodes:
            cluster.start_node(name)
    wait_for(lambda: cluster.states() == ["idle"] * len(NODES), 90, "both nodes idle")


@dataclass
class Run:
    """A run, and the job that it is in."""

    cluster: Cluster
    world: World
    recipe: Path
    job_id: str = ""

    @property
    def directory(self) -> Path:
        return self.world.run_directory(self.recipe.stem)

    @property
    def job(self) -> dict[str, str]:
        return self.cluster.job(self.job_id)

    @property
    def status(self) -> dict[str, Any]:
        return runs.read_status(self.directory)

    @property
    def step(self) -> int:
        """The last one in metrics.jsonl."""
        return max((record["step"] for record in self.records("train")), default=0)

    @property
    def log(self) -> str:
        return (self.directory / "logs" / "job.log").read_text(encoding="utf-8", errors="replace")

    @property
    def starts(self) -> list[str]:
        """The line that the log has for each start of a job."""
        return re.findall(r"^── (job \d+ on .*)$", self.log, re.MULTILINE)

    @property
    def goes_on_after(self) -> list[int]:
        """The step of each start of the ranks."""
        return [record["step"] for record in self.records("start")]

    def records(self, kind: str) -> list[dict[str, Any]]:
        return self.world.metrics(self.recipe.stem, kind)

    def submit(self, *options: str, code: int = 0) -> str:
        """What it says."""
        command = [sys.executable, "-m", "launch", "submit", str(self.recipe), *ONE_RANK_A_NODE, *options]
        said = self.cluster.run(*command, code=code, cwd=ROOT)
        if self.status.get("state") != "finished" and code == 0:
            self.job_id = re.search(r"^ +job +(\d+)", said, re.MULTILINE)[1]  # type: ignore[index]
        return said

    def train(self, num_steps: int = 3) -> int:
        """Wait until it has trained for so many steps more; the step that it is in then."""
        wanted = max(self.step, self.status.get("step", 0)) + num_steps
        self.wait_for(lambda: self.step >= wanted, SECONDS_TO_START, f"at step {wanted}")
        return self.step

    def preempt(self) -> None:
        """By a job of high priority that wants both nodes; Slurm has asked it to go when this returns."""
        self.cluster.occupy()
        self.wait_for(lambda: self.job["PreemptTime"] != "None", 30, "preempted")

    def until_requeued(self, times: int, **changes: object) -> None:
        """Wait until it is pending again, and give it these changes."""
        self.wait_for(lambda: self.is_in("PENDING", times), SECONDS_TO_STOP, f"requeued {times} times")
        if changes:
            words = [f"{key}={value}" for key, value in changes.items()]
            self.cluster.run("scontrol", "update", f"JobId={self.job_id}", *words)

    def is_in(self, state: str, times_requeued: int) -> bool:
        job = self.job
        return (job["JobState"], job["Restarts"]) == (state, str(times_requeued))

    def until_over(self, state: str, seconds: float = SECONDS_TO_START) -> dict[str, str]:
        """Wait until the job is; its fields."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.wait_for(lambda: self.job["JobState"] in over, seconds, "over")
        job = self.job
        assert job["JobState"] == state, f"{job}\n{self.log}"
        return job

    def wait_for(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """`wait_for`, which tells of the run when that does not come true."""
        try:
            wait_for(condition, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.status}\n{self.job}\n{self.log}") from None


@pytest.fixture(scope="module")
def slow_world(world: World) -> World:
    """The tiny rows, and a model that can be made to wait."""
    for path in (Path(own_model.__file__), Path(__file__).with_name("slow_model.py")):
        shutil.copy(path, world.directory)
    torch.manual_seed(0)
    model = own_model.build_packable()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.save(model.state_dict(), world.directory / "own.pth")
    build_tokenizer([row["input"] + row["output"] for row in make_rows(50)]).save_pretrained(world.directory / "tok")
    return world


def slow_recipe(world: World, name: str, **train: Any) -> Path:
    model = {
        "name_or_path": str(world.directory / "own.pth"),
        "factory": f"{world.directory / 'slow_model.py'}:build",
        "tokenizer": str(world.directory / "tok"),
    }
    adapter = {"r": 4, "lora_dropout": 0.0, "target_modules": ["query_key_value", "dense"]}
    return world.recipe(name, model=model, adapter=adapter, train=SETTINGS | train)


@contextmanager
def held(world: World) -> Iterator[None]:
    """The step that a run is in does not end meanwhile: one of its ranks waits, and the others for it."""
    closed, waits = world.directory / "closed", world.directory / "waits"
    closed.touch()
    try:
        wait_for(waits.exists, SECONDS_TO_STOP, "held")
        yield
    finally:
        closed.unlink()
        waits.unlink(missing_ok=True)


def weights(world: World, name: str) -> dict[str, torch.Tensor]:
    """Masters and moments after the last step."""
    return load_file(path_of_step(world.run_directory(name), MAX_STEPS) / "optimizer.safetensors")


@pytest.fixture(scope="module")
def straight(slow_world: World) -> dict[str, torch.Tensor]:
    """Of two ranks that nothing happened to, without Slurm."""
    launch(slow_recipe(slow_world, "straight"), 2, deepspeed=DEEPSPEED)
    return weights(slow_world, "straight")


def assert_as_if_nothing_had_happened(run: Run, straight: dict[str, torch.Tensor], *, tolerance: float = 0.0) -> None:
    """Its weights, its samples, and one line for each step."""
    found = weights(run.world, run.recipe.stem)
    assert found.keys() == straight.keys()
    for name, expected in straight.items():
        far = (found[name] - expected).abs().max() / expected.abs().max()
        assert far <= tolerance, f"{name} is off by {far:.1e} of its largest value"
    assert [record["step"] for record in run.records("train")] == list(range(1, MAX_STEPS + 1))
    assert run.status["state"] == "finished"
    assert not (run.directory / ".lock").exists()


# ---- the cluster ----


def test_nothing_is_left_of_a_cluster_whose_test_has_failed(cluster: Cluster) -> None:
    """Another one, whose end looks for its processes and mounts and would raise another error."""
    directories = []

    def failing() -> None:
        with slurm_cluster() as other:
            directories.append(other.directory)
            job_id = other.run("sbatch", "--parsable", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 1000")
            wait_for(lambda: other.job(job_id.strip())["JobState"] == "RUNNING", 20, "running")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert not directories[0].exists()
    assert cluster.states() == ["idle"] * len(NODES), "this one is as it was"


# ---- what ends a job ----


def test_two_nodes_train_from_start_to_merge(cluster: Cluster, world: World) -> None:
    settings = {"train": {"max_steps": 8}, "run": {"merge": True}}
    launch(world.recipe("alone", **settings), 2, deepspeed=DEEPSPEED)
    run = Run(cluster, world, world.recipe("two-nodes", **settings))
    run.submit("--nodes=2")
    job = run.until_over("COMPLETED")
    assert (job["ExitCode"], job["Restarts"], job["NumNodes"]) == ("0:0", "0", "2")
    for path in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        found, expected = (load_file(directory / path) for directory in (run.directory, world.run_directory("alone")))
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert "is finished; nothing is submitted" in run.submit()


def test_preempted_signalled_and_out_of_time(
    cluster: Cluster, slow_world: World, straight: dict[str, torch.Tensor]
) -> None:
    """None of them loses a step, and each is one requeue."""
    run = Run(cluster, slow_world, slow_recipe(slow_world, "interrupted"))
    run.submit("--nodes=2", "--partition=low", "--time=60")
    run.train()
    with held(slow_world):
        said = run.submit("--nodes=2", code=2)
        assert said.startswith("Refused: ") and f"has job {run.job_id} in the queue (RUNNING, " in said
        run.preempt()
    run.until_requeued(1)
    saved = [run.status["step"]]
    run.train()

    cluster.run("scancel", "--signal=USR1", run.job_id)
    run.until_requeued(2)
    saved.append(run.status["step"])
    run.train()

    with held(slow_world):
        num_terms = run.log.count("death signal")
        hours, minutes, _ = map(int, run.job["RunTime"].split(":"))
        cluster.run("scontrol", "update", f"JobId={run.job_id}", f"TimeLimit={60 * hours + minutes + 2}")
        run.wait_for(lambda: run.log.count("death signal") > num_terms, 60, "told that its time is over")
    run.until_requeued(3, TimeLimit=60)
    saved.append(run.status["step"])

    assert run.until_over("COMPLETED")["Restarts"] == "3"
    assert_as_if_nothing_had_happened(run, straight)
    assert run.goes_on_after == [0, *saved], "no step was lost"
    whys = [record["reason"] for record in read_requeues(run.directory)]
    for start, line in enumerate(run.starts[1:], start=1):
        why, step = whys[start - 1], saved[start - 1]
        assert why.endswith(f"asked to stop; step {step} is saved")
        assert line.endswith(f", restart {start}: {why}; going on after step {step}")
    first_words = [why.partition("asked to stop")[0] for why in whys]
    assert first_words[:2] == ["preempted by Slurm; ", ""] and first_words[2].endswith(" s before its time limit; ")


def test_cancelled_and_then_without_power(
    cluster: Cluster, slow_world: World, straight: dict[str, torch.Tensor]
) -> None:
    """The first ends the job, which is not requeued. A new one goes on, and without a node that dies."""
    run = Run(cluster, slow_world, slow_recipe(slow_world, "cancelled"))
    run.submit("--nodes=2")
    run.train()
    cluster.run("scancel", run.job_id)
    assert run.until_over("CANCELLED")["Restarts"] == "0" and not read_requeues(run.directory)
    assert run.status["state"] == "preempted", "it had the time to save"
    saved = run.status["step"]
    run.submit("--nodes=2")
    run.train(SAVE_STEPS)
    assert run.goes_on_after == [0, saved]
    cluster.cut_power("node2")
    run.until_requeued(1, **ONE_NODE)
    job = run.until_over("COMPLETED")
    assert (job["Restarts"], job["NodeList"]) == ("1", "node1")
    assert f"restart 1: Slurm requeued it, {PERHAPS}; it had left: " in run.starts[-1]
    assert_as_if_nothing_had_happened(run, straight, tolerance=TOLERANCE)


def test_preempted_twice_and_then_on_one_node(
    cluster: Cluster, slow_world: World, straight: dict[str, torch.Tensor]
) -> None:
    """The second time it is killed in the middle of a step, and goes on with one node."""
    run = Run(cluster, slow_world, slow_recipe(slow_world, "smaller"))
    run.submit("--nodes=2", "--partition=low")
    run.train()
    with held(slow_world):
        run.preempt()
    run.until_requeued(1, Partition="sudden")
    run.train(SAVE_STEPS)
    with held(slow_world), cluster.configured(KillWait=1):
        cluster.occupy()
        run.until_requeued(2, **ONE_NODE)
        assert run.status["state"] == "running", "nobody was left to say otherwise"
    job = run.until_over("COMPLETED")
    assert (job["Restarts"], job["NumNodes"]) == ("2", "1")
    assert run.goes_on_after[-1] % SAVE_STEPS == 0, "from the last save"
    assert f"restart 2: Slurm requeued it, {PERHAPS}; it had left: running, training" in run.starts[-1]
    assert_as_if_nothing_had_happened(run, straight, tolerance=TOLERANCE)


def test_a_job_whose_node_is_out_of_reach_gives_way_to_its_next_start(cluster: Cluster, slow_world: World) -> None:
    """Slurm takes the node for dead and starts the job on the other, while the first start still trains."""
    launch(slow_recipe(slow_world, "straight-on-one"), 1, deepspeed=DEEPSPEED)
    run = Run(cluster, slow_world, slow_recipe(slow_world, "out-of-reach"))
    run.submit("--nodes=1")
    run.train(SAVE_STEPS)
    node = run.job["NodeList"]
    with cluster.silenced(node):
        with held(slow_world):
            run.until_requeued(1)
            run.wait_for(lambda: run.job["NodeList"] not in (node, "(null)"), 60, "on the other node")
            run.wait_for(lambda: "takes over" in run.log, SECONDS_TO_START, "taken over")
        job = run.until_over("COMPLETED")
    assert job["Restarts"] == "1"
    assert_as_if_nothing_had_happened(run, weights(slow_world, "straight-on-one"))


def test_what_would_fail_again_is_not_requeued(cluster: Cluster, slow_world: World) -> None:
    recipe = slow_recipe(slow_world, "failing", learning_rate=1e30, max_bad_steps=2)
    run = Run(cluster, slow_world, recipe)
    run.submit("--nodes=2")
    job = run.until_over("FAILED")
    assert (job["ExitCode"], job["Restarts"]) == ("1:0", "0")
    assert run.status["state"] == "failed" and "gradients were not finite" in run.status["reason"]
    assert f"ended: failed: {run.status['reason']}" in run.log and not read_requeues(run.directory)
