"""Sparse methods: the patterns of `efficient_attn.patterns`, run by exact attention over the pairs that they allow."""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import patterns
from ..errors import UnsupportedError
from ..functional import as_block_mask, attention_weights, resolve_seed
from ..masks import BlockMask
from ..padding import add_to_bias, check_key_mask, padded_attention, select_keys
from .base import Method, register


class SparseMethod(Method):
    """A pattern as a method: exact attention where the pattern, the mask, the lengths and causality all allow it."""

    exact = True
    accepts_causal = True
    accepts_mask = True
    accepts_bias = True

    if typing.TYPE_CHECKING:
        block_mask: Callable[..., BlockMask]

    __str__ = Method.__str__

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
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        check_key_mask(key_mask, key)
        mask, bias = self._join(mask, bias, query, key)
        if dropout_p > 0.0:
            dropout_seed = resolve_seed(dropout_seed)  # one seed: output and weights drop alike
        shared: dict[str, Any] = {
            "mask": mask,
            "is_causal": is_causal,
            "causal_alignment": causal_alignment,
            "scale": scale,
            "dropout_p": dropout_p,
            "dropout_seed": dropout_seed,
        }
        out = padded_attention(query, key, value, key_mask, bias=bias, backend=backend, **shared)
        if not need_weights:
            return out, None
        if key_mask is not None:
            (key,) = select_keys(key_mask, key)
            bias = add_to_bias(bias, key_mask, query)
        return out, attention_weights(query, key, bias=bias, **shared)

    def _join(
        self, mask: BlockMask | Tensor | None, bias: Tensor | None, query: Tensor, key: Tensor
    ) -> tuple[BlockMask | Tensor | None, Tensor | None]:
        """The pattern's mask and the user's in one, and the bias."""
        pattern = self.block_mask(query.shape[2], key.shape[2], num_heads=query.shape[1], device=query.device)
        if mask is None:
            return pattern, bias
        if pattern.indptr is not None and torch.compiler.is_compiling():
            # How many blocks both list depends on values, which a traced program must not: -inf in a bias does not.
            if isinstance(mask, Tensor) and mask.dtype == torch.bool:
                return pattern, torch.where(mask, query.new_zeros(()) if bias is None else bias, -torch.inf)
            if isinstance(mask, BlockMask) and mask.indptr is not None:
                raise UnsupportedError(
                    f"torch.compile cannot join the lists of {self.name} with those of a BlockMask. Join them outside, "
                    "pattern.block_mask(...) & mask, and use attention(mask=...), or pass the mask as a bool tensor"
                )
        return pattern & as_block_mask(mask, query, key), bias


@register
class Dense(SparseMethod, patterns.Dense):
    """Every pair."""

    name = "dense"
    formula = "softmax(QK^T)V"
    paper = "Vaswani et al. 2017"
    complexity = "n^2 d"

    def _join(
        self, mask: BlockMask | Tensor | None, bias: Tensor | None, query: Tensor, key: Tensor
    ) -> tuple[BlockMask | Tensor | None, Tensor | None]:
        return mask, bias


@register
class Causal(SparseMethod, patterns.Causal):
    """Every pair of a query and itself or an earlier key."""

    name = "causal"
    formula = "softmax(QK^T)V over j <= i"
    paper = "Vaswani et al. 2017"
    complexity = "n^2 d / 2"


@register
class SlidingWindow(SparseMethod, patterns.SlidingWindow):
    """Keys at a limited distance to the left and right."""

    name = "sliding_window"
    formula = "softmax(QK^T)V over i - left <= j <= i + right"
    paper = "Beltagy et al. 2020"
    complexity = "n w d"


@register
class Dilated(SparseMethod, patterns.Dilated):
    """Every dilation-th key at a limited distance."""

    name = "dilated"
    formula = "softmax(QK^T)V over j = i + t dilation"
    paper = "Beltagy et al. 2020"
    complexity = "n w d dilation"


@register
class Strided(SparseMethod, patterns.Strided):
    """The last `stride` keys, and every stride-th before."""

    name = "strided"
    formula = "softmax(QK^T)V over i - j <= s or s | i - j"
    paper = "Child et al. 2019"
    complexity = "n^2 d"


@register
class Longformer(SparseMethod, patterns.Longformer):
    """A window, and global tokens that see and are seen by all."""

    name = "longformer"
    formula = "softmax(QK^T)V over window + global tokens"
    paper = "Beltagy et al. 2020"
    complexity = "n (w + g) d"


@register
class BigBird(SparseMethod, patterns.BigBird):
    """Blocks: a window, global ones, and random ones."""

    name = "bigbird"
    formula = "softmax(QK^T)V over window + global + random blocks"
    paper = "Zaheer et al. 2020"
    complexity = "n b (w + g + r) d"
