"""Suite `memory`: peak extra memory of one call against its length, the check that sparse attention needs O(n)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from efficient_attn.measuring import clock
from efficient_attn.measuring.fit import fit

from .. import cases
from . import Chart, Claim, Column, Options, Row, Suite, grid, groups
from .ops import bound


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Peak bytes above the inputs of planning and running the method of `config` once.

    `config`: method (spec), seqlen, mode ("fwd", "fwd_bwd"), dtype, batch, heads, head_dim, threads.
    """
    call = bound(config)
    call.warm_up()
    with clock.PeakMemory() as peak:
        call()
    return {"peak_bytes": peak.bytes, "bytes_per_token": round(peak.bytes / config["seqlen"], 1)}


def configs(options: Options) -> Iterable[dict[str, Any]]:
    lengths = options.seqlens or (cases.QUICK_MEMORY_LENGTHS if options.quick else cases.MEMORY_LENGTHS)
    common = {key: value for key, value in options.common().items() if key != "budget_s"}
    return grid(method=options.specs(cases.MEMORY_METHODS), seqlen=lengths, **cases.MEMORY_SHAPE, **common)


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    for (method,), group in groups(rows, "method").items():
        if len({row["seqlen"] for row in group}) > 1:
            slope = fit([r["seqlen"] for r in group], [max(r["peak_bytes"], 1) for r in group]).exponent
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
