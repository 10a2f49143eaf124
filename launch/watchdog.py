"""A rank that gets nowhere ends itself: a job that hangs costs its whole time limit, one that ends is started again."""

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path


class Watchdog:
    """Ends this process when `hear` has not been called for `seconds`, with the stacks of its threads in a file.

    A peer that is gone or stopped leaves a rank in a collective, whose own time-out is long and tells nothing.
    """

    def __init__(self, seconds: float, stacks: Path, leave_word: Callable[[str], None]) -> None:
        self._seconds = seconds
        self._stacks = stacks
        self._leave_word = leave_word
        self._heard = time.monotonic()
        self._is_over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def hear(self) -> None:
        """Something was done."""
        self._heard = time.monotonic()

    def close(self) -> None:
        """Watch no more."""
        self._is_over.set()

    def _watch(self) -> None:
        tick_seconds = min(self._seconds / 10, 10)
        before = time.monotonic()
        while not self._is_over.wait(tick_seconds):
            now = time.monotonic()
            if now - before > 2 * tick_seconds + 1:  # the whole process stood still: a suspended job is no hang
                self._heard = now
            before = now
            if now - self._heard >= self._seconds:
                self._end(now - self._heard)

    def _end(self, silent_seconds: float) -> None:
        try:
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            self._leave_word(f"no progress for {silent_seconds:,.0f} s; the stacks are in {self._stacks}")
        finally:  # whatever the disk says to that
            os._exit(1)
