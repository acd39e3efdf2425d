"""What the low-rank methods share: Linformer, Nystrom, Performer and linear attention, each exact to its paper.

They are built from the two primitives, exact attention and linear attention, so every backend, dtype and gradient of
these serves them. Letters: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D and Dv head dims,
G = Hq / Hkv. Each function has a companion `*_weights` that writes the implied weights out: n x n, on request only.

`key_mask` is bool (B, Nk), True = attend; what a masked key holds, NaN included, has no influence. Where weights are
never formed, dropout drops whole keys: w_ij becomes w_ij keep_j / (1 - p), with one keep_j for every query of a head.
Each weight is then dropped with probability p as usual, and the expectation is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..backends.reference.attention import dropout_keep
from ..errors import InputError, UnsupportedError
from ..inputs import check_dropout, resolve_seed, seen_keys
from ..masks import BlockMask
from .base import Method


class LowRankMethod(Method):
    """A method that forms no scores of pairs: it knows padding, for some causality, but no masks of pairs and no bias.

    A subclass names its function of (query, key, value) and the companion of (query, key) that writes the weights out;
    `_options` says what both are given beside the arguments of a call.
    """

    _attention: ClassVar[Callable[..., Tensor]]
    _weights: ClassVar[Callable[..., Tensor]]

    @property
    def needs_state(self) -> bool:
        """Whether `attend` needs what `build` returns."""
        return True

    def _options(self, state: Any, query: Tensor, key: Tensor, key_mask: Tensor | None) -> Mapping[str, Any]:
        """The keywords that come from this method and its state; called once in a forward."""
        raise NotImplementedError

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        state: nn.Module | None = None,
        key_mask: Tensor | None = None,
        mask: BlockMask | Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        causal_alignment: str | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int | Tensor | None = None,
        backend: str = "auto",
        need_weights: bool | Literal["mean"] = False,
    ) -> tuple[Tensor, Tensor | None]:
        for what, given in (("mask of pairs", mask), ("bias", bias)):
            if given is not None:
                raise UnsupportedError(
                    f"{self} forms no scores of pairs, so it cannot apply a {what}. Pass padding as key_mask"
                    + (", causality as is_causal=True" if self.accepts_causal else "")
                    + ", or use dense or a sparse method"
                )
        causality: dict[str, Any] = {"is_causal": is_causal, "causal_alignment": causal_alignment}
        key_mask = seen_keys(key_mask, query, key, **causality)
        keywords: dict[str, Any] = {"key_mask": key_mask, "scale": scale, "dropout_p": dropout_p}
        keywords["dropout_seed"] = resolve_seed(dropout_seed) if dropout_p > 0.0 else None
        if self.accepts_causal:
            keywords |= causality
        elif is_causal:
            refuse_causal(str(self), "it mixes positions before it compares them")
        if self.needs_state and state is None:
            raise InputError(f"{self} needs state: pass what build(embed_dim, num_heads, head_dim) returned")
        keywords |= self._options(state, query, key, key_mask)
        out = self._attention(query, key, value, backend=backend, **keywords)
        return out, self._weights(query, key, **keywords) if need_weights else None


def refuse_causal(name: str, reason: str) -> None:
    """Raise UnsupportedError: the call is causal, the method has no causal form."""
    raise UnsupportedError(
        f"{name} cannot be causal: {reason}. Use performer, linear or a sparse method such as sliding_window"
    )


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
