"""Clocks and memory counters: interleaved medians, peak resident memory, and the ceilings of this machine."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]

# A sample shorter than this repeats its call inside, so that the clock's resolution and the loop do not show.
SHORTEST_SAMPLE_S = 1e-3
_CLEAR_REFS = Path("/proc/self/clear_refs")


def interleaved(
    calls: Mapping[str, Call], budget_s: float, min_rounds: int = 3, max_rounds: int = 200
) -> dict[str, dict[str, Any]]:
    """Times the calls in alternation, so that a drift of the machine meets all of them alike.

    Each call first runs once, unmeasured. Rounds go on until ``budget_s`` is spent, at least ``min_rounds``; a call
    that is so slow that ``min_rounds`` of it alone exceed the budget is represented by its first run only.

    Returns per call: ``ms`` (median), ``spread`` (interquartile range over median) and ``samples``.
    """
    samples: dict[str, list[float]] = {}
    inner: dict[str, int] = {}
    for name, call in calls.items():
        first = _timed(call, 1)
        if first * min_rounds > budget_s:
            samples[name] = [first]
        else:
            samples[name] = []
            inner[name] = max(1, math.ceil(SHORTEST_SAMPLE_S / max(_timed(call, 1), 1e-7)))
    started = time.perf_counter()
    for done in range(max_rounds if inner else 0):
        if done >= min_rounds and time.perf_counter() - started > budget_s:
            break
        for name, count in inner.items():
            samples[name].append(_timed(calls[name], count))
    return {name: _summary(values) for name, values in samples.items()}


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
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


class PeakMemory:
    """Peak resident memory of this process in a ``with`` block, above what was resident when it began.

    >>> with PeakMemory() as peak:
    ...     work()
    >>> peak.bytes
    """

    bytes: int = 0

    def __enter__(self) -> PeakMemory:
        if _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text("5")  # sets the high-water mark to what is resident now
        self._before = _high_water_mark()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = _high_water_mark() - self._before


def _high_water_mark() -> int:
    if _CLEAR_REFS.exists():
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    # Elsewhere the mark cannot be set back: right for the first block of a fresh process, which is how suites use it.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fma_peak_gflops() -> dict[str, float]:
    """Measured peak GFLOP/s at the current thread count: of a float32 matrix product, and of our FMA loop if built."""
    size = 1536
    a, b, c = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    timing = interleaved({"sgemm": lambda: torch.mm(a, b, out=c)}, budget_s=0.5)
    peaks = {"sgemm": _rounded(2 * size**3 / timing["sgemm"]["ms"] / 1e6)}
    try:
        from efficient_attn import _cpu
    except ModuleNotFoundError:
        return peaks
    if hasattr(_cpu, "fma_peak_gflops"):
        peaks["fma"] = _rounded(max(_cpu.fma_peak_gflops(torch.get_num_threads()) for _ in range(3)))
    return peaks


def copy_bandwidth_gbs() -> float:
    """Measured memory bandwidth in GB/s of a copy far larger than any cache (bytes read plus bytes written)."""
    source = torch.ones(256 * 2**20, dtype=torch.uint8)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, budget_s=0.5)
    return _rounded(2 * source.numel() / timing["copy"]["ms"] / 1e6)
