"""submit and the job: its text, which bash really runs, with srun, scontrol and squeue that put down what they get."""

import json
import math
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, World
from typer.testing import CliRunner

from launch import batch_step, runs, slurm
from launch.__main__ import app
from launch.batch_step import Decision, Ending, decide
from launch.config import as_override, dump_recipe, load_recipe
from launch.errors import ConfigError
from launch.slurm import JobText, QueuedJob, queued_job
from launch.slurm_options import directive, literal_path, memory_bytes_of, num_gpus_of, num_nodes_of, seconds_of

HOSTILE = 'it\'s; "$HOME" `id`\n\\ #ü石'
FAKE = """#!{python}
import json, os, subprocess, sys
from pathlib import Path
here = Path({here!r})
name, argv = Path(sys.argv[0]).name, sys.argv[1:]
with (here / "calls.jsonl").open("a") as file:
    file.write(json.dumps([name, argv, {{key: value for key, value in os.environ.items() if key in {kept}}}]) + "\\n")
if name == "scontrol" and argv[:2] == ["show", "hostnames"]:
    print("n1\\nn2")
elif name == "scontrol" and argv[:2] == ["show", "node"]:
    print((here / "node").read_text())
elif name == "squeue" and "-o" in argv:
    print(1900000000)
elif name == "squeue":
    print((here / "queue").read_text())
elif name == "sbatch":
    print("4711;elsewhere" if (here / "elsewhere").exists() else 4711)
elif name == "srun":  # as on two nodes
    command = [word for place, word in enumerate(argv) if not all(w.startswith("--") for w in argv[:place + 1])]
    for node in (0, 1):
        variables = dict(os.environ, SLURM_NODEID=str(node), SLURMD_NODENAME=f"n{{node + 1}}")
        variables["SLURM_GPUS_ON_NODE"] = json.loads((here / "gpus").read_text())[node]
        code = subprocess.run(command, env=variables).returncode
        if code:
            sys.exit(code)
elif name in ("python", "accelerate"):
    if "train.py" in argv:
        (here / "ranks").is_file() and exec((here / "ranks").read_text())
    else:
        os.execv(sys.executable, [sys.executable, *argv])
"""
KEPT = [
    "SLURM_NODEID",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
    "TRITON_CACHE_DIR",
    "SLURM_JOB_END_TIME",
    "SLURM_JOB_NUM_NODES",
]
KEPT += ["SBATCH_TIMELIMIT", "SBATCH_OPEN_MODE", "SBATCH_ACCOUNT", "SBATCH_ARRAY_INX", "SLURM_CONF"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands on PATH, as a cluster of two nodes with four GPUs each that never starts anything by itself."""
    here = tmp_path / "cluster"
    here.mkdir()
    for name in ("srun", "scontrol", "squeue", "sbatch", "python"):
        (here / name).write_text(FAKE.format(python=sys.executable, here=str(here), kept=KEPT), encoding="utf-8")
        (here / name).chmod(0o755)
    (here / "node").write_text("NodeName=n1 Arch=x86_64\n   NodeAddr=10.0.0.1 NodeHostName=n1 Version=22.05\n")
    (here / "queue").write_text("RUNNING 0 N/A UNLIMITED None")
    (here / "gpus").write_text('["4", "4"]')
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    return here


def calls(cluster: Path, program: str) -> list[tuple[list[str], dict[str, str]]]:
    path = cluster / "calls.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(argv, variables) for name, argv, variables in map(json.loads, lines) if name == program]


def job_text(**changes: Any) -> JobText:
    values: dict[str, Any] = {
        "run_name": "alpha",
        "python": "/opt/py thon/bin/python",
        "rank_python": changes.get("python", "/opt/py thon/bin/python"),
        "checkout": "/home/me/cairn",
        "log": "/home/me/cairn/runs/alpha/logs/job.log",
        "config_file": "configs/accelerate/zero3.yaml",
        "arguments": ("recipe.yaml", "train.max_steps=3"),
        "options": (("nodes", 2), ("gpus-per-node", 4), ("time", "12:00:00")),
        "processes_per_node": None,
        "lead_seconds": 120,
        "grace_seconds": None,
    }
    return JobText(**values | changes)


# ---- the text ----


@pytest.mark.parametrize("name", ["plain", "hostile"])
def test_the_text_of_a_job_is_the_golden_one(name: str) -> None:
    text = job_text()
    if name == "hostile":
        text = job_text(
            python=f"/opt/{HOSTILE}/python",
            checkout=f"/home/{HOSTILE}",
            log='/home/50%j \\done"/job.log',
            arguments=(f"{HOSTILE}.yaml", f"data.system={HOSTILE}", "-x"),
            options=(("comment", 'a "b" \\ # $c; ü'), ("constraint", "[a|b]"), ("exclusive", True), ("hold", False)),
            processes_per_node=2,
            grace_seconds=900.0,
        )
    golden = ROOT / "tests" / "golden" / f"job-{name}.sbatch"
    assert text.render() == golden.read_text(encoding="utf-8")


def test_what_no_line_can_hold_goes_beside_and_what_no_text_can_is_refused() -> None:
    assert job_text().beside == []
    assert job_text(checkout="/a\nb").beside == ["--chdir=/a\nb"]
    assert "/a\nb" not in job_text(checkout="/a\nb").render()
    with pytest.raises(ConfigError, match=r"has '\\udce4', which is no UTF-8; rename it"):
        job_text(arguments=("b\udce4r.yaml",)).render()


def test_lines_and_paths_as_sbatch_reads_them() -> None:
    assert directive("exclusive", True) == "#SBATCH --exclusive"
    assert directive("nice", -10) == "#SBATCH --nice=-10"
    assert directive("comment", 'a "b" \\ #') == '#SBATCH --comment="a \\"b\\" \\\\ #"'
    assert (literal_path("/50%/j"), literal_path("/50%\\j")) == ("/50%%/j", "/50%\\\\j")


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [(30, 1800), ("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-2:30", 95400), ("UNLIMITED", None)],
)
def test_time_limits_as_sbatch_reads_them(limit: str | int, seconds: float | None) -> None:
    assert seconds_of(limit) == seconds


def test_a_run_is_asked_to_stop_as_early_as_its_steps_and_saves_need() -> None:
    records = [
        {"kind": "train", "step": 1, "longest_step_seconds": 20.0},
        {"kind": "save", "step": 1, "stall_seconds": 1.0},
        {"kind": "written", "step": 1, "seconds": 4.0},
    ]
    assert slurm.lead_seconds(records, "12:00:00")[0] == 2 * (20 + 5) + 30
    assert slurm.lead_seconds([], "12:00:00")[0] == slurm.lead_seconds([], None)[0] == 120
    assert slurm.lead_seconds([], "4:00") == (60, "a quarter of the time limit, for no step was measured yet")


# ---- the slurm block ----


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"gpus_per_node": 4},
            "slurm: gpus_per_node is not an option of sbatch; did you mean gpus-per-node? The valid",
        ),
        ({"output": "x"}, "slurm: output is not for a recipe to set: what the job prints goes to logs/job.log"),
        ({"ntasks-per-node": 4}, "every node has one task, which starts a rank for each of its GPUs"),
        ({"mem": 1.5}, "slurm: mem = 1.5 is neither text nor a whole number; write it in quotes."),
        ({"partition": ["a"]}, "slurm: partition = ['a'] is neither text nor a whole number"),
        ({"partition": True}, "slurm: partition takes a value, but this is true; if it is meant, quote it."),
        ({"hold": "yes"}, "slurm: hold is on or off, but this is 'yes'; write true, or leave it out."),
        ({"comment": "a\nb"}, "slurm: comment = 'a\\nb' cannot stand in a line of sbatch"),
    ],
)
def test_an_option_that_sbatch_cannot_have_is_refused(world: World, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_recipe(_with_slurm(world, options))
    assert sentence in str(refused.value)


def _with_slurm(world: World, options: dict[str, Any]) -> Path:
    path = world.recipe("options")
    tree = yaml.safe_load(path.read_text(encoding="utf-8")) | {"slurm": options}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_options_are_what_was_written_and_come_back_from_the_run(world: World, tmp_path: Path) -> None:
    """YAML 1.1 would read 45000, 83 and a date."""
    path = world.recipe("written")
    text = "slurm:\n  time: 12:30:00\n  account: 0123\n  begin: 2026-11-21T08:00:00\n  nodes: 2\n  exclusive: true\n"
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")
    recipe = load_recipe(path, ["slurm.gpus-per-node=a100:4", as_override("slurm", "qos", "1e5")])
    assert dict(recipe.slurm) == {
        "time": "12:30:00",
        "account": "0123",
        "begin": "2026-11-21T08:00:00",
        "nodes": 2,
        "exclusive": True,
        "gpus-per-node": "a100:4",
        "qos": "1e5",
    }
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_how_slurm_starts_it_makes_no_other_run(world: World) -> None:
    directory, path = world.run_directory("same"), world.recipe("same")
    directory.mkdir(parents=True)
    runs.write_text(directory / "recipe.yaml", dump_recipe(load_recipe(path, ["slurm.nodes=1"])))
    runs.write_status(directory, "finished", "every step is done")
    assert runs.is_finished(directory, dump_recipe(load_recipe(path, ["slurm.nodes=2"])))
    assert not runs.is_finished(directory, dump_recipe(load_recipe(path, ["train.seed=7"])))


# ---- the job, run by bash ----


def run_job(cluster: Path, checkout: Path, text: JobText, **variables: str) -> subprocess.CompletedProcess[str]:
    script = cluster / "job.sbatch"
    script.write_text(text.render(), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    return subprocess.run(
        ["bash", script], cwd=checkout, env=environment | variables, capture_output=True, text=True, check=False
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Of a hostile name, with the interpreter in a place of another."""
    path = tmp_path / f"out {HOSTILE}"
    path.mkdir()
    (path / "launch").symlink_to(ROOT / "launch")
    return path


@pytest.fixture
def in_a_job(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory, with the variables that a job on two nodes finds; what a step ignores is heard again after it."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("ID", "4711"), ("NUM_NODES", "2"), ("NODELIST", "n[1-2]")):
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def ends_with(cluster: Path, run_directory: Path, state: str, reason: str = "because") -> None:
    """What rank zero would leave behind when it ends."""
    status = {"state": state, "reason": reason}
    (cluster / "ranks").write_text(
        f"import time; d = Path({str(run_directory)!r}); d.mkdir(parents=True, exist_ok=True); "
        f"(d / 'status.json').write_text(json.dumps({status!r} | dict(unix_seconds=time.time())))"
    )


@pytest.mark.slow
def test_hostile_names_arrive_intact_and_every_node_has_its_rank(cluster: Path, checkout: Path, tmp_path: Path) -> None:
    python = tmp_path / f"bin {HOSTILE}" / "python"
    python.parent.mkdir()
    python.symlink_to(cluster / "python")
    arguments = (f"./a={HOSTILE}.yaml", f"data.system={HOSTILE}", "run.name=hostile", "run.output_dir=ru ns")
    ends_with(cluster, checkout / "ru ns" / "hostile", "finished", "every step is done")
    done = run_job(cluster, checkout, job_text(python=str(python), arguments=arguments, config_file=f"{HOSTILE}.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    launches = [call for call in calls(cluster, "python") if "accelerate.commands.launch" in call[0]]
    assert [argv for argv, _ in launches] == [
        [
            *("-m", "accelerate.commands.launch", "--machine_rank", str(node), "--config_file", f"{HOSTILE}.yaml"),
            *("--num_machines", "2", "--num_processes", "8", "--main_process_ip", "10.0.0.1"),
            *("--main_process_port", "14711", "--deepspeed_multinode_launcher", "standard", "train.py", *arguments),
        ]
        for node in (0, 1)
    ]
    for _, variables in launches:
        assert variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "180"
        assert variables["SLURM_JOB_END_TIME"] == "1900000000"
        assert "/cairn-4711-" in variables["TRITON_CACHE_DIR"]
    assert done.stdout.splitlines()[0] == "── job 4711 on n[1-2]"
    assert done.stdout.splitlines()[-1] == "── job 4711 ended: every step is done (srun: exit code 0)"
    assert done.stderr.count("GPUs 4") == 2
    assert ["requeue", "4711"] not in [argv for argv, _ in calls(cluster, "scontrol")]
    tasks = [argv[: -argv[::-1].index("bash") - 1] for argv, _ in calls(cluster, "srun") if "bash" in argv]
    assert tasks == [
        [
            *("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpu-bind=none", "--export=ALL"),
            *("--kill-on-bad-exit=1", "--wait=0"),
        ]
    ]


def told(*num_gpus: int, **changes: str) -> list[str]:
    """What the nodes n1, n2 ... print, the last one with `changes`, beside a prolog."""
    nodes = [
        {"node": f"n{i}", "host": "h", "GPUs": count, "GPU": "V100", "driver": "1"}
        for i, count in enumerate(num_gpus, 1)
    ]
    nodes[-1] |= changes
    return ["welcome to the cluster", *map(json.dumps, nodes)]


@pytest.mark.parametrize(
    ("num_gpus", "processes_per_node", "total"),
    [((4, 4), "allocated", "8"), ((0, 0), "allocated", "2"), ((4, 4), "2", "4"), ((0, 0), "3", "6")],
)
def test_as_many_ranks_as_were_really_given(
    in_a_job: Path, capsys: pytest.CaptureFixture[str], num_gpus: tuple[int, int], processes_per_node: str, total: str
) -> None:
    assert batch_step.compare(processes_per_node, ["recipe.yaml"], told(*num_gpus)) == 0
    out, err = capsys.readouterr()
    assert out == f"{total} 14711\n" and err.count("\n") == 2


def test_a_port_that_somebody_holds_is_passed_over(
    in_a_job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 14711)):
        assert batch_step.compare("allocated", ["recipe.yaml"], told(4, 4)) == 0
        assert capsys.readouterr().out == "8 14712\n"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert batch_step.compare("allocated", ["recipe.yaml"], told(4, 4)) == 0
    assert capsys.readouterr().out == f"8 {10000 + (4711 + 2 * 7919) % 20000}\n"


@pytest.mark.parametrize(
    ("lines", "processes_per_node", "sentence"),
    [
        (told(4, 3), "allocated", "The nodes of the job differ: GPUs is 4 on n1 and 3 on n2; choose alike ones with"),
        (
            told(4, 4, driver="2"),
            "allocated",
            "The nodes of the job differ: driver is 1 on n1 and 2 on n2; choose alike",
        ),
        (told(2, 2), "3", "--processes-per-node 3 is more than the 2 GPUs of n1; lower it, or leave it out."),
        (told(4), "allocated", "1 of the job's 2 nodes have told what they are; look at what the others printed."),
    ],
)
def test_nodes_that_cannot_train_together_are_refused(
    in_a_job: Path, capsys: pytest.CaptureFixture[str], lines: list[str], processes_per_node: str, sentence: str
) -> None:
    assert batch_step.compare(processes_per_node, ["recipe.yaml"], lines) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"Refused: {sentence}" in err
    status = runs.read_status(in_a_job / "runs" / "recipe")
    assert status["state"] == "refused" and sentence in status["reason"]


def test_a_node_tells_what_it_is(
    in_a_job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert batch_step.facts() == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["node"], found["GPUs"], found["python"]) == ("n1", 4, platform.python_version())
    assert found["torch"] == torch.__version__


@pytest.mark.slow
def test_without_an_address_nothing_starts(cluster: Path, checkout: Path) -> None:
    """Ranks that wait for each other on localhost would never meet."""
    (cluster / "node").write_text("slurm_load_node error: Unable to contact slurm controller\n")
    done = run_job(cluster, checkout, job_text(python=str(cluster / "python")))
    assert done.returncode == 1
    assert "Slurm gives no address of the first node, 'n1'." in done.stderr
    assert "it ended before the run began" in done.stdout


@pytest.mark.slow
def test_a_preempted_run_is_requeued_once_and_its_next_start_says_why(cluster: Path, checkout: Path) -> None:
    recipe = checkout / "recipe.yaml"
    recipe.write_text((ROOT / "configs/recipes/tiny.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    directory = checkout / "runs" / "recipe"
    (directory / "checkpoints" / "step-000042").mkdir(parents=True)
    ends_with(cluster, directory, "preempted", "asked to stop; step 42 is saved")
    text = job_text(python=str(cluster / "python"), arguments=("recipe.yaml",))
    done = run_job(cluster, checkout, text)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "── job 4711 is requeued: asked to stop; step 42 is saved"
    assert [argv for argv, _ in calls(cluster, "scontrol")].count(["requeue", "4711"]) == 1
    (record,) = batch_step.read_requeues(directory)
    assert (record["job"], record["restart"], record["step"], record["by"]) == ("4711", 1, 42, "the job")

    ends_with(cluster, directory, "finished", "every step is done")
    done = run_job(cluster, checkout, text, SLURM_RESTART_COUNT="1")
    why = "asked to stop; step 42 is saved; going on after step 42"
    assert done.stdout.splitlines()[0] == f"── job 4711 on n[1-2], restart 1: {why}"
    assert done.returncode == 0 and len(batch_step.read_requeues(directory)) == 1

    done = run_job(cluster, checkout, text)  # another job
    begins = "── job 4711 on n[1-2], going on after step 42, which an earlier job left: finished, every step is done"
    assert done.stdout.splitlines()[0] == begins

    done = run_job(cluster, checkout, text, SLURM_RESTART_COUNT="2")  # which Slurm did, without a word of ours
    assert "restart 2: Slurm requeued it, since it was preempted or a node failed; it had left:" in done.stdout
    assert batch_step.read_requeues(directory)[-1]["by"] == "Slurm"


@pytest.mark.parametrize(
    ("state", "code"), [("finished", 0), ("failed", 1), ("refused", 2), ("no progress", 1), (None, 1)]
)
def test_what_cannot_go_on_is_not_requeued(in_a_job: Path, cluster: Path, state: runs.State | None, code: int) -> None:
    """A status of an earlier start says nothing about this one."""
    directory = in_a_job / "runs" / "recipe"
    directory.mkdir(parents=True)
    runs.write_status(directory, state or "preempted", "because")
    started = runs.read_status(directory)["unix_seconds"] + (-1 if state else 1)
    assert batch_step.end(1, started, [str(ROOT / "configs/recipes/tiny.yaml"), "run.name=recipe"]) == code
    assert calls(cluster, "scontrol") == []


@pytest.mark.parametrize(("exit_code", "code"), [(0, 0), (1, 1)])
def test_a_start_that_finds_its_run_finished_ends_well(
    in_a_job: Path, cluster: Path, exit_code: int, code: int
) -> None:
    """Slurm may have requeued the job for a node that failed after the last word; nothing is written then."""
    directory = in_a_job / "runs" / "recipe"
    directory.mkdir(parents=True)
    runs.write_status(directory, "finished", "every step is done")
    started = runs.read_status(directory)["unix_seconds"] + 1
    assert batch_step.end(exit_code, started, [str(ROOT / "configs/recipes/tiny.yaml"), "run.name=recipe"]) == code
    assert calls(cluster, "scontrol") == []


def test_a_run_that_hung_is_requeued(in_a_job: Path, cluster: Path) -> None:
    directory = in_a_job / "runs" / "recipe"
    directory.mkdir(parents=True)
    runs.begin(directory, 0, "recipe")
    runs.leave_hung(directory, "no progress for 900 s")
    assert batch_step.end(1, 0, [str(ROOT / "configs/recipes/tiny.yaml"), "run.name=recipe"]) == 0
    (record,) = batch_step.read_requeues(directory)
    assert record["reason"] == "rank 0: no progress for 900 s"


def test_words_that_are_no_utf8_keep_no_job_from_starting(in_a_job: Path) -> None:
    directory = in_a_job / "runs" / "recipe"
    (directory / "checkpoints" / "step-000042").mkdir(parents=True)
    runs.write_status(directory, "failed", os.fsdecode(b"rows-\xff.jsonl cannot be read"))
    command = [sys.executable, "-m", "launch.batch_step", "start", "recipe.yaml"]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict", "SLURM_RESTART_COUNT": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("failed, rows-\\udcff.jsonl cannot be read; going on after step 42\n")
    assert len(batch_step.read_requeues(directory)) == 1


def test_a_task_of_an_array_requeues_itself_alone(
    in_a_job: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm gives the last task the number of the array, by which it requeues all of them."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    directory = in_a_job / "runs" / "recipe"
    directory.mkdir(parents=True)
    runs.write_status(directory, "preempted", "asked to stop")
    assert batch_step.end(1, 0, [str(ROOT / "configs/recipes/tiny.yaml"), "run.name=recipe"]) == 0
    assert [argv for argv, _ in calls(cluster, "scontrol")] == [["requeue", "4711_3"]]
    assert all("4711_3" in argv for argv, _ in calls(cluster, "squeue"))


def test_a_requeue_that_slurm_refuses_is_said(
    in_a_job: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster / "scontrol").write_text("#!/bin/sh\necho 'Requested operation is presently disabled' >&2; exit 1\n")
    directory = in_a_job / "runs" / "recipe"
    directory.mkdir(parents=True)
    runs.write_status(directory, "preempted", "asked to stop")
    assert batch_step.end(1, 0, [str(ROOT / "configs/recipes/tiny.yaml"), "run.name=recipe"]) == 1
    assert "and no requeue: scontrol says: Requested operation is presently disabled." in capsys.readouterr().out
    assert batch_step.read_requeues(directory) == []


def test_a_controller_that_does_not_answer_is_asked_again(in_a_job: Path, cluster: Path) -> None:
    busy = "echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1"
    (cluster / "scontrol").write_text(f'#!/bin/sh\nif mkdir "$0.asked" 2> /dev/null; then {busy}; fi\n')
    directory = in_a_job / "runs" / "recipe"
    directory.mkdir(parents=True)
    runs.write_status(directory, "preempted", "asked to stop")
    assert batch_step.end(1, 0, [str(ROOT / "configs/recipes/tiny.yaml"), "run.name=recipe"]) == 0
    assert len(batch_step.read_requeues(directory)) == 1


RUNNING = QueuedJob("RUNNING", "None", 0, is_preempted=False)
ASKED_TO_GO = QueuedJob("RUNNING", "None", 0, is_preempted=True)
REQUEUED = QueuedJob("COMPLETING", "None", 1, is_preempted=False)  # Slurm counts up at once
CANCELLED = QueuedJob("COMPLETING", "None", 0, is_preempted=False)
TIME_IS_UP = QueuedJob("COMPLETING", "TimeLimit", 0, is_preempted=False)


@pytest.mark.parametrize(
    ("state", "job", "requeues", "exit_code"),
    [
        ("finished", RUNNING, False, 0),
        ("finished", ASKED_TO_GO, False, 0),
        ("finished", TIME_IS_UP, False, 0),
        ("preempted", RUNNING, True, 0),  # the time limit is near, or somebody sent USR1
        ("preempted", ASKED_TO_GO, True, 0),
        ("preempted", None, True, 0),  # a controller that does not answer may hear the requeue
        ("preempted", REQUEUED, False, 0),
        ("preempted", CANCELLED, False, 1),
        ("preempted", TIME_IS_UP, True, 0),
        ("running", RUNNING, True, 0),  # killed, and nobody was left to say so
        ("running", TIME_IS_UP, True, 0),
        ("running", REQUEUED, False, 0),
        ("running", CANCELLED, False, 1),
        ("starting", RUNNING, True, 0),
        ("failed", RUNNING, False, 1),
        ("failed", ASKED_TO_GO, True, 0),  # a peer was gone first
        ("failed", CANCELLED, False, 1),
        ("failed", TIME_IS_UP, True, 0),  # as well
        ("refused", RUNNING, False, 2),
        ("refused", ASKED_TO_GO, False, 2),
        ("no progress", RUNNING, False, 1),
        ("no progress", ASKED_TO_GO, False, 1),
        (None, RUNNING, False, 1),
        (None, ASKED_TO_GO, True, 0),
        (None, CANCELLED, False, 1),
        (None, REQUEUED, False, 0),
    ],
)
def test_who_is_requeued(state: str | None, job: QueuedJob | None, requeues: bool, exit_code: int) -> None:
    decision = decide(Ending(state, "why", job, 0, max_requeues=200, seconds_left=math.inf, num_in_vain=0))
    assert (decision.requeues, decision.exit_code) == (requeues, exit_code)


def test_requeues_are_capped_and_end_when_nothing_newer_is_saved() -> None:
    ending = Ending("preempted", "asked to stop", RUNNING, 0, max_requeues=0, seconds_left=math.inf, num_in_vain=0)
    assert decide(ending) == Decision(False, "asked to stop; run.max_requeues = 0 is reached; submit it again", 1)
    in_vain = Ending("preempted", "asked to stop", RUNNING, 0, max_requeues=200, seconds_left=math.inf, num_in_vain=3)
    assert not decide(in_vain).requeues and "3 restarts in a row saved nothing newer" in decide(in_vain).reason
    assert decide(
        Ending("preempted", "asked", ASKED_TO_GO, 0, max_requeues=200, seconds_left=math.inf, num_in_vain=3)
    ).requeues


@pytest.mark.parametrize(
    ("state", "job", "seconds_left", "reason"),
    [
        ("preempted", ASKED_TO_GO, 9000.0, "preempted by Slurm; why"),
        ("running", ASKED_TO_GO, 9000.0, "preempted by Slurm; killed while running"),
        (None, ASKED_TO_GO, 9000.0, "preempted by Slurm; the run had not begun"),
        ("preempted", RUNNING, 95.0, "95 s before its time limit; why"),
        ("preempted", RUNNING, 9000.0, "why"),
        ("running", TIME_IS_UP, -2.0, "the time limit is reached; killed while running"),
    ],
)
def test_why_a_job_is_requeued(state: str | None, job: QueuedJob, seconds_left: float, reason: str) -> None:
    assert decide(Ending(state, "why", job, 0, 200, seconds_left, 0)).reason == reason


# ---- the examples ----


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_node", "many_nodes", "array"])
def test_the_examples_train_what_they_are_given(cluster: Path, checkout: Path, tmp_path: Path, name: str) -> None:
    """As sbatch runs them: with its arguments, in the directory that it was called in."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    for program in ("python", "accelerate"):
        (checkout / ".venv" / "bin" / program).symlink_to(cluster / "python")
    given = [f"{HOSTILE}.yaml", "run.name=example"] if name != "array" else ["other.yaml", f"{HOSTILE}.yaml"]
    directory = checkout / "runs" / "example"
    if name == "array":
        directory = tmp_path / "example"
        (checkout / given[1]).write_text(f"run: {{name: example, output_dir: {tmp_path}}}\n", encoding="utf-8")
    ends_with(cluster, directory, "finished", "every step is done")
    environment = os.environ | {"SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = subprocess.run(
        ["bash", ROOT / "launch" / f"{name}.sbatch", *given],
        cwd=checkout,
        env=environment | {"SLURM_ARRAY_TASK_ID": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (launched, _), *others = [call for call in calls(cluster, "accelerate") if "train.py" in call[0]]
    assert launched[launched.index("train.py") + 1 :] == (given if name != "array" else given[1:])
    assert launched[launched.index("--num_processes") + 1] == ("8" if name == "many_nodes" else "4")
    if name == "many_nodes":
        assert [argv[argv.index("--machine_rank") + 1] for argv, _ in others] == ["1"]
        assert launched[launched.index("--main_process_ip") + 1] == "10.0.0.1"


# ---- submit ----


def submit(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["submit", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_the_plan_chooses_the_layout_of_a_job(world: World, cluster: Path) -> None:
    recipe = world.recipe("planned", train={"max_tokens_per_micro_batch": 512})
    code, out, err = submit(recipe, "--gpu", "v100-32gb", "--gpus-per-node", "v100:4", "--mem", "100G")
    assert (code, err) == (0, "") and "  layout         configs/accelerate/zero2_no_offload.yaml" in out
    text = (world.run_directory("planned") / "job.sbatch").read_text(encoding="utf-8")
    assert "--config_file configs/accelerate/zero2_no_offload.yaml" in text
    # Two samples of 128 tokens are all that a rank has in a step.
    assert "train.max_tokens_per_micro_batch=256" in text
    for more, sentence in (
        (
            ("train.max_tokens_per_micro_batch=300",),
            "train.max_tokens_per_micro_batch=300 is given, and --gpu lets plan",
        ),
        (
            ("--config-file", "configs/accelerate/zero2.yaml"),
            "--gpu lets plan choose the layout, and --config-file names",
        ),
        (("--mem", "1G"), "--gpu v100-32gb: nothing that the recipe can be run with fits into 4 of them on 1 node(s)"),
    ):
        code, _, err = submit(recipe, "--gpu", "v100-32gb", "--gpus-per-node", "4", *more)
        assert code == 2 and sentence in err, err
    code, _, err = submit(recipe, "--gpu", "v100-32gb")
    assert code == 2 and "add --gpus-per-node N" in err


@pytest.mark.parametrize(
    ("options", "gpus", "nodes", "memory"),
    [
        ({}, None, 1, None),
        ({"gpus-per-node": 4, "nodes": 2, "mem": "380G"}, 4, 2, 380 * 1024**3),
        ({"gpus-per-node": "a100:8", "nodes": "2-4", "mem": 4000}, 8, 2, 4000 * 1024**2),
        ({"gres": "gpu:v100:4(S:0-1),tmp:1", "mem": 0}, 4, 1, None),
        ({"gres": "gpu", "mem": "1T"}, None, 1, 1024**4),
    ],
)
def test_what_a_node_gives(options: dict[str, str | int], gpus: int | None, nodes: int, memory: int | None) -> None:
    found = num_gpus_of(options), num_nodes_of(options), memory_bytes_of(options)
    assert found == (gpus, nodes, memory)


def test_what_the_disk_has_no_room_for_is_not_submitted(world: World, cluster: Path) -> None:
    code, _, err = submit(world.recipe("too-much"), "train.save_total_limit=1000000000000")
    assert code == 2 and "has room for" in err and "lower train.save_total_limit" in err
    assert calls(cluster, "sbatch") == [] and not world.run_directory("too-much").exists()


def test_a_job_that_cannot_be_put_on_record_is_named(world: World, cluster: Path) -> None:
    (world.run_directory("unknown") / "submitted.json").mkdir(parents=True)
    code, _, err = submit(world.recipe("unknown"))
    assert code == 2 and err.startswith("Refused: Job 4711 is in the queue, but ") and "scancel 4711" in err


def test_submit_writes_the_job_and_says_how_to_follow_it(
    world: World, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SBATCH_TIMELIMIT", "SBATCH_OPEN_MODE", "SBATCH_ARRAY_INX", "SLURM_JOB_NUM_NODES"):
        monkeypatch.setenv(name, "5")  # of the user's environment, which would go before the text
    for name, value in (("SBATCH_ACCOUNT", "mine"), ("SLURM_CONF", "/etc/slurm/slurm.conf")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)  # which make sets
    directory = world.run_directory("queued")
    code, out, err = submit(world.recipe("queued"), "--nodes", "2", "--time", "1:30:00", "slurm.gres=gpu:4")
    assert (code, err) == (0, "")
    ((argv, variables),) = calls(cluster, "sbatch")
    assert argv == ["--parsable", str(directory / "job.sbatch")]
    assert variables == {"SBATCH_ACCOUNT": "mine", "SLURM_CONF": "/etc/slurm/slurm.conf"}
    text = (directory / "job.sbatch").read_text(encoding="utf-8")
    for line in ("#SBATCH --nodes=2", "#SBATCH --time=1:30:00", "#SBATCH --gres=gpu:4", "#SBATCH --job-name=queued"):
        assert line in text.splitlines()
    assert (directory / "logs").is_dir(), "Slurm makes no directory for a log"
    assert runs.read_status(directory) == {} and not (directory / ".lock").exists()
    for line in (f"tail -F {directory}/logs/job.log", f"python -m launch status {directory}", "scancel 4711"):
        assert line in out

    for reason in ("Priority", "ReqNodeNotAvail, UnavailableNodes:n[1-2]"):
        (cluster / "queue").write_text(f"PENDING 0 N/A 1:00:00 {reason}   ")
        code, _, err = submit(world.recipe("queued"))
        assert code == 2 and err.startswith(f"Refused: {directory} has job 4711 in the queue (PENDING, {reason})")
    (cluster / "queue").write_text("TIMEOUT 0 N/A 0:00 TimeLimit")
    assert submit(world.recipe("queued"))[0] == 0
    assert len(calls(cluster, "sbatch")) == 2


def test_a_job_that_slurm_has_forgotten_and_one_of_another_cluster(world: World, cluster: Path) -> None:
    (cluster / "elsewhere").touch()
    recipe = world.recipe("forgotten")
    assert submit(recipe)[0] == 0
    (cluster / "queue").write_text("CLUSTER: elsewhere\nRUNNING 0 N/A 1-02:03:04 None")
    assert submit(recipe)[0] == 2
    assert all(argv[:2] == ["-M", "elsewhere"] for argv, _ in calls(cluster, "squeue"))
    (cluster / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n")
    assert submit(recipe)[0] == 0
    (cluster / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    code, _, err = submit(recipe)
    assert (code, err) == (2, "Refused: squeue says: Unable to contact slurm controller.\n")


@pytest.mark.parametrize(
    ("said", "seconds_left"),
    [("9:30", 570.0), ("1-02:03:04", 93784.0), ("0:00", 0.0), ("UNLIMITED", math.inf), ("INVALID", 0.0)],
)
def test_what_is_left_of_a_time_limit(cluster: Path, said: str, seconds_left: float) -> None:
    (cluster / "queue").write_text(f"RUNNING 0 N/A {said} None")
    assert queued_job("4711") == QueuedJob("RUNNING", "None", 0, False, seconds_left)


def test_a_time_limit_that_a_stop_fills_is_refused(world: World, cluster: Path) -> None:
    recipe, directory = world.recipe("short"), world.run_directory("short")
    directory.mkdir(parents=True)
    runs.append_metrics(directory, {"kind": "train", "step": 1, "longest_step_seconds": 20.0})
    code, _, err = submit(recipe, "--time", "1:00")
    assert (code, err.partition(" (")[0]) == (
        2,
        "Refused: slurm.time = 1:00 leaves no time to train, for a stop needs 70 s of it",
    )
    assert submit(recipe, "--time", "2:00")[0] == 0


def test_a_run_that_is_running_is_not_submitted(world: World, cluster: Path) -> None:
    recipe = world.recipe("busy")
    with runs.open_run(world.run_directory("busy")):
        code, _, err = submit(recipe)
    assert code == 2 and "Another process is running in" in err
    assert calls(cluster, "sbatch") == []


def test_a_finished_run_is_not_submitted(world: World, cluster: Path) -> None:
    recipe, directory = world.recipe("done"), world.run_directory("done")
    directory.mkdir(parents=True)
    runs.write_text(directory / "recipe.yaml", dump_recipe(load_recipe(recipe)))
    runs.write_status(directory, "finished", "every step is done")
    code, out, _ = submit(recipe, "--nodes", "2")
    assert (code, out) == (0, f"{directory} is finished; nothing is submitted.\n")
    assert calls(cluster, "sbatch") == []


def test_a_dry_run_prints_the_job_and_writes_nothing(world: World, cluster: Path) -> None:
    code, out, _ = submit(world.recipe("dry"), "--dry-run", "--partition", "a b")
    assert code == 0 and out.startswith("#!/bin/bash\n") and '#SBATCH --partition="a b"\n' in out
    assert not world.run_directory("dry").exists()
    assert calls(cluster, "sbatch") == []


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.train=nowhere.jsonl", "There is no data file nowhere.jsonl"),
        ("adapter.target_modules=[nonsense]", "no module of the model is named 'nonsense'"),
        ("slurm.nodez=2", "nodez is not an option of sbatch; did you mean nodes?"),
        ("data.max_length=8", "None of the first 50 rows of rows.jsonl can be trained on; rows.jsonl:1 is too long: "),
    ],
)
def test_what_would_stop_the_job_is_refused_before_it_waits(
    world: World, cluster: Path, override: str, sentence: str
) -> None:
    code, _, err = submit(world.recipe("bad"), override)
    assert code == 2 and err.startswith("Refused: ") and err.count("\n") == 1 and sentence in err
    assert calls(cluster, "sbatch") == []
