"""Statistics of attention weights by the C++ kernels: the same function as `reference.statistics`, tile by tile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...masks import MaskArrays
from ..call import accumulation_dtype, lse_without_keys, readable, refuse_orders
from ..statistics import Found, Wanted
from ..words import pack_attention, pack_statistics
from .attention import _cpu

NEEDS_TRANSPOSED = False
CHUNKS = 16  # runs of query rows that sum up apart: a fixed number, so that the bits do not depend on the threads


def attention_statistics(
    query: Tensor,  # (B, Hq, Nq, D)
    key: Tensor,  # (B, Hkv, Nk, D)
    bias: Tensor | None,
    mask: MaskArrays,
    scale: float,
    wanted: Wanted,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
) -> Found:
    """Return what is `wanted` of the weights of this call, as `reference.statistics.attention_statistics`."""
    refuse_orders(mask, "statistics of the weights")
    query, key = readable(query), readable(key)
    asked = wanted.top
    if sinks is not None:
        wanted = wanted._replace(top=max(asked, 1))
    (B, Hq, Nq, _), Nk = query.shape, key.shape[2]
    dtype = accumulation_dtype(query.dtype)
    rows = max(64, -(-Nq // CHUNKS))
    rows = -(-rows // max(wanted.map_block, 1)) * max(wanted.map_block, 1)
    chunks = max(1, -(-Nq // rows))
    weightings = 0 if wanted.row_weights is None else wanted.row_weights.shape[0]

    runs = B * Hq * Nq * Nk > 0
    rows_of = torch.empty if runs else torch.zeros  # the kernel writes every row

    def result(*shape: int, when: bool = True) -> Any:
        return rows_of((B, Hq, *shape), dtype=dtype) if when else None

    has_places = wanted.position_offset is not None
    found = Found(
        lse=lse_without_keys(torch.empty((B, Hq, Nq), dtype=dtype), sinks),
        entropy=result(Nq),
        top_weights=result(Nq, wanted.top, when=wanted.top > 0),
        top_keys=torch.full((B, Hq, Nq, wanted.top), -1, dtype=torch.int32) if wanted.top else None,
        received=torch.zeros((1 + weightings, B, Hq, chunks, Nk), dtype=dtype) if wanted.received else None,
        distance=result(Nq, when=has_places),
        nearby=result(Nq, when=has_places),
        shares=result(Nq, wanted.set_count, when=wanted.key_sets is not None),
        map=torch.zeros((B, Hq, *(-(-n // wanted.map_block) for n in (Nq, Nk))), dtype=dtype)
        if wanted.map_block
        else None,
    )
    if runs:
        # The kernel reads no values and writes no output: the key stands for both.
        call = (query, key, key, bias, query, found.lse, mask, scale, 0.0, None, None)
        kept, words = pack_attention(*call, softcap, sinks, diagonals)
        also_kept, more = pack_statistics(found, wanted, rows)
        _cpu.attention_statistics(words + more, torch.get_num_threads())
        del kept, also_kept
    if sinks is not None:
        found = found._replace(entropy=_beside_sinks(found, sinks))
        found = found if asked else found._replace(top_weights=None, top_keys=None)
    return found if found.received is None else found._replace(received=found.received.sum(3))


def _beside_sinks(found: Found, sinks: Tensor) -> Tensor:
    """-sum P log P, for which the kernel takes the rows of P to add up to 1: beside a sink it has counted
    lse less the largest score, of the keys and the sink, also for the sink's share."""
    assert found.top_weights is not None
    sinks = sinks.to(found.lse.dtype)[:, None]
    largest = torch.maximum(found.lse + found.top_weights[..., 0].log(), sinks)
    seen = found.lse > -torch.inf
    return torch.where(seen, found.entropy - (found.lse - largest) * torch.exp(sinks - found.lse), found.entropy)
