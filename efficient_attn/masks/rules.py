"""What makes a `BlockMask` valid. Lists may come from anywhere, so every rule is checked, once, in O(nnz).

A kernel may then trust a mask: an index in range, no block twice, no bit beyond the sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import MaskError
from ..tracing import shapes_only
from .lists import FULL, BlockLists, Grid, entry_rows

MAX_LENGTH = 2**31 - 256  # lengths and block indices are int32, also when rounded up to a block
LIST_DTYPES = {"indptr": torch.int64, "indices": torch.int32, "tile_ids": torch.int32, "tiles": torch.uint8}


def check_mask(
    q_len: Any,
    kv_len: Any,
    block_size: Any,
    batch: Any,
    heads: Any,
    indptr: Any,
    indices: Any,
    tile_ids: Any,
    tiles: Any,
    window: Any,
    window_offset: Any,
    kv_lengths: Any,
) -> None:
    """Raise MaskError unless every field is as documented. Synchronises once, and once more for ragged tiles."""
    check_sizes(q_len, kv_len, batch, heads)
    grid = Grid(q_len, kv_len, *check_block_size(block_size))
    _check_window(window, window_offset)
    arrays = {"indptr": indptr, "indices": indices, "tile_ids": tile_ids, "tiles": tiles}
    given = [name for name, tensor in arrays.items() if tensor is not None]
    if given and len(given) < len(arrays):
        raise MaskError(f"indptr, indices, tile_ids and tiles come together or not at all; got only {', '.join(given)}")
    for name in given:
        check_tensor(name, arrays[name], LIST_DTYPES[name], 3 if name == "tiles" else 1)
    if kv_lengths is not None:
        check_tensor("kv_lengths", kv_lengths, torch.int32, 1)
        if batch not in (1, kv_lengths.numel()):
            raise MaskError(f"kv_lengths has {kv_lengths.numel()} entries for a batch of {batch}")
    elif not given and (batch, heads) != (1, 1):
        raise MaskError("a mask without lists or kv_lengths is the same for every batch element and head; leave both 1")
    devices = {tensor.device for tensor in (*arrays.values(), kv_lengths) if tensor is not None}
    if len(devices) > 1:
        raise MaskError(f"all tensors of a mask must be on one device; got {sorted(map(str, devices))}")
    lists = BlockLists(batch, heads, **arrays) if given else None
    if lists is not None:
        _check_list_shapes(lists, grid)
    if torch.compiler.is_compiling() or shapes_only(*arrays.values(), kv_lengths):
        return  # values cannot be looked at
    rules = [] if lists is None else _list_rules(lists, grid)
    if kv_lengths is not None and kv_lengths.numel():
        outside = (kv_lengths < 0) | (kv_lengths > kv_len)
        rules.append((outside.any(), f"kv_lengths must lie in 0..{kv_len} (kv_len)"))
    if rules:
        broken = torch.stack([violated for violated, _ in rules]).tolist()
        texts = [text for hit, (_, text) in zip(broken, rules, strict=True) if hit]
        if texts:
            raise MaskError(texts[0])
    if lists is not None:
        _check_bits(lists, grid)


def check_sizes(q_len: Any, kv_len: Any, batch: Any = 1, heads: Any = 1) -> None:
    """Lengths, batch and heads are ints of a usable size."""
    for name, size in (("q_len", q_len), ("kv_len", kv_len), ("batch", batch), ("heads", heads)):
        if not is_int(size) or not 0 <= size <= MAX_LENGTH:
            raise MaskError(f"{name} must be an int from 0 to {MAX_LENGTH}, got {size!r}")


def check_block_size(block_size: Any) -> tuple[int, int]:
    """(queries, keys) of a block; one int stands for both."""
    size = (block_size, block_size) if is_int(block_size) else block_size
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise MaskError(f"block_size must be an int or a pair (queries, keys), got {block_size!r}")
    for side in size:
        if not is_int(side) or side % 16 or not 16 <= side <= 256:
            raise MaskError(f"block sizes are multiples of 16 from 16 to 256, got {block_size!r}")
    return (size[0], size[1])


def is_int(value: Any) -> bool:
    """An int that is not a bool; symbolic ints count."""
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def as_integers(name: str, values: Tensor | Sequence[int], device: torch.device | str | None) -> Tensor:
    """Integers of any width as int64 on `device`."""
    try:
        tensor = torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise MaskError(f"{name} must be integers, got {type(values).__name__}: {error}") from None
    if tensor.numel() == 0 and not isinstance(values, Tensor):
        tensor = tensor.long()
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise MaskError(f"{name} must be integers, got {tensor.dtype}")
    return tensor.long()


def narrow(tensor: Tensor) -> Tensor:
    """int64 -> int32. What does not fit saturates, to a value that no rule allows."""
    return tensor.clamp(-(2**31), 2**31 - 1).int()


def broadcast_size(name: str, a: int, b: int) -> int:
    """The common size of a broadcast dimension."""
    if a != b and 1 not in (a, b):
        raise MaskError(f"{name} sizes {a} and {b} do not broadcast")
    return b if a == 1 else a


def positions_of(name: str, size: int, index: int | slice) -> list[int]:
    """The positions that an int or a slice names."""
    if isinstance(index, slice):
        return list(range(size))[index]
    if not is_int(index):
        raise MaskError(f"a mask is indexed with ints and slices, got {type(index).__name__}")
    if not -size <= index < size:
        note = "; the mask is the same for all of them, leave this index out" if size == 1 else ""
        raise MaskError(f"{name} {index} of a mask with {size}{note}")
    return [index % size]


def check_tensor(name: str, tensor: Any, dtype: torch.dtype, dims: int) -> None:
    """One field of the lists has the documented type and number of dimensions."""
    if not isinstance(tensor, Tensor):
        raise MaskError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype or tensor.dim() != dims:
        raise MaskError(f"{name} must be {dtype} with {dims} dimension(s), got {tensor.dtype} with {tensor.dim()}")


def _check_window(window: Any, offset: Any) -> None:
    pair = window is None or (isinstance(window, tuple | list) and len(window) == 2)
    if not pair or any(not is_int(side) or side < -1 for side in window or ()):
        raise MaskError(f"window must be (left, right) with ints >= 0, or -1 for unlimited, got {window!r}")
    if not is_int(offset):
        raise MaskError(f"window_offset must be an int, got {offset!r}")


def _check_list_shapes(lists: BlockLists, grid: Grid) -> None:
    rows = lists.batch * lists.heads * grid.n_q
    if lists.indptr.numel() != rows + 1:
        raise MaskError(
            f"indptr must have batch * heads * query blocks + 1 = {lists.batch} * {lists.heads} * {grid.n_q} + 1 "
            f"entries, got {lists.indptr.numel()}"
        )
    if lists.tile_ids.numel() != lists.indices.numel():
        raise MaskError(
            f"tile_ids needs one entry for each of {lists.indices.numel()} indices, got {lists.tile_ids.numel()}"
        )
    expected = (grid.block_q, grid.block_k // 8)
    if tuple(lists.tiles.shape[1:]) != expected:
        raise MaskError(
            f"tiles must be (n, {expected[0]}, {expected[1]}) for this block_size, got {tuple(lists.tiles.shape)}"
        )
    for name in LIST_DTYPES:
        if not getattr(lists, name).is_contiguous():
            raise MaskError(f"{name} must be contiguous")


def _list_rules(lists: BlockLists, grid: Grid) -> list[tuple[Tensor, str]]:
    """(is it broken, what it says), the first broken one is the one to report."""
    indptr, indices, nnz, n_tiles = lists.indptr, lists.indices, lists.indices.numel(), lists.tiles.shape[0]
    rules = [
        (indptr[0] != 0, "indptr must start with 0"),
        ((indptr.diff() < 0).any(), "indptr must never decrease"),
        (indptr[-1] != nnz, f"indptr must end with the number of indices, {nnz}"),
    ]
    if nnz:
        same_row = torch.ones(nnz + 1, dtype=torch.bool, device=indptr.device)
        same_row[indptr.clamp(0, nnz)] = False
        step = indices.diff()
        outside = (indices < 0) | (indices >= grid.n_k)
        bad_tile = (lists.tile_ids < FULL) | (lists.tile_ids >= n_tiles)
        rules += [
            (outside.any(), f"indices must lie in 0..{grid.n_k - 1}: there are {grid.n_k} key blocks"),
            (((step == 0) & same_row[1:nnz]).any(), "indices hold the same key block twice in one row"),
            (((step < 0) & same_row[1:nnz]).any(), "indices must ascend within each row; sort them"),
            (
                bad_tile.any(),
                f"tile_ids must be -1 (full) or lie in 0..{n_tiles - 1}, an index into tiles",
            ),
        ]
    return rules


def _check_bits(lists: BlockLists, grid: Grid) -> None:
    """No tile of a ragged last block has bits beyond the sequences."""
    if grid.q_len % grid.block_q == 0 and grid.kv_len % grid.block_k == 0:
        return
    partial = lists.tile_ids >= 0
    edges = grid.edge(entry_rows(lists)[partial], lists.indices[partial].long())
    users = torch.zeros(4, lists.tiles.shape[0], dtype=torch.bool, device=lists.tiles.device)
    users[edges, lists.tile_ids[partial].long()] = True
    full_bits = grid.full_bits(lists.tiles.device)
    beyond = torch.zeros((), dtype=torch.bool, device=lists.tiles.device)
    for edge in range(1, 4):
        used = lists.tiles[users[edge]]
        beyond |= ((used & ~full_bits[edge]) != 0).any()
    if beyond:
        raise MaskError(
            f"a tile of a last block has bits beyond q_len={grid.q_len} or kv_len={grid.kv_len}; clear them "
            "(BlockMask.from_dense and from_predicate do)"
        )
