"""What the kernels share: how a mask is read, how a tile is loaded, masked, dropped and stored.

Letters: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D and Dv head dimensions. Prefixes: i_ a
program's own index, o_ offsets, m_ truth values, p_ pointers, b_ values of a tile. A tile that hangs over an edge is
filled with zeros. Rows are counted in 64 bits before a stride is multiplied.

    visible(i, j)  =  list(i, j)  and  low <= j - i <= high  and  j < length[b]

as in efficient_attn/masks/block_mask.py, whose arrays are read as they are. Where the mask has an order of queries or
keys (masks/parts.py), lists and windows speak of places in it: rows and columns. What is loaded, stored, biased and
dropped is a token, and so is what a length cuts off.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LARGEST_BIAS = tl.constexpr(2.3e38)  # times LOG2E it is still a number
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
    """The arrays of a BlockMask, or those of its transpose; for a walk in the order of a plan (plan.py)."""

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
    blocks: Any  # rows of the list for one batch element and head
    entries: Any
    tile_count: Any
    low: Any  # of j - i; None: no bound
    high: Any
    query_order: Any = None  # pointer to int32, the token of each row; None: row i is token i
    key_order: Any = None
    q_b: Any = 0  # strides of the orders from a batch element, from a head to the next, 0 where one serves all
    q_h: Any = 0
    k_b: Any = 0
    k_h: Any = 0
    q_tokens: Any = 0  # queries and keys of the tensors, where there is an order
    k_tokens: Any = 0
    token_lengths: Any = None  # the lengths where keys have an order; `lengths` is None then


class Dropout(NamedTuple):
    """The seed (pointer to int64; None: no dropout), the least random word that is kept, and 1 / (1 - p)."""

    seed: Any
    origin: Any  # pointer to int64 (head, query, key), see backends/call.py; None: all 0
    threshold: Any
    keep_scale: Any


class Modifiers(NamedTuple):
    """What else is done to scores; None: not in this call."""

    cap: Any  # of the soft cap, in units of log2, and its inverse
    inverse: Any
    sinks: Any  # pointer to float32 (Hq)
    diagonals: Any  # pointer to float32: at i - j + Nk - 1 stands what is added to pair (i, j)
    b: Any  # strides of that from a batch element, from a head to the next, 0 where it broadcasts
    h: Any


class Sizes(NamedTuple):
    """Numbers of query heads, queries and keys (of rows and columns, where these have an order), and the scale."""

    Hq: Any
    Nq: Any
    Nk: Any
    scale: Any  # positive and in units of log2; SIGN times it is the true one


class Inputs(NamedTuple):
    """What every attention kernel reads. A kernel takes them one by one and puts them together, and there are tuples
    alone in here: of other tuples within tuples Triton 3.6 forgets, in a loop, which numbers are known to be 1."""

    q: Any  # Rows (B, Hq, Nq, D)
    k: Any  # Rows (B, Hkv, Nk, D)
    v: Any  # Rows (B, Hkv, Nk, DV)
    bias: Any
    mask: Any
    dropout: Any
    sizes: Any
    modifiers: Any


class Constants(NamedTuple):
    """What an attention kernel is compiled for: its only constexpr argument."""

    D: int
    DV: int
    BLOCK_D: int  # D and DV padded to powers of two
    BLOCK_DV: int
    BLOCK_Q: int  # queries and keys of a tile
    BLOCK_K: int
    LIST_Q: int  # queries and keys of a block of the list; those of a tile without one
    LIST_K: int
    GROUP: int  # query heads that share a key head
    SIGN: int  # -1, 0 or 1: of the scale
    PRECISION: str  # of float32 products: "ieee" or "tf32"
    PACK: int = 1  # query heads in the rows of one tile
    SPLIT: bool = False  # whether programs share the keys of a tile
    SAFE: bool = False  # the second launch, whose products select


class Places(NamedTuple):
    """Rows `o` from `first`, of queries or of keys, and which tokens they are: the same ones, or in an order -1 for a
    row beyond the end and a key beyond the length."""

    first: Any
    o: Any
    token: Any


class Tile(NamedTuple):
    """What a program owns: `Places` of a head, queries or, for their gradient, keys."""

    first: Any
    o: Any
    token: Any
    i_b: Any
    i_h: Any
    o_h: Any  # the head of each row, where heads are packed
    keys: Any  # of the batch element, that its length lets live


# --- loading and storing ---


@triton.jit
def row_offsets(view, i_b, i_h, o_n):
    """Offset of rows o_n; i_h is one head, or a head for each row."""
    return tl.cast(i_b, tl.int64) * view.b + tl.cast(i_h, tl.int64) * view.h + tl.cast(o_n, tl.int64) * view.n


@triton.jit
def line_offsets(x, i_b, i_h, o_i):
    """Offset of queries o_i in a contiguous (B, Hq, Nq) array; i_h is one head, or a head for each row."""
    queries = x.sizes.Nq if x.mask.query_order is None else x.mask.q_tokens
    return (tl.cast(i_b, tl.int64) * x.sizes.Hq + i_h) * queries + o_i


@triton.jit
def head_pointer(view, i_b, i_h):
    """Pointer to the first row of a head."""
    return view.ptr + row_offsets(view, i_b, i_h, 0)


@triton.jit
def load_tile(view, i_b, i_h, o_n, m_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows o_n [N] where m_n holds, zeros elsewhere and beyond D: [N, BLOCK_D]."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = view.ptr + row_offsets(view, i_b, i_h, o_n)[:, None] + o_d[None, :]
    return tl.load(p_tile, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)


# --- tokens in an order ---


@triton.jit
def ordered_tokens(p_order, o_n, rows, tokens):
    """The tokens of rows o_n; -1 beyond the last row, and for what names none of the `tokens`."""
    b_token = tl.load(p_order + o_n, mask=o_n < rows, other=-1)
    return tl.where((b_token >= 0) & (b_token < tokens), b_token, -1)


@triton.jit
def query_tokens(x, i_b, i_h, o_i):
    """The tokens of rows o_i of query head i_h."""
    if x.mask.query_order is None:
        return o_i
    else:
        p_order = x.mask.query_order + tl.cast(i_b, tl.int64) * x.mask.q_b + tl.cast(i_h, tl.int64) * x.mask.q_h
        return ordered_tokens(p_order, o_i, x.sizes.Nq, x.mask.q_tokens)


@triton.jit
def key_tokens(x, i_b, i_h, o_j):
    """The tokens of columns o_j of key head i_h, -1 for those that the length of the batch element cuts off."""
    if x.mask.key_order is None:
        return o_j
    else:
        p_order = x.mask.key_order + tl.cast(i_b, tl.int64) * x.mask.k_b + tl.cast(i_h, tl.int64) * x.mask.k_h
        live = x.mask.k_tokens
        if x.mask.token_lengths is not None:
            live = tl.minimum(tl.load(x.mask.token_lengths + i_b), live)
        return ordered_tokens(p_order, o_j, x.sizes.Nk, live)


@triton.jit
def query_places(x, i_b, i_h, i_first, N: tl.constexpr):
    """N rows of a query head."""
    o_i = i_first + tl.arange(0, N)
    return Places(i_first, o_i, query_tokens(x, i_b, i_h, o_i))


@triton.jit
def key_places(x, i_b, i_h, j_first, N: tl.constexpr):
    """N columns of a key head."""
    o_j = j_first + tl.arange(0, N)
    return Places(j_first, o_j, key_tokens(x, i_b, i_h, o_j))


@triton.jit
def owned_queries(x, rows, i_b, i_h, o_h, keys):
    """The tile of a program that owns the queries at `rows`. With a bias, those beyond the end repeat another one, so
    that the address of its elements is one."""
    if x.bias.ptr is None:
        return Tile(rows.first, rows.o, rows.token, i_b, i_h, o_h, keys)
    else:
        o_seen = tl.minimum(rows.o, x.sizes.Nq - 1)
        token = o_seen if x.mask.query_order is None else tl.maximum(rows.token, 0)
        return Tile(rows.first, o_seen, token, i_b, i_h, o_h, keys)


@triton.jit
def present(order, places, end):
    """Which places hold a token: those before `end`, or in an order those that name one."""
    if order is None:
        return places.o < end
    else:
        return places.token >= 0


@triton.jit
def load_block(
    order, p_head, stride, places, end, D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr
):
    """N rows from `places.first` of the head at p_head, zeros from row `end` on: [N, BLOCK_D]; in an order, if it is
    not None, their tokens. CHECK: rows may be missing."""
    o_n, o_d = tl.arange(0, N), tl.arange(0, BLOCK_D)
    if order is None:
        p_row = tl.cast(places.first, tl.int64) * stride + (tl.cast(o_n, tl.int64) * stride)[:, None]
    else:
        p_row = (tl.cast(places.token, tl.int64) * stride)[:, None]
    p_block = p_head + p_row + o_d[None, :]
    if CHECK:
        m_n = present(order, places, end)
        return tl.load(p_block, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(p_block)
    else:
        return tl.load(p_block, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def load_walked(
    tiles, order, p_head, stride, i_b, i_h, places, end,
    D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """`load_block` of a walk; where it needs no mask, by the tensor's descriptor `tiles` if there is one."""
    if MODE == FULL and tiles is not None:
        return tl.reshape(tiles.load([i_b, i_h, places.first, 0]), [N, BLOCK_D])
    else:
        return load_block(order, p_head, stride, places, end, D, N, BLOCK_D, MODE != FULL)


@triton.jit
def signed(b_x, SIGN: tl.constexpr):
    """b_x times the sign of the scale."""
    if SIGN == 1:
        return b_x
    else:
        return (b_x.to(tl.float32) * SIGN).to(b_x.dtype)


@triton.jit
def store_tile(view, i_b, i_h, o_n, m_n, b_tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write [N, BLOCK_D] to rows o_n where m_n holds, in the tensor's dtype."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = view.ptr + row_offsets(view, i_b, i_h, o_n)[:, None] + o_d[None, :]
    tl.store(p_tile, b_tile.to(view.ptr.dtype.element_ty), mask=m_n[:, None] & (o_d < D)[None, :])


# --- products ---


@triton.jit
def dot(b_a, b_b, C: tl.constexpr):
    """b_a @ b_b in float32; b_a takes b_b's dtype."""
    b_a = b_a.to(b_b.dtype)
    if INTERPRETED:
        return tl.dot(b_a.to(tl.float32).to(tl.float64), b_b.to(tl.float32).to(tl.float64)).to(tl.float32)
    else:
        return tl.dot(b_a, b_b, input_precision=C.PRECISION)


@triton.jit
def select_dot(b_w, m_visible, b_x, b_acc, C: tl.constexpr):
    """b_acc + b_w @ b_x. SAFE: an invisible pair adds nothing even where b_x is NaN or infinite, a visible one NaN."""
    if C.SAFE:
        m_bad = (tl.abs(b_x.to(tl.float32)) < INF) == 0
        b_acc += dot(b_w, tl.where(m_bad, 0.0, b_x.to(tl.float32)).to(b_x.dtype), C)
        b_seen = tl.dot(m_visible.to(tl.float16), m_bad.to(tl.float16))
        return tl.where(b_seen > 0.0, float("nan"), b_acc)
    else:
        return b_acc + dot(b_w, b_x, C)


@triton.jit
def only_if(condition, m_x):
    """m_x where a scalar condition holds. Not by `&` with the scalar: Triton's interpreter makes a number of it, and
    that of 3.9 masks no load or store by numbers."""
    return tl.where(condition, m_x, False)


@triton.jit
def any_not_finite(b_x):
    """1 if some element is NaN or infinite, else 0: a scalar."""
    return tl.max(tl.where(tl.abs(b_x) < INF, 0, 1))


# --- which pairs are visible ---


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
    m_row = o_row >= tl.where(tile >= 0, 0, LIST_Q)  # no row where there is no tile; as `only_if`, without a spill
    b_words = tl.expand_dims(tl.load(p_row, mask=m_row, other=-1).to(tl.int32), AXIS)
    for word in tl.static_range(1, N // WORD):
        b_next = tl.expand_dims(tl.load(p_row + word, mask=m_row, other=-1).to(tl.int32), AXIS)
        b_words = tl.where(o_key >= word * WORD, b_next, b_words)
    return ((b_words >> (o_key % WORD)) & 1) != 0


@triton.jit
def window_pairs(mask, o_i, o_j, keys):
    """What window and length say of queries o_i and keys o_j, shaped to broadcast against each other."""
    m_visible = (o_j < keys) & (o_i >= 0)
    if mask.low is not None:
        m_visible = m_visible & (o_j - o_i >= mask.low)
    if mask.high is not None:
        m_visible = m_visible & (o_j - o_i <= mask.high)
    return m_visible


# --- scores ---


@triton.jit
def in_log2(b_bias):
    """A bias in units of log2, of which finfo.min is still a number: only -inf hides."""
    b_size = tl.abs(b_bias)
    b_bias = tl.where(
        (b_size > LARGEST_BIAS) & (b_size != INF), tl.where(b_bias > 0, LARGEST_BIAS, -LARGEST_BIAS), b_bias
    )
    return b_bias * LOG2E


@triton.jit
def load_bias(bias, i_b, i_h, o_i, o_j, m_ij, KEY_AXIS: tl.constexpr):
    """The bias of queries o_i and keys o_j in units of log2, 0 where m_ij is false; keys run along KEY_AXIS."""
    o_row = tl.cast(i_b, tl.int64) * bias.b + tl.cast(i_h, tl.int64) * bias.h + tl.cast(o_i, tl.int64) * bias.q
    o_column = tl.cast(o_j, tl.int64) * bias.k
    p_pairs = bias.ptr + tl.expand_dims(o_row, KEY_AXIS) + tl.expand_dims(o_column, 1 - KEY_AXIS)
    return in_log2(tl.load(p_pairs, mask=m_ij, other=0.0).to(tl.float32))


@triton.jit
def tanh(b_x):
    """tanh, within four units in the last place: a series below 1/4, from where on 1 - 2^-x loses few digits."""
    b_power = tl.exp2(tl.abs(b_x) * (-2.0 * LOG2E))
    b_large = (1.0 - b_power) / (1.0 + b_power)
    b_large = tl.where(b_x < 0.0, -b_large, b_large)
    b_2 = b_x * b_x
    b_series = -0.05396825396825397 + b_2 * (0.021869488536155203 + b_2 * -0.008863235529902197)
    b_series = -0.3333333333333333 + b_2 * (0.13333333333333333 + b_2 * b_series)
    return tl.where(tl.abs(b_x) < 0.25, b_x + b_x * b_2 * b_series, b_large)


@triton.jit
def cap_scores(b_s, x):
    """Scores in log2 under the soft cap, and the derivative of that; without a cap the scores, twice."""
    if x.modifiers.cap is None:
        return b_s, b_s
    else:
        b_bounded = tanh(b_s * x.modifiers.inverse)
        return b_bounded * x.modifiers.cap, 1.0 - b_bounded * b_bounded


@triton.jit
def through_cap(b_ds, b_slope, x):
    """The gradient of scores as that of what was capped: 0 where it is 0, whatever NaN is behind the mask."""
    if x.modifiers.cap is None:
        return b_ds
    else:
        return tl.where(b_ds == 0.0, 0.0, b_ds * b_slope)


@triton.jit
def load_diagonals(x, i_b, i_h, o_i, o_j, m_ij, KEY_AXIS: tl.constexpr):
    """What is added by relative position to queries o_i and keys o_j in units of log2, 0 where m_ij is false."""
    o_line = tl.cast(i_b, tl.int64) * x.modifiers.b + tl.cast(i_h, tl.int64) * x.modifiers.h
    o_apart = tl.expand_dims(o_i + (x.sizes.Nk - 1), KEY_AXIS) - tl.expand_dims(o_j, 1 - KEY_AXIS)
    if len(o_line.shape) == 1:  # a head for each row
        o_line = tl.expand_dims(o_line, KEY_AXIS)
    return in_log2(tl.load(x.modifiers.diagonals + o_line + o_apart, mask=m_ij, other=0.0))


@triton.jit
def mask_scores(
    b_s, x, i_b, i_h, rows, columns, keys, tile, C: tl.constexpr, MODE: tl.constexpr, KEY_AXIS: tl.constexpr
):
    """Add the bias to scores in log2 and hide pairs (-inf): returns the scores and which pairs are visible.

    The queries are at `rows` of head i_h (one, or one a query), BLOCK_K keys at `columns`, along KEY_AXIS. PARTIAL: by
    window, length, the ends and bit tile `tile`; FULL: only a bias of -inf hides a pair.
    """
    o_q, o_k = tl.expand_dims(rows.o, KEY_AXIS), tl.expand_dims(columns.o, 1 - KEY_AXIS)
    m_visible = (o_q >= 0) & (o_k >= 0)
    if x.bias.ptr is not None:
        # Only the ends keep a load back: a mask that differs from key to key would take the load apart.
        m_inside = m_visible & tl.expand_dims(present(x.mask.key_order, columns, keys), 1 - KEY_AXIS)
        if KEY_AXIS == 0:
            m_inside = m_inside & tl.expand_dims(present(x.mask.query_order, rows, x.sizes.Nq), KEY_AXIS)
        b_bias = load_bias(x.bias, i_b, i_h, rows.token, columns.token, m_inside, KEY_AXIS)
        m_visible = m_visible & (b_bias != -INF)
        b_s = tl.where(m_visible, b_s + b_bias, -INF)
    if x.modifiers.diagonals is not None:
        m_inside = (o_q >= 0) & (o_q < x.sizes.Nq) & (o_k < keys)
        b_diagonal = load_diagonals(x, i_b, i_h, rows.o, columns.o, m_inside, KEY_AXIS)
        m_visible = m_visible & (b_diagonal != -INF)
        b_s = tl.where(m_visible, b_s + b_diagonal, -INF)
    if MODE == PARTIAL:
        m_visible = m_visible & window_pairs(x.mask, o_q, o_k, keys)
        if x.mask.token_lengths is not None:
            m_visible = m_visible & tl.expand_dims(columns.token >= 0, 1 - KEY_AXIS)
        if x.mask.indptr is not None:
            m_visible = m_visible & tile_bits(
                x.mask, tile, rows.o % C.LIST_Q, columns.first % C.LIST_K, C.LIST_Q, C.LIST_K, C.BLOCK_K, KEY_AXIS
            )
        b_s = tl.where(m_visible, b_s, -INF)
    return b_s, m_visible


@triton.jit
def kept_tokens(dropout, i_b, i_h, queries, keys, KEY_AXIS: tl.constexpr):
    """`kept_pairs` of tokens in any order: a Philox call for each pair, of which it takes one word."""
    o_q, o_k = tl.expand_dims(queries, KEY_AXIS), tl.expand_dims(keys, 1 - KEY_AXIS)
    if dropout.origin is not None:
        i_h = i_h + tl.load(dropout.origin)
        o_q = (o_q + tl.load(dropout.origin + 1)).to(tl.int32)
        o_k = (o_k + tl.load(dropout.origin + 2)).to(tl.int32)
    c_zero = (o_q + o_k).to(tl.uint32) * 0
    c_key = (o_k >> 1).to(tl.uint32) + c_zero
    c_query = ((o_q >> 4) * 8 + (o_q & 7)).to(tl.uint32) + c_zero
    w0, w1, w2, w3 = tl.philox(
        tl.load(dropout.seed), c_key, c_query, c_zero + tl.cast(i_h, tl.uint32), c_zero + tl.cast(i_b, tl.uint32)
    )
    m_odd, m_lower = (o_k & 1) != 0, (o_q & 8) != 0
    b_word = tl.where(m_lower, tl.where(m_odd, w3, w2), tl.where(m_odd, w1, w0))
    return b_word >= tl.cast(dropout.threshold, tl.uint32)


@triton.jit
def kept_pairs(x, i_b, i_h, rows, columns, C: tl.constexpr, KEY_AXIS: tl.constexpr):
    """Which pairs dropout keeps, of BLOCK_Q queries at `rows` (from a multiple of 16) and BLOCK_K keys at `columns`
    (from an even one), which run along KEY_AXIS; without dropout all.

    The rule of csrc/common/philox.h: one Philox4x32-10 call (Salmon et al., SC 2011) serves the queries i and i + 8 and
    the keys j and j + 1, so a quarter of the tile is drawn and its four words are spread over the pairs.
    """
    BLOCK_Q: tl.constexpr = C.BLOCK_Q
    BLOCK_K: tl.constexpr = C.BLOCK_K
    dropout = x.dropout
    i_first, j_first = rows.first, columns.first
    if dropout.seed is None:
        m_kept = tl.full([BLOCK_Q, BLOCK_K], True, tl.int1)
        if KEY_AXIS == 0:
            m_kept = tl.trans(m_kept)
    elif x.mask.query_order is not None or x.mask.key_order is not None:
        m_kept = kept_tokens(dropout, i_b, i_h, rows.token, columns.token, KEY_AXIS)
    else:
        if dropout.origin is not None:
            i_h = i_h + tl.load(dropout.origin)
            i_first = i_first + tl.load(dropout.origin + 1)
            j_first = j_first + tl.load(dropout.origin + 2)
        o_group = i_first // 16 * 8 + tl.arange(0, BLOCK_Q // 2)  # (i >> 4) * 8 + (i & 7)
        o_pair = j_first // 2 + tl.arange(0, BLOCK_K // 2)
        c_zero = tl.zeros([BLOCK_Q // 2, BLOCK_K // 2], tl.uint32)
        c_key = o_pair[None, :].to(tl.uint32) + c_zero
        c_query = o_group[:, None].to(tl.uint32) + c_zero
        w0, w1, w2, w3 = tl.philox(
            tl.load(dropout.seed), c_key, c_query, c_zero + tl.cast(i_h, tl.uint32), c_zero + tl.cast(i_b, tl.uint32)
        )
        upper = tl.reshape(tl.join(w0, w1), [BLOCK_Q // 2, BLOCK_K])
        lower = tl.reshape(tl.join(w2, w3), [BLOCK_Q // 2, BLOCK_K])
        words = tl.reshape(tl.join(upper, lower), [BLOCK_Q // 16, 8, BLOCK_K, 2])
        words = tl.reshape(tl.permute(words, (0, 3, 1, 2)), [BLOCK_Q, BLOCK_K])
        m_kept = words >= tl.cast(dropout.threshold, tl.uint32)
        if KEY_AXIS == 0:
            m_kept = tl.trans(m_kept)
    return m_kept


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
