"""From and to torch.nn.attention.flex_attention.BlockMask, exactly.

FlexAttention keeps, for each query block, a padded row of key blocks to ask `mask_mod` about and one of full blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import MaskError
from .algebra import Interval, in_interval
from .lists import ABSENT, FULL, BlockLists, Grid, all_blocks, entry_rows, predicate_lists

PARTIAL = 0  # beside ABSENT and FULL: a block that mask_mod decides


def from_flex(block_mask: Any) -> tuple[Grid, BlockLists]:
    """Grid and lists with the pairs that FlexAttention would attend to."""
    try:
        q_len, kv_len = (int(length) for length in block_mask.seq_lengths)
        flex_q, flex_k = (int(size) for size in block_mask.BLOCK_SIZE)
        state = _block_states(block_mask, -(-q_len // flex_q), -(-kv_len // flex_k))
    except (AttributeError, TypeError) as error:
        raise MaskError(
            f"from_flex takes a torch.nn.attention.flex_attention.BlockMask, got {type(block_mask).__name__}: {error}"
        ) from None
    batch, heads, n_q, n_k = state.shape
    (block_q, aligned_q), (block_k, aligned_k) = _own_block(flex_q), _own_block(flex_k)
    grid = Grid(q_len, kv_len, block_q, block_k)
    asked = torch.vmap(block_mask.mask_mod)  # a mask_mod is written for single positions
    state = state.view(batch * heads, n_q, n_k)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        positions = torch.broadcast_tensors(b, h, i, j)
        listed = state[b * heads + h, i // flex_q, j // flex_k]
        if not (listed == PARTIAL).any():
            return listed == FULL
        seen = asked(*(p.reshape(-1) for p in positions)).view(positions[0].shape)
        answer: Tensor = (listed == FULL) | ((listed != ABSENT) & seen)
        return answer

    rows, cols = all_blocks(grid, batch, heads, state.device)
    keys = None
    if aligned_q and aligned_k:  # a block of ours lies in one of theirs, which decides whether to ask
        i_flex = rows % max(grid.n_q, 1) * block_q // flex_q
        listed = state[rows // max(grid.n_q, 1), i_flex, cols * block_k // flex_k]
        rows, cols, listed = (t[listed != ABSENT] for t in (rows, cols, listed))
        own = torch.arange(rows.numel(), device=rows.device)
        keys = (torch.where(listed == FULL, FULL, own), grid.edge(rows, cols))
    return grid, predicate_lists(visible, grid, batch, heads, rows, cols, keys=keys)


def _own_block(size: int) -> tuple[int, bool]:
    """The largest block size of ours that divides theirs, and whether there is one."""
    own = max((s for s in range(16, 257, 16) if size % s == 0), default=0)
    return (own, True) if own else (128, False)


def _block_states(block_mask: Any, n_q: int, n_k: int) -> Tensor:
    """int8 (batch, heads, n_q, n_k): ABSENT, PARTIAL or FULL."""
    numbers = block_mask.kv_num_blocks
    shape = (1,) * (3 - numbers.dim()) + tuple(numbers.shape)
    states = torch.full((*shape[:2], n_q, n_k), ABSENT, dtype=torch.int8, device=numbers.device)
    for count, indices, kind in (
        (numbers, block_mask.kv_indices, PARTIAL),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, FULL),
    ):
        if count is None:
            continue
        indices = indices.reshape(*shape, -1)
        count = count.reshape(shape)
        valid = torch.arange(indices.shape[-1], device=count.device) < count[..., None]
        if shape[2] < n_q or (count > indices.shape[-1]).any() or (valid & ((indices < 0) | (indices >= n_k))).any():
            raise MaskError(f"the FlexAttention mask lists blocks outside its {n_q} x {n_k} blocks")
        where = valid[:, :, :n_q].nonzero().unbind(1)
        states[where[0], where[1], where[2], indices[where].long()] = kind
    return states


def to_flex(
    grid: Grid, lists: BlockLists | None, window: Interval, kv_lengths: Tensor | None, explicit: BlockLists
) -> Any:
    """A FlexAttention mask whose mask_mod reads lists, window and lengths; `explicit` are all three as lists."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    ids = explicit.tile_ids
    if grid.q_len % grid.block_q or grid.kv_len % grid.block_k:  # FlexAttention's full blocks lie inside the sequences
        ragged = grid.edge(entry_rows(explicit), explicit.indices.long()) > 0
        ids = torch.where(ragged, 0, ids)
    partial = _padded_rows(explicit, grid, ids != FULL)
    full = _padded_rows(explicit, grid, ids == FULL)
    table = None if lists is None else _tile_table(lists, grid)
    tiles = None if lists is None else lists.tiles
    per_head = lists is not None and lists.heads > 1
    per_batch = lists is not None and lists.batch > 1
    block_q, block_k = grid.block_q, grid.block_k
    lengths = kv_lengths

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        seen = in_interval(kv_idx - q_idx, window)
        if lengths is not None:
            seen = seen & (kv_idx < lengths[b if lengths.shape[0] > 1 else b * 0])
        if table is None or tiles is None:
            return seen
        tile = table[b if per_batch else b * 0, h if per_head else h * 0, q_idx // block_q, kv_idx // block_k]
        listed = tile == FULL
        if tiles.shape[0]:
            byte = tiles[tile.clamp(min=0), q_idx % block_q, kv_idx % block_k // 8].int()
            listed = listed | ((tile >= 0) & ((byte >> (kv_idx % 8)) & 1).bool())
        return seen & listed

    return FlexBlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=(block_q, block_k), mask_mod=mask_mod, seq_lengths=(grid.q_len, grid.kv_len)
    )


def _padded_rows(lists: BlockLists, grid: Grid, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(number int32 (batch, heads, n_q), key blocks int32 (batch, heads, n_q, n_k)) of the chosen entries."""
    rows, cols = entry_rows(lists)[chosen], lists.indices[chosen]
    n_rows = lists.indptr.numel() - 1
    counts = torch.bincount(rows, minlength=n_rows)
    within = torch.arange(rows.numel(), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    padded = torch.zeros(n_rows, grid.n_k, dtype=torch.int32, device=rows.device)
    padded[rows, within] = cols
    shape = (lists.batch, lists.heads, grid.n_q)
    return counts.int().view(shape), padded.view(*shape, grid.n_k)


def _tile_table(lists: BlockLists, grid: Grid) -> Tensor:
    """Tile id of every block, int32 (batch, heads, n_q, n_k), ABSENT where none is listed."""
    table = torch.full((lists.indptr.numel() - 1, grid.n_k), ABSENT, dtype=torch.int32, device=lists.indptr.device)
    table[entry_rows(lists), lists.indices.long()] = lists.tile_ids
    return table.view(lists.batch, lists.heads, grid.n_q, grid.n_k)
