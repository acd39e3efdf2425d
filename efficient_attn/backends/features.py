"""The feature maps of linear attention: phi of queries and keys, and the way back for gradients.

A backend that has no fused maps applies `given_or_mapped` first and, backwards, `input_gradients`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .call import accumulation_dtype

# identity          phi(x) = x
# elu               elu(x) + 1 (Katharopoulos et al. 2020), as x + 1 or e^x: without the rounding of e^x - 1 + 1
# relu              max(x, 0)
# performer_relu    max(w_f . x', 0) / sqrt(F) + RELU_FLOOR                       x' = sqrt(scale) x
# performer_softmax exp(w_f . x' - |x'|^2 / 2) up to factors that cancel in out   w_f rows of the projection
FEATURE_MAPS = ("identity", "elu", "relu", "performer_relu", "performer_softmax")
RELU_FLOOR = 1e-3  # added to Performer's relu features, so that a normaliser cannot vanish
CAUSAL_EXPONENT_LIMIT = 60.0  # e^60: room for sums over a million keys in float32


def map_features(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    projection: Tensor | None,
    is_causal: bool,
    feature_map: str,
    scale: float,
    agree: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a (B, Hq, Nq, F), b (B, Hkv, Nk, F) in the accumulation dtype and the key shift.

    Performer's softmax features (Choromanski et al. 2021) are scaled such that nothing overflows and a . b / n stays
    what it is: each row of a by a constant, and, not causal, each feature by c_f in b and 1 / c_f in a, with c_f from
    the largest visible key: log c_f is the key shift. That makes n >= 1 for every row. With causality no factor may
    depend on keys to come, so there b saturates at e^60 instead. The factors have no gradient.
    `agree` makes the key shift of these keys, where they are a part of a longer sequence, that of all of it.
    """
    q, k = _prepared(query, scale, projection), _prepared(_visible(key, key_mask), scale, projection)
    shift = k.new_zeros(*k.shape[:2], 0)
    if feature_map in POINTWISE:
        phi = POINTWISE[feature_map]
        return phi(q), phi(k), shift
    assert projection is not None
    a, b = _projected(q, key.shape[1], projection), _projected(k, key.shape[1], projection)
    if feature_map == "performer_relu":
        root = projection.shape[-2] ** -0.5
        return a.relu() * root + RELU_FLOOR, b.relu() * root + RELU_FLOOR, shift
    b = b - k.square().sum(-1, keepdim=True) / 2
    if is_causal:
        b = b.clamp(max=CAUSAL_EXPONENT_LIMIT)
    else:
        shift = _largest(b.detach(), key_mask)  # (B, Hkv, F)
        shift = shift if agree is None else agree(shift)
        group = query.shape[1] // max(key.shape[1], 1)
        a, b = a + shift.repeat_interleave(group, dim=1)[:, :, None], b - shift[:, :, None]
        if key_mask is not None:  # a cleared key may be far above the largest visible one
            b = b.masked_fill(~key_mask[:, None, :, None], -torch.inf)
    a = a - a.detach().amax(-1, keepdim=True)
    return a.exp(), b.exp(), shift


def given_or_mapped(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    projection: Tensor | None,
    is_causal: bool,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`map_features`, but given features stay in their dtype, for kernels that read it."""
    if feature_map == "identity":
        return query, key, key.new_empty(*key.shape[:2], 0, dtype=torch.float32)
    return map_features(query, key, key_mask, projection, is_causal, feature_map, scale)


def some_columns(rows: Tensor) -> Tensor:
    """Rows (B, H, N, D), or where D is 0 one column of zeros: kernels need one, if only for the normaliser."""
    return rows if rows.shape[3] else rows.new_zeros(*rows.shape[:3], 1)


def input_gradients(
    da: Tensor,
    db: Tensor,
    a: Tensor,
    b: Tensor,
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    projection: Tensor | None,
    is_causal: bool,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """From the gradients of the features a and b to those of query and key, in the accumulation dtype.

    With u = W x':  dx = sqrt(scale) W^T du, and for the key of a softmax feature, whose exponent holds -|x'|^2 / 2,
    also -sqrt(scale) x' sum_f du_f.
    """
    if feature_map == "identity":
        return da, db
    q, k = _prepared(query, scale, projection), _prepared(_visible(key, key_mask), scale, projection)
    if feature_map == "elu":
        return torch.where(q > 0, da, da * a), torch.where(k > 0, db, db * b)
    if feature_map == "relu":
        return torch.where(q > 0, da, 0.0), torch.where(k > 0, db, 0.0)
    assert projection is not None
    heads, root = key.shape[1], projection.shape[-2] ** -0.5
    if feature_map == "performer_relu":
        du_q = torch.where(_projected(q, heads, projection) > 0, da * root, 0.0)
        du_k = torch.where(_projected(k, heads, projection) > 0, db * root, 0.0)
    else:
        du_q, du_k = da * a, db * b
        if is_causal:
            exponent = _projected(k, heads, projection) - k.square().sum(-1, keepdim=True) / 2
            du_k = torch.where(exponent > CAUSAL_EXPONENT_LIMIT, 0.0, du_k)
    dq, dk = _unprojected(du_q, heads, projection), _unprojected(du_k, heads, projection)
    if feature_map == "performer_softmax":
        dk = dk - k * du_k.sum(-1, keepdim=True)
    return dq * scale**0.5, dk * scale**0.5


def _prepared(x: Tensor, scale: float, projection: Tensor | None) -> Tensor:
    """The rows in the accumulation dtype, before a projection times sqrt(scale)."""
    x = x.to(accumulation_dtype(x.dtype))
    return x if projection is None else x * scale**0.5


def _projected(x: Tensor, heads: int, projection: Tensor) -> Tensor:
    """W x for (B, H, N, D), with W (F, D) or (heads, F, D) and H a multiple of heads: (B, H, N, F)."""
    projection = projection.to(x.dtype)
    if projection.dim() == 3:
        projection = projection.repeat_interleave(x.shape[1] // max(heads, 1), dim=0)
    return x @ projection.mT


def _unprojected(du: Tensor, heads: int, projection: Tensor) -> Tensor:
    """W^T du: the adjoint of `_projected`."""
    return _projected(du, heads, projection.mT)


def elu_features(x: Tensor) -> Tensor:
    """elu(x) + 1 = x + 1 for x > 0, e^x else; positive, without the rounding of e^x - 1 + 1."""
    return torch.where(x > 0, x + 1.0, torch.exp(x.clamp(max=0.0)))


def _identity(x: Tensor) -> Tensor:
    return x


POINTWISE = {"identity": _identity, "elu": elu_features, "relu": torch.relu}


def _visible(key: Tensor, key_mask: Tensor | None) -> Tensor:
    """The keys, 0 where they are masked; neither their content nor a gradient passes."""
    return key if key_mask is None else key.masked_fill(~key_mask[:, None, :, None], 0.0)


def _largest(exponents: Tensor, key_mask: Tensor | None) -> Tensor:
    """The largest exponent of each feature over the visible keys of (B, Hkv, Nk, F); 0 where there is no key."""
    if key_mask is not None:
        exponents = exponents.masked_fill(~key_mask[:, None, :, None], -torch.inf)
    if exponents.shape[2] == 0:
        return exponents.new_zeros(*exponents.shape[:2], exponents.shape[3])
    largest = exponents.amax(2)
    return largest.masked_fill(largest == -torch.inf, 0.0)
