"""Lists of tokens in the order of their buckets, made natively (csrc/cpu/buckets.h): those of
`patterns.sorted_tokens.sorted_lists`, which says what they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ...masks import BlockMask, Part
from ...masks.lists import BlockLists, Grid
from ...patterns.buckets import Buckets
from ...patterns.sorted_tokens import BLOCK
from .attention import _cpu


def serves(found: Buckets) -> bool:
    """Whether the lists of these buckets can be made here."""
    return _cpu is not None and found.query.is_cpu and found.query_chunk is None


def sorted_part(found: Buckets, r: int, *, offset: int | None, others: bool) -> Part:
    """The pairs of round r without those of earlier rounds, in the order of its buckets; arguments as `sorted_lists`
    has them."""
    query, key = found.query.contiguous(), found.key.contiguous()
    (_, batch, heads, q_len), (key_heads, kv_len) = query.shape, key.shape[2:]
    query_order = _order(query[r], None if found.query_order is None else found.query_order[r])
    key_order = _order(key[r], None if found.key_order is None else found.key_order[r])
    addresses = tuple(t.data_ptr() for t in (query, key, query_order, key_order))
    made = _cpu.BucketLists(addresses, r, (batch, heads, key_heads, q_len, kv_len), offset, others)
    grid = Grid(q_len, kv_len, BLOCK, BLOCK)
    indptr = torch.empty(batch * heads * grid.n_q + 1, dtype=torch.int64, device="cpu")
    indices, ids = (torch.empty(made.entries, dtype=torch.int32, device="cpu") for _ in range(2))
    tiles = torch.empty(made.tile_count, BLOCK, BLOCK // 8, dtype=torch.uint8, device="cpu")
    made.write(*(t.data_ptr() for t in (indptr, indices, ids, tiles)))
    lists = BlockLists(batch, heads, indptr, indices, ids, tiles)
    return Part(BlockMask.from_lists(grid, lists), query_order, key_order)


def _order(buckets: Tensor, order: Tensor | None) -> Tensor:
    """int32 (B * H, N): the tokens of (B, H, N) sorted by bucket."""
    if order is not None:
        return order.flatten(0, 1).int().contiguous()
    made = torch.empty(buckets.shape, dtype=torch.int32, device="cpu").flatten(0, 1)
    _cpu.sort_buckets(buckets.data_ptr(), *made.shape, made.data_ptr())
    return made
