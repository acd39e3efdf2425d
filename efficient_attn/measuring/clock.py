"""Clocks and memory counters: interleaved medians, peak resident memory, and the ceilings of this machine."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]

# A sample shorter than this repeats its call inside, so that the clock's resolution and the loop do not show.
SHORTEST_SAMPLE_S = 1e-3
# Above this interquartile range (relative to the median) a time is called noisy, because the machine was busy.
NOISY = 0.25
KEPT = 48
_CLEAR_REFS = Path("/proc/self/clear_refs")


def interleaved(
    calls: Mapping[str, Call],
    budget_s: float,
    min_rounds: int = 3,
    max_rounds: int = 200,
    patience_s: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Times the calls in alternation, so that a drift of the machine meets all of them alike.

    Each call first runs once, unmeasured. Rounds go on until `budget_s` is spent, at least `min_rounds`; with a
    longer `patience_s`, also while a call's spread is above `NOISY`. A call that is so slow that `min_rounds` of
    it alone exceed both is represented by its first run only.

    Returns per call: `ms` (median), `spread` (interquartile range over median), `samples` (their number), and
    `times`, the samples themselves in ms, round by round: beyond `KEPT` every second, third... round.
    """
    patience_s = max(budget_s, patience_s or 0)
    samples: dict[str, list[float]] = {}
    inner: dict[str, int] = {}
    for name, call in calls.items():
        first = _timed(call, 1)
        if first * min_rounds > patience_s:
            samples[name] = [first]
        else:
            samples[name] = []
            again = _timed(call, 1) if first * min_rounds <= budget_s else first
            inner[name] = max(1, math.ceil(SHORTEST_SAMPLE_S / max(again, 1e-7)))
    started = time.perf_counter()
    for done in range(max_rounds if inner else 0):
        spent = time.perf_counter() - started
        if done >= min_rounds and spent > budget_s and (spent > patience_s or _steady(samples[name] for name in inner)):
            break
        for name, count in inner.items():
            samples[name].append(_timed(calls[name], count))
    return {name: _summary(values) for name, values in samples.items()}


def _steady(samples: Iterable[list[float]]) -> bool:
    return all(_summary(values)["spread"] <= NOISY for values in samples)


def _timed(call: Call, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def _summary(seconds: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median, median, median]
    return {
        "ms": _rounded(median * 1e3),
        "spread": _rounded((quartiles[2] - quartiles[0]) / median),
        "samples": len(seconds),
        "times": [_rounded(value * 1e3) for value in seconds[:: math.ceil(len(seconds) / KEPT)]],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def noise() -> float:
    """How unsteady this machine is now: the interquartile range, over the median, of a fixed piece of work (0.2 s)."""
    samples = []
    started = time.perf_counter()
    while time.perf_counter() - started < 0.2:
        samples.append(_timed(lambda: sum(range(20_000)), 1))
    return float(_summary(samples)["spread"])


class PeakMemory:
    """Peak resident memory of this process in a `with` block, above what was resident when it began.

    >>> with PeakMemory() as peak:
    ...     work()
    >>> peak.bytes
    """

    bytes: int = 0

    def __enter__(self) -> PeakMemory:
        _give_back()
        if _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text("5")  # sets the high-water mark to what is resident now
        self._before = _high_water_mark()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = _high_water_mark() - self._before


def _give_back() -> None:
    """Hands what glibc's allocator holds free back to the system, else the block may use it unseen."""
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _high_water_mark() -> int:
    if _CLEAR_REFS.exists():
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    # Elsewhere the mark cannot be set back: right for the first block of a fresh process, which is how suites use it.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Ceiling:
    """What this machine can do at the current thread count, as a call to be timed beside the others."""

    name: str
    call: Call
    work: float  # of one call: floating-point operations, or bytes

    def giga_per_second(self, ms: float) -> float:
        return _rounded(self.work / ms / 1e6)


def fma_ceiling() -> Ceiling:
    """Fused multiply-adds without memory (csrc/cpu/peak.h); without the native module a float32 matrix product."""
    try:
        _cpu = importlib.import_module("efficient_attn._cpu")
    except ModuleNotFoundError:
        a, b, c = torch.randn(1536, 1536), torch.randn(1536, 1536), torch.empty(1536, 1536)
        return Ceiling("sgemm", lambda: torch.mm(a, b, out=c), 2 * 1536**3)
    threads, steps = torch.get_num_threads(), 2**20
    return Ceiling("fma", lambda: _cpu.fma_loop(threads, steps), _cpu.fma_loop(threads, steps))


def copy_ceiling() -> Ceiling:
    """A copy far larger than any cache; bytes read plus bytes written."""
    source = torch.ones(256 * 2**20, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Ceiling("copy", lambda: target.copy_(source), 2 * source.numel())
