"""A clock that stands still while its process is stopped: what a limit of seconds is judged by on a busy machine."""

from __future__ import annotations

import threading
import time

STEP, MOST = 0.05, 1.0  # seconds between two looks, and the most that counts of what lies between them


class Awake:
    """`seconds` since it was made, without those in which this process was stopped (SIGSTOP, a suspended machine)."""

    def __init__(self) -> None:
        self.seconds = 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(STEP)
            now = time.monotonic()
            self.seconds += min(now - before, MOST)
            before = now
