"""`attention_varlen`: sequences of different lengths packed one behind the other, without padding.

Letters: total_q and total_k tokens of all sequences, S sequences, Hq and Hkv heads, D and Dv head dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor

from . import biases
from .biases import BiasLike
from .defaults import ALIGNMENTS
from .errors import InputError, InputTypeError, UnsupportedError
from .functional import attention
from .masks import BlockMask
from .masks.packed import packed_mask, starts_of

Starts = Tensor | Sequence[int]


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Starts,
    cu_seqlens_k: Starts | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    causal_alignment: str = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: BiasLike = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Starts,
    cu_seqlens_k: Starts | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    causal_alignment: str = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: BiasLike = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Starts,
    cu_seqlens_k: Starts | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    causal_alignment: str = "bottom_right",
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: BiasLike = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention within each of S packed sequences, in one call of `attention` under one block mask.

    The mask of the last 32 different lengths is kept, so that the layers of a model make it once.

    Args:
        query: (total_q, Hq, D), sequence s in rows cu_seqlens_q[s] to cu_seqlens_q[s + 1] - 1. dtypes and head
            dimensions are those of `attention`.
        key, value: (total_k, Hkv, D) and (total_k, Hkv, Dv), Hq a multiple of Hkv.
        cu_seqlens_q, cu_seqlens_k: integers (S + 1), 0 first, never decreasing; default for keys: those of queries. A
            sequence may be empty, and have other numbers of queries and keys; one without keys gives 0 (lse -inf), and
            so do queries behind the last sequence. As tensors they are read, which waits for a GPU and ends a graph of
            torch.compile; give tuples there.
        is_causal: a query sees no key behind itself.
        window: (left, right): a query sees `left` keys before its own and `right` behind; -1 is without limit.
        causal_alignment: where the queries of a sequence stand among its keys: the last at the last key
            ("bottom_right", as in a sequence that is continued), or the first at the first ("top_left").
        scale, softcap, sinks, dropout_p, dropout_seed, backend: as in `attention`. A pair drops by its rows in the
            pack.
        bias: as in `attention`, of rows of the pack. One by relative position (`ALiBi`, `RelativeBias`, `T5Bias`) goes
            by the distances in each sequence, which must have as many queries as keys.
        return_lse: also return lse (Hq, total_q), the log-sum-exp of the scores.

    Returns:
        out (total_q, Hq, Dv), or (out, lse).

    Raises:
        InputError, InputTypeError: what `attention` raises, or places that do not fit the tensors.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise InputTypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 3:
            raise InputError(f"{name} must be (tokens of all sequences, heads, head_dim), got {tuple(tensor.shape)}")
    mask = varlen_mask(
        query.shape[0], key.shape[0], cu_seqlens_q, cu_seqlens_k, is_causal=is_causal, window=window,
        causal_alignment=causal_alignment, device=query.device,
    )  # fmt: skip
    bias = _in_pack(bias, query.shape[0], key.shape[0], cu_seqlens_q, cu_seqlens_k)
    out, lse = attention(
        *(x.transpose(0, 1)[None] for x in (query, key, value)), mask=mask, scale=scale, softcap=softcap, sinks=sinks,
        bias=bias, dropout_p=dropout_p, dropout_seed=dropout_seed, return_lse=True, backend=backend,
    )  # fmt: skip
    out = out[0].transpose(0, 1).contiguous()
    return (out, lse[0]) if return_lse else out


def _in_pack(bias: BiasLike, total_q: int, total_k: int, cu_seqlens_q: Starts, cu_seqlens_k: Starts | None) -> BiasLike:
    """The bias, with those by relative position as rows of the pack lie apart; raises where they lie otherwise."""
    dense, structured = biases.split(bias)
    if not any(isinstance(part, biases.RelativePosition) for part in structured):
        return bias
    if cu_seqlens_k is not None and cu_seqlens_k is not cu_seqlens_q:
        starts = starts_of("cu_seqlens_q", cu_seqlens_q, total_q)
        if starts != starts_of("cu_seqlens_k", cu_seqlens_k, total_k):
            raise UnsupportedError(
                "a bias by relative position in a pack needs sequences with as many queries as keys, or it would be "
                "another in each; call attention for each sequence, or compat.flash_attn for ALiBi"
            )
    moved = [
        replace(part, alignment="top_left") if hasattr(part, "alignment") else part  # type: ignore[type-var]
        for part in structured
    ]
    return biases.join(dense, moved)


def varlen_mask(
    total_q: int,
    total_k: int,
    cu_seqlens_q: Starts,
    cu_seqlens_k: Starts | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    causal_alignment: str = "bottom_right",
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The mask (total_q, total_k) of `attention_varlen`, whose arguments these are; raises what that raises."""
    if causal_alignment not in ALIGNMENTS:
        raise InputError(f"causal_alignment must be one of {ALIGNMENTS}, got {causal_alignment!r}")
    if len(window) != 2 or any(type(side) is not int or side < -1 for side in window):
        raise InputError(f"window must be (left, right), ints >= 0, or -1 for unlimited; got {window!r}")
    starts_q = starts_of("cu_seqlens_q", cu_seqlens_q, total_q)
    given = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    starts_k = starts_q if given is cu_seqlens_q else starts_of("cu_seqlens_k", given, total_k)
    if starts_k[-1] > total_k:
        raise InputError(f"cu_seqlens_q ends at {starts_k[-1]} and there are {total_k} keys; give cu_seqlens_k")
    left, right = window
    return packed_mask(
        starts_q, starts_k, total_q, total_k, window=(left, 0 if is_causal else right),
        bottom_right=causal_alignment == "bottom_right", device=device,
    )  # fmt: skip
