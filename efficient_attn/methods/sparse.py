"""The sparse method: exact attention over the pairs that a pattern shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import biases
from ..biases import BiasLike
from ..errors import InputTypeError, UnsupportedError
from ..functional import attention, padded_attention
from ..inputs import as_block_mask, causal_mask, check_alignment, check_bias, check_key_mask, seen_keys, shown_by_bias
from ..masks import BlockMask
from ..patterns import BucketPattern, Dense, Pattern, past_of
from ..tracing import PLAN, named, shapes_only
from .base import Method
from .buckets import bucketed_attention, bucketed_inputs


@dataclass(frozen=True)
class Sparse(Method):
    """Exact attention where the pattern, the mask, the lengths and causality all allow it: `Sparse(BigBird(block=64))`.

    It is described, written and read as its pattern, and has what that has: options, `block_mask`, `for_inputs`, ... So
    it can also be a `mask=`. A pattern of buckets is run on sorted tokens where it can be.
    """

    exact = True
    accepts_causal = True
    accepts_mask = True
    accepts_bias = True
    accepts_modifiers = True

    pattern: Pattern

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern):
            raise InputTypeError(f"Sparse takes a pattern, such as BigBird(block=64); got {self.pattern!r}")
        for what in ("name", "formula", "paper", "complexity", "accepts_causal"):
            object.__setattr__(self, what, getattr(self.pattern, what))
        object.__setattr__(self, "is_dense", isinstance(self.pattern, Dense))

    def __getattr__(self, name: str) -> Any:
        if name == "pattern" or name.startswith("__"):  # not there yet while a copy is being made
            raise AttributeError(name)
        return getattr(self.pattern, name)

    @property
    def counts_positions(self) -> bool:
        return not self.is_dense and not self.pattern._analytic and self.pattern._may_begin_later

    def to_json(self) -> str:
        return self.pattern.to_json()

    def __str__(self) -> str:
        return str(self.pattern)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        state: nn.Module | None = None,
        key_mask: Tensor | None = None,
        mask: BlockMask | Tensor | None = None,
        bias: BiasLike = None,
        is_causal: bool = False,
        causal_alignment: str | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int | Tensor | None = None,
        backend: str = "auto",
        need_weights: bool | Literal["mean"] = False,
    ) -> tuple[Tensor, Tensor | None]:
        self.check_call(query, key, key_mask, is_causal, causal_alignment)
        if key_mask is None and mask is None and not need_weights and not self.pattern.by_content:
            # `attention` makes the mask: it knows calls like this one.
            return attention(
                query, key, value, mask=None if self.is_dense else self.pattern, bias=bias, is_causal=is_causal,
                causal_alignment=causal_alignment, scale=scale, softcap=softcap, sinks=sinks, dropout_p=dropout_p,
                dropout_seed=dropout_seed, backend=backend,
            ), None  # fmt: skip
        self.pattern.check_scores(bias, softcap)
        counted = key_mask
        dense, structured = biases.split(bias)
        if self.pattern.by_content:
            mask, counted = self.seen(query, key, key_mask, mask, dense, is_causal, causal_alignment, scale)
        if isinstance(self.pattern, BucketPattern):
            query, key, value = bucketed_inputs(self.pattern, query, key, value, counted)
            if mask is None and bias is None and softcap is None and sinks is None:
                return bucketed_attention(
                    self.pattern,
                    query,
                    key,
                    value,
                    key_mask=counted,
                    is_causal=is_causal,
                    causal_alignment=causal_alignment,
                    scale=scale,
                    dropout_p=dropout_p,
                    dropout_seed=dropout_seed,
                    backend=backend,
                    need_weights=need_weights,
                )
        if not self.is_dense:
            method = self
            if is_causal and mask is None and self.pattern.has_orders and not torch.compiler.is_compiling():
                # The pattern's past has parts of its own; the past of its parts would be one mask of all of them.
                method = Sparse(past_of(self.pattern, causal_alignment))
                is_causal, causal_alignment = False, None
            causal = causal_mask(query.shape[2], key.shape[2], is_causal, causal_alignment)
            mask, dense = method.restricted(
                mask, dense, query, key, scale=scale, key_mask=counted, causal=causal, alignment=causal_alignment
            )
        shared: dict[str, Any] = {
            "mask": mask,
            "bias": biases.join(dense, structured),
            "is_causal": is_causal,
            "causal_alignment": causal_alignment,
            "scale": scale,
            "softcap": softcap,
            "sinks": sinks,
            "dropout_p": dropout_p,
            "dropout_seed": dropout_seed,
            "backend": backend,
        }
        if not need_weights:
            return padded_attention(query, key, value, key_mask, **shared), None
        out, _, weights = padded_attention(query, key, value, key_mask, need_weights=need_weights, **shared)
        return out, weights

    def check_call(
        self, query: Tensor, key: Tensor, key_mask: Tensor | None, is_causal: bool, alignment: str | None
    ) -> None:
        """Raise for padding, an alignment or causality that this method does not take."""
        check_key_mask(key_mask, key)
        check_alignment(is_causal, alignment, query.shape[2], key.shape[2])
        if is_causal and not self.accepts_causal:
            raise UnsupportedError(
                f"{self} cannot be causal: where a token is put depends on the whole sequence. Use lsh, topk_blocks or "
                "another pattern"
            )

    @staticmethod
    def seen(
        query: Tensor,
        key: Tensor,
        key_mask: Tensor | None,
        mask: BlockMask | Tensor | None,
        bias: Tensor | None,
        is_causal: bool,
        alignment: str | None,
        scale: float | None,
    ) -> tuple[BlockMask | Tensor | None, Tensor | None]:
        """What may take part in a choice by content: the user's mask, and the keys (B, Nk) that any query sees."""
        if mask is not None and not isinstance(mask, Tensor):
            mask = as_block_mask(mask, query, key, scale=scale, alignment=alignment)
        shown = None if bias is None else shown_by_bias(bias, query, key)
        if shown is not None:  # what is hidden chooses nothing, by whatever route
            mask = shown if mask is None else as_block_mask(mask, query, key) & shown
        counted = seen_keys(key_mask, query, key, mask=mask, bias=bias, is_causal=is_causal, causal_alignment=alignment)
        return mask, counted

    @named(PLAN)
    def restricted(
        self,
        mask: BlockMask | Tensor | None,
        bias: Tensor | None,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None,
        key_mask: Tensor | None,
        causal: BlockMask | None,
        alignment: str | None,
    ) -> tuple[BlockMask | Tensor | None, Tensor | None]:
        """The pattern's mask and the user's in one, and the bias."""
        pattern = self.pattern.aligned(alignment)
        tracing = (torch.compiler.is_compiling() or shapes_only(query)) and not pattern._analytic
        within = self._traced_pairs(mask, bias, query, key) if tracing and pattern.by_content else None
        if tracing and isinstance(mask, Tensor) and mask.dtype == torch.bool:
            # How many blocks both list depends on values, which a traced program must not: -inf in a bias does not.
            bias = torch.where(mask, query.new_zeros(()) if bias is None else bias, -torch.inf)
            mask = None
        user = None if mask is None else as_block_mask(mask, query, key, alignment=alignment)
        if tracing and user is not None and user.indptr is not None:
            raise UnsupportedError(
                f"torch.compile cannot join the lists of {self.name} with those of a BlockMask. Join them outside, "
                "pattern.block_mask(...) & mask, and use attention(mask=...), or pass the mask as a bool tensor"
            )
        if pattern.by_content:
            within = user if within is None else within
            within = within if causal is None else causal if within is None else within & causal
        shown = pattern.for_inputs(query, key, scale=scale, key_mask=key_mask, within=within)
        return (shown if user is None else shown & user), bias

    @staticmethod
    def _traced_pairs(
        mask: BlockMask | Tensor | None, bias: Tensor | None, query: Tensor, key: Tensor
    ) -> BlockMask | None:
        """What a bool mask and -inf in a bias show together, in lists whose shapes depend on no value."""
        pairs = mask if isinstance(mask, Tensor) and mask.dtype == torch.bool else None
        if bias is not None:
            shown = check_bias(bias, query, key) != -torch.inf
            pairs = shown if pairs is None else shown & pairs
        if pairs is None or isinstance(mask, BlockMask):
            return None
        pairs = pairs[(None,) * (4 - pairs.dim())]
        return BlockMask.from_dense(pairs.expand(-1, -1, query.shape[2], key.shape[2]), static=True)


DENSE = Sparse(Dense())
