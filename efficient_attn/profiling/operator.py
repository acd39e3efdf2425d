"""One attention method at one length, in a worker process: a suite of the benchmark runner.

Memory is measured first, while nothing else has run, then time (beside dense attention, in alternation, while that is
affordable), then operations and bytes, and last the phases, since profiling leaves its own memory behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, hybrid, methods
from ..masks import BlockMask
from ..measuring import clock
from ..measuring.calls import UNPLANNED, shaped, sized
from ..patterns import Pattern
from . import activations, counts, phases

WARM_UP_LENGTH = 256
PROFILED_S = 1.0  # how long the phases are looked at, one call at least


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of one cell.

    ``config``: method (spec), seqlen, mode ("fwd", "fwd_bwd"), causal, dtype, batch, heads, kv_heads, head_dim, seed,
    threads, budget_s, dense (whether to time dense attention beside it), and optionally trace (a path), error (whether
    to compare with dense attention in float64), activations (see `activations.load`).
    """
    layers = activations.load(config)
    calls = [Bound(config["method"], layer, config) for layer in layers]
    for call in calls:
        call.warm_up()
    with clock.PeakMemory() as peak:
        plans = [call.plan() for call in calls]
        for call in calls:
            call()
    result: dict[str, Any] = {
        "peak_bytes": peak.bytes,
        "input_bytes": sum(t.numel() * t.element_size() for call in calls for t in call.tensors),
        **_joined(plans),
    }
    if config.get("error"):
        result |= error_of(calls, config)

    timed: dict[str, Callable[[], object]] = {"method": lambda: [call() for call in calls]}
    if config["dense"] and methods.parse(config["method"]) != methods.Dense():
        dense = [Bound("dense", layer, config) for layer in layers]
        timed["dense"] = lambda: [call() for call in dense]
    times = clock.interleaved(timed, config["budget_s"])
    result |= times["method"]
    if "dense" in times:
        result |= {"dense_ms": times["dense"]["ms"], "dense_spread": times["dense"]["spread"]}

    result |= counts.count(timed["method"]).as_dict()
    trace = config.get("trace")
    rounds = max(1, min(10, int(PROFILED_S * 1e3 / result["ms"])))
    shares, _ = phases.profiled(timed["method"], rounds, None if trace is None else Path(trace), inside="other")
    return {**result, "phases": {name: round(share, 4) for name, share in shares.items() if name != "rest"}}


class Bound:
    """A method bound to one layer's query, key and value: calling it runs forward, or forward and backward."""

    def __init__(self, spec: str, layer: activations.Layer, config: Mapping[str, Any]) -> None:
        self.layer = layer
        heads, _, head_dim = layer.query.shape[1:]
        self.method = shaped(sized(spec, layer.key.shape[2]), layer.query.shape[2])
        self.state: nn.Module | None = self.method.build(heads * head_dim, heads, head_dim, dtype=layer.query.dtype)
        self.backward = config["mode"] == "fwd_bwd"
        self.tensors = [t.detach().clone().requires_grad_() if self.backward else t for t in layer.qkv]
        self.parameters = [] if self.state is None else [p for p in self.state.parameters() if p.requires_grad]
        self.grad_out = layer.value_like_output() if self.backward else None

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """The method's output on other tensors of the same kind."""
        query, key, value = tensors
        options = self.layer.options(query.shape[2])
        out: Tensor = self.method.attend(query, key, value, state=self.state, **options)[0]
        return out

    def __call__(self) -> object:
        if not self.backward:
            with torch.no_grad():
                return self.forward(self.tensors)
        inputs = [*self.tensors, *self.parameters]
        return torch.autograd.grad(self.forward(self.tensors), inputs, self.grad_out, allow_unused=True)

    def warm_up(self) -> None:
        """Thread pools, code pages and caches of the library are not a call's memory."""
        if self.layer.is_plain:
            short = [t.detach()[:, :, :WARM_UP_LENGTH].requires_grad_(self.backward) for t in self.tensors]
            method = shaped(self.method, short[0].shape[2])
            out = method.attend(*short, state=self.state, **self.layer.options(short[0].shape[2]))[0]
            if self.backward:
                torch.autograd.grad(out, short, torch.ones_like(out), allow_unused=True)

    def plan(self) -> dict[str, Any]:
        """Make the mask as a first call does, and say what that cost; nothing for methods without one."""
        started = time.perf_counter()
        masks = planned(self.method, self.layer)
        if not masks:
            return {}
        spent = (time.perf_counter() - started) * 1e3
        return {"plan_ms": spent, "density": masks[0].density, "mask_bytes": sum(mask.nbytes for mask in masks)}


def planned(method: methods.Method, layer: activations.Layer) -> list[BlockMask]:
    """The masks that a method makes before it attends, that of the exact pairs first."""
    options = layer.options(layer.query.shape[2])
    causal = functional.causal_mask(
        layer.query.shape[2], layer.key.shape[2], options["is_causal"], options["causal_alignment"]
    )
    if isinstance(method, methods.Hybrid):
        pairs = {name: options[name] for name in ("mask", "is_causal", "causal_alignment", "key_mask", "scale")}
        split = hybrid.plan(method.sparse, layer.query, layer.key, method.tail.block, **pairs)
        return [split.exact, split.over_blocks]
    if not isinstance(method, Pattern) or method.name in UNPLANNED:
        return []
    within = causal if method.by_content else None
    found = method.for_inputs(
        layer.query, layer.key, scale=options["scale"], key_mask=options["key_mask"], within=within
    )
    return [found if causal is None else found & causal]


def error_of(calls: Sequence[Bound], config: Mapping[str, Any]) -> dict[str, Any]:
    """Errors relative to dense attention in float64 over a sample of queries: the worst layer's, and all of them."""
    with torch.no_grad():
        found = [activations.relative_error(call.forward(call.layer.qkv), call.layer) for call in calls]
    return {"error": max(found), "errors": found}


def _joined(plans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    made = [plan for plan in plans if plan]
    if not made:
        return {}
    return {
        "plan_ms": round(sum(plan["plan_ms"] for plan in made), 4),
        "density": round(sum(plan["density"] for plan in made) / len(made), 6),
        "mask_bytes": sum(plan["mask_bytes"] for plan in made),
    }
