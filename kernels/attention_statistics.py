"""What the weights P_ij = exp(s_ij - lse_i) of exact attention look like, without the n x n of them.

    row_statistics_kernel   BLOCK_Q queries a program, two walks over the keys: the softmax, then what belongs to a row
                            (entropy, distance, shares of sets of keys, the largest scores and their keys)
    received_kernel         BLOCK_K keys a program, a walk over the queries: sum_i r_i P_ij for several weightings r
    mass_map_kernel         some cells of the map a program: sums of P over blocks of pairs

The second and the third read each row's largest score and the inverse of its sum, which the first one leaves: not lse,
which under a bias of 1e9 has no digit left. Each result has one owner, so that its bits are the same at every run.
Letters and prefixes as in tiles.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention import begin_softmax
from .tiles import (
    FULL,
    INF,
    LN2,
    PARTIAL,
    Inputs,
    Tile,
    cap_scores,
    dot,
    head_pointer,
    key_places,
    line_offsets,
    load_block,
    load_tile,
    mask_scores,
    online_softmax_update,
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
    query_span,
    visible_keys,
)

PART_D = tl.constexpr(64)
NO_KEY = tl.constexpr(2**31 - 1)  # less its slot: what stands where a row has no further key


class RowSoftmax(NamedTuple):
    """Of each row (B, Hq, Nq) the largest score in log2 and 1 / sum of exp2(s - largest), 0 where there is no key."""

    largest: Any
    inverse: Any


class RowResults(NamedTuple):
    """What is found of each row, contiguous, in float32; None: not wanted."""

    lse: Any  # (B, Hq, Nq)
    entropy: Any
    distance: Any
    nearby: Any
    offset: Any  # query i stands at key i + offset
    reach: Any  # how far away a key counts as near
    shares: Any  # (B, Hq, Nq, set_count)
    key_sets: Any  # (1 | B, Nk) int32: bit s says whether a key is in set s
    sets_b: Any  # from a batch element to the next in it, 0 where it broadcasts
    set_count: Any
    scores: Any  # (B, Hq, Nq, SLOTS): the largest scores in log2, in no order
    keys: Any  # and whose they are


class Sums(NamedTuple):
    """What a row has met so far."""

    entropy: Any  # [BLOCK_Q], sum of P log2 P
    distance: Any
    nearby: Any
    shares: Any  # [BLOCK_Q, SETS]
    scores: Any  # [BLOCK_Q, SLOTS]
    keys: Any


class Received(NamedTuple):
    """The result (weightings, B, Hq, Nk) and row_weights (weightings, B, Hq, Nq), contiguous."""

    ptr: Any
    row_weights: Any  # None: every row once
    weightings: Any
    step: Any  # from one weighting to the next in the result
    weights_step: Any  # and in row_weights


class Cells(NamedTuple):
    """The map (B, Hq, rows, columns), contiguous; a cell is `size` queries by `size` keys."""

    ptr: Any
    rows: Any
    columns: Any
    size: Any


@triton.jit
def product_in_parts(x, own, o_j, C: tl.constexpr):
    """q k^T [BLOCK_Q, BLOCK_K] of float32, PART_D columns at a time: a thread that multiplies without tensor cores
    holds whole rows of both, and those of more than 128 columns are more than its registers."""
    o_i = own.first + tl.arange(0, C.BLOCK_Q)
    p_q = head_pointer(x.q, own.i_b, own.i_h) + (tl.cast(o_i, tl.int64) * x.q.n)[:, None]
    p_k = head_pointer(x.k, own.i_b, own.i_h // C.GROUP) + (tl.cast(o_j, tl.int64) * x.k.n)[:, None]
    m_q, m_k = (o_i < x.sizes.Nq)[:, None], (o_j < own.keys)[:, None]
    b_s = tl.full([C.BLOCK_Q, C.BLOCK_K], 0.0, tl.float32)
    for first in range(0, C.D, PART_D):
        o_d = (first + tl.arange(0, PART_D))[None, :]
        b_q = tl.load(p_q + o_d, mask=m_q & (o_d < C.D), other=0.0)
        b_k = tl.load(p_k + o_d, mask=m_k & (o_d < C.D), other=0.0)
        b_s += dot(signed(b_q, C.SIGN), tl.trans(b_k), C)
    return b_s


@triton.jit
def walked_scores(b_q, p_k, x, own, j_first, tile, C: tl.constexpr, MODE: tl.constexpr):
    """Scores [BLOCK_Q, BLOCK_K] in log2 of the program's queries and a key tile, -inf where a pair is hidden."""
    columns = key_places(x, own.i_b, own.i_h // C.GROUP, j_first, C.BLOCK_K)
    if C.BLOCK_D > 128 and x.k.ptr.dtype.element_ty == tl.float32:
        b_s = product_in_parts(x, own, columns.o, C)
    else:
        b_k = load_block(None, p_k, x.k.n, columns, own.keys, C.D, C.BLOCK_K, C.BLOCK_D, MODE != FULL)
        b_s = dot(b_q, tl.trans(b_k), C)
    b_s, _slope = cap_scores(b_s * x.sizes.scale, x)
    b_s, _visible = mask_scores(b_s, x, own.i_b, own.i_h, own, columns, own.keys, tile, C, MODE, 1)
    return b_s


@triton.jit
def sum_exponentials(b_m, b_l, b_q, x, own, walk, C: tl.constexpr, MODE: tl.constexpr):
    """Take the key tiles of a walk into the largest score and the sums of each row."""
    GAP: tl.constexpr = x.mask.lengths is not None
    p_k = head_pointer(x.k, own.i_b, own.i_h // C.GROUP)
    entry = entry_at(x.mask, walk, walk.first, C.LIST_K // C.BLOCK_K, GAP)
    for t in range(walk.first, walk.end):
        j_first, tile, entry = next_tile(x.mask, walk, t, entry, C.LIST_K, C.BLOCK_K, GAP)
        b_s = walked_scores(b_q, p_k, x, own, j_first, tile, C, MODE)
        _p, _alpha, b_m, b_l = online_softmax_update(b_s, b_m, b_l, 1.0)
    return b_m, b_l


@triton.jit
def exponentials(b_s, b_m, b_inverse):
    """P, and s - largest, for rows along the same axis as b_m and b_inverse are expanded to."""
    b_apart = b_s - tl.where(b_m == -INF, 0.0, b_m)
    return tl.where(b_inverse == 0.0, 0.0, tl.exp2(b_apart) * b_inverse), b_apart


@triton.jit
def keep_largest(b_scores, b_keys, b_s, j_first, C: tl.constexpr):
    """Let the scores of a tile take the place of smaller ones, one a row and round until no row has a better one; of
    equal scores the first key counts more, in whatever order the tiles come."""
    o_j = j_first + tl.arange(0, C.BLOCK_K)[None, :]
    b_left = tl.where(b_s == b_s, b_s, -INF)  # NaN is not large
    again = tl.full([], 1, tl.int32)
    while again > 0:
        b_least = tl.min(b_scores, 1)
        b_last = tl.max(tl.where(b_scores == b_least[:, None], b_keys, -1), 1)
        b_best = tl.max(b_left, 1)
        b_first = tl.min(tl.where(b_left == b_best[:, None], o_j, NO_KEY), 1)
        m_better = (b_best > -INF) & ((b_best > b_least) | ((b_best == b_least) & (b_first < b_last)))
        m_slot = m_better[:, None] & (b_keys == b_last[:, None])
        b_scores = tl.where(m_slot, b_best[:, None], b_scores)
        b_keys = tl.where(m_slot, b_first[:, None], b_keys)
        b_left = tl.where(o_j == b_first[:, None], -INF, b_left)
        again = tl.max(m_better.to(tl.int32))
    return b_scores, b_keys


@triton.jit
def gather_rows(
    sums, b_q, b_m, b_inverse, x, own, walk, rows,
    C: tl.constexpr, SETS: tl.constexpr, SLOTS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Add what the key tiles of a walk say of each row."""
    GAP: tl.constexpr = x.mask.lengths is not None
    p_k = head_pointer(x.k, own.i_b, own.i_h // C.GROUP)
    b_entropy, b_distance, b_nearby, b_shares = sums.entropy, sums.distance, sums.nearby, sums.shares
    b_scores, b_keys = sums.scores, sums.keys
    b_log = tl.where(b_inverse == 0.0, 0.0, -tl.log2(b_inverse))
    entry = entry_at(x.mask, walk, walk.first, C.LIST_K // C.BLOCK_K, GAP)
    for t in range(walk.first, walk.end):
        j_first, tile, entry = next_tile(x.mask, walk, t, entry, C.LIST_K, C.BLOCK_K, GAP)
        o_j = j_first + tl.arange(0, C.BLOCK_K)
        b_s = walked_scores(b_q, p_k, x, own, j_first, tile, C, MODE)
        b_p, b_apart = exponentials(b_s, b_m[:, None], b_inverse[:, None])
        b_entropy += tl.sum(tl.where(b_p == 0.0, 0.0, b_p * (b_apart - b_log[:, None])), 1)
        if rows.distance is not None:
            o_row = own.first + tl.arange(0, C.BLOCK_Q)
            b_gap = tl.abs((o_row[:, None] + rows.offset) - o_j[None, :]).to(tl.float32)
            b_distance += tl.sum(b_p * b_gap, 1)
            b_nearby += tl.sum(tl.where(b_gap <= rows.reach, b_p, 0.0), 1)
        if SETS > 0:
            o_set = tl.arange(0, SETS)[None, :]
            p_sets = rows.key_sets + tl.cast(own.i_b, tl.int64) * rows.sets_b
            b_words = tl.load(p_sets + o_j, mask=o_j < x.sizes.Nk, other=0)
            for s in range(rows.set_count):
                b_share = tl.sum(tl.where(((b_words >> s) & 1)[None, :] != 0, b_p, 0.0), 1)
                b_shares += tl.where(o_set == s, b_share[:, None], 0.0)
        if SLOTS > 0:
            b_scores, b_keys = keep_largest(b_scores, b_keys, b_s, j_first, C)
    return Sums(b_entropy, b_distance, b_nearby, b_shares, b_scores, b_keys)


@triton.jit
def row_statistics_kernel(
    q, k, v, bias, mask, dropout, sizes, modifiers, softmax, rows, grid,
    C: tl.constexpr, SETS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """What belongs to BLOCK_Q queries. Grid: grid.programs. SETS, SLOTS: powers of two that hold the sets of keys and
    the largest scores, 0 where none are wanted."""
    x = Inputs(q, k, v, bias, mask, dropout, sizes, modifiers)
    i_program = tl.program_id(0)
    i_tile, i_b, i_h = locate(i_program, x.mask, grid, x.sizes.Nq, C.LIST_Q, C.BLOCK_Q, x.mask.high is not None)
    i_first = i_tile * C.BLOCK_Q
    o_i = i_first + tl.arange(0, C.BLOCK_Q)
    m_i = o_i < x.sizes.Nq
    rows_of = query_places(x, i_b, i_h, i_first, C.BLOCK_Q)
    own = owned_queries(x, rows_of, i_b, i_h, i_h, key_count(x.mask, i_b, x.sizes.Nk))
    i_last = tl.minimum(i_first + C.BLOCK_Q, x.sizes.Nq) - 1
    span = key_span(x, i_b, i_h, i_first, i_last, own.keys, C)
    b_q = signed(load_tile(x.q, i_b, i_h, o_i, m_i, C.D, C.BLOCK_D), C.SIGN)

    b_m, b_l = begin_softmax(x, i_h + tl.full([C.BLOCK_Q], 0, tl.int32), 0, C)
    b_m, b_l = sum_exponentials(b_m, b_l, b_q, x, own, full_tiles(span), C, FULL)
    b_m, b_l = sum_exponentials(b_m, b_l, b_q, x, own, other_tiles(span, False), C, PARTIAL)
    b_sum = tl.sum(b_l, 1)
    b_some = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_inverse = tl.where(b_sum == 0.0, 0.0, 1.0 / b_some)
    o_row = line_offsets(x, i_b, i_h, o_i)
    tl.store(softmax.largest + o_row, b_m, mask=m_i)
    tl.store(softmax.inverse + o_row, b_inverse, mask=m_i)
    tl.store(rows.lse + o_row, tl.where(b_sum == 0.0, -INF, (b_m + tl.log2(b_some)) * LN2), mask=m_i)

    WIDE_SETS: tl.constexpr = SETS if SETS > 0 else 1
    WIDE_SLOTS: tl.constexpr = SLOTS if SLOTS > 0 else 1
    b_none = tl.full([C.BLOCK_Q], 0.0, tl.float32)
    b_shares = tl.full([C.BLOCK_Q, WIDE_SETS], 0.0, tl.float32)
    b_scores = tl.full([C.BLOCK_Q, WIDE_SLOTS], -INF, tl.float32)
    b_keys = tl.full([C.BLOCK_Q, WIDE_SLOTS], NO_KEY, tl.int32) - tl.arange(0, WIDE_SLOTS)[None, :]
    sums = Sums(b_none, b_none, b_none, b_shares, b_scores, b_keys)
    sums = gather_rows(sums, b_q, b_m, b_inverse, x, own, full_tiles(span), rows, C, SETS, SLOTS, FULL)
    sums = gather_rows(sums, b_q, b_m, b_inverse, x, own, other_tiles(span, False), rows, C, SETS, SLOTS, PARTIAL)

    tl.store(rows.entropy + o_row, (0.0 - sums.entropy) * LN2, mask=m_i)
    if rows.distance is not None:
        tl.store(rows.distance + o_row, sums.distance, mask=m_i)
        tl.store(rows.nearby + o_row, sums.nearby, mask=m_i)
    if SETS > 0:
        o_set = tl.arange(0, SETS)[None, :]
        p_shares = rows.shares + o_row[:, None] * rows.set_count + o_set
        tl.store(p_shares, sums.shares, mask=m_i[:, None] & (o_set < rows.set_count))
    if SLOTS > 0:
        o_slot = o_row[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :]
        tl.store(rows.scores + o_slot, sums.scores, mask=m_i[:, None])
        tl.store(rows.keys + o_slot, sums.keys, mask=m_i[:, None])


# --- what keys receive ---


@triton.jit
def receive(b_sums, b_k, x, softmax, found, own, walk, C: tl.constexpr, WEIGHTINGS: tl.constexpr, MODE: tl.constexpr):
    """Add what the query tiles of a walk give to the program's keys, in a column for each weighting of the rows."""
    p_q = head_pointer(x.q, own.i_b, own.i_h)
    o_column = tl.arange(0, WEIGHTINGS)[None, :]
    entry = entry_at(x.mask, walk, walk.first, C.LIST_Q // C.BLOCK_Q, False)
    for t in range(walk.first, walk.end):
        i_first, tile, entry = next_tile(x.mask, walk, t, entry, C.LIST_Q, C.BLOCK_Q, False)
        places = query_places(x, own.i_b, own.i_h, i_first, C.BLOCK_Q)
        m_i = places.o < x.sizes.Nq
        b_q = load_block(None, p_q, x.q.n, places, x.sizes.Nq, C.D, C.BLOCK_Q, C.BLOCK_D, MODE != FULL)
        b_s, _slope = cap_scores(dot(b_k, tl.trans(b_q), C) * x.sizes.scale, x)  # [BLOCK_K, BLOCK_Q]
        b_s, _visible = mask_scores(b_s, x, own.i_b, own.i_h, places, own, own.keys, tile, C, MODE, 0)
        o_row = line_offsets(x, own.i_b, own.i_h, places.o)
        b_m = tl.load(softmax.largest + o_row, mask=m_i, other=0.0)
        b_inverse = tl.load(softmax.inverse + o_row, mask=m_i, other=0.0)
        b_p, _apart = exponentials(b_s, b_m[None, :], b_inverse[None, :])
        if found.row_weights is None:
            b_sums += tl.sum(b_p, 1)[:, None]
        else:
            for r in range(found.weightings):
                p_weights = found.row_weights + tl.cast(r, tl.int64) * found.weights_step
                b_weighted = b_p * tl.load(p_weights + o_row, mask=m_i, other=0.0)[None, :]
                b_sums += tl.where(o_column == r, tl.sum(b_weighted, 1)[:, None], 0.0)
    return b_sums


@triton.jit
def received_kernel(
    q, k, v, bias, mask, dropout, sizes, modifiers, softmax, found, grid, C: tl.constexpr, WEIGHTINGS: tl.constexpr
):
    """What BLOCK_K keys of a query head receive. Grid: grid.programs. WEIGHTINGS: a power of two that holds those of
    the rows."""
    x = Inputs(q, k, v, bias, mask, dropout, sizes, modifiers)
    LAST_FIRST: tl.constexpr = x.mask.low is not None and x.mask.high is None
    i_tile, i_b, i_h = locate(tl.program_id(0), x.mask, grid, x.sizes.Nk, C.LIST_K, C.BLOCK_K, LAST_FIRST)
    j_first = i_tile * C.BLOCK_K
    o_j = j_first + tl.arange(0, C.BLOCK_K)
    own = Tile(j_first, o_j, o_j, i_b, i_h, i_h, key_count(x.mask, i_b, x.sizes.Nk))
    b_k = signed(load_tile(x.k, i_b, i_h // C.GROUP, o_j, o_j < own.keys, C.D, C.BLOCK_D), C.SIGN)
    span = query_span(x, i_b, i_h, j_first, own.keys, C)
    b_sums = tl.full([C.BLOCK_K, WEIGHTINGS], 0.0, tl.float32)
    b_sums = receive(b_sums, b_k, x, softmax, found, own, full_tiles(span), C, WEIGHTINGS, FULL)
    b_sums = receive(b_sums, b_k, x, softmax, found, own, other_tiles(span, False), C, WEIGHTINGS, PARTIAL)
    o_column = tl.arange(0, WEIGHTINGS)[None, :]
    o_key = (tl.cast(i_b, tl.int64) * x.sizes.Hq + i_h) * x.sizes.Nk + o_j
    p_sums = found.ptr + o_key[:, None] + tl.cast(o_column, tl.int64) * found.step
    tl.store(p_sums, b_sums, mask=(o_j < x.sizes.Nk)[:, None] & (o_column < found.weightings))


# --- the map ---


@triton.jit
def mass_map_kernel(
    q, k, v, bias, mask, dropout, sizes, modifiers, softmax, cells, C: tl.constexpr,
    CELLS_Q: tl.constexpr, CELLS_K: tl.constexpr, WIDE_Q: tl.constexpr, WIDE_K: tl.constexpr,
):  # fmt: skip
    """CELLS_Q x CELLS_K cells of the map, one where a cell is as large as a tile; WIDE: powers of two that hold them,
    at least 16. Grid: B * Hq * cdiv(cells.rows, CELLS_Q) * cdiv(cells.columns, CELLS_K).

    Tiles lie as in every kernel, whatever the cells; which row of a tile is of which cell is a product with 0 and 1.
    """
    x = Inputs(q, k, v, bias, mask, dropout, sizes, modifiers)
    i_program = tl.program_id(0)
    columns, lines = tl.cdiv(cells.columns, CELLS_K), tl.cdiv(cells.rows, CELLS_Q)
    c_k, c_q = i_program % columns * CELLS_K, i_program // columns % lines * CELLS_Q
    i_line = i_program // columns // lines
    i_b, i_h = i_line // x.sizes.Hq, i_line % x.sizes.Hq
    keys = key_count(x.mask, i_b, x.sizes.Nk)
    i_begin, i_end = c_q * cells.size, tl.minimum((c_q + CELLS_Q) * cells.size, x.sizes.Nq)
    j_begin, j_end = c_k * cells.size, tl.minimum((c_k + CELLS_K) * cells.size, keys)
    o_q, o_k = tl.arange(0, WIDE_Q), tl.arange(0, WIDE_K)
    b_cells = tl.full([WIDE_Q, WIDE_K], 0.0, tl.float32)
    for i_tile in range(i_begin // C.BLOCK_Q, tl.cdiv(i_end, C.BLOCK_Q)):
        i_first = i_tile * C.BLOCK_Q
        o_i = i_first + tl.arange(0, C.BLOCK_Q)
        m_i = (o_i >= i_begin) & (o_i < i_end)
        b_q = signed(load_tile(x.q, i_b, i_h, o_i, m_i, C.D, C.BLOCK_D), C.SIGN)
        o_row = line_offsets(x, i_b, i_h, o_i)
        b_m = tl.load(softmax.largest + o_row, mask=m_i, other=0.0)
        b_inverse = tl.load(softmax.inverse + o_row, mask=m_i, other=0.0)
        any_first, any_end, _first, _end = visible_keys(x.mask, i_first, i_first + C.BLOCK_Q - 1, keys)
        first = tl.maximum(j_begin, any_first) // C.BLOCK_K
        for j_tile in range(first, tl.cdiv(tl.minimum(j_end, any_end), C.BLOCK_K)):
            j_first = j_tile * C.BLOCK_K
            listed, tile = listed_tile(x.mask, i_b, i_h, i_first, j_first, C.LIST_Q, C.LIST_K)
            if listed:
                o_j = j_first + tl.arange(0, C.BLOCK_K)
                m_j = (o_j >= j_begin) & (o_j < j_end)
                b_k = load_tile(x.k, i_b, i_h // C.GROUP, o_j, m_j, C.D, C.BLOCK_D)
                b_s, _slope = cap_scores(dot(b_q, tl.trans(b_k), C) * x.sizes.scale, x)
                own = owned_queries(x, query_places(x, i_b, i_h, i_first, C.BLOCK_Q), i_b, i_h, i_h, keys)
                columns_of = key_places(x, i_b, i_h // C.GROUP, j_first, C.BLOCK_K)
                b_s, _visible = mask_scores(b_s, x, i_b, i_h, own, columns_of, keys, tile, C, PARTIAL, 1)
                b_p, _apart = exponentials(b_s, b_m[:, None], b_inverse[:, None])
                b_p = tl.where(m_i[:, None] & m_j[None, :], b_p, 0.0)
                if CELLS_Q * CELLS_K == 1:
                    b_cells += tl.sum(tl.sum(b_p, 1), 0)
                else:
                    b_rows = (o_q[:, None] == (o_i // cells.size - c_q)[None, :]).to(tl.float32)
                    b_columns = ((o_j // cells.size - c_k)[:, None] == o_k[None, :]).to(tl.float32)
                    b_sums = tl.dot(b_rows, b_p, input_precision="ieee")
                    b_cells += tl.dot(b_sums, b_columns, input_precision="ieee")
    o_line = (tl.cast(i_line, tl.int64) * cells.rows + c_q + o_q) * cells.columns
    m_q, m_k = (o_q < CELLS_Q) & (c_q + o_q < cells.rows), (o_k < CELLS_K) & (c_k + o_k < cells.columns)
    tl.store(cells.ptr + o_line[:, None] + (c_k + o_k)[None, :], b_cells, mask=m_q[:, None] & m_k[None, :])
