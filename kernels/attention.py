"""Exact attention, forward.

    s_ij = cap(scale * q_i . k_j) + bias_ij   over visible pairs
    lse_i = log sum_j exp(s_ij)               out_i = sum_j Z_ij exp(s_ij - lse_i) v_j

Dao et al., "FlashAttention-2", ICLR 2024: one program owns BLOCK_Q queries of one head and walks the keys in tiles of
BLOCK_K with a running maximum and sum, all in units of log2, so that a score costs one multiply-add and one exp2. Tiles
that every query sees whole are walked first, without a mask; then those that a window, a length or the end cuts. Under
a list the same two walks go over the blocks of the program's block row, in tiles that divide a block: over those that
need no mask, then over the others (plan.py). The tiles of a program never cross a block of the list.

PACK query heads that share a key head ride in the rows of one tile (row r is query r // PACK of head r % PACK of the
group): with few queries that fills the tensor cores and reads keys once. SPLITS programs may share the keys of one tile
(flash decoding, Dao et al. 2023); each writes a partial result and `merge_kernel` joins them.

A NaN behind a mask meets a weight of 0 in the product with V and would survive it. Rather than pay for that in every
tile, each program of a masked call flags a result that is not finite, and a second launch (SAFE) computes the flagged
tiles again, with products that select. It costs a few microseconds when there is nothing to do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import (
    FULL,
    INF,
    LN2,
    LOG2E,
    PARTIAL,
    PARTIAL_SUMS,
    Inputs,
    Places,
    any_not_finite,
    cap_scores,
    dot,
    head_pointer,
    kept_pairs,
    key_places,
    line_offsets,
    load_tile,
    load_walked,
    mask_scores,
    online_softmax_update,
    owned_queries,
    present,
    query_tokens,
    select_dot,
    signed,
    store_tile,
)
from .walk import entry_at, full_tiles, key_count, key_span, locate, next_tile, other_tiles, run_tiles, split_span


class Softmax(NamedTuple):
    """What a row has met so far: the weighted sum of values, the largest score in log2, and the sums of weights."""

    acc: Any  # [BLOCK_Q, BLOCK_DV]
    largest: Any  # [BLOCK_Q]
    sums: Any  # [BLOCK_Q, PARTIAL_SUMS]


class Described(NamedTuple):
    """Descriptors of k and v with blocks (1, 1, BLOCK_K, BLOCK_D or BLOCK_DV), by which the walk that needs no mask
    loads its tiles (TMA), or None."""

    k: Any
    v: Any


class Output(NamedTuple):
    """out (B, Hq, Nq, DV) as tiles.Rows and lse (B, Hq, Nq), contiguous; SPLIT: of splits * B batch elements."""

    ptr: Any
    b: Any
    h: Any
    n: Any
    lse: Any


@triton.jit
def attend(state, b_q, x, tiles, own, walk, C: tl.constexpr, MODE: tl.constexpr):
    """Take the key tiles of a walk into the softmax of the program's queries."""
    GAP: tl.constexpr = x.mask.lengths is not None
    BIASED: tl.constexpr = x.bias.ptr is not None or x.modifiers.cap is not None or x.modifiers.diagonals is not None
    i_hk = own.i_h // C.GROUP
    p_k, p_v = head_pointer(x.k, own.i_b, i_hk), head_pointer(x.v, own.i_b, i_hk)
    b_acc, b_m, b_l = state.acc, state.largest, state.sums
    entry = entry_at(x.mask, walk, walk.first, C.LIST_K // C.BLOCK_K, GAP)
    for t in range(walk.first, walk.end):
        j_first, tile, entry = next_tile(x.mask, walk, t, entry, C.LIST_K, C.BLOCK_K, GAP)
        columns = key_places(x, own.i_b, i_hk, j_first, C.BLOCK_K)
        b_k = load_walked(
            tiles.k, x.mask.key_order, p_k, x.k.n, own.i_b, i_hk, columns, own.keys, C.D, C.BLOCK_K, C.BLOCK_D, MODE
        )
        b_s = dot(b_q, tl.trans(b_k), C)
        if BIASED:
            b_s, _slope = cap_scores(b_s * x.sizes.scale, x)
        b_s, m_visible = mask_scores(b_s, x, own.i_b, own.o_h, own, columns, own.keys, tile, C, MODE, 1)
        b_p, b_alpha, b_m, b_l = online_softmax_update(b_s, b_m, b_l, 1.0 if BIASED else x.sizes.scale)
        if x.dropout.seed is not None:
            b_p = tl.where(kept_pairs(x, own.i_b, own.i_h, own, columns, C, 1), b_p, 0.0)
        b_v = load_walked(
            tiles.v, x.mask.key_order, p_v, x.v.n, own.i_b, i_hk, columns, own.keys, C.DV, C.BLOCK_K, C.BLOCK_DV, MODE
        )
        b_acc = select_dot(b_p, m_visible, b_v, b_acc * b_alpha[:, None], C)
    return Softmax(b_acc, b_m, b_l)


@triton.jit
def begin_softmax(x, o_h, i_split, C: tl.constexpr):
    """Maximum and sums of the rows before any key: nothing, or the sink of the head, which the first split counts."""
    b_m = tl.full([C.BLOCK_Q], -INF, tl.float32)
    b_l = tl.full([C.BLOCK_Q, PARTIAL_SUMS], 0.0, tl.float32)
    if x.modifiers.sinks is not None:
        b_m = tl.where(i_split == 0, tl.load(x.modifiers.sinks + o_h) * LOG2E, b_m)
        o_part = tl.arange(0, PARTIAL_SUMS)[None, :]
        b_l = tl.where((b_m[:, None] > -INF) & (o_part == 0), 1.0, b_l)
    return b_m, b_l


@triton.jit
def forward_tile(i_program, x, tiles, out, grid, C: tl.constexpr):
    """Compute and store one tile of out and lse; returns 1 if it is not finite."""
    i_split = i_program % grid.splits
    i_tile, i_b, i_line = locate(
        i_program // grid.splits, x.mask, grid, x.sizes.Nq * C.PACK, C.LIST_Q, C.BLOCK_Q, x.mask.high is not None
    )
    i_h = i_line * C.PACK
    o_r = i_tile * C.BLOCK_Q + tl.arange(0, C.BLOCK_Q)
    o_i, o_h = o_r // C.PACK, i_h + o_r % C.PACK
    i_first = i_tile * C.BLOCK_Q // C.PACK
    i_last = tl.minimum((i_tile * C.BLOCK_Q + C.BLOCK_Q - 1) // C.PACK, x.sizes.Nq - 1)
    rows = Places(i_first, o_i, query_tokens(x, i_b, i_h, o_i))  # where there is an order, PACK is 1
    m_i = present(x.mask.query_order, rows, x.sizes.Nq)
    own = owned_queries(x, rows, i_b, i_h, o_h, key_count(x.mask, i_b, x.sizes.Nk))
    span = key_span(x, i_b, i_h, i_first, i_last, own.keys, C)
    if C.SPLIT:
        span = split_span(span, i_split, grid.splits)

    b_q = signed(load_tile(x.q, i_b, o_h, rows.token, m_i, C.D, C.BLOCK_D), C.SIGN)
    b_acc = tl.full([C.BLOCK_Q, C.BLOCK_DV], 0.0, tl.float32)
    b_m, b_l = begin_softmax(x, o_h, i_split, C)
    state = Softmax(b_acc, b_m, b_l)
    MASKED: tl.constexpr = C.SAFE or x.mask.token_lengths is not None  # a length cuts where it likes
    if not MASKED:
        state = attend(state, b_q, x, tiles, own, full_tiles(span), C, FULL)
    state = attend(state, b_q, x, tiles, own, other_tiles(span, MASKED), C, PARTIAL)

    b_l = tl.sum(state.sums, 1)
    b_sum = tl.where(b_l == 0.0, 1.0, b_l)
    b_lse = tl.where(b_l == 0.0, -INF, (state.largest + tl.log2(b_sum)) * LN2)
    i_part = i_b + i_split * (grid.lines // grid.heads)
    b_out = state.acc * (x.dropout.keep_scale / b_sum)[:, None]
    store_tile(out, i_part, o_h, rows.token, m_i, b_out, C.DV, C.BLOCK_DV)
    tl.store(out.lse + line_offsets(x, i_part, o_h, rows.token), b_lse, mask=m_i)
    return any_not_finite(state.acc)


@triton.jit
def attention_forward_kernel(
    q, k, v, bias, mask, dropout, sizes, modifiers, k_tiles, v_tiles, out, flags, grid, C: tl.constexpr
):
    """The inputs are those of tiles.Inputs. Grid: grid.programs; SAFE: fewer, each with its share of them.

    SPLIT: out and lse hold a partial result for each of the splits. flags [programs], None without a mask: which tiles
    are not finite.
    """
    x = Inputs(q, k, v, bias, mask, dropout, sizes, modifiers)
    tiles = Described(k_tiles, v_tiles)  # no tuple with a descriptor can be given at a launch
    run_tiles(forward_tile, (x, tiles, out, grid), flags, grid.programs, C)


@triton.jit
def merge_kernel(
    part_out, part_lse, out, lse, rows, Hq, Nq, splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Join attention over disjoint keys: out = sum_s w_s out_s / sum_s w_s with w_s = exp(lse_s). Grid: row blocks.

    part_out [splits, rows, DV] and part_lse [splits, rows] in float32; a row is a query of a head of a batch element.
    """
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < rows
    o_d = tl.arange(0, BLOCK_DV)
    m_tile = m_r[:, None] & (o_d < DV)[None, :]
    b_m = tl.full([BLOCK_R], -INF, tl.float32)
    b_l = tl.zeros([BLOCK_R], tl.float32)
    b_acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    for s in range(splits):
        o_s = tl.cast(s, tl.int64) * rows + o_r
        b_lse = tl.load(part_lse + o_s, mask=m_r, other=-INF) * LOG2E
        b_new = tl.maximum(b_m, b_lse, propagate_nan=tl.PropagateNan.ALL)
        b_shift = tl.where(b_new == -INF, 0.0, b_new)
        b_alpha, b_w = tl.exp2(b_m - b_shift), tl.exp2(b_lse - b_shift)
        b_part = tl.load(part_out + o_s[:, None] * DV + o_d[None, :], mask=m_tile, other=0.0)
        b_part = tl.where((b_lse == -INF)[:, None], 0.0, b_part)
        b_acc = b_acc * b_alpha[:, None] + b_part * b_w[:, None]
        b_l = b_l * b_alpha + b_w
        b_m = b_new
    b_sum = tl.where(b_l == 0.0, 1.0, b_l)
    i_b, i_h, i_q = o_r // Nq // Hq, o_r // Nq % Hq, o_r % Nq
    store_tile(out, i_b, i_h, i_q, m_r, b_acc / b_sum[:, None], DV, BLOCK_DV)
    tl.store(lse + o_r, tl.where(b_l == 0.0, -INF, (b_m + tl.log2(b_sum)) * LN2), mask=m_r)
