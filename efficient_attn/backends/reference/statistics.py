"""The definition of the statistics of attention weights, in plain PyTorch, a slice of query rows at a time.

    entropy_i = -sum_j P_ij log P_ij        distance_i = sum_j P_ij |i + offset - j|
    received_j = sum_i r_i P_ij             map_IJ = sum of P_ij over a block of queries and a block of keys

and the gradient of the first and the third, whose cotangents are e_i and g_j:

    dS = P (C - rowsum(P C))                C_ij = r_i g_j - e_i log P_ij
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...masks import MaskArrays
from ..call import accumulation_dtype
from ..statistics import Found, Wanted
from .attention import group, logsumexp, masked_scores, softmax, ungroup

ROWS = 256  # query rows at a time, so that memory is O(n)


def attention_statistics(
    query: Tensor,  # (B, Hq, Nq, D)
    key: Tensor,  # (B, Hkv, Nk, D)
    bias: Tensor | None,  # each dimension 1 or full, of (B, Hq, Nq, Nk)
    mask: MaskArrays,
    scale: float,
    wanted: Wanted,
) -> Found:
    """Return what is `wanted` of the weights P (B, Hq, Nq, Nk) of this call."""
    Nq = query.shape[2]
    rows = ROWS if wanted.map_block == 0 else max(1, ROWS // wanted.map_block) * wanted.map_block
    parts, sums = [], []
    for first in range(0, max(Nq, 1), rows):
        block = slice(first, min(first + rows, Nq))
        biased = bias if bias is None or bias.shape[2] == 1 else bias[:, :, block]
        scores, _ = masked_scores(query[:, :, block], key, biased, mask, scale, first)
        weights = softmax(scores)
        parts.append(_of_rows(weights, scores, first, wanted))
        sums.append(_over_rows(weights, block, wanted))
    lse, entropy, *rest = (_joined(column, 2) for column in zip(*parts, strict=True))
    received = [part for part, _ in sums if part is not None]
    maps = [part for _, part in sums if part is not None]
    assert lse is not None and entropy is not None
    top_weights, top_keys, distance, nearby, shares = rest
    return Found(
        lse, entropy, top_weights, top_keys, torch.stack(received).sum(0) if received else None,
        distance, nearby, shares, torch.cat(maps, 2) if maps else None,
    )  # fmt: skip


def _joined(column: tuple[Tensor | None, ...], dim: int) -> Tensor | None:
    parts = [part for part in column if part is not None]
    return torch.cat(parts, dim) if parts else None


def _of_rows(weights: Tensor, scores: Tensor, first: int, wanted: Wanted) -> tuple[Tensor | None, ...]:
    """lse, entropy, the largest weights and their keys, distance, nearby and shares of some rows."""
    Nk = weights.shape[3]
    lse = logsumexp(scores)
    logs = torch.log(weights.masked_fill(weights == 0, 1.0))
    entropy = -(weights * logs).sum(-1)
    top_weights = top_keys = distance = nearby = shares = None
    if wanted.top:
        order = scores.sort(stable=True, dim=-1, descending=True).indices[..., : wanted.top]
        seen = scores.gather(-1, order) > -torch.inf
        missing = wanted.top - order.shape[-1]
        top_weights = F.pad(weights.gather(-1, order), (0, missing))
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
    return lse, entropy, top_weights, top_keys, distance, nearby, shares


def _over_rows(weights: Tensor, block: slice, wanted: Wanted) -> tuple[Tensor | None, Tensor | None]:
    """What some rows add to `received`, and their rows of the map."""
    received = cells = None
    if wanted.received:
        received = weights.sum(2)[None]
        if wanted.row_weights is not None:
            weighted = torch.einsum("bhqk,rbhq->rbhk", weights, wanted.row_weights[..., block])
            received = torch.cat([received, weighted])
    if wanted.map_block:
        size = wanted.map_block
        padded = F.pad(weights, (0, -weights.shape[3] % size, 0, -weights.shape[2] % size))
        cells = padded.unflatten(2, (-1, size)).unflatten(4, (-1, size)).sum((3, 5))
    return received, cells


def attention_statistics_backward(
    grad_entropy: Tensor,  # (B, Hq, Nq)
    grad_received: Tensor | None,  # (1 + R, B, Hq, Nk)
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    row_weights: Tensor | None,  # (R, B, Hq, Nq)
    mask: MaskArrays,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of query, key, bias and row_weights through entropy and received."""
    Nq, heads, kv_heads = query.shape[2], query.shape[1], key.shape[1]
    dtype = grad_entropy.dtype
    wide_key = group(key.to(dtype), heads)
    dq, dk = query.new_zeros(query.shape, dtype=dtype), torch.zeros_like(wide_key)
    dbias = None if bias is None else bias.new_zeros(bias.shape, dtype=dtype)
    dweights = None if row_weights is None else torch.zeros_like(row_weights)
    for first in range(0, Nq, ROWS):
        rows = slice(first, min(first + ROWS, Nq))
        biased = bias if bias is None or bias.shape[2] == 1 else bias[:, :, rows]
        scores, visible = masked_scores(query[:, :, rows], key, biased, mask, scale, first)
        weights = softmax(scores).masked_fill(~visible, 0.0)
        change = -grad_entropy[:, :, rows, None] * torch.log(weights.masked_fill(weights == 0, 1.0))
        if grad_received is not None:
            change = change + grad_received[0][:, :, None]
            if row_weights is not None and dweights is not None:
                change = change + torch.einsum("rbhq,rbhk->bhqk", row_weights[..., rows], grad_received[1:])
                dweights[..., rows] = torch.einsum("bhqk,rbhk->rbhq", weights, grad_received[1:])
        change = (weights * (change - (weights * change).sum(-1, keepdim=True))).masked_fill(~visible, 0.0)
        dq[:, :, rows] = change @ wide_key.masked_fill(~wide_key.isfinite(), 0.0) * scale
        finite = query[:, :, rows].to(dtype)
        dk += change.mT @ finite.masked_fill(~finite.isfinite(), 0.0) * scale
        if dbias is not None and biased is not None:
            summed = change.sum_to_size(biased.shape)
            dbias[:, :, rows if dbias.shape[2] > 1 else slice(None)] += summed
    return (
        dq.to(query.dtype), ungroup(dk, kv_heads).to(key.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype), dweights,
    )  # fmt: skip


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
) -> Tensor:
    """sum_i r_i f(P_ij dP_ij), (B, Hq, Nk), with dP_ij = dout_i . v_j and f the positive part or nothing."""
    heads, Nq = query.shape[1], query.shape[2]
    total = rows.new_zeros((), dtype=accumulation_dtype(query.dtype))
    for first in range(0, max(Nq, 1), ROWS):
        block = slice(first, min(first + ROWS, Nq))
        biased = bias if bias is None or bias.shape[2] == 1 else bias[:, :, block]
        scores, visible = masked_scores(query[:, :, block], key, biased, mask, scale, first)
        weights = softmax(scores)
        gradient = grad_out[:, :, block].to(weights.dtype) @ group(value.to(weights.dtype), heads).mT
        product = (weights * gradient).masked_fill(~visible, 0.0)
        if positive:
            product = product.clamp(min=0.0)
        total = total + torch.einsum("bhqk,bq->bhk", product, rows[:, block].to(weights.dtype))
    return total
