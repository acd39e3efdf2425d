"""Linear attention on given features, and with the feature map elu(x) + 1 (Katharopoulos et al., ICML 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import sharding
from ..backends import select
from ..backends.call import LinearCall, accumulation_dtype
from ..backends.features import (
    Exponents,
    epochs,
    exponents,
    largest_shift,
    query_constants,
    shifted_keys,
    shifted_queries,
)
from ..defaults import alignment_offset
from ..errors import InputError, InputTypeError, UnsupportedError
from ..inputs import check_alignment, check_key_mask, prepare_inputs, select_keys
from ..ops import linear_attention as ops
from ..options import register
from .lowrank import LowRankMethod, by_group, drop_columns, drop_keys

MAPS = ("identity", "elu", "relu", "exp")  # those without a projection


@overload
def linear_attention(
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    feature_map: str = "identity",
    return_normaliser: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def linear_attention(
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    feature_map: str = "identity",
    return_normaliser: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def linear_attention(
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    feature_map: str = "identity",
    return_normaliser: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with the kernel a . b in place of exp(q . k): O(N F Dv) time, O(N) memory.

        out_i = sum_j (a_i . b_j) v_j / n_i,      n_i = sum_j a_i . b_j,      0 where n_i = 0

    Katharopoulos et al., "Transformers are RNNs", ICML 2020, eq. 5 and (causal) 9.

    Args:
        query_features: a, (B, Hq, Nq, F), usually non-negative, in the value's dtype or float32; or what
            `feature_map` makes a of.
        key_features: b, (B, Hkv, Nk, F), like query_features.
        value: (B, Hkv, Nk, Dv), float32, float64, bfloat16 or float16; sums are float32 (float64 for float64).
        key_mask, is_causal, causal_alignment: as in `efficient_attn.methods.lowrank` and in `attention`.
        feature_map: "identity", "elu" (elu(x) + 1), "relu" or "exp", applied by the kernel in the accumulation dtype:
            the features are never in memory. The positive ones, "elu" and "exp", may span any range, far beyond that
            of float32; given features and "relu" are numbers of the accumulation dtype, and so are their products.
        return_normaliser: also return n (B, Hq, Nq), which joins branches: their n add, their n * out add. It is a
            number of the accumulation dtype, 0 or infinite where that cannot hold it, however right out is.
        backend: "auto", or a name in `efficient_attn.backends.BACKENDS`; an explicit choice that cannot serve raises.

    Returns:
        out (B, Hq, Nq, Dv) in the value's dtype, or (out, n). Differentiable once in features and value.

    Raises:
        InputError, InputTypeError: arguments that do not belong together.
        UnsupportedError: the backend asked for cannot serve this call.
    """
    if feature_map not in MAPS:
        raise InputError(f"feature_map must be one of {MAPS}, got {feature_map!r}")
    _check_features(query_features, key_features, value)
    check_key_mask(key_mask, value)
    out, normaliser, key_shift = run_operator(
        query_features, key_features, value, key_mask, is_causal, causal_alignment, backend, feature_map
    )
    if not return_normaliser:
        return out
    return out, normaliser * query_constants(key_shift, normaliser).exp() if key_shift.shape[2] else normaliser


def run_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    is_causal: bool,
    causal_alignment: str | None,
    backend: str,
    feature_map: str,
    projection: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, normaliser and key shift of checked inputs; the maps are those of backends/features.py."""
    sharding.refuse("linear attention on given features")
    q_len, kv_len = query.shape[2], value.shape[2]
    check_alignment(is_causal, causal_alignment, q_len, kv_len)
    offset = alignment_offset(causal_alignment, q_len, kv_len)
    key, value, key_mask = drop_unseen(key, value, key_mask, q_len, is_causal, causal_alignment)
    features = key.shape[3] if projection is None else projection.shape[-2]
    chosen = select(backend, LinearCall(value.device, value.dtype, max(features, value.shape[3])))
    out, normaliser, key_shift = ops.linear_attention_forward(
        query, key, value, key_mask, projection, is_causal, offset, feature_map, scale, chosen
    )
    return out, normaliser, key_shift


def drop_unseen(
    key: Tensor, value: Tensor, key_mask: Tensor | None, q_len: int, is_causal: bool, causal_alignment: str | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cut off the keys behind the last one that a query sees: whatever they hold, their gradients are 0."""
    if not is_causal or causal_alignment != "top_left" or q_len >= key.shape[2]:
        return key, value, key_mask
    return key[:, :, :q_len], value[:, :, :q_len], None if key_mask is None else key_mask[:, :q_len]


def linear_attention_weights(
    query_features: Tensor,
    key_features: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
) -> Tensor:
    """The weights a_i . b_j / n_i that `linear_attention` stands for, (B, Hq, Nq, Nk) in the features' dtype."""
    _check_features(query_features, key_features, key_features)
    check_key_mask(key_mask, key_features)
    q_len, kv_len = query_features.shape[2], key_features.shape[2]
    check_alignment(is_causal, causal_alignment, q_len, kv_len)
    dtype = accumulation_dtype(query_features.dtype)
    (key_features,) = select_keys(key_mask, key_features)
    weights = by_group(query_features.to(dtype), key_features) @ key_features.to(dtype).mT.unsqueeze(2)
    weights = weights.flatten(1, 2)
    if is_causal:
        offset = alignment_offset(causal_alignment, q_len, kv_len)
        i = torch.arange(q_len, device=weights.device)[:, None] + offset
        weights = weights.masked_fill(torch.arange(kv_len, device=weights.device) > i, 0.0)
    total = weights.sum(-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1.0)).to(query_features.dtype)


def elu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Linear attention with the feature map elu(x) + 1 (Katharopoulos et al., ICML 2020, eq. 7): O(N D Dv).

    Not an approximation of softmax attention: a kernel of its own, which the paper does not scale; `scale` raises.
    Arguments and result as in `attention`, dropout as in `efficient_attn.methods.lowrank`.

    Raises:
        UnsupportedError: a scale. InputError, InputTypeError: arguments that do not belong together.
    """
    query, key, value = prepare_inputs(query, key, value)
    _refuse_scale(scale)
    check_key_mask(key_mask, key)
    value = drop_keys(value, dropout_p, dropout_seed)
    out, _, _ = run_operator(query, key, value, key_mask, is_causal, causal_alignment, backend, "elu")
    return out


def elu_weights(
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
) -> Tensor:
    """The weights that `elu_attention` stands for, (B, Hq, Nq, Nk)."""
    query, key, _ = prepare_inputs(query, key, key)
    _refuse_scale(scale)
    check_key_mask(key_mask, key)
    e = exponents(query, key, key_mask, None, "elu", 1.0)
    weights = exponential_weights(e, key_mask, is_causal, causal_alignment).to(query.dtype)
    return drop_columns(weights, key.shape[1], dropout_p, dropout_seed)


def exponential_weights(e: Exponents, key_mask: Tensor | None, is_causal: bool, causal_alignment: str | None) -> Tensor:
    """The weights of positive features of any range: (B, Hq, Nq, Nk), each row under the shift of its epoch."""
    q_len, kv_len = e.query.shape[2], e.key.shape[2]
    check_alignment(is_causal, causal_alignment, q_len, kv_len)
    offset = alignment_offset(causal_alignment, q_len, kv_len)
    found = epochs(e.key, key_mask) if is_causal else [(0, largest_shift(e.key))]
    ends = [min(max(start - offset, 0), q_len) for start, _ in found[1:]] + [q_len]
    parts, first = [], 0
    for (_, shift), last in zip(found, ends, strict=True):
        factor = None if e.query_factor is None else e.query_factor[:, :, first:last]
        a, _, _ = shifted_queries(e._replace(query=e.query[:, :, first:last], query_factor=factor), shift)
        seen = min(max(last + offset, 0), kv_len) if is_causal else kv_len
        factor = None if e.key_factor is None else e.key_factor[:, :, :seen]
        b, _ = shifted_keys(e._replace(key=e.key[:, :, :seen], key_factor=factor), shift)
        part = (by_group(a, b) @ b.mT.unsqueeze(2)).flatten(1, 2)
        if is_causal:
            i = torch.arange(first, last, device=part.device)[:, None] + offset
            part = part.masked_fill(torch.arange(seen, device=part.device) > i, 0.0)
        parts.append(pad(part, (0, kv_len - seen)))
        first = last
    weights = torch.cat(parts, 2)
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def _refuse_scale(scale: float | None) -> None:
    if scale is not None:
        raise UnsupportedError(
            f"linear attention, of elu(x) + 1, has no scale; got {scale}; leave it None, or scale the queries"
        )


def _check_features(query_features: Tensor, key_features: Tensor, value: Tensor) -> None:
    tensors = (("query_features", query_features), ("key_features", key_features), ("value", value))
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputTypeError(f"{name} must be a floating-point tensor, got {kind}")
        if tensor.dim() != 4:
            raise InputError(
                f"{name} must be 4-dimensional, (batch, heads, length, features); got {tuple(tensor.shape)}"
            )
        if tensor.device != value.device:
            raise InputError(f"{name} is on {tensor.device}, value on {value.device}; move one of them")
    allowed = (value.dtype, accumulation_dtype(value.dtype))
    if query_features.dtype != key_features.dtype or query_features.dtype not in allowed:
        raise InputTypeError(
            f"features must share one dtype, {' or '.join(map(str, dict.fromkeys(allowed)))} beside value "
            f"{value.dtype}; got {query_features.dtype} and {key_features.dtype}"
        )
    B, Hq, _, features = query_features.shape
    Hkv = value.shape[1]
    if key_features.shape != (B, Hkv, value.shape[2], features) or value.shape[0] != B:
        raise InputError(
            "expected query_features (B, Hq, Nq, F), key_features (B, Hkv, Nk, F), value (B, Hkv, Nk, Dv); got "
            + ", ".join(str(tuple(t.shape)) for _, t in tensors)
        )
    if (Hq or Hkv) and (Hkv == 0 or Hq % Hkv):
        raise InputError(f"the query heads must be a multiple of the key/value heads; got Hq={Hq}, Hkv={Hkv}")


@register
@dataclass(frozen=True)
class Linear(LowRankMethod):
    """Linear attention with the feature map elu(x) + 1 (see `elu_attention`)."""

    name = "linear"
    formula = "phi(Q)(phi(K)^T V) / phi(Q)(phi(K)^T 1), phi = elu + 1"
    paper = "Katharopoulos et al. 2020"
    complexity = "n d^2"
    accepts_causal = True
    _attention = staticmethod(elu_attention)
    _weights = staticmethod(elu_weights)

    @property
    def needs_state(self) -> bool:
        return False

    def _options(self, state: Any, query: Tensor, key: Tensor, key_mask: Tensor | None) -> Mapping[str, Any]:
        return {}
