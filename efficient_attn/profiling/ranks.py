"""`efficient-attn profile --context-parallel`: attention over 1, 2, 4, ... ranks, measured here and predicted beyond.

As many ranks as there are processors run as processes with one thread each; their link and speed are measured by the
way. For more, the plan of the same call is replayed with the model of links (distributed/links.py), which is printed
beside what was measured, so that it can be judged.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ..distributed import H200, TRANSPORTS, Link, Plan, Shape, Shards, context_parallel, make_plan
from ..distributed.plan import head_ranks
from ..errors import InputError, UnsupportedError
from ..masks import BlockMask
from ..methods import Method, Sparse, parse

LINKS = {"h200": H200}
LAYOUTS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Row:
    """Attention by one transport over so many ranks: seconds of the slowest rank, forward."""

    ranks: int
    transport: str
    sent: int  # bytes, over all ranks
    predicted: float
    measured: float | None
    efficiency: float  # of the ideal, one rank's time over so many ranks; of measured times where both were

    @property
    def off(self) -> float | None:
        """How far the prediction is from what was measured, as a part of that."""
        return None if self.measured is None else self.predicted / self.measured - 1


@dataclass(frozen=True)
class RankProfile:
    """What `profile_ranks` found."""

    method: str
    length: int
    link: Link
    measured_link: bool
    rows: tuple[Row, ...]

    @property
    def fastest(self) -> dict[int, str]:
        """The predicted fastest transport for each number of ranks: where it changes, two of them cross."""
        found: dict[int, Row] = {}
        for row in self.rows:
            if row.ranks not in found or row.predicted < found[row.ranks].predicted:
                found[row.ranks] = row
        return {ranks: row.transport for ranks, row in found.items()}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [asdict(row) for row in self.rows], "fastest": self.fastest}

    def __str__(self) -> str:
        speeds = f"{self.link.bandwidth / 1e9:.3g} GB/s, {self.link.latency * 1e6:.3g} us, {self.link.flops:.3g} FLOP/s"
        lines = [
            f"{self.method} of {self.length:,} tokens over ranks, forward",
            f"link {'measured' if self.measured_link else 'given'}: {speeds}",
            f"{'ranks':>6} {'transport':<11} {'measured ms':>12} {'predicted ms':>13} {'off':>6} {'efficiency':>11} "
            f"{'MB sent':>10}",
        ]
        for row in self.rows:
            measured = "-" if row.measured is None else f"{row.measured * 1e3:.2f}"
            off = "-" if row.off is None else f"{row.off:+.0%}"
            star = "*" if self.fastest[row.ranks] == row.transport else " "
            lines.append(
                f"{row.ranks:>6} {row.transport:<10}{star} {measured:>12} {row.predicted * 1e3:>13.2f} {off:>6} "
                f"{row.efficiency:>11.0%} {row.sent / 1e6:>10.1f}"
            )
        return "\n".join([*lines, "* predicted to be fastest"])


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
        measure: the most ranks that are run as processes; default: the processors, 0: none.

    Raises:
        InputError, UnsupportedError: a method, shape, link or numbers that cannot be.
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
    numbers = sorted(set(ranks))
    mask = BlockMask(length, length)
    if not found.is_dense:
        mask = found.pattern.block_mask(length, length, num_heads=heads)
    if causal:
        mask = mask & BlockMask(length, length).with_causal()
    kind: torch.dtype = getattr(torch, dtype)
    shape = Shape(batch, heads, kv_heads or heads, head_dim, head_dim, kind.itemsize)
    times: dict[tuple[int, str], float] = {}
    given = LINKS[link] if isinstance(link, str) else link
    if given is None:
        most = len(os.sched_getaffinity(0)) if measure is None else measure
        job = _Job(str(found), length, shape, dtype, causal, layout, rounds)
        given = Link()
        for count in [n for n in sorted({1, 2, *numbers}) if n <= most]:
            answers = _in_processes(count, job)
            times |= {(count, name): max(a[0][name] for a in answers) for name in answers[0][0]}
            if count == 1:
                pairs = float(make_plan(mask, *(Shards.zigzag(length, 1),) * 2).pairs.sum())
                given = replace(given, flops=pairs * shape.pair_flops / times[1, "gather"], call=0.0)
            elif count == 2:
                given = replace(given, latency=answers[0][1], bandwidth=answers[0][2])
    rows = []
    for count in numbers:
        here = not times or (count, "gather") in times
        speeds = given if here else replace(given, **(beyond or {}))
        one = max(_plan(mask, length, 1, layout).seconds("gather", shape, speeds))
        plan = _plan(mask, length, count, layout)
        for name in TRANSPORTS if count > 1 else ("gather",):
            degree = head_ranks(heads, count) if name == "all_to_all" else 1
            if name == "all_to_all" and degree == 1:
                continue
            predicted, measured = max(plan.seconds(name, shape, speeds, degree)), times.get((count, name))
            alone = times.get((1, "gather"))
            ideal = one / predicted if measured is None or alone is None else alone / measured
            rows.append(Row(count, name, sum(plan.sent(name, shape, degree)), predicted, measured, ideal / count))
    return RankProfile(f"{found}{' causal' if causal else ''}", length, given, bool(times), tuple(rows))


def _plan(mask: BlockMask, length: int, ranks: int, layout: str) -> Plan:
    shards = Shards.zigzag(length, ranks) if layout == "zigzag" else Shards.contiguous(length, ranks)
    return make_plan(mask, shards, shards)


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


def _in_processes(ranks: int, job: _Job) -> list[tuple[dict[str, float], float, float]]:
    """(seconds by transport, latency, bandwidth) of each rank."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        workers = [
            context.Process(target=_work, args=(rank, ranks, folder, job, pipes[rank][1]), daemon=True)
            for rank in range(ranks)
        ]
        for worker in workers:
            worker.start()
        try:
            answers = []
            for (receive, _), worker in zip(pipes, workers, strict=True):
                while not receive.poll(0.2):
                    if worker.exitcode is not None and not receive.poll(0):
                        raise InputError(f"a process of {ranks} ranks ended with code {worker.exitcode}; see its error")
                answers.append(receive.recv())
            return answers
        finally:
            for worker in workers:
                worker.join(10)
                if worker.is_alive():
                    worker.kill()


def _work(rank: int, ranks: int, folder: str, job: _Job, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    method, shape, times = parse(job.method), job.shape, dict[str, float]()
    kind: torch.dtype = getattr(torch, job.dtype)
    group: Any = dist.group.WORLD
    latency = bandwidth = 0.0
    for name in TRANSPORTS if ranks > 1 else ("gather",):
        with context_parallel(group, shards=job.layout, transport=name) as context:
            n = context.shards(job.length).counts[rank]
            query = torch.randn(shape.B, shape.Hq, n, shape.D, dtype=kind)
            key, value = (torch.randn(shape.B, shape.Hkv, n, shape.D, dtype=kind) for _ in range(2))
            samples = []
            for _ in range(job.rounds + 1):
                dist.barrier()
                began = time.perf_counter()
                method.attend(query, key, value, is_causal=job.causal)
                samples.append(time.perf_counter() - began)
            times[name] = statistics.median(samples[1:])
            if ranks == 2 and not latency:
                small, large = (_swap_time(context, size) for size in (256, 2**22))
                latency, bandwidth = small, 2**22 / max(large - small, 1e-9)
    pipe.send((times, latency, bandwidth))
    dist.destroy_process_group()


def _swap_time(context: Any, size: int) -> float:
    """Seconds in which two ranks give each other `size` bytes."""
    part = torch.zeros(size, dtype=torch.uint8)
    leaving: list[list[torch.Tensor]] = [[], []]
    arriving: list[list[torch.Tensor]] = [[], []]
    leaving[1 - context.rank], arriving[1 - context.rank] = [part], [part.clone()]
    samples = []
    for _ in range(9):
        dist.barrier()
        began = time.perf_counter()
        context.exchange.swap(leaving, arriving, what="measuring")
        samples.append(time.perf_counter() - began)
    return statistics.median(samples)
