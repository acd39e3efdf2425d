"""A cache of keys or values as flash-attn has it: where a row of a batch element lies, and what is done there.

(B, length, Hkv, D), or pages: (blocks, block length, Hkv, D) and a table (B, blocks of an element) of where they lie.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError


class Rows(NamedTuple):
    """Where the batch elements of a call lie in a cache, and how many rows of each are filled."""

    lengths: Tensor  # int64 (B)
    where: Tensor | None  # int64 (B), the cache's rows; None: its own, in order
    table: Tensor | None  # int64 (B, blocks)
    capacity: int


def rows_of(
    B: int, k_cache: Tensor, v_cache: Tensor, lengths: int | Tensor | None, where: Tensor | None, table: Tensor | None
) -> Rows:
    """The rows of a call, checked: everything lies within the cache.

    Raises:
        InputError: caches that differ, lengths, places or blocks that are not there.
    """
    device = k_cache.device
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise InputError(f"k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} are of different rows")
    for name, given in (("cache_batch_idx", where), ("block_table", table)):
        if given is not None and (given.is_floating_point() or given.shape[0] != B):
            raise InputTypeError(f"{name} must be integers, {B} rows of them, got {given.dtype} {tuple(given.shape)}")
        if given is not None and given.numel() and not 0 <= int(given.min()) <= int(given.max()) < k_cache.shape[0]:
            raise InputError(f"{name} must lie in 0..{k_cache.shape[0] - 1}, the first dimension of the cache")
    if where is None and table is None and k_cache.shape[0] != B:
        raise InputError(f"the cache is for a batch of {k_cache.shape[0]}, q of {B}; say which with cache_batch_idx")
    capacity = k_cache.shape[1] if table is None else table.shape[1] * k_cache.shape[1]
    filled = torch.as_tensor(capacity if lengths is None else lengths, device=device).long().expand(B)
    if filled.numel() and not 0 <= int(filled.min()) <= int(filled.max()) <= capacity:
        raise InputError(f"cache_seqlens must lie in 0..{capacity}, the rows of the cache; got {filled.tolist()}")
    return Rows(filled, None if where is None else where.long(), None if table is None else table.long(), capacity)


def read_cache(cache: Tensor, table: Tensor) -> Tensor:
    """Pages in their order, (B, blocks of an element * block length, Hkv, D)."""
    return cache[table.long()].flatten(1, 2)


def append(cache: Tensor, new: Tensor, rows: Rows) -> None:
    """Write new (B, n, Hkv, D) behind the filled rows of each element, in place.

    Raises:
        InputError: there is no room.
    """
    B, n = new.shape[:2]
    if rows.lengths.numel() != B or (B and int(rows.lengths.max()) + n > rows.capacity):
        raise InputError(
            f"{n} rows behind {rows.lengths.tolist()} do not fit a cache of {rows.capacity} rows; make it longer"
        )
    at = rows.lengths[:, None] + torch.arange(n, device=cache.device)  # [B, n]
    if rows.table is None:
        elements = torch.arange(B, device=cache.device) if rows.where is None else rows.where
        cache[elements[:, None], at] = new.to(cache.dtype)
    else:
        cache[rows.table.gather(1, at // cache.shape[1]), at % cache.shape[1]] = new.to(cache.dtype)
