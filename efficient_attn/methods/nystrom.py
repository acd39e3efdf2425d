"""Nystrom attention: the softmax matrix from landmarks (Xiong et al., AAAI 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.call import accumulation_dtype
from ..defaults import default_scale
from ..errors import InputError, InputTypeError
from ..functional import attention, attention_weights, padded_attention
from ..inputs import add_to_bias, check_key_mask, prepare_inputs, select_keys
from ..options import check_range, register
from ..tracing import without_autocast
from .base import MethodState
from .lowrank import LowRankMethod, drop_columns, drop_keys, refuse_causal


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
        key_mask, dropout_p, dropout_seed: see `efficient_attn.methods.lowrank`.
        query_mask: bool (B, Nq): queries that shape the landmarks. All queries get an output. In self-attention pass
            key_mask here too, else what padding holds reaches the output through Q~.

    Returns:
        out (B, Hq, Nq, Dv). Differentiable in every tensor.

    Raises:
        UnsupportedError: is_causal. InputError, InputTypeError: arguments that do not belong together.
    """
    query, key, value = prepare_inputs(query, key, value)
    _check_nystrom(query, key, landmarks, pinv_iterations, conv_weight, key_mask, query_mask, is_causal)
    m = min(landmarks, query.shape[2], key.shape[2])
    if 0 in (m, *query.shape[:2]):
        return attention(query, key, value, scale=scale, backend=backend)
    scale = default_scale(scale, query.shape[-1])
    near, far, middle, far_bias = _nystrom_landmarks(query, key, m, key_mask, query_mask, scale)
    inverse = iterative_pinv(middle, pinv_iterations)  # (B, Hq, m, m)
    kept = drop_keys(value, dropout_p, dropout_seed)
    summary = padded_attention(near, key, kept, key_mask, scale=scale, backend=backend)  # (B, Hq, m, Dv)
    with without_autocast(query):
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
    query, key, _ = prepare_inputs(query, key, key)
    _check_nystrom(query, key, landmarks, pinv_iterations, conv_weight, key_mask, query_mask, is_causal)
    B, Hq, Nq, D = query.shape
    Hkv, Nk = key.shape[1:3]
    m = min(landmarks, Nq, Nk)
    if 0 in (m, B, Hq):
        return query.new_zeros(B, Hq, Nq, Nk)
    scale = default_scale(scale, D)
    near, far, middle, far_bias = _nystrom_landmarks(query, key, m, key_mask, query_mask, scale)
    inverse = iterative_pinv(middle, pinv_iterations)
    outer = attention_weights(query, far, bias=far_bias, scale=scale).to(inverse.dtype)
    key_bias = None if key_mask is None else add_to_bias(None, key_mask, query)
    inner = attention_weights(near, *select_keys(key_mask, key), bias=key_bias, scale=scale).to(inverse.dtype)
    with without_autocast(query):
        weights = outer @ (inverse @ inner)
    weights = drop_columns(weights, Hkv, dropout_p, dropout_seed)
    if conv_weight is not None:
        eye = torch.eye(Nk, dtype=weights.dtype, device=weights.device).expand(B, Hkv, Nk, Nk)
        weights = weights + _depthwise_conv(eye, conv_weight.to(weights.dtype), key_mask, Hq)
    return weights.to(query.dtype)


def iterative_pinv(matrix: Tensor, iterations: int = 6) -> Tensor:
    """Approximate pseudo-inverse of (..., m, m), at least float32, without a decomposition.

        Z_0 = A^T / (|A|_1 |A|_inf),      Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4

    Xiong et al. 2021, eq. 11. Rows and columns of zeros stay zero.
    """
    with without_autocast(matrix):
        a = matrix.to(accumulation_dtype(matrix.dtype)).reshape(-1, *matrix.shape[-2:])
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        columns, rows = a.abs().sum(-2).amax(-1), a.abs().sum(-1).amax(-1)
        norms = (columns * rows)[..., None, None]
        z = a.mT / norms.masked_fill(norms == 0, 1.0)
        for _ in range(iterations):  # numbers and differences inside the products: a step is five small kernels
            az = torch.bmm(a, z)
            inner = torch.baddbmm(eye, az, 7 * eye - az, beta=15, alpha=-1)
            z = torch.bmm(z, torch.baddbmm(eye, az, inner, beta=3.25, alpha=-0.25))
        return z.view(matrix.shape)


def _nystrom_landmarks(
    query: Tensor, key: Tensor, m: int, key_mask: Tensor | None, query_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Q~ and K~ (B, Hq, m, D), softmax(scale Q~ K~^T) (B, Hq, m, m), and the bias that hides unused K~."""
    near, near_used = segment_means(query, m, query_mask)
    far, far_used = segment_means(key, m, key_mask)
    far = far.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    middle, far_bias = compared(near, near_used, far, far_used, scale)
    return near, far, middle, far_bias


def compared(
    near: Tensor, near_used: Tensor | None, far: Tensor, far_used: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale Q~ K~^T) (B, Hq, m, m), and the bias that hides unused K~, of landmarks (B, Hq, m, D)."""
    far_bias = None if far_used is None else add_to_bias(None, far_used, near)
    dtype = accumulation_dtype(near.dtype)
    with without_autocast(near):  # the pseudo-inverse wants more than half precision
        if far_bias is None:
            middle = torch.softmax((near.to(dtype) @ far.to(dtype).mT) * scale, -1)
        else:  # `attention_weights` defines rows without a landmark
            middle = attention_weights(near.to(dtype), far.to(dtype), bias=far_bias.to(dtype), scale=scale)
    if near_used is not None:
        middle = middle.masked_fill(~near_used[:, None, :, None], 0.0)
    return middle, far_bias


def segment_means(x: Tensor, segments: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Means of consecutive segments of the visible rows of (B, H, N, D).

    Returns (B, H, segments, D) and which segments exist, bool (B, segments), or None when all do.

    Visible row number r of L belongs to segment r * s // L, s = min(segments, L): sizes differ by one at most.
    """
    N = x.shape[2]
    dtype = accumulation_dtype(x.dtype)
    if mask is None and N % segments == 0:
        parts = x.unflatten(2, (segments, N // segments))
        # The gradient of a mean is divided where it is as long as x, that of a sum times a number where it is short.
        return parts.sum(3) * (segments / N) if x.dtype == dtype else parts.mean(3), None
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
    with without_autocast(x):
        return (weights @ x.to(dtype)).to(x.dtype).contiguous(), used


def _depthwise_conv(value: Tensor, conv_weight: Tensor, key_mask: Tensor | None, heads: int) -> Tensor:
    """Convolve (B, Hkv, N, Dv) along N, each head with its own filter, and repeat to the query heads."""
    (value,) = select_keys(key_mask, value)
    Hkv, width = value.shape[1], conv_weight.shape[-1]
    weight = conv_weight.to(value.dtype).expand(Hkv, width)[:, None, :, None]
    mixed = F.conv2d(value, weight, padding=(width // 2, 0), groups=Hkv)
    return mixed.repeat_interleave(heads // Hkv, dim=1).to(value.dtype)


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
    if is_causal:
        refuse_causal("Nystrom", "its landmarks mix positions")
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


class NystromState(MethodState):
    """The filters of Nystrom's convolution, (Hkv, conv)."""

    def __init__(
        self, method: Nystrom, num_heads: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.conv_weight = nn.Parameter(torch.empty(num_heads, method.conv, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at zero: the plain approximation, from which training departs."""
        nn.init.zeros_(self.conv_weight)


@register
@dataclass(frozen=True)
class Nystrom(LowRankMethod):
    """The softmax matrix interpolated from landmarks (see `nystrom_attention`).

    In self-attention (Nq = Nk) the key mask also says which queries shape the landmarks.

    Fields:
        landmarks: m.
        pinv_iterations: steps of the pseudo-inverse.
        conv: width of the depthwise convolution of the values, odd; 0 is none. The filters are learned, from zero.
    """

    name = "nystrom"
    formula = "softmax(QK~^T) pinv(softmax(Q~K~^T)) softmax(Q~K^T)V"
    paper = "Xiong et al. 2021"
    complexity = "n m d"
    _attention = staticmethod(nystrom_attention)
    _weights = staticmethod(nystrom_weights)

    landmarks: int = 32
    pinv_iterations: int = 6
    conv: int = 0

    def check(self) -> None:
        check_range(self, "landmarks", 1)
        check_range(self, "pinv_iterations", 1, 100)
        check_range(self, "conv", 0)
        if self.conv and self.conv % 2 == 0:
            raise InputError(f"nystrom: conv must be 0 or odd, got {self.conv}")

    def build(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module | None:
        return NystromState(self, num_heads, device=device, dtype=dtype) if self.conv else None

    @property
    def needs_state(self) -> bool:
        return self.conv > 0

    def _options(self, state: Any, query: Tensor, key: Tensor, key_mask: Tensor | None) -> Mapping[str, Any]:
        return {
            "landmarks": self.landmarks,
            "pinv_iterations": self.pinv_iterations,
            "conv_weight": state.conv_weight if self.conv else None,
            "query_mask": key_mask if query.shape[2] == key.shape[2] else None,
        }
