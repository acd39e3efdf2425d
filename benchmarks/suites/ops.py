"""Suite `ops`: one method as an operator on real activations, beside exact attention in the same run.

Forward, forward and backward, and decoding: one query at the end of a cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efficient_attn import functional
from efficient_attn.errors import EfficientAttnError
from efficient_attn.measuring import clock, inputs
from efficient_attn.measuring.calls import Bound, Call, Layer, binder

from .. import cases, peers
from . import Chart, Claim, Column, Options, Row, Suite, beside, grid, groups


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of one cell: memory first, while nothing else has run here, then error, then interleaved times.

    `config`: method (spec), seqlen, mode ("fwd", "fwd_bwd", "decode"), causal, dtype, batch, heads, head_dim,
    budget_s, threads, and optionally backend.
    """
    call = bound(config)
    untimed = _untimed(call, config)
    times = clock.interleaved({"method": call, **_exact(call, config)}, config["budget_s"])
    return {**beside(times, "method", ("sdpa", "dense")), **untimed}


def run_together(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | BaseException]:
    """Metrics of several methods on the same inputs in one alternation, for the time of one exact attention and one of
    PyTorch's; what a method raises instead is its result."""
    qkv = _inputs(configs[0])
    found: list[Any] = []
    for config in configs:
        try:
            call = bound(config, qkv)
            found.append((call, _untimed(call, config)))
        except Exception as error:
            found.append(error)
    ready = {c["method"]: one[0] for c, one in zip(configs, found, strict=True) if isinstance(one, tuple)}
    if not ready:
        return found
    first = configs[0]
    # Our exact attention is timed once, also where it is one of the methods.
    exact = {k: v for k, v in _exact(next(iter(ready.values())), first).items() if k not in ready}
    timed = clock.interleaved({**ready, **exact}, first["budget_s"] * (len(ready) + len(exact)))
    return [
        one if isinstance(one, BaseException) else {**beside(timed, config["method"], ("sdpa", "dense")), **one[1]}
        for config, one in zip(configs, found, strict=True)
    ]


def _untimed(call: Bound, config: Mapping[str, Any]) -> dict[str, Any]:
    """Peak memory of a first call with its plan, and the error."""
    try:
        call.warm_up()
    except EfficientAttnError as error:
        if config["mode"] == "decode":  # "cannot be causal"
            raise NotImplementedError(f"one query alone: {error}") from error
        raise
    with clock.PeakMemory() as peak:
        plan = call.plan()
        call()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small operations, whose threads would wait for each other on a busy machine
    try:
        error = call.error(dataclasses.replace(call.layer, is_causal=_is_causal(call, config), causal_alignment=None))
    finally:
        torch.set_num_threads(threads)
    return {"peak_bytes": peak.bytes, "error": error, **plan}


def _is_causal(call: Bound, config: Mapping[str, Any]) -> bool:
    return config["mode"] != "decode" and (config.get("causal", False) or call.method.name == "causal")


def _exact(call: Bound, config: Mapping[str, Any]) -> dict[str, Call]:
    """Exact attention on the inputs of a call: ours, where the call is not that itself, and PyTorch's."""
    exact, causal = binder(config["mode"], call.layer.qkv), _is_causal(call, config)
    calls: dict[str, Call] = {}
    if call.method.name not in ("dense", "causal"):
        calls["dense"] = exact(lambda q, k, v: functional.attention(q, k, v, is_causal=causal))
    calls["sdpa"] = exact(lambda q, k, v: peers.sdpa(q, k, v, is_causal=causal))
    return calls


def _inputs(config: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    shape = {name: config[name] for name in ("batch", "heads", "head_dim")}
    return inputs.photograph_qkv(config["seqlen"], **shape, dtype=getattr(torch, config["dtype"]))


def bound(config: Mapping[str, Any], qkv: tuple[Tensor, Tensor, Tensor] | None = None) -> Bound:
    """The method of a cell on query, key and value (B, H, N, D) of photographs; to decode, on the last query alone."""
    query, key, value = qkv or _inputs(config)
    torch.manual_seed(config.get("seed", 0))  # a method's parameters are those that it has alone
    if config["mode"] == "decode":
        layer = Layer(query[:, :, -1:].contiguous(), key, value, is_causal=True, causal_alignment="bottom_right")
    else:
        layer = Layer(query, key, value, is_causal=config.get("causal", False))
    return Bound(config["method"], layer, config["mode"], backend=config.get("backend", "auto"))


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
    run_together=run_together,
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
