"""What a job's batch script asks: python -m launch.batch_step start | facts | compare | end.

It imports no torch, for it runs while the ranks of the next start, or another's job, wait for the nodes.
"""

import contextlib
import importlib.metadata
import io
import json
import math
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import runs, slurm
from launch.config import intended_run_directory, parse_command_line
from launch.errors import ConfigError, PreflightError, SlurmError
from launch.modes import keep_private
from launch.recipe import Recipe

REQUEUES_FILE = "requeues.jsonl"  # of a run directory: every start but the first of its jobs, and why
LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft")
_GOING = ("RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING")  # states of a job that nobody has ended
_NEAR_SECONDS = 900.0  # to the time limit, when it may have to do with a stop
_ANSWERS = 5  # tries, of a controller that is busy with a failure
_SECONDS_BETWEEN = 6.0


# ---- before the ranks ----


def start(arguments: Sequence[str]) -> int:
    """Say which start this is, why there is another, and from which step it goes on."""
    directory = intended_run_directory(arguments)
    job, number, nodes = _job_id(), _num_restarts(), os.environ["SLURM_JOB_NODELIST"]
    step = runs.newest_step(directory)
    if number == 0:
        goes_on = f", going on after step {step}, which an earlier job left: {_last_word(directory)}" if step else ""
        print(f"── job {job} on {nodes}{goes_on}", flush=True)
        return 0
    known = [record for record in read_requeues(directory) if (record["job"], record["restart"]) == (job, number)]
    if not known:  # Slurm has done that by itself, and has left this script no time
        why = f"Slurm requeued it, since it was preempted or a node failed; it had left: {_last_word(directory)}"
        known = [_record(directory, number, why, "Slurm", is_preempted=True)]
        _append(directory, known[0])
    goes_on = f"going on after step {step}" if step else "nothing is saved yet, so from the beginning"
    print(f"── job {job} on {nodes}, restart {number}: {known[-1]['reason']}; {goes_on}", flush=True)
    return 0


def facts() -> int:
    """One line of JSON: what this node is, and what is installed on it."""
    asked = _ask_driver()
    allocated = os.environ.get("SLURM_GPUS_ON_NODE")
    found = {
        "node": os.environ.get("SLURMD_NODENAME", platform.node()),
        "host": platform.node(),
        "GPUs": len(asked) if allocated is None else int(allocated),
        "GPU": " and ".join(sorted({name for name, _ in asked})) or "none",
        "driver": " and ".join(sorted({driver for _, driver in asked})) or "none",
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
    }
    print(json.dumps(found), flush=True)
    return 0


def compare(processes_per_node: str, arguments: Sequence[str], lines: Sequence[str]) -> int:
    """Print the number of ranks for these nodes and their port, after a line about each on standard error.

    Nodes that are not alike are refused, which the run's status says.
    """
    nodes = sorted((node for line in lines if (node := _node_of(line))), key=lambda node: str(node["node"]))
    for node in nodes:
        named = ", ".join(f"{name} {value}" for name, value in node.items() if name not in ("node", "host"))
        print(f"node {node['node']} ({node['host']}): {named}", file=sys.stderr, flush=True)
    fault = _difference(nodes, int(os.environ["SLURM_JOB_NUM_NODES"]), processes_per_node)
    if fault:
        print(f"Refused: {fault}", file=sys.stderr, flush=True)
        runs.write_end(intended_run_directory(arguments), "refused", fault)
        return 2
    per_node = (nodes[0]["GPUs"] or 1) if processes_per_node == "allocated" else int(processes_per_node)
    print(len(nodes) * per_node, _free_port(), flush=True)
    return 0


def _free_port() -> int:
    """Of this node, the job's first, where rank zero will be.

    Another one for each start: what is left of the last one, on a node that Slurm lost, may still hold its own. Another
    user's process may hold any; the next one that can be bound is taken.
    """
    wanted = (int(os.environ["SLURM_JOB_ID"]) + 7919 * _num_restarts()) % 20000
    both = socket.has_dualstack_ipv6()  # torch's store listens to both
    family = socket.AF_INET6 if both else socket.AF_INET
    for number in range(100):
        port = 10000 + (wanted + number) % 20000
        with contextlib.suppress(OSError), socket.create_server(("", port), family=family, dualstack_ipv6=both):
            return port
    return 10000 + wanted  # torch says what is wrong with it


def _difference(nodes: Sequence[Mapping[str, Any]], num_nodes: int, processes_per_node: str) -> str:
    """One sentence when these nodes cannot train together, or not with so many processes; empty when they can."""
    if len(nodes) != num_nodes:
        return f"{len(nodes)} of the job's {num_nodes} nodes have told what they are; look at what the others printed."
    first = nodes[0]
    for node in nodes[1:]:
        for name in first.keys() - {"node", "host"}:
            if node[name] != first[name]:
                return (
                    f"The nodes of the job differ: {name} is {first[name]} on {first['node']} and {node[name]} on "
                    f"{node['node']}; choose alike ones with slurm.constraint or slurm.nodelist, or leave one out with "
                    "slurm.exclude."
                )
    if processes_per_node != "allocated" and 0 < first["GPUs"] < int(processes_per_node):
        return (
            f"--processes-per-node {processes_per_node} is more than the {first['GPUs']} GPUs of {first['node']}; "
            "lower it, or leave it out."
        )
    return ""


# ---- after the ranks ----


@dataclass(frozen=True)
class Ending:
    """What is known of a start whose ranks have ended."""

    state: str | None  # of status.json; None: this start wrote none
    reason: str
    job: slurm.QueuedJob | None  # None: Slurm does not answer, or does not know it any more
    num_restarts: int  # of this start; Slurm counts up as soon as a job is requeued
    max_requeues: int
    seconds_left: float  # of the time limit
    num_in_vain: int  # restarts in a row that saved nothing newer; those that were preempted are no fault of the job
    may_go_on: bool = False  # it failed for what another start may not meet: a peer that hangs, or was killed


@dataclass(frozen=True)
class Decision:
    """Whether the job starts again, why, and else what the batch script exits with."""

    requeues: bool
    reason: str
    exit_code: int


def decide(ending: Ending) -> Decision:
    """One requeue for what can go on; none for what is done, what would fail again, and what Slurm does itself."""
    state, job = ending.state, ending.job
    reason = ending.reason or "it ended without a word"
    if state == "finished":
        return Decision(False, reason, 0)
    if job is not None and job.num_restarts > ending.num_restarts:
        return Decision(False, "Slurm has requeued the job by itself", 0)
    is_over_time = job is not None and job.reason == "TimeLimit"
    if job is not None and job.state not in _GOING and not is_over_time:
        return Decision(False, f"the job was cancelled ({job.state}); the same command continues", 1)
    is_asked_to_go = job is not None and job.is_preempted
    has_failed = state == "failed" and not (is_asked_to_go or is_over_time or ending.may_go_on)
    if has_failed or state in ("refused", "no progress"):
        return Decision(False, f"{state}: {reason}", 2 if state == "refused" else 1)
    if state is None and not is_asked_to_go:
        return Decision(False, "it ended before the run began; what was printed above says why", 1)
    why = {"preempted": reason, "failed": reason, None: "the run had not begun"}.get(state, f"killed while {state}")
    if is_asked_to_go:
        why = f"preempted by Slurm; {why}"
    elif is_over_time:
        why = f"the time limit is reached; {why}"
    elif ending.seconds_left < _NEAR_SECONDS:
        why = f"{ending.seconds_left:,.0f} s before its time limit; {why}"
    if not is_asked_to_go and ending.num_in_vain >= runs.MAX_RESTARTS_IN_VAIN:
        vain = f"{ending.num_in_vain} restarts in a row saved nothing newer"
        return Decision(False, f"{why}; {vain}; give the job more slurm.time, and submit it again", 1)
    if ending.num_restarts >= ending.max_requeues:
        return Decision(False, f"{why}; run.max_requeues = {ending.max_requeues} is reached; submit it again", 1)
    return Decision(True, why, 0)


def end(exit_code: int, started_unix_seconds: float, arguments: Sequence[str]) -> int:
    """Requeue the job if the run can go on, and say how it ended; the exit code of the batch script."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the requeue itself brings one
    directory = intended_run_directory(arguments)
    status = runs.read_status(directory)
    # By the clock of this very node. A run that was finished before says so, and writes nothing.
    is_finished = exit_code == 0 and status.get("state") == "finished"
    is_of_this_start = is_finished or status.get("unix_seconds", 0) >= started_unix_seconds
    job, recipe = _ask_slurm(), _recipe(arguments)
    ending = Ending(
        status["state"] if is_of_this_start else None,
        status["reason"] if is_of_this_start else "",
        job,
        _num_restarts(),
        recipe.run.max_requeues if recipe else 0,
        job.seconds_left if job else math.inf,
        _num_in_vain(directory),
        may_go_on=is_of_this_start and bool(status.get("may_go_on")),
    )
    decision = decide(ending)
    if not decision.requeues:
        print(f"── job {_job_id()} ended: {decision.reason} (srun: exit code {exit_code})", flush=True)
        return decision.exit_code
    if fault := _requeue():
        print(f"── job {_job_id()} ended: {decision.reason}; and no requeue: {fault}", flush=True)
        return 1
    is_preempted = job is not None and job.is_preempted
    _append(directory, _record(directory, _num_restarts() + 1, decision.reason, "the job", is_preempted=is_preempted))
    print(f"── job {_job_id()} is requeued: {decision.reason}", flush=True)
    return 0


def _requeue() -> str:
    """Why the job could not be put back into the queue; empty when it is there, through whomever."""
    fault = ""
    for _ in range(_ANSWERS):
        try:
            slurm.requeue(_job_id())
            return ""
        except PreflightError as error:  # a node without Slurm's commands
            return str(error)
        except SlurmError as error:
            fault = str(error)
        again = _ask_slurm()  # which waits for a controller that does not answer
        if again is not None and again.num_restarts > _num_restarts():  # by Slurm at the same moment, or by a lost call
            return ""
    return fault


# ---- what they share ----


def read_requeues(directory: Path) -> list[dict[str, Any]]:
    """The lines of requeues.jsonl, oldest first; what a kill cut off is left out."""
    try:
        lines = (directory / REQUEUES_FILE).read_text(encoding="utf-8").split("\n")[:-1]
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict) and {"job", "restart", "reason"} <= record.keys()]


def _record(directory: Path, restart: int, reason: str, by: str, *, is_preempted: bool) -> dict[str, Any]:
    """`restart` is the number of the start that follows."""
    return {
        "job": _job_id(),
        "restart": restart,
        "reason": reason,
        "by": by,
        "is_preempted": is_preempted,
        "step": runs.newest_step(directory),
        "unix_seconds": time.time(),
    }


def _append(directory: Path, record: Mapping[str, Any]) -> None:
    """One line of requeues.jsonl; a disk that is full is no reason to end a run."""
    with contextlib.suppress(OSError), (directory / REQUEUES_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _num_in_vain(directory: Path) -> int:
    """The restarts of this job, the latest ones, that saved nothing newer, but for those that were preempted."""
    count, step = 0, runs.newest_step(directory)
    for record in reversed(read_requeues(directory)):
        if record["job"] != _job_id() or record.get("step") != step or record.get("is_preempted"):
            break
        count += 1
    return count


def _last_word(directory: Path) -> str:
    status = runs.read_status(directory)
    return f"{status['state']}, {status['reason']}" if {"state", "reason"} <= status.keys() else "no status"


def _job_id() -> str:
    """As Slurm's commands take it: the number of an array's last task alone is that of the whole array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _num_restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _recipe(arguments: Sequence[str]) -> Recipe | None:
    """None for one that does not load any more, for which a start is refused."""
    try:
        return parse_command_line(arguments)
    except ConfigError:
        return None


def _ask_slurm() -> slurm.QueuedJob | None:
    for _ in range(_ANSWERS):
        try:
            return slurm.queued_job(_job_id())
        except SlurmError as error:
            print(f"{error}", file=sys.stderr, flush=True)
            time.sleep(_SECONDS_BETWEEN)
        except PreflightError as error:  # a node without Slurm's commands
            print(f"{error}", file=sys.stderr, flush=True)
            break
    return None


def _ask_driver() -> list[tuple[str, str]]:
    """(name, driver) of the GPUs that this task sees."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:  # no driver: there is the program, and no GPU
        return []
    pairs = [line.rpartition(",") for line in done.stdout.splitlines()]
    return [(name.strip(), driver.strip()) for name, comma, driver in pairs if comma]


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _node_of(line: str) -> dict[str, Any] | None:
    """What `facts` printed; a cluster's prolog may print as well."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"node", "host", "GPUs"} <= found.keys() else None


def main(arguments: Sequence[str]) -> int:
    """`start ARGUMENT...`, `facts`, `compare PROCESSES ARGUMENT...`, `end CODE STARTED ARGUMENT...` of train.py."""
    for stream in (sys.stdout, sys.stderr):  # a reason may hold a file's name that is no UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    recipe = _recipe(arguments[{"compare": 2, "end": 3}.get(arguments[0], 1) :]) if arguments else None
    keep_private(group_readable=recipe is not None and recipe.run.group_readable)
    match arguments:
        case ["start", *rest]:
            return start(rest)
        case ["facts"]:
            return facts()
        case ["compare", processes_per_node, *rest]:
            return compare(processes_per_node, rest, sys.stdin.read().splitlines())
        case ["end", exit_code, started, *rest]:
            return end(int(exit_code), float(started), rest)
    print(f"Refused: {main.__doc__}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
