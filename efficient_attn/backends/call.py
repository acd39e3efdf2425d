"""What a backend is asked about before it is chosen, and the few things that every backend does alike."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


class Call(NamedTuple):
    """The facts of one attention call on which a backend may decide; hashable, so that the choice is cached."""

    device: torch.device
    dtype: torch.dtype
    bias_dtype: torch.dtype | None
    B: int
    Hq: int
    Hkv: int
    Nq: int
    Nk: int
    D: int
    Dv: int
    has_lists: bool
    dropout_p: float
    returns_weights: bool = False
    modifiers: tuple[str, ...] = ()  # of "softcap", "sinks" and "a bias by relative position": those it has


class LinearCall(NamedTuple):
    """The same for linear attention."""

    device: torch.device
    dtype: torch.dtype
    width: int = 0  # the larger one of the number of features and Dv; 0 leaves it open


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of this dtype are summed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dropout_origin(seed: Tensor) -> tuple[int, int, int, int]:
    """(seed, head, query, key) of a seed with one element or with those four: where, at multiples of 16, pair (0, 0)
    of head 0 stands in a larger problem, whose pairs the call then drops."""
    if seed.numel() == 1:
        return int(seed), 0, 0, 0
    first, head, query, key = seed.tolist()
    return first, head, query, key


def readable(tensor: Tensor) -> Tensor:
    """(B, H, N, D) itself if its last dimension has stride 1, else a contiguous copy."""
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def lse_without_keys(lse: Tensor, sinks: Tensor | None) -> Tensor:
    """lse (B, Hq, Nq), filled with what it is where there are no keys: -inf, or the sink of the head."""
    return lse.fill_(-torch.inf) if sinks is None else lse.copy_(sinks[:, None].expand(lse.shape))


def sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor | None:
    """dsinks (Hq) = -sum exp(sink - lse) delta over batch and queries, of lse and delta (B, Hq, Nq)."""
    if sinks is None:
        return None
    share = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    return -(share * delta).sum((0, 2)).to(sinks.dtype)


def modifier_gradients_without_keys(
    grad_lse: Tensor | None, sinks: Tensor | None, diagonals: Tensor | None, diagonals_require_grad: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dsinks and ddiagonals of a call without a pair: lse is the sink itself."""
    dsinks = None
    if sinks is not None:
        dsinks = torch.zeros_like(sinks) if grad_lse is None else grad_lse.sum((0, 2)).to(sinks.dtype)
    wanted = diagonals is not None and diagonals_require_grad
    return dsinks, torch.zeros_like(diagonals) if wanted and diagonals is not None else None


Gradients = TypeVar("Gradients", bound="tuple[Tensor | None, ...]")


def zeroed(gradients: Gradients) -> Gradients:
    """The gradients of a call without a visible key, as they are returned."""
    for gradient in gradients:
        if gradient is not None:
            gradient.zero_()
    return gradients
