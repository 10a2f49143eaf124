"""The network between the ranks, tried before anything rests on it: whether it reaches all and adds right, how fast."""

import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from launch.errors import PreflightError
from launch.watchdog import Watchdog

# How long the process group, and then all of the trial, may take. On a 10 Gbit/s network the bytes of a GPU take a
# second.
REACH_SECONDS = 120.0
_GPU_BYTES, _CPU_BYTES = 64_000_000, 1_000_000
_ANSWER_SECONDS = 3.0  # for a rank to say that it waits, too
_ROUNDS = 2
_NAMES = ("all-reduce", "reduce-scatter", "all-gather")


@contextmanager
def joined_in_time(
    stacks: Path, leave_word: Callable[[str], None], *, rank: int, reach_seconds: float = REACH_SECONDS
) -> Iterator[None]:
    """Ends this process, after `leave_word`, when the ranks, which are all there, make no process group inside.

    On GPUs that is where NCCL connects, for DeepSpeed binds the group to the rank's own; gloo connects there, too.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sentence = f"The ranks made no process group within {reach_seconds:,.0f} s, and all are there; {_remedy(device)}."

    def leave(_: str) -> None:
        leave_word(sentence)
        if rank == 0:
            print(f"Failed: {sentence}", file=sys.stderr, flush=True)

    watchdog = Watchdog(reach_seconds, stacks, leave)
    try:
        yield
    finally:
        watchdog.close()


def try_network(
    device: torch.device, stacks: Path, leave_word: Callable[[str], None], *, reach_seconds: float = REACH_SECONDS
) -> dict[str, float]:
    """The `bus_bandwidths` of the collectives that ZeRO lives on; a collective, empty for one rank.

    When a rank is not reached in time, this process ends after `leave_word`, with its stacks in the file. Raises
    PreflightError on all ranks when a sum or a copy is wrong.
    """
    num_ranks = dist.get_world_size()
    if num_ranks == 1:
        return {}
    watchdog = Watchdog(reach_seconds, stacks, lambda _: leave_word(_silence(reach_seconds, device)))
    try:
        _get_default_store().set(f"cairn/host/{dist.get_rank()}", platform.node())
        seconds, is_wrong = _seconds(device, num_ranks)
        worst = torch.tensor([*seconds, *is_wrong], dtype=torch.float64, device=device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)  # the slowest rank counts, and what is wrong is wrong for all
        found = worst.tolist()
    finally:
        watchdog.close()
    for name, wrong in zip(_NAMES, found[len(_NAMES) :], strict=True):
        if wrong:
            raise PreflightError(
                f"The {name} of {num_ranks} ranks gave wrong numbers, so nothing that is trained on them could be "
                f"right; {_remedy(device)}, and try the nodes one by one with slurm.exclude."
            )
    return bus_bandwidths(found[: len(_NAMES)], _num_bytes(device), num_ranks)


def bus_bandwidths(seconds: Sequence[float], num_bytes: int, num_ranks: int) -> dict[str, float]:
    """Bytes a second, as nccl-tests has it (doc/PERFORMANCE.md): comparable for any number of ranks.

    Of n ranks all-reduce moves each byte 2(n-1)/n times over a rank's link, the others (n-1)/n times.
    """
    share = (num_ranks - 1) / num_ranks
    times = (2 * share, share, share)
    return {name: num_bytes * each / max(took, 1e-9) for name, each, took in zip(_NAMES, times, seconds, strict=True)}


def network_line(bandwidths: Mapping[str, float]) -> str:
    """For the banner."""
    named = ", ".join(f"{name} {value / 1e9:.3g} GB/s" for name, value in bandwidths.items())
    return f"{named} (bus bandwidth as nccl-tests has it)"


def _seconds(device: torch.device, num_ranks: int) -> tuple[list[float], list[bool]]:
    """(seconds of each collective at its best, whether it gave what it should not), on this rank."""
    rank = dist.get_rank()
    part = max(_num_bytes(device) // 4 // num_ranks, 1)
    pattern = torch.arange(part * num_ranks, device=device).remainder(1000).float()  # sums stay exact in fp32
    mine = slice(rank * part, (rank + 1) * part)
    given = pattern + rank + 1
    expected_sum = pattern * num_ranks + num_ranks * (num_ranks + 1) / 2
    whole, share = torch.empty_like(pattern), torch.empty(part, device=device)
    tries: list[tuple[Callable[[], Any], torch.Tensor, torch.Tensor]] = [
        (lambda: dist.all_reduce(whole), whole, expected_sum),
        (lambda: dist.reduce_scatter_tensor(share, given), share, expected_sum[mine]),
        (lambda: dist.all_gather_into_tensor(whole, pattern[mine].contiguous()), whole, pattern),
    ]
    seconds, is_wrong = [], []
    for collective, result, expected in tries:
        spent = []
        for _ in range(1 + _ROUNDS):
            whole.copy_(given)
            _finish(device)
            start = time.monotonic()
            collective()
            _finish(device)
            spent.append(time.monotonic() - start)
        seconds.append(min(spent[1:]))  # the first one sets up connections
        is_wrong.append(not torch.equal(result, expected))
    return seconds, is_wrong


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _num_bytes(device: torch.device) -> int:
    return _GPU_BYTES if device.type == "cuda" else _CPU_BYTES


def _silence(reach_seconds: float, device: torch.device) -> str:
    """One sentence about the ranks that do not say that they wait, too; the first that does prints it."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    found: list[list[str]] = []  # for each rank its host, or nothing when it waits

    def ask() -> None:
        shared: Any = _get_default_store()
        store = shared.clone()  # a connection of its own: the other may be waiting for a peer
        store.set(f"cairn/waits/{rank}", "")
        time.sleep(_ANSWER_SECONDS)
        hosts = []
        for other in range(num_ranks):
            is_known, waits = (store.check([f"cairn/{what}/{other}"]) for what in ("host", "waits"))
            host = store.get(f"cairn/host/{other}").decode() if is_known else "a host that is not known"
            hosts.append("" if waits else host)
        found.append(hosts)

    asking = threading.Thread(target=ask, daemon=True)  # the store is in rank zero, which may not answer, either
    asking.start()
    asking.join(2 * _ANSWER_SECONDS)
    if rank == 0:
        time.sleep(_ANSWER_SECONDS)  # the others may still be asking
    hosts = found[0] if found else [os.environ.get("MASTER_ADDR", "MASTER_ADDR"), *[""] * (num_ranks - 1)]
    silent = [f"rank {number} on {host}" for number, host in enumerate(hosts) if host]
    who = f"{', '.join(silent)} did not answer" if silent else "ranks did not reach each other"
    sentence = f"In the first collective {who} within {reach_seconds:,.0f} s; {_remedy(device)}."
    if rank == hosts.index(""):
        print(f"Failed: {sentence}", file=sys.stderr, flush=True)
    return sentence


def _remedy(device: torch.device) -> str:
    if device.type == "cuda":
        return (
            "see what NCCL_DEBUG=INFO prints, name the network that joins the nodes with NCCL_SOCKET_IFNAME, and let "
            "their firewalls pass all ports between them"
        )
    return "name the network that joins the nodes with GLOO_SOCKET_IFNAME, and let their firewalls pass all ports"
