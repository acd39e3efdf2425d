"""A call as native code reads it: one bytes object of 8-byte words, in the order of csrc/common/words.h.

The C++ and the CUDA backend hand over their calls in it. Each `pack_*` of a forward also returns the tensors that must
live until the call is done; its backward appends the words of the gradients.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedError
from ..masks import MaskArrays
from .call import accumulation_dtype, dropout_origin, order_steps, readable
from .features import RELU_FLOOR, RISE
from .statistics import Found, Wanted

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
FEATURE_MAPS = {"identity": 0, "elu": 1, "relu": 2, "performer_relu": 2, "exp": 3, "performer_softmax": 3}  # params.h
_ATTENTION, _ATTENTION_GRADIENTS = struct.Struct("8q2d4q16q7q6qd5q17q13q"), struct.Struct("16q8q")
_STATISTICS = struct.Struct("10q7qd")
_LINEAR, _LINEAR_GRADIENTS = struct.Struct("14q4d16q4q"), struct.Struct("16qq")
READ_BEYOND = 64  # numbers that a kernel may read beyond the end of a line by relative position
_NO_LISTS: tuple[int, ...] = (0,) * 9
_NO_BIAS: tuple[int, ...] = (0,) * 6
_NO_WEIGHTS: tuple[int, ...] = (0,) * 6

Kept = tuple[Tensor | None, ...]


class Pages(NamedTuple):
    """Where keys and values (pages, Hkv, rows of a page, D) lie: row i of batch element b is row i % rows of page
    table[b, i // rows]."""

    table: Tensor  # int32 (B, pages of `length` rows or more), contiguous, on the CPU
    length: int  # Nk


def pack_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    weights: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
    continues: bool = False,
    pages: Pages | None = None,
) -> tuple[Kept, bytes]:
    """The words of `read_params`, and what they point to; `weights` (B, Hq | 1, Nq, Nk), or their gradient; whether
    the call `continues` what its results hold."""
    lists: Kept = ()
    list_words = _NO_LISTS
    if mask.indptr is not None:
        lists = tuple(None if t is None else t.contiguous() for t in mask[4:11])
        entries, tiles = (0 if t is None else t.shape[0] for t in (lists[1], lists[3]))
        list_words = (entries, tiles, *map(pointer, lists))
    lengths = None if mask.kv_lengths is None else mask.kv_lengths.expand(query.shape[0]).contiguous()
    bias_words = _NO_BIAS
    if bias is not None:
        if bias.stride(3) != 1 and bias.shape[3] != 1:
            bias = bias.contiguous()
        strides = (0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True))
        bias_words = (bias.data_ptr(), DTYPES[bias.dtype], *strides)
    weight_words = _NO_WEIGHTS
    if weights is not None:
        if weights.stride(3) not in (0, 1):
            weights = weights.contiguous()
        weight_words = (weights.data_ptr(), *weights.stride(), weights.shape[1])
    sinks = None if sinks is None else sinks.to(accumulation_dtype(query.dtype)).contiguous()
    diagonal_words: tuple[int, ...] = (0, 0, 0, 0)
    if diagonals is not None:
        if mask.query_order is not None or mask.key_order is not None:
            raise UnsupportedError("a bias by relative position: not of a mask with query_order or key_order")
        hides = bool((diagonals == -torch.inf).any())
        diagonals = F.pad(diagonals, (0, READ_BEYOND))
        lines = zip(diagonals.shape[:2], diagonals.stride()[:2], strict=True)
        strides = (0 if size == 1 else step for size, step in lines)
        diagonal_words = (diagonals.data_ptr(), *strides, hides)
    B, Hq, _, D = query.shape
    Hkv, Dv = value.shape[1], value.shape[3]
    Nq, query_order = _order_words(mask.query_order, "query_order", query)
    Nk, key_order = _order_words(mask.key_order, "key_order", key)
    page_words: tuple[int, ...] = (0, 0, 0, 0)
    if pages is not None:
        Nk, key_order = pages.length, (pages.length, 0, 0, 0)
        page_words = (pages.table.data_ptr(), key.shape[2], pages.table.stride(0), key.shape[0])
    words = _ATTENTION.pack(
        DTYPES[query.dtype],
        B,
        Hq,
        Hkv,
        Nq,
        Nk,
        D,
        Dv,
        scale,
        dropout_p,
        *((0, 0, 0, 0) if dropout_seed is None else dropout_origin(dropout_seed)),
        *view(query),
        *view(key),
        *view(value),
        *view(out),
        lse.data_ptr(),
        *bias_words,
        *weight_words,
        softcap,
        pointer(sinks),
        *diagonal_words,
        *mask[:4],
        *mask[11:14],
        *list_words,
        pointer(lengths),
        *query_order,
        *key_order,
        continues,
        *page_words,
    )
    kept = (query, key, value, out, lse, bias, weights, sinks, diagonals, *lists, lengths)
    return (*kept, mask.query_order, mask.key_order, None if pages is None else pages.table), words


def _order_words(order: Tensor | None, name: str, tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """How many rows of a (B, H, N, D) tensor a call has, and the words of `read_order`."""
    rows, *steps = order_steps(order, name, tensor)
    return rows, (tensor.shape[2], pointer(order), *steps)


def pack_attention_gradients(
    grad_out: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    grad_lse: Tensor | None,
    dbias: Tensor | None,
    delta: Tensor | None = None,
    ddiagonals: Tensor | None = None,
) -> bytes:
    """What a backward appends to `pack_attention`; grad_lse is contiguous, in the dtype of lse."""
    sizes = (0, 0, 0, 0) if dbias is None else dbias.shape
    views = (*view(grad_out), *view(dq), *view(dk), *view(dv))
    results = pointer(delta), pointer(ddiagonals)
    return _ATTENTION_GRADIENTS.pack(*views, pointer(grad_lse), pointer(dbias), *sizes, *results)


def pack_statistics(found: Found, wanted: Wanted, chunk_rows: int) -> tuple[Kept, bytes]:
    """What `read_statistics_params` reads behind the words of the call, and what it points to."""
    row_weights = None if wanted.row_weights is None else wanted.row_weights.contiguous()
    key_sets = None if wanted.key_sets is None else wanted.key_sets.contiguous()
    results = (found.entropy, found.distance, found.nearby, found.shares, found.top_weights, found.top_keys)
    words = _STATISTICS.pack(
        *map(pointer, (*results, found.received, found.map, row_weights, key_sets)),
        0 if key_sets is None or key_sets.shape[0] == 1 else key_sets.shape[1],
        wanted.set_count,
        wanted.top,
        0 if row_weights is None else row_weights.shape[0],
        wanted.map_block,
        chunk_rows,
        wanted.position_offset or 0,
        float(wanted.nearby),
    )
    return (*results, found.received, found.map, row_weights, key_sets), words


def pack_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    projection: Tensor | None,
    out: Tensor,
    normaliser: Tensor,
    key_shift: Tensor,
    is_causal: bool,
    causal_offset: int,
    feature_map: str,
    scale: float,
) -> tuple[Kept, bytes]:
    """The words of `read_linear_params`, and what they point to."""
    views = tuple(map(readable, (query, key, value, out)))
    normaliser, key_shift = normaliser.contiguous(), key_shift.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    features, heads = key.shape[3], 0
    root, gain, floor = 1.0, 1.0, 0.0
    if projection is not None:
        projection = projection.to(normaliser.dtype).contiguous()
        features, heads = projection.shape[-2], projection.shape[0] if projection.dim() == 3 else 1
        root, gain, floor = scale**0.5, features**-0.5, RELU_FLOOR
    words = _LINEAR.pack(
        DTYPES[query.dtype],
        DTYPES[value.dtype],
        *query.shape[:2],
        key.shape[1],
        query.shape[2],
        *key.shape[2:],
        features,
        value.shape[3],
        heads,
        FEATURE_MAPS[feature_map],
        is_causal,
        causal_offset,
        root,
        gain,
        floor,
        RISE,
        *(word for t in views for word in view(t)),
        pointer(normaliser),
        pointer(key_shift if key_shift.numel() else None),
        pointer(key_mask),
        pointer(projection),
    )
    return (*views, normaliser, key_shift, key_mask, projection), words


def pack_linear_attention_gradients(
    grad_out: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, grad_normaliser: Tensor | None
) -> bytes:
    """What a backward appends to `pack_linear_attention`; grad_normaliser is contiguous, in the normaliser's dtype."""
    views = (*view(grad_out), *view(dq), *view(dk), *view(dv))
    return _LINEAR_GRADIENTS.pack(*views, pointer(grad_normaliser))


def view(tensor: Tensor) -> tuple[int, ...]:
    """Pointer and strides of (B, H, N, D), in elements."""
    return (tensor.data_ptr(), *tensor.stride()[:3])


def pointer(tensor: Tensor | None) -> int:
    """The address of the first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
