"""Methods as calls of no arguments, sized for a length, and their error: what the suites share."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..masks import BlockMask
from ..patterns import Pattern

# The error is taken over this many queries, spread evenly; their exact outputs are computed in float64.
ERROR_ROWS = 256
WARM_UP_LENGTH = 256
UNPLANNED = ("dense", "lsh", "sorted_buckets")  # no mask, or one of sorted tokens, made anew in every call

Call = Callable[[], object]
Operator = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    if mode in ("fwd", "decode"):
        return lambda operator: torch.no_grad()(lambda: operator(*qkv))
    leaves = [t.detach().clone().requires_grad_() for t in qkv]
    parameters = [] if state is None else [p for p in state.parameters() if p.requires_grad]
    grad_out = qkv[0].roll(1, dims=2)  # as structured as the inputs; out has the query's shape

    def bound(operator: Operator) -> Call:
        return lambda: torch.autograd.grad(operator(*leaves), [*leaves, *parameters], grad_out, allow_unused=True)

    return bound
