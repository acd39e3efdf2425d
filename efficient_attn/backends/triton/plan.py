"""What the Triton kernels know of a list before they walk it (kernels/plan.py), kept for as long as the mask lives.

Everything is computed on the device of the list: no shape depends on it, and nothing waits for it.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...masks import MaskArrays
from .launch import launch


class Plan(NamedTuple):
    """The entries of a list, in each row clean ones first; see kernels/plan.py."""

    indices: Tensor  # int32 [entries + 1]
    tile_ids: Tensor  # int32 [entries + 1]
    clean: Tensor  # int32 [rows]
    live: Tensor  # int32 [rows]
    orders: dict[int, Tensor]  # lines of a batch element -> `order`


# Indices -> what else the plan depends on -> the other two arrays of the list, to recognise it by, and the plan.
_plans: Any = WeakTensorKeyDictionary()


def plan(
    kernels: Any, mask: MaskArrays, transposed: bool, q_len: int, kv_len: int, low: int | None, high: int | None
) -> Plan:
    """The plan of a list (`transposed`: of query blocks for each key block) under the window low <= j - i <= high."""
    indptr, indices, tile_ids = mask[8:11] if transposed else mask[4:7]
    assert indptr is not None and indices is not None and tile_ids is not None and mask.tiles is not None
    stream = torch.cuda.current_stream(indices.device).cuda_stream if indices.is_cuda else 0
    key = (transposed, mask[:4], mask.tiles.shape[0], q_len, kv_len, low, high, stream)
    kept = _plans.setdefault(indices, {})
    found = kept.get(key)
    if found is not None and found[0]() is indptr and found[1]() is tile_ids:
        return found[2]
    made = _make(kernels, mask, transposed, q_len, kv_len, low, high, indptr, indices, tile_ids)
    if not _recorded(indices):
        kept[key] = (weakref.ref(indptr), weakref.ref(tile_ids), made)
    return made


def order(found: Plan, mask: MaskArrays, heads: int) -> Tensor:
    """The block rows of each line, those with most blocks first: [batch * heads * blocks], or with one head for all.

    heads: lines of a batch element; where they are key heads, the rows of their query heads count together.
    """
    heads = 1 if mask.heads == 1 else heads
    if heads in found.orders:
        return found.orders[heads]
    work = found.live.view(mask.batch, heads, mask.heads // heads, -1).sum(2)
    made = work.argsort(dim=2, descending=True, stable=True).to(torch.int32).flatten()
    if not _recorded(work):
        found.orders[heads] = made
    return made


def _recorded(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured: what it computes is not there before it has run, and is not kept."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _make(
    kernels: Any,
    mask: MaskArrays,
    transposed: bool,
    q_len: int,
    kv_len: int,
    low: int | None,
    high: int | None,
    indptr: Tensor,
    indices: Tensor,
    tile_ids: Tensor,
) -> Plan:
    assert mask.tiles is not None
    rows = indptr.numel() - 1
    entries = indices.numel() + 1  # the walk reads one ahead
    empty = indices.new_empty
    made = Plan(empty(entries), empty(entries), empty(rows), empty(rows), {})
    blocks = rows // (mask.batch * mask.heads)
    numbers = (mask.batch, mask.heads, blocks, indices.numel(), mask.tiles.shape[0], low, high)
    view = kernels.Mask(indptr, indices, tile_ids, None, None, None, None, None, *numbers)
    launch(
        kernels.plan_kernel, rows, view, *made[:4], q_len, kv_len, mask.block_q, mask.block_k, transposed, 128, warps=4
    )
    return made
