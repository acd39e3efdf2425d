"""What the low-rank methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.reference.attention import dropout_keep
from ..errors import UnsupportedError
from ..functional import check_dropout, resolve_seed


def drop_keys(value: Tensor, dropout_p: float, dropout_seed: int | Tensor | None) -> Tensor:
    """Zero whole values and scale the others by 1 / (1 - p): a pure function of (seed, b, key/value head, j)."""
    check_dropout(dropout_p)
    if dropout_p == 0.0:
        return value
    B, Hkv, Nk, _ = value.shape
    kept = dropout_keep((B, Hkv, 1, Nk), dropout_p, resolve_seed(dropout_seed), value.device)
    return torch.where(kept.transpose(2, 3), value / (1.0 - dropout_p), 0.0)


def drop_columns(weights: Tensor, kv_heads: int, dropout_p: float, dropout_seed: int | Tensor | None) -> Tensor:
    """`drop_keys` as it looks on the weights (B, Hq, Nq, Nk)."""
    ones = weights.new_ones(weights.shape[0], kv_heads, weights.shape[3], 1)
    factors = drop_keys(ones, dropout_p, dropout_seed).mT
    return weights * factors.repeat_interleave(weights.shape[1] // max(kv_heads, 1), dim=1)


def by_group(query: Tensor, key: Tensor) -> Tensor:
    """(B, Hq, Nq, D) -> (B, Hkv, G, Nq, D)."""
    grouped: Tensor = query.unflatten(1, (key.shape[1], query.shape[1] // max(key.shape[1], 1)))
    return grouped


def refuse_causal(name: str, reason: str, is_causal: bool) -> None:
    """Raise UnsupportedError for a causal call of a method that has no causal form."""
    if is_causal:
        raise UnsupportedError(
            f"{name} cannot be causal: {reason}. Use performer, linear or a sparse method such as sliding_window"
        )
