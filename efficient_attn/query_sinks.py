"""Sinks with a score for each query: what they leave of attention without them.

    out' = out sigmoid(lse - sink),    lse' = log(exp(lse) + exp(sink))

for a sink has no value, so that it takes its share of all weights alike (Inkling 2 in transformers; sinks with one
score a head are the kernels' own, see `attention`). O(n) memory, in every backend, with gradients of everything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import InputError, InputTypeError


def has_queries(sinks: Tensor) -> bool:
    """Whether sinks have a score for each query."""
    return isinstance(sinks, Tensor) and sinks.dim() > 1


def check(sinks: Tensor, query: Tensor) -> None:
    """Raise unless sinks are floating-point numbers (Hq, Nq) or (B, Hq, Nq) on the query's device."""
    if not sinks.is_floating_point():
        raise InputTypeError(f"sinks must be a floating-point tensor, got {sinks.dtype}; cast it")
    full = tuple(query.shape[:3])
    if tuple(sinks.shape) not in (full, full[1:]):
        raise InputError(
            f"sinks must be (Hq) = ({full[1]},), or one for each query, (Hq, Nq) = {full[1:]} or (B, Hq, Nq) = {full}; "
            f"got {tuple(sinks.shape)}"
        )
    if sinks.device != query.device:
        raise InputError(f"sinks are on {sinks.device}, query on {query.device}; move them")


def beside(lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of the weights of each query, and the lse with its sink, (B, Hq, Nq) both.

    Args:
        lse: (B, Hq, Nq), without sinks. sinks: (Hq, Nq) or (B, Hq, Nq).
    """
    sinks = sinks.to(lse.dtype).expand(lse.shape)
    empty = lse == -torch.inf  # no key, and maybe no sink either: the difference of the two is not defined
    seen = torch.where(empty, 0.0, lse)
    left = torch.where(empty, 0.0, torch.sigmoid(seen - sinks))
    return left, torch.where(empty, sinks, torch.logaddexp(seen, sinks))


def attend(attention: Any, query: Tensor, *tensors: Tensor, sinks: Tensor, return_lse: bool, **arguments: Any) -> Any:
    """`attention`, whose arguments these are.

    Raises:
        InputError, InputTypeError: sinks of another shape, type or device; what `attention` raises.
    """
    check(sinks, query)
    out, lse = attention(query, *tensors, return_lse=True, **arguments)
    left, lse = beside(lse, sinks)
    out = (out * left[..., None]).to(out.dtype)
    return (out, lse) if return_lse else out


def attend_with_weights(
    attention_with_weights: Any, query: Tensor, *tensors: Tensor, sinks: Tensor, average: bool, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_with_weights`, whose arguments these are; an average is one of the weights of all heads."""
    check(sinks, query)
    out, lse, weights = attention_with_weights(query, *tensors, **arguments)
    left, lse = beside(lse, sinks)
    left = left[..., None]
    weights = (weights * left).to(weights.dtype)
    return (out * left).to(out.dtype), lse, weights.mean(1) if average else weights
