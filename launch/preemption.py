"""A signal becomes a flag, and a rank never outlives the launcher that started it."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# SIGHUP is the end of a terminal; under nohup it is ignored, and stays so.
_HANGUP = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, *_HANGUP)
# Ctrl-C reaches a rank from the terminal and once more from the launcher; a second Ctrl-C is somebody's wish.
_ONE_INTERRUPT_SECONDS = 1.0
_received: list[tuple[int, float]] = []  # (signal, monotonic seconds)
_parent = os.getppid()


def end_when_asked(leave_word: Callable[[], None]) -> None:
    """Until `remember_signals`, the signals that ask to stop end this process at once, after `leave_word`.

    So does one that is remembered and was not acted on.
    """

    def end(number: int) -> None:
        _end_after(leave_word, number)

    _listen(end, _ignore)
    if _received:
        end(_received[0][0])
    os.register_at_fork(after_in_child=forget_signals)  # a worker's signals are its own


def remember_signals(leave_word: Callable[[], None]) -> None:
    """The signals that ask to stop are remembered; the ranks agree on the stop in the step's own reduction.

    After a SIGINT a second signal ends this process at once, after `leave_word`: of two Ctrl-C in a terminal torch's
    launcher passes the second one on as SIGTERM.
    """
    _received.clear()

    def remember(number: int) -> None:
        if _received and _received[0][0] == signal.SIGINT and seconds_since_request() > _ONE_INTERRUPT_SECONDS:
            _end_after(leave_word, number)
        _received.append((number, time.monotonic()))

    _listen(remember, _note)


def forget_signals() -> None:
    """The signals end the process at once again."""
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def stop_requested() -> bool:
    """Whether this rank was asked to stop."""
    return bool(_received)


def seconds_since_request() -> float:
    """Since this rank was first asked to stop; 0 when it was not."""
    return time.monotonic() - _received[0][1] if _received else 0.0


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies: a killed launcher leaves live ranks otherwise."""
    global _parent
    _parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    end_if_orphaned()  # it may have died between the two calls


def end_if_orphaned() -> None:
    """End this process when its parent is gone; the kernel forgets the wish of `end_with_parent` in some sandboxes."""
    if os.getppid() != _parent:
        os._exit(1)


def _listen(act: Callable[[int], None], in_main_thread: Callable[[int, FrameType | None], None]) -> None:
    """From now on a thread calls `act` with the number of each signal that comes, and the main one `in_main_thread`.

    The main thread may be in a long call into C, where Python's own handlers do not run.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def wait() -> None:
        while heard := os.read(read_end, 1):  # nothing: another listener has taken over
            act(heard[0])
        os.close(read_end)

    threading.Thread(target=wait, daemon=True).start()
    previous = signal.set_wakeup_fd(write_end)
    for number in _SIGNALS:
        signal.signal(number, in_main_thread)
    if previous != -1:
        os.close(previous)


def _end_after(leave_word: Callable[[], None], number: int) -> None:
    try:
        leave_word()
    finally:  # whatever the disk says to that
        os._exit(128 + number)


def _note(number: int, frame: FrameType | None) -> None:
    """What this thread does next already knows of it; the listener may hear of it first, or a little later."""
    if not _received:
        _received.append((number, time.monotonic()))


def _ignore(number: int, frame: FrameType | None) -> None:
    """The thread that `_listen` started hears of it."""
