"""Linear attention on CPUs in C++ (csrc/cpu/linear_attention*.h): the same functions as `reference_linear`."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ..reference.attention import accumulation_dtype
from ..reference.linear_attention import CAUSAL_EXPONENT_LIMIT, RELU_FLOOR
from . import attention as cpu

FEATURE_MAPS = {"identity": 0, "elu": 1, "relu": 2, "performer_relu": 2, "performer_softmax": 3}  # params.h
FORWARD, BACKWARD = struct.Struct("14q4d16q4q"), struct.Struct("16qq")


def not_supported_reasons(device: torch.device, dtype: torch.dtype, width: int = 0) -> list[str]:
    """Why this backend cannot serve values of this dtype on this device; any width will do."""
    reasons = cpu.device_reasons(device)
    if dtype not in cpu.DTYPES:
        reasons.append(f"it computes float32, float64, bfloat16 and float16, not {dtype}")
    return reasons


def linear_attention_forward(
    query: Tensor,  # (B, Hq, Nq, D)
    key: Tensor,  # (B, Hkv, Nk, D)
    value: Tensor,  # (B, Hkv, Nk, Dv)
    key_mask: Tensor | None,  # (B, Nk) bool
    projection: Tensor | None,  # (F, D) or (Hkv, F, D)
    is_causal: bool,
    causal_offset: int,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out (B, Hq, Nq, Dv), the normaliser (B, Hq, Nq) and the key shift, as `reference_linear`."""
    dtype = accumulation_dtype(value.dtype)
    out = value.new_empty(*query.shape[:3], value.shape[3])
    normaliser = value.new_empty(query.shape[:3], dtype=dtype)
    shifted = feature_map == "performer_softmax" and not is_causal and projection is not None
    features = projection.shape[-2] if shifted and projection is not None else 0
    key_shift = value.new_empty(*key.shape[:2], features, dtype=dtype)
    if query.numel() == 0 or key.shape[2] == 0:
        return out.zero_(), normaliser.zero_(), key_shift.zero_()
    kept, words = _pack(
        query, key, value, key_mask, projection, out, normaliser, key_shift,
        is_causal, causal_offset, feature_map, scale,
    )  # fmt: skip
    cpu._cpu.linear_attention_forward(words, torch.get_num_threads())
    del kept
    return out, normaliser, key_shift


def linear_attention_backward(
    grad_out: Tensor,  # (B, Hq, Nq, Dv)
    grad_normaliser: Tensor | None,  # (B, Hq, Nq)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    projection: Tensor | None,
    out: Tensor,
    normaliser: Tensor,
    key_shift: Tensor,
    is_causal: bool,
    causal_offset: int,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, as `reference_linear`."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (query, key, value))
    if query.numel() == 0 or key.shape[2] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad_out = cpu.readable(grad_out.to(value.dtype))
    grad_normaliser = None if grad_normaliser is None else grad_normaliser.to(normaliser.dtype).contiguous()
    kept, words = _pack(
        query, key, value, key_mask, projection, out, normaliser, key_shift,
        is_causal, causal_offset, feature_map, scale,
    )  # fmt: skip
    words += BACKWARD.pack(*(x for t in (grad_out, dq, dk, dv) for x in cpu.view(t)), cpu.pointer(grad_normaliser))
    cpu._cpu.linear_attention_backward(words, torch.get_num_threads())
    del kept
    return dq, dk, dv


def _pack(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    projection: Tensor | None,
    out: Tensor,
    normaliser: Tensor,
    key_shift: Tensor,
    is_causal: bool,
    causal_offset: int,
    feature_map: str,
    scale: float,
) -> tuple[tuple[Tensor | None, ...], bytes]:
    """The words that csrc/cpu/module.cpp reads, and the tensors that must live until it is done."""
    views = tuple(map(cpu.readable, (query, key, value, out)))
    normaliser, key_shift = normaliser.contiguous(), key_shift.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    features, heads = key.shape[3], 0
    gain, floor = 1.0, 0.0
    if projection is not None:
        projection = projection.to(normaliser.dtype).contiguous()
        features, heads = projection.shape[-2], projection.shape[0] if projection.dim() == 3 else 1
        gain, floor = features**-0.5, RELU_FLOOR
    words = FORWARD.pack(
        cpu.DTYPES[query.dtype],
        cpu.DTYPES[value.dtype],
        *query.shape[:2],
        key.shape[1],
        query.shape[2],
        *key.shape[2:],
        features,
        value.shape[3],
        heads,
        FEATURE_MAPS[feature_map],
        is_causal,
        causal_offset,
        scale**0.5 if projection is not None else 1.0,
        gain,
        floor,
        CAUSAL_EXPONENT_LIMIT,
        *(x for t in views for x in cpu.view(t)),
        cpu.pointer(normaliser),
        cpu.pointer(key_shift if key_shift.numel() else None),
        cpu.pointer(key_mask),
        cpu.pointer(projection),
    )
    return (*views, normaliser, key_shift, key_mask, projection), words
