"""Exact attention, backward, in passes that each own what they write: no atomics, so the same bits every time.

    P_ij = exp(s_ij - lse_i)      delta_i = dout_i . out_i - dlse_i      dS = P (Z (dO V^T) - delta)
    dV = (Z P)^T dO               dK = scale dS^T Q       dQ = scale dS K       dbias = dS summed where it broadcasts

Dao, "FlashAttention-2", ICLR 2024, section 3. `delta_kernel` prepares delta. `key_gradient_kernel` owns BLOCK_K keys of
one key head and walks the queries of its whole group, so that grouped queries need no sum afterwards; scores are taken
transposed, keys along the rows, so that P^T and dS^T come out of one product as the left operand of the next.
`query_gradient_kernel` owns BLOCK_Q queries and walks the keys as the forward does. `bias_gradient_kernel` owns a
tile of the bias and walks everything that was broadcast over it. Only lse and delta are read besides the inputs: O(n)
memory.

Masks and NaN: as in attention.py. A query without a visible key has lse = -inf, read as +inf here: its weights are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    FULL,
    INF,
    LOG2E,
    PARTIAL,
    any_flag,
    any_not_finite,
    dot,
    kept_pairs,
    key_count,
    list_entries,
    list_entry,
    load_bias,
    load_block,
    load_tile,
    locate,
    lower_bound,
    planned_entries,
    planned_entry,
    planned_range,
    row_offsets,
    select_dot,
    store_tile,
    tile_bits,
    tile_range,
    visible_keys,
    visible_queries,
    walk_position,
    window_pairs,
)


@triton.jit
def delta_kernel(
    out, grad_out, grad_lse, delta, rows, Hq, Nq, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr
):
    """delta = dout . out - dlse of BLOCK_R of the B * Hq * Nq rows; delta and grad_lse (None: 0) are contiguous."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < rows
    i_b, i_h, i_q = o_r // Nq // Hq, o_r // Nq % Hq, o_r % Nq
    b_out = load_tile(out, i_b, i_h, i_q, m_r, DV, BLOCK_DV).to(tl.float32)
    b_do = load_tile(grad_out, i_b, i_h, i_q, m_r, DV, BLOCK_DV).to(tl.float32)
    b_delta = tl.sum(b_out * b_do, 1)
    if grad_lse is not None:
        b_delta -= tl.load(grad_lse + o_r, mask=m_r, other=0.0)
    tl.store(delta + o_r, b_delta, mask=m_r)


@triton.jit
def load_rows(lse, delta, o_row, m_row):
    """lse in log2 (+inf where a row sees nothing or is missing) and delta of the rows at o_row."""
    b_lse = tl.load(lse + o_row, mask=m_row, other=INF)
    b_delta = tl.load(delta + o_row, mask=m_row, other=0.0)
    return tl.where(b_lse == -INF, INF, b_lse * LOG2E), b_delta


@triton.jit
def pair_gradient(b_p, b_dp, b_delta, m_kept, keep_scale, DROPOUT: tl.constexpr):
    """Weights after dropout (unscaled), and dS = P (Z dP - delta): 0 where P is 0, whatever NaN is behind the mask."""
    b_zp = b_p
    if DROPOUT:
        b_zp = tl.where(m_kept, b_p, 0.0)
        b_dp = tl.where(m_kept, b_dp * keep_scale, 0.0)
    return b_zp, tl.where(b_p == 0.0, 0.0, b_p * (b_dp - b_delta))


# --- dK and dV ---


@triton.jit
def gather_key_gradient(
    b_dk, b_dv, b_k, b_v, q, grad_out, lse, delta, bias, mask, p_seed,
    i_b, i_h, j_first, o_j, keys, heads, Nq, scale, threshold, keep_scale,
    first, end, skip_at, skip, entry_begin,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LIST_Q: tl.constexpr, LIST_K: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    MODE: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """Walk the query tiles first .. end of one head, or of its row of the list, leaving out `skip` of them at
    `skip_at`."""
    LISTS: tl.constexpr = mask.indptr is not None
    PARTS: tl.constexpr = LIST_Q // BLOCK_Q
    p_q = q.ptr + row_offsets(q, i_b, i_h, 0)
    p_do = grad_out.ptr + row_offsets(grad_out, i_b, i_h, 0)
    o_line = (tl.cast(i_b, tl.int64) * heads + i_h) * Nq
    if LISTS:
        at = walk_position(first, skip_at, skip, 0, 0, False)
        block, tile = planned_entry(mask, entry_begin + at // PARTS)
    for t in range(first, end):
        if LISTS:
            i_first = block * LIST_Q + walk_position(t, skip_at, skip, 0, 0, False) % PARTS * BLOCK_Q
            tile_now = tile
            at = walk_position(t + 1, skip_at, skip, 0, 0, False)
            block, tile = planned_entry(mask, entry_begin + at // PARTS)
        else:
            i_first = walk_position(t, skip_at, skip, 0, 0, False) * BLOCK_Q
        o_i = i_first + tl.arange(0, BLOCK_Q)
        m_i = o_i < Nq
        b_q = load_block(p_q, q.n, i_first, Nq, D, BLOCK_Q, BLOCK_D, MODE != FULL)
        b_lse, b_delta = load_rows(lse, delta, o_line + o_i, m_i)
        b_s = dot(b_k, tl.trans(b_q), PRECISION) * scale  # [BLOCK_K, BLOCK_Q]

        m_visible = (o_i >= 0)[None, :] & (o_j >= 0)[:, None]
        if bias.ptr is not None:
            m_inside = (o_j < keys)[:, None] & m_i[None, :]
            b_bias = load_bias(bias, i_b, i_h, o_i[None, :], o_j[:, None], m_inside)
            m_visible = m_visible & (b_bias != -INF)
            b_s += b_bias
            b_s = tl.where(m_visible, b_s, -INF)
        if MODE == PARTIAL:
            m_visible = m_visible & window_pairs(mask, o_i[None, :], o_j[:, None], keys, LOW, HIGH)
            if LISTS:
                first_key = j_first % LIST_K
                m_visible = m_visible & tile_bits(mask, tile_now, o_i % LIST_Q, first_key, LIST_Q, LIST_K, BLOCK_K, 0)
            b_s = tl.where(m_visible, b_s, -INF)
        b_p = tl.exp2(b_s - b_lse[None, :])
        m_kept = b_p != 0.0
        if DROPOUT:
            m_kept = tl.trans(kept_pairs(p_seed, i_b, i_h, i_first, j_first, threshold, BLOCK_Q, BLOCK_K))

        b_do = load_block(p_do, grad_out.n, i_first, Nq, DV, BLOCK_Q, BLOCK_DV, MODE != FULL)
        b_dp = dot(b_v, tl.trans(b_do), PRECISION)
        b_zp, b_ds = pair_gradient(b_p, b_dp, b_delta[None, :], m_kept, keep_scale, DROPOUT)
        b_dv = select_dot(b_zp, m_visible, b_do, b_dv, PRECISION, SAFE)
        b_dk = select_dot(b_ds, m_visible, b_q, b_dk, PRECISION, SAFE)
    return b_dk, b_dv


@triton.jit
def key_gradient_tile(
    i_program, q, k, v, grad_out, dk, dv, lse, delta, bias, mask, p_seed,
    lines, heads, Nq, Nk, scale, grad_scale, threshold, keep_scale, section,
    GROUP: tl.constexpr, SIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LIST_Q: tl.constexpr, LIST_K: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """Compute and store one tile of dk and dv; returns 1 if it is not finite."""
    LISTS: tl.constexpr = mask.indptr is not None
    tiles = tl.cdiv(Nk, BLOCK_K)
    if LISTS:
        tiles = mask.blocks * (LIST_K // BLOCK_K)
    i_tile, i_line = locate(i_program, mask, tiles, lines, heads, section, LIST_K // BLOCK_K, LOW and not HIGH)
    i_b = i_line // heads
    i_h = i_line % heads
    j_first = i_tile * BLOCK_K
    o_j = j_first + tl.arange(0, BLOCK_K)
    m_j = o_j < Nk
    keys = key_count(mask, i_b, Nk)
    any_first, any_end, all_first, all_end = visible_queries(mask, j_first, j_first + BLOCK_K - 1, keys, Nq, LOW, HIGH)

    m_read = o_j < keys
    b_k = load_tile(k, i_b, i_h, o_j, m_read, D, BLOCK_D)
    if SIGN != 1:
        b_k = (b_k.to(tl.float32) * SIGN).to(b_k.dtype)
    b_v = load_tile(v, i_b, i_h, o_j, m_read, DV, BLOCK_DV)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    first, end, full_first, full_end = tile_range(any_first, any_end, all_first, all_end, BLOCK_Q)
    begin = tl.zeros([], tl.int64)
    for g in range(GROUP):
        i_hq = i_h * GROUP + g
        if LISTS:
            begin, clean, live = planned_entries(mask, i_b, i_hq, j_first // LIST_K)
            first, full_first = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
            # Keys beyond a length are seen by nobody, and masked in a tile that a length cuts.
            end = tl.where(j_first < keys, live, 0) * (LIST_Q // BLOCK_Q)
            full_end = tl.where(j_first + BLOCK_K <= keys, clean, 0) * (LIST_Q // BLOCK_Q)
        if not SAFE:
            b_dk, b_dv = gather_key_gradient(
                b_dk, b_dv, b_k, b_v, q, grad_out, lse, delta, bias, mask, p_seed,
                i_b, i_hq, j_first, o_j, keys, heads * GROUP, Nq, scale, threshold, keep_scale,
                full_first, full_end, full_end, 0, begin,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, LIST_Q, LIST_K, LOW, HIGH, DROPOUT, PRECISION, FULL, SAFE,
            )  # fmt: skip
        skip = 0 if SAFE else full_end - full_first
        b_dk, b_dv = gather_key_gradient(
            b_dk, b_dv, b_k, b_v, q, grad_out, lse, delta, bias, mask, p_seed,
            i_b, i_hq, j_first, o_j, keys, heads * GROUP, Nq, scale, threshold, keep_scale,
            first, end - skip, full_first, skip, begin,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, LIST_Q, LIST_K, LOW, HIGH, DROPOUT, PRECISION, PARTIAL, SAFE,
        )  # fmt: skip

    m_dead = (m_read == 0)[:, None]
    store_tile(dk, i_b, i_h, o_j, m_j, tl.where(m_dead, 0.0, b_dk * grad_scale), D, BLOCK_D)
    store_tile(dv, i_b, i_h, o_j, m_j, tl.where(m_dead, 0.0, b_dv * keep_scale), DV, BLOCK_DV)
    return any_not_finite(b_dk) | any_not_finite(b_dv)


@triton.jit
def key_gradient_kernel(
    q, k, v, grad_out, dk, dv, lse, delta, bias, mask, p_seed, flags,
    programs, lines, heads, Nq, Nk, scale, grad_scale, threshold, keep_scale, section,
    GROUP: tl.constexpr, SIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LIST_Q: tl.constexpr, LIST_K: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_K keys a program. Grid: programs = tiles * lines; SAFE: fewer, each with every so many of
    them, as in attention.py.

    A line is a batch element and one of `heads` key heads. mask is the transposed list.
    scale as in the forward; grad_scale is the true one.
    """
    i_program = tl.program_id(0)
    if SAFE:
        if any_flag(flags, i_program, programs, tl.num_programs(0)):
            for i in range(i_program, programs, tl.num_programs(0)):
                if tl.load(flags + i) != 0:
                    key_gradient_tile(
                        i, q, k, v, grad_out, dk, dv, lse, delta, bias, mask, p_seed,
                        lines, heads, Nq, Nk, scale, grad_scale, threshold, keep_scale, section, GROUP, SIGN,
                        D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, LIST_Q, LIST_K, LOW, HIGH, DROPOUT, PRECISION, SAFE,
                    )  # fmt: skip
    else:
        flag = key_gradient_tile(
            i_program, q, k, v, grad_out, dk, dv, lse, delta, bias, mask, p_seed,
            lines, heads, Nq, Nk, scale, grad_scale, threshold, keep_scale, section, GROUP, SIGN,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, LIST_Q, LIST_K, LOW, HIGH, DROPOUT, PRECISION, SAFE,
        )  # fmt: skip
        if flags is not None:
            tl.store(flags + i_program, flag)


# --- dQ ---


@triton.jit
def gather_query_gradient(
    b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, k, v, bias, mask, p_seed,
    i_b, i_h, i_first, o_i, Nq, keys, scale, threshold, keep_scale,
    first, end, skip_at, skip, entry_begin, gap_at, gap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LIST_Q: tl.constexpr, LIST_K: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    MODE: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """Walk the key tiles first .. end as `attend` does; returns b_dq after it."""
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
            at = walk_position(t + 1, skip_at, skip, gap_at, gap, GAP)
            block, tile = planned_entry(mask, entry_begin + at // PARTS)
        else:
            j_first = walk_position(t, skip_at, skip, 0, 0, False) * BLOCK_K
        o_j = j_first + tl.arange(0, BLOCK_K)
        b_k = load_block(p_k, k.n, j_first, keys, D, BLOCK_K, BLOCK_D, MODE != FULL)
        b_s = dot(b_q, tl.trans(b_k), PRECISION) * scale

        m_visible = (o_i >= 0)[:, None] & (o_j >= 0)[None, :]
        if bias.ptr is not None:
            m_inside = (o_i < Nq)[:, None] & (o_j < keys)[None, :]
            b_bias = load_bias(bias, i_b, i_h, o_i[:, None], o_j[None, :], m_inside)
            m_visible = m_visible & (b_bias != -INF)
            b_s += b_bias
            b_s = tl.where(m_visible, b_s, -INF)
        if MODE == PARTIAL:
            m_visible = m_visible & window_pairs(mask, o_i[:, None], o_j[None, :], keys, LOW, HIGH)
            if LISTS:
                first_key = j_first % LIST_K
                m_visible = m_visible & tile_bits(mask, tile_now, o_i % LIST_Q, first_key, LIST_Q, LIST_K, BLOCK_K, 1)
            b_s = tl.where(m_visible, b_s, -INF)
        b_p = tl.exp2(b_s - b_lse[:, None])

        b_v = load_block(p_v, v.n, j_first, keys, DV, BLOCK_K, BLOCK_DV, MODE != FULL)
        b_dp = dot(b_do, tl.trans(b_v), PRECISION)
        m_kept = b_p != 0.0
        if DROPOUT:
            m_kept = kept_pairs(p_seed, i_b, i_h, i_first, j_first, threshold, BLOCK_Q, BLOCK_K)
        _zp, b_ds = pair_gradient(b_p, b_dp, b_delta[:, None], m_kept, keep_scale, DROPOUT)
        b_dq = select_dot(b_ds, m_visible, b_k, b_dq, PRECISION, SAFE)
    return b_dq


@triton.jit
def query_gradient_tile(
    i_program, q, k, v, grad_out, dq, lse, delta, bias, mask, p_seed,
    lines, heads, Nq, Nk, scale, grad_scale, threshold, keep_scale, section,
    GROUP: tl.constexpr, SIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LIST_Q: tl.constexpr, LIST_K: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """Compute and store one tile of dq; returns 1 if it is not finite."""
    LISTS: tl.constexpr = mask.indptr is not None
    tiles = tl.cdiv(Nq, BLOCK_Q)
    if LISTS:
        tiles = mask.blocks * (LIST_Q // BLOCK_Q)
    i_tile, i_line = locate(i_program, mask, tiles, lines, heads, section, LIST_Q // BLOCK_Q, HIGH)
    i_b = i_line // heads
    i_h = i_line % heads
    i_first = i_tile * BLOCK_Q
    o_i = i_first + tl.arange(0, BLOCK_Q)
    m_i = o_i < Nq
    keys = key_count(mask, i_b, Nk)
    i_last = tl.minimum(i_first + BLOCK_Q, Nq) - 1
    any_first, any_end, all_first, all_end = visible_keys(mask, i_first, i_last, keys, LOW, HIGH)

    b_q = load_tile(q, i_b, i_h, o_i, m_i, D, BLOCK_D)
    if SIGN != 1:
        b_q = (b_q.to(tl.float32) * SIGN).to(b_q.dtype)
    b_do = load_tile(grad_out, i_b, i_h, o_i, m_i, DV, BLOCK_DV)
    b_lse, b_delta = load_rows(lse, delta, (tl.cast(i_b, tl.int64) * heads + i_h) * Nq + o_i, m_i)
    p_k = k.ptr + row_offsets(k, i_b, i_h // GROUP, 0)
    p_v = v.ptr + row_offsets(v, i_b, i_h // GROUP, 0)
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    if LISTS:
        begin, clean, live = planned_entries(mask, i_b, i_h, i_first // LIST_Q)
        first, full_first = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
        full_end, end, gap_at, gap = planned_range(mask, begin, clean, live, keys, LIST_K, LIST_K // BLOCK_K)
    else:
        begin, gap_at, gap = tl.zeros([], tl.int64), 0, 0
        first, end, full_first, full_end = tile_range(any_first, any_end, all_first, all_end, BLOCK_K)
    if not SAFE:
        b_dq = gather_query_gradient(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, k, v, bias, mask, p_seed,
            i_b, i_h, i_first, o_i, Nq, keys, scale, threshold, keep_scale,
            full_first, full_end, full_end, 0, begin, gap_at, gap,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, LIST_Q, LIST_K, LOW, HIGH, DROPOUT, PRECISION, FULL, SAFE,
        )  # fmt: skip
    skip = 0 if SAFE else full_end - full_first
    b_dq = gather_query_gradient(
        b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, k, v, bias, mask, p_seed,
        i_b, i_h, i_first, o_i, Nq, keys, scale, threshold, keep_scale,
        first, end - skip, full_first, skip, begin, gap_at, gap,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, LIST_Q, LIST_K, LOW, HIGH, DROPOUT, PRECISION, PARTIAL, SAFE,
    )  # fmt: skip
    store_tile(dq, i_b, i_h, o_i, m_i, b_dq * grad_scale, D, BLOCK_D)
    return any_not_finite(b_dq)


@triton.jit
def query_gradient_kernel(
    q, k, v, grad_out, dq, lse, delta, bias, mask, p_seed, flags,
    programs, lines, heads, Nq, Nk, scale, grad_scale, threshold, keep_scale, section,
    GROUP: tl.constexpr, SIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LIST_Q: tl.constexpr, LIST_K: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, SAFE: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_Q queries a program. Grid: programs = tiles * lines; SAFE: fewer, each with every so many of them,
    as in attention.py.

    A line is a batch element and one of `heads` query heads; scale as in the forward; grad_scale is the true one.
    """
    i_program = tl.program_id(0)
    if SAFE:
        if any_flag(flags, i_program, programs, tl.num_programs(0)):
            for i in range(i_program, programs, tl.num_programs(0)):
                if tl.load(flags + i) != 0:
                    query_gradient_tile(
                        i, q, k, v, grad_out, dq, lse, delta, bias, mask, p_seed,
                        lines, heads, Nq, Nk, scale, grad_scale, threshold, keep_scale, section, GROUP, SIGN,
                        D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, LIST_Q, LIST_K, LOW, HIGH, DROPOUT, PRECISION, SAFE,
                    )  # fmt: skip
    else:
        flag = query_gradient_tile(
            i_program, q, k, v, grad_out, dq, lse, delta, bias, mask, p_seed,
            lines, heads, Nq, Nk, scale, grad_scale, threshold, keep_scale, section, GROUP, SIGN,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_Q, BLOCK_K, LIST_Q, LIST_K, LOW, HIGH, DROPOUT, PRECISION, SAFE,
        )  # fmt: skip
        if flags is not None:
            tl.store(flags + i_program, flag)


# --- dbias ---


@triton.jit
def bias_gradient_kernel(
    q, k, v, grad_out, dbias, lse, delta, bias, mask, p_seed,
    heads, Nq, Nk, scale, threshold, keep_scale,
    out_heads, out_q_tiles, out_k_tiles, loop_b, loop_h, loop_q, loop_k,
    GROUP: tl.constexpr, SIGN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LIST_Q: tl.constexpr, LIST_K: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SUM_Q: tl.constexpr, SUM_K: tl.constexpr,
):  # fmt: skip
    """dbias of one tile of dbias (a Bias of float32 or the bias's dtype). Grid: out_b * out_heads * q tiles * k tiles.

    The program adds dS over loop_b batch elements, loop_h heads, loop_q query tiles and loop_k key tiles: each is 1, or
    all of them where the bias broadcasts. SUM_Q, SUM_K: the rows, the columns of the tile are added up too.
    """
    LISTS: tl.constexpr = mask.indptr is not None
    i_program = tl.program_id(0)
    out_k = i_program % out_k_tiles
    out_q = i_program // out_k_tiles % out_q_tiles
    out_h = i_program // out_k_tiles // out_q_tiles % out_heads
    out_b = i_program // out_k_tiles // out_q_tiles // out_heads
    b_sum = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for t in range(loop_b * loop_h * loop_q * loop_k):
        i_k = out_k + t % loop_k
        i_q = out_q + t // loop_k % loop_q
        i_h = out_h + t // loop_k // loop_q % loop_h
        i_b = out_b + t // loop_k // loop_q // loop_h
        i_first, j_first = i_q * BLOCK_Q, i_k * BLOCK_K
        o_i, o_j = i_first + tl.arange(0, BLOCK_Q), j_first + tl.arange(0, BLOCK_K)
        keys = key_count(mask, i_b, Nk)
        any_first, any_end, _first, _end = visible_keys(mask, i_first, i_first + BLOCK_Q - 1, keys, LOW, HIGH)
        needed = (i_first < Nq) & (j_first < any_end) & (j_first + BLOCK_K > any_first)
        tile = -1
        if LISTS:
            begin, stop = list_entries(mask, i_b, i_h, i_first // LIST_Q)
            at = lower_bound(mask.indices, begin, stop, j_first // LIST_K)
            block, tile = list_entry(mask, at, stop - 1)
            needed = needed & (at < stop) & (block == j_first // LIST_K)
        if needed:
            m_i, m_j = o_i < Nq, o_j < keys
            b_q = load_tile(q, i_b, i_h, o_i, m_i, D, BLOCK_D)
            if SIGN != 1:
                b_q = (b_q.to(tl.float32) * SIGN).to(b_q.dtype)
            b_do = load_tile(grad_out, i_b, i_h, o_i, m_i, DV, BLOCK_DV)
            b_k = load_tile(k, i_b, i_h // GROUP, o_j, m_j, D, BLOCK_D)
            b_v = load_tile(v, i_b, i_h // GROUP, o_j, m_j, DV, BLOCK_DV)
            b_lse, b_delta = load_rows(lse, delta, (tl.cast(i_b, tl.int64) * heads + i_h) * Nq + o_i, m_i)
            m_visible = m_i[:, None] & window_pairs(mask, o_i[:, None], o_j[None, :], keys, LOW, HIGH)
            if LISTS:
                m_visible = m_visible & tile_bits(
                    mask, tile, o_i % LIST_Q, j_first % LIST_K, LIST_Q, LIST_K, BLOCK_K, 1
                )
            b_bias = load_bias(bias, i_b, i_h, o_i[:, None], o_j[None, :], m_visible)
            m_visible = m_visible & (b_bias != -INF)
            b_p = tl.exp2(dot(b_q, tl.trans(b_k), PRECISION) * scale + b_bias - b_lse[:, None])
            b_dp = dot(b_do, tl.trans(b_v), PRECISION)
            m_kept = m_visible
            if DROPOUT:
                m_kept = kept_pairs(p_seed, i_b, i_h, i_first, j_first, threshold, BLOCK_Q, BLOCK_K)
            _zp, b_ds = pair_gradient(b_p, b_dp, b_delta[:, None], m_kept, keep_scale, DROPOUT)
            b_sum += tl.where(m_visible, b_ds, 0.0)

    o_q = tl.where(SUM_Q, 0, out_q * BLOCK_Q + tl.arange(0, BLOCK_Q))
    o_k = tl.where(SUM_K, 0, out_k * BLOCK_K + tl.arange(0, BLOCK_K))
    p_line = dbias.ptr + tl.cast(out_b, tl.int64) * dbias.b + tl.cast(out_h, tl.int64) * dbias.h
    if SUM_K:
        b_row = tl.sum(b_sum, 1)
        tl.store(p_line + tl.cast(o_q, tl.int64) * dbias.q, b_row.to(dbias.ptr.dtype.element_ty), mask=o_q < Nq)
    elif SUM_Q:
        b_column = tl.sum(b_sum, 0)
        tl.store(p_line + tl.cast(o_k, tl.int64) * dbias.k, b_column.to(dbias.ptr.dtype.element_ty), mask=o_k < Nk)
    else:
        p_pairs = p_line + (tl.cast(o_q, tl.int64) * dbias.q)[:, None] + (tl.cast(o_k, tl.int64) * dbias.k)[None, :]
        m_pairs = (o_q < Nq)[:, None] & (o_k < Nk)[None, :]
        tl.store(p_pairs, b_sum.to(dbias.ptr.dtype.element_ty), mask=m_pairs)
