"""Suite `ops`: one method as an operator on real activations, beside exact attention in the same run.

Forward, forward and backward, and decoding: one query at the end of a cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efficient_attn import functional, hybrid, methods
from efficient_attn.errors import EfficientAttnError
from efficient_attn.masks import BlockMask
from efficient_attn.measuring import clock, inputs
from efficient_attn.measuring.calls import (
    UNPLANNED,
    WARM_UP_LENGTH,
    Call,
    Operator,
    binder,
    planned,
    relative_error,
    shaped,
    sized,
)
from efficient_attn.methods.continuation import continuation
from efficient_attn.patterns import Pattern

from .. import cases, peers
from . import Chart, Claim, Column, Options, Row, Suite, beside, grid, groups


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of one cell: memory first, while nothing else has run here, then error, then interleaved times.

    `config`: method (spec), seqlen, mode ("fwd", "fwd_bwd", "decode"), causal, dtype, batch, heads, head_dim,
    budget_s, threads, and optionally backend.
    """
    method, state, qkv = prepared(config)
    decodes = config["mode"] == "decode"
    causal = not decodes and (config["causal"] or method.name == "causal")
    warm_up(config, method, state, qkv)
    bound = binder(config["mode"], qkv, state)
    with clock.PeakMemory() as peak:
        started = time.perf_counter()
        masks = [] if decodes else _masks(method, qkv, causal=config["causal"])
        attend, mask = operator(config, method, state, qkv)
        plan = _plan([mask] if mask is not None else masks, started)
        call = bound(attend)
        call()
    with torch.no_grad():
        error = relative_error(attend(*qkv), *qkv, causal=causal)
    calls: dict[str, Call] = {"method": call}
    if method.name not in ("dense", "causal"):
        calls["dense"] = bound(lambda q, k, v: functional.attention(q, k, v, is_causal=causal))
    calls["sdpa"] = bound(lambda q, k, v: peers.sdpa(q, k, v, is_causal=causal))
    times = clock.interleaved(calls, config["budget_s"])
    return {**beside(times, "method", ("sdpa", "dense")), "peak_bytes": peak.bytes, "error": error, **plan}


def prepared(config: Mapping[str, Any]) -> tuple[methods.Method, nn.Module | None, tuple[Tensor, Tensor, Tensor]]:
    """The method of a cell, its state, and query, key and value (B, H, N, D); to decode, the last query alone."""
    torch.manual_seed(config.get("seed", 0))
    method = sized(config["method"], config["seqlen"])
    heads, head_dim, dtype = config["heads"], config["head_dim"], getattr(torch, config["dtype"])
    state = method.build(heads * head_dim, heads, head_dim, dtype=dtype)
    query, key, value = inputs.photograph_qkv(
        config["seqlen"], batch=config["batch"], heads=heads, head_dim=head_dim, dtype=dtype
    )
    return method, state, (query[:, :, -1:].contiguous() if config["mode"] == "decode" else query, key, value)


def operator(
    config: Mapping[str, Any], method: methods.Method, state: nn.Module | None, qkv: Sequence[Tensor]
) -> tuple[Operator, BlockMask | None]:
    """The method as a function of query, key and value; to decode, with the mask that places the query at the end."""
    query, key, _ = qkv
    options: dict[str, Any] = {"is_causal": config.get("causal", False), "backend": config.get("backend", "auto")}
    mask = None
    if config["mode"] == "decode":
        last = key.shape[2] - 1
        heads, device = query.shape[1], query.device
        method, mask = continuation(method, 1, key.shape[2], num_heads=heads, first=last, device=device)
        options |= {"mask": mask, "is_causal": True, "causal_alignment": "bottom_right"}
    else:
        method = shaped(method, key.shape[2])

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return method.attend(query, key, value, state=state, **options)[0]

    return attend, mask


def warm_up(config: Mapping[str, Any], method: methods.Method, state: nn.Module | None, qkv: Sequence[Tensor]) -> None:
    """A short call: thread pools, code pages and caches of the library are not the memory of the call measured."""
    short = [t[:, :, :WARM_UP_LENGTH] for t in qkv]
    try:
        binder(config["mode"], short, state)(operator(config, method, state, short)[0])()
    except EfficientAttnError as error:
        if config["mode"] == "decode":  # "cannot be causal"
            raise NotImplementedError(f"one query alone: {error}") from error
        raise


def _masks(method: methods.Method, qkv: Sequence[Tensor], *, causal: bool) -> list[BlockMask]:
    """The masks that a sparse method makes once, which a later call finds made; the first is of the exact pairs."""
    if isinstance(method, methods.Hybrid):
        split = hybrid.plan(method.sparse, qkv[0], qkv[1], method.tail.block, is_causal=causal)
        return [split.exact, split.over_blocks]
    if isinstance(method, Pattern) and method.name not in UNPLANNED:
        return [planned(method, *qkv[:2])]
    return []


def _plan(masks: Sequence[BlockMask], started: float) -> dict[str, Any]:
    """How long the masks took, how dense and how large they are."""
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
            methods = cases.OPERATOR_METHODS if mode != "decode" else cases.DECODES
            specs = options.specs(tuple(methods))
            yield from grid(seqlen=seqlen, mode=mode, method=specs, **shape, **options.common())


def claims(rows: Sequence[Row]) -> list[Claim]:
    """For each mode, at its longest sequence: the fastest exact and approximate methods beside exact attention."""
    found = []
    for (mode,), group in groups(rows, "mode").items():
        longest = max(row["seqlen"] for row in group)
        here = [row for row in group if row["seqlen"] == longest]
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
    about="One method as an operator on photograph patches; projections untrained. vs: the speed-up over exact "
    "attention, ours and torch SDPA's, in the same alternation. plan: making the mask, once. MiB: peak memory of one "
    "call above its inputs. error: relative to exact attention in float64.",
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
    sections=("seqlen", "mode"),
)  # fmt: skip
