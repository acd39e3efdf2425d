"""In which order Hopper's kernels do the blocks of a list: the longest first, so that all processors end together.

Kept for as long as the mask lives. Computed on the device of the list; nothing waits for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...masks import MaskArrays

# Row pointers of a list -> heads and stream -> the order.
_orders: Any = WeakTensorKeyDictionary()


def query_order(mask: MaskArrays, heads: int) -> Tensor | None:
    """The blocks of queries of each list, int32 [mask.batch * (1 or heads) * blocks]; None: there is no list."""
    return _order(mask.indptr, mask, heads)


def key_order(mask: MaskArrays, heads: int) -> Tensor | None:
    """The same of the blocks of keys; `heads`: key heads, the rows of whose query heads count together."""
    return _order(mask.t_indptr, mask, heads)


def _order(indptr: Tensor | None, mask: MaskArrays, heads: int) -> Tensor | None:
    if indptr is None:
        return None
    heads = 1 if mask.heads == 1 else heads
    on_gpu = indptr.is_cuda
    key = (mask.batch, mask.heads, heads, torch.cuda.current_stream(indptr.device).cuda_stream if on_gpu else 0)
    kept = _orders.setdefault(indptr, {})
    if key not in kept:
        entries = indptr.diff().view(mask.batch, heads, mask.heads // heads, -1).sum(2)
        made = entries.argsort(dim=2, descending=True, stable=True).to(torch.int32).flatten()
        if on_gpu and torch.cuda.is_current_stream_capturing():
            return made  # not there before the graph has run
        kept[key] = made
    return kept[key]
