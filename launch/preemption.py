"""A signal becomes a flag, and a rank never outlives the launcher that started it."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_received: list[int] = []


def end_when_asked(leave_word: Callable[[], None]) -> None:
    """Until `remember_signals`, SIGTERM, SIGUSR1 and SIGINT end this process at once, after `leave_word`.

    A thread waits for them: the main one may be in a long call into C, where Python's handlers do not run.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    for number in _SIGNALS:
        signal.signal(number, _ignore)
    signal.set_wakeup_fd(write_end)
    os.register_at_fork(after_in_child=forget_signals)  # a worker's signals are its own

    def wait() -> None:
        (number,) = os.read(read_end, 1)
        leave_word()
        os._exit(128 + number)

    threading.Thread(target=wait, daemon=True).start()


def remember_signals() -> None:
    """SIGTERM, SIGUSR1 and SIGINT are remembered; the ranks agree on the stop in the step's own reduction."""
    _received.clear()
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, _remember)


def forget_signals() -> None:
    """The signals end the process at once again."""
    signal.set_wakeup_fd(-1)
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


def _ignore(number: int, frame: FrameType | None) -> None:
    """The thread that `end_when_asked` started hears of it."""


def _remember(number: int, frame: FrameType | None) -> None:
    _received.append(number)
