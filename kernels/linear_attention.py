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

import triton
import triton.language as tl

from .tiles import dot, load_tile, row_offsets


@triton.jit
def load_part(view, norm, alive, i_b, i_h, heads, o_n, N, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows o_n in float32, columns from `first`: [rows, BLOCK_D]; 0 outside, where `alive` (B, N) is 0 or the norm is.

    norm (B, heads, N), None: 1. Returns the tile and which rows count.
    """
    m_n = (o_n >= 0) & (o_n < N)
    if alive is not None:
        m_n = m_n & (tl.load(alive + tl.cast(i_b, tl.int64) * N + o_n, mask=m_n, other=0) != 0)
    o_d = first + tl.arange(0, BLOCK_D)
    p_tile = view.ptr + row_offsets(view, i_b, i_h, o_n)[:, None] + o_d[None, :]
    b_tile = tl.load(p_tile, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
    if norm is not None:
        b_n = tl.load(norm + (tl.cast(i_b, tl.int64) * heads + i_h) * N + o_n, mask=m_n, other=0.0)
        b_tile = tl.where((b_n == 0.0)[:, None], 0.0, b_tile / tl.where(b_n == 0.0, 1.0, b_n)[:, None])
    return b_tile, m_n


@triton.jit
def load_extra(extra, i_b, i_h, heads, o_n, N, m_n):
    """The factor e or f of rows o_n: (B, heads, N), None: 1; 0 for rows that do not count."""
    if extra is None:
        return tl.where(m_n, 1.0, 0.0)
    else:
        return tl.load(extra + (tl.cast(i_b, tl.int64) * heads + i_h) * N + o_n, mask=m_n, other=0.0)


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
def add_chunk(
    b_state, b_vector, y, u, y_norm, u_norm, y_extra, y_alive, i_b, i_h, heads, o_y, N, i_r,
    E: tl.constexpr, R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
    EXTRA: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the rows o_y to the state sum_t y_t^T u_t and to sum_t f_t u_t (EXTRA) or sum_t y_t (NORMALISE)."""
    b_y, m_y = load_part(y, y_norm, y_alive, i_b, i_h, heads, o_y, N, 0, E, BLOCK_E)
    b_u, m_y = load_part(u, u_norm, y_alive, i_b, i_h, heads, o_y, N, i_r * BLOCK_R, R, BLOCK_R)
    b_state += dot(tl.trans(b_y), b_u, PRECISION)
    if EXTRA:
        b_vector += tl.sum(load_extra(y_extra, i_b, i_h, heads, o_y, N, m_y)[:, None] * b_u, 0)
    if NORMALISE:
        b_vector += tl.sum(b_y, 0)
    return b_state, b_vector


@triton.jit
def state_offsets(
    i_line, i_slot, slots, i_r, E: tl.constexpr, R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Where the state [BLOCK_E, BLOCK_R] of a slot lies in (lines, slots, E, R), and which of it exists."""
    o_e, o_r = tl.arange(0, BLOCK_E), i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_state = (tl.cast(i_line, tl.int64) * slots + i_slot) * E * R + (o_e * R)[:, None] + o_r[None, :]
    return o_state, (o_e < E)[:, None] & (o_r < R)[None, :]


@triton.jit
def vector_offsets(
    i_line, i_slot, slots, i_r, E: tl.constexpr, R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
    NORMALISE: tl.constexpr,
):  # fmt: skip
    """Likewise of the vector beside the state: (lines, slots, E) with NORMALISE, else (lines, slots, R)."""
    if NORMALISE:
        o_e = tl.arange(0, BLOCK_E)
        return (tl.cast(i_line, tl.int64) * slots + i_slot) * E + o_e, o_e < E
    else:
        o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        return (tl.cast(i_line, tl.int64) * slots + i_slot) * R + o_r, o_r < R


@triton.jit
def state_kernel(
    y, u, y_norm, u_norm, y_extra, y_alive, states, vectors,
    slots, heads, N, first_time, shift, chunks, r_tiles,
    SPREAD: tl.constexpr,
    E: tl.constexpr, R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
    EXTRA: tl.constexpr, NORMALISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state of every segment. Grid: lines * slots * r_tiles; a line is a batch element and a key head.

    y and u have `heads` heads; SPREAD of them (a key head's group for queries, 1 for keys) belong to a line. Row of y
    at time t: t + shift; the first segment starts at first_time.
    """
    i_program = tl.program_id(0)
    i_r = i_program % r_tiles
    i_slot = i_program // r_tiles % slots
    i_line = i_program // r_tiles // slots
    lines_per_batch = heads // SPREAD
    i_b, i_h = i_line // lines_per_batch, i_line % lines_per_batch * SPREAD
    b_state = tl.zeros([BLOCK_E, BLOCK_R], tl.float32)
    b_vector = tl.zeros([BLOCK_E if NORMALISE else BLOCK_R], tl.float32)
    start = first_time + i_slot * chunks * CHUNK + shift
    for t in range(chunks * SPREAD):
        o_y = start + t // SPREAD * CHUNK + tl.arange(0, CHUNK)
        b_state, b_vector = add_chunk(
            b_state, b_vector, y, u, y_norm, u_norm, y_extra, y_alive, i_b, i_h + t % SPREAD, heads, o_y, N, i_r,
            E, R, BLOCK_E, BLOCK_R, EXTRA, NORMALISE, PRECISION,
        )  # fmt: skip
    o_state, m_state = state_offsets(i_line, i_slot, slots, i_r, E, R, BLOCK_E, BLOCK_R)
    tl.store(states + o_state, b_state, mask=m_state)
    if EXTRA or NORMALISE:
        o_vector, m_vector = vector_offsets(i_line, i_slot, slots, i_r, E, R, BLOCK_E, BLOCK_R, NORMALISE)
        tl.store(vectors + o_vector, b_vector, mask=m_vector & ((i_r == 0) | EXTRA))


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
def sums_kernel(
    x, y, u, out, x_norm, y_norm, u_norm, x_extra, y_extra, x_alive, y_alive, states, vectors, normaliser,
    slots, x_heads, y_heads, Nx, Ny, first_time, x_shift, y_shift, chunks, r_tiles,
    SPREAD: tl.constexpr,
    E: tl.constexpr, R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
    EXTRA: tl.constexpr, NORMALISE: tl.constexpr, CAUSAL: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out_s = sum_t (x_s . y_t + e_s f_t) u_t, with NORMALISE divided by sum_t x_s . y_t, which is written too.

    Grid: B * x_heads * slots * r_tiles. SPREAD heads of y and u (a key head's group for queries, 1 for keys) are
    summed over.
    """
    i_program = tl.program_id(0)
    i_r = i_program % r_tiles
    i_slot = i_program // r_tiles % slots
    i_x = i_program // r_tiles // slots
    i_b, i_h = i_x // x_heads, i_x % x_heads
    i_hy = i_h * SPREAD if SPREAD > 1 else i_h // (x_heads // y_heads)
    i_line = i_x if SPREAD > 1 else i_b * y_heads + i_hy
    i_state = i_slot if CAUSAL else 0
    o_state, m_state = state_offsets(i_line, i_state, slots, i_r, E, R, BLOCK_E, BLOCK_R)
    b_state = tl.load(states + o_state, mask=m_state, other=0.0)
    b_vector = tl.zeros([BLOCK_E if NORMALISE else BLOCK_R], tl.float32)
    if EXTRA or NORMALISE:
        o_vector, m_vector = vector_offsets(i_line, i_state, slots, i_r, E, R, BLOCK_E, BLOCK_R, NORMALISE)
        b_vector = tl.load(vectors + o_vector, mask=m_vector, other=0.0)

    for c in range(chunks):
        i_chunk = chunks - 1 - c if REVERSE else c
        o_t = first_time + (i_slot * chunks + i_chunk) * CHUNK + tl.arange(0, CHUNK)
        o_x, o_y = o_t + x_shift, o_t + y_shift
        b_x, m_x = load_part(x, x_norm, x_alive, i_b, i_h, x_heads, o_x, Nx, 0, E, BLOCK_E)
        b_e = load_extra(x_extra, i_b, i_h, x_heads, o_x, Nx, m_x)
        b_out = dot(b_x, b_state, PRECISION)
        b_n = tl.zeros([CHUNK], tl.float32)
        if EXTRA:
            b_out += b_e[:, None] * b_vector[None, :]
        if NORMALISE:
            b_n = tl.sum(b_x * b_vector[None, :], 1)
        if CAUSAL:
            m_pairs = (o_t[None, :] >= o_t[:, None]) if REVERSE else (o_t[None, :] <= o_t[:, None])
            for g in range(SPREAD):
                b_y, m_y = load_part(y, y_norm, y_alive, i_b, i_hy + g, y_heads, o_y, Ny, 0, E, BLOCK_E)
                b_u, m_y = load_part(u, u_norm, y_alive, i_b, i_hy + g, y_heads, o_y, Ny, i_r * BLOCK_R, R, BLOCK_R)
                b_w = dot(b_x, tl.trans(b_y), PRECISION)
                if EXTRA:
                    b_f = load_extra(y_extra, i_b, i_hy + g, y_heads, o_y, Ny, m_y)
                    b_w += b_e[:, None] * b_f[None, :]
                    b_vector += tl.sum(b_f[:, None] * b_u, 0)
                b_w = tl.where(m_pairs & m_y[None, :], b_w, 0.0)
                if NORMALISE:
                    b_n += tl.sum(b_w, 1)
                    b_vector += tl.sum(b_y, 0)
                b_state += dot(tl.trans(b_y), b_u, PRECISION)
                # What is not finite must not be met before its time.
                m_bad = (tl.abs(b_u) < float("inf")) == 0
                b_out += dot(b_w, tl.where(m_bad, 0.0, b_u), PRECISION)
                if tl.max(m_bad.to(tl.int32)) > 0:
                    m_seen = m_pairs & m_y[None, :]
                    b_seen = tl.dot(m_seen.to(tl.float16), m_bad.to(tl.float16))
                    b_out = tl.where(b_seen > 0.0, float("nan"), b_out)
        if NORMALISE:
            b_out = tl.where((b_n == 0.0)[:, None], 0.0, b_out / tl.where(b_n == 0.0, 1.0, b_n)[:, None])
            m_row = (o_x >= 0) & (o_x < Nx) & (i_r == 0)
            tl.store(normaliser + tl.cast(i_x, tl.int64) * Nx + o_x, b_n, mask=m_row)
        o_d = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        m_out = ((o_x >= 0) & (o_x < Nx))[:, None] & (o_d < R)[None, :]
        p_out = out.ptr + row_offsets(out, i_b, i_h, o_x)[:, None] + o_d[None, :]
        b_out = tl.where(m_x[:, None], b_out, 0.0)
        tl.store(p_out, b_out.to(out.ptr.dtype.element_ty), mask=m_out)
