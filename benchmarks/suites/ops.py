"""Suite ``ops``: one method as an operator on real activations, beside exact attention in the same run.

Forward, forward and backward, and decoding: one query at the end of a cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efficient_attn import functional, hybrid, methods
from efficient_attn.errors import EfficientAttnError
from efficient_attn.masks import BlockMask
from efficient_attn.measuring import clock, inputs
from efficient_attn.measuring.calls import (
    UNPLANNED,
    WARM_UP_LENGTH,
    Call,
    binder,
    planned,
    relative_error,
    shaped,
    sized,
)
from efficient_attn.patterns import Pattern

from .. import cases, peers
from . import Chart, Claim, Column, Options, Row, Suite, grid


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of one cell: memory first, while nothing else has run here, then error, then interleaved times.

    ``config``: method (spec), seqlen, mode ("fwd", "fwd_bwd", "decode"), causal, dtype, batch, heads, head_dim,
    budget_s, threads, and at choice backend.
    """
    torch.manual_seed(config.get("seed", 0))
    method = sized(config["method"], config["seqlen"])
    heads, head_dim, dtype = config["heads"], config["head_dim"], getattr(torch, config["dtype"])
    decodes = config["mode"] == "decode"
    causal = not decodes and (config["causal"] or method.name == "causal")
    state = method.build(heads * head_dim, heads, head_dim, dtype=dtype)
    qkv = inputs.photograph_qkv(config["seqlen"], batch=config["batch"], heads=heads, head_dim=head_dim, dtype=dtype)
    options: dict[str, Any] = {"is_causal": config["causal"], "backend": config.get("backend", "auto")}
    if decodes:
        qkv = (qkv[0][:, :, -1:].contiguous(), *qkv[1:])
        options |= {"is_causal": True, "causal_alignment": "bottom_right"}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        fitted = shaped(method, key.shape[2])
        out: Tensor = fitted.attend(query, key, value, state=state, **options)[0]
        return out

    bound = binder(config["mode"], qkv, state)
    # Thread pools, code pages and caches of the library are not this call's memory.
    warm_up = [t[:, :, :WARM_UP_LENGTH] for t in qkv]
    try:
        binder(config["mode"], warm_up, state)(attend)()
    except EfficientAttnError as error:
        if decodes:  # "defined for self-attention"
            raise NotImplementedError(f"one query alone: {error}") from error
        raise

    with clock.PeakMemory() as peak:
        plan = {} if decodes else _plan(method, qkv, causal=config["causal"])
        call = bound(attend)
        call()

    with torch.no_grad():
        error = relative_error(attend(*qkv), *qkv, causal=causal)
    calls: dict[str, Call] = {"method": call}
    if method.name not in ("dense", "causal"):
        calls["dense"] = bound(lambda q, k, v: functional.attention(q, k, v, is_causal=causal))
    calls["sdpa"] = bound(lambda q, k, v: peers.sdpa(q, k, v, is_causal=causal))
    times = clock.interleaved(calls, config["budget_s"])
    ours = times["method"]["ms"]
    dense = times.get("dense", times["method"])
    return {
        **times["method"],
        "dense_ms": dense["ms"],
        "sdpa_ms": times["sdpa"]["ms"],
        "reference_times": times["sdpa"]["times"],
        "speedup_dense": round(dense["ms"] / ours, 4),
        "speedup_sdpa": round(times["sdpa"]["ms"] / ours, 4),
        "peak_bytes": peak.bytes,
        "error": error,
        **plan,
    }


def _plan(method: methods.Method, qkv: Sequence[Tensor], *, causal: bool) -> dict[str, Any]:
    """Makes the masks of a sparse method once, which a later call finds made: how long, how dense, how large."""
    started = time.perf_counter()
    masks: list[BlockMask] = []  # the first is that of the exact pairs
    if isinstance(method, methods.Hybrid):
        split = hybrid.plan(method.sparse, qkv[0], qkv[1], method.tail.block, is_causal=causal)
        masks = [split.exact, split.over_blocks]
    elif isinstance(method, Pattern) and method.name not in UNPLANNED:
        masks = [planned(method, *qkv[:2])]
    if not masks:
        return {}
    return {
        "plan_ms": round((time.perf_counter() - started) * 1e3, 4),
        "density": round(masks[0].density, 6),
        "mask_bytes": sum(mask.nbytes for mask in masks),
    }


def configs(options: Options) -> Iterable[dict[str, Any]]:
    """Short sequences first, so that an interrupted run has covered every method."""
    lengths = options.seqlens or (cases.QUICK_SEQLENS if options.quick else cases.SEQLENS)
    shape = {"dtype": options.dtypes, **cases.OPERATOR_SHAPE, "causal": options.causal, "backend": options.backend}
    for seqlen in lengths:
        for mode in options.modes or cases.MODES:
            specs = options.specs(cases.OPERATOR_METHODS)
            if mode == "decode" and not options.methods:
                specs = tuple(spec for spec in specs if spec.partition(":")[0] in cases.DECODES and "+" not in spec)
            yield from grid(seqlen=seqlen, mode=mode, method=specs, **shape, **options.common())


def claims(rows: Sequence[Row]) -> list[Claim]:
    """For each mode, at its longest sequence: the fastest exact and approximate methods beside exact attention."""
    found = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        longest = max(row["seqlen"] for row in rows if row["mode"] == mode)
        here = [row for row in rows if (row["mode"], row["seqlen"]) == (mode, longest)]
        for row in here:
            if row["method"] == "dense":
                text = f"Our exact attention takes {1 / row['speedup_sdpa']:.2f} of torch SDPA's time"
                found.append(Claim(f"{text} at N = {longest}, {mode} ({row['ms']:.3g} ms).", (row["id"],)))
        named: set[str] = set()
        for limit in (0.05, 0.2):
            near = [row for row in here if row["error"] <= limit and row["method"] != "dense"]
            best = max(near, key=lambda row: row["speedup_dense"], default=None)
            if best is None or best["speedup_dense"] <= 1 or best["id"] in named:
                continue
            named.add(best["id"])
            text = f"Within {limit:.0%} of exact attention, the fastest at N = {longest}, {mode}, is {best['method']}"
            text += f": {best['speedup_dense']:.1f}x the speed of exact attention at an error of {best['error']:.1%}."
            found.append(Claim(text, (best["id"],)))
    return found


SUITE = Suite(
    name="ops",
    about="One method as an operator on photograph patches; projections untrained. Exact attention, ours and torch "
    "SDPA's, is timed in the same alternation; the error is relative to exact attention in float64.",
    configs=configs,
    run_cell=run_cell,
    key=(Column("method", "method", "text"), Column("N", "seqlen", "integer"), Column("mode", "mode", "text")),
    columns=(
        Column("ms", "ms", "ms"),
        Column("vs dense", "speedup_dense", "times"),
        Column("vs SDPA", "speedup_sdpa", "times"),
        Column("plan ms", "plan_ms", "ms"),
        Column("MiB", "peak_bytes", "mib"),
        Column("density", "density", "share"),
        Column("error", "error", "error"),
    ),
    charts=(
        Chart("Time against length", "seqlen", "ms", "sequence length", "ms", split=("mode", "dtype"),
              references=(("sdpa_ms", "torch SDPA"),)),
        Chart("Peak extra memory", "seqlen", "peak_mib", "sequence length", "MiB", split=("mode", "dtype")),
        Chart("Error against speed", "speedup_dense", "error", "speed-up over our exact attention", "relative error",
              split=("mode", "dtype"), order="seqlen"),
    ),
    claims=claims,
)  # fmt: skip
