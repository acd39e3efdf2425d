"""One attention method at one length, in a worker process: a suite of the benchmark runner.

Memory is measured first, while nothing else has run, then time (beside dense attention, in alternation, while that is
affordable), then operations and bytes, and last the phases, since profiling leaves its own memory behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import methods
from ..measuring import clock
from ..measuring.calls import Bound
from . import activations, counts, phases

PROFILED_S = 1.0  # how long the phases are looked at, one call at least


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of one cell.

    `config`: method (spec), seqlen, mode ("fwd", "fwd_bwd"), causal, dtype, batch, heads, kv_heads, head_dim, seed,
    threads, budget_s, dense (whether to time dense attention beside it), and optionally trace (a path), error (whether
    to compare with dense attention in float64), activations (see `activations.load`).
    """
    layers = activations.load(config)
    calls = [Bound(config["method"], layer, config["mode"]) for layer in layers]
    for call in calls:
        call.warm_up()
    with clock.PeakMemory() as peak:
        plans = [call.plan() for call in calls]
        for call in calls:
            call()
    result: dict[str, Any] = {
        "peak_bytes": peak.bytes,
        "input_bytes": sum(t.nbytes for layer in layers for t in layer.qkv),
        **_joined(plans),
    }
    if config.get("error"):
        errors = [call.error() for call in calls]
        result |= {"error": max(errors), "errors": errors}

    timed: dict[str, Callable[[], object]] = {"method": lambda: [call() for call in calls]}
    if config["dense"] and not methods.parse(config["method"]).is_dense:
        dense = [Bound("dense", layer, config["mode"]) for layer in layers]
        timed["dense"] = lambda: [call() for call in dense]
    times = clock.interleaved(timed, config["budget_s"])
    result |= times["method"]
    if "dense" in times:
        result |= {f"dense_{name}": times["dense"][name] for name in ("ms", "spread", "unsure")}

    result |= counts.count(timed["method"]).as_dict()
    trace = config.get("trace")
    rounds = max(1, min(10, int(PROFILED_S * 1e3 / result["ms"])))
    shares, _ = phases.profiled(timed["method"], rounds, None if trace is None else Path(trace), inside="other")
    return {**result, "phases": {name: round(share, 4) for name, share in shares.items() if name != "rest"}}


def _joined(plans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    made = [plan for plan in plans if plan]
    if not made:
        return {}
    return {
        "plan_ms": round(sum(plan["plan_ms"] for plan in made), 4),
        "density": round(sum(plan["density"] for plan in made) / len(made), 6),
        "mask_bytes": sum(plan["mask_bytes"] for plan in made),
    }
