"""Suite ``ops``: one method as an operator on real activations, beside exact attention in the same run."""

from __future__ import annotations

import dataclasses
import math
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efficient_attn import functional, hybrid, methods
from efficient_attn.masks import BlockMask
from efficient_attn.patterns import Pattern

from . import clock, inputs, peers

# The error is taken over this many queries, spread evenly; their exact outputs are computed in float64.
ERROR_ROWS = 256
WARM_UP_LENGTH = 256
UNPLANNED = ("dense", "lsh", "sorted_buckets")  # no mask, or one of sorted tokens, made anew in every call

Call = Callable[[], object]
Operator = Callable[[Tensor, Tensor, Tensor], Tensor]


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of one cell: memory first, while nothing else has run here, then error, then interleaved times.

    ``config``: method (spec), seqlen, mode ("fwd", "fwd_bwd"), causal, dtype, batch, heads, head_dim, budget_s,
    threads.
    """
    torch.manual_seed(0)
    method = sized(config["method"], config["seqlen"])
    heads, head_dim, dtype = config["heads"], config["head_dim"], getattr(torch, config["dtype"])
    causal = config["causal"] or method.name == "causal"
    state = method.build(heads * head_dim, heads, head_dim, dtype=dtype)
    qkv = inputs.photograph_qkv(config["seqlen"], batch=config["batch"], heads=heads, head_dim=head_dim, dtype=dtype)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        fitted = shaped(method, query.shape[2])
        out: Tensor = fitted.attend(query, key, value, state=state, is_causal=config["causal"])[0]
        return out

    bound = binder(config["mode"], qkv, state)
    # Thread pools, code pages and caches of the library are not this call's memory.
    warm_up = [t[:, :, :WARM_UP_LENGTH] for t in qkv]
    binder(config["mode"], warm_up, state)(attend)()

    plan: dict[str, Any] = {}
    with clock.PeakMemory() as peak:
        started = time.perf_counter()
        masks: list[BlockMask] = []  # what a plan makes; the first is that of the exact pairs
        if isinstance(method, methods.Hybrid):
            split = hybrid.plan(method.sparse, qkv[0], qkv[1], method.tail.block, is_causal=config["causal"])
            masks = [split.exact, split.over_blocks]
        elif isinstance(method, Pattern) and method.name not in UNPLANNED:
            masks = [planned(method, *qkv[:2])]
        if masks:
            plan = {
                "plan_ms": round((time.perf_counter() - started) * 1e3, 4),
                "density": round(masks[0].density, 6),
                "mask_bytes": sum(mask.nbytes for mask in masks),
            }
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
        "speedup_dense": round(dense["ms"] / ours, 4),
        "speedup_sdpa": round(times["sdpa"]["ms"] / ours, 4),
        "peak_bytes": peak.bytes,
        "error": error,
        **plan,
    }


def sized(spec: str, length: int) -> methods.Method:
    """The method of a spec; learned projections over positions (Linformer's) are made as long as the sequence."""
    method: Any = methods.parse(spec)
    resized: methods.Method = dataclasses.replace(method, max_len=length) if hasattr(method, "max_len") else method
    return resized


def shaped(method: methods.Method, length: int) -> methods.Method:
    """The method for so many tokens; an image that is no square becomes the rectangle nearest to one."""
    if getattr(method, "size", 0) is not None or getattr(method, "axes", 2) != 2 or math.isqrt(length) ** 2 == length:
        return method
    height = next(h for h in range(math.isqrt(length), 0, -1) if length % h == 0)
    resized: methods.Method = dataclasses.replace(typing.cast(Any, method), size=(height, length // height))
    return resized


def planned(method: methods.Method, query: Tensor, key: Tensor) -> BlockMask:
    """The mask that a sparse method makes before it attends."""
    pattern = typing.cast(Pattern, shaped(method, query.shape[2]))
    return pattern.for_inputs(query, key)


def relative_error(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> float:
    """|out - exact| / |exact| (Frobenius) over ``ERROR_ROWS`` queries, exact being dense attention in float64."""
    length = query.shape[2]
    rows = torch.linspace(0, length - 1, min(length, ERROR_ROWS)).round().long()
    scores = query[:, :, rows].double() @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.arange(length) > rows[:, None], -torch.inf)
    exact = scores.softmax(dim=-1) @ value.double()
    return float(f"{((out[:, :, rows].double() - exact).norm() / exact.norm()).item():.3g}")


def binder(mode: str, qkv: Sequence[Tensor], state: nn.Module | None = None) -> Callable[[Operator], Call]:
    """Binds an operator to the inputs: a call of no arguments that runs forward, or forward and backward."""
    if mode == "fwd":
        return lambda operator: torch.no_grad()(lambda: operator(*qkv))
    leaves = [t.detach().clone().requires_grad_() for t in qkv]
    parameters = [] if state is None else [p for p in state.parameters() if p.requires_grad]
    grad_out = qkv[0].roll(1, dims=2)  # as structured as the inputs; out has the query's shape

    def bound(operator: Operator) -> Call:
        return lambda: torch.autograd.grad(operator(*leaves), [*leaves, *parameters], grad_out, allow_unused=True)

    return bound
