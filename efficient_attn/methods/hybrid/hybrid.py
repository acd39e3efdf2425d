"""A sparse method and a tail as one method, and as text: `sliding_window:left=64,right=64+centroid:block=64`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...defaults import default_scale
from ...errors import InputError, InputTypeError, UnsupportedError
from ...functional import attention_weights, merge_attention, padded_attention
from ...inputs import (
    MaskLike,
    add_to_bias,
    as_block_mask,
    check_dropout,
    check_key_mask,
    prepare_inputs,
    resolve_seed,
    seen_keys,
    select_keys,
)
from ...masks import BlockMask
from ...options import register
from ...patterns import Pattern
from ..base import TAILS, Method
from ..sparse import Sparse
from ..spec import parse
from .split import Split, plan
from .tail import Branch, Tail, TailCall


@register
@dataclass(frozen=True)
class Hybrid(Method):
    """A sparse method and a tail in one softmax: `Hybrid(SlidingWindow(left=64, right=64), CentroidTail())`.

    Every allowed pair is counted once: exactly around the pattern, in whole blocks of `tail.block`, else by the tail.
    The pattern says what is exact, never what is hidden: pass is_causal, key_mask or mask for that. With a window of
    right=0 alone the future is in the tail.

    Fields:
        sparse: a sparse method, or the pattern of one, of positions or chosen by content.
        tail: one of `CentroidTail`, `NystromTail`, `PerformerTail`, or another class that `register` has made known.
    """

    name = "hybrid"
    accepts_causal = True
    accepts_mask = True

    sparse: Sparse
    tail: Tail

    def check(self) -> None:
        if not isinstance(self.tail, Tail):
            raise InputTypeError(f"a hybrid ends with a tail, one of {', '.join(TAILS)}; got {self.tail!r}")
        if isinstance(self.sparse, Pattern):
            object.__setattr__(self, "sparse", Sparse(self.sparse))
        if not isinstance(self.sparse, Sparse):
            raise InputError(
                f"a hybrid starts with a sparse method that is a pattern of pairs, got {self.sparse}; write for "
                f"instance sliding_window:left=64,right=64+{self.tail}"
            )

    def __str__(self) -> str:
        sparse = str(self.sparse)
        return f"({sparse})+{self.tail}" if " " in sparse else f"{sparse}+{self.tail}"

    @property
    def counts_positions(self) -> bool:
        return True  # blocks are cut from the first token on

    def build(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module | None:
        return self.tail.build(head_dim, device=device, dtype=dtype)

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
        if bias is not None:
            raise UnsupportedError(f"{self} cannot add a bias to the scores of its tail; use a sparse method or dense")
        query, key, value = prepare_inputs(query, key, value)
        check_key_mask(key_mask, key)
        check_dropout(dropout_p)
        scale = default_scale(scale, query.shape[-1])
        pairs: dict[str, Any] = {"mask": mask, "is_causal": is_causal, "causal_alignment": causal_alignment}
        split, counted = self._plan(query, key, key_mask, scale, **pairs)
        seed = resolve_seed(dropout_seed) if dropout_p > 0.0 else None
        call = TailCall(split, scale, state, counted, is_causal, dropout_p, seed, backend, bool(need_weights))
        near, far = self._branches(query, key, value, key_mask, call)
        out, lse = merge_attention((near.out, far.out), (near.lse, far.lse))
        if near.weights is None or far.weights is None:
            return out, None
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        near_share, far_share = (torch.exp(part.lse - lse).unsqueeze(-1) for part in (near, far))
        return out, (near_share * near.weights + far_share * far.weights).to(query.dtype)

    def branch_share(
        self,
        query: Tensor,
        key: Tensor,
        *,
        state: nn.Module | None = None,
        key_mask: Tensor | None = None,
        mask: MaskLike = None,
        is_causal: bool = False,
        causal_alignment: str | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """How much of each row's softmax mass the exact part and the tail carry, (B, Hq, Nq, 2); rows add up to 1.

        A row that sees no key has 0 and 0. O(N) memory. Arguments and errors as in `attend`.
        """
        query, key, _ = prepare_inputs(query, key, key)
        check_key_mask(key_mask, key)
        scale = default_scale(scale, query.shape[-1])
        pairs: dict[str, Any] = {"mask": mask, "is_causal": is_causal, "causal_alignment": causal_alignment}
        split, counted = self._plan(query, key, key_mask, scale, **pairs)
        call = TailCall(split, scale, state, counted, is_causal, backend=backend, counted=False)
        near, far = self._branches(query, key, torch.zeros_like(key[..., :1]), key_mask, call)
        lses = torch.stack([near.lse, far.lse], -1)
        empty = (lses == -torch.inf).all(-1, keepdim=True)
        return torch.softmax(lses.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)

    def _plan(
        self, query: Tensor, key: Tensor, key_mask: Tensor | None, scale: float, *, mask: MaskLike, **causality: Any
    ) -> tuple[Split, Tensor | None]:
        """The split of a call, and which keys count in what is made of all of them, (B, Nk)."""
        if mask is not None and not isinstance(mask, Tensor):
            mask = as_block_mask(mask, query, key, scale=scale, alignment=causality["causal_alignment"])
        counted = seen_keys(key_mask, query, key, mask=mask, **causality)
        facts: dict[str, Any] = {"key_mask": counted, "scale": scale, "mask": mask, **causality}
        return plan(self.sparse.pattern, query, key, self.tail.block, **facts), counted

    def _branches(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, call: TailCall
    ) -> tuple[Branch, Branch]:
        """The exact part and the tail; they drop independently."""
        seed = call.dropout_seed
        far = self.tail.branch(
            query, key, value, call if seed is None else dataclasses.replace(call, dropout_seed=seed + 1)
        )
        exact: dict[str, Any] = {"mask": call.split.exact, "scale": call.scale}
        exact |= {"dropout_p": call.dropout_p, "dropout_seed": seed}
        near = Branch(*padded_attention(query, key, value, key_mask, return_lse=True, backend=call.backend, **exact))
        if call.need_weights:
            bias = None if key_mask is None else add_to_bias(None, key_mask, query)
            weights = attention_weights(query, *select_keys(key_mask, key), bias=bias, **exact)
            near = near._replace(weights=weights)
        return near, far


def branch_share(query: Tensor, key: Tensor, method: str | Hybrid, **arguments: Any) -> Tensor:
    """`Hybrid.branch_share` for a spec: each row's softmax mass in the exact part and in the tail, (B, Hq, Nq, 2).

    Raises:
        InputError: a method that has no branches; and what `Hybrid.branch_share` raises.
    """
    found = parse(method)
    if not isinstance(found, Hybrid):
        raise InputError(f"{found} has one branch; branch_share is for hybrids such as {found}+centroid")
    return found.branch_share(query, key, **arguments)
