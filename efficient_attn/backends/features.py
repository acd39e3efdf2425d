"""The feature maps of linear attention: phi of queries and keys, and the way back for gradients.

A backend that has no fused maps applies `given_or_mapped` first and, backwards, `input_gradients`.

The positive maps are exponentials, phi(x) = e^E(x) g(x), and their range is far beyond that of float32: e^-300 is a
usual feature of Performer. So they are kept relative to a *shift*, one number for each feature, that cancels in out:

    b_f = e^(E_f - shift_f) g_f            of keys
    a_f = e^(E_f + shift_f - c) g_f        of queries; c is the row's own constant, its largest exponent

A shift that some key attains which the query sees makes n >= 1, whatever the exponents. Without causality that is the
largest one of the visible keys. With it no factor may depend on keys to come: the shift begins with the first key there
is, and rises to the largest exponent so far where a key exceeds it by more than RISE, as in online softmax. Between two
rises, in an *epoch*, it stays; ordinary inputs have a single one. No shift and no constant has a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..tracing import is_recorded, shapes_only
from .call import accumulation_dtype

# identity          phi(x) = x
# elu               elu(x) + 1 (Katharopoulos et al. 2020), as x + 1 or e^x: without the rounding of e^x - 1 + 1
# relu              max(x, 0)
# exp               e^x
# performer_relu    max(w_f . x', 0) / sqrt(F) + RELU_FLOOR                       x' = sqrt(scale) x
# performer_softmax exp(w_f . x' - |x'|^2 / 2)                                    w_f rows of the projection
FEATURE_MAPS = ("identity", "elu", "relu", "exp", "performer_relu", "performer_softmax")
SHIFTED = ("elu", "exp", "performer_softmax")
RELU_FLOOR = 1e-3  # added to Performer's relu features, so that a normaliser cannot vanish
RISE = (
    30.0  # e^30: far from the end of float32 for sums over millions of keys, and far from any usual range of exponents
)
SHIFT_ROWS = 64  # keys for which `key_shift` has one row


class MovingShift(Exception):
    """The keys have more than one epoch, and the kernel that was asked knows one shift for all time."""


class Features(NamedTuple):
    """phi of queries (B, Hq, Nq, F) and keys (B, Hkv, Nk, F), in the accumulation dtype unless given.

    a_slope, b_slope: their derivatives by what the map was applied to; None: 1.
    key_shift: what the operator returns, (B, Hkv, S); its end is c of the queries, (G, Nq).
    """

    a: Tensor
    b: Tensor
    a_slope: Tensor | None
    b_slope: Tensor | None
    key_shift: Tensor


class Exponents(NamedTuple):
    """E and g of queries and keys; g None: 1. Masked keys have E = -inf."""

    query: Tensor  # (B, Hq, Nq, F)
    query_factor: Tensor | None
    key: Tensor  # (B, Hkv, Nk, F)
    key_factor: Tensor | None


def map_features(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    projection: Tensor | None,
    is_causal: bool,
    feature_map: str,
    scale: float,
) -> Features:
    """The features of all rows under one shift.

    Raises:
        MovingShift: causal keys have more than one epoch. Where values are unknown nobody can ask: those keys become
            NaN.
    """
    if feature_map in SHIFTED:
        e = exponents(query, key, key_mask, projection, feature_map, scale)
        shift = first_shift(e.key, key_mask) if is_causal else largest_shift(e.key)
        if is_causal:
            exceeds = (e.key - shift[:, :, None] > RISE) & e.key.isfinite()
            if values_unknown(exceeds):
                e = e._replace(key=e.key.masked_fill(exceeds, torch.nan))
            elif bool(exceeds.any()):
                raise MovingShift
        a, a_slope, constant = shifted_queries(e, shift)
        b, b_slope = shifted_keys(e, shift)
        return Features(a, b, a_slope, b_slope, pack_shift(shift, constant, key.shape[2], is_causal))
    q, k = _prepared(query, scale, projection), _prepared(_visible(key, key_mask), scale, projection)
    none = k.new_zeros(*k.shape[:2], 0)
    if feature_map == "identity":
        return Features(q, k, None, None, none)
    if feature_map == "relu":
        return Features(q.relu(), k.relu(), (q > 0).to(q.dtype), (k > 0).to(k.dtype), none)
    assert projection is not None
    root = projection.shape[-2] ** -0.5
    u_q, u_k = _projected(q, key.shape[1], projection), _projected(k, key.shape[1], projection)
    a, b = u_q.relu() * root + RELU_FLOOR, u_k.relu() * root + RELU_FLOOR
    return Features(a, b, (u_q > 0).to(a.dtype) * root, (u_k > 0).to(b.dtype) * root, none)


def given_or_mapped(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    projection: Tensor | None,
    is_causal: bool,
    feature_map: str,
    scale: float,
) -> Features:
    """`map_features`, but given features stay in their dtype, for kernels that read it."""
    if feature_map == "identity":
        return Features(query, key, None, None, key.new_empty(*key.shape[:2], 0, dtype=torch.float32))
    return map_features(query, key, key_mask, projection, is_causal, feature_map, scale)


def some_columns(rows: Tensor) -> Tensor:
    """Rows (B, H, N, D), or where D is 0 one column of zeros: kernels need one, if only for the normaliser."""
    return rows if rows.shape[3] else rows.new_zeros(*rows.shape[:3], 1)


def input_gradients(
    da: Tensor,
    db: Tensor,
    a_slope: Tensor | None,
    b_slope: Tensor | None,
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    projection: Tensor | None,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """From the gradients of the features a and b to those of query and key, in the accumulation dtype.

    With u = W x':  dx = sqrt(scale) W^T du, and for the key of a softmax feature, whose exponent holds -|x'|^2 / 2,
    also -sqrt(scale) x' sum_f du_f.
    """
    dq = da if a_slope is None else da * a_slope
    dk = db if b_slope is None else db * b_slope
    if projection is None:
        return dq, dk
    total = dk.sum(-1, keepdim=True)
    heads = key.shape[1]
    dq, dk = _unprojected(dq, heads, projection), _unprojected(dk, heads, projection)
    if feature_map == "performer_softmax":
        dk = dk - _prepared(_visible(key, key_mask), scale, projection) * total
    return dq * scale**0.5, dk * scale**0.5


# --- exponents and their shift ---


def exponents(
    query: Tensor, key: Tensor, key_mask: Tensor | None, projection: Tensor | None, feature_map: str, scale: float
) -> Exponents:
    """E and g of a map in SHIFTED."""
    q, k = _prepared(query, scale, projection), _prepared(_visible(key, key_mask), scale, projection)
    factors: tuple[Tensor | None, Tensor | None] = None, None
    if feature_map == "elu":
        factors = q.clamp(min=0.0) + 1.0, k.clamp(min=0.0) + 1.0
        q, k = q.clamp(max=0.0), k.clamp(max=0.0)
    elif feature_map == "performer_softmax":
        assert projection is not None
        norm = k.square().sum(-1, keepdim=True) / 2
        q, k = _projected(q, key.shape[1], projection), _projected(k, key.shape[1], projection) - norm
    if key_mask is not None:
        k = k.masked_fill(~key_mask[:, None, :, None], -torch.inf)
    return Exponents(q, factors[0], k, factors[1])


def values_unknown(tensor: Tensor) -> bool:
    """Whether no value may steer Python: a graph is recorded, for a compiler or on a GPU, or a transform looks on."""
    if is_recorded() or shapes_only(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def first_shift(exponents: Tensor, key_mask: Tensor | None) -> Tensor:
    """The exponents of the first visible key of (B, Hkv, Nk, F), finite: (B, Hkv, F); 0 where there is none."""
    B, Hkv, Nk, F = exponents.shape
    if Nk == 0:
        return exponents.new_zeros(B, Hkv, F)
    if key_mask is None:
        first = exponents[:, :, 0]
    else:
        index = key_mask.to(torch.uint8).argmax(1)  # the first one
        first = exponents.take_along_dim(index[:, None, None, None], 2)[:, :, 0]
        first = first.masked_fill(~key_mask.any(1)[:, None, None], 0.0)
    lowest = torch.finfo(exponents.dtype).min
    return first.detach().nan_to_num(nan=0.0, posinf=0.0, neginf=lowest)


def epochs(exponents: Tensor, key_mask: Tensor | None) -> list[tuple[int, Tensor]]:
    """Where each epoch of causal keys (B, Hkv, Nk, F) begins, the first at key 0, and its shift (B, Hkv, F).

    The shift of every (batch, head) rises where one of them must. Where values are unknown there is one epoch.
    """
    exponents = exponents.detach()
    found = [(0, first_shift(exponents, key_mask))]
    if values_unknown(exponents):
        return found
    largest = found[0][1]
    for start in range(0, exponents.shape[2], SHIFT_ROWS):
        rows = exponents[:, :, start : start + SHIFT_ROWS]
        rows = rows.masked_fill(~rows.isfinite(), -torch.inf)
        begin = 0
        while True:
            exceeds = (rows[:, :, begin:] - found[-1][1][:, :, None] > RISE).any(-1).any(1).any(0)
            if not bool(exceeds.any()):
                break
            begin += int(exceeds.to(torch.uint8).argmax())
            shift = torch.maximum(largest, rows[:, :, : begin + 1].amax(2))
            found.append((start + begin, shift))
        largest = torch.maximum(largest, rows.amax(2))
    return found


def shifted_queries(e: Exponents, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a (B, Hq, Nq, F), its slope, and c (B, Hq, Nq), of queries that see keys under `shift` (B, Hkv, F)."""
    raised = e.query + shift.repeat_interleave(e.query.shape[1] // max(shift.shape[1], 1), 1)[:, :, None]
    largest = raised.detach().amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    slope = (raised - largest).exp()
    return slope if e.query_factor is None else slope * e.query_factor, slope, largest.squeeze(-1)


def shifted_keys(e: Exponents, shift: Tensor) -> tuple[Tensor, Tensor]:
    """b (B, Hkv, Nk, F) and its slope; NaN where a shift is too low to hold them."""
    relative = e.key - shift[:, :, None]
    slope = relative.masked_fill(relative > 2 * RISE, torch.nan).exp()
    return slope if e.key_factor is None else slope * e.key_factor, slope


def pack_shift(shift: Tensor, constant: Tensor, keys: int, is_causal: bool) -> Tensor:
    """What the operator returns as key_shift: (B, Hkv, S), S = `shift_size`; causal, the shift of the first epoch."""
    B, Hkv, F = shift.shape
    later = shift_size(Hkv, constant.shape[1], constant.shape[2], keys, F, is_causal) - F
    later -= constant.shape[1] // max(Hkv, 1) * constant.shape[2]
    return torch.cat([shift, shift.new_zeros(B, Hkv, later), constant.detach().reshape(B, Hkv, -1)], -1)


def shift_size(Hkv: int, Hq: int, Nq: int, Nk: int, features: int, is_causal: bool) -> int:
    """S: a row of features for all keys, causal one for the first and one for each SHIFT_ROWS keys; c of queries."""
    rows = 1 + (Nk + SHIFT_ROWS - 1) // SHIFT_ROWS if is_causal else 1
    return rows * features + Hq // max(Hkv, 1) * Nq


def key_shift_size(query: Tensor, key: Tensor, projection: Tensor | None, is_causal: bool, feature_map: str) -> int:
    """S of a call; 0 for a map without a shift."""
    if feature_map not in SHIFTED:
        return 0
    features = key.shape[3] if projection is None else projection.shape[-2]
    return shift_size(key.shape[1], query.shape[1], query.shape[2], key.shape[2], features, is_causal)


def query_constants(key_shift: Tensor, normaliser: Tensor) -> Tensor:
    """c (B, Hq, Nq) of a packed shift: the normaliser times e^c is that of unshifted features."""
    Hkv = key_shift.shape[1]
    rows = normaliser.shape[1] // max(Hkv, 1) * normaliser.shape[2]
    return key_shift[..., key_shift.shape[2] - rows :].reshape(normaliser.shape)


# --- steps ---


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


def _visible(key: Tensor, key_mask: Tensor | None) -> Tensor:
    """The keys, 0 where they are masked; neither their content nor a gradient passes."""
    return key if key_mask is None else key.masked_fill(~key_mask[:, None, :, None], 0.0)


def largest_shift(exponents: Tensor) -> Tensor:
    """The largest exponent of each feature over the keys of (B, Hkv, Nk, F); 0 where there is none."""
    if exponents.shape[2] == 0:
        return exponents.new_zeros(*exponents.shape[:2], exponents.shape[3])
    largest = exponents.detach().amax(2)
    return largest.masked_fill(largest == -torch.inf, 0.0)
