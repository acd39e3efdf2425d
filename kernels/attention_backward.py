"""Exact attention, backward, in passes that each own what they write: no atomics, so the same bits every time.

    P_ij = exp(s_ij - lse_i)      delta_i = dout_i . out_i - dlse_i      dS = P (Z (dO V^T) - delta)
    dV = (Z P)^T dO               dK = scale dS^T Q       dQ = scale dS K       dbias = dS summed where it broadcasts

(with a gradient of returned weights in delta and beside dO V^T: attention_weights.py).

Dao, "FlashAttention-2", ICLR 2024, section 3. `delta_kernel` prepares delta. `key_gradient_kernel` owns BLOCK_K keys of
one key head and walks the queries of its whole group, so that grouped queries need no sum afterwards; scores are taken
transposed, keys along the rows, so that P^T and dS^T come out of one product as the left operand of the next.
`query_gradient_kernel` owns BLOCK_Q queries and walks the keys as the forward does. `bias_gradient_kernel` owns a
tile of the bias and walks everything that was broadcast over it. Only lse and delta are read besides the inputs: O(n)
memory.

Masks and NaN: as in attention.py. A query without a visible key has lse = -inf, read as +inf here: its weights are 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import (
    FULL,
    INF,
    LOG2E,
    PARTIAL,
    Inputs,
    Tile,
    any_not_finite,
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
    present,
    query_places,
    select_dot,
    signed,
    store_tile,
    through_cap,
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
    query_span,
    run_tiles,
    visible_keys,
)


class Upstream(NamedTuple):
    """What the passes read besides the inputs: dout (B, Hq, Nq, DV) as tiles.Rows, and lse and delta (B, Hq, Nq),
    contiguous."""

    ptr: Any
    b: Any
    h: Any
    n: Any
    lse: Any
    delta: Any
    grad_scale: Any  # the true scale, with its sign
    weights: Any  # the gradient of returned weights (B, Hq | 1, Nq, Nk), None without one; a broadcast stride is 0
    w_b: Any
    w_h: Any
    w_q: Any
    w_k: Any
    w_share: Any  # of each head, where it is that of an average


class Broadcast(NamedTuple):
    """The tiles of dbias: how many heads, query and key tiles there are, and over how many batch elements, heads, query
    and key tiles each is summed: 1, or all of them where the bias broadcasts."""

    heads: Any
    q_tiles: Any
    k_tiles: Any
    over_b: Any
    over_h: Any
    over_q: Any
    over_k: Any


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
def load_rows(x, given, i_b, i_h, o_i, m_i):
    """lse in log2 (+inf where a query sees nothing or is missing) and delta of the queries o_i."""
    o_row = line_offsets(x, i_b, i_h, o_i)
    b_lse = tl.load(given.lse + o_row, mask=m_i, other=INF)
    b_delta = tl.load(given.delta + o_row, mask=m_i, other=0.0)
    return tl.where(b_lse == -INF, INF, b_lse * LOG2E), b_delta


@triton.jit
def pair_gradient(b_p, b_dp, b_delta, m_kept, dropout):
    """Weights after dropout (unscaled), and dS = P (Z dP - delta): 0 where P is 0, whatever NaN is behind the mask."""
    b_zp = b_p
    if dropout.seed is not None:
        b_zp = tl.where(m_kept, b_p, 0.0)
        b_dp = tl.where(m_kept, b_dp * dropout.keep_scale, 0.0)
    return b_zp, tl.where(b_p == 0.0, 0.0, b_p * (b_dp - b_delta))


@triton.jit
def add_weight_gradient(b_dp, x, given, i_b, i_h, i_first, j_first, C: tl.constexpr, KEY_AXIS: tl.constexpr):
    """dP plus the gradient of the weights, where there is one. Keys run along KEY_AXIS."""
    if given.weights is None:
        return b_dp
    else:
        o_q = tl.expand_dims(i_first + tl.arange(0, C.BLOCK_Q), KEY_AXIS)
        o_k = tl.expand_dims(j_first + tl.arange(0, C.BLOCK_K), 1 - KEY_AXIS)
        p_line = given.weights + tl.cast(i_b, tl.int64) * given.w_b + tl.cast(i_h, tl.int64) * given.w_h
        p_pairs = p_line + tl.cast(o_q, tl.int64) * given.w_q + tl.cast(o_k, tl.int64) * given.w_k
        b_dw = tl.load(p_pairs, mask=(o_q < x.sizes.Nq) & (o_k < x.sizes.Nk), other=0.0)
        return b_dp + b_dw.to(tl.float32) * given.w_share


# --- dK and dV ---


@triton.jit
def gather_key_gradient(b_dk, b_dv, b_k, b_v, x, given, own, i_h, walk, C: tl.constexpr, MODE: tl.constexpr):
    """Add what the query tiles of a walk over head i_h give to dK and dV of the program's keys."""
    p_q, p_do = head_pointer(x.q, own.i_b, i_h), head_pointer(given, own.i_b, i_h)
    entry = entry_at(x.mask, walk, walk.first, C.LIST_Q // C.BLOCK_Q, False)
    for t in range(walk.first, walk.end):
        i_first, tile, entry = next_tile(x.mask, walk, t, entry, C.LIST_Q, C.BLOCK_Q, False)
        rows = query_places(x, own.i_b, i_h, i_first, C.BLOCK_Q)
        m_i = present(x.mask.query_order, rows, x.sizes.Nq)
        b_q = load_block(x.mask.query_order, p_q, x.q.n, rows, x.sizes.Nq, C.D, C.BLOCK_Q, C.BLOCK_D, MODE != FULL)
        b_lse, b_delta = load_rows(x, given, own.i_b, i_h, rows.token, m_i)
        b_s, b_slope = cap_scores(dot(b_k, tl.trans(b_q), C) * x.sizes.scale, x)  # [BLOCK_K, BLOCK_Q]
        b_s, m_visible = mask_scores(b_s, x, own.i_b, i_h, rows, own, own.keys, tile, C, MODE, 0)
        b_p = tl.exp2(b_s - b_lse[None, :])
        m_kept = kept_pairs(x, own.i_b, i_h, rows, own, C, 0)

        b_do = load_block(
            x.mask.query_order, p_do, given.n, rows, x.sizes.Nq, C.DV, C.BLOCK_Q, C.BLOCK_DV, MODE != FULL
        )
        b_dp = dot(b_v, tl.trans(b_do), C)
        b_dp = add_weight_gradient(b_dp, x, given, own.i_b, i_h, i_first, own.first, C, 0)
        b_zp, b_ds = pair_gradient(b_p, b_dp, b_delta[None, :], m_kept, x.dropout)
        b_ds = through_cap(b_ds, b_slope, x)
        b_dv = select_dot(b_zp, m_visible, b_do, b_dv, C)
        b_dk = select_dot(b_ds, m_visible, b_q, b_dk, C)
    return b_dk, b_dv


@triton.jit
def key_gradient_tile(i_program, x, given, dk, dv, grid, C: tl.constexpr):
    """Compute and store one tile of dk and dv; returns 1 if it is not finite."""
    LAST_FIRST: tl.constexpr = x.mask.low is not None and x.mask.high is None
    MASKED: tl.constexpr = C.SAFE or x.mask.token_lengths is not None
    i_tile, i_b, i_h = locate(i_program, x.mask, grid, x.sizes.Nk, C.LIST_K, C.BLOCK_K, LAST_FIRST)
    j_first = i_tile * C.BLOCK_K
    columns = key_places(x, i_b, i_h, j_first, C.BLOCK_K)
    own = Tile(j_first, columns.o, columns.token, i_b, i_h, i_h, key_count(x.mask, i_b, x.sizes.Nk))
    m_read = present(x.mask.key_order, columns, own.keys)
    b_k = signed(load_tile(x.k, i_b, i_h, columns.token, m_read, C.D, C.BLOCK_D), C.SIGN)
    b_v = load_tile(x.v, i_b, i_h, columns.token, m_read, C.DV, C.BLOCK_DV)
    b_dk = tl.full([C.BLOCK_K, C.BLOCK_D], 0.0, tl.float32)
    b_dv = tl.full([C.BLOCK_K, C.BLOCK_DV], 0.0, tl.float32)
    for g in range(C.GROUP):
        i_hq = i_h * C.GROUP + g
        span = query_span(x, i_b, i_hq, j_first, own.keys, C)
        if not MASKED:
            b_dk, b_dv = gather_key_gradient(b_dk, b_dv, b_k, b_v, x, given, own, i_hq, full_tiles(span), C, FULL)
        others = other_tiles(span, MASKED)
        b_dk, b_dv = gather_key_gradient(b_dk, b_dv, b_k, b_v, x, given, own, i_hq, others, C, PARTIAL)

    m_j, m_dead = present(x.mask.key_order, columns, x.sizes.Nk), (m_read == 0)[:, None]
    b_dk = tl.where(m_dead, 0.0, b_dk * given.grad_scale)
    store_tile(dk, i_b, i_h, columns.token, m_j, b_dk, C.D, C.BLOCK_D)
    b_dv = tl.where(m_dead, 0.0, b_dv * x.dropout.keep_scale)
    store_tile(dv, i_b, i_h, columns.token, m_j, b_dv, C.DV, C.BLOCK_DV)
    return any_not_finite(b_dk) | any_not_finite(b_dv)


@triton.jit
def key_gradient_kernel(q, k, v, bias, mask, dropout, sizes, modifiers, given, dk, dv, flags, grid, C: tl.constexpr):
    """dK and dV of BLOCK_K keys a program. Grid and flags as in attention.py; the lines are those of key heads, and the
    mask is the transposed list."""
    x = Inputs(q, k, v, bias, mask, dropout, sizes, modifiers)
    run_tiles(key_gradient_tile, (x, given, dk, dv, grid), flags, grid.programs, C)


# --- dQ ---


@triton.jit
def gather_query_gradient(b_dq, b_q, b_do, b_lse, b_delta, x, given, own, walk, C: tl.constexpr, MODE: tl.constexpr):
    """Add what the key tiles of a walk give to dQ of the program's queries."""
    GAP: tl.constexpr = x.mask.lengths is not None
    i_hk = own.i_h // C.GROUP
    p_k, p_v = head_pointer(x.k, own.i_b, i_hk), head_pointer(x.v, own.i_b, i_hk)
    entry = entry_at(x.mask, walk, walk.first, C.LIST_K // C.BLOCK_K, GAP)
    for t in range(walk.first, walk.end):
        j_first, tile, entry = next_tile(x.mask, walk, t, entry, C.LIST_K, C.BLOCK_K, GAP)
        columns = key_places(x, own.i_b, i_hk, j_first, C.BLOCK_K)
        b_k = load_block(x.mask.key_order, p_k, x.k.n, columns, own.keys, C.D, C.BLOCK_K, C.BLOCK_D, MODE != FULL)
        b_s, b_slope = cap_scores(dot(b_q, tl.trans(b_k), C) * x.sizes.scale, x)
        b_s, m_visible = mask_scores(b_s, x, own.i_b, own.i_h, own, columns, own.keys, tile, C, MODE, 1)
        b_p = tl.exp2(b_s - b_lse[:, None])

        b_v = load_block(x.mask.key_order, p_v, x.v.n, columns, own.keys, C.DV, C.BLOCK_K, C.BLOCK_DV, MODE != FULL)
        b_dp = dot(b_do, tl.trans(b_v), C)
        b_dp = add_weight_gradient(b_dp, x, given, own.i_b, own.i_h, own.first, j_first, C, 1)
        m_kept = kept_pairs(x, own.i_b, own.i_h, own, columns, C, 1)
        _zp, b_ds = pair_gradient(b_p, b_dp, b_delta[:, None], m_kept, x.dropout)
        b_ds = through_cap(b_ds, b_slope, x)
        b_dq = select_dot(b_ds, m_visible, b_k, b_dq, C)
    return b_dq


@triton.jit
def query_gradient_tile(i_program, x, given, dq, grid, C: tl.constexpr):
    """Compute and store one tile of dq; returns 1 if it is not finite."""
    i_tile, i_b, i_h = locate(i_program, x.mask, grid, x.sizes.Nq, C.LIST_Q, C.BLOCK_Q, x.mask.high is not None)
    i_first = i_tile * C.BLOCK_Q
    rows = query_places(x, i_b, i_h, i_first, C.BLOCK_Q)
    m_i = present(x.mask.query_order, rows, x.sizes.Nq)
    own = owned_queries(x, rows, i_b, i_h, i_h, key_count(x.mask, i_b, x.sizes.Nk))
    i_last = tl.minimum(i_first + C.BLOCK_Q, x.sizes.Nq) - 1
    span = key_span(x, i_b, i_h, i_first, i_last, own.keys, C)
    b_q = signed(load_tile(x.q, i_b, i_h, rows.token, m_i, C.D, C.BLOCK_D), C.SIGN)
    b_do = load_tile(given, i_b, i_h, rows.token, m_i, C.DV, C.BLOCK_DV)
    b_lse, b_delta = load_rows(x, given, i_b, i_h, rows.token, m_i)
    b_dq = tl.full([C.BLOCK_Q, C.BLOCK_D], 0.0, tl.float32)
    MASKED: tl.constexpr = C.SAFE or x.mask.token_lengths is not None
    if not MASKED:
        b_dq = gather_query_gradient(b_dq, b_q, b_do, b_lse, b_delta, x, given, own, full_tiles(span), C, FULL)
    others = other_tiles(span, MASKED)
    b_dq = gather_query_gradient(b_dq, b_q, b_do, b_lse, b_delta, x, given, own, others, C, PARTIAL)
    store_tile(dq, i_b, i_h, rows.token, m_i, b_dq * given.grad_scale, C.D, C.BLOCK_D)
    return any_not_finite(b_dq)


@triton.jit
def query_gradient_kernel(q, k, v, bias, mask, dropout, sizes, modifiers, given, dq, flags, grid, C: tl.constexpr):
    """dQ of BLOCK_Q queries a program. Grid and flags as in attention.py."""
    x = Inputs(q, k, v, bias, mask, dropout, sizes, modifiers)
    run_tiles(query_gradient_tile, (x, given, dq, grid), flags, grid.programs, C)


# --- dbias ---


@triton.jit
def bias_gradient_kernel(
    q, k, v, bias, mask, dropout, sizes, modifiers, given, dbias, tiles,
    C: tl.constexpr, SUM_Q: tl.constexpr, SUM_K: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """dbias of one tile of dbias (a Bias of float32 or the bias's dtype). Grid: batch elements of dbias * tiles.heads *
    tiles.q_tiles * tiles.k_tiles. SUM_Q, SUM_K: the rows, the columns of the tile are added up too. DIAGONAL: tiles are
    square, and dbias has one for each diagonal of them, the sum of those on it; that of row q and column k of tiles is
    at q - k + tiles.over_k - 1."""
    x = Inputs(q, k, v, bias, mask, dropout, sizes, modifiers)
    i_program = tl.program_id(0)
    out_k = i_program % tiles.k_tiles
    out_q = i_program // tiles.k_tiles % tiles.q_tiles
    out_h = i_program // tiles.k_tiles // tiles.q_tiles % tiles.heads
    out_b = i_program // tiles.k_tiles // tiles.q_tiles // tiles.heads
    b_sum = tl.full([C.BLOCK_Q, C.BLOCK_K], 0.0, tl.float32)
    for t in range(tiles.over_b * tiles.over_h * tiles.over_q * tiles.over_k):
        i_k = out_k + t % tiles.over_k
        i_q = out_q + t // tiles.over_k % tiles.over_q
        i_h = out_h + t // tiles.over_k // tiles.over_q % tiles.over_h
        i_b = out_b + t // tiles.over_k // tiles.over_q // tiles.over_h
        if DIAGONAL:
            i_k = t % tiles.over_k
            i_q = i_k + out_q - (tiles.over_k - 1)
        i_first, j_first = i_q * C.BLOCK_Q, i_k * C.BLOCK_K
        keys = key_count(x.mask, i_b, x.sizes.Nk)
        any_first, any_end, _first, _end = visible_keys(x.mask, i_first, i_first + C.BLOCK_Q - 1, keys)
        in_range = (i_first >= 0) & (i_first < x.sizes.Nq) & (j_first < any_end) & (j_first + C.BLOCK_K > any_first)
        i_listed = tl.maximum(tl.minimum(i_first, x.sizes.Nq - 1), 0)  # a diagonal leaves the lists at both ends
        listed, tile = listed_tile(x.mask, i_b, i_h, i_listed, j_first, C.LIST_Q, C.LIST_K)
        if in_range & listed:
            rows = query_places(x, i_b, i_h, i_first, C.BLOCK_Q)
            columns = key_places(x, i_b, i_h // C.GROUP, j_first, C.BLOCK_K)
            m_i, m_j = present(x.mask.query_order, rows, x.sizes.Nq), present(x.mask.key_order, columns, keys)
            b_q = signed(load_tile(x.q, i_b, i_h, rows.token, m_i, C.D, C.BLOCK_D), C.SIGN)
            b_do = load_tile(given, i_b, i_h, rows.token, m_i, C.DV, C.BLOCK_DV)
            b_k = load_tile(x.k, i_b, i_h // C.GROUP, columns.token, m_j, C.D, C.BLOCK_D)
            b_v = load_tile(x.v, i_b, i_h // C.GROUP, columns.token, m_j, C.DV, C.BLOCK_DV)
            b_lse, b_delta = load_rows(x, given, i_b, i_h, rows.token, m_i)
            b_s, _slope = cap_scores(dot(b_q, tl.trans(b_k), C) * x.sizes.scale, x)
            own = owned_queries(x, rows, i_b, i_h, i_h, keys)
            b_s, m_visible = mask_scores(b_s, x, i_b, i_h, own, columns, keys, tile, C, PARTIAL, 1)
            b_p = tl.exp2(b_s - b_lse[:, None])
            b_dp = dot(b_do, tl.trans(b_v), C)
            b_dp = add_weight_gradient(b_dp, x, given, i_b, i_h, i_first, j_first, C, 1)
            m_kept = kept_pairs(x, i_b, i_h, own, columns, C, 1)
            _zp, b_ds = pair_gradient(b_p, b_dp, b_delta[:, None], m_kept, x.dropout)
            b_sum += tl.where(m_visible, b_ds, 0.0)

    # An order that differs between heads has a dbias for each of them.
    rows = query_places(x, out_b, out_h, out_q * C.BLOCK_Q, C.BLOCK_Q)
    columns = key_places(x, out_b, out_h // C.GROUP, out_k * C.BLOCK_K, C.BLOCK_K)
    m_q, m_k = present(x.mask.query_order, rows, x.sizes.Nq), present(x.mask.key_order, columns, x.sizes.Nk)
    o_q, o_k = tl.where(SUM_Q, 0, rows.token), tl.where(SUM_K, 0, columns.token)
    p_line = dbias.ptr + tl.cast(out_b, tl.int64) * dbias.b + tl.cast(out_h, tl.int64) * dbias.h
    if DIAGONAL:  # (.., diagonals, BLOCK_Q, BLOCK_K)
        p_pairs = p_line + (tl.cast(o_q, tl.int64) * dbias.q)[:, None] + tl.arange(0, C.BLOCK_K)[None, :]
        tl.store(p_pairs, b_sum)
    elif SUM_K:
        b_row = tl.sum(b_sum, 1)
        tl.store(p_line + tl.cast(o_q, tl.int64) * dbias.q, b_row.to(dbias.ptr.dtype.element_ty), mask=m_q)
    elif SUM_Q:
        b_column = tl.sum(b_sum, 0)
        tl.store(p_line + tl.cast(o_k, tl.int64) * dbias.k, b_column.to(dbias.ptr.dtype.element_ty), mask=m_k)
    else:
        p_pairs = p_line + (tl.cast(o_q, tl.int64) * dbias.q)[:, None] + (tl.cast(o_k, tl.int64) * dbias.k)[None, :]
        m_pairs = m_q[:, None] & m_k[None, :]
        tl.store(p_pairs, b_sum.to(dbias.ptr.dtype.element_ty), mask=m_pairs)
