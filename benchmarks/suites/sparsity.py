"""Suite ``sparsity``: time against density, beside the ideal line: density times the time of exact attention.

Masks of whole blocks drawn at random are the worst case for caches; windows of the same density are contiguous.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from efficient_attn import BlockMask, SlidingWindow, attention
from efficient_attn.measuring import clock, inputs
from efficient_attn.measuring.calls import binder

from .. import peers
from . import Chart, Claim, Column, Options, Row, Suite, grid

BLOCK = 64
PERCENTS, QUICK_PERCENTS = (75, 50, 25, 10, 5, 2), (50, 25, 10, 5)
SHAPE = {"batch": 1, "heads": 4, "head_dim": 64}


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Time under the mask beside exact attention and torch SDPA without one, in one alternation.

    ``config``: pattern ("random", "window"), percent, seqlen, mode ("fwd", "fwd_bwd"), dtype, batch, heads, head_dim,
    budget_s, threads, seed.
    """
    length = config["seqlen"]
    generator = torch.Generator().manual_seed(config["seed"])
    started = time.perf_counter()
    mask = _mask(config["pattern"], length, config["percent"] / 100, generator)
    plan_ms = round((time.perf_counter() - started) * 1e3, 4)
    dtype = getattr(torch, config["dtype"])
    shape = {key: config[key] for key in ("batch", "heads", "head_dim")}
    bound = binder(config["mode"], inputs.photograph_qkv(length, dtype=dtype, **shape))
    calls = {
        "sparse": bound(lambda q, k, v: attention(q, k, v, mask=mask)),
        "dense": bound(lambda q, k, v: attention(q, k, v)),
        "sdpa": bound(peers.sdpa),
    }
    times = clock.interleaved(calls, config["budget_s"])
    sparse, dense = times["sparse"], times["dense"]
    ideal = mask.density * dense["ms"]
    return {
        **sparse,
        "density": round(mask.density, 6),
        "dense_ms": dense["ms"],
        "ideal_ms": float(f"{ideal:.5g}"),
        "sdpa_ms": times["sdpa"]["ms"],
        "reference_times": dense["times"],
        "speedup_dense": round(dense["ms"] / sparse["ms"], 4),
        "efficiency": round(ideal / sparse["ms"], 4),
        "plan_ms": plan_ms,
        "mask_bytes": mask.nbytes,
    }


def _mask(pattern: str, length: int, density: float, generator: torch.Generator) -> BlockMask:
    if pattern == "random":
        return random_blocks(length, length, density, generator)
    # A window of w keys to either side sees (2 w + 1) N - w (w + 1) of the N^2 pairs; solved for w.
    side = round(length * (1 - (1 - density) ** 0.5) - 0.5)
    return SlidingWindow(left=max(side, 0), right=max(side, 0)).block_mask(length, length)


def random_blocks(q_len: int, kv_len: int, density: float, generator: torch.Generator) -> BlockMask:
    """A mask of whole blocks: in every block row the same number, drawn at random."""
    rows, columns = -(-q_len // BLOCK), -(-kv_len // BLOCK)
    count = max(1, round(density * columns))
    chosen = torch.rand(rows, columns, generator=generator).argsort(dim=1)[:, :count].sort(dim=1).values
    indptr = torch.arange(0, rows * count + 1, count)
    return BlockMask.from_csr(indptr, chosen.flatten().int(), q_len=q_len, kv_len=kv_len, block_size=(BLOCK, BLOCK))


def configs(options: Options) -> Iterable[dict[str, Any]]:
    lengths = options.seqlens or ((2048,) if options.quick else (2048, 8192))
    percents = QUICK_PERCENTS if options.quick else PERCENTS
    modes = tuple(mode for mode in options.modes or ("fwd", "fwd_bwd") if mode != "decode")
    axes: dict[str, Any] = {"seqlen": lengths, "mode": modes, "pattern": ("random", "window"), "percent": percents}
    return grid(**axes, dtype=options.dtypes, **SHAPE, **options.common())


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        longest = max(row["seqlen"] for row in rows if row["mode"] == mode)
        here = [row for row in rows if (row["mode"], row["seqlen"], row["pattern"]) == (mode, longest, "random")]
        if here:
            least, most = (pick(here, key=lambda row: row["efficiency"]) for pick in (min, max))
            low, high = (f"{row['efficiency']:.0%} (density {row['density']:.2f})" for row in (least, most))
            text = f"Random blocks at N = {longest}, {mode}: {low} to {high} of the ideal, density x dense time."
            found.append(Claim(text, (least["id"], most["id"])))
    return found


SUITE = Suite(
    name="sparsity",
    about="Our exact attention under masks of a given density, and without a mask in the same alternation; ideal is "
    "density x that time, efficiency ideal over measured.",
    configs=configs,
    run_cell=run_cell,
    key=(
        Column("pattern", "pattern", "text"),
        Column("N", "seqlen", "integer"),
        Column("mode", "mode", "text"),
        Column("% asked", "percent", "integer"),
    ),
    columns=(
        Column("density", "density", "share"),
        Column("ms", "ms", "ms"),
        Column("ideal ms", "ideal_ms", "ms"),
        Column("efficiency", "efficiency", "percent"),
        Column("vs dense", "speedup_dense", "times"),
        Column("SDPA ms", "sdpa_ms", "ms"),
        Column("plan ms", "plan_ms", "ms"),
    ),
    series="pattern",
    charts=(
        Chart("Time against density", "density", "ms", "density of the mask", "ms",
              split=("seqlen", "mode", "dtype"),
              references=(("ideal_ms", "ideal: density x dense"), ("sdpa_ms", "torch SDPA, dense"))),
        Chart("Share of the ideal", "density", "efficiency", "density of the mask", "ideal / measured",
              split=("seqlen", "mode", "dtype"), log_y=False),
    ),
    claims=claims,
)  # fmt: skip
