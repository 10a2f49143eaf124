"""What the ranks tell each other before there is a process group, which a rank on a wrong machine does not survive.

DeepSpeed binds the process group to the rank's GPU, so that NCCL starts, with kernels and buffers, where it is made;
and a rank without a GPU would make one of another backend, and wait. So they meet earlier, in the same store.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import Store
from torch.distributed import DistError
from torch.distributed.rendezvous import rendezvous

from launch.config import NOT_LAUNCHED
from launch.errors import LaunchError, PreflightError

_HEARING_SECONDS = 10.0


@dataclass(frozen=True)
class Meeting:
    """The store in which all ranks meet; rank zero may be its server, so it is kept as long as anybody needs it."""

    store: Store
    rank: int
    num_ranks: int


def meet(timeout_seconds: float) -> Meeting:
    """Where the launcher says that the ranks meet. Raises PreflightError when it was not accelerate with DeepSpeed.

    The process group will meet there, too, and finds this store still open.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        raise PreflightError(NOT_LAUNCHED)
    store, rank, num_ranks = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    return Meeting(store, rank, num_ranks)


def gather_texts(meeting: Meeting, what: str, text: str) -> list[str]:
    """The texts of all ranks by rank, on rank zero; the others give theirs and get none. `what` once in a meeting."""
    meeting.store.set(f"cairn/{what}/{meeting.rank}", text)
    if meeting.rank > 0:
        return []
    return [meeting.store.get(f"cairn/{what}/{rank}").decode() for rank in range(meeting.num_ranks)]


def agree(meeting: Meeting, what: str, decide: Callable[[], None]) -> None:
    """Rank zero decides, and the others wait for that: the LaunchError that it raises is everyone's."""
    store, key = meeting.store, f"cairn/{what}"
    if meeting.rank > 0:
        store.wait([key], timedelta(days=1))
        refusal = store.get(key).decode()
        store.set(f"{key}/{meeting.rank}", "heard")
        if refusal:
            raise PreflightError(refusal)
        return
    try:
        decide()
    except Exception as error:  # what is no refusal is a fault of ours, and nobody waits for it, either
        store.set(key, str(error) if isinstance(error, LaunchError) else f"{type(error).__name__}: {error}")
        with suppress(DistError):  # the store may end with this process: the others are to have heard by then
            store.wait([f"{key}/{rank}" for rank in range(1, meeting.num_ranks)], timedelta(seconds=_HEARING_SECONDS))
        raise
    store.set(key, "")
