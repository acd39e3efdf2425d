"""What the kernels share: how a mask is read, how a tile is loaded, masked, dropped and stored.

Letters: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D and Dv head dimensions. Prefixes: i_ a
program's own index, o_ offsets, m_ truth values, p_ pointers, b_ values of a tile. A tile that hangs over an edge is
filled with zeros. Rows are counted in 64 bits before a stride is multiplied.

    visible(i, j)  =  list(i, j)  and  low <= j - i <= high  and  j < length[b]

as in efficient_attn/masks/block_mask.py, whose arrays are read as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))

# The interpreter's products are numpy's, with its order of summation, and of bfloat16 it multiplies the bit patterns;
# there a product is taken in float64 and rounded once.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Sums that are kept for a row of scores. A thread holds pairs of neighbours out of every eight columns (mma's layout),
# so that columns of the same place in their eights add up without another thread; the eight meet once, at the end.
PARTIAL_SUMS = tl.constexpr(8)

# How a walk over key (or query) tiles masks them.
FULL = tl.constexpr(0)  # every pair is visible
PARTIAL = tl.constexpr(1)  # window, length, the bits of the list or the end of the sequence cut


class Rows(NamedTuple):
    """A (B, H, N, D) tensor with unit last stride: pointer and strides in elements."""

    ptr: Any
    b: Any
    h: Any
    n: Any


class Bias(NamedTuple):
    """An additive bias: pointer (None: no bias) and its strides over (B, Hq, Nq, Nk), 0 where it broadcasts."""

    ptr: Any
    b: Any
    h: Any
    q: Any
    k: Any


class Mask(NamedTuple):
    """The arrays of a BlockMask, or those of its transpose; for a walk in the order of a plan (plan.py).

    `blocks`: rows of the list for one batch element and head.
    """

    indptr: Any  # None: no list
    indices: Any
    tile_ids: Any
    clean: Any  # of the plan
    live: Any
    order: Any  # block rows, longest first; None: as they come
    tiles: Any
    lengths: Any  # None: every key
    batch: Any
    heads: Any
    blocks: Any
    entries: Any
    tile_count: Any
    low: Any  # of j - i
    high: Any


# --- loading and storing ---


@triton.jit
def row_offsets(view, i_b, i_h, o_n):
    """Offset of rows o_n; i_h is one head, or a head for each row."""
    return tl.cast(i_b, tl.int64) * view.b + tl.cast(i_h, tl.int64) * view.h + tl.cast(o_n, tl.int64) * view.n


@triton.jit
def load_tile(view, i_b, i_h, o_n, m_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows o_n [N] where m_n holds, zeros elsewhere and beyond D: [N, BLOCK_D]."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = view.ptr + row_offsets(view, i_b, i_h, o_n)[:, None] + o_d[None, :]
    return tl.load(p_tile, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def load_block(
    p_head, stride, first, end, D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr
):
    """N rows from `first` of the head at p_head, zeros from row `end` on: [N, BLOCK_D]. CHECK: rows may be missing."""
    o_n, o_d = tl.arange(0, N), tl.arange(0, BLOCK_D)
    p_block = p_head + tl.cast(first, tl.int64) * stride + (tl.cast(o_n, tl.int64) * stride)[:, None] + o_d[None, :]
    if CHECK:
        return tl.load(p_block, mask=(first + o_n < end)[:, None] & (o_d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(p_block)
    else:
        return tl.load(p_block, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def load_described(tiles, i_b, i_h, first, N: tl.constexpr, BLOCK_D: tl.constexpr):
    """N rows from `first` of a head by the tensor's descriptor, zeros beyond its ends: [N, BLOCK_D]."""
    return tl.reshape(tiles.load([i_b, i_h, first, 0]), [N, BLOCK_D])


@triton.jit
def store_tile(view, i_b, i_h, o_n, m_n, b_tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write [N, BLOCK_D] to rows o_n where m_n holds, in the tensor's dtype."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = view.ptr + row_offsets(view, i_b, i_h, o_n)[:, None] + o_d[None, :]
    tl.store(p_tile, b_tile.to(view.ptr.dtype.element_ty), mask=m_n[:, None] & (o_d < D)[None, :])


# --- products ---


@triton.jit
def dot(b_a, b_b, PRECISION: tl.constexpr):
    """b_a @ b_b in float32; b_a takes b_b's dtype."""
    b_a = b_a.to(b_b.dtype)
    if INTERPRETED:
        return tl.dot(b_a.to(tl.float32).to(tl.float64), b_b.to(tl.float32).to(tl.float64)).to(tl.float32)
    else:
        return tl.dot(b_a, b_b, input_precision=PRECISION)


@triton.jit
def select_dot(b_w, m_visible, b_x, b_acc, PRECISION: tl.constexpr, SAFE: tl.constexpr):
    """b_acc + b_w @ b_x. SAFE: an invisible pair adds nothing even where b_x is NaN or infinite, a visible one NaN."""
    if SAFE:
        m_bad = (tl.abs(b_x.to(tl.float32)) < INF) == 0
        b_acc += dot(b_w, tl.where(m_bad, 0.0, b_x.to(tl.float32)).to(b_x.dtype), PRECISION)
        b_seen = tl.dot(m_visible.to(tl.float16), m_bad.to(tl.float16))
        return tl.where(b_seen > 0.0, float("nan"), b_acc)
    else:
        return b_acc + dot(b_w, b_x, PRECISION)


@triton.jit
def any_not_finite(b_x):
    """1 if some element is NaN or infinite, else 0: a scalar."""
    return tl.max(tl.where(tl.abs(b_x) < INF, 0, 1))


@triton.jit
def any_flag(p_flags, first, programs, step):
    """Whether one of the flags first, first + step, .. below `programs` is set: a scalar."""
    found = tl.zeros([], tl.int32)
    for start in range(first, programs, step * 1024):
        o_flag = start + tl.arange(0, 1024) * step
        found = tl.maximum(found, tl.max(tl.load(p_flags + o_flag, mask=o_flag < programs, other=0)))
    return found > 0


# --- which pairs are visible ---


@triton.jit
def key_count(mask, i_b, Nk):
    """The keys of batch element i_b that its length lets live."""
    if mask.lengths is None:
        return Nk
    else:
        return tl.minimum(tl.maximum(tl.load(mask.lengths + i_b), 0), Nk)


@triton.jit
def tile_range(any_first, any_end, all_first, all_end, BLOCK: tl.constexpr):
    """Tiles [first, end) that hold a visible position, and of these [full_first, full_end) that hold no other."""
    first = any_first // BLOCK
    end = tl.where(any_end > any_first, tl.cdiv(any_end, BLOCK), first)
    full_first = tl.minimum(tl.maximum(tl.cdiv(all_first, BLOCK), first), end)
    full_end = tl.maximum(tl.minimum(all_end // BLOCK, end), full_first)
    return first, end, full_first, full_end


@triton.jit
def visible_keys(mask, i_first, i_last, keys, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Keys [any_first, any_end) that some of the queries i_first .. i_last see by window and length, and those that
    all of them see."""
    any_first, all_first = 0, 0
    any_end, all_end = keys, keys
    if LOW:
        any_first = tl.maximum(i_first + mask.low, 0)
        all_first = tl.maximum(i_last + mask.low, 0)
    if HIGH:
        any_end = tl.minimum(i_last + mask.high + 1, keys)
        all_end = tl.minimum(i_first + mask.high + 1, keys)
    return any_first, any_end, all_first, all_end


@triton.jit
def visible_queries(mask, j_first, j_last, keys, Nq, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Queries [any_first, any_end) that see some of the keys j_first .. j_last, and those that see all of them."""
    any_first, all_first = 0, 0
    any_end, all_end = Nq, Nq
    if HIGH:
        any_first = tl.maximum(j_first - mask.high, 0)
        all_first = tl.maximum(j_last - mask.high, 0)
    if LOW:
        any_end = tl.minimum(j_last - mask.low + 1, Nq)
        all_end = tl.minimum(j_first - mask.low + 1, Nq)
    any_end = tl.where(j_first < keys, any_end, any_first)
    all_end = tl.where(j_last < keys, all_end, all_first)
    return any_first, any_end, all_first, all_end


@triton.jit
def list_entries(mask, i_b, i_h, i_block):
    """Entries [begin, end) of a row of the list, kept inside the arrays whatever they hold."""
    row = tl.where(mask.batch == 1, 0, tl.cast(i_b, tl.int64)) * mask.heads
    row = (row + tl.where(mask.heads == 1, 0, i_h)) * mask.blocks + i_block
    begin = tl.maximum(tl.load(mask.indptr + row), 0)
    end = tl.minimum(tl.load(mask.indptr + row + 1), mask.entries)
    return begin, tl.maximum(begin, end)


@triton.jit
def lower_bound(p_indices, begin, end, block):
    """The first of the ascending entries [begin, end) that is not before `block`."""
    while begin < end:
        middle = (begin + end) // 2
        before = tl.load(p_indices + middle) < block
        begin = tl.where(before, middle + 1, begin)
        end = tl.where(before, end, middle)
    return begin


@triton.jit
def planned_entries(mask, i_b, i_h, i_block):
    """Where a row of the plan begins, how many of its entries are clean, and how many there are."""
    row = tl.where(mask.batch == 1, 0, tl.cast(i_b, tl.int64)) * mask.heads
    row = (row + tl.where(mask.heads == 1, 0, i_h)) * mask.blocks + i_block
    begin = tl.minimum(tl.maximum(tl.load(mask.indptr + row), 0), mask.entries)
    live = tl.minimum(tl.load(mask.live + row), mask.entries - begin).to(tl.int32)
    return begin, tl.minimum(tl.load(mask.clean + row), live), live


@triton.jit
def planned_entry(mask, entry):
    """Block and bit tile (-1: none) of an entry of the plan; there is one more than the plan fills, for to be read
    ahead."""
    return tl.load(mask.indices + entry), tl.load(mask.tile_ids + entry)


@triton.jit
def planned_range(mask, begin, clean, live, keys, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """A walk over the keys of a row of the plan, in tiles of which a block has PARTS: how many are clean, how many
    there are, and after which ones how many are skipped, being beyond the `keys` that live."""
    clean_end, end, gap_at, gap = clean, live, live, 0
    if mask.lengths is not None:
        clean_end = (lower_bound(mask.indices, begin, begin + clean, keys // SIZE) - begin).to(tl.int32)
        block = tl.load(mask.indices + begin + clean_end, mask=clean_end < clean, other=0)
        gap_at = clean_end + ((clean_end < clean) & (block * SIZE < keys)).to(tl.int32)
        gap = clean - gap_at
        end = lower_bound(mask.indices, begin + clean, begin + live, tl.cdiv(keys, SIZE)) - begin
        end = end.to(tl.int32) - gap
    return clean_end * PARTS, end * PARTS, gap_at * PARTS, gap * PARTS


@triton.jit
def walk_position(t, skip_at, skip, gap_at, gap, GAP: tl.constexpr):
    """Where step t of a walk is that leaves out `skip` tiles at `skip_at`, and then `gap` more at `gap_at`."""
    at = t + tl.where(t >= skip_at, skip, 0)
    if GAP:
        at += tl.where(at >= gap_at, gap, 0)
    return at


@triton.jit
def list_entry(mask, entry, last):
    """Block and bit tile (-1: full) of an entry, or of `last` for those behind it."""
    entry = tl.maximum(tl.minimum(entry, last), 0)
    tile = tl.load(mask.tile_ids + entry)
    return tl.maximum(tl.load(mask.indices + entry), 0), tl.where(tile < mask.tile_count, tile, -1)


@triton.jit
def tile_bits(
    mask, tile, o_row, first_key, LIST_Q: tl.constexpr, LIST_K: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr
):
    """What bit tile `tile` says of its queries o_row and its keys first_key .. first_key + N.

    A tile of -1 hides nothing. Keys run along AXIS. Bits come as words of 32 keys (16 where a row of bits is no
    multiple of 32), one a query, so that a thread loads a word once for all its keys.
    """
    WORD: tl.constexpr = 32 if N % 32 == 0 else 16
    p_words = mask.tiles.to(tl.pointer_type(tl.int32 if WORD == 32 else tl.int16))
    p_row = p_words + tl.cast(tile, tl.int64) * (LIST_Q * LIST_K // WORD) + o_row * (LIST_K // WORD) + first_key // WORD
    o_key = tl.expand_dims(tl.arange(0, N), 1 - AXIS)
    m_row = (o_row >= 0) & (tile >= 0)
    b_words = tl.expand_dims(tl.load(p_row, mask=m_row, other=-1).to(tl.int32), AXIS)
    for word in tl.static_range(1, N // WORD):
        b_next = tl.expand_dims(tl.load(p_row + word, mask=m_row, other=-1).to(tl.int32), AXIS)
        b_words = tl.where(o_key >= word * WORD, b_next, b_words)
    return ((b_words >> (o_key % WORD)) & 1) != 0


@triton.jit
def window_pairs(mask, o_i, o_j, keys, LOW: tl.constexpr, HIGH: tl.constexpr):
    """What window and length say of queries o_i and keys o_j, shaped to broadcast against each other."""
    m_visible = (o_j < keys) & (o_i >= 0)
    if LOW:
        m_visible = m_visible & (o_j - o_i >= mask.low)
    if HIGH:
        m_visible = m_visible & (o_j - o_i <= mask.high)
    return m_visible


# --- bias and dropout ---


@triton.jit
def load_bias(bias, i_b, i_h, o_i, o_j, m_ij):
    """The bias of queries o_i and keys o_j (shaped to broadcast) in units of log2, 0 where m_ij is false."""
    o_row = tl.cast(i_b, tl.int64) * bias.b + tl.cast(i_h, tl.int64) * bias.h + tl.cast(o_i, tl.int64) * bias.q
    return tl.load(bias.ptr + o_row + tl.cast(o_j, tl.int64) * bias.k, mask=m_ij, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def kept_pairs(p_seed, i_b, i_h, i_first, j_first, threshold, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which pairs dropout keeps, [BLOCK_Q, BLOCK_K] from query i_first (a multiple of 16) and key j_first (even).

    The rule of csrc/common/philox.h: one Philox4x32-10 call (Salmon et al., SC 2011) serves the queries i and i + 8 and
    the keys j and j + 1, so a quarter of the tile is drawn and its four words are spread over the pairs.
    """
    o_group = i_first // 16 * 8 + tl.arange(0, BLOCK_Q // 2)  # (i >> 4) * 8 + (i & 7)
    o_pair = j_first // 2 + tl.arange(0, BLOCK_K // 2)
    c_zero = tl.zeros([BLOCK_Q // 2, BLOCK_K // 2], tl.uint32)
    c_key = o_pair[None, :].to(tl.uint32) + c_zero
    c_query = o_group[:, None].to(tl.uint32) + c_zero
    w0, w1, w2, w3 = tl.philox(
        tl.load(p_seed), c_key, c_query, c_zero + tl.cast(i_h, tl.uint32), c_zero + tl.cast(i_b, tl.uint32)
    )
    upper = tl.reshape(tl.join(w0, w1), [BLOCK_Q // 2, BLOCK_K])
    lower = tl.reshape(tl.join(w2, w3), [BLOCK_Q // 2, BLOCK_K])
    words = tl.reshape(tl.join(upper, lower), [BLOCK_Q // 16, 8, BLOCK_K, 2])
    words = tl.reshape(tl.permute(words, (0, 3, 1, 2)), [BLOCK_Q, BLOCK_K])
    return words >= tl.cast(threshold, tl.uint32)


# --- softmax ---


@triton.jit
def online_softmax_update(b_s, b_m, b_l, scale):
    """Take scores [Q, K] (times scale: log2) into the running maximum [Q] and the sums [Q, PARTIAL_SUMS] of each row
    (Milakov and Gimelshein, 2018).

    Returns the weights exp2(scale * b_s - maximum), the factor for what was summed before, and the new maximum and
    sums. A row without a visible key keeps its maximum at -inf and gets weights of 0.
    """
    b_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
    b_shift = tl.where(b_new == -INF, 0.0, b_new)
    b_p = tl.exp2(b_s * scale - b_shift[:, None])
    b_alpha = tl.exp2(b_m - b_shift)
    b_part = tl.sum(tl.reshape(b_p, [b_p.shape[0], b_p.shape[1] // PARTIAL_SUMS, PARTIAL_SUMS]), 1)
    return b_p, b_alpha, b_new, b_l * b_alpha[:, None] + b_part


# --- order of the programs ---


@triton.jit
def locate(i_program, mask, tiles, lines, heads, section, PARTS: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Tile and line (batch element and head) of a program.

    A section of lines is worked off together, so that its keys and values stay in the L2 cache; within it the tiles
    with most work start first: those of the longest rows of the list (PARTS tiles each), without one the last ones
    under a causal window.
    """
    i_section = i_program // (section * tiles)
    rest = i_program - i_section * section * tiles
    width = tl.minimum(section, lines - i_section * section)
    i_tile = rest // width
    i_line = i_section * section + rest - i_tile * width
    if mask.order is not None:
        i_b, i_h = i_line // heads, i_line % heads
        row = tl.where(mask.batch == 1, 0, tl.cast(i_b, tl.int64)) * tl.where(mask.heads == 1, 1, heads)
        row = (row + tl.where(mask.heads == 1, 0, i_h)) * mask.blocks + i_tile // PARTS
        i_tile = tl.load(mask.order + row) * PARTS + i_tile % PARTS
    elif LAST_FIRST:
        i_tile = tiles - 1 - i_tile
    return i_tile, i_line
