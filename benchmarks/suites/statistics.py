"""Suite `statistics`: all statistics of attention's weights together, beside one forward: time and memory.

The bounds that docs/insight.md names, twice the time and less than four times the peak memory, are claims here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from efficient_attn import attention, parse
from efficient_attn.insight import attention_statistics
from efficient_attn.measuring import clock

from . import Chart, Claim, Column, Options, Row, Suite, grid

LENGTHS = (1024, 4096, 16384, 65536)
QUICK = (1024, 4096)
PATTERNS = ("dense", "causal", "sliding_window:left=512,right=512")
SHAPE = {"batch": 1, "heads": 1, "head_dim": 64, "mode": "fwd"}
MOST_TIME, MOST_MEMORY = 2.0, 4.0  # of one forward's


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Times in one alternation, and peaks above the inputs. `config`: method (a pattern's spec), seqlen, batch, heads,
    head_dim, dtype, threads, budget_s, seed."""
    generator = torch.Generator().manual_seed(config["seed"])
    shape = (config["batch"], config["heads"], config["seqlen"], config["head_dim"])
    dtype = getattr(torch, config["dtype"])
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    pattern = None if config["method"] == "dense" else parse(config["method"]).pattern

    def forward() -> object:
        return attention(query, key, value, mask=pattern)

    def statistics() -> object:
        return attention_statistics(query, key, mask=pattern)

    small = tuple(t[:, :, :256] for t in (query, key, value))
    attention(*small, mask=pattern), attention_statistics(*small[:2], mask=pattern)  # what is made once
    peaks = []
    for call in (forward, statistics):
        with clock.PeakMemory() as peak:
            call()
        peaks.append(peak.bytes)
    times = clock.interleaved({"forward": forward, "statistics": statistics}, config["budget_s"])
    ms = times["statistics"]["ms"]
    return {
        **times["statistics"], "forward_ms": times["forward"]["ms"],
        "time_ratio": round(ms / times["forward"]["ms"], 3), "peak_bytes": peaks[1], "forward_peak_bytes": peaks[0],
        "memory_ratio": round(peaks[1] / max(peaks[0], 1), 3),
    }  # fmt: skip


def configs(options: Options) -> Iterable[dict[str, Any]]:
    lengths = options.seqlens or (QUICK if options.quick else LENGTHS)
    yield from grid(
        seqlen=lengths, method=options.methods or PATTERNS, dtype=options.dtypes, **SHAPE, **options.common()
    )


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    for key, most, what in (("time_ratio", MOST_TIME, "the time"), ("memory_ratio", MOST_MEMORY, "the peak memory")):
        if rows:
            worst = max(rows, key=lambda row: row[key])
            text = f"All statistics together take at most {worst[key]:.2f} of {what} of one forward (bound: {most:g}): "
            found.append(Claim(f"{text}{worst['method']} at N = {worst['seqlen']}.", (worst["id"],)))
    return found


SUITE = Suite(
    name="statistics",
    about="All statistics of attention's weights (entropy, 8 top keys, received, distances, sinks, map of 64) beside "
    "one forward of the same call, in one alternation; peaks above the inputs.",
    configs=configs,
    run_cell=run_cell,
    key=(
        Column("pattern", "method", "text"),
        Column("dtype", "dtype", "text"),
        Column("N", "seqlen", "integer"),
    ),
    columns=(
        Column("statistics ms", "ms", "ms"),
        Column("±", "spread", "percent"),
        Column("forward ms", "forward_ms", "ms"),
        Column("time", "time_ratio", "times"),
        Column("MiB", "peak_bytes", "mib"),
        Column("forward MiB", "forward_peak_bytes", "mib"),
        Column("memory", "memory_ratio", "times"),
    ),
    charts=(Chart("Statistics against a forward", "seqlen", "ms", "sequence length", "ms"),),
    claims=claims,
    default=False,
)
