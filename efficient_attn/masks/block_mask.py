"""Which query may look at which key: `BlockMask`, the one mask that every backend reads.

    visible(b, h, i, j)  =  list(b, h, i, j)  and  window(i, j)  and  j < kv_lengths[b]

The list is block-compressed: for every query block the key blocks that hold a visible pair, each either full or
pointing at a tile of bits. Window and lengths are analytic and cost no memory. Lists are made in lists.py and
combined in algebra.py; this file is the object and what it promises.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..defaults import ALIGNMENTS, alignment_offset
from ..errors import MaskError
from ..tracing import shapes_only
from . import algebra, flex, picture
from .algebra import Interval, window_fields
from .lists import (
    FULL,
    BlockLists,
    Grid,
    Predicate,
    all_blocks,
    dense_lists,
    document_lists,
    entry_rows,
    expand,
    pack_bits,
    predicate_lists,
    static_lists,
    swap,
    take_rows,
    transpose,
)
from .rules import as_integers, broadcast_size, check_block_size, check_mask, check_sizes, narrow, positions_of

BlockSize = int | tuple[int, int]
Integers = Tensor | Sequence[int]
Transposed = tuple[Tensor, Tensor, Tensor]  # indptr, indices and tile ids, of query blocks for each key block
MAX_DENSE_PAIRS = 2**34  # to_dense() of more is refused unless asked for


class MaskArrays(NamedTuple):
    """What a backend sees of a mask. Lists are None when every block is visible, t_* unless a backward needs them."""

    batch: int = 1
    heads: int = 1
    block_q: int = 128
    block_k: int = 128
    indptr: Tensor | None = None  # int64 [batch * heads * n_q + 1]
    indices: Tensor | None = None  # int32 [nnz]
    tile_ids: Tensor | None = None  # int32 [nnz]
    tiles: Tensor | None = None  # uint8 [n_tiles, block_q, block_k // 8]
    t_indptr: Tensor | None = None  # int64 [batch * heads * n_k + 1]
    t_indices: Tensor | None = None  # int32 [nnz]
    t_tile_ids: Tensor | None = None  # int32 [nnz]
    window_left: int = -1
    window_right: int = -1
    window_offset: int = 0
    kv_lengths: Tensor | None = None  # int32 [B]
    # Row i of the lists and the window is token order[..., i]; lengths are of the tokens. None: row i is token i.
    query_order: Tensor | None = None  # int32 [1 or Hq or B * Hq, rows], distinct
    key_order: Tensor | None = None  # int32 [1 or Hkv or B * Hkv, rows], distinct


def trainable(arrays: MaskArrays) -> MaskArrays:
    """The arrays as autograd may keep them: a mask that was made under torch.inference_mode is copied."""
    if torch.compiler.is_compiling() or not any(isinstance(x, Tensor) and x.is_inference() for x in arrays):
        return arrays
    with torch.inference_mode(False):
        copies: list[Any] = [x.clone() if isinstance(x, Tensor) else x for x in arrays]
        return MaskArrays(*copies)


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """A boolean mask (batch, heads, q_len, kv_len), exact for any pattern and small for a sparse one. Immutable.

    Construct with `from_csr`, `from_dense`, `from_lengths`, `from_predicate`, `from_documents`, `from_flex`, or from a
    pattern; `BlockMask(q_len, kv_len)` is dense. Every construction is validated; tensors must not be changed after.

    Attributes:
        q_len, kv_len: lengths of the sequences.
        block_size: (queries, keys) of a block, multiples of 16 from 16 to 256.
        batch, heads: of the lists; 1 broadcasts, heads are query heads.
        indptr: int64 [batch * heads * n_q + 1], n_q = ceil(q_len / block_q); rows ordered (b, h, query block).
        indices: int32 [nnz], key blocks, ascending in each row.
        tile_ids: int32 [nnz], -1 for a full block, else an index into `tiles`.
        tiles: uint8 [n_tiles, block_q, block_k // 8]; bit j % 8 of byte j // 8 is key j of the block. Bits beyond q_len
            and kv_len are 0. These four are None when there is no list.
        window: (left, right), -1 unlimited, or None: with o = i + window_offset query i sees o - left .. o + right.
        window_offset: 0 aligns the window top-left, kv_len - q_len bottom-right.
        kv_lengths: int32 [B] or None, the number of valid keys of each batch element; B is `batch` or batch is 1.

    Raises:
        MaskError: arrays that do not describe a mask; the text says which rule is broken.
    """

    q_len: int
    kv_len: int
    block_size: tuple[int, int] = (128, 128)
    batch: int = 1
    heads: int = 1
    indptr: Tensor | None = None
    indices: Tensor | None = None
    tile_ids: Tensor | None = None
    tiles: Tensor | None = None
    window: tuple[int, int] | None = None
    window_offset: int = 0
    kv_lengths: Tensor | None = None

    # Set on every instance, derived from the fields.
    _arrays: ClassVar[MaskArrays]
    _kept: ClassVar[list[Transposed]]  # what transposed() returned, if kept; shared by masks with the same lists

    __iter__ = None  # indexing is by batch and head; to iterate over that would surprise

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", check_block_size(self.block_size))
        check_mask(**self._fields())
        window = None if self.window is None or tuple(self.window) == (-1, -1) else tuple(self.window)
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "window_offset", 0 if window is None else self.window_offset)
        self._finish([])

    def _finish(self, kept: list[Transposed]) -> None:
        left, right = self.window or (-1, -1)
        lists = (self.indptr, self.indices, self.tile_ids, self.tiles, None, None, None)
        shape = (self.batch, self.heads, *self.block_size)
        arrays = MaskArrays(*shape, *lists, left, right, self.window_offset, self.kv_lengths)
        object.__setattr__(self, "_arrays", arrays)
        object.__setattr__(self, "_kept", kept)

    @classmethod
    def unchecked(cls, transposed: Transposed | None = None, **fields: Any) -> BlockMask:
        """A mask of arrays that this package made, without checks; `transposed` is what `transposed()` shall return."""
        return cls._made(fields, [] if transposed is None else [transposed])

    @classmethod
    def _made(cls, fields: dict[str, Any], kept: list[Transposed]) -> BlockMask:
        mask = object.__new__(cls)
        for name, default in FIELD_DEFAULTS:
            object.__setattr__(mask, name, fields.get(name, default))
        mask._finish(kept)
        return mask

    @classmethod
    def from_lists(cls, grid: Grid, lists: BlockLists) -> BlockMask:
        """The mask of lists that `lists.assemble` made: no window, no lengths, no checks."""
        size = (grid.block_q, grid.block_k)
        return cls.unchecked(q_len=grid.q_len, kv_len=grid.kv_len, block_size=size, **lists._asdict())

    def _replace(self, **fields: Any) -> BlockMask:
        """Another window, other lengths: the lists and what is kept about them are shared."""
        return self._made(self._fields() | fields, self._kept)

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name, _ in FIELD_DEFAULTS}

    # --- construction ---

    @classmethod
    def from_csr(
        cls,
        indptr: Integers,
        indices: Integers,
        *,
        q_len: int,
        kv_len: int,
        block_size: BlockSize = (128, 128),
        batch: int = 1,
        heads: int = 1,
        tile_ids: Integers | None = None,
        tiles: Tensor | None = None,
        window: tuple[int, int] | None = None,
        window_offset: int = 0,
        kv_lengths: Integers | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """A mask from lists of key blocks: integer tensors of any width, or sequences of ints.

        Args:
            tile_ids: one for each index; None: every listed block is full.
            tiles: packed uint8 [n, block_q, block_k // 8], or bool [n, block_q, block_k], which is packed here.
            device: where the mask lives; default: where `indices` is.

        The lists are kept as given: equal tiles are not merged and empty ones not dropped; `explicit()` does.
        """
        block_q, block_k = check_block_size(block_size)
        if device is None:
            device = next((t.device for t in (indices, indptr, tiles) if isinstance(t, Tensor)), None)
        if tiles is None:
            tiles = torch.empty(0, block_q, block_k // 8, dtype=torch.uint8, device=device)
        elif isinstance(tiles, Tensor) and tiles.dtype == torch.bool:
            if tiles.shape[1:] != (block_q, block_k):
                raise MaskError(
                    f"bool tiles must be (n, {block_q}, {block_k}) for this block_size, got {tuple(tiles.shape)}"
                )
            tiles = pack_bits(tiles)
        columns = narrow(as_integers("indices", indices, device))
        ids = torch.full_like(columns, FULL) if tile_ids is None else narrow(as_integers("tile_ids", tile_ids, device))
        return cls(
            q_len=q_len,
            kv_len=kv_len,
            block_size=(block_q, block_k),
            batch=batch,
            heads=heads,
            indptr=as_integers("indptr", indptr, device),
            indices=columns,
            tile_ids=ids,
            tiles=tiles.to(device) if isinstance(tiles, Tensor) else tiles,
            window=window,
            window_offset=window_offset,
            kv_lengths=None if kv_lengths is None else narrow(as_integers("kv_lengths", kv_lengths, device)),
        )

    @classmethod
    def from_dense(
        cls,
        mask: Tensor,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
        block_size: BlockSize = (128, 128),
        static: bool = False,
    ) -> BlockMask:
        """The exact mask of a bool tensor, True = attend.

        Args:
            mask: 1 to 4 dimensions, broadcastable to (batch, heads, q_len, kv_len); one dimension is over keys and
                needs q_len. batch and heads of size 1, or expanded, stay broadcast.
            q_len, kv_len: default to the tensor's own.
            static: list every block with a tile of its own, so that no shape depends on a value and torch.compile can
                trace it. Takes q_len * kv_len / 8 bytes for each batch element and head.
        """
        block_q, block_k = check_block_size(block_size)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or not 1 <= mask.dim() <= 4:
            given = f"{mask.dtype} with {mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
            raise MaskError(f"from_dense takes a bool tensor (True = attend) of 1 to 4 dimensions, got {given}")
        if mask.dim() == 1 and q_len is None:
            raise MaskError("a mask with one dimension is over keys; say how many queries there are with q_len=")
        mask = mask[(None,) * (4 - mask.dim())]
        q_len, kv_len = (mask.shape[2] if q_len is None else q_len), (mask.shape[3] if kv_len is None else kv_len)
        check_sizes(q_len, kv_len)
        if mask.shape[2] not in (1, q_len) or mask.shape[3] not in (1, kv_len):
            raise MaskError(f"a mask of {tuple(mask.shape)} does not broadcast to (batch, heads, {q_len}, {kv_len})")
        for dim in (0, 1):
            if mask.shape[dim] > 1 and mask.stride(dim) == 0:
                mask = mask.narrow(dim, 0, 1)
        grid = Grid(q_len, kv_len, block_q, block_k)
        lists = static_lists if static else dense_lists
        return cls.from_lists(grid, lists(mask.expand(-1, -1, q_len, kv_len), grid))

    @classmethod
    def from_lengths(
        cls, kv_lengths: Integers, *, q_len: int, kv_len: int, block_size: BlockSize = (128, 128)
    ) -> BlockMask:
        """Padding: batch element b sees the keys j < kv_lengths[b]."""
        device = kv_lengths.device if isinstance(kv_lengths, Tensor) else None
        lengths = narrow(as_integers("kv_lengths", kv_lengths, device))
        if torch.compiler.is_compiling() or shapes_only(lengths):
            lengths = lengths.clamp(0, kv_len)  # cannot be looked at, and checked, while tracing
        return cls(q_len, kv_len, check_block_size(block_size), kv_lengths=lengths)

    @classmethod
    def from_predicate(
        cls,
        visible: Predicate,
        *,
        q_len: int,
        kv_len: int,
        batch: int = 1,
        heads: int = 1,
        block_size: BlockSize = (128, 128),
        device: torch.device | str | None = None,
        within: BlockMask | None = None,
        shift_invariant: bool = False,
    ) -> BlockMask:
        """The mask of visible(b, h, i, j) -> bool, evaluated tile by tile.

        Args:
            visible: gets int64 index tensors that broadcast to (n, block_q, block_k), returns a bool tensor that
                broadcasts to it. It is only asked about positions inside the sequences.
            within: ask only in the blocks of this mask, and return the pairs that both allow.
            shift_invariant: the promise that the answer depends on b, h and j - i alone, so that one tile serves all
                blocks along a diagonal.
        """
        grid = Grid(q_len, kv_len, *check_block_size(block_size))
        check_sizes(q_len, kv_len, batch, heads)
        device = torch.device("cpu" if device is None else device)
        bits = None
        if within is None:
            rows, cols = all_blocks(grid, batch, heads, device)
        else:
            _matched(cls(q_len, kv_len), within)
            listed = within.reblock((grid.block_q, grid.block_k)).to(device).explicit_lists()
            batch, heads = broadcast_size("batch", batch, listed.batch), broadcast_size("heads", heads, listed.heads)
            given = expand(listed, grid.n_q, batch, heads)
            rows, cols, bits = entry_rows(given), given.indices.long(), (given.tile_ids, given.tiles)
        keys = None
        if shift_invariant:
            shifts = rows % max(grid.n_q, 1) * grid.block_q - cols * grid.block_k
            keys = (rows // max(grid.n_q, 1), shifts, grid.edge(rows, cols))
        lists = predicate_lists(visible, grid, batch, heads, rows, cols, keys=keys, within=bits)
        return cls.from_lists(grid, lists)

    @classmethod
    def from_documents(cls, ids: Integers, *, block_size: BlockSize = (128, 128)) -> BlockMask:
        """Packed sequences: a query sees the keys of its own document.

        Args:
            ids: integers (length,) or (batch, length), the document of each token, in any order.
        """
        ids = as_integers("ids", ids, ids.device if isinstance(ids, Tensor) else None)
        if ids.dim() not in (1, 2):
            raise MaskError(f"document ids are (length,) or (batch, length), got {tuple(ids.shape)}")
        ids = ids if ids.dim() == 2 else ids[None]
        grid = Grid(ids.shape[1], ids.shape[1], *check_block_size(block_size))
        return cls.from_lists(grid, document_lists(ids, grid))

    @classmethod
    def from_arrays(cls, arrays: MaskArrays, *, q_len: int, kv_len: int) -> BlockMask:
        """The mask that `arrays()` was taken from; unchecked, since only a mask makes such arrays."""
        return cls.unchecked(
            q_len=q_len,
            kv_len=kv_len,
            block_size=(arrays.block_q, arrays.block_k),
            window=None if arrays.window_left == arrays.window_right == -1 else arrays[11:13],
            **{name: getattr(arrays, name) for name in SHARED_FIELDS},
        )

    @classmethod
    def from_flex(cls, block_mask: Any) -> BlockMask:
        """The exact mask of a torch.nn.attention.flex_attention.BlockMask: its lists, and its mask_mod where it asks.

        The block size is kept when it is one of ours, else split into the largest of ours, or 128.
        """
        return cls.from_lists(*flex.from_flex(block_mask))

    def to_flex(self) -> Any:
        """The same mask as a torch.nn.attention.flex_attention.BlockMask with the same block size."""
        return flex.to_flex(self.grid, self.lists, self.interval, self.kv_lengths, self.explicit_lists())

    # --- what it is ---

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, q_len, kv_len); batch and heads of 1 broadcast."""
        batch = self.batch if self.kv_lengths is None else self.kv_lengths.shape[0]
        return (batch, self.heads, self.q_len, self.kv_len)

    @property
    def device(self) -> torch.device | None:
        """Where the tensors are; None for a mask that needs none and fits every device."""
        tensor = self.kv_lengths if self.indptr is None else self.indptr
        return None if tensor is None else tensor.device

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        tensors = (self.indptr, self.indices, self.tile_ids, self.tiles, self.kv_lengths)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def density(self) -> float:
        """Fraction of visible pairs, exact; 0 when there are no pairs."""
        self._check_values("density")
        pairs = math.prod(self.shape)
        return algebra.count_pairs(*self.parts) / pairs if pairs else 0.0

    @property
    def block_density(self) -> float:
        """Fraction of blocks that a kernel visits: listed, and touched by window and length."""
        self._check_values("block_density")
        blocks = self.shape[0] * self.heads * self.grid.n_q * self.grid.n_k
        return algebra.count_blocks(*self.parts) / blocks if blocks else 0.0

    def _check_values(self, what: str) -> None:
        if not torch.compiler.is_compiling() and shapes_only(self.indptr, self.kv_lengths):
            raise MaskError(
                f"{what} counts what a mask's values show, and fake or meta tensors have none; make the mask on a real "
                "device"
            )

    @property
    def union(self) -> tuple[Any, ...] | None:
        """The disjoint parts that a `PartedMask` is the union of, each in its own order of tokens; None: no parts."""
        return None

    @property
    def grid(self) -> Grid:
        """The blocks of the score matrix."""
        return Grid(self.q_len, self.kv_len, *self.block_size)

    @property
    def lists(self) -> BlockLists | None:
        """The list part; None when every block is listed."""
        return None if self.indptr is None else self._listed

    @property
    def _listed(self) -> BlockLists:
        assert self.indptr is not None and self.indices is not None
        assert self.tile_ids is not None and self.tiles is not None
        return BlockLists(self.batch, self.heads, self.indptr, self.indices, self.tile_ids, self.tiles)

    @property
    def interval(self) -> Interval:
        """The window as (lowest, highest) j - i; None is unlimited."""
        left, right = self.window or (-1, -1)
        low = None if left < 0 else self.window_offset - left
        return (low, None if right < 0 else self.window_offset + right)

    @property
    def parts(self) -> tuple[Grid, BlockLists | None, Interval, Tensor]:
        """What algebra.py works on: grid, lists, interval of j - i, lengths int64 [1 | B]."""
        lengths = self.kv_lengths
        lengths = torch.tensor([self.kv_len], device=self.device or "cpu") if lengths is None else lengths.long()
        return self.grid, self.lists, self.interval, lengths

    # --- what a backend reads ---

    def arrays(self, transposed: bool = False) -> MaskArrays:
        """The mask as a backend reads it; `transposed` adds the lists of query blocks for each key block."""
        if not transposed or self.indptr is None:
            return self._arrays
        t_indptr, t_indices, t_tile_ids = self.transposed()
        return self._arrays._replace(t_indptr=t_indptr, t_indices=t_indices, t_tile_ids=t_tile_ids)

    def transposed(self) -> Transposed:
        """The query blocks of each key block, for the backward: indptr, indices (ascending) and tile ids.

        Sorted once and kept. Call it before torch.compile or a CUDA-graph capture to keep the sort out of the graph.
        """
        if self.indptr is None:
            raise MaskError("a mask without lists has nothing to transpose: every block is listed")
        if self._kept:
            return self._kept[0]
        if torch.compiler.is_compiling() or shapes_only(self.indptr):
            return transpose(self._listed, self.grid)
        with torch.inference_mode(False):  # what is kept must serve training too
            made = transpose(self._listed, self.grid)
        if _outlasts_the_call(made[0]):
            self._kept[:] = [made]
        return made

    def keep_transposed(self) -> None:
        """Keep what `transposed` returns, also while something is being traced, when it keeps nothing by itself."""
        self._kept[:] = [self.transposed()]

    def to_dense(self, *, max_pairs: int = MAX_DENSE_PAIRS) -> Tensor:
        """bool (batch, heads, q_len, kv_len) with window and lengths; batch and heads of 1 broadcast.

        Raises:
            MaskError: the result would have more than `max_pairs` pairs (a byte each).
        """
        pairs = math.prod(self.shape)
        if pairs > max_pairs:
            raise MaskError(f"to_dense() of {self.shape} takes {pairs} bytes; pass max_pairs={pairs} if that is meant")
        return algebra.draw(*self.parts)

    def explicit(self) -> BlockMask:
        """The same pairs as lists alone, in canonical form: no empty block, full ones marked, equal tiles once."""
        return self.from_lists(self.grid, self.explicit_lists())

    def explicit_lists(self) -> BlockLists:
        """The lists of `explicit()`."""
        return algebra.explicit(*self.parts)

    # --- further restrictions ---

    def with_window(self, window: tuple[int, int], *, alignment: str | None = None) -> BlockMask:
        """Only the pairs that a window (left, right) allows too; -1 is unlimited.

        Args:
            alignment: where the window starts when q_len != kv_len: "top_left" (query i around key i) or
                "bottom_right" (the last query around the last key).
        """
        offset = self._offset(alignment)
        return self & BlockMask(self.q_len, self.kv_len, self.block_size, window=window, window_offset=offset)

    def with_causal(self, alignment: str | None = None) -> BlockMask:
        """Only the pairs of the past: j <= i, or j <= i + kv_len - q_len with alignment "bottom_right"."""
        return self.with_window((-1, 0), alignment=alignment)

    def with_lengths(self, kv_lengths: Integers) -> BlockMask:
        """Only the keys j < kv_lengths[b]."""
        device = kv_lengths.device if isinstance(kv_lengths, Tensor) else self.device
        lengths = as_integers("kv_lengths", kv_lengths, device)
        return self & BlockMask.from_lengths(lengths, q_len=self.q_len, kv_len=self.kv_len, block_size=self.block_size)

    def _offset(self, alignment: str | None) -> int:
        if alignment not in (None, *ALIGNMENTS):
            raise MaskError(f"alignment must be one of {ALIGNMENTS}, got {alignment!r}")
        if alignment is None and self.q_len != self.kv_len:
            raise MaskError(
                f"with {self.q_len} queries and {self.kv_len} keys a window is ambiguous; say alignment='top_left' "
                "(query 0 around key 0) or 'bottom_right' (the last query around the last key)"
            )
        return alignment_offset(alignment, self.q_len, self.kv_len)

    # --- algebra ---

    def __and__(self, other: BlockMask) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        a, b = _matched(self, other)
        interval = algebra.intersect(a.interval, b.interval)
        if interval is None:
            return ~BlockMask(a.q_len, a.kv_len, a.block_size).to(a.device or b.device)
        lengths = a.kv_lengths if b.kv_lengths is None else b.kv_lengths
        if a.kv_lengths is not None and b.kv_lengths is not None:
            lengths = torch.minimum(a.kv_lengths, b.kv_lengths)
        offset = a.window_offset if b.window is None else b.window_offset
        if a.indptr is None or b.indptr is None:
            listed = b if a.indptr is None else a
        else:
            listed = self.from_lists(a.grid, algebra.merge(a.grid, a._listed, b._listed, torch.bitwise_and))
        if lengths is not None and listed.batch != 1:
            lengths = lengths.expand(listed.batch).contiguous()
        return listed._replace(**window_fields(interval, offset), kv_lengths=lengths)

    def __or__(self, other: BlockMask) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        a, b = _matched(self, other)
        if _same(a.kv_lengths, b.kv_lengths):
            if a.interval == b.interval and (a.indptr is None or b.indptr is None):
                return a if a.indptr is None else b
            interval = algebra.unite(a.interval, b.interval)
            if interval is not None and all(map(_same, a._arrays[:8], b._arrays[:8])):
                return a._replace(**window_fields(interval, a.window_offset))
            if a.interval == b.interval:
                lists = algebra.merge(a.grid, a._listed, b._listed, torch.bitwise_or)
                return self.from_lists(a.grid, lists)._replace(
                    window=a.window, window_offset=a.window_offset, kv_lengths=a.kv_lengths
                )
        device = a.device or b.device
        listed_a, listed_b = (x.to(device).explicit_lists() for x in (a, b))
        return self.from_lists(a.grid, algebra.merge(a.grid, listed_a, listed_b, torch.bitwise_or))

    def __invert__(self) -> BlockMask:
        low, high = self.interval
        if self.indptr is None and self.kv_lengths is None:  # half-planes turn into each other
            if low is None and high is not None:
                return self._replace(**window_fields((high + 1, None), self.window_offset))
            if low is not None and high is None:
                return self._replace(**window_fields((None, low - 1), self.window_offset))
        return self.from_lists(self.grid, algebra.complement(self.grid, self.explicit_lists()))

    def reblock(self, block_size: BlockSize) -> BlockMask:
        """The same mask in blocks of another size."""
        block_q, block_k = check_block_size(block_size)
        if self.block_size == (block_q, block_k):
            return self
        if self.indptr is None:
            return self._replace(block_size=(block_q, block_k))
        grid = Grid(self.q_len, self.kv_len, block_q, block_k)
        mask = self.from_lists(grid, algebra.reblock(self.grid, self._listed, grid))
        return mask._replace(window=self.window, window_offset=self.window_offset, kv_lengths=self.kv_lengths)

    def swapped(self) -> BlockMask:
        """The mask with queries and keys in each other's place: pair (j, i) for pair (i, j)."""
        return self.from_lists(self.grid.swapped(), swap(self.explicit_lists(), self.grid))

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> BlockMask:
        """mask[b], mask[b, h] with ints or slices. An int keeps its dimension, with size 1."""
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > 2:
            raise MaskError(f"a mask is sliced by batch and head, mask[b, h]; got {len(index)} indices")
        batches, heads = (
            positions_of(name, size, i)
            for name, size, i in zip(("batch", "head"), self.shape[:2], (*index, slice(None))[:2], strict=True)
        )
        fields: dict[str, Any] = {}
        if self.kv_lengths is not None:
            fields["kv_lengths"] = self.kv_lengths[torch.tensor(batches, dtype=torch.int64, device=self.device)]
        if self.batch == 1 and self.kv_lengths is not None:
            batches = [0]  # the list broadcasts, the lengths do not
        if self.indptr is None:
            if not heads:
                raise MaskError("a mask without lists is the same for every head and cannot be sliced to none")
            return self._replace(**fields)
        rows = torch.arange(self.indptr.numel() - 1, device=self.device).view(self.batch, self.heads, -1)
        rows = rows[batches][:, heads].reshape(-1)
        lists = take_rows(self._listed, rows, len(batches), len(heads))
        return self.from_lists(self.grid, lists)._replace(
            window=self.window, window_offset=self.window_offset, **fields
        )

    def to(self, device: torch.device | str | None) -> BlockMask:
        """The mask on another device."""
        if device is None or self.device is None or self.device == torch.device(device):
            return self
        fields = self._fields()
        moved = {name: value.to(device) for name, value in fields.items() if isinstance(value, Tensor)}
        return self.unchecked(**(fields | moved))

    # --- identity ---

    def __eq__(self, other: object) -> bool:
        """The same representation: sizes, lists, window and lengths. `equivalent` compares the visible pairs."""
        if not isinstance(other, BlockMask):
            return NotImplemented
        return all(map(_same, self._fields().values(), other._fields().values()))

    def __hash__(self) -> int:
        nnz = None if self.indices is None else self.indices.shape[0]
        sizes = (self.q_len, self.kv_len, self.block_size, self.batch, self.heads)
        return hash((*sizes, self.window, self.window_offset, nnz))

    def equivalent(self, other: BlockMask) -> bool:
        """Whether both allow the same pairs for every batch element and head, broadcasting; compared block by block."""
        if (self.q_len, self.kv_len) != (other.q_len, other.kv_len):
            return False
        a, b = _matched(self, other)
        batch, heads = (
            broadcast_size(name, x, y) for name, x, y in zip(("batch", "heads"), a.shape, b.shape, strict=False)
        )
        device = a.device or b.device
        expanded = (expand(x.to(device).explicit_lists(), a.grid.n_q, batch, heads) for x in (a, b))
        return all(map(_same, *expanded))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self._fields())

    # --- pictures ---

    def __repr__(self) -> str:
        facts = [f"shape={self.shape}", f"block_size={self.block_size}"]
        if self.indices is not None and self.tiles is not None:
            facts.append(f"blocks={self.indices.shape[0]}, tiles={self.tiles.shape[0]}")
        if self.window is not None:
            facts.append(f"window={self.window}" + (f" offset {self.window_offset}" if self.window_offset else ""))
        if self.kv_lengths is not None:
            facts.append(f"kv_lengths=[{self.kv_lengths.shape[0]}]")
        if self.device is not None and (torch.compiler.is_compiling() or shapes_only(self.indptr, self.kv_lengths)):
            return f"BlockMask({', '.join(facts)})"
        text = f"BlockMask({', '.join(facts)}, density={self.density:.4g}, {self.nbytes} bytes)"
        return text if 0 in self.shape else f"{text}\n{picture.draw(*self[:1, :1].parts)}"

    def plot(self, ax: Any = None, *, batch: int = 0, head: int = 0) -> Any:
        """Draw the visible pairs of one batch element and head with matplotlib; returns the axes."""
        if 0 in self.shape:
            raise MaskError(f"a mask of shape {self.shape} has nothing to plot")
        drawn = self[batch, head]
        return picture.plot(ax, f"{self.q_len} x {self.kv_len}, density {drawn.density:.3g}", *drawn.parts)


def _outlasts_the_call(tensor: Tensor) -> bool:
    """Whether a tensor has a value of its own, and is not one that a mode or a transformation lends."""
    return type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _rebuild(cls: type[BlockMask], fields: dict[str, Any]) -> BlockMask:
    return cls(**fields)


def _matched(a: BlockMask, b: BlockMask) -> tuple[BlockMask, BlockMask]:
    """Two masks with one block size, checked to be about the same pairs."""
    if (a.q_len, a.kv_len) != (b.q_len, b.kv_len):
        raise MaskError(f"masks of {a.q_len} x {a.kv_len} and {b.q_len} x {b.kv_len} pairs cannot be combined")
    broadcast_size("batch", a.shape[0], b.shape[0])
    broadcast_size("heads", a.heads, b.heads)
    if a.device is not None and b.device is not None and a.device != b.device:
        raise MaskError(f"the masks are on {a.device} and {b.device}; move one with .to(device)")
    if a.indptr is None or b.indptr is None:  # the one with lists decides
        size = a.block_size if b.indptr is None else b.block_size
    else:
        size = (min(a.block_size[0], b.block_size[0]), min(a.block_size[1], b.block_size[1]))
    return a.reblock(size), b.reblock(size)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


# Read once: torch.compile cannot trace dataclasses.fields of a class.
SHARED_FIELDS = tuple(name for name in MaskArrays._fields if name in BlockMask.__dataclass_fields__)
FIELD_DEFAULTS = tuple((field.name, field.default) for field in dataclasses.fields(BlockMask))
