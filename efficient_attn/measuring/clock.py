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
from typing import Any, NamedTuple

import torch

from . import scheduling

Call = Callable[[], object]

# A sample shorter than this repeats its call inside, so that the clock's resolution and the loop do not show.
SHORTEST_SAMPLE_S = 1e-3
# Above this interquartile range (relative to the median) a fixed piece of work says that the machine is busy, and a
# record that says no more than its spread is called noisy.
NOISY = 0.25
# Above this half-width of the 95 % interval, relative, a time is called noisy: no sentence, fit or crossing uses it.
UNSURE = 0.15
# A call is measured longer than its budget, up to so many times, until it is known that well.
PATIENCE = 4.0
# A sample is undisturbed if its threads waited for a core for less than this share of it; so many are enough.
DISTURBED, ENOUGH = 0.1, 3
DOUBT = 0.25  # of the waiting that was taken off a time, how much may be wrong
KEPT = 48
# A call shorter than this runs once unmeasured after another process had its turn: its threads sleep, and the caches
# hold the other's.
WAKES_S = 0.05
# Threads sleep when this process spends less than this share of the time; no longer than QUIET_S is waited for that.
ASLEEP, QUIET_S = 0.05, 0.25
_CLEAR_REFS = Path("/proc/self/clear_refs")


class Sample(NamedTuple):
    """Seconds of one call: by the wall clock, of processor time over all threads, and what the most delayed thread
    waited for a core that others had."""

    wall: float
    cpu: float
    waited: float

    @property
    def seconds(self) -> float:
        """What the call would have taken alone: less the waiting, but no less than its processor time allows."""
        return max(self.wall - self.waited, min(self.cpu / torch.get_num_threads(), self.wall))

    @property
    def disturbed(self) -> bool:
        return self.waited > DISTURBED * self.wall


class Elsewhere:
    """A call in another process, which times it there and answers when its threads sleep."""

    def __call__(self) -> object:
        raise NotImplementedError

    def timed(self, count: int, wake: bool) -> Sample:
        raise NotImplementedError


def interleaved(
    calls: Mapping[str, Call],
    budget_s: float,
    min_rounds: int = 3,
    max_rounds: int = 200,
    patience_s: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Times the calls in alternation, so that a drift of the machine meets all of them alike.

    Each call first runs once, unmeasured. Rounds go on until `budget_s` is spent, at least `min_rounds`, and while
    a call is not known to `UNSURE` until `patience_s` (default: `PATIENCE` times the budget). A call that is so slow
    that `min_rounds` of it alone exceed both is represented by its first run only.

    Where some of the calls are `Elsewhere`, short ones run once before each of their samples: all meet the machine as
    they leave it themselves, whoever had it before.

    Where others have the cores, the time that the call's threads waited for one (which Linux tells) is taken off; when
    enough samples are undisturbed, they alone count.

    Returns per call: `ms` (the lower quartile of undisturbed samples, else the median), `spread` (interquartile range
    over median), `unsure` (half-width of the 95 % interval over `ms`), `samples` (their number), `wall_ms` and `cpu_ms`
    (medians by the clock, and of processor time over all threads), and `times`, the samples themselves in ms, round by
    round: beyond `KEPT` every second, third... round.
    """
    patience_s = PATIENCE * budget_s if patience_s is None else max(budget_s, patience_s)
    samples: dict[str, list[Sample]] = {}
    inner: dict[str, int] = {}
    wake: dict[str, bool] = {}
    apart = any(isinstance(call, Elsewhere) for call in calls.values())
    for name, call in calls.items():
        first = timed(call, 1)
        if first.wall * min_rounds > patience_s:
            samples[name] = [first]
        else:
            samples[name] = []
            again = timed(call, 1) if first.wall * min_rounds <= budget_s else first
            wake[name] = apart and again.wall < WAKES_S
            inner[name] = max(1, math.ceil(SHORTEST_SAMPLE_S / max(again.wall, 1e-7)))
    started = time.perf_counter()
    for done in range(max_rounds if inner else 0):
        spent = time.perf_counter() - started
        if done >= min_rounds and spent > budget_s and (spent > patience_s or _known(samples[name] for name in inner)):
            break
        for name, count in inner.items():
            samples[name].append(timed(calls[name], count, wake[name]))
    return {name: _summary(values) for name, values in samples.items()}


def is_noisy(record: Mapping[str, Any]) -> bool:
    """Whether a record's time is too unsure for a statement; one of an older version tells by its spread."""
    if record.get("unsure") is not None:
        return bool(record["unsure"] > UNSURE)
    return bool(record.get("spread", 0) > NOISY)


def _known(samples: Iterable[list[Sample]]) -> bool:
    return not any(is_noisy(_summary(values)) for values in samples)


def settle() -> None:
    """Waits until the threads of this process sleep: libraries let theirs look for more work for a while."""
    for _ in range(round(QUIET_S / 1e-3)):
        cpu, started = time.process_time(), time.perf_counter()
        time.sleep(1e-3)
        used = (time.process_time() - cpu) / (time.perf_counter() - started)
        if used < ASLEEP and scheduling.at_work() <= 1:
            return


def timed(call: Call, count: int, wake: bool = False) -> Sample:
    """One sample: `count` calls, after one that is not measured with `wake`."""
    if isinstance(call, Elsewhere):
        return call.timed(count, wake)
    if wake:
        call()
    before, cpu = scheduling.waits(), time.process_time()
    started = time.perf_counter()
    for _ in range(count):
        call()
    wall = time.perf_counter() - started
    cpu = time.process_time() - cpu
    waited = scheduling.longest_wait(before, scheduling.waits())
    return Sample(wall / count, cpu / count, min(waited, wall) / count)


def _summary(samples: list[Sample]) -> dict[str, Any]:
    calm = [sample.seconds for sample in samples if not sample.disturbed]
    used = calm if len(calm) >= ENOUGH else [sample.seconds for sample in samples]
    median = statistics.median(used)
    low, _, high = statistics.quantiles(used, n=4) if len(used) > 1 else [median, median, median]
    low = max(low, min(used))  # three samples have no quartile: it would lie outside of them
    spread = (high - low) / median
    taken_off = 0.0 if used is calm else statistics.median(1 - sample.seconds / sample.wall for sample in samples)
    # The normal approximation for a median; fewer than three samples say nothing of their own spread.
    unsure = (1.8 * spread / math.sqrt(len(used)) if len(used) >= ENOUGH else 0.1) + DOUBT * taken_off
    return {
        "ms": _rounded((low if used is calm else median) * 1e3),
        "spread": _rounded(spread),
        "unsure": _rounded(unsure),
        "samples": len(samples),
        "wall_ms": _rounded(statistics.median(sample.wall for sample in samples) * 1e3),
        "cpu_ms": _rounded(statistics.median(sample.cpu for sample in samples) * 1e3),
        "times": [_rounded(sample.seconds * 1e3) for sample in samples[:: math.ceil(len(samples) / KEPT)]],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def noise() -> float:
    """How unsteady this machine is now: the interquartile range, over the median, of a fixed piece of work (0.2 s)."""
    samples = []
    started = time.perf_counter()
    while time.perf_counter() - started < 0.2:
        samples.append(timed(lambda: sum(range(20_000)), 1).wall)
    low, median, high = statistics.quantiles(samples, n=4)
    return _rounded((high - low) / median)


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
