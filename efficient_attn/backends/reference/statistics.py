"""The definition of the statistics of attention weights, in plain PyTorch, a slice of query rows at a time.

    entropy_i = -sum_j P_ij log P_ij        distance_i = sum_j P_ij |i + offset - j|
    received_j = sum_i r_i P_ij             map_IJ = sum of P_ij over a block of queries and a block of keys

and the gradient of the first and the third, whose cotangents are e_i and g_j:

    dS = P (C - rowsum(P C))                C_ij = r_i g_j - e_i (log P_ij + 1)
    dsink = -sum_i exp(sink - lse_i) rowsum(P C)_i

Scores are those of `attention`: beside a sink, which is no key, a row of P adds up to less than 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...masks import MaskArrays
from ..call import accumulation_dtype
from ..statistics import Found, Wanted
from .attention import diagonal_index, group, logsumexp, masked_scores, products, softmax, ungroup

NEEDS_TRANSPOSED = False
ROWS = 256  # query rows at a time at most, so that memory is O(n)
PAIRS = 2**24  # and pairs of them, of all batch elements and heads


def attention_statistics(
    query: Tensor,  # (B, Hq, Nq, D)
    key: Tensor,  # (B, Hkv, Nk, D)
    bias: Tensor | None,  # each dimension 1 or full, of (B, Hq, Nq, Nk)
    mask: MaskArrays,
    scale: float,
    wanted: Wanted,
    softcap: float = 0.0,
    sinks: Tensor | None = None,  # (Hq)
    diagonals: Tensor | None = None,  # (1 | B, 1 | Hq, Nq + Nk - 1) in the accumulation dtype
) -> Found:
    """Return what is `wanted` of the weights P (B, Hq, Nq, Nk) of this call."""
    parts, received, cells = [], None, None
    for block in _slices(query, key):
        biased = bias if bias is None or bias.shape[2] == 1 else bias[:, :, block]
        scores, _ = masked_scores(query[:, :, block], key, biased, mask, scale, block.start, None, softcap, diagonals)
        weights = softmax(scores, sinks)
        parts.append((logsumexp(scores, sinks), *_of_rows(weights, scores, block.start, wanted)))
        if wanted.received:
            added = _received(weights, block, wanted)
            received = added if received is None else received.add_(added)
        if wanted.map_block:
            counts = (-(-n // wanted.map_block) for n in (query.shape[2], key.shape[2]))
            cells = weights.new_zeros(*weights.shape[:2], *counts) if cells is None else cells
            _add_to_map(cells, weights, block.start, wanted.map_block)
    lse, entropy, *rest = (_joined(column) for column in zip(*parts, strict=True))
    assert lse is not None and entropy is not None
    top_weights, top_keys, distance, nearby, shares = rest
    return Found(lse, entropy, top_weights, top_keys, received, distance, nearby, shares, cells)


def _slices(query: Tensor, key: Tensor) -> list[slice]:
    """Query rows that are worked off together; one empty slice where there are none."""
    (B, Hq, Nq, _), Nk = query.shape, key.shape[2]
    rows = max(1, min(ROWS, PAIRS // max(1, B * Hq * Nk)))
    return [slice(first, min(first + rows, Nq)) for first in range(0, max(Nq, 1), rows)]


def _joined(column: tuple[Tensor | None, ...]) -> Tensor | None:
    parts = [part for part in column if part is not None]
    return torch.cat(parts, 2) if parts else None


def _of_rows(weights: Tensor, scores: Tensor, first: int, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """Entropy, the largest weights and their keys, distance, nearby and shares of some rows."""
    Nk = weights.shape[3]
    entropy = -(weights * _logs(weights)).sum(-1)
    top_weights = top_keys = distance = nearby = shares = None
    if wanted.top:
        order = scores.sort(stable=True, dim=-1, descending=True).indices[..., : wanted.top]
        broken = weights.isnan().any(-1, keepdim=True)  # a NaN score: no weight of the row is known
        seen = (scores.gather(-1, order) > -torch.inf) & ~broken
        missing = wanted.top - order.shape[-1]
        top_weights = F.pad(weights.gather(-1, order), (0, missing)).masked_fill(broken, torch.nan)
        top_keys = F.pad(order.masked_fill(~seen, -1), (0, missing), value=-1).int()
    if wanted.position_offset is not None:
        places = torch.arange(weights.shape[2], device=weights.device) + first + wanted.position_offset
        gap = (places[:, None] - torch.arange(Nk, device=weights.device)).abs()
        distance = (weights * gap).sum(-1)
        nearby = (weights * (gap <= wanted.nearby)).sum(-1)
    if wanted.key_sets is not None:
        bits = torch.arange(wanted.set_count, device=weights.device)
        members = ((wanted.key_sets[..., None] >> bits) & 1).to(weights.dtype)  # (1 | B, Nk, S)
        shares = weights @ members[:, None]
    return entropy, top_weights, top_keys, distance, nearby, shares


def _logs(weights: Tensor) -> Tensor:
    """log P, 0 where P is 0."""
    return torch.log(weights.masked_fill(weights == 0, 1.0))


def _received(weights: Tensor, block: slice, wanted: Wanted) -> Tensor:
    """What some rows add to `received`."""
    received = weights.sum(2)[None]
    if wanted.row_weights is None:
        return received
    weighted = torch.einsum("bhqk,rbhq->rbhk", weights, wanted.row_weights[..., block])
    return torch.cat([received, weighted])


def _add_to_map(cells: Tensor, weights: Tensor, first: int, size: int) -> None:
    """Add some rows, of which the first is `first`, to the map: they may begin and end within a cell."""
    rows, columns = weights.shape[2:]
    padded = F.pad(weights, (0, -columns % size, first % size, -(first + rows) % size))
    sums = padded.unflatten(3, (-1, size)).sum(4).unflatten(2, (-1, size)).sum(3)
    cells[:, :, first // size : first // size + sums.shape[2]] += sums


class Gradients(NamedTuple):
    """Of entropy and received by each of these, shaped and typed like it; None where there is none."""

    query: Tensor
    key: Tensor
    bias: Tensor | None
    row_weights: Tensor | None
    sinks: Tensor | None
    diagonals: Tensor | None


def attention_statistics_backward(
    grad_entropy: Tensor,  # (B, Hq, Nq)
    grad_received: Tensor | None,  # (1 + R, B, Hq, Nk)
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    row_weights: Tensor | None,  # (R, B, Hq, Nq)
    mask: MaskArrays,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
) -> Gradients:
    """Return the gradients through entropy and received: any backend's, for the weights are made once more here."""
    heads, kv_heads, Nk = query.shape[1], key.shape[1], key.shape[2]
    dtype = grad_entropy.dtype
    wide_key = group(key.to(dtype), heads)
    wide_key = wide_key.masked_fill(~wide_key.isfinite(), 0.0)
    dq, dk = query.new_zeros(query.shape, dtype=dtype), torch.zeros_like(wide_key)
    dbias = None if bias is None else bias.new_zeros(bias.shape, dtype=dtype)
    dweights = None if row_weights is None else torch.zeros_like(row_weights)
    dsinks = None if sinks is None else sinks.new_zeros(sinks.shape, dtype=dtype)
    by_position = None if diagonals is None else diagonals.new_zeros(*query.shape[:2], diagonals.shape[2])
    for rows in _slices(query, key):
        own = query[:, :, rows]
        biased = bias if bias is None or bias.shape[2] == 1 else bias[:, :, rows]
        scores, visible = masked_scores(own, key, biased, mask, scale, rows.start, None, softcap, diagonals)
        weights = softmax(scores, sinks).masked_fill(~visible, 0.0)
        logs = (
            _logs(weights) if sinks is None else _logs(weights) + 1.0
        )  # where a row adds up to 1 that changes nothing
        change = -grad_entropy[:, :, rows, None] * logs
        if grad_received is not None:
            change = change + grad_received[0][:, :, None]
            if row_weights is not None and dweights is not None:
                change = change + torch.einsum("rbhq,rbhk->bhqk", row_weights[..., rows], grad_received[1:])
                dweights[..., rows] = torch.einsum("bhqk,rbhk->rbhq", weights, grad_received[1:])
        mean = (weights * change).sum(-1, keepdim=True)
        change = (weights * (change - mean)).masked_fill(~visible, 0.0)
        if dbias is not None and biased is not None:
            dbias[:, :, rows if dbias.shape[2] > 1 else slice(None)] += change.sum_to_size(biased.shape)
        if sinks is not None and dsinks is not None:
            share = torch.exp(sinks.to(dtype)[:, None] - logsumexp(scores, sinks))
            dsinks -= (share * mean[..., 0]).sum((0, 2))
        if by_position is not None:
            index = diagonal_index(own.shape[2], Nk, query.device, rows.start).flatten()
            by_position.index_add_(2, index, change.flatten(2))
        if softcap > 0.0:
            slope = 1.0 - torch.tanh(products(own, key, scale) / softcap).square()
            change = torch.where(visible, change * slope, 0.0)
        dq[:, :, rows] = change @ wide_key * scale
        finite = own.to(dtype)
        dk += change.mT @ finite.masked_fill(~finite.isfinite(), 0.0) * scale
    return Gradients(
        dq.to(query.dtype),
        ungroup(dk, kv_heads).to(key.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
        dweights,
        None if dsinks is None or sinks is None else dsinks.to(sinks.dtype),
        None if by_position is None or diagonals is None else by_position.sum_to_size(diagonals.shape),
    )


def times_gradient(
    grad_out: Tensor,  # (B, Hq, Nq, Dv)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: MaskArrays,
    scale: float,
    rows: Tensor,  # (B, Nq)
    positive: bool,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
) -> Tensor:
    """sum_i r_i f(P_ij dP_ij), (B, Hq, Nk), with dP_ij = dout_i . v_j and f the positive part or nothing."""
    heads = query.shape[1]
    total = rows.new_zeros((), dtype=accumulation_dtype(query.dtype))
    for block in _slices(query, key):
        biased = bias if bias is None or bias.shape[2] == 1 else bias[:, :, block]
        scores, visible = masked_scores(
            query[:, :, block], key, biased, mask, scale, block.start, None, softcap, diagonals
        )
        weights = softmax(scores, sinks)
        gradient = grad_out[:, :, block].to(weights.dtype) @ group(value.to(weights.dtype), heads).mT
        product = (weights * gradient).masked_fill(~visible, 0.0)
        if positive:
            product = product.clamp(min=0.0)
        total = total + torch.einsum("bhqk,bq->bhk", product, rows[:, block].to(weights.dtype))
    return total
