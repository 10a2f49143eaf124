"""The network is tried before anything rests on it."""

import functools
import json
import os
import platform
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import World, launch, run_ranks, start_ranks

import train
from launch import collectives, runs
from launch.collectives import bus_bandwidths, joined_in_time, network_line, try_network
from launch.errors import PreflightError

CPU = torch.device("cpu")


def in_a_process_group(reach_seconds: float, directory: Path) -> tuple[dict[str, float], float, list[str]]:
    """(bandwidths, seconds, what was said)."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    said: list[str] = []
    start = time.monotonic()
    found = try_network(CPU, directory / "stacks.txt", said.append, reach_seconds=reach_seconds)
    return found, time.monotonic() - start, said


def test_bandwidths_are_those_of_the_slowest_rank(tmp_path: Path) -> None:
    results = run_ranks(4, in_a_process_group, 60.0, tmp_path)
    found, _, said = results[0]
    assert all(other == found for other, _, _ in results) and not said
    assert list(found) == ["all-reduce", "reduce-scatter", "all-gather"]
    assert all(1e6 < value < 1e12 for value in found.values())
    assert network_line({"all-reduce": 12.34e9}) == "all-reduce 12.3 GB/s (bus bandwidth as nccl-tests has it)"
    assert run_ranks(1, in_a_process_group, 60.0, tmp_path)[0][0] == {}, "a rank alone has no network"


def test_bus_bandwidth_counts_what_a_link_carries() -> None:
    """doc/PERFORMANCE.md of nccl-tests: with 4 ranks all-reduce 6/4 of the bytes, the others 3/4."""
    found = bus_bandwidths([0.03, 0.02, 0.01], 2_000_000, num_ranks=4)
    assert found == pytest.approx({"all-reduce": 1e8, "reduce-scatter": 7.5e7, "all-gather": 1.5e8})


def wrong_on_one_rank(name: str, directory: Path) -> str:
    """The sentence, when the last rank's card or cable gives other numbers."""
    real = getattr(dist, name)

    def broken(output: torch.Tensor, *given: Any, **named: Any) -> None:
        real(output, *given, **named)
        if output.numel() > 100 and dist.get_rank() == 1:
            output[7] += 1

    setattr(dist, name, broken)
    with pytest.raises(PreflightError) as refusal:
        in_a_process_group(60.0, directory)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("all_reduce", "The all-reduce of 2 ranks gave wrong numbers"),
        pytest.param("reduce_scatter_tensor", "The reduce-scatter of 2", marks=pytest.mark.slow),
        pytest.param("all_gather_into_tensor", "The all-gather of 2 ranks", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_number_is_refused_by_all_ranks(tmp_path: Path, name: str, said: str) -> None:
    sentences = run_ranks(2, wrong_on_one_rank, name, tmp_path)
    assert sentences[0] == sentences[1] and sentences[0].startswith(said)


def stopped(silent_rank: int, arguments: list[str]) -> int:
    """train.py's main; one rank stops in the first collective, as on a node that hangs."""
    collectives._ANSWER_SECONDS = 3.0
    real = collectives._seconds

    def seconds(*given: Any) -> Any:
        if dist.get_rank() == silent_rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(*given)

    collectives._seconds = seconds
    train.try_network = functools.partial(try_network, reach_seconds=2.0)
    return train.main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("silent_rank", [0, 1])
def test_a_rank_that_does_not_answer_is_named_and_all_others_end(
    world: World, silent_rank: int, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = world.recipe(f"silent-{silent_rank}")
    start = time.monotonic()
    children = start_ranks(3, stopped, silent_rank, [str(recipe)])
    for rank, (child, _) in enumerate(children):
        if rank != silent_rank:
            child.join(60)
            assert child.exitcode == 1
    assert time.monotonic() - start < 60
    children[silent_rank][0].kill()
    status = runs.read_status(world.run_directory(recipe.stem))
    assert (status["state"], status["may_go_on"]) == ("failed", True)
    where = "127.0.0.1" if silent_rank == 0 else platform.node()  # rank zero's own store says nothing
    expected = f"In the first collective rank {silent_rank} on {where} did not answer within 2 s; name the network"
    assert expected in status["reason"]
    assert capfd.readouterr().err.count(expected) == 1
    launch(recipe, 2)


def apart(arguments: list[str]) -> int:
    """train.py's main; rank one stops on its way into the process group, as one whom NCCL does not connect."""
    train.joined_in_time = functools.partial(joined_in_time, reach_seconds=2.0)
    if os.environ["RANK"] == "1":
        train.engines.create_accelerator = lambda *given: os.kill(os.getpid(), signal.SIGSTOP)
    return train.main(arguments)


@pytest.mark.slow
def test_ranks_that_make_no_process_group_end(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = world.recipe("apart")
    start = time.monotonic()
    (first, _), (second, _) = start_ranks(2, apart, [str(recipe)])
    first.join(60)
    second.kill()
    assert first.exitcode == 1 and time.monotonic() - start < 60
    status = runs.read_status(world.run_directory("apart"))
    assert (status["state"], status["may_go_on"]) == ("failed", True)
    expected = "The ranks made no process group within 2 s, and all are there; name the network"
    assert expected in status["reason"] and capfd.readouterr().err.count(expected) == 1


@pytest.mark.slow
def test_a_run_says_and_keeps_its_bandwidth(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    launch(world.recipe("kept"), 2)
    directory = world.run_directory("kept")
    found = json.loads((directory / "environment.json").read_text(encoding="utf-8"))["network_bytes_per_second"]
    assert set(found) == {"all-reduce", "reduce-scatter", "all-gather"} and min(found.values()) > 0
    assert "\n  network" in capfd.readouterr().out
    (start,) = world.metrics("kept", "start")
    assert start["network_seconds"] < 2 and start["worst_case_seconds"] > 0
