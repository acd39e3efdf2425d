"""Which tiles a program works on, and in which order: the steps around a tile, as tiles.py has those within it."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Grid(NamedTuple):
    """How programs are numbered: tiles * lines * splits. A line is a batch element and a head, or the PACK query heads
    that share a tile."""

    programs: Any
    lines: Any
    heads: Any  # lines of a batch element
    section: Any  # lines that are worked off together
    splits: Any = 1  # programs that share the keys of a tile


class Span(NamedTuple):
    """The tiles that a program walks: first .. end of a sequence, or of a row of the list, whose entries begin at
    `begin`. Every pair of full_first .. full_end is visible. `gap` tiles at `gap_at` are beyond the keys that live."""

    first: Any
    end: Any
    full_first: Any
    full_end: Any
    begin: Any
    gap_at: Any
    gap: Any


class Walk(NamedTuple):
    """Steps first .. end over the tiles of a span that leave out `skip` tiles at `skip_at`, then `gap` at `gap_at`."""

    first: Any
    end: Any
    skip_at: Any
    skip: Any
    begin: Any
    gap_at: Any
    gap: Any


class Entry(NamedTuple):
    """An entry of the list: block and bit tile (-1: none)."""

    block: Any
    tile: Any


# --- what is visible: ranges of positions and of tiles ---


@triton.jit
def key_count(mask, i_b, Nk):
    """The keys of batch element i_b that its length lets live."""
    if mask.lengths is None:
        return Nk
    else:
        return tl.minimum(tl.maximum(tl.load(mask.lengths + i_b), 0), Nk)


@triton.jit
def visible_keys(mask, i_first, i_last, keys):
    """Keys [any_first, any_end) that some of the queries i_first .. i_last see by window and length, and those that
    all of them see."""
    any_first, all_first = 0, 0
    any_end, all_end = keys, keys
    if mask.low is not None:
        any_first = tl.maximum(i_first + mask.low, 0)
        all_first = tl.maximum(i_last + mask.low, 0)
    if mask.high is not None:
        any_end = tl.minimum(i_last + mask.high + 1, keys)
        all_end = tl.minimum(i_first + mask.high + 1, keys)
    return any_first, any_end, all_first, all_end


@triton.jit
def visible_queries(mask, j_first, j_last, keys, Nq):
    """Queries [any_first, any_end) that see some of the keys j_first .. j_last, and those that see all of them."""
    any_first, all_first = 0, 0
    any_end, all_end = Nq, Nq
    if mask.high is not None:
        any_first = tl.maximum(j_first - mask.high, 0)
        all_first = tl.maximum(j_last - mask.high, 0)
    if mask.low is not None:
        any_end = tl.minimum(j_last - mask.low + 1, Nq)
        all_end = tl.minimum(j_first - mask.low + 1, Nq)
    any_end = tl.where(j_first < keys, any_end, any_first)
    all_end = tl.where(j_last < keys, all_end, all_first)
    return any_first, any_end, all_first, all_end


@triton.jit
def tile_range(any_first, any_end, all_first, all_end, BLOCK: tl.constexpr):
    """Tiles [first, end) that hold a visible position, and of these [full_first, full_end) that hold no other."""
    first = any_first // BLOCK
    end = tl.where(any_end > any_first, tl.cdiv(any_end, BLOCK), first)
    full_first = tl.minimum(tl.maximum(tl.cdiv(all_first, BLOCK), first), end)
    full_end = tl.maximum(tl.minimum(all_end // BLOCK, end), full_first)
    return first, end, full_first, full_end


# --- the list and its plan (plan.py) ---


@triton.jit
def list_row(mask, i_b, i_h, i_block):
    """The row of the list for a block; a list of one batch element, or one head, serves all."""
    row = tl.where(mask.batch == 1, 0, tl.cast(i_b, tl.int64)) * mask.heads
    return (row + tl.where(mask.heads == 1, 0, i_h)) * mask.blocks + i_block


@triton.jit
def list_entries(mask, i_b, i_h, i_block):
    """Entries [begin, end) of a row of the list, kept inside the arrays whatever they hold."""
    row = list_row(mask, i_b, i_h, i_block)
    begin = tl.maximum(tl.load(mask.indptr + row), 0)
    end = tl.minimum(tl.load(mask.indptr + row + 1), mask.entries)
    return begin, tl.maximum(begin, end)


@triton.jit
def list_entry(mask, entry, last):
    """Block and bit tile (-1: full) of an entry, or of `last` for those behind it."""
    entry = tl.maximum(tl.minimum(entry, last), 0)
    tile = tl.load(mask.tile_ids + entry)
    return tl.maximum(tl.load(mask.indices + entry), 0), tl.where(tile < mask.tile_count, tile, -1)


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
def listed_tile(mask, i_b, i_h, i_first, j_first, LIST_Q: tl.constexpr, LIST_K: tl.constexpr):
    """Whether the list has the block of query i_first and key j_first, and its bit tile (-1: full), looked up in a list
    as it is, without a plan."""
    if mask.indptr is None:
        return i_first >= 0, -1
    else:
        begin, stop = list_entries(mask, i_b, i_h, i_first // LIST_Q)
        at = lower_bound(mask.indices, begin, stop, j_first // LIST_K)
        block, tile = list_entry(mask, at, stop - 1)
        return (at < stop) & (block == j_first // LIST_K), tile


@triton.jit
def planned_entries(mask, i_b, i_h, i_block):
    """Where a row of the plan begins, how many of its entries are clean, and how many there are."""
    row = list_row(mask, i_b, i_h, i_block)
    begin = tl.minimum(tl.maximum(tl.load(mask.indptr + row), 0), mask.entries)
    live = tl.minimum(tl.load(mask.live + row), mask.entries - begin).to(tl.int32)
    return begin, tl.minimum(tl.load(mask.clean + row), live), live


@triton.jit
def planned_range(mask, begin, clean, live, keys, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """The key tiles of a row of the plan, PARTS to a block of SIZE keys: how many clean ones and how many in all lie
    within the `keys` that live, and after which one how many are left out because they do not."""
    clean_end, end, gap_at, gap = clean, live, live, 0
    if mask.lengths is not None:
        clean_end = (lower_bound(mask.indices, begin, begin + clean, keys // SIZE) - begin).to(tl.int32)
        block = tl.load(mask.indices + begin + clean_end, mask=clean_end < clean, other=0)
        gap_at = clean_end + ((clean_end < clean) & (block * SIZE < keys)).to(tl.int32)
        gap = clean - gap_at
        end = lower_bound(mask.indices, begin + clean, begin + live, tl.cdiv(keys, SIZE)) - begin
        end = end.to(tl.int32) - gap
    return clean_end * PARTS, end * PARTS, gap_at * PARTS, gap * PARTS


# --- walks ---


@triton.jit
def key_span(x, i_b, i_h, i_first, i_last, keys, C: tl.constexpr):
    """The key tiles that some of the queries i_first .. i_last see."""
    if x.mask.indptr is not None:
        PARTS: tl.constexpr = C.LIST_K // C.BLOCK_K
        begin, clean, live = planned_entries(x.mask, i_b, i_h, i_first // C.LIST_Q)
        full_end, end, gap_at, gap = planned_range(x.mask, begin, clean, live, keys, C.LIST_K, PARTS)
        zero = tl.zeros([], tl.int32)
        return Span(zero, end, zero, full_end, begin, gap_at, gap)
    else:
        any_first, any_end, all_first, all_end = visible_keys(x.mask, i_first, i_last, keys)
        first, end, full_first, full_end = tile_range(any_first, any_end, all_first, all_end, C.BLOCK_K)
        return Span(first, end, full_first, full_end, tl.zeros([], tl.int64), 0, 0)


@triton.jit
def query_span(x, i_b, i_h, j_first, keys, C: tl.constexpr):
    """The query tiles of head i_h that see some of the BLOCK_K keys from j_first."""
    if x.mask.indptr is not None:
        PARTS: tl.constexpr = C.LIST_Q // C.BLOCK_Q
        begin, clean, live = planned_entries(x.mask, i_b, i_h, j_first // C.LIST_K)
        # No query sees keys beyond a length: their rows are stored as 0, whatever a tile that a length cuts makes of
        # them. They are masked there all the same, or an exponent without a bound would ask for the careful pass.
        end = tl.where(j_first < keys, live, 0) * PARTS
        full_end = tl.where(j_first + C.BLOCK_K <= keys, clean, 0) * PARTS
        zero = tl.zeros([], tl.int32)
        return Span(zero, end, zero, full_end, begin, 0, 0)
    else:
        j_last = j_first + C.BLOCK_K - 1
        any_first, any_end, all_first, all_end = visible_queries(x.mask, j_first, j_last, keys, x.sizes.Nq)
        first, end, full_first, full_end = tile_range(any_first, any_end, all_first, all_end, C.BLOCK_Q)
        return Span(first, end, full_first, full_end, tl.zeros([], tl.int64), 0, 0)


@triton.jit
def split_span(span, i_split, splits):
    """The part of a span that falls to one of the programs that share it."""
    part = tl.cdiv(span.end - span.first, splits)
    first = tl.minimum(span.first + i_split * part, span.end)
    end = tl.minimum(first + part, span.end)
    full_first = tl.minimum(tl.maximum(span.full_first, first), end)
    full_end = tl.maximum(tl.minimum(span.full_end, end), full_first)
    return Span(first, end, full_first, full_end, span.begin, span.gap_at, span.gap)


@triton.jit
def full_tiles(span):
    """A walk over the tiles that need no mask."""
    return Walk(span.full_first, span.full_end, span.full_end, 0, span.begin, span.gap_at, span.gap)


@triton.jit
def other_tiles(span, SAFE: tl.constexpr):
    """A walk over the other tiles; SAFE: over all."""
    skip = 0 if SAFE else span.full_end - span.full_first
    return Walk(span.first, span.end - skip, span.full_first, skip, span.begin, span.gap_at, span.gap)


@triton.jit
def position(walk, t, GAP: tl.constexpr):
    """The tile of step t of a walk."""
    at = t + tl.where(t >= walk.skip_at, walk.skip, 0)
    if GAP:
        at += tl.where(at >= walk.gap_at, walk.gap, 0)
    return at


@triton.jit
def entry_at(mask, walk, t, PARTS: tl.constexpr, GAP: tl.constexpr):
    """The entry of the list in which step t lies; a block has PARTS tiles. The plan has one more than it fills, to be
    read ahead."""
    if mask.indptr is not None:
        o_entry = walk.begin + position(walk, t, GAP) // PARTS
        return Entry(tl.load(mask.indices + o_entry), tl.load(mask.tile_ids + o_entry))
    else:
        return Entry(0, -1)


@triton.jit
def next_tile(mask, walk, t, entry, LIST: tl.constexpr, BLOCK: tl.constexpr, GAP: tl.constexpr):
    """The first row and the bit tile of step t, whose entry has been read; and the entry of the step after it, read
    a tile ahead so that no load waits for it."""
    if mask.indptr is not None:
        PARTS: tl.constexpr = LIST // BLOCK
        first = entry.block * LIST + position(walk, t, GAP) % PARTS * BLOCK
        return first, entry.tile, entry_at(mask, walk, t + 1, PARTS, GAP)
    else:
        return position(walk, t, False) * BLOCK, entry.tile, entry


# --- programs ---


@triton.jit
def locate(i_program, mask, grid, length, LIST: tl.constexpr, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Tile, batch element and line in it of a program that owns BLOCK of `length` rows.

    A section of lines is worked off together, so that its keys and values stay in the L2 cache; within it the tiles
    with most work start first: those of the longest rows of the list, without one the last ones under a causal window
    (LAST_FIRST).
    """
    PARTS: tl.constexpr = LIST // BLOCK
    tiles = tl.cdiv(length, BLOCK)
    if mask.indptr is not None:
        tiles = mask.blocks * PARTS
    i_section = i_program // (grid.section * tiles)
    rest = i_program - i_section * grid.section * tiles
    width = tl.minimum(grid.section, grid.lines - i_section * grid.section)
    i_tile = rest // width
    i_line = i_section * grid.section + rest - i_tile * width
    i_b, i_h = i_line // grid.heads, i_line % grid.heads
    if mask.order is not None:
        row = tl.where(mask.batch == 1, 0, tl.cast(i_b, tl.int64)) * tl.where(mask.heads == 1, 1, grid.heads)
        row = (row + tl.where(mask.heads == 1, 0, i_h)) * mask.blocks + i_tile // PARTS
        i_tile = tl.load(mask.order + row) * PARTS + i_tile % PARTS
    elif LAST_FIRST:
        i_tile = tiles - 1 - i_tile
    return i_tile, i_b, i_h


@triton.jit
def any_flag(p_flags, first, programs, step):
    """Whether one of the flags first, first + step, .. below `programs` is set: a scalar."""
    found = tl.zeros([], tl.int32)
    for start in range(first, programs, step * 1024):
        o_flag = start + tl.arange(0, 1024) * step
        found = tl.maximum(found, tl.max(tl.load(p_flags + o_flag, mask=o_flag < programs, other=0)))
    return found > 0


@triton.jit
def run_tiles(tile, arguments, flags, programs, C: tl.constexpr):
    """Compute the tile of this program by the function `tile` and, in a masked call, flag it if it is not finite.
    SAFE: compute the flagged tiles among this program's share of all `programs` again. The arguments are tuples, as in
    tiles.Inputs."""
    i_program = tl.program_id(0)
    if C.SAFE:
        if any_flag(flags, i_program, programs, tl.num_programs(0)):
            for i in range(i_program, programs, tl.num_programs(0)):
                if tl.load(flags + i) != 0:
                    tile(i, *arguments, C)
    else:
        flag = tile(i_program, *arguments, C)
        if flags is not None:
            tl.store(flags + i_program, flag)
