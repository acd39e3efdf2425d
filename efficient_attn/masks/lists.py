"""How block lists come into being. Every builder and every operator of `BlockMask` ends in `assemble`.

The words used here:
    row       one query block of one (batch, head); rows are ordered (b, h, query block)
    entry     one listed block: a row and a key block ("column")
    tile      the bits of a partial block, packed 8 keys a byte: uint8 [block_q, block_k // 8], bit j % 8 of byte j // 8
    class     entries that are known to have the same tile share one class, so that the tile is made once

Nothing here is larger than the list of blocks, the tiles, or one chunk of `CHUNK` pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MaskError

CHUNK = 1 << 22  # pairs expanded at a time
FULL = -1  # tile id of a block whose pairs are all visible
ABSENT = -2  # in tables only: a block that is not listed

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class BlockLists(NamedTuple):
    """The list part of a mask. indptr int64 [batch * heads * n_q + 1], the others as in `BlockMask`."""

    batch: int
    heads: int
    indptr: Tensor
    indices: Tensor
    tile_ids: Tensor
    tiles: Tensor


class Grid(NamedTuple):
    """The blocks of a q_len x kv_len score matrix."""

    q_len: int
    kv_len: int
    block_q: int
    block_k: int

    @property
    def n_q(self) -> int:
        """Number of query blocks."""
        return -(-self.q_len // self.block_q)

    @property
    def n_k(self) -> int:
        """Number of key blocks."""
        return -(-self.kv_len // self.block_k)

    def swapped(self) -> Grid:
        """The blocks of the transposed matrix."""
        return Grid(self.kv_len, self.q_len, self.block_k, self.block_q)

    def pairs(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Number of pairs inside q_len x kv_len of the blocks at (rows, cols)."""
        height = (self.q_len - rows % max(self.n_q, 1) * self.block_q).clamp(max=self.block_q)
        return height * (self.kv_len - cols * self.block_k).clamp(max=self.block_k)

    def edge(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Index into `full_bits`: 2 for a ragged last query block plus 1 for a ragged last key block."""
        below = (rows % max(self.n_q, 1) + 1) * self.block_q > self.q_len
        return 2 * below.long() + ((cols + 1) * self.block_k > self.kv_len).long()

    def full_bits(self, device: torch.device) -> Tensor:
        """The tile of a full block for each `edge`, uint8 [4, block_q, block_k // 8]."""
        heights = torch.tensor([self.block_q, self.q_len % self.block_q or self.block_q], device=device)
        widths = torch.tensor([self.block_k, self.kv_len % self.block_k or self.block_k], device=device)
        tall = torch.arange(self.block_q, device=device) < heights[:, None]  # [2, block_q]
        wide = torch.arange(self.block_k, device=device) < widths[:, None]  # [2, block_k]
        return pack_bits(tall[:, None, :, None] & wide[None, :, None, :]).flatten(0, 1)


# --- bits ---


def pack_bits(bits: Tensor) -> Tensor:
    """bool [..., 8 n] -> uint8 [..., n], the first of eight in the lowest bit."""
    words = bits.reshape(-1, 8).contiguous().view(torch.int64)  # eight bytes of 0 or 1
    # Byte k times 2^(56 - 7 k) puts its bit at 56 + k, and no two products meet: the top byte is the packed one.
    packed = ((words * 0x0102040810204080) >> 56).to(torch.uint8)
    return packed.view(*bits.shape[:-1], bits.shape[-1] // 8)


def unpack_bits(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> bool [..., 8 n]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).bool().flatten(-2)


def with_trivial(tiles: Tensor) -> Tensor:
    """Tiles followed by an empty and a full one, where the indices ABSENT and FULL find them from behind."""
    trivial = torch.tensor([0, 255], dtype=torch.uint8, device=tiles.device)
    return torch.cat([tiles, trivial[:, None, None].expand(2, *tiles.shape[1:])])


def words_of(tiles: Tensor) -> Tensor:
    """The bits of each tile in words: uint8 [n, block_q, block_k // 8] -> int64 [n, words]."""
    words = tiles.contiguous().flatten(1).view(torch.int64)
    # A program of torch.compile that was made for other sizes returns such a view of its input with a wrong width
    # (PyTorch 2.13: (92, 8) for (92, 64)), but not a copy.
    return words.clone() if torch.compiler.is_compiling() else words


def count_bits(tiles: Tensor) -> Tensor:
    """Number of set bits of each tile: uint8 [n, block_q, block_k // 8] -> int64 [n]."""
    words = words_of(tiles)
    counts = [_count_bits(part) for part in words.split(rows_at_a_time(words))]
    return torch.cat(counts)


def _count_bits(words: Tensor) -> Tensor:
    # In place: fresh memory costs more than what is done in it.
    half = words >> 1
    counts = words - half.bitwise_and_(0x5555555555555555)
    torch.bitwise_right_shift(counts, 2, out=half).bitwise_and_(0x3333333333333333)
    counts.bitwise_and_(0x3333333333333333).add_(half)
    counts.add_(torch.bitwise_right_shift(counts, 4, out=half)).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    return counts.mul_(0x0101010101010101).bitwise_right_shift_(56).sum(-1)


def rows_at_a_time(rows: Tensor) -> int:
    """How many rows of a table to work on together, so that what is in work stays in the cache."""
    return max(1, 65536 // max(rows.shape[1], 1))


# --- classes ---


def by_first_appearance(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Renumber integer labels 0, 1, ... in order of appearance. Returns (first position of each, labels)."""
    values, inverse = labels.unique(return_inverse=True)
    n = labels.numel()
    first = labels.new_full((values.numel(),), n, dtype=torch.int64)
    first.scatter_reduce_(0, inverse, torch.arange(n, device=labels.device), "amin")
    order = first.argsort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=labels.device)
    return first[order], rank[inverse]


def unique_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of int64 [n, width]: (first position of each, class of each row), in order of appearance."""
    odd = torch.arange(1, rows.shape[1] + 1, device=rows.device) * -7046029254386353131  # splitmix64: no random call
    odd = ((odd ^ (odd >> 30)) * -4658895280553007687) | 1
    step = rows_at_a_time(rows)
    hashes = [(part * odd).sum(-1) for part in rows.split(step)]
    first, inverse = by_first_appearance(torch.cat(hashes))
    same = first[inverse]
    if not all(torch.equal(rows[s], part) for s, part in zip(same.split(step), rows.split(step), strict=True)):
        # two different rows with one hash
        inverse = rows.unique(dim=0, return_inverse=True)[1]
        first, inverse = by_first_appearance(inverse)
    return first, inverse


def unique_keys(keys: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Distinct tuples over several integer columns [n]: as `unique_rows`, by one sort when the ranges allow."""
    if keys[0].numel() == 0:
        return by_first_appearance(keys[0].long())
    label, size = torch.zeros_like(keys[0], dtype=torch.int64), 1
    for key in keys:
        low, high = torch.stack(key.aminmax()).tolist()
        if size * (high - low + 1) >= 2**62:
            first, label = by_first_appearance(label)
            size = first.numel()
        label = label * (high - low + 1) + (key - low)
        size *= high - low + 1
    return by_first_appearance(label)


# --- lists ---


def entry_rows(lists: BlockLists) -> Tensor:
    """Row of each entry, int64 [nnz]."""
    counts = lists.indptr.diff()
    rows = torch.arange(counts.numel(), device=counts.device)
    return torch.repeat_interleave(rows, counts, output_size=lists.indices.numel())


def pointers(counts: Tensor) -> Tensor:
    """Entries in each row -> indptr."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def ragged_range(starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenate starts[r] .. starts[r] + counts[r] - 1 over r. Returns (r, value) of each element."""
    rows = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    within = torch.arange(rows.numel(), device=counts.device) - (counts.cumsum(0) - counts)[rows]
    return rows, starts[rows] + within


def take_rows(lists: BlockLists, rows: Tensor, batch: int, heads: int) -> BlockLists:
    """Lists whose row r is row rows[r] of `lists`; tiles that are no longer used go."""
    counts = lists.indptr.diff()[rows]
    _, entries = ragged_range(lists.indptr[rows], counts)
    tile_ids, tiles = used_tiles(lists.tile_ids[entries], lists.tiles)
    return BlockLists(batch, heads, pointers(counts), lists.indices[entries], tile_ids, tiles)


def expand(lists: BlockLists, n_q: int, batch: int, heads: int) -> BlockLists:
    """Repeat the rows of a broadcast batch or head dimension."""
    if (lists.batch, lists.heads) == (batch, heads):
        return lists
    device = lists.indptr.device
    rows = torch.arange(lists.batch * lists.heads * n_q, device=device).view(lists.batch, lists.heads, n_q)
    return take_rows(lists, rows.expand(batch, heads, n_q).reshape(-1), batch, heads)


def transpose(lists: BlockLists, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """The query blocks of each key block: indptr int64 [batch * heads * n_k + 1], indices and tile ids int32 [nnz]."""
    lines, device, nnz = lists.batch * lists.heads, lists.indices.device, lists.indices.numel()
    counts, size = lists.indptr.diff(), lines * grid.n_k
    i_block = torch.arange(grid.n_q, dtype=torch.int32, device=device).repeat(lines)
    i_block = torch.repeat_interleave(i_block, counts, output_size=nnz)
    # A radix sort takes as many passes as its keys have bytes.
    width = torch.int16 if size < 2**15 else torch.int32 if size < 2**31 else torch.int64
    t_rows = lists.indices.to(width)
    if lines != 1:
        first = torch.arange(lines, dtype=width, device=device).mul_(grid.n_k).repeat_interleave(grid.n_q)
        t_rows = t_rows + torch.repeat_interleave(first, counts, output_size=nnz)
    t_rows, order = t_rows.sort(stable=True)  # stable: query blocks stay ascending
    indptr = torch.searchsorted(t_rows, torch.arange(size + 1, dtype=width, device=device))
    return indptr, i_block[order], lists.tile_ids[order]


def swap(lists: BlockLists, grid: Grid) -> BlockLists:
    """Lists of the transposed mask, tiles included."""
    tiles = lists.tiles.new_empty(lists.tiles.shape[0], grid.block_k, grid.block_q // 8)
    step = max(1, CHUNK // (grid.block_q * grid.block_k))
    for first in range(0, tiles.shape[0], step):
        tiles[first : first + step] = pack_bits(unpack_bits(lists.tiles[first : first + step]).mT)
    return BlockLists(lists.batch, lists.heads, *transpose(lists, grid), tiles)


def used_tiles(tile_ids: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Drop unused tiles and number the others in order of appearance."""
    n, ids = tile_ids.numel(), tile_ids.long()
    first = ids.new_full((tiles.shape[0] + 1,), n)  # the last one stands for FULL
    first.scatter_reduce_(0, ids % first.numel(), torch.arange(n, device=ids.device), "amin")
    order = first[:-1].argsort()[: (first[:-1] < n).sum()]
    number = torch.full_like(first, FULL)
    number[order] = torch.arange(order.numel(), device=ids.device)
    return number[ids].int(), tiles[order]


def assemble(
    grid: Grid, batch: int, heads: int, rows: Tensor, cols: Tensor, classes: Tensor, packed: Tensor
) -> BlockLists:
    """The canonical lists of some entries: empty blocks dropped, full ones marked, equal tiles stored once.

    Args:
        rows, cols: int64 [n], strictly ascending in (row, column).
        classes: int64 [n], FULL or an index into `packed`.
        packed: uint8 [classes, block_q, block_k // 8]; bits outside q_len x kv_len are 0.
    """
    pairs = grid.pairs(rows, cols)
    seen = torch.cat([count_bits(packed), packed.new_zeros(1, dtype=torch.int64)])[classes]  # FULL: the last
    keep = (seen > 0) | (classes == FULL)
    classes = torch.where(seen == pairs, FULL, classes)
    rows, cols, classes = rows[keep], cols[keep], classes[keep]
    tile_ids, tiles = used_tiles(classes, packed)
    first, inverse = unique_rows(words_of(tiles))
    partial = tile_ids >= 0
    tile_ids[partial] = inverse[tile_ids[partial].long()].int()
    counts = torch.bincount(rows, minlength=batch * heads * grid.n_q)
    return BlockLists(batch, heads, pointers(counts), cols.int(), tile_ids, tiles[first])


def build(
    grid: Grid,
    batch: int,
    heads: int,
    rows: Tensor,
    cols: Tensor,
    keys: Sequence[Tensor],
    tiles_of: Callable[[Tensor], Tensor],
) -> BlockLists:
    """Assemble entries whose tile is a function of `keys`; tiles_of(entries) packs the tiles of some of them."""
    first, classes = unique_keys(keys)
    step = max(1, CHUNK // (grid.block_q * grid.block_k))
    chunks = [tiles_of(entries) for entries in first.split(step)] if first.numel() else []
    empty = torch.empty(0, grid.block_q, grid.block_k // 8, dtype=torch.uint8, device=rows.device)
    return assemble(grid, batch, heads, rows, cols, classes, torch.cat([empty, *chunks]))


# --- builders ---


def dense_lists(mask: Tensor, grid: Grid) -> BlockLists:
    """Lists of a bool tensor (batch, heads, q_len, kv_len), read a few query blocks at a time."""
    batch, heads = mask.shape[:2]
    if grid.n_q > 1 and grid.n_k > 0 and mask.stride(2) == 0:
        return _repeat_query_blocks(mask, grid)
    strip = grid.block_q * max(grid.n_k * grid.block_k, 1)
    per_strip = min(max(1, CHUNK // strip), max(grid.n_q, 1))
    per_group = max(1, CHUNK // (strip * max(grid.n_q, 1)))
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    n_tiles = 0
    for b in range(batch):
        for h in range(0, heads, per_group):
            for i_block in range(0, grid.n_q, per_strip):
                rows_of_pairs = slice(i_block * grid.block_q, (i_block + per_strip) * grid.block_q)
                first_row = (b * heads + h) * grid.n_q + i_block
                part = _strip_entries(mask[b, h : h + per_group, rows_of_pairs], grid, first_row, n_tiles)
                n_tiles += part[3].shape[0]
                parts.append(part)
    long = torch.empty(0, dtype=torch.int64, device=mask.device)
    none = torch.empty(0, grid.block_q, grid.block_k // 8, dtype=torch.uint8, device=mask.device)
    rows, cols, classes, packed = (torch.cat(part) for part in zip((long, long, long, none), *parts, strict=True))
    return assemble(grid, batch, heads, rows, cols, classes, packed)


def pack_strip(strip: Tensor, grid: Grid) -> Tensor:
    """bool (g, queries, kv_len) -> packed tiles uint8 (g, query blocks, key blocks, block_q, block_k // 8)."""
    g, queries, keys = strip.shape
    n_rows = -(-queries // grid.block_q)
    pad = (0, grid.n_k * grid.block_k - keys, 0, n_rows * grid.block_q - queries)
    packed = pack_bits(torch.nn.functional.pad(strip, pad) if any(pad) else strip)
    return packed.view(g, n_rows, grid.block_q, grid.n_k, grid.block_k // 8).transpose(2, 3)


def _strip_entries(
    strip: Tensor, grid: Grid, first_row: int, first_class: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entries (rows, cols, classes, packed) of one strip (g heads, some query blocks, every key)."""
    tiles = pack_strip(strip, grid)
    n_rows, n_k = tiles.shape[1:3]
    tiles = tiles.reshape(-1, grid.block_q, grid.block_k // 8)
    listed = count_bits(tiles).nonzero().squeeze(1)
    tiles, row = tiles[listed], listed // n_k
    rows = first_row + row // n_rows * grid.n_q + row % n_rows
    first, classes = unique_rows(words_of(tiles))
    return rows, listed % n_k, classes + first_class, tiles[first]


def _repeat_query_blocks(mask: Tensor, grid: Grid) -> BlockLists:
    """A mask that is the same for every query: list one whole query block and the ragged last one, then repeat."""
    tail = (grid.q_len - 1) % grid.block_q + 1
    short = dense_lists(mask[:, :, :1].expand(-1, -1, grid.block_q + tail, -1).contiguous(),
                        grid._replace(q_len=grid.block_q + tail))  # fmt: skip
    rows = torch.arange(short.indptr.numel() - 1, device=mask.device).view(short.batch, short.heads, 2)
    rows = torch.cat([rows[..., :1].expand(-1, -1, grid.n_q - 1), rows[..., 1:]], -1)
    return take_rows(short, rows.reshape(-1), short.batch, short.heads)


def static_lists(mask: Tensor, grid: Grid) -> BlockLists:
    """Lists of a bool tensor with shapes that do not depend on its values: every block is listed with its own tile."""
    batch, heads = mask.shape[:2]
    rows, device = batch * heads * grid.n_q, mask.device
    tiles = pack_strip(mask.reshape(batch * heads, grid.q_len, grid.kv_len), grid)
    tiles = tiles.reshape(-1, grid.block_q, grid.block_k // 8)
    indptr = torch.arange(rows + 1, device=device) * grid.n_k
    indices = torch.arange(grid.n_k, device=device, dtype=torch.int32).repeat(rows)
    tile_ids = torch.arange(rows * grid.n_k, device=device, dtype=torch.int32)
    return BlockLists(batch, heads, indptr, indices, tile_ids, tiles)


def predicate_lists(
    visible: Predicate,
    grid: Grid,
    batch: int,
    heads: int,
    rows: Tensor,
    cols: Tensor,
    *,
    keys: Sequence[Tensor] | None = None,
    within: tuple[Tensor, Tensor] | None = None,
) -> BlockLists:
    """Lists of visible(b, h, i, j), evaluated only in the given blocks.

    Args:
        visible: gets int64 indices of shapes (n,1,1), (n,1,1), (n,q,1), (n,1,k); its bool result broadcasts to (n,q,k).
        keys: integer columns; entries with equal keys have equal tiles. None: no two are known to.
        within: (tile id of each entry, tiles): bits that are cleared there stay so.
    """
    device = rows.device
    q, k = torch.arange(grid.block_q, device=device), torch.arange(grid.block_k, device=device)

    def tiles_of(entries: Tensor) -> Tensor:
        row, col = rows[entries], cols[entries]
        i = (row % grid.n_q * grid.block_q)[:, None, None] + q[:, None]
        j = (col * grid.block_k)[:, None, None] + k
        line = row // grid.n_q
        inside = (i < grid.q_len) & (j < grid.kv_len)
        # Out-of-range positions ask about the last one in range, so that a predicate may index tensors of that length.
        i_asked, j_asked = i.clamp(max=grid.q_len - 1), j.clamp(max=grid.kv_len - 1)
        seen = visible((line // heads)[:, None, None], (line % heads)[:, None, None], i_asked, j_asked)
        packed = pack_bits(_answer(seen, inside.shape) & inside)
        return packed if within is None else packed & allowed[within[0][entries].long()]

    keys = (torch.arange(rows.numel(), device=device),) if keys is None else keys
    if within is not None:
        allowed, keys = with_trivial(within[1]), (*keys, within[0])
    return build(grid, batch, heads, rows, cols, keys, tiles_of)


def _answer(seen: Any, shape: torch.Size) -> Any:
    """What a predicate returned, checked."""
    if not isinstance(seen, bool) and not (isinstance(seen, Tensor) and seen.dtype == torch.bool):
        kind = f"a tensor of {seen.dtype}" if isinstance(seen, Tensor) else repr(seen)
        raise MaskError(f"a predicate must return a bool tensor, as i >= j does; it returned {kind}")
    if isinstance(seen, Tensor) and (
        seen.dim() > len(shape) or any(n not in (1, m) for n, m in zip(seen.shape[::-1], shape[::-1], strict=False))
    ):
        raise MaskError(
            f"a predicate must return what its indices broadcast to, (entries, queries, keys) = {tuple(shape)}; it "
            f"returned {tuple(seen.shape)}"
        )
    return seen


def document_lists(ids: Tensor, grid: Grid) -> BlockLists:
    """Lists of ids[b, i] == ids[b, j], int64 (batch, length); asked only where the ranges of two blocks meet."""
    batch = ids.shape[0]
    lows_q, highs_q = _block_ranges(ids, grid.block_q)
    lows_k, highs_k = _block_ranges(ids, grid.block_k)
    found = []
    for b in range(batch):
        meets = (lows_q[b, :, None] <= highs_k[b]) & (lows_k[b] <= highs_q[b, :, None])
        found.append(meets.nonzero() + torch.tensor([b * grid.n_q, 0], device=ids.device))
    rows, cols = torch.cat([ids.new_empty(0, 2), *found]).unbind(1)
    line, i_block = rows // max(grid.n_q, 1), rows % max(grid.n_q, 1)
    low = torch.minimum(lows_q[line, i_block], lows_k[line, cols])
    full = low == torch.maximum(highs_q[line, i_block], highs_k[line, cols])
    keys = (torch.where(full, -1, torch.arange(rows.numel(), device=ids.device)), grid.edge(rows, cols))
    same = lambda b, h, i, j: ids[b, i] == ids[b, j]  # noqa: E731
    return predicate_lists(same, grid, batch, 1, rows, cols, keys=keys)


def _block_ranges(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest id in each block, (batch, blocks)."""
    short = -ids.shape[1] % size
    padded = torch.cat([ids, ids[:, -1:].expand(-1, short)], 1).view(ids.shape[0], -(-ids.shape[1] // size), size)
    return padded.amin(-1), padded.amax(-1)


def all_blocks(grid: Grid, batch: int, heads: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """(rows, cols) of every block."""
    rows = torch.arange(batch * heads * grid.n_q, device=device)
    return rows.repeat_interleave(grid.n_k), torch.arange(grid.n_k, device=device).repeat(rows.numel())
