"""Exact attention, forward.

    s_ij = scale * q_i . k_j + bias_ij        over visible pairs
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

import triton
import triton.language as tl

from .tiles import (
    FULL,
    INF,
    LN2,
    LOG2E,
    PARTIAL,
    PARTIAL_SUMS,
    any_flag,
    any_not_finite,
    dot,
    kept_pairs,
    key_count,
    load_bias,
    load_block,
    load_described,
    load_tile,
    locate,
    online_softmax_update,
    planned_entries,
    planned_entry,
    planned_range,
    row_offsets,
    select_dot,
    store_tile,
    tile_bits,
    tile_range,
    visible_keys,
    walk_position,
    window_pairs,
)


@triton.jit
def attend(
    b_acc, b_m, b_l, b_q, p_k, p_v, k, v, k_tiles, v_tiles, bias, mask, p_seed,
    i_b, i_h, i_hk, i_first, o_i, o_h, keys, scale, threshold,
    first, end, skip_at, skip, entry_begin, gap_at, gap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LIST_Q: tl.constexpr, LIST_K: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    MODE: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """Walk the tiles first .. end of the sequence, or of a row of the list, leaving out `skip` of them at `skip_at`
    (`gap`, `gap_at`: see walk_position); returns b_acc, b_m and b_l after it."""
    LISTS: tl.constexpr = mask.indptr is not None
    GAP: tl.constexpr = LISTS and mask.lengths is not None
    PARTS: tl.constexpr = LIST_K // BLOCK_K
    if LISTS:
        at = walk_position(first, skip_at, skip, gap_at, gap, GAP)
        block, tile = planned_entry(mask, entry_begin + at // PARTS)
    for t in range(first, end):
        if LISTS:
            j_first = block * LIST_K + walk_position(t, skip_at, skip, gap_at, gap, GAP) % PARTS * BLOCK_K
            tile_now = tile
            # The next entry is read a tile ahead, so that no load of keys waits for it.
            at = walk_position(t + 1, skip_at, skip, gap_at, gap, GAP)
            block, tile = planned_entry(mask, entry_begin + at // PARTS)
        else:
            j_first = walk_position(t, skip_at, skip, 0, 0, False) * BLOCK_K
        if MODE == FULL and k_tiles is not None:
            b_k = load_described(k_tiles, i_b, i_hk, j_first, BLOCK_K, BLOCK_D)
        else:
            b_k = load_block(p_k, k.n, j_first, keys, D, BLOCK_K, BLOCK_D, MODE != FULL)
        b_s = dot(b_q, tl.trans(b_k), PRECISION)

        o_j = j_first + tl.arange(0, BLOCK_K)
        m_visible = (o_i[:, None] >= 0) & (o_j >= 0)[None, :]
        if bias.ptr is not None:
            m_inside = (o_j < keys)[None, :] & m_visible
            b_bias = load_bias(bias, i_b, o_h[:, None], o_i[:, None], o_j[None, :], m_inside)
            m_visible = m_visible & (b_bias != -INF)
            b_s = tl.where(m_visible, b_s * scale + b_bias, -INF)
        if MODE == PARTIAL:
            m_visible = m_visible & window_pairs(mask, o_i[:, None], o_j[None, :], keys, LOW, HIGH)
            if LISTS:
                first_key = j_first % LIST_K
                m_visible = m_visible & tile_bits(mask, tile_now, o_i % LIST_Q, first_key, LIST_Q, LIST_K, BLOCK_K, 1)
            b_s = tl.where(m_visible, b_s, -INF)

        b_p, b_alpha, b_m, b_l = online_softmax_update(b_s, b_m, b_l, 1.0 if bias.ptr is not None else scale)
        if DROPOUT:
            m_kept = kept_pairs(p_seed, i_b, i_h, i_first, j_first, threshold, BLOCK_Q, BLOCK_K)
            b_p = tl.where(m_kept, b_p, 0.0)
        if MODE == FULL and v_tiles is not None:
            b_v = load_described(v_tiles, i_b, i_hk, j_first, BLOCK_K, BLOCK_DV)
        else:
            b_v = load_block(p_v, v.n, j_first, keys, DV, BLOCK_K, BLOCK_DV, MODE != FULL)
        b_acc = select_dot(b_p, m_visible, b_v, b_acc * b_alpha[:, None], PRECISION, SAFE)
    return b_acc, b_m, b_l


@triton.jit
def forward_tile(
    i_program, q, k, v, k_tiles, v_tiles, out, lse, bias, mask, p_seed,
    lines, heads, Nq, Nk, scale, threshold, keep_scale, section, splits,
    GROUP: tl.constexpr, PACK: tl.constexpr, SIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LIST_Q: tl.constexpr, LIST_K: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """Compute and store one tile of out and lse; returns 1 if it is not finite."""
    LISTS: tl.constexpr = mask.indptr is not None
    tiles = tl.cdiv(Nq * PACK, BLOCK_Q)
    if LISTS:
        tiles = mask.blocks * (LIST_Q // BLOCK_Q)
    i_split = i_program % splits
    i_tile, i_line = locate(i_program // splits, mask, tiles, lines, heads, section, LIST_Q // BLOCK_Q, HIGH)
    i_b = i_line // heads
    i_h = i_line % heads * PACK
    o_r = i_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    o_i = o_r // PACK
    o_h = i_h + o_r % PACK
    m_i = o_i < Nq
    i_first = i_tile * BLOCK_Q // PACK
    i_last = tl.minimum((i_tile * BLOCK_Q + BLOCK_Q - 1) // PACK, Nq - 1)
    keys = key_count(mask, i_b, Nk)
    any_first, any_end, all_first, all_end = visible_keys(mask, i_first, i_last, keys, LOW, HIGH)

    b_q = load_tile(q, i_b, o_h, o_i, m_i, D, BLOCK_D)
    if SIGN != 1:
        b_q = (b_q.to(tl.float32) * SIGN).to(b_q.dtype)
    p_k = k.ptr + row_offsets(k, i_b, i_h // GROUP, 0)
    p_v = v.ptr + row_offsets(v, i_b, i_h // GROUP, 0)
    b_acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    b_m = tl.full([BLOCK_Q], -INF, tl.float32)
    b_l = tl.zeros([BLOCK_Q, PARTIAL_SUMS], tl.float32)

    if LISTS:
        begin, clean, live = planned_entries(mask, i_b, i_h, i_tile * BLOCK_Q // LIST_Q)
        first, full_first = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
        full_end, end, gap_at, gap = planned_range(mask, begin, clean, live, keys, LIST_K, LIST_K // BLOCK_K)
    else:
        begin, gap_at, gap = tl.zeros([], tl.int64), 0, 0
        first, end, full_first, full_end = tile_range(any_first, any_end, all_first, all_end, BLOCK_K)
    if SPLIT:
        part = tl.cdiv(end - first, splits)
        first = tl.minimum(first + i_split * part, end)
        end = tl.minimum(first + part, end)
        full_first = tl.minimum(tl.maximum(full_first, first), end)
        full_end = tl.maximum(tl.minimum(full_end, end), full_first)

    if not SAFE:
        b_acc, b_m, b_l = attend(
            b_acc, b_m, b_l, b_q, p_k, p_v, k, v, k_tiles, v_tiles, bias, mask, p_seed,
            i_b, i_h, i_h // GROUP, i_first, o_i, o_h, keys, scale, threshold,
            full_first, full_end, full_end, 0, begin, gap_at, gap,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, LIST_Q, LIST_K, LOW, HIGH, DROPOUT, PRECISION, FULL, SAFE,
        )  # fmt: skip
    skip = 0 if SAFE else full_end - full_first
    b_acc, b_m, b_l = attend(
        b_acc, b_m, b_l, b_q, p_k, p_v, k, v, k_tiles, v_tiles, bias, mask, p_seed,
        i_b, i_h, i_h // GROUP, i_first, o_i, o_h, keys, scale, threshold,
        first, end - skip, full_first, skip, begin, gap_at, gap,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, LIST_Q, LIST_K, LOW, HIGH, DROPOUT, PRECISION, PARTIAL, SAFE,
    )  # fmt: skip

    b_l = tl.sum(b_l, 1)
    b_sum = tl.where(b_l == 0.0, 1.0, b_l)
    b_lse = tl.where(b_l == 0.0, -INF, (b_m + tl.log2(b_sum)) * LN2)
    i_batch = i_b + i_split * (lines // heads)
    store_tile(out, i_batch, o_h, o_i, m_i, b_acc * (keep_scale / b_sum)[:, None], DV, BLOCK_DV)
    o_lse = (tl.cast(i_batch, tl.int64) * heads * PACK + o_h) * Nq + o_i
    tl.store(lse + o_lse, b_lse, mask=m_i)
    return any_not_finite(b_acc)


@triton.jit
def attention_forward_kernel(
    q, k, v, k_tiles, v_tiles, out, lse, bias, mask, p_seed, flags,
    programs, lines, heads, Nq, Nk, scale, threshold, keep_scale, section, splits,
    GROUP: tl.constexpr, PACK: tl.constexpr, SIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LIST_Q: tl.constexpr, LIST_K: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """Grid: programs = tiles * lines * splits; SAFE: fewer, each with every so many of them.

    k_tiles, v_tiles: descriptors of k and v with blocks (1, 1, BLOCK_K, BLOCK_D or BLOCK_DV), or None: the walk that
    needs no mask then loads its tiles by TMA.

    A line is a batch element and PACK query heads; `heads` counts lines a batch. scale is positive and in units of
    log2; SIGN (-1, 0, 1) times it is the true one. SPLIT: out (splits * B, ..) and lse (splits * B, ..) hold a partial
    result for each of the splits. flags [programs], None without a mask: which tiles are not finite.
    """
    i_program = tl.program_id(0)
    if SAFE:
        if any_flag(flags, i_program, programs, tl.num_programs(0)):
            for i in range(i_program, programs, tl.num_programs(0)):
                if tl.load(flags + i) != 0:
                    forward_tile(
                        i, q, k, v, None, None, out, lse, bias, mask, p_seed,
                        lines, heads, Nq, Nk, scale, threshold, keep_scale, section, splits, GROUP, PACK, SIGN,
                        D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, LIST_Q, LIST_K, LOW, HIGH, DROPOUT, PRECISION,
                        SPLIT, SAFE,
                    )  # fmt: skip
    else:
        flag = forward_tile(
            i_program, q, k, v, k_tiles, v_tiles, out, lse, bias, mask, p_seed,
            lines, heads, Nq, Nk, scale, threshold, keep_scale, section, splits, GROUP, PACK, SIGN,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, LIST_Q, LIST_K, LOW, HIGH, DROPOUT, PRECISION, SPLIT, SAFE,
        )  # fmt: skip
        if flags is not None:
            tl.store(flags + i_program, flag)


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
