"""Suite ``memory``: peak extra memory of one call against its length, the check that sparse attention needs O(n)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from efficient_attn.measuring import clock, inputs
from efficient_attn.measuring.calls import WARM_UP_LENGTH, binder, shaped, sized

from .. import cases
from . import Chart, Claim, Column, Options, Row, Suite, grid


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Peak bytes above the inputs of planning and running ``config``'s method once.

    ``config``: method (spec), seqlen, mode ("fwd", "fwd_bwd"), dtype, batch, heads, head_dim, threads.
    """
    torch.manual_seed(0)
    method = sized(config["method"], config["seqlen"])
    heads, head_dim, dtype = config["heads"], config["head_dim"], getattr(torch, config["dtype"])
    state = method.build(heads * head_dim, heads, head_dim, dtype=dtype)
    qkv = inputs.photograph_qkv(config["seqlen"], batch=config["batch"], heads=heads, head_dim=head_dim, dtype=dtype)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = shaped(method, query.shape[2]).attend(query, key, value, state=state)[0]
        return out

    binder(config["mode"], [t[:, :, :WARM_UP_LENGTH] for t in qkv], state)(attend)()
    call = binder(config["mode"], qkv, state)(attend)
    with clock.PeakMemory() as peak:
        call()
    return {"peak_bytes": peak.bytes, "bytes_per_token": round(peak.bytes / config["seqlen"], 1)}


def fitted_exponent(lengths: Sequence[int], peaks: Sequence[int]) -> float:
    """The least-squares slope of log(peak) over log(length): 1 for memory linear in the length, 2 for quadratic."""
    x, y = [math.log(n) for n in lengths], [math.log(max(p, 1)) for p in peaks]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def configs(options: Options) -> Iterable[dict[str, Any]]:
    lengths = options.seqlens or (cases.QUICK_MEMORY_LENGTHS if options.quick else cases.MEMORY_LENGTHS)
    common = {key: value for key, value in options.common().items() if key != "budget_s"}
    return grid(method=options.specs(cases.MEMORY_METHODS), seqlen=lengths, **cases.MEMORY_SHAPE, **common)


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        group = [row for row in rows if row["method"] == method]
        if len({row["seqlen"] for row in group}) > 1:
            slope = fitted_exponent([r["seqlen"] for r in group], [r["peak_bytes"] for r in group])
            text = f"Extra memory of {method}, forward and backward, grows as N^{slope:.2f}."
            found.append(Claim(text, tuple(row["id"] for row in group)))
    return found


SUITE = Suite(
    name="memory",
    about="Peak resident memory of one call above its inputs, plan included, in a fresh process.",
    configs=configs,
    run_cell=run_cell,
    key=(Column("method", "method", "text"), Column("N", "seqlen", "integer")),
    columns=(Column("MiB", "peak_bytes", "mib"), Column("bytes a token", "bytes_per_token", "integer")),
    charts=(Chart("Peak extra memory", "seqlen", "peak_mib", "sequence length", "MiB", split=("mode",)),),
    claims=claims,
)
