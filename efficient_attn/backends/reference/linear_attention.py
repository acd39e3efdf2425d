"""The definition of linear attention, in plain PyTorch; see attention.py for exact attention.

    w_ij = a_i . b_j          for visible pairs          a = phi(query), b = phi(key), (F,) each
    n_i  = sum_j w_ij                                    the normaliser
    out_i = sum_j w_ij v_j / n_i                         0 where n_i = 0

With v'_j = [v_j, 1] both sums are one: [n_i out_i, n_i] = sum_j (a_i . b_j) v'_j. Its gradient u_i with respect to
that row is u_i = [dout_i / n_i, dn_i - dout_i . out_i / n_i] (dout counts as 0 where n_i = 0), and

    da_i = sum_j (u_i . v'_j) b_j       db_j = sum_i (v'_j . u_i) a_i       dv'_j = sum_i (b_j . a_i) u_i

are sums of the same form, so one function, `visible_sums`, serves all four. Without causality it is two matrix
products; with it, a walk over chunks that carries the state sum_j b_j v'_j^T. O(N) time and memory. Half precision is
summed in float32. Masked pairs are selected away, so that a NaN behind a mask stays behind it.

The feature map phi is part of the operator, so that a kernel can apply it on the way: see backends/features.py, also
for the shift of positive maps. Where it rises, with causality, time falls into epochs: a state is carried from one to
the next, rescaled to the shift there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..call import LinearCall, accumulation_dtype
from ..features import (
    SHIFTED,
    Features,
    epochs,
    exponents,
    input_gradients,
    map_features,
    pack_shift,
    shifted_keys,
    shifted_queries,
)

CHUNK = 128  # rows of a causal step: a tile of CHUNK x CHUNK weights beside the state


def not_supported_reasons(call: LinearCall) -> list[str]:
    """Why this backend cannot serve `call`: never, it is the definition."""
    return []


def linear_attention_forward(
    query: Tensor,  # (B, Hq, Nq, D)
    key: Tensor,  # (B, Hkv, Nk, D)
    value: Tensor,  # (B, Hkv, Nk, Dv)
    key_mask: Tensor | None,  # (B, Nk) bool, True = attend
    projection: Tensor | None,  # (F, D) or (Hkv, F, D)
    is_causal: bool,
    causal_offset: int,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out (B, Hq, Nq, Dv) in the value's dtype, and in the accumulation dtype the normaliser (B, Hq, Nq) and
    the key shift of `features.pack_shift` (B, Hkv, S), or (B, Hkv, 0) if the map has none. The normaliser is that of
    the shifted features.

    Causal means that query i sees the keys j <= i + causal_offset.
    """
    mapped, spans = _mapped(query, key, key_mask, projection, is_causal, causal_offset, feature_map, scale)
    a, b, v = _grouped(mapped.a, mapped.b, value, key_mask)
    sums = _sums_over_keys(a, b, v, is_causal, causal_offset, spans, -2).flatten(1, 2)
    normaliser = sums[..., -1]
    out = _divided(sums[..., :-1], normaliser)
    return out.to(value.dtype), normaliser.contiguous(), mapped.key_shift


def linear_attention_backward(
    grad_out: Tensor,  # (B, Hq, Nq, Dv)
    grad_normaliser: Tensor | None,  # (B, Hq, Nq)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    projection: Tensor | None,
    out: Tensor,  # (B, Hq, Nq, Dv)
    normaliser: Tensor,  # (B, Hq, Nq)
    key_shift: Tensor,  # (B, Hkv, S) or (B, Hkv, 0)
    is_causal: bool,
    causal_offset: int,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, each shaped and typed like its input."""
    mapped, spans = _mapped(query, key, key_mask, projection, is_causal, causal_offset, feature_map, scale)
    a, b, v = _grouped(mapped.a, mapped.b, value, key_mask)
    dtype = a.dtype
    grad_sums = _divided(grad_out.to(dtype), normaliser)
    grad_n = -(grad_sums * out.to(dtype)).sum(-1)
    if grad_normaliser is not None:
        grad_n = grad_n + grad_normaliser.to(dtype)
    u = torch.cat([grad_sums, grad_n[..., None]], dim=-1).unflatten(1, a.shape[1:3])  # (B, Hkv, G, Nq, Dv + 1)

    da = _sums_over_keys(u, v, b, is_causal, causal_offset, spans, -1).flatten(1, 2)
    db = _sums_over_queries(v, u, a, is_causal, causal_offset, spans, -1)
    dv = _sums_over_queries(b, a, u, is_causal, causal_offset, spans, -2)[..., :-1]
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        db, dv = db.masked_fill(hidden, 0.0), dv.masked_fill(hidden, 0.0)
    dq, dk = input_gradients(
        da, db, mapped.a_slope, mapped.b_slope, query, key, key_mask, projection, feature_map, scale
    )
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


# --- epochs: between two rises of the shift ---


class _Span(NamedTuple):
    """The rows of one epoch and its shift (B, Hkv, F)."""

    queries: slice
    keys: slice
    shift: Tensor


def _mapped(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    projection: Tensor | None,
    is_causal: bool,
    offset: int,
    feature_map: str,
    scale: float,
) -> tuple[Features, list[_Span]]:
    """The features of all rows, each under the shift of its epoch, and the epochs; none without a moving shift."""
    if not is_causal or feature_map not in SHIFTED:
        return map_features(query, key, key_mask, projection, is_causal, feature_map, scale), []
    e = exponents(query, key, key_mask, projection, feature_map, scale)
    found = epochs(e.key, key_mask)
    Nq, Nk = query.shape[2], key.shape[2]
    spans, parts = [], []
    for n, (start, shift) in enumerate(found):
        stop = found[n + 1][0] if n + 1 < len(found) else Nk
        first = 0 if n == 0 else min(max(start - offset, 0), Nq)
        last = Nq if n + 1 == len(found) else min(max(stop - offset, 0), Nq)
        spans.append(_Span(slice(first, last), slice(start, stop), shift))
        part = e._replace(query=e.query[:, :, first:last], key=e.key[:, :, start:stop])
        if e.query_factor is not None and e.key_factor is not None:
            part = part._replace(
                query_factor=e.query_factor[:, :, first:last], key_factor=e.key_factor[:, :, start:stop]
            )
        parts.append((*shifted_queries(part, shift), *shifted_keys(part, shift)))
    a, a_slope, constants, b, b_slope = (torch.cat(rows, 2) for rows in zip(*parts, strict=True))
    return Features(a, b, a_slope, b_slope, pack_shift(found[0][1], constants, Nk, True)), spans


def _sums_over_keys(
    queries: Tensor, keys: Tensor, terms: Tensor, is_causal: bool, offset: int, spans: list[_Span], dim: int
) -> Tensor:
    """`visible_sums`; over epochs, the features are dimension `dim` of the state keys^T terms."""
    if not spans:
        return visible_sums(queries, keys, terms, is_causal, offset)
    parts, state = [], None
    for n, span in enumerate(spans):
        x, y, u = queries[..., span.queries, :], keys[..., span.keys, :], terms[..., span.keys, :]
        sums = visible_sums(x, y, u, True, span.queries.start + offset - span.keys.start)
        if state is not None:
            sums = sums + x @ state
        parts.append(sums)
        if n + 1 < len(spans):
            added = y.mT @ u
            state = (added if state is None else state + added) * _factor(span, spans[n + 1], dim)
    return torch.cat(parts, -2)


def _sums_over_queries(
    keys: Tensor, queries: Tensor, terms: Tensor, is_causal: bool, offset: int, spans: list[_Span], dim: int
) -> Tensor:
    """sum_i (keys_j . queries_i) terms_i over the queries i of the whole group that see key j: (B, Hkv, Nk, R)."""
    if not spans:
        return _backward_sums(keys, queries, terms, is_causal, offset)
    parts, state = [], None
    for n, span in reversed(list(enumerate(spans))):
        x, y, u = keys[..., span.keys, :], queries[..., span.queries, :], terms[..., span.queries, :]
        sums = _backward_sums(x, y, u, True, span.queries.start + offset - span.keys.start)
        if state is not None:
            sums = sums + x.squeeze(2) @ state
        parts.append(sums)
        if n > 0:
            added = (y.mT @ u).sum(2)
            state = (added if state is None else state + added) * _factor(spans[n - 1], span, dim).squeeze(2)
    return torch.cat(parts[::-1], -2)


def _factor(earlier: _Span, later: _Span, dim: int) -> Tensor:
    """What a state is multiplied with from an epoch to the next or back, at most 1: (B, Hkv, 1, F, 1) or (.., 1, F)."""
    return (earlier.shift - later.shift).exp().unsqueeze(2).unsqueeze(-1 if dim == -2 else -2)


# --- steps ---


def visible_sums(a: Tensor, b: Tensor, v: Tensor, is_causal: bool, offset: int) -> Tensor:
    """r_i = sum_j (a_i . b_j) v_j over all j or j <= i + offset; a (..., N, E), b (..., M, E), v (..., M, R)."""
    if not is_causal:
        return a @ (b.mT @ v)
    finite_b, finite_v = b.isfinite().all(-1, keepdim=True), v.isfinite()
    if bool(finite_b.all()) and bool(finite_v.all()):
        return _causal_sums(a, b, v, offset)
    # A sum must not see what is not finite before its turn, and 0 * NaN is NaN: count such terms beside the sums.
    sums = _causal_sums(a, b.masked_fill(~finite_b, 0.0), v.masked_fill(~(finite_b & finite_v), 0.0), offset)
    poison = (~(finite_b & finite_v)).to(a.dtype)
    one = poison.new_ones(())
    seen = _causal_sums(one.expand(*a.shape[:-1], 1), one.expand(*b.shape[:-1], 1), poison, offset)
    return sums.masked_fill(seen > 0, torch.nan)


def _causal_sums(a: Tensor, b: Tensor, v: Tensor, offset: int) -> Tensor:
    """`visible_sums` for j <= i + offset: the state holds the keys that a whole chunk sees, the tile does the rest."""
    N, M = a.shape[-2], b.shape[-2]
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2], v.shape[:-2])
    sums = a.new_empty(*batch, N, v.shape[-1])
    state = b.new_zeros(*torch.broadcast_shapes(b.shape[:-2], v.shape[:-2]), b.shape[-1], v.shape[-1])
    known = 0  # keys in the state
    for start in range(0, N, CHUNK):
        stop = min(start + CHUNK, N)
        first, last = (min(max(i + offset + 1, 0), M) for i in (start, stop - 1))
        for begin in range(known, first, CHUNK):  # longer than one chunk only when offset > 0
            end = min(begin + CHUNK, first)
            state = state + b[..., begin:end, :].mT @ v[..., begin:end, :]
        known = first
        rows = a[..., start:stop, :]
        i = torch.arange(start, stop, device=a.device)[:, None]
        j = torch.arange(first, last, device=a.device)[None, :]
        tile = (rows @ b[..., first:last, :].mT).masked_fill(j > i + offset, 0.0)
        sums[..., start:stop, :] = rows @ state + tile @ v[..., first:last, :]
    return sums


def _backward_sums(keys: Tensor, queries: Tensor, terms: Tensor, is_causal: bool, offset: int) -> Tensor:
    """`_sums_over_queries` within one epoch.

    Read backwards, the queries that see key j (i >= j - offset) are a causal prefix again.
    """
    if not is_causal:
        return keys.squeeze(2) @ (queries.mT @ terms).sum(2)
    backwards = offset + queries.shape[-2] - keys.shape[-2]
    sums = visible_sums(keys.flip(-2), queries.flip(-2), terms.flip(-2), True, backwards)
    return sums.flip(-2).sum(2)


def _grouped(
    query_features: Tensor, key_features: Tensor, value: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a (B, Hkv, G, Nq, F), b (B, Hkv, 1, Nk, F) and v' (B, Hkv, 1, Nk, Dv + 1); masked keys are 0."""
    dtype = accumulation_dtype(value.dtype)
    heads = key_features.shape[1]
    a = query_features.to(dtype).unflatten(1, (heads, query_features.shape[1] // max(heads, 1)))
    b = key_features.to(dtype)
    v = torch.cat([value.to(dtype), b.new_ones(*b.shape[:-1], 1)], dim=-1)
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        b, v = b.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    return a, b.unsqueeze(2), v.unsqueeze(2)


def _divided(rows: Tensor, normaliser: Tensor) -> Tensor:
    """Rows / n, and 0 where n = 0. Not times 1 / n: that is infinite for the smallest n."""
    zero = (normaliser == 0)[..., None]
    return (rows / normaliser[..., None].masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
