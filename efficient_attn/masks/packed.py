"""Sequences packed one behind the other, queries and keys of different lengths, as one mask of blocks.

Sequence b has queries cu_q[b] .. cu_q[b + 1] and keys cu_k[b] .. cu_k[b + 1]. Its query i sees its keys j with
-left <= j - i - offset_b <= right, both counted from the sequence's start; offset_b is 0 (top-left), or the number of
its keys less that of its queries (bottom-right).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from .block_mask import BlockMask
from .lists import Grid, predicate_lists

BLOCK = 128


def starts_of(name: str, cu_seqlens: Tensor | Sequence[int], total: int) -> tuple[int, ...]:
    """The places at which sequences begin, and the end of the last: checked integers.

    Raises:
        InputTypeError: not integers. InputError: they do not begin with 0, decrease, or end beyond `total`.
    """
    if isinstance(cu_seqlens, Tensor) and (cu_seqlens.is_floating_point() or cu_seqlens.dim() != 1):
        raise InputTypeError(
            f"{name} must be integers (batch + 1), got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    found = tuple(cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)
    ascending = all(a <= b for a, b in itertools.pairwise(found))
    if not found or found[0] != 0 or not ascending or found[-1] > total:
        raise InputError(
            f"{name} must begin with 0, never decrease and end at most at the {total} rows that there are; got {found}"
        )
    return found


def offset_of(q_len: int, kv_len: int, bottom_right: bool) -> int:
    """The key of its sequence at which a sequence's first query stands."""
    return kv_len - q_len if bottom_right else 0


def packed_mask(
    cu_q: tuple[int, ...],
    cu_k: tuple[int, ...],
    total_q: int,
    total_k: int,
    *,
    window: tuple[int, int] = (-1, -1),
    bottom_right: bool = True,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The mask (total_q, total_k) of packed sequences; the last 32 are kept. Rows behind the last sequence see nothing.

    Raises:
        InputError: another number of sequences of queries than of keys.
    """
    if len(cu_q) != len(cu_k):
        raise InputError(f"there are {len(cu_q) - 1} sequences of queries and {len(cu_k) - 1} of keys")
    left, right = window
    place = str(torch.device(device))
    if torch.compiler.is_compiling():
        *lists, t_indptr, t_indices, t_tile_ids = packed_lists(
            list(cu_q), list(cu_k), total_q, total_k, left, right, bottom_right, place
        )
        fields = dict(zip(("indptr", "indices", "tile_ids", "tiles"), lists, strict=True))
        return BlockMask.unchecked((t_indptr, t_indices, t_tile_ids), q_len=total_q, kv_len=total_k, **fields)
    return _kept(cu_q, cu_k, total_q, total_k, left, right, bottom_right, place)


# What torch.compile sees: one operator that looks the lists up, whose sizes are constants of the graph.
@torch.library.custom_op("efficient_attn::packed_lists", mutates_args=())
def packed_lists(
    cu_q: list[int], cu_k: list[int], total_q: int, total_k: int, left: int, right: int, bottom_right: bool, device: str
) -> list[Tensor]:
    """indptr, indices, tile_ids, tiles and the three transposed lists of `packed_mask`."""
    return [x.clone() for x in _lists(cu_q, cu_k, total_q, total_k, left, right, bottom_right, device)]


@packed_lists.register_fake
def _packed_lists_fake(
    cu_q: list[int], cu_k: list[int], total_q: int, total_k: int, left: int, right: int, bottom_right: bool, device: str
) -> list[Tensor]:
    lists = _lists(cu_q, cu_k, total_q, total_k, left, right, bottom_right, "cpu")
    return [torch.empty(x.shape, dtype=x.dtype, device=device) for x in lists]


def _lists(
    cu_q: Sequence[int], cu_k: Sequence[int], total_q: int, total_k: int, left: int, right: int, bottom_right: bool,
    device: str,
) -> list[Tensor]:  # fmt: skip
    starts = tuple(map(int, cu_q)), tuple(map(int, cu_k))
    mask = _kept(*starts, int(total_q), int(total_k), int(left), int(right), bottom_right, device)
    return [x for x in mask.arrays(True) if isinstance(x, Tensor)]


@functools.lru_cache(maxsize=32)
def _kept(*arguments: object) -> BlockMask:
    # In a thread of its own: what is kept must not depend on the modes (inference, fake tensors) of who asks first.
    with ThreadPoolExecutor(max_workers=1) as clean:
        return clean.submit(_make, *arguments).result()  # type: ignore[arg-type]


def _make(
    cu_q: tuple[int, ...], cu_k: tuple[int, ...], total_q: int, total_k: int, left: int, right: int,
    bottom_right: bool, device: str,
) -> BlockMask:  # fmt: skip
    grid = Grid(total_q, total_k, BLOCK, BLOCK)
    starts_q, starts_k = torch.tensor(cu_q), torch.tensor(cu_k)
    # j - i in rows of the pack at which a sequence's first query stands, and none for rows behind the last sequence
    shifts = torch.cat(
        [(starts_k - starts_q)[1:] if bottom_right else (starts_k - starts_q)[:-1], torch.zeros(1).long()]
    )
    own_q, own_k = _sequences(starts_q, total_q, behind=len(cu_q) - 1), _sequences(starts_k, total_k, behind=-1)
    first_q, last_q = _ends(own_q, grid.n_q)
    first_k, last_k = _ends(own_k.where(own_k >= 0, len(cu_k)), grid.n_k)
    rows, cols = ((first_q[:, None] <= last_k) & (first_k <= last_q[:, None])).nonzero().unbind(1)

    # Blocks within one sequence are alike where they stand alike to the diagonal; far from it, all are full or empty.
    at = cols * BLOCK - rows * BLOCK - shifts[first_q[rows]]  # j - i - offset of a block's first query and key
    one = (first_q[rows] == last_q[rows]) & (first_k[cols] == last_k[cols]) & (first_q[rows] == first_k[cols])
    left, right = (side if side >= 0 else total_q + total_k for side in (left, right))
    outside = one & ((at + BLOCK - 1 < -left) | (at - (BLOCK - 1) > right))
    full = one & (at - (BLOCK - 1) >= -left) & (at + BLOCK - 1 <= right)
    rows, cols, at, one, full = (x[~outside] for x in (rows, cols, at, one, full))
    kind = torch.where(full, 0, torch.where(one, 1, 2))
    place = torch.where(full, 0, torch.where(one, at, torch.arange(rows.numel())))

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        shift = j - i - shifts[own_q[i]]
        return (own_q[i] == own_k[j]) & (shift >= -left) & (shift <= right)

    lists = predicate_lists(visible, grid, 1, 1, rows, cols, keys=(kind, place, grid.edge(rows, cols)))
    mask = BlockMask.from_lists(grid, lists).to(device)
    mask.keep_transposed()
    return mask


def _sequences(starts: Tensor, total: int, *, behind: int) -> Tensor:
    """The sequence of each row, int64 (total)."""
    rows = torch.arange(total)
    return torch.where(rows < starts[-1], torch.bucketize(rows, starts[1:], right=True), behind)


def _ends(own: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The first and the last sequence of each block, for rows in their order."""
    first = torch.arange(blocks) * BLOCK
    return own[first], own[(first + BLOCK - 1).clamp(max=max(own.numel() - 1, 0))]
