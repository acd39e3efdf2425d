"""Suite `sparsity`: time against density, beside the ideal line: density times the time of exact attention.

Masks of whole blocks drawn at random are the worst case for caches; windows of the same density are contiguous. The
sparse methods at the sizes of suite `ops` follow, with the share of pairs that they visit; what chooses by content
chooses within the time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efficient_attn import BlockMask, SlidingWindow, attention
from efficient_attn.masks.parts import visited
from efficient_attn.measuring import clock, inputs
from efficient_attn.measuring.calls import binder
from efficient_attn.methods import Sparse, parse
from efficient_attn.methods.buckets import bucketed_inputs, sorted_mask
from efficient_attn.patterns import BucketPattern

from .. import cases, peers
from . import Chart, Claim, Column, Options, Row, Suite, beside, grid, groups

PERCENTS, QUICK_PERCENTS = (75, 50, 25, 10, 5, 2), (50, 25, 10, 5)
SHAPE = {"batch": 1, "heads": 4, "head_dim": 64}
METHODS = tuple(
    spec
    for spec in cases.OPERATOR_METHODS
    if "+" not in spec
    and spec.partition(":")[0] not in ("dense", "linformer", "nystrom", "performer", "linear", "prefix_lm", "documents")
)
QUICK_METHODS = tuple(spec for spec in METHODS if spec.partition(":")[0] in ("sliding_window", "axial", "longformer"))


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Time under the mask beside exact attention and torch SDPA without one, in one alternation.

    `config`: pattern ("random", "window"), percent, seqlen, mode ("fwd", "fwd_bwd"), dtype, batch, heads, head_dim,
    budget_s, threads, seed.
    """
    length = config["seqlen"]
    if config["percent"] is None:
        return _method_cell(config)
    started = time.perf_counter()
    mask = _mask(config["pattern"], length, config["percent"] / 100, config["seed"])
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
    ideal = mask.density * times["dense"]["ms"]
    return {
        **beside(times, "sparse", ("dense", "sdpa")),
        "density": round(mask.density, 6),
        "visited": round(visited(mask) / math.prod(mask.shape), 6),
        "parts": 1,
        "ideal_ms": float(f"{ideal:.5g}"),
        "efficiency": round(ideal / times["sparse"]["ms"], 4),
        "plan_ms": plan_ms,
        "mask_bytes": mask.nbytes,
    }


def _method_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a method, `pattern` its spec."""
    method, length = parse(config["pattern"]), config["seqlen"]
    shape = {key: config[key] for key in ("batch", "heads", "head_dim")}
    qkv = inputs.photograph_qkv(length, dtype=getattr(torch, config["dtype"]), **shape)
    started = time.perf_counter()
    mask = _mask_of(method, *qkv)
    plan_ms = round((time.perf_counter() - started) * 1e3, 4)
    bound = binder(config["mode"], qkv)
    calls = {
        "sparse": bound(lambda q, k, v: method.attend(q, k, v)[0]),
        "dense": bound(lambda q, k, v: attention(q, k, v)),
        "sdpa": bound(peers.sdpa),
    }
    times = clock.interleaved(calls, config["budget_s"])
    ideal = mask.density * times["dense"]["ms"]
    return {
        **beside(times, "sparse", ("dense", "sdpa")),
        "density": round(mask.density, 6),
        "visited": round(visited(mask) / math.prod(mask.shape), 6),
        "parts": 1 if mask.union is None else len(mask.union),
        "ideal_ms": float(f"{ideal:.5g}"),
        "efficiency": round(ideal / times["sparse"]["ms"], 4),
        "plan_ms": plan_ms,
        "mask_bytes": mask.nbytes,
    }


def _mask_of(method: Sparse, query: Tensor, key: Tensor, value: Tensor) -> BlockMask:
    """What the method attends by."""
    if not isinstance(method.pattern, BucketPattern):
        return method.pattern.for_inputs(query, key)
    query, key, _ = bucketed_inputs(method.pattern, query, key, value, None)
    found = method.pattern.buckets(query, key)
    return sorted_mask(found, rounds=method.pattern.rounds, offset=None, others=method.pattern.shared_qk)


def _mask(pattern: str, length: int, density: float, seed: int) -> BlockMask:
    if pattern == "random":
        return inputs.random_blocks(length, length, density, seed=seed)
    # A window of w keys to either side sees (2 w + 1) N - w (w + 1) of the N^2 pairs; solved for w.
    side = round(length * (1 - (1 - density) ** 0.5) - 0.5)
    return SlidingWindow(left=max(side, 0), right=max(side, 0)).block_mask(length, length)


def configs(options: Options) -> Iterable[dict[str, Any]]:
    lengths = options.seqlens or ((2048,) if options.quick else (2048, 8192))
    percents = QUICK_PERCENTS if options.quick else PERCENTS
    modes = tuple(mode for mode in options.modes or ("fwd", "fwd_bwd") if mode != "decode")
    axes: dict[str, Any] = {"seqlen": lengths, "mode": modes, "pattern": ("random", "window"), "percent": percents}
    if not options.methods:
        yield from grid(**axes, dtype=options.dtypes, **SHAPE, **options.common())
    for length in options.seqlens or ((4096,) if options.quick else (4096, 16384)):
        specs = options.methods or (QUICK_METHODS if options.quick else METHODS)
        axes = {"seqlen": length, "mode": modes, "pattern": specs, "percent": None}
        yield from grid(**axes, dtype=options.dtypes, **SHAPE, **options.common())


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    for (mode,), group in groups(rows, "mode").items():
        drawn = [row for row in group if row["pattern"] == "random"]
        longest = max((row["seqlen"] for row in drawn), default=0)
        here = [row for row in drawn if row["seqlen"] == longest]
        if here:
            least, most = (pick(here, key=lambda row: row["efficiency"]) for pick in (min, max))
            low, high = (f"{row['efficiency']:.0%} (density {row['density']:.2f})" for row in (least, most))
            text = f"Random blocks at N = {longest}, {mode}: {low} to {high} of the ideal, density x dense time."
            found.append(Claim(text, (least["id"], most["id"])))
        slower = [row for row in group if row["percent"] is None and row["speedup_dense"] < 1]
        for row in slower:
            text = (
                f"{row['pattern']} does not pay at N = {row['seqlen']}, {mode}: {1 / row['speedup_dense']:.2f} of the "
            )
            found.append(Claim(f"{text}time of exact attention.", (row["id"],)))
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
        Column("visited", "visited", "share"),
        Column("parts", "parts", "integer"),
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
