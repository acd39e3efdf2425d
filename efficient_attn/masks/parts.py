"""Masks as unions of disjoint parts, each in an order of tokens in which its pairs lie close together.

    visible(b, h, i, j)  =  some part has a row p and a column c with  query_order[p] = i,  key_order[c] = j,
                            visible_of_part(b, h, p, c)  and  j < kv_lengths[b]

A column of an image is every width-th token, so that nearly every block of pairs holds some pairs of columns; in the
order of columns they fill whole blocks. Attention over the union is attention over each part, joined by lse. No pair is
in two parts. `PartedMask` is a `BlockMask` like any other: whoever does not know of parts reads its lists, which are
made from the parts when somebody first asks. The token permutation is that of NATTEN (Hassani et al. 2025,
arXiv:2504.16922), the sorting Reformer's (Kitaev et al. 2020, arXiv:2001.04451).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import MaskError
from ..tracing import shapes_only
from . import algebra
from .block_mask import BlockMask, MaskArrays
from .lists import CHUNK, Grid, assemble, entry_rows, expand, unpack_bits, with_trivial
from .rules import check_sizes

# What a visited block costs beside its pairs, and a row or a column of a part beside its blocks, in pairs: a start of
# the inner loops; a load by index and a share in joining the parts. Measured on a core of a server of 2024 (AVX-512).
BLOCK_COST = 128
ROW_COST = 8
CALL_COST = 1 << 15  # a pass over a part


class Part(NamedTuple):
    """Some pairs of a mask, in an order of tokens.

    mask: of rows and columns; no lengths.
    query_order: int32 (1 | heads, rows), the token of each row, distinct in a line; None: row i is token i. Where the
        mask has a batch it may be (batch * heads, rows).
    key_order: the same of columns, with as many heads as the keys or one.
    """

    mask: BlockMask
    query_order: Tensor | None = None
    key_order: Tensor | None = None

    def to(self, device: torch.device | str) -> Part:
        """The part on another device."""
        orders: Any = (None if order is None else order.to(device) for order in self[1:])
        return Part(self.mask.to(device), *orders)

    @property
    def tensors(self) -> list[Tensor]:
        """What is not None of lists and orders."""
        own = (self.mask.indptr, self.mask.indices, self.mask.tile_ids, self.mask.tiles, *self[1:])
        return [t for t in own if t is not None]

    def arrays(self, transposed: bool, kv_lengths: Tensor | None) -> MaskArrays:
        """As a backend reads it."""
        arrays = self.mask.arrays(transposed)
        return arrays._replace(kv_lengths=kv_lengths, query_order=self.query_order, key_order=self.key_order)


def cost(mask: BlockMask) -> int:
    """What a call with the mask visits, in pairs of one batch element and head: blocks, or of a union those of its
    parts, a price for each block, and one for each row and column that a part loads and joins."""
    if mask.union is not None:
        return sum(CALL_COST + _cost(part.mask, ordered=True) for part in mask.union) - CALL_COST
    return _cost(mask, ordered=False)


def _cost(mask: BlockMask, ordered: bool) -> int:
    lines = mask.shape[0] * mask.heads
    pairs, blocks = algebra.visited_pairs(*mask.parts), algebra.count_blocks(*mask.parts)
    rows = ROW_COST * (mask.q_len + mask.kv_len) if ordered else 0
    return (pairs + BLOCK_COST * blocks) // max(lines, 1) + rows


def visited(mask: BlockMask) -> int:
    """Pairs in the blocks that a call visits, hidden ones included, over all batch elements and heads of the mask."""
    if mask.union is None:
        return algebra.visited_pairs(*mask.parts)
    lines = mask.shape[0] * mask.heads
    counted = ((algebra.visited_pairs(*p.mask.parts), p.mask.shape[0] * p.mask.heads) for p in mask.union)
    return sum(pairs * lines // max(own, 1) for pairs, own in counted)


class PartedMask(BlockMask):
    """A mask that is also a union of disjoint parts. Made by patterns, and by `of`."""

    _union: tuple[Part, ...]
    _sizes: tuple[int, int, int, int]  # batch, heads, q_len, kv_len, without lengths
    _lengths: Tensor | None
    _whole_kept: list[BlockMask]  # without lengths; shared by masks that differ in these

    @classmethod
    def of(cls, parts: Sequence[Part], *, q_len: int, kv_len: int) -> PartedMask:
        """The union of some parts, checked.

        Raises:
            MaskError: orders that do not fit, or a pair in two parts.
        """
        check_sizes(q_len, kv_len)
        parts = tuple(Part(*part) for part in parts)
        if not parts:
            raise MaskError("a union needs at least one part")
        for part in parts:
            _check_part(part, q_len, kv_len)
        made = cls.trusted(parts, q_len=q_len, kv_len=kv_len)
        whole = made._whole
        if round(whole.density * math.prod(whole.shape)) != round(made.density * math.prod(made.shape)):
            raise MaskError("the parts of a union must be disjoint; some pair is in two of them")
        return made

    @classmethod
    def trusted(cls, parts: Sequence[Part], *, q_len: int, kv_len: int, whole: BlockMask | None = None) -> PartedMask:
        """The union of parts that this package made, without checks; `whole` is the same mask without parts."""
        heads = max(max(part.mask.heads for part in parts), 1 if whole is None else whole.heads)
        batch = max(max(part.mask.batch for part in parts), 1 if whole is None else whole.batch)
        return cls._with(tuple(parts), (batch, heads, q_len, kv_len), None, [] if whole is None else [whole])

    @classmethod
    def _with(
        cls, parts: tuple[Part, ...], sizes: tuple[int, int, int, int], lengths: Tensor | None, kept: list[BlockMask]
    ) -> PartedMask:
        mask = object.__new__(cls)
        for name, value in (("_union", parts), ("_sizes", sizes), ("_lengths", lengths), ("_whole_kept", kept)):
            object.__setattr__(mask, name, value)
        return mask

    @classmethod
    def _made(cls, fields: dict[str, Any], kept: Any) -> BlockMask:
        return BlockMask._made(fields, kept)  # what is made of a parted mask has no parts

    # --- the mask without parts ---

    @property
    def _whole(self) -> BlockMask:
        if not self._whole_kept:
            with torch.inference_mode(False):
                self._whole_kept[:] = [_joined(self._union, *self._sizes)]
        whole = self._whole_kept[0]
        return whole if self._lengths is None else whole._replace(kv_lengths=self._lengths)

    def _fields(self) -> dict[str, Any]:
        return self._whole._fields()

    @property
    def _arrays(self) -> MaskArrays:  # type: ignore[override]
        return self._whole._arrays

    @property
    def _kept(self) -> Any:  # type: ignore[override]
        return self._whole._kept

    # --- what is known without it ---

    @property
    def union(self) -> tuple[Part, ...]:
        return self._union

    @property
    def batch(self) -> int:
        return self._sizes[0]

    @property
    def heads(self) -> int:
        return self._sizes[1]

    @property
    def q_len(self) -> int:
        return self._sizes[2]

    @property
    def kv_len(self) -> int:
        return self._sizes[3]

    @property
    def kv_lengths(self) -> Tensor | None:
        return self._lengths

    @property
    def device(self) -> torch.device | None:
        tensors = [t for part in self._union for t in part.tensors]
        return tensors[0].device if tensors else None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of the parts, and of the lists of the whole if they have been made."""
        tensors = [t for part in self._union for t in part.tensors]
        tensors += [] if self._lengths is None else [self._lengths]
        return sum(t.numel() * t.element_size() for t in tensors) + sum(whole.nbytes for whole in self._whole_kept)

    @property
    def density(self) -> float:
        self._check_values("density")
        pairs = math.prod(self.shape)
        if self._lengths is not None:
            return self._whole.density
        lines = self.batch * self.heads
        counted = ((algebra.count_pairs(*p.mask.parts), p.mask.batch * p.mask.heads) for p in self._union)
        return sum(seen * (lines // max(own, 1)) for seen, own in counted) / pairs if pairs else 0.0

    def _check_values(self, what: str) -> None:
        if not torch.compiler.is_compiling() and shapes_only(*(t for part in self._union for t in part.tensors)):
            raise MaskError(f"{what} counts what a mask's values show, and fake or meta tensors have none")

    def part_arrays(self, transposed: bool) -> tuple[MaskArrays, ...]:
        """The parts as a backend reads them, one call each."""
        return tuple(part.arrays(transposed, self._lengths) for part in self._union)

    # --- what keeps the parts ---

    def to(self, device: torch.device | str | None) -> BlockMask:
        if device is None or self.device is None or self.device == torch.device(device):
            return self
        lengths = None if self._lengths is None else self._lengths.to(device)
        kept = [whole.to(device) for whole in self._whole_kept]
        return self._with(tuple(part.to(device) for part in self._union), self._sizes, lengths, kept)

    def __and__(self, other: BlockMask) -> BlockMask:
        lengths_alone = isinstance(other, BlockMask) and other.indptr is None and other.window is None
        if lengths_alone and (other.q_len, other.kv_len) == self._sizes[2:]:
            if other.kv_lengths is None:
                return self
            one_batch = self.batch == 1 and (self.device is None or self.device == other.device)
            if self._lengths is None and one_batch:
                return self._with(self._union, self._sizes, other.kv_lengths, self._whole_kept)
        return self._whole & other

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (tuple(tuple(part) for part in self._union), self._sizes, self._lengths, self._whole_kept)

    def __repr__(self) -> str:
        if torch.compiler.is_compiling() or shapes_only(*(t for part in self._union for t in part.tensors)):
            return f"PartedMask(shape={self.shape}, parts={len(self._union)})"
        sizes = ", ".join(f"{p.mask.q_len} x {p.mask.kv_len} in blocks of {p.mask.block_size}" for p in self._union)
        return f"PartedMask(shape={self.shape}, density={self.density:.4g}, {len(self._union)} parts: {sizes})"

    def plot(self, ax: Any = None, *, batch: int = 0, head: int = 0, part: int | None = None) -> Any:
        """Draw the visible pairs of one batch element and head with matplotlib; returns the axes.

        Args:
            part: draw this part alone, in its own order of tokens; None: all pairs, in the order of the sequence.
        """
        if part is None:
            return self._whole.plot(ax, batch=batch, head=head)
        if not 0 <= part < len(self._union):
            raise MaskError(f"part {part} of a mask with {len(self._union)} parts")
        mask = self._union[part].mask
        axes = mask.plot(ax, batch=min(batch, mask.batch - 1), head=min(head, mask.heads - 1))
        axes.set(xlabel="key, in the part's order", ylabel="query, in the part's order")
        return axes


def _rebuild(parts: Any, sizes: Any, lengths: Tensor | None, kept: list[BlockMask]) -> PartedMask:
    for part in parts:
        _check_part(Part(*part), *sizes[2:])
    return PartedMask._with(tuple(Part(*part) for part in parts), sizes, lengths, kept)


def _check_part(part: Part, q_len: int, kv_len: int) -> None:
    if not isinstance(part.mask, BlockMask) or part.mask.union is not None or part.mask.kv_lengths is not None:
        raise MaskError("the mask of a part is a BlockMask without parts and lengths of its own")
    sides = (("query", part.query_order, part.mask.q_len, q_len), ("key", part.key_order, part.mask.kv_len, kv_len))
    for name, order, rows, tokens in sides:
        if order is None:
            if rows != tokens:
                raise MaskError(f"a part without {name}_order has all {tokens} tokens in their order, not {rows}")
            continue
        heads = order.shape[0] if order.dim() == 2 else 0
        if part.mask.batch > 1 and heads > 1:
            heads = heads // part.mask.batch if heads % part.mask.batch == 0 else 0
        if order.dtype != torch.int32 or order.dim() != 2 or order.shape[1] != rows or not order.is_contiguous():
            raise MaskError(
                f"{name}_order must be contiguous int32 (lines, {rows}), got {order.dtype} {tuple(order.shape)}"
            )
        if heads == 0 or part.mask.heads % heads or (name == "query" and heads not in (1, part.mask.heads)):
            raise MaskError(
                f"{name}_order has {order.shape[0]} lines for lists of {part.mask.batch} x {part.mask.heads} heads: "
                "one, or one for each head, of each batch element where the lists have more than one"
            )
        placed = order.sort(-1).values
        if rows and (bool((placed[:, 0] < 0).any()) or bool((placed[:, -1] >= tokens).any())):
            raise MaskError(f"{name}_order names tokens from 0 to {tokens - 1}")
        if bool((placed.diff(dim=-1) == 0).any()):
            raise MaskError(f"{name}_order names a token twice")


# --- the whole of some parts ---


def _joined(parts: Sequence[Part], batch: int, heads: int, q_len: int, kv_len: int) -> BlockMask:
    """The lists of a union, in blocks of 128 x 128 in the order of the sequence."""
    grid = Grid(q_len, kv_len, 128, 128)
    row_bytes = grid.block_k // 8
    device = next((t.device for part in parts for t in part.tensors), torch.device("cpu"))
    touched = [torch.empty(0, dtype=torch.int64, device=device)]
    for blocks, _ in _pairs(parts, batch, heads, grid):
        touched.append(blocks.unique())
    found = torch.cat(touched).unique()
    tiles = torch.zeros(found.numel() * grid.block_q * row_bytes, dtype=torch.uint8, device=device)
    for blocks, places in _pairs(parts, batch, heads, grid):
        place = torch.searchsorted(found, blocks) * (grid.block_q * row_bytes) + places // 8
        # Every pair comes once, so that adding its bit sets it.
        tiles.scatter_add_(0, place, torch.bitwise_left_shift(torch.ones_like(places), places % 8).to(torch.uint8))
    rows, cols = found // max(grid.n_k, 1), found % max(grid.n_k, 1)
    packed = tiles.view(-1, grid.block_q, row_bytes)
    lists = assemble(grid, batch, heads, rows, cols, torch.arange(found.numel(), device=device), packed)
    return BlockMask.from_lists(grid, lists)


def _pairs(parts: Sequence[Part], batch: int, heads: int, grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """For visible pairs, some at a time: the block of the whole, numbered (b, h, row, column), and the bit in it."""
    for part in parts:
        mask = part.mask
        own = mask.grid
        lists = expand(mask.explicit_lists(), own.n_q, batch, heads)
        rows, cols, tiles = entry_rows(lists), lists.indices.long(), with_trivial(lists.tiles)
        orders = []
        for order, tokens in ((part.query_order, mask.q_len), (part.key_order, mask.kv_len)):
            order = torch.arange(tokens, device=rows.device)[None] if order is None else order.long()
            own_batch = mask.batch if order.shape[0] > 1 else 1
            order = order.view(own_batch, order.shape[0] // own_batch, tokens)
            orders.append(order.repeat_interleave(heads // order.shape[1], 1).expand(batch, heads, tokens))
        flat = [order.reshape(batch * heads, -1) for order in orders]
        for some in torch.arange(cols.numel(), device=rows.device).split(max(1, CHUNK // (own.block_q * own.block_k))):
            entry, p, c = unpack_bits(tiles[lists.tile_ids[some].long()]).nonzero().unbind(1)
            line = rows[some][entry] // own.n_q
            p, c = p + rows[some][entry] % own.n_q * own.block_q, c + cols[some][entry] * own.block_k
            inside = (p < mask.q_len) & (c < mask.kv_len)  # a full block may reach beyond
            line, p, c = line[inside], p[inside], c[inside]
            i, j = flat[0][line, p], flat[1][line, c]
            block = (line * grid.n_q + i // grid.block_q) * grid.n_k + j // grid.block_k
            yield block, i % grid.block_q * grid.block_k + j % grid.block_k


def _through(name: str) -> property:
    return property(lambda self: getattr(self._whole, name))


for _name in ("block_size", "indptr", "indices", "tile_ids", "tiles", "window", "window_offset"):
    setattr(PartedMask, _name, _through(_name))
