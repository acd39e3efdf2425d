"""What Linux tells of the threads of this process: how long they stood ready while others had the cores, who is now."""

from __future__ import annotations

import os
from collections.abc import Mapping

_TASKS = "/proc/self/task"


def waits() -> dict[str, int]:
    """Nanoseconds that each thread has waited for a core so far; empty where the system does not tell."""
    found = {}
    try:
        for thread in os.listdir(_TASKS):
            # On a processor, waiting for one, number of times it ran: Documentation/scheduler/sched-stats.rst.
            with open(f"{_TASKS}/{thread}/schedstat", "rb", buffering=0) as file:
                found[thread] = int(file.read().split()[1])
    except (OSError, IndexError, ValueError):  # another system, a kernel without it, a thread that ended
        return {}
    return found


def at_work() -> int:
    """How many threads run or are ready to, the caller among them; 0 where the system does not tell."""
    found = 0
    try:
        for thread in os.listdir(_TASKS):
            with open(f"{_TASKS}/{thread}/stat", "rb", buffering=0) as file:
                found += file.read().rpartition(b")")[2].split()[0] == b"R"
    except (OSError, IndexError):
        return 0
    return found


def longest_wait(before: Mapping[str, int], after: Mapping[str, int]) -> float:
    """Seconds that the most delayed thread waited between two looks."""
    return max((waited - before.get(thread, 0) for thread, waited in after.items()), default=0) * 1e-9
