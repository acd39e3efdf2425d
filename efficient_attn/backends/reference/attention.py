"""The definition of every operator, in plain PyTorch. Read this file first; it is slow, clear and runs anywhere.

    s_ij = cap(scale * q_i . k_j) + bias_ij + diagonals[i - j + Nk - 1]      for visible pairs, -inf otherwise
    lse_i = log (exp(sink) + sum_j exp(s_ij))       P_ij = exp(s_ij - lse_i)
    out_i = sum_j Z_ij P_ij v_j                     Z_ij = keep_ij / (1 - dropout_p)

and its gradient, with delta_i = dout_i . out_i - dlse_i:

    dV = (Z P)^T dO     dP = Z (dO V^T)     dS = P (dP - delta)     dQ = scale dS K     dK = scale dS^T Q     dbias = dS

The cap is cap(x) = softcap tanh(x / softcap), or nothing where softcap is 0; dQ and dK take dS times its derivative. A
sink is a number of each head that stands in the sum beside the keys and has no value: dsink = -sum exp(sink - lse)
delta. `diagonals` is a bias by relative position, whose gradient are the sums of dS along diagonals.

The weights Z P may be returned too, of each head or averaged over the heads. Their gradient dW, for an average an equal
share for every head, adds to dO V^T, and sum_j dW_ij Z_ij P_ij to delta_i.

Half precision is computed in float32. Masked pairs are selected away, never multiplied by zero, so that a NaN behind a
mask stays behind it. A row without a visible key gives out = 0, lse = -inf and no gradient. Memory is O(Nq * Nk) here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...masks import MaskArrays
from ..call import Call, accumulation_dtype


class Piece(NamedTuple):
    """Some pairs of a larger call, for callers that walk it piece by piece: what the mask shows of them, and where each
    batch element, head, query and key of the piece stands."""

    visible: Tensor  # bool, broadcasts to (B, Hq, Nq, Nk)
    places: tuple[Tensor, Tensor, Tensor, Tensor]  # b, h, i and j, int64 vectors
    kv_len: int  # keys of the larger call


def not_supported_reasons(call: Call) -> list[str]:
    """Why this backend cannot serve `call`: never, it is the definition."""
    return []


def attention_forward(
    query: Tensor,  # (B, Hq, Nq, D)
    key: Tensor,  # (B, Hkv, Nk, D)
    value: Tensor,  # (B, Hkv, Nk, Dv)
    bias: Tensor | None,  # each dimension 1 or full, of (B, Hq, Nq, Nk)
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,  # (Hq)
    diagonals: Tensor | None = None,  # (1 | B, 1 | Hq, Nq + Nk - 1) in the accumulation dtype
) -> tuple[Tensor, Tensor]:
    """Return out (B, Hq, Nq, Dv) in the query's dtype and lse (B, Hq, Nq) in the accumulation dtype."""
    scores, visible = masked_scores(query, key, bias, mask, scale, softcap=softcap, diagonals=diagonals)
    weights = softmax(scores, sinks)
    if dropout_p > 0.0:
        weights = apply_dropout(weights, dropout_p, dropout_seed)
    out = select_matmul(weights, visible, group(value.to(weights.dtype), query.shape[1]))
    return out.to(query.dtype), logsumexp(scores, sinks)


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    average: bool,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out and lse, and what multiplies the values: (B, Hq, Nq, Nk), or (B, 1, Nq, Nk) their average over the
    heads, in the query's dtype."""
    call = (bias, mask, scale, dropout_p, dropout_seed, softcap, sinks, diagonals)
    out, lse = attention_forward(query, key, value, *call)
    weights = attention_weights(query.to(lse.dtype), key.to(lse.dtype), *call)
    mean = weights.sum(1, keepdim=True) / max(weights.shape[1], 1)
    return out, lse, (mean if average else weights).to(query.dtype)


def attention_backward(
    grad_out: Tensor,  # (B, Hq, Nq, Dv)
    grad_lse: Tensor | None,  # (B, Hq, Nq)
    grad_weights: Tensor | None,  # (B, Hq | 1, Nq, Nk)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,  # (B, Hq, Nq, Dv)
    lse: Tensor,  # (B, Hq, Nq)
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    bias_requires_grad: bool,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
    diagonals_require_grad: bool = False,
    piece: Piece | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return dq, dk, dv, dbias, dsinks and ddiagonals, each shaped and typed like its input; dbias and ddiagonals are
    None unless wanted, dsinks without sinks.

    The weights are made from the scores again, not as exp(s - lse): an lse of 1e9 has no digit left for the log of the
    number of keys. `piece` says what the tensors are a part of; then it, not `mask`, says which pairs are visible.
    """
    heads = query.shape[1]
    scores, visible = masked_scores(query, key, bias, mask, scale, 0, piece, softcap, diagonals)
    weights = softmax(scores, sinks).masked_fill(~visible, 0.0)  # where the row is NaN, too
    dtype = weights.dtype
    grad_out = grad_out.to(dtype)

    grad_dropped = grad_out @ group(value.to(dtype), heads).mT  # (B, Hq, Nq, Nk)
    if grad_weights is not None:
        share = grad_weights.to(dtype) * (grad_weights.shape[1] / max(heads, 1))
        of_weights = share.expand(weights.shape).masked_fill(~visible, 0.0)
        grad_dropped = grad_dropped + of_weights
    dropped, grad_kept = weights, grad_dropped
    if dropout_p > 0.0:
        dropped = apply_dropout(weights, dropout_p, dropout_seed, piece)
        grad_kept = apply_dropout(grad_dropped, dropout_p, dropout_seed, piece)
    delta = (grad_out * out.to(dtype)).sum(-1)
    if grad_weights is not None:
        delta = delta + (of_weights * dropped).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(dtype)
    grad_scores = (weights * (grad_kept - delta[..., None])).masked_fill(~visible, 0.0)
    grad_products = grad_scores
    if softcap > 0.0:
        slope = 1.0 - torch.tanh(products(query, key, scale) / softcap).square()
        grad_products = torch.where(visible, grad_scores * slope, 0.0)

    dq = select_matmul(grad_products, visible, group(key.to(dtype), heads)) * scale
    dk = select_matmul(grad_products.mT, visible.mT, query.to(dtype)) * scale
    dv = select_matmul(dropped.mT, visible.mT, grad_out)
    dbias = grad_scores.sum_to_size(bias.shape).to(bias.dtype) if bias is not None and bias_requires_grad else None
    dsinks = ddiagonals = None
    if sinks is not None:
        of_sinks = torch.exp(sinks.to(dtype)[:, None] - logsumexp(scores, sinks))
        dsinks = -(of_sinks * delta).sum((0, 2)).to(sinks.dtype)
    if diagonals is not None and diagonals_require_grad:
        index = diagonal_index(query.shape[2], key.shape[2], query.device, piece=piece).flatten()
        sums = diagonals.new_zeros(*grad_scores.shape[:2], diagonals.shape[2])
        ddiagonals = sums.index_add(2, index, grad_scores.flatten(2)).sum_to_size(diagonals.shape)
    return (
        dq.to(query.dtype),
        ungroup(dk, key.shape[1]).to(key.dtype),
        ungroup(dv, value.shape[1]).to(value.dtype),
        dbias,
        dsinks,
        ddiagonals,
    )


def attention_weights(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
) -> Tensor:
    """Return what multiplies the values, (B, Hq, Nq, Nk) in the query's dtype; differentiable.

    The gradient of a product meets what a mask hides with weight 0, which a NaN there would survive.
    """
    scores, visible = masked_scores(query, key, bias, mask, scale, softcap=softcap, diagonals=diagonals)
    if torch.is_grad_enabled() and scores.requires_grad:
        query, key = (t.masked_fill(~t.isfinite(), 0.0) for t in (query, key))
        clean, _ = masked_scores(query, key, bias, mask, scale, softcap=softcap, diagonals=diagonals)
        scores = torch.where(scores.isfinite() | ~visible, clean, scores.detach())
    weights = softmax(scores, sinks)
    if dropout_p > 0.0:
        weights = apply_dropout(weights, dropout_p, dropout_seed)
    return weights.to(query.dtype)


# --- steps ---


def masked_scores(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    mask: MaskArrays,
    scale: float,
    first_row: int = 0,
    piece: Piece | None = None,
    softcap: float = 0.0,
    diagonals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return scores (B, Hq, Nq, Nk) with -inf at masked pairs, and which pairs are visible, in the same shape.

    `first_row` says which row of the mask the first query is; a `piece` knows its pairs without the mask.
    """
    dtype = accumulation_dtype(query.dtype)
    scores = products(query, key, scale)
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if piece is None:
        visible = visible_pairs(mask, query.shape[2], key.shape[2], query.device, first_row).expand(scores.shape)
    else:
        visible = piece.visible.expand(scores.shape)
    if bias is not None:
        visible = visible & (bias != -torch.inf)
        scores = scores + bias.to(dtype)
    if diagonals is not None:
        index = diagonal_index(query.shape[2], key.shape[2], query.device, first_row, piece)
        by_position = diagonals[..., index]
        visible = visible & (by_position != -torch.inf)
        scores = scores + by_position
    return scores.masked_fill(~visible, -torch.inf), visible


def products(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """scale q_i . k_j, (B, Hq, Nq, Nk), in the accumulation dtype."""
    dtype = accumulation_dtype(query.dtype)
    return (query.to(dtype) @ group(key.to(dtype), query.shape[1]).mT) * scale


def diagonal_index(
    q_len: int, kv_len: int, device: torch.device, first_row: int = 0, piece: Piece | None = None
) -> Tensor:
    """Where pair (i, j) stands in `diagonals`: i - j + Nk - 1, int64 (q_len, kv_len)."""
    if piece is not None:
        return piece.places[2][:, None] - piece.places[3] + piece.kv_len - 1
    i = torch.arange(first_row, first_row + q_len, device=device)
    return i[:, None] - torch.arange(kv_len, device=device) + kv_len - 1


def beside_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Scores (B, Hq, Nq, Nk) with the sink of each head as one more key."""
    if sinks is None:
        return scores
    column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1)


def logsumexp(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Row-wise log-sum-exp (B, Hq, Nq) of scores (B, Hq, Nq, Nk) and sinks; -inf for rows without either."""
    scores = beside_sinks(scores, sinks)
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], -torch.inf)
    return torch.logsumexp(scores, dim=-1)


def softmax(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Softmax over the keys, and the sink that the result leaves out; zero for fully masked rows."""
    if sinks is not None:
        return softmax(beside_sinks(scores, sinks))[..., :-1].contiguous()
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)


def select_matmul(weights: Tensor, visible: Tensor, values: Tensor) -> Tensor:
    """weights @ values in which an invisible pair contributes nothing even where the value is NaN or infinite."""
    finite = values.isfinite()
    result = weights @ values.masked_fill(~finite, 0.0)
    poisoned = visible.to(weights.dtype) @ (~finite).to(weights.dtype)
    return result.masked_fill(poisoned > 0, torch.nan)


def group(tensor: Tensor, heads: int) -> Tensor:
    """Repeat (B, Hkv, N, D) to (B, heads, N, D): query head h reads key/value head h // (heads / Hkv)."""
    return tensor.repeat_interleave(heads // max(tensor.shape[1], 1), dim=1)


def ungroup(gradient: Tensor, kv_heads: int) -> Tensor:
    """Sum a gradient (B, Hq, N, D) over the query heads of each group: (B, Hkv, N, D)."""
    return gradient.unflatten(1, (kv_heads, gradient.shape[1] // max(kv_heads, 1))).sum(2)


# --- which pairs are visible ---


def visible_pairs(mask: MaskArrays, q_len: int, kv_len: int, device: torch.device, first_row: int = 0) -> Tensor:
    """Expand a mask to bool (1 | B, 1 | Hq, q_len, kv_len) for the query rows first_row .. first_row + q_len."""
    i = torch.arange(first_row, first_row + q_len, device=device)[:, None] + mask.window_offset
    j = torch.arange(kv_len, device=device)[None, :]
    visible = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    if mask.window_left >= 0:
        visible = visible & (j >= i - mask.window_left)
    if mask.window_right >= 0:
        visible = visible & (j <= i + mask.window_right)
    visible = visible[None, None]
    if mask.kv_lengths is not None:
        visible = visible & (j < mask.kv_lengths[:, None, None, None])
    if mask.indptr is not None:
        visible = visible & expand_lists(mask, kv_len, first_row, first_row + q_len)
    return visible


def expand_lists(mask: MaskArrays, kv_len: int, first: int, last: int) -> Tensor:
    """Draw the listed blocks of rows first .. last as bool (batch, heads, last - first, kv_len)."""
    assert mask.indptr is not None and mask.indices is not None and mask.tile_ids is not None and mask.tiles is not None
    block_q, block_k = mask.block_q, mask.block_k
    lines = mask.batch * mask.heads
    row_blocks = (mask.indptr.numel() - 1) // max(lines, 1)
    a, b = first // block_q, -(-last // block_q)
    columns = -(-kv_len // block_k)
    starts = mask.indptr[:-1].view(lines, row_blocks)[:, a:b].reshape(-1)
    ends = mask.indptr[1:].view(lines, row_blocks)[:, a:b].reshape(-1)
    counts = ends - starts
    everything = mask.indices.numel() if (a, b) == (0, row_blocks) else None  # else a number that only values know
    rows = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts, output_size=everything)
    within = torch.arange(rows.numel(), device=counts.device) - (counts.cumsum(0) - counts)[rows]
    entries = starts[rows] + within
    tile_ids = mask.tile_ids[entries]

    drawn = torch.zeros(lines * (b - a), columns, block_q, block_k, dtype=torch.bool, device=counts.device)
    bits = torch.arange(8, device=counts.device, dtype=torch.uint8)
    full = mask.tiles.new_full((1, block_q, block_k // 8), 255)  # what tile -1 stands for, the last one
    tiles = torch.cat([mask.tiles, full])[tile_ids.long()]  # (entries, block_q, block_k / 8)
    blocks = ((tiles[..., None] >> bits) & 1).bool().flatten(-2)
    drawn[rows, mask.indices[entries].long()] = blocks
    drawn = drawn.view(mask.batch, mask.heads, b - a, columns, block_q, block_k).transpose(3, 4)
    drawn = drawn.reshape(mask.batch, mask.heads, (b - a) * block_q, columns * block_k)
    return drawn[:, :, first - a * block_q : last - a * block_q, :kv_len]


# --- dropout: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) ---


def apply_dropout(tensor: Tensor, dropout_p: float, dropout_seed: Tensor | None, piece: Piece | None = None) -> Tensor:
    """Zero the dropped pairs of (B, Hq, Nq, Nk) and scale the kept ones by 1 / (1 - dropout_p)."""
    places = None if piece is None else piece.places
    kept = dropout_keep(tensor.shape, dropout_p, dropout_seed, tensor.device, places)
    return torch.where(kept, tensor / (1.0 - dropout_p), 0.0)


def dropout_keep(
    shape: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
    device: torch.device,
    places: Sequence[Tensor] | None = None,
) -> Tensor:
    """Which pairs survive: a pure function of (seed, b, h, i, j), bool (B, Hq, Nq, Nk).

    The counter is laid out so that one Philox call gives the four elements that one GPU thread holds in an m16n8
    accumulator fragment: counter = (j >> 1, (i >> 4) * 8 + (i & 7), h, b), word = ((i >> 3) & 1) * 2 + (j & 1).
    """
    vectors = [torch.arange(size, device=device) for size in shape] if places is None else places
    b, h, i, j = (v.view([-1 if axis == d else 1 for d in range(4)]) for axis, v in enumerate(vectors))
    assert seed is not None, "functional.attention draws a seed whenever dropout_p > 0"
    seed = seed.to(device).reshape(-1)
    if seed.numel() > 1:  # see `call.dropout_origin`
        h, i, j = h + seed[1], i + seed[2], j + seed[3]
    seed = seed[0]
    counter = [j >> 1, (i >> 4) * 8 + (i & 7), h, b]
    words = torch.stack(philox4x32([c.expand(shape) for c in counter], seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    word = (((i >> 3) & 1) * 2 + (j & 1)).expand(shape)
    return words.gather(0, word[None])[0] >= int(dropout_p * 2.0**32)


def philox4x32(counter: list[Tensor], key0: Tensor, key1: Tensor) -> list[Tensor]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words; returns the four output words."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products wrap, their bits are what we want
        c0, c1, c2, c3 = (
            ((product1 >> 32) & 0xFFFFFFFF) ^ c1 ^ key0,
            product1 & 0xFFFFFFFF,
            ((product0 >> 32) & 0xFFFFFFFF) ^ c3 ^ key1,
            product0 & 0xFFFFFFFF,
        )
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]
