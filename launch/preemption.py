"""A signal becomes a flag, and a rank never outlives the launcher that started it."""

import ctypes
import os
import signal
from types import FrameType

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_received: list[int] = []


def remember_signals() -> None:
    """SIGTERM, SIGUSR1 and SIGINT are remembered; the ranks agree on the stop in the step's own reduction."""
    _received.clear()
    for number in _SIGNALS:
        signal.signal(number, _remember)


def forget_signals() -> None:
    """The signals end the process at once again."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def stop_requested() -> bool:
    """Whether this rank was asked to stop."""
    return bool(_received)


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies: a killed launcher leaves live ranks otherwise."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died between the two calls
        os._exit(1)


def _remember(number: int, frame: FrameType | None) -> None:
    _received.append(number)
