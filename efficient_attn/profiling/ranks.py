"""`efficient-attn profile --context-parallel`: attention over 1, 2, 4, ... ranks, measured here and predicted beyond.

Ranks run as processes with one thread each, also more of them than processors. Beside the call itself, in the same
rounds, they measure what a prediction is made of: the FLOP/s of a rank while all ranks compute without a word to each
other, what an exchange of so many ranks takes, and an empty call. The plan of the call is then replayed with these
numbers (distributed/links.py) and printed beside what was measured, so that it can be judged; for numbers of ranks that
cannot run here, with the speeds of the largest that did, or with those given.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..distributed import H200, TRANSPORTS, Link, Plan, Shape, Shards, context_parallel, make_plan
from ..distributed.plan import head_ranks
from ..errors import InputError, UnsupportedError
from ..masks import BlockMask
from ..measuring import records
from ..measuring.ranks import Ranks, started
from ..methods import Method, Sparse, parse
from .session import Report

LINKS = {"h200": H200}
LAYOUTS = ("zigzag", "contiguous")
MEASURED = f" {'1 process ms':>13} {'over it':>8} {'CPU ms':>9} {'1 process':>10} {'peak MB':>8} {'1 process':>10}"
MODES = {"fwd": "forward", "fwd_bwd": "forward and backward"}


@dataclass(frozen=True)
class Row:
    """Attention by one transport over so many ranks: seconds of the slowest rank."""

    ranks: int
    transport: str
    sent: int  # bytes of a forward, over all ranks
    predicted: float | None  # of a forward; None where a backward is measured too
    measured: float | None
    efficiency: float  # of the ideal, one rank's time over so many ranks; of measured times where both were
    one_process: float | None = None  # seconds of one process with as many threads as ranks, or as processors
    peak: int | None = None  # bytes by which the memory of the largest rank grows, its part of the tensors included
    one_peak: int | None = None  # likewise of one process that does all without context_parallel
    cpu: float | None = None  # seconds of processors, over all ranks: what a machine that others use too leaves alone
    one_process_cpu: float | None = None
    off: float | None = None  # how far the prediction is from what was measured, as a part of that; of each round
    speedup: float | None = None  # over one process, of each round


@dataclass(frozen=True)
class RankProfile:
    """What `profile_ranks` found."""

    method: str
    length: int
    link: Link
    measured_link: bool
    rows: tuple[Row, ...]
    mode: str = "fwd"
    links: dict[int, Link] = field(default_factory=dict)  # as measured with so many ranks

    @property
    def fastest(self) -> dict[int, str]:
        """The transport predicted, or else measured, to be fastest for each number of ranks: where it changes, two of
        them cross."""
        found: dict[int, Row] = {}
        for row in self.rows:
            if row.ranks not in found or _time(row) < _time(found[row.ranks]):
                found[row.ranks] = row
        return {ranks: row.transport for ranks, row in found.items()}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [asdict(row) for row in self.rows], "fastest": self.fastest}

    def records(self, options: Mapping[str, Any]) -> list[records.Record]:
        """A cell for each row, as the files of results have them; `options` are those of `profile_ranks`."""
        code, found = records.code_version(), []
        for row in self.rows:
            config = {"method": self.method, "seqlen": self.length, **options, "mode": self.mode}
            config |= {"ranks": row.ranks, "transport": row.transport}
            times = {"ms": row.measured, "predicted_ms": row.predicted, "one_process_ms": row.one_process}
            times |= {"cpu_ms": row.cpu, "one_process_cpu_ms": row.one_process_cpu}
            cell: dict[str, Any] = {name: t if t is None else round(t * 1e3, 4) for name, t in times.items()}
            cell |= {"sent_bytes": row.sent, "peak_bytes": row.peak, "one_process_peak_bytes": row.one_peak}
            cell["efficiency"] = round(row.efficiency, 4)
            if row.off is not None:
                cell["prediction_error"] = round(abs(row.off), 4)
            if row.speedup is not None:
                cell["speedup_one_process"] = round(row.speedup, 4)
            if row.ranks in self.links:
                cell["link"] = asdict(self.links[row.ranks])
            cell = {name: value for name, value in cell.items() if value is not None}
            name = records.cell_id("ranks", config, code)
            found.append({"type": "cell", "id": name, "suite": "ranks", "config": config, "code": code,
                          "load": round(os.getloadavg()[0], 2), "status": "ok", **cell})  # fmt: skip
        return found

    def __str__(self) -> str:
        speeds = f"{self.link.bandwidth / 1e9:.3g} GB/s, {self.link.latency * 1e6:.3g} us, {self.link.flops:.3g} FLOP/s"
        lines = [
            f"{self.method} of {self.length:,} tokens over ranks, {MODES[self.mode]}",
            f"link {'measured' if self.measured_link else 'given'}: {speeds}",
            f"{'ranks':>6} {'transport':<11} {'measured ms':>12} {'predicted ms':>13} {'off':>6} {'efficiency':>11} "
            f"{'MB sent':>10}" + (MEASURED if self.measured_link else ""),
        ]
        for row in self.rows:
            measured = _ms(row.measured)
            off = "-" if row.off is None else f"{row.off:+.0%}"
            over = "-" if row.speedup is None else f"{row.speedup:.2f}x"
            alone = (
                f" {_ms(row.one_process):>13} {over:>8} {_ms(row.cpu):>9} {_ms(row.one_process_cpu):>10} "
                f"{_mb(row.peak):>8} {_mb(row.one_peak):>10}"
            )
            star = "*" if self.fastest[row.ranks] == row.transport else " "
            lines.append(
                f"{row.ranks:>6} {row.transport:<10}{star} {measured:>12} {_ms(row.predicted):>13} {off:>6} "
                f"{row.efficiency:>11.0%} {row.sent / 1e6:>10.1f}" + (alone if self.measured_link else "")
            )
        return "\n".join([*lines, "* predicted to be fastest"])


def _time(row: Row) -> float:
    return row.predicted if row.predicted is not None else row.measured or 0.0


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f}"


def profile_ranks(
    method: str | Method,
    length: int,
    ranks: Sequence[int],
    *,
    batch: int = 1,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: str = "float32",
    causal: bool = False,
    layout: str = "zigzag",
    link: Link | str | None = None,
    beyond: Mapping[str, Any] | None = None,
    rounds: int = 5,
    measure: int | None = None,
    mode: str = "fwd",
    report: Report = lambda *_: None,
    timeout: float = 300.0,
) -> RankProfile:
    """Time attention over several numbers of ranks.

    In a script, call it under `if __name__ == "__main__":`, as all that starts processes.

    Args:
        method: dense or a pattern of positions.
        length: of queries and keys, over all ranks.
        ranks: the numbers.
        link: None measures here what can be measured; a `Link` or "h200" predicts for that one and measures nothing.
        beyond: fields of `Link` that replace the measured ones for numbers that cannot run here: {"bandwidth": 4.5e11}.
        rounds: measured, of which the median counts.
        measure: the most ranks that are run as processes; default: twice the processors, 0: none.
        mode: "fwd", or "fwd_bwd", which is measured and not predicted.
        report: called with (what runs now, how much is done, of how much).
        timeout: seconds that one call may take.

    Raises:
        InputError, UnsupportedError: a method, shape, link or numbers that cannot be.
        CommunicationError: a process that died, or took longer than `timeout`.
    """
    found = parse(method)
    if not isinstance(found, Sparse) or found.pattern.by_content:
        raise UnsupportedError(f"{found}: --context-parallel is for dense attention and patterns of positions")
    if not ranks or min(ranks) < 1:
        raise InputError(f"--context-parallel takes numbers of ranks such as 1,2,4,64; got {list(ranks)}")
    if layout not in LAYOUTS:
        raise InputError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if isinstance(link, str) and link not in LINKS:
        raise InputError(f"--link must be one of {', '.join(LINKS)}, got {link!r}")
    if mode not in MODES:
        raise InputError(f"--mode with --context-parallel is one of {', '.join(MODES)}; got {mode!r}")
    numbers = sorted(set(ranks))
    mask = BlockMask(length, length)
    if not found.is_dense:
        mask = found.pattern.block_mask(length, length, num_heads=heads)
    if causal:
        mask = mask & BlockMask(length, length).with_causal()
    kind: torch.dtype = getattr(torch, dtype)
    shape = Shape(batch, heads, kv_heads or heads, head_dim, head_dim, kind.itemsize)
    found_here: dict[int, _Found] = {}
    given = LINKS[link] if isinstance(link, str) else link
    flops = float(make_plan(mask, *(Shards.zigzag(length, 1),) * 2).pairs.sum()) * shape.pair_flops
    if given is None:
        most = 2 * len(os.sched_getaffinity(0)) if measure is None else measure
        job = _Job(str(found), length, shape, dtype, causal, layout, rounds, mode, timeout)
        counts = [count for count in sorted({1, *numbers}) if count <= most]
        for done, count in enumerate(counts):
            report(f"{found} of {length:,} tokens over {count} ranks", done, len(counts))
            found_here[count] = _measured(count, job)
        given = found_here[max(found_here)].link_of(None, flops) if found_here else Link()
    if mode != "fwd" and not found_here:
        raise InputError(f"--mode {mode} is measured and not predicted; take --link away, or --mode fwd")
    alone = found_here[1].middle("gather") if 1 in found_here else None
    rows = []
    for count in numbers:
        here = found_here.get(count)
        if mode != "fwd" and here is None:
            continue
        speeds = found_here[1].link_of(None, flops) if here else replace(given, **(beyond or {}))
        one = max(_plan(mask, length, 1, layout).seconds("gather", shape, speeds))
        plan = _plan(mask, length, count, layout)
        for name in TRANSPORTS if count > 1 else ("gather",):
            degree = head_ranks(heads, count) if name == "all_to_all" else 1
            if name == "all_to_all" and degree == 1:
                continue
            sent = sum(plan.sent(name, shape, degree))
            if here is None:
                predicted = max(plan.seconds(name, shape, speeds, degree))
                rows.append(Row(count, name, sent, predicted, None, one / predicted / count))
                continue
            replayed = [max(plan.seconds(name, shape, here.link_of(n, flops), degree)) for n in range(rounds)]
            measured, forward = here.middle(name), mode == "fwd"
            rows.append(
                Row(
                    count, name, sent, statistics.median(replayed) if forward else None, measured,
                    (alone or one) / measured / count, here.middle("one"), here.peaks[name], found_here[1].one_peak,
                    here.middle(f"{name} cpu"), here.middle("one cpu"),
                    statistics.median(p / m - 1 for p, m in zip(replayed, here.samples[name], strict=True))
                    if forward else None,
                    statistics.median(o / m for o, m in zip(here.samples["one"], here.samples[name], strict=True)),
                )
            )  # fmt: skip
    links = {count: here.link_of(None, flops) for count, here in found_here.items()}
    title = f"{found}{' causal' if causal else ''}"
    return RankProfile(title, length, given, bool(found_here), tuple(rows), mode, links)


def _plan(mask: BlockMask, length: int, ranks: int, layout: str) -> Plan:
    shards = Shards.zigzag(length, ranks) if layout == "zigzag" else Shards.contiguous(length, ranks)
    return make_plan(mask, shards, shards)


# --- measuring ---


@dataclass(frozen=True)
class _Job:
    """What each process times."""

    method: str
    length: int
    shape: Shape
    dtype: str
    causal: bool
    layout: str
    rounds: int
    mode: str
    timeout: float


SMALL, LARGE = 2**8, 2**22  # bytes that an exchange is measured with


@dataclass(frozen=True)
class _Found:
    """What so many ranks gave: in each round seconds of everything, and bytes of memory by transport."""

    ranks: int
    samples: dict[str, list[float]]
    peaks: dict[str, int]
    one_peak: int

    def middle(self, name: str) -> float:
        """The median over the rounds."""
        return statistics.median(self.samples[name])

    def link_of(self, number: int | None, flops: float) -> Link:
        """The speeds of a prediction, of one round or of all."""

        def seconds(name: str) -> float:
            return self.middle(name) if number is None else self.samples[name][number]

        link = replace(Link(), flops=flops / seconds("local"), call=0.0, start=0.0)
        if self.ranks == 1:
            return link
        latency, others = seconds(f"swap {SMALL}"), self.ranks - 1
        large = seconds(f"swap {LARGE}")
        bandwidth = LARGE * others / max(large - latency, large / 2)  # a small one that was held up says nothing of it
        start = max(seconds("tiny") - latency, 0.0)
        return replace(link, latency=latency / others, bandwidth=bandwidth, start=start)


def _measured(ranks: int, job: _Job) -> _Found:
    """Everything once a round, so that what else the machine does meets all alike. What ranks do together takes as long
    as the slowest of them; processor time is added up."""
    names = [n for n in TRANSPORTS if ranks > 1 or n == "gather"]
    threads = min(ranks, len(os.sched_getaffinity(0)))
    samples: dict[str, list[float]] = {}
    with started(ranks, 1, job.timeout) as workers, started(1, threads, job.timeout) as one:

        def ask(*what: Any, of: Ranks = workers) -> list[Any]:
            return of.run(_told, job, *what)

        peaks = {name: int(max(ask("peak", name))) for name in names}
        one_peak = int(max(ask("peak", None, of=one)))
        for number in range(job.rounds + 1):
            calls = {"one": ask("call", None, of=one)} | {name: ask("call", name) for name in names}
            found = {name: max(wall for wall, _ in each) for name, each in calls.items()}
            found |= {f"{name} cpu": sum(cpu for _, cpu in each) for name, each in calls.items()}
            found["local"] = max(ask("local"))
            if ranks > 1:
                found |= {f"swap {n}": max(ask("swap", n)) for n in (SMALL, LARGE)}
                found["tiny"] = max(ask("tiny"))
            for name, seconds in found.items() if number else ():
                samples.setdefault(name, []).append(seconds)
    return _Found(ranks, samples, peaks, one_peak)


def _told(group: Any, job: _Job, what: str, *arguments: Any) -> Any:
    """What a rank is asked: a method of `_Rank`."""
    return getattr(_Rank(group, job), what)(*arguments)


class _Rank:
    """One rank: `call` and `peak` are of the call that is profiled, the others of what a prediction is made of."""

    def __init__(self, group: Any, job: _Job) -> None:
        self.group, self.job, self.method = group, job, parse(job.method)

    def call(self, transport: str | None) -> tuple[float, float]:
        """Seconds of the call and of processors in it; without a transport this process does all of it."""
        with self._context(transport) as context:
            tensors = self._tensors(context, self.job.length)
            dist.barrier()
            began, used = time.perf_counter(), time.process_time()
            self._attend(*tensors)
            return time.perf_counter() - began, time.process_time() - used

    def peak(self, transport: str | None) -> float:
        """Bytes by which this process grows, its tensors included."""
        with self._context(transport) as context:
            self._attend(*self._tensors(context, min(self.job.length, 512)))  # what libraries keep for themselves
            before = _resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            self._attend(*self._tensors(context, self.job.length))
            return _resident("VmHWM") - before

    def local(self) -> float:
        """Seconds of the whole forward in each process, without a word to the others."""
        tensors = self._tensors(None, self.job.length)
        dist.barrier()
        began = time.perf_counter()
        with torch.no_grad():
            self.method.attend(*tensors, is_causal=self.job.causal)
        return time.perf_counter() - began

    def tiny(self) -> float:
        """Seconds of a call of next to no tokens."""
        with self._context("gather") as context:
            tensors = self._tensors(context, 32 * dist.get_world_size())
            dist.barrier()
            began = time.perf_counter()
            with torch.no_grad():
                self.method.attend(*tensors, is_causal=self.job.causal)
            return time.perf_counter() - began

    def swap(self, size: int) -> float:
        """Seconds in which each rank gives `size` bytes to each other one."""
        with self._context("gather") as context:
            part, ranks = torch.zeros(size, dtype=torch.uint8), context.ranks
            leaving = [[part] if r != context.rank else [] for r in range(ranks)]
            arriving = [[part.clone()] if r != context.rank else [] for r in range(ranks)]
            dist.barrier()
            began = time.perf_counter()
            context.exchange.swap(leaving, arriving, what="measuring")
            return time.perf_counter() - began

    def _context(self, transport: str | None) -> Any:
        if transport is None:
            return contextlib.nullcontext()
        return context_parallel(self.group, shards=self.job.layout, transport=transport, timeout=self.job.timeout)

    def _tensors(self, context: Any, length: int) -> list[torch.Tensor]:
        shape, kind = self.job.shape, getattr(torch, self.job.dtype)
        n = length if context is None else context.shards(length).counts[context.rank]
        sizes = ((shape.Hq, shape.D), (shape.Hkv, shape.D), (shape.Hkv, shape.Dv))
        wants = self.job.mode != "fwd"
        return [torch.randn(shape.B, h, n, d, dtype=kind).requires_grad_(wants) for h, d in sizes]

    def _attend(self, *tensors: torch.Tensor) -> None:
        out, _ = self.method.attend(*tensors, is_causal=self.job.causal)
        if self.job.mode != "fwd":
            out.backward(torch.ones((), dtype=out.dtype).expand_as(out))


def _resident(what: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise InputError(f"/proc/self/status names no {what}: memory is measured on Linux alone")
