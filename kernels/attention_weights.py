"""The weights of exact attention as a result, and what a gradient of theirs adds to the backward.

    W_ij = Z_ij exp(s_ij - lse_i)        of each head, or averaged over the heads
    delta_i += sum_j dW_ij W_ij          dP += dW (attention_backward.py)

The forward has walked the keys before, and lse is known. `attention_weights_kernel` owns a tile of the result and takes
its scores once more, of one head or of all heads one after another: nothing is added up between programs, and weights
of all heads never exist where their average is wanted. `weight_products_kernel` owns BLOCK_Q queries and walks the keys
as the forward does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention_backward import add_weight_gradient, load_rows
from .tiles import (
    FULL,
    PARTIAL,
    Inputs,
    cap_scores,
    dot,
    head_pointer,
    kept_pairs,
    key_places,
    line_offsets,
    load_block,
    load_tile,
    mask_scores,
    owned_queries,
    query_places,
    signed,
)
from .walk import (
    entry_at,
    full_tiles,
    key_count,
    key_span,
    listed_tile,
    locate,
    next_tile,
    other_tiles,
    visible_keys,
)


class Weights(NamedTuple):
    """The result (B, heads, Nq, Nk), contiguous, its tiles, and how many query heads each of its heads averages."""

    ptr: Any
    heads: Any
    q_tiles: Any
    k_tiles: Any
    over_h: Any


@triton.jit
def attention_weights_kernel(q, k, v, bias, mask, dropout, sizes, modifiers, given, weights, C: tl.constexpr):
    """One tile of the weights. Grid: B * weights.heads * weights.q_tiles * weights.k_tiles."""
    x = Inputs(q, k, v, bias, mask, dropout, sizes, modifiers)
    i_program = tl.program_id(0)
    i_k = i_program % weights.k_tiles
    i_q = i_program // weights.k_tiles % weights.q_tiles
    i_line = i_program // weights.k_tiles // weights.q_tiles
    i_b, i_head = i_line // weights.heads, i_line % weights.heads
    i_first, j_first = i_q * C.BLOCK_Q, i_k * C.BLOCK_K
    keys = key_count(x.mask, i_b, x.sizes.Nk)
    any_first, any_end, _first, _end = visible_keys(x.mask, i_first, i_first + C.BLOCK_Q - 1, keys)
    in_range = (j_first < any_end) & (j_first + C.BLOCK_K > any_first)
    o_i, o_j = i_first + tl.arange(0, C.BLOCK_Q), j_first + tl.arange(0, C.BLOCK_K)
    m_i, m_j = o_i < x.sizes.Nq, o_j < keys
    b_sum = tl.full([C.BLOCK_Q, C.BLOCK_K], 0.0, tl.float32)
    for g in range(weights.over_h):
        i_h = i_head * weights.over_h + g
        listed, tile = listed_tile(x.mask, i_b, i_h, i_first, j_first, C.LIST_Q, C.LIST_K)
        if in_range & listed:
            b_q = signed(load_tile(x.q, i_b, i_h, o_i, m_i, C.D, C.BLOCK_D), C.SIGN)
            b_k = load_tile(x.k, i_b, i_h // C.GROUP, o_j, m_j, C.D, C.BLOCK_D)
            b_lse, _delta = load_rows(x, given, i_b, i_h, o_i, m_i)
            b_s, _slope = cap_scores(dot(b_q, tl.trans(b_k), C) * x.sizes.scale, x)
            columns = key_places(x, i_b, i_h // C.GROUP, j_first, C.BLOCK_K)
            own = owned_queries(x, query_places(x, i_b, i_h, i_first, C.BLOCK_Q), i_b, i_h, i_h, keys)
            b_s, _visible = mask_scores(b_s, x, i_b, i_h, own, columns, keys, tile, C, PARTIAL, 1)
            b_p = tl.exp2(b_s - b_lse[:, None])
            m_kept = kept_pairs(x, i_b, i_h, own, columns, C, 1)
            b_sum += tl.where(m_kept, b_p, 0.0)
    b_sum *= x.dropout.keep_scale / weights.over_h
    o_row = (tl.cast(i_line, tl.int64) * x.sizes.Nq + o_i) * x.sizes.Nk
    m_pairs = m_i[:, None] & (o_j < x.sizes.Nk)[None, :]
    tl.store(weights.ptr + o_row[:, None] + o_j[None, :], b_sum.to(weights.ptr.dtype.element_ty), mask=m_pairs)


@triton.jit
def gather_weight_products(b_sum, b_q, b_lse, x, given, own, walk, C: tl.constexpr, MODE: tl.constexpr):
    """Add sum_j dW_ij W_ij of the key tiles of a walk."""
    GAP: tl.constexpr = x.mask.lengths is not None
    i_hk = own.i_h // C.GROUP
    p_k = head_pointer(x.k, own.i_b, i_hk)
    entry = entry_at(x.mask, walk, walk.first, C.LIST_K // C.BLOCK_K, GAP)
    for t in range(walk.first, walk.end):
        j_first, tile, entry = next_tile(x.mask, walk, t, entry, C.LIST_K, C.BLOCK_K, GAP)
        columns = key_places(x, own.i_b, i_hk, j_first, C.BLOCK_K)
        b_k = load_block(None, p_k, x.k.n, columns, own.keys, C.D, C.BLOCK_K, C.BLOCK_D, MODE != FULL)
        b_s, _slope = cap_scores(dot(b_q, tl.trans(b_k), C) * x.sizes.scale, x)
        b_s, _visible = mask_scores(b_s, x, own.i_b, own.i_h, own, columns, own.keys, tile, C, MODE, 1)
        b_p = tl.exp2(b_s - b_lse[:, None])
        m_kept = kept_pairs(x, own.i_b, own.i_h, own, columns, C, 1)
        b_w = tl.where(m_kept, b_p * x.dropout.keep_scale, 0.0)
        b_dw = tl.full([C.BLOCK_Q, C.BLOCK_K], 0.0, tl.float32)
        b_dw = add_weight_gradient(b_dw, x, given, own.i_b, own.i_h, own.first, j_first, C, 1)
        b_sum += tl.sum(tl.where(b_w == 0.0, 0.0, b_w * b_dw), 1)
    return b_sum


@triton.jit
def weight_products_tile(i_program, x, given, grid, C: tl.constexpr):
    """Add what the gradient of the weights asks for to delta of BLOCK_Q queries."""
    i_tile, i_b, i_h = locate(i_program, x.mask, grid, x.sizes.Nq, C.LIST_Q, C.BLOCK_Q, x.mask.high is not None)
    i_first = i_tile * C.BLOCK_Q
    o_i = i_first + tl.arange(0, C.BLOCK_Q)
    m_i = o_i < x.sizes.Nq
    rows = query_places(x, i_b, i_h, i_first, C.BLOCK_Q)
    own = owned_queries(x, rows, i_b, i_h, i_h, key_count(x.mask, i_b, x.sizes.Nk))
    i_last = tl.minimum(i_first + C.BLOCK_Q, x.sizes.Nq) - 1
    span = key_span(x, i_b, i_h, i_first, i_last, own.keys, C)
    b_q = signed(load_tile(x.q, i_b, i_h, o_i, m_i, C.D, C.BLOCK_D), C.SIGN)
    b_lse, b_sum = load_rows(x, given, i_b, i_h, o_i, m_i)
    b_sum = gather_weight_products(b_sum, b_q, b_lse, x, given, own, full_tiles(span), C, FULL)
    b_sum = gather_weight_products(b_sum, b_q, b_lse, x, given, own, other_tiles(span, False), C, PARTIAL)
    tl.store(given.delta + line_offsets(x, i_b, i_h, o_i), b_sum, mask=m_i)


@triton.jit
def weight_products_kernel(q, k, v, bias, mask, dropout, sizes, modifiers, given, grid, C: tl.constexpr):
    """delta of BLOCK_Q queries a program. Grid: grid.programs. Nothing here is a product with what a mask hides."""
    weight_products_tile(tl.program_id(0), Inputs(q, k, v, bias, mask, dropout, sizes, modifiers), given, grid, C)
