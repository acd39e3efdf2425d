"""Attention under a bias of pairs that is never written out whole: some queries at a time, a strip.

The strip's bias is made of its few numbers, added by the kernels as any bias is, and forgotten; the backward makes it
again. Memory is O(n) and one strip. Letters as in `functional`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import biases
from .backends.call import accumulation_dtype
from .biases import BiasLike
from .errors import UnsupportedError
from .inputs import MaskLike, as_block_mask, causal_mask, check_alignment, check_bias, prepare_inputs
from .masks import BlockMask

PAIRS = 2**22  # numbers of a bias that are made at a time


def has_strips(bias: BiasLike, query: Tensor, key: Tensor) -> bool:
    """Whether a call has a bias of pairs, and too many of them to be made at once."""
    if bias is None or isinstance(bias, Tensor):
        return False
    parts = bias if isinstance(bias, (list, tuple)) else [bias]
    if not any(isinstance(part, biases.Pairwise) for part in parts) or query.dim() != 4 or key.dim() != 4:
        return False
    return query.shape[1] * query.shape[2] * key.shape[2] > PAIRS


def by_strips(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, *, mask: MaskLike, bias: BiasLike, is_causal: bool,
    causal_alignment: str | None, dropout_p: float, return_lse: bool, **options: Any,
) -> Any:  # fmt: skip
    """`attention`, whose arguments these are.

    Raises:
        UnsupportedError: dropout; a mask of lists of blocks; other structured biases.
    """
    query, key, value = prepare_inputs(query, key, value)
    (_, Hq, Nq, _), Nk = query.shape, key.shape[2]
    check_alignment(is_causal, causal_alignment, Nq, Nk)
    dense, structured = biases.split(bias)
    dense = None if dense is None else check_bias(dense, query, key)
    pairs = [part for part in structured if isinstance(part, biases.Pairwise)]
    rest = [part for part in structured if not isinstance(part, biases.Pairwise)]
    if dropout_p > 0.0 or rest:
        what = "dropout" if dropout_p > 0.0 else type(rest[0]).__name__
        raise UnsupportedError(
            f"{type(pairs[0]).__name__} with {Nq} queries and {Nk} keys is computed some queries at a time, which "
            f"{what} does not go with; leave it out, or use attention within smaller windows"
        )
    causal = causal_mask(Nq, Nk, is_causal, causal_alignment)
    shown = causal
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        mask = mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask
    elif mask is not None:
        shown = as_block_mask(mask, query, key, scale=options["scale"], alignment=causal_alignment)
        shown = shown if causal is None else shown & causal
        mask = None
    if shown is not None and shown.indptr is not None:
        raise UnsupportedError(
            f"{type(pairs[0]).__name__} with {Nq} queries and {Nk} keys is computed some queries at a time, which a "
            "mask of lists of blocks does not go with; use a bool mask, a window, or attention within smaller windows"
        )

    def strip(query: Tensor, key: Tensor, value: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        rows = [part.rows(first, last, full, key, accumulation_dtype(query.dtype)) for part in pairs]
        rows += [] if dense is None else [dense[:, :, first:last] if dense.shape[2] > 1 else dense]
        found: tuple[Tensor, Tensor] = attention(
            query, key, value, mask=_mask_of_rows(mask, shown, first, last), bias=functools.reduce(torch.add, rows),
            return_lse=True, **options,
        )  # fmt: skip
        return found

    full = query.detach()
    size = max(PAIRS // max(Hq * Nk, 1), 1)
    parts: list[tuple[Tensor, Tensor]] = []
    for first in range(0, Nq, size):
        last = min(first + size, Nq)
        arguments = (query[:, :, first:last], key, value, first, last)
        if torch.is_grad_enabled():
            parts.append(checkpoint(strip, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(strip(*arguments))
    out, lse = (torch.cat([part[n] for part in parts], 2) for n in range(2))
    return (out, lse) if return_lse else out


def _mask_of_rows(mask: MaskLike, shown: BlockMask | None, first: int, last: int) -> MaskLike:
    """What the queries first .. last see, of a bool tensor and of a mask without lists."""
    if isinstance(mask, Tensor):
        mask = mask[:, :, first:last] if mask.shape[2] > 1 else mask
        if shown is None:
            return mask
        own = _window_of_rows(shown, first, last)
        return mask & own.to_dense().to(mask.device)
    return None if shown is None else _window_of_rows(shown, first, last)


def _window_of_rows(shown: BlockMask, first: int, last: int) -> BlockMask:
    offset = shown.window_offset + first
    made = BlockMask(last - first, shown.kv_len, shown.block_size, window=shown.window, window_offset=offset)
    return made if shown.kv_lengths is None else made.with_lengths(shown.kv_lengths)
