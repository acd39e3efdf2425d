"""Linear attention on given features, forward and backward, causal and not: O(N) time and memory.

    n_i = sum_j a_i . b_j      out_i = sum_j (a_i . b_j) v_j / n_i      over visible keys j (causal: j <= i + offset)

Katharopoulos et al., "Transformers are RNNs", ICML 2020; chunks as in Sun et al., "Retentive Network", 2023, section
2.3. With g_i = dout_i / n_i and h_i = dn_i - g_i . out_i every gradient is a sum of the forward's form,

    da_i = sum_j (g_i . v_j + h_i) b_j      db_j = sum_i (v_j . g_i + h_i) a_i      dv_j = sum_i (b_j . a_i) g_i

so one kernel serves all four: out_s = sum_t (x_s . y_t + e_s f_t) u_t over t <= s, or over t >= s (REVERSE: the keys'
gradients). Rows that x and y share a time with are aligned: query t beside key t + offset, times cut into segments of
`chunks` chunks of CHUNK rows. `state_kernel` adds up y_t^T u_t (and f_t u_t or y_t) of each segment, `scan_kernel`
turns them into what was seen before (or comes after) each segment, and `sums_kernel` walks one segment chunk by chunk
with that state in registers: the part of a chunk within itself is a masked CHUNK x CHUNK product. Each program owns
BLOCK_R columns of u; grouped query heads are walked in turn where keys are written. No atomics.

Products are of float32 tiles: exact "ieee", or "tf32", which holds any float16 or bfloat16 exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import INF, dot, load_tile, only_if, row_offsets


class Side(NamedTuple):
    """One operand (B, heads, N, dim): pointer and strides as of tiles.Rows. Its rows are divided by `norm`, have the
    factor `extra` (e or f above), and are left out where not alive."""

    ptr: Any
    b: Any
    h: Any
    n: Any
    norm: Any  # (B, heads, N); None: 1
    extra: Any  # (B, heads, N); None: 1
    alive: Any  # bytes (B, N); None: all
    heads: Any
    N: Any
    shift: Any  # row of time t: t + shift


class Times(NamedTuple):
    """How time is cut: `slots` segments of `chunks` chunks, the first of which starts at `first`."""

    slots: Any
    chunks: Any
    first: Any


class LinearConstants(NamedTuple):
    """What a kernel is compiled for: its only constexpr argument."""

    E: int  # columns of x and y
    R: int  # columns of u and out
    BLOCK_E: int  # E padded to a power of two
    BLOCK_R: int  # columns of u that a program owns
    CHUNK: int
    SPREAD: int  # heads of y that belong to a line: a key head's group for queries, 1 for keys
    EXTRA: bool  # whether there are factors e and f
    NORMALISE: bool  # whether the output is divided by sum_t x_s . y_t
    CAUSAL: bool
    REVERSE: bool
    PRECISION: str


@triton.jit
def rows_that_count(side, i_b, o_n):
    """Which of the rows o_n exist and are alive."""
    m_n = (o_n >= 0) & (o_n < side.N)
    if side.alive is not None:
        m_n = m_n & (tl.load(side.alive + tl.cast(i_b, tl.int64) * side.N + o_n, mask=m_n, other=0) != 0)
    return m_n


@triton.jit
def load_part(side, i_b, i_h, o_n, m_n, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows o_n in float32, columns from `first`: [rows, BLOCK_D]; 0 outside, where m_n is false or the norm is 0."""
    o_d = first + tl.arange(0, BLOCK_D)
    p_tile = side.ptr + row_offsets(side, i_b, i_h, o_n)[:, None] + o_d[None, :]
    b_tile = tl.load(p_tile, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
    if side.norm is not None:
        b_n = tl.load(side.norm + (tl.cast(i_b, tl.int64) * side.heads + i_h) * side.N + o_n, mask=m_n, other=0.0)
        b_tile = tl.where((b_n == 0.0)[:, None], 0.0, b_tile / tl.where(b_n == 0.0, 1.0, b_n)[:, None])
    return b_tile


@triton.jit
def load_pair(y, u, i_b, i_h, o_y, i_r, C: tl.constexpr):
    """Rows o_y of y and the program's columns of u, and which rows count."""
    m_y = rows_that_count(y, i_b, o_y)
    b_y = load_part(y, i_b, i_h, o_y, m_y, 0, C.E, C.BLOCK_E)
    return b_y, load_part(u, i_b, i_h, o_y, m_y, i_r * C.BLOCK_R, C.R, C.BLOCK_R), m_y


@triton.jit
def load_extra(side, i_b, i_h, o_n, m_n):
    """The factor of rows o_n; 0 for rows that do not count."""
    if side.extra is None:
        return tl.where(m_n, 1.0, 0.0)
    else:
        return tl.load(side.extra + (tl.cast(i_b, tl.int64) * side.heads + i_h) * side.N + o_n, mask=m_n, other=0.0)


@triton.jit
def terms_kernel(
    out, grad_out, normaliser, grad_normaliser, terms, rows, Hq, Nq,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h = dn - dout . out / n (dn alone where n = 0) of BLOCK of the B * Hq * Nq rows."""
    o_r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < rows
    i_b, i_h, i_q = o_r // Nq // Hq, o_r // Nq % Hq, o_r % Nq
    b_out = load_tile(out, i_b, i_h, i_q, m_r, DV, BLOCK_DV).to(tl.float32)
    b_do = load_tile(grad_out, i_b, i_h, i_q, m_r, DV, BLOCK_DV).to(tl.float32)
    b_n = tl.load(normaliser + o_r, mask=m_r, other=0.0)
    b_h = tl.where(b_n == 0.0, 0.0, -tl.sum(b_out * b_do, 1) / tl.where(b_n == 0.0, 1.0, b_n))
    if grad_normaliser is not None:
        b_h += tl.load(grad_normaliser + o_r, mask=m_r, other=0.0)
    tl.store(terms + o_r, b_h, mask=m_r)


@triton.jit
def state_offsets(i_line, i_slot, slots, i_r, C: tl.constexpr):
    """Where the state [BLOCK_E, BLOCK_R] of a slot lies in (lines, slots, E, R), and which of it exists."""
    o_e, o_r = tl.arange(0, C.BLOCK_E), i_r * C.BLOCK_R + tl.arange(0, C.BLOCK_R)
    o_state = (tl.cast(i_line, tl.int64) * slots + i_slot) * C.E * C.R + (o_e * C.R)[:, None] + o_r[None, :]
    return o_state, (o_e < C.E)[:, None] & (o_r < C.R)[None, :]


@triton.jit
def vector_offsets(i_line, i_slot, slots, i_r, C: tl.constexpr):
    """Likewise of the vector beside the state: (lines, slots, E) with NORMALISE, else (lines, slots, R)."""
    if C.NORMALISE:
        o_e = tl.arange(0, C.BLOCK_E)
        return (tl.cast(i_line, tl.int64) * slots + i_slot) * C.E + o_e, o_e < C.E
    else:
        o_r = i_r * C.BLOCK_R + tl.arange(0, C.BLOCK_R)
        return (tl.cast(i_line, tl.int64) * slots + i_slot) * C.R + o_r, o_r < C.R


@triton.jit
def state_kernel(y, u, states, vectors, times, r_tiles, C: tl.constexpr):
    """The state sum_t y_t^T u_t of every segment, and beside it sum_t f_t u_t (EXTRA) or sum_t y_t (NORMALISE). Grid:
    lines * slots * r_tiles; a line is a batch element and a key head."""
    i_program = tl.program_id(0)
    i_r = i_program % r_tiles
    i_slot = i_program // r_tiles % times.slots
    i_line = i_program // r_tiles // times.slots
    lines_per_batch = y.heads // C.SPREAD
    i_b, i_h = i_line // lines_per_batch, i_line % lines_per_batch * C.SPREAD
    b_state = tl.full([C.BLOCK_E, C.BLOCK_R], 0.0, tl.float32)
    b_vector = tl.full([C.BLOCK_E if C.NORMALISE else C.BLOCK_R], 0.0, tl.float32)
    start = times.first + i_slot * times.chunks * C.CHUNK + y.shift
    for t in range(times.chunks * C.SPREAD):
        o_y = start + t // C.SPREAD * C.CHUNK + tl.arange(0, C.CHUNK)
        i_hy = i_h + t % C.SPREAD
        b_y, b_u, m_y = load_pair(y, u, i_b, i_hy, o_y, i_r, C)
        b_state += dot(tl.trans(b_y), b_u, C)
        if C.EXTRA:
            b_vector += tl.sum(load_extra(y, i_b, i_hy, o_y, m_y)[:, None] * b_u, 0)
        if C.NORMALISE:
            b_vector += tl.sum(b_y, 0)
    o_state, m_state = state_offsets(i_line, i_slot, times.slots, i_r, C)
    tl.store(states + o_state, b_state, mask=m_state)
    if C.EXTRA or C.NORMALISE:
        o_vector, m_vector = vector_offsets(i_line, i_slot, times.slots, i_r, C)
        if not C.EXTRA:
            m_vector = only_if(i_r == 0, m_vector)
        tl.store(vectors + o_vector, b_vector, mask=m_vector)


@triton.jit
def scan_kernel(states, slots, size, TOTAL: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """In place over (lines, slots, size): each slot becomes the sum of those before it (REVERSE: after it); TOTAL: the
    first becomes the sum of all. Grid: lines * ceil(size / BLOCK)."""
    blocks = tl.cdiv(size, BLOCK)
    i_line, i_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    o_x = i_block * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < size
    p_line = states + tl.cast(i_line, tl.int64) * slots * size + o_x
    b_sum = tl.zeros([BLOCK], tl.float32)
    for s in range(slots):
        i_slot = slots - 1 - s if REVERSE else s
        p_slot = p_line + tl.cast(i_slot, tl.int64) * size
        b_now = tl.load(p_slot, mask=m_x, other=0.0)
        if not TOTAL:
            tl.store(p_slot, b_sum, mask=m_x)
        b_sum += b_now
    if TOTAL:
        tl.store(p_line, b_sum, mask=m_x)


@triton.jit
def within_chunk(b_out, b_w, b_u, m_seen, C: tl.constexpr):
    """b_out + b_w @ b_u, NaN where a pair that is seen meets what is not finite, which others must not meet."""
    m_bad = (tl.abs(b_u) < INF) == 0
    b_out += dot(b_w, tl.where(m_bad, 0.0, b_u), C)
    if tl.max(m_bad.to(tl.int32)) > 0:
        b_seen = tl.dot(m_seen.to(tl.float16), m_bad.to(tl.float16))
        b_out = tl.where(b_seen > 0.0, float("nan"), b_out)
    return b_out


@triton.jit
def sums_kernel(x, y, u, out, states, vectors, normaliser, times, r_tiles, C: tl.constexpr):
    """out_s = sum_t (x_s . y_t + e_s f_t) u_t, with NORMALISE divided by sum_t x_s . y_t, which is written too.

    Grid: B * heads of x * slots * r_tiles. SPREAD heads of y and u are summed over.
    """
    i_program = tl.program_id(0)
    i_r = i_program % r_tiles
    i_slot = i_program // r_tiles % times.slots
    i_x = i_program // r_tiles // times.slots
    i_b, i_h = i_x // x.heads, i_x % x.heads
    i_hy = i_h * C.SPREAD if C.SPREAD > 1 else i_h // (x.heads // y.heads)
    i_line = i_x if C.SPREAD > 1 else i_b * y.heads + i_hy
    i_state = i_slot if C.CAUSAL else 0
    o_state, m_state = state_offsets(i_line, i_state, times.slots, i_r, C)
    b_state = tl.load(states + o_state, mask=m_state, other=0.0)
    b_vector = tl.full([C.BLOCK_E if C.NORMALISE else C.BLOCK_R], 0.0, tl.float32)
    if C.EXTRA or C.NORMALISE:
        o_vector, m_vector = vector_offsets(i_line, i_state, times.slots, i_r, C)
        b_vector = tl.load(vectors + o_vector, mask=m_vector, other=0.0)

    for c in range(times.chunks):
        i_chunk = times.chunks - 1 - c if C.REVERSE else c
        o_t = times.first + (i_slot * times.chunks + i_chunk) * C.CHUNK + tl.arange(0, C.CHUNK)
        o_x, o_y = o_t + x.shift, o_t + y.shift
        m_x = rows_that_count(x, i_b, o_x)
        b_x = load_part(x, i_b, i_h, o_x, m_x, 0, C.E, C.BLOCK_E)
        b_e = load_extra(x, i_b, i_h, o_x, m_x)
        b_out = dot(b_x, b_state, C)
        b_n = tl.full([C.CHUNK], 0.0, tl.float32)
        if C.EXTRA:
            b_out += b_e[:, None] * b_vector[None, :]
        if C.NORMALISE:
            b_n = tl.sum(b_x * b_vector[None, :], 1)
        if C.CAUSAL:
            m_pairs = (o_t[None, :] >= o_t[:, None]) if C.REVERSE else (o_t[None, :] <= o_t[:, None])
            for g in range(C.SPREAD):
                b_y, b_u, m_y = load_pair(y, u, i_b, i_hy + g, o_y, i_r, C)
                b_w = dot(b_x, tl.trans(b_y), C)
                if C.EXTRA:
                    b_f = load_extra(y, i_b, i_hy + g, o_y, m_y)
                    b_w += b_e[:, None] * b_f[None, :]
                    b_vector += tl.sum(b_f[:, None] * b_u, 0)
                m_seen = m_pairs & m_y[None, :]
                b_w = tl.where(m_seen, b_w, 0.0)
                if C.NORMALISE:
                    b_n += tl.sum(b_w, 1)
                    b_vector += tl.sum(b_y, 0)
                b_state += dot(tl.trans(b_y), b_u, C)
                b_out = within_chunk(b_out, b_w, b_u, m_seen, C)
        m_row = (o_x >= 0) & (o_x < x.N)
        if C.NORMALISE:
            b_out = tl.where((b_n == 0.0)[:, None], 0.0, b_out / tl.where(b_n == 0.0, 1.0, b_n)[:, None])
            tl.store(normaliser + tl.cast(i_x, tl.int64) * x.N + o_x, b_n, mask=only_if(i_r == 0, m_row))
        o_d = i_r * C.BLOCK_R + tl.arange(0, C.BLOCK_R)
        p_out = out.ptr + row_offsets(out, i_b, i_h, o_x)[:, None] + o_d[None, :]
        b_out = tl.where(m_x[:, None], b_out, 0.0)
        tl.store(p_out, b_out.to(out.ptr.dtype.element_ty), mask=m_row[:, None] & (o_d < C.R)[None, :])
