"""Masks with their definitions as bool tensors, for the tests of masks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from efficient_attn import BlockMask
from efficient_attn.masks import lists as mask_build

# (q_len, kv_len, block_size): ragged, rectangular, tiny, empty
SIZES = [
    (67, 67, (16, 16)),
    (100, 257, (64, 32)),
    (300, 130, (48, 112)),
    (128, 256, (128, 128)),
    (1, 1, (128, 128)),
    (40, 1, (16, 256)),
    (0, 33, (16, 16)),
    (33, 0, (16, 16)),
]
sizes = pytest.mark.parametrize("q_len, kv_len, block_size", SIZES)


def random_bits(q_len: int, kv_len: int, *, batch: int = 2, heads: int = 3, seed: int = 0) -> Tensor:
    """bool (batch, heads, q_len, kv_len) with empty, full, sparse and repeated regions."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, 4, (batch, heads, -(-q_len // 23), -(-kv_len // 37)), generator=generator)
    kind = cells.repeat_interleave(23, 2).repeat_interleave(37, 3)[:, :, :q_len, :kv_len]
    sparse = torch.rand(kind.shape, generator=generator) < 0.1
    stripes = ((torch.arange(q_len)[:, None] + torch.arange(kv_len)) % 3 == 0).expand(kind.shape)
    return torch.where(kind == 0, False, torch.where(kind == 1, True, torch.where(kind == 2, sparse, stripes)))


def seen_through(
    q_len: int, kv_len: int, window: tuple[int, int] | None = None, offset: int = 0, lengths: Tensor | None = None
) -> Tensor:
    """The definition of window and lengths, bool (1 | B, 1, q_len, kv_len)."""
    i, j = torch.arange(q_len)[:, None] + offset, torch.arange(kv_len)
    left, right = window or (-1, -1)
    seen = ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))
    return seen & (j < (torch.tensor([kv_len]) if lengths is None else lengths)[:, None, None, None])


def variants(q_len: int, kv_len: int, block_size: tuple[int, int], seed: int = 0) -> list[tuple[BlockMask, Tensor]]:
    """Masks with every combination of list, window and lengths, each with its definition."""
    bits = random_bits(q_len, kv_len, seed=seed)
    lengths = torch.tensor([kv_len // 3, kv_len])
    offset = kv_len - q_len
    made = []
    for listed in (False, True):
        for window in (None, (9, 4), (-1, 0), (2, -1)):
            for given in (None, lengths):
                mask = BlockMask.from_dense(bits, block_size=block_size) if listed else BlockMask(q_len, kv_len)
                mask = mask if window is None else mask.with_window(window, alignment="bottom_right")
                mask = mask if given is None else mask.with_lengths(given)
                seen = seen_through(q_len, kv_len, window, offset, given)
                made.append((mask, seen & bits if listed else seen))
    return made


def assert_draws(mask: BlockMask, expected: Tensor) -> None:
    drawn = mask.to_dense()
    assert drawn.dtype == torch.bool and drawn.shape == mask.shape
    assert torch.equal(*torch.broadcast_tensors(drawn, expected))


def assert_valid(mask: BlockMask) -> None:
    """The checked constructor accepts what the builders made without checks."""
    fields = {field.name: getattr(mask, field.name) for field in dataclasses.fields(mask)}
    assert BlockMask(**fields) == mask


def assert_canonical(mask: BlockMask) -> None:
    """No empty block, no partial block that is full, no tile twice or unused, tiles in order of appearance."""
    grid, lists = mask.grid, mask.lists
    rows = mask_build.entry_rows(lists)
    partial = lists.tile_ids >= 0
    counted = mask_build.unpack_bits(lists.tiles).flatten(1).sum(1)[lists.tile_ids[partial].long()]
    assert (counted > 0).all() and (counted < grid.pairs(rows, lists.indices.long())[partial]).all()
    assert lists.tiles.unique(dim=0).shape == lists.tiles.shape
    seen = lists.tile_ids[partial].tolist()
    assert list(dict.fromkeys(seen)) == list(range(lists.tiles.shape[0]))
