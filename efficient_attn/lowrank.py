"""Low-rank attention in O(N): Linformer, Nystrom, Performer and linear attention, each exact to its paper.

They are built from the two primitives, exact attention and linear attention, so every backend, dtype and gradient of
these serves them. Letters: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D and Dv head dims,
G = Hq / Hkv. Each function has a companion `*_weights` that writes the implied weights out: n x n, on request only.

`key_mask` is bool (B, Nk), True = attend; what a masked key holds, NaN included, has no influence. Where weights are
never formed, dropout drops whole keys: w_ij becomes w_ij keep_j / (1 - p), with one keep_j for every query of a head.
Each weight is then dropped with probability p as usual, and the expectation is the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.reference import accumulation_dtype, dropout_keep
from .errors import InputError, InputTypeError, UnsupportedError
from .functional import (
    attention,
    attention_weights,
    autocast,
    check_alignment,
    check_dropout,
    check_inputs,
    resolve_seed,
)
from .ops import linear_attention as ops
from .padding import add_to_bias, check_key_mask, padded_attention, select_keys

FEATURES = ("softmax", "relu")
RELU_FLOOR = 1e-3  # added to relu features, so that a normaliser cannot vanish
CAUSAL_EXPONENT_LIMIT = 60.0  # e^60: room for sums over a million keys in float32


# --- linear attention ------------------------------------------------------------------------------------------------


def linear_attention(
    query_features: Tensor,
    key_features: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    return_normaliser: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with the kernel a . b in place of exp(q . k), features mapped already: O(N F Dv) time, O(N) memory.

        out_i = sum_j (a_i . b_j) v_j / n_i,      n_i = sum_j a_i . b_j,      0 where n_i = 0

    Katharopoulos et al., "Transformers are RNNs", ICML 2020, eq. 5 and (causal) 9.

    Args:
        query_features: a, (B, Hq, Nq, F), usually non-negative, in the value's dtype or float32.
        key_features: b, (B, Hkv, Nk, F), like query_features.
        value: (B, Hkv, Nk, Dv), float32, float64, bfloat16 or float16; sums are float32 (float64 for float64).
        key_mask, is_causal, causal_alignment: as in this module and in `attention`.
        return_normaliser: also return n (B, Hq, Nq), which joins branches: their n add, their n * out add.
        backend: "auto" or "reference".

    Returns:
        out (B, Hq, Nq, Dv) in the value's dtype, or (out, n). Differentiable once in features and value.

    Raises:
        InputError, InputTypeError: arguments that do not belong together.
    """
    _check_features(query_features, key_features, value)
    check_key_mask(key_mask, value)
    q_len, kv_len = query_features.shape[2], value.shape[2]
    check_alignment(is_causal, causal_alignment, q_len, kv_len)
    offset = kv_len - q_len if causal_alignment == "bottom_right" else 0
    out, normaliser = torch.ops.efficient_attn.linear_attention_forward(
        query_features, key_features, value, key_mask, is_causal, offset, ops.select(backend)
    )
    return (out, normaliser) if return_normaliser else out


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
    weights = _by_group(query_features.to(dtype), key_features) @ key_features.to(dtype).mT.unsqueeze(2)
    weights = weights.flatten(1, 2)
    if is_causal:
        offset = kv_len - q_len if causal_alignment == "bottom_right" else 0
        i = torch.arange(q_len, device=weights.device)[:, None] + offset
        weights = weights.masked_fill(torch.arange(kv_len, device=weights.device) > i, 0.0)
    total = weights.sum(-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1.0)).to(query_features.dtype)


def elu_features(x: Tensor) -> Tensor:
    """elu(x) + 1 = x + 1 for x > 0, e^x else; positive, without the rounding of e^x - 1 + 1."""
    return torch.where(x > 0, x + 1.0, torch.exp(x.clamp(max=0.0)))


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
    Arguments and result as in `attention`, dropout as in this module.

    Raises:
        UnsupportedError: a scale. InputError, InputTypeError: arguments that do not belong together.
    """
    query, key, value = autocast(query, key, value)
    check_inputs(query, key, value)
    _refuse_scale(scale)
    query, key = elu_qk(query, key, key_mask)
    value = drop_keys(value, dropout_p, dropout_seed)
    return linear_attention(
        query,
        key,
        value,
        key_mask=key_mask,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        backend=backend,
    )


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
    query, key = autocast(query, key)
    check_inputs(query, key, key)
    _refuse_scale(scale)
    features = elu_qk(query, key, key_mask)
    weights = linear_attention_weights(
        *features, key_mask=key_mask, is_causal=is_causal, causal_alignment=causal_alignment
    ).to(query.dtype)
    return _drop_columns(weights, key.shape[1], dropout_p, dropout_seed)


def elu_qk(query: Tensor, key: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Features of queries and keys in the accumulation dtype; masked keys are cleared first."""
    check_key_mask(key_mask, key)
    (key,) = select_keys(key_mask, key)
    dtype = accumulation_dtype(query.dtype)
    return elu_features(query.to(dtype)), elu_features(key.to(dtype))


# --- Performer -------------------------------------------------------------------------------------------------------


def performer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor,
    *,
    feature: str = "softmax",
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """FAVOR+: linear attention with m random features whose products are exp(scale q . k) in expectation: O(N m Dv).

        softmax:  phi(x)_f = exp(w_f . x' - |x'|^2 / 2) / sqrt(m)      x' = sqrt(scale) x,  w_f rows of `projection`
        relu:     phi(x)_f = max(w_f . x', 0) / sqrt(m) + 1e-3         (a kernel of its own, no estimate of softmax)

    Choromanski et al., "Rethinking Attention with Performers", ICLR 2021, section 2. The variance of the estimate
    grows like exp(|q' + k'|^2): with large or peaked scores many features are needed.

    Args:
        query, key, value, scale: as in `attention`; scale must be positive.
        projection: (m, D), or (Hkv, m, D) with own features for each key/value head; see `random_projection`.
        feature: "softmax" or "relu".
        key_mask, dropout_p, dropout_seed: see this module.
        is_causal, causal_alignment: as in `attention`.

    Returns:
        out (B, Hq, Nq, Dv). Differentiable once in query, key and value.

    Raises:
        InputError, InputTypeError: arguments that do not belong together.
    """
    query, key, value = autocast(query, key, value)
    check_inputs(query, key, value)
    check_alignment(is_causal, causal_alignment, query.shape[2], key.shape[2])
    a, b = performer_features(
        query, key, projection, feature=feature, key_mask=key_mask, is_causal=is_causal, scale=scale
    )
    return linear_attention(
        a,
        b,
        drop_keys(value, dropout_p, dropout_seed),
        key_mask=key_mask,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        backend=backend,
    )


def performer_weights(
    query: Tensor,
    key: Tensor,
    projection: Tensor,
    *,
    feature: str = "softmax",
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
) -> Tensor:
    """The weights that `performer_attention` stands for, (B, Hq, Nq, Nk)."""
    query, key = autocast(query, key)
    check_inputs(query, key, key)
    features = performer_features(
        query, key, projection, feature=feature, key_mask=key_mask, is_causal=is_causal, scale=scale
    )
    weights = linear_attention_weights(
        *features, key_mask=key_mask, is_causal=is_causal, causal_alignment=causal_alignment
    ).to(query.dtype)
    return _drop_columns(weights, key.shape[1], dropout_p, dropout_seed)


def performer_features(
    query: Tensor,
    key: Tensor,
    projection: Tensor,
    *,
    feature: str = "softmax",
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Features a (B, Hq, Nq, m) and b (B, Hkv, Nk, m), float32 (float64 for float64), for `linear_attention`.

    Softmax features are scaled such that nothing overflows and a . b / n stays what it is: each row of a by a constant,
    and, not causal, each feature by c_f in b and 1 / c_f in a, c_f from the largest visible key. That makes n >= 1 for
    every row. With causality no factor may depend on keys to come, so there b saturates at e^60 instead.

    Raises:
        InputError, InputTypeError: an unknown feature, a projection or key_mask that does not fit, a scale <= 0.
    """
    _check_projection(projection, query, key, feature)
    check_key_mask(key_mask, key)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0.0 < scale < math.inf:
        raise InputError(f"Performer needs a positive scale (features take its square root), got {scale}")
    (key,) = select_keys(key_mask, key)
    dtype = accumulation_dtype(query.dtype)
    projection = projection.to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.to(dtype) * scale**0.5, key.to(dtype) * scale**0.5
        per_group = projection if projection.dim() == 2 else projection.unsqueeze(1)
        a = _by_group(query, key) @ per_group.mT  # (B, Hkv, G, Nq, m)
        b = key @ projection.mT  # (B, Hkv, Nk, m)
        if feature == "relu":
            root = projection.shape[-2] ** -0.5
            return (a.relu() * root + RELU_FLOOR).flatten(1, 2), b.relu() * root + RELU_FLOOR
        b = b - key.square().sum(-1, keepdim=True) / 2
        if is_causal or key.shape[2] == 0:
            b = b.clamp(max=CAUSAL_EXPONENT_LIMIT)
        else:
            largest = b.detach()
            if key_mask is not None:
                largest = largest.masked_fill(~key_mask[:, None, :, None], -torch.inf)
            largest = largest.amax(2, keepdim=True)  # (B, Hkv, 1, m)
            largest = largest.masked_fill(largest == -torch.inf, 0.0)
            a, b = a + largest.unsqueeze(2), b - largest
            if key_mask is not None:  # a cleared key may be far above the largest visible one
                b = b.masked_fill(~key_mask[:, None, :, None], -torch.inf)
        a = a - a.detach().amax(-1, keepdim=True)
        return a.exp().flatten(1, 2), b.exp()


def random_projection(
    features: int,
    head_dim: int,
    *,
    num_heads: int | None = None,
    orthogonal: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw w for `performer_attention`: (features, head_dim), or (num_heads, features, head_dim). Call again to redraw.

    Every row is N(0, I) by itself; `orthogonal` makes the rows of each block of head_dim rows orthogonal to each other,
    with the lengths of independent Gaussian rows, which lowers the variance (Choromanski et al. 2021, section 2.4).
    Drawn on the CPU in float64, so that a generator gives the same features on every device.
    """
    if features < 1 or head_dim < 1 or (num_heads is not None and num_heads < 1):
        raise InputError(f"features, head_dim and num_heads must be >= 1; got {features}, {head_dim}, {num_heads}")
    heads = 1 if num_heads is None else num_heads
    gaussian = torch.randn(heads, features, head_dim, generator=generator, dtype=torch.float64)
    if orthogonal:
        blocks = -(-features // head_dim)
        square = torch.randn(heads, blocks, head_dim, head_dim, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(square)
        q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # uniform over rotations
        gaussian = q.flatten(1, 2)[:, :features] * gaussian.norm(dim=-1, keepdim=True)
    return (gaussian[0] if num_heads is None else gaussian).to(device=device, dtype=dtype)


# --- Linformer -------------------------------------------------------------------------------------------------------


def linformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over r learned mixtures of the keys and values: softmax(scale Q (E K)^T) (F V), O(N r (D + Dv)).

    Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020, eq. 7. Masked keys and values count as zero.
    A mixture holds keys of every position, so there is no causal Linformer, no mask of pairs, and no bias.

    Args:
        query, key, value, scale, dropout_p, dropout_seed: as in `attention`; dropout acts on the (Nq, r) weights.
        key_projection: E, (r, max_len), or (Hkv, r, max_len) with own mixtures for each head; Nk <= max_len. Shorter
            sequences use the first Nk columns.
        value_projection: F, like E.
        key_mask: see this module.

    Returns:
        out (B, Hq, Nq, Dv). Differentiable in every tensor.

    Raises:
        UnsupportedError: is_causal. InputError, InputTypeError: arguments that do not belong together.
    """
    query, key, value = autocast(query, key, value)
    check_inputs(query, key, value)
    check_key_mask(key_mask, key)
    _refuse_causal("Linformer", "each of its r keys mixes all positions", is_causal)
    E = _sequence_projection("key_projection", key_projection, key)
    F_ = _sequence_projection("value_projection", value_projection, value)
    if E.shape[-2] != F_.shape[-2]:
        raise InputError(f"key_projection has rank {E.shape[-2]}, value_projection {F_.shape[-2]}; they must be equal")
    key, value = select_keys(key_mask, key, value)
    # Contiguous, for the product with a broadcast matrix may come back transposed.
    return attention(
        query,
        (E @ key).contiguous(),
        (F_ @ value).contiguous(),
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        backend=backend,
    )


def linformer_weights(
    query: Tensor,
    key: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
) -> Tensor:
    """What multiplies the values in `linformer_attention`: softmax(scale Q (E K)^T) F, (B, Hq, Nq, Nk). May be negative."""
    query, key = autocast(query, key)
    check_inputs(query, key, key)
    check_key_mask(key_mask, key)
    _refuse_causal("Linformer", "each of its r keys mixes all positions", is_causal)
    E = _sequence_projection("key_projection", key_projection, key)
    F_ = _sequence_projection("value_projection", value_projection, key)
    (key,) = select_keys(key_mask, key)
    weights = attention_weights(query, E @ key, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed)
    weights = weights @ (F_ if F_.dim() == 2 else F_.repeat_interleave(query.shape[1] // max(key.shape[1], 1), 0))
    return weights if key_mask is None else weights.masked_fill(~key_mask[:, None, None, :], 0.0)


# --- Nystrom ---------------------------------------------------------------------------------------------------------


def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    landmarks: int = 32,
    pinv_iterations: int = 6,
    conv_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The Nystrom approximation of the softmax matrix from m landmarks: O(N m (D + Dv)) time, O(N) memory.

        out = softmax(scale Q K~^T)  pinv(softmax(scale Q~ K~^T))  softmax(scale Q~ K^T) V   [+ depthwise conv of V]

    Xiong et al., "Nystromformer", AAAI 2021, eq. 13 with the iteration of eq. 11. Q~ and K~ are means of m consecutive
    segments of the visible queries and keys, whose sizes differ by one at most; with fewer of them than m, each is its
    own landmark. Landmarks mix positions, so there is no causal Nystrom, no mask of pairs, and no bias.

    Args:
        query, key, value, scale: as in `attention`.
        landmarks: m, used up to min(Nq, Nk).
        pinv_iterations: steps towards the pseudo-inverse, run in float32 (float64 for float64); the paper takes 6.
        conv_weight: (width,) or (Hkv, width), odd width: adds sum_t conv_weight[t] v_{i + t - width // 2}; Nq = Nk.
        key_mask, dropout_p, dropout_seed: see this module.
        query_mask: bool (B, Nq): queries that shape the landmarks. All queries get an output. In self-attention pass
            key_mask here too, else what padding holds reaches the output through Q~.

    Returns:
        out (B, Hq, Nq, Dv). Differentiable in every tensor.

    Raises:
        UnsupportedError: is_causal. InputError, InputTypeError: arguments that do not belong together.
    """
    query, key, value = autocast(query, key, value)
    check_inputs(query, key, value)
    _check_nystrom(query, key, landmarks, pinv_iterations, conv_weight, key_mask, query_mask, is_causal)
    m = min(landmarks, query.shape[2], key.shape[2])
    if m == 0:
        return attention(query, key, value, scale=scale, backend=backend)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    near, far, middle, far_bias = _nystrom_landmarks(query, key, m, key_mask, query_mask, scale)
    inverse = iterative_pinv(middle, pinv_iterations)  # (B, Hq, m, m)
    kept = drop_keys(value, dropout_p, dropout_seed)
    summary = padded_attention(near, key, kept, key_mask, scale=scale, backend=backend)  # (B, Hq, m, Dv)
    with torch.autocast(query.device.type, enabled=False):
        summary = (inverse @ summary.to(inverse.dtype)).to(query.dtype)
    out = attention(query, far, summary, bias=far_bias, scale=scale, backend=backend)
    return out if conv_weight is None else out + _depthwise_conv(value, conv_weight, key_mask, query.shape[1])


def nystrom_weights(
    query: Tensor,
    key: Tensor,
    *,
    landmarks: int = 32,
    pinv_iterations: int = 6,
    conv_weight: Tensor | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
) -> Tensor:
    """What multiplies the values in `nystrom_attention`, convolution included, (B, Hq, Nq, Nk). May be negative."""
    query, key = autocast(query, key)
    check_inputs(query, key, key)
    _check_nystrom(query, key, landmarks, pinv_iterations, conv_weight, key_mask, query_mask, is_causal)
    B, Hq, Nq, D = query.shape
    Hkv, Nk = key.shape[1:3]
    m = min(landmarks, Nq, Nk)
    if m == 0:
        return query.new_zeros(B, Hq, Nq, Nk)
    scale = D**-0.5 if scale is None else float(scale)
    near, far, middle, far_bias = _nystrom_landmarks(query, key, m, key_mask, query_mask, scale)
    inverse = iterative_pinv(middle, pinv_iterations)
    outer = attention_weights(query, far, bias=far_bias, scale=scale).to(inverse.dtype)
    key_bias = None if key_mask is None else add_to_bias(None, key_mask, query)
    inner = attention_weights(near, *select_keys(key_mask, key), bias=key_bias, scale=scale).to(inverse.dtype)
    with torch.autocast(query.device.type, enabled=False):
        weights = outer @ (inverse @ inner)
    weights = _drop_columns(weights, Hkv, dropout_p, dropout_seed)
    if conv_weight is not None:
        eye = torch.eye(Nk, dtype=weights.dtype, device=weights.device).expand(B, Hkv, Nk, Nk)
        weights = weights + _depthwise_conv(eye, conv_weight.to(weights.dtype), key_mask, Hq)
    return weights.to(query.dtype)


def iterative_pinv(matrix: Tensor, iterations: int = 6) -> Tensor:
    """Approximate pseudo-inverse of (..., m, m), at least float32, without a decomposition (Xiong et al. 2021, eq. 11).

    Z_0 = A^T / (|A|_1 |A|_inf),   Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4.  Rows and columns of zeros stay zero.
    """
    with torch.autocast(matrix.device.type, enabled=False):
        a = matrix.to(accumulation_dtype(matrix.dtype))
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        columns, rows = a.abs().sum(-2).amax(-1), a.abs().sum(-1).amax(-1)
        norms = (columns * rows)[..., None, None]
        z = a.mT / norms.masked_fill(norms == 0, 1.0)
        for _ in range(iterations):
            az = a @ z
            z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
        return z


def _nystrom_landmarks(
    query: Tensor, key: Tensor, m: int, key_mask: Tensor | None, query_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Q~ (B, Hq, m, D), K~ (B, Hq, m, D), softmax(scale Q~ K~^T) (B, Hq, m, m), and the bias that hides unused K~."""
    near, near_used = segment_means(query, m, query_mask)
    far, far_used = segment_means(key, m, key_mask)
    far = far.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    far_bias = None if far_used is None else add_to_bias(None, far_used, query)
    dtype = accumulation_dtype(query.dtype)
    middle = attention_weights(
        near.to(dtype), far.to(dtype), bias=None if far_bias is None else far_bias.to(dtype), scale=scale
    )
    if near_used is not None:
        middle = middle.masked_fill(~near_used[:, None, :, None], 0.0)
    return near, far, middle, far_bias


def segment_means(x: Tensor, segments: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Means of consecutive segments of the visible rows of (B, H, N, D): (B, H, segments, D), and which exist (B, segments).

    Visible row number r of L belongs to segment r * s // L, s = min(segments, L): sizes differ by one at most.
    """
    N = x.shape[2]
    if mask is None and N % segments == 0:
        return x.unflatten(2, (segments, N // segments)).mean(3), None
    dtype = accumulation_dtype(x.dtype)
    row = torch.arange(segments, device=x.device)[:, None]
    if mask is None:
        member = torch.arange(N, device=x.device) * segments // N == row  # (segments, N)
        used = None
    else:
        (x,) = select_keys(mask, x)
        length = mask.sum(-1, keepdim=True)
        used_count = length.clamp(max=segments)
        segment = (mask.cumsum(-1) - 1) * used_count // length.clamp(min=1)
        member = ((segment[:, None, :] == row) & mask[:, None, :]).unsqueeze(1)  # (B, 1, segments, N)
        used = torch.arange(segments, device=x.device) < used_count
    weights = member.to(dtype) / member.sum(-1, keepdim=True).clamp(min=1)
    with torch.autocast(x.device.type, enabled=False):
        return (weights @ x.to(dtype)).to(x.dtype).contiguous(), used


def _depthwise_conv(value: Tensor, conv_weight: Tensor, key_mask: Tensor | None, heads: int) -> Tensor:
    """Convolve (B, Hkv, N, Dv) along N, each head with its own filter, and repeat to the query heads."""
    (value,) = select_keys(key_mask, value)
    Hkv, width = value.shape[1], conv_weight.shape[-1]
    weight = conv_weight.to(value.dtype).expand(Hkv, width)[:, None, :, None]
    mixed = F.conv2d(value, weight, padding=(width // 2, 0), groups=Hkv)
    return mixed.repeat_interleave(heads // Hkv, dim=1).to(value.dtype)


# --- shared ----------------------------------------------------------------------------------------------------------


def drop_keys(value: Tensor, dropout_p: float, dropout_seed: int | Tensor | None) -> Tensor:
    """Zero whole values and scale the others by 1 / (1 - p): a pure function of (seed, b, key/value head, j)."""
    check_dropout(dropout_p)
    if dropout_p == 0.0:
        return value
    B, Hkv, Nk, _ = value.shape
    kept = dropout_keep((B, Hkv, 1, Nk), dropout_p, resolve_seed(dropout_seed), value.device)
    return torch.where(kept.transpose(2, 3), value / (1.0 - dropout_p), 0.0)


def _drop_columns(weights: Tensor, kv_heads: int, dropout_p: float, dropout_seed: int | Tensor | None) -> Tensor:
    """`drop_keys` as it looks on the weights (B, Hq, Nq, Nk)."""
    ones = weights.new_ones(weights.shape[0], kv_heads, weights.shape[3], 1)
    factors = drop_keys(ones, dropout_p, dropout_seed).mT
    return weights * factors.repeat_interleave(weights.shape[1] // max(kv_heads, 1), dim=1)


def _by_group(query: Tensor, key: Tensor) -> Tensor:
    """(B, Hq, Nq, D) -> (B, Hkv, G, Nq, D)."""
    return query.unflatten(1, (key.shape[1], query.shape[1] // max(key.shape[1], 1)))


def _refuse_causal(name: str, reason: str, is_causal: bool) -> None:
    if is_causal:
        raise UnsupportedError(
            f"{name} cannot be causal: {reason}. Use performer, linear or a sparse method such as sliding_window"
        )


def _refuse_scale(scale: float | None) -> None:
    if scale is not None:
        raise UnsupportedError(f"elu(x) + 1 attention has no scale, got {scale}; leave it None, or scale the queries")


def _check_features(query_features: Tensor, key_features: Tensor, value: Tensor) -> None:
    tensors = (("query_features", query_features), ("key_features", key_features), ("value", value))
    for name, tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputTypeError(f"{name} must be a floating-point tensor, got {kind}")
        if tensor.dim() != 4:
            raise InputError(
                f"{name} must have 4 dimensions (batch, heads, length, features), got {tuple(tensor.shape)}"
            )
        if tensor.device != value.device:
            raise InputError(f"{name} is on {tensor.device}, value on {value.device}; move one of them")
    allowed = (value.dtype, accumulation_dtype(value.dtype))
    if query_features.dtype != key_features.dtype or query_features.dtype not in allowed:
        raise InputTypeError(
            f"features must share one dtype, {' or '.join(map(str, dict.fromkeys(allowed)))} beside value {value.dtype}; "
            f"got {query_features.dtype} and {key_features.dtype}"
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


def _check_projection(projection: Any, query: Tensor, key: Tensor, feature: str) -> None:
    if feature not in FEATURES:
        raise InputError(f"feature must be one of {FEATURES}, got {feature!r}")
    if not isinstance(projection, Tensor) or not projection.is_floating_point():
        raise InputTypeError(f"projection must be a floating-point tensor, got {type(projection).__name__}")
    heads, D = key.shape[1], query.shape[-1]
    if projection.dim() not in (2, 3) or projection.shape[-1] != D or projection.shape[:-2] not in ((), (heads,)):
        raise InputError(
            f"projection must be (features, D) or (Hkv, features, D) with D={D}, Hkv={heads}; got "
            f"{tuple(projection.shape)}. random_projection(features, {D}) draws one"
        )


def _sequence_projection(name: str, projection: Any, tensor: Tensor) -> Tensor:
    """The first Nk columns of E or F, in the dtype of the tensor that it mixes."""
    if not isinstance(projection, Tensor) or not projection.is_floating_point():
        raise InputTypeError(f"{name} must be a floating-point tensor, got {type(projection).__name__}")
    heads, length = tensor.shape[1:3]
    if projection.dim() not in (2, 3) or projection.shape[:-2] not in ((), (heads,)) or projection.shape[-2] < 1:
        raise InputError(
            f"{name} must be (rank, max_len) or (Hkv, rank, max_len) with Hkv={heads}, got {tuple(projection.shape)}"
        )
    if projection.shape[-1] < length:
        raise InputError(
            f"{length} keys do not fit {name} {tuple(projection.shape)}: Linformer is built for max_len="
            f"{projection.shape[-1]} keys. Build it with max_len >= {length}"
        )
    return projection[..., :length].to(tensor.dtype)


def _check_nystrom(
    query: Tensor,
    key: Tensor,
    landmarks: int,
    pinv_iterations: int,
    conv_weight: Tensor | None,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    is_causal: bool,
) -> None:
    _refuse_causal("Nystrom", "its landmarks mix positions", is_causal)
    if landmarks < 1 or pinv_iterations < 1:
        raise InputError(f"landmarks and pinv_iterations must be >= 1, got {landmarks} and {pinv_iterations}")
    check_key_mask(key_mask, key)
    if query_mask is not None:
        if not isinstance(query_mask, Tensor) or query_mask.dtype != torch.bool:
            raise InputTypeError("query_mask must be a bool tensor (B, Nq) with True = shapes the landmarks")
        if query_mask.shape != (query.shape[0], query.shape[2]) or query_mask.device != query.device:
            raise InputError(
                f"query_mask must be (B, Nq) = {(query.shape[0], query.shape[2])} on {query.device}, got "
                f"{tuple(query_mask.shape)} on {query_mask.device}"
            )
    if conv_weight is None:
        return
    heads = key.shape[1]
    if (
        conv_weight.dim() not in (1, 2)
        or conv_weight.shape[:-1] not in ((), (heads,))
        or conv_weight.shape[-1] % 2 == 0
    ):
        raise InputError(
            f"conv_weight must be (width,) or (Hkv, width) with an odd width and Hkv={heads}, got "
            f"{tuple(conv_weight.shape)}"
        )
    if query.shape[2] != key.shape[2]:
        raise InputError(
            f"the convolution of the values needs as many queries as keys, got {query.shape[2]} and {key.shape[2]}"
        )
