"""Suite `million`: a call on a million tokens, where exact attention would take hours: time, memory, tokens a second.

Random activations: what a window or a linear method does does not depend on them, and there is nothing exact to
compare with. What exact attention would take follows from its time at `BESIDE` tokens, which is quadratic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from efficient_attn import functional
from efficient_attn.measuring import clock
from efficient_attn.measuring.calls import Bound, Layer

from .. import cases
from . import Chart, Claim, Column, Options, Row, Suite, grid

BESIDE = 4096


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`: method (spec), seqlen, mode, batch, heads, head_dim, dtype, budget_s, threads, seed."""
    torch.manual_seed(config["seed"])
    shape = config["batch"], config["heads"], config["seqlen"], config["head_dim"]
    layer = Layer(*(torch.randn(shape, dtype=getattr(torch, config["dtype"])) for _ in range(3)))
    call = Bound(config["method"], layer, config["mode"])
    call.warm_up()
    with clock.PeakMemory() as peak:
        plan = call.plan()
        call()
    times = clock.interleaved({"method": call}, config["budget_s"], patience_s=3 * clock.PATIENCE * config["budget_s"])
    short = [x[:, :, :BESIDE].contiguous() for x in layer.qkv]
    exact = clock.interleaved({"dense": lambda: functional.attention(*short)}, config["budget_s"])["dense"]["ms"]
    ms = times["method"]["ms"]
    tokens = short[0].shape[2]
    return {
        **times["method"],
        **plan,
        "peak_bytes": peak.bytes,
        "input_bytes": sum(x.nbytes for x in layer.qkv),
        "tokens_per_s": round(config["batch"] * config["seqlen"] / ms * 1e3),
        "dense_predicted_ms": float(f"{exact * (config['seqlen'] / tokens) ** 2:.3g}"),
    }


def configs(options: Options) -> Iterable[dict[str, Any]]:
    tokens = cases.QUICK_MILLION_TOKENS if options.quick else cases.MILLION_TOKENS
    modes = tuple(mode for mode in options.modes or ("fwd",) if mode != "decode") or ("fwd",)
    lengths = options.seqlens or (tokens,)
    return grid(seqlen=lengths, mode=modes, method=options.methods or cases.MILLION_METHODS, **cases.MILLION_SHAPE,
                **options.common())  # fmt: skip


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    for row in rows[:1]:
        minutes = row["dense_predicted_ms"] / 6e4
        text = f"{row['seqlen']:,} tokens take {row['ms'] / 1e3:.2g} s with {row['method']} on {row['threads']} threads"
        text += f" (one head, {row['mode']}); our exact attention would take {minutes:.2g} minutes."
        found.append(Claim(text, (row["id"],)))
    return found


SUITE = Suite(
    name="million",
    about="One call on random activations, one head. exact: what exact attention would take, from its time at "
    f"{BESIDE} tokens and its square growth. MiB: peak memory of a call above its inputs, the mask included.",
    configs=configs,
    run_cell=run_cell,
    key=(Column("method", "method", "text"), Column("N", "seqlen", "integer"), Column("mode", "mode", "text")),
    columns=(
        Column("ms", "ms", "ms"),
        Column("tokens/s", "tokens_per_s", "integer"),
        Column("plan ms", "plan_ms", "ms"),
        Column("MiB", "peak_bytes", "mib"),
        Column("exact, ms", "dense_predicted_ms", "ms"),
    ),
    charts=(
        Chart("A call on very many tokens", "seqlen", "ms", "sequence length", "ms",
              references=(("dense_predicted_ms", "exact, predicted"),), split=("mode",)),
    ),
    claims=claims,
)  # fmt: skip
