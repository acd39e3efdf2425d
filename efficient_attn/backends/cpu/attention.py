"""The C++ backend for CPUs (csrc/cpu): the same functions as `reference`, in tiles and without n x n memory."""

from __future__ import annotations

import importlib
import os
import struct
from typing import Any

import torch  # before _cpu: the process then has one OpenMP runtime, PyTorch's
from torch import Tensor

from ...masks import MaskArrays
from ..call import Call, zeroed

_cpu: Any
try:
    _cpu = importlib.import_module("efficient_attn._cpu")
    MISSING = ""
except ImportError as error:
    if os.environ.get("EFFICIENT_ATTN_ISA"):
        raise  # an instruction set asked for by name never falls back
    _cpu = None
    MISSING = f"the native module is not built or cannot be loaded ({error}); reinstall with a C++17 compiler"

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Bytes from which a gradient is worth huge pages.
LARGE = 64 * 2**20
_NO_LISTS: tuple[int, ...] = (0,) * 9
_NO_BIAS: tuple[int, ...] = (0,) * 6
FORWARD, BACKWARD = struct.Struct("8q2dq16q7q17q"), struct.Struct("16q6q")


def not_supported_reasons(call: Call) -> list[str]:
    """Why this backend cannot serve `call`."""
    return device_reasons(call.device)


def device_reasons(device: torch.device) -> list[str]:
    """Why no kernel of this module can run on `device`."""
    reasons = [MISSING] if MISSING else []
    if device.type != "cpu":
        reasons.append(f"it runs on CPU tensors; these are on {device}")
    return reasons


def attention_forward(
    query: Tensor,  # (B, Hq, Nq, D)
    key: Tensor,  # (B, Hkv, Nk, D)
    value: Tensor,  # (B, Hkv, Nk, Dv)
    bias: Tensor | None,
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return out (B, Hq, Nq, Dv) in the query's dtype and lse (B, Hq, Nq), as `reference.attention_forward`."""
    query, key, value = readable(query), readable(key), readable(value)
    B, Hq, Nq, _ = query.shape
    dtype = query.dtype
    out = torch.empty((B, Hq, Nq, value.shape[3]), dtype=dtype)
    lse = torch.empty((B, Hq, Nq), dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    if key.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    if out.numel() > 0:
        kept, words = pack(query, key, value, bias, out, lse, mask, scale, dropout_p, dropout_seed)
        _cpu.attention_forward(words, torch.get_num_threads())
        del kept
    return out, lse


def attention_backward(
    grad_out: Tensor,  # (B, Hq, Nq, Dv)
    grad_lse: Tensor | None,  # (B, Hq, Nq)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    bias_requires_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return dq, dk, dv and dbias (None unless wanted), as `reference.attention_backward`."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (query, key, value))
    dbias = _zeros(bias.shape, bias.dtype) if bias is not None and bias_requires_grad else None
    if out.numel() == 0 or key.shape[2] == 0:
        return zeroed((dq, dk, dv, dbias))
    query, key, value, out, grad_out = map(readable, (query, key, value, out, grad_out))
    grad_lse = None if grad_lse is None else grad_lse.to(lse.dtype).contiguous()
    kept, words = pack(query, key, value, bias, out, lse.contiguous(), mask, scale, dropout_p, dropout_seed)
    words += BACKWARD.pack(
        *view(grad_out),
        *view(dq),
        *view(dk),
        *view(dv),
        pointer(grad_lse),
        pointer(dbias),
        *(dbias.shape if dbias is not None else (0, 0, 0, 0)),
    )
    _cpu.attention_backward(words, torch.get_num_threads())
    del kept
    return dq, dk, dv, dbias


def _zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """torch.zeros; on huge pages where it is large, since it is written tile by tile, in as many pages as a tile has
    queries, and the kernel's first touch of small pages costs as much as the gradient's arithmetic."""
    zeros = torch.empty(shape, dtype=dtype)
    if zeros.nbytes >= LARGE:
        _cpu.prefer_huge_pages(zeros.data_ptr(), zeros.nbytes)
    return zeros.zero_()


def pack(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], bytes]:
    """The words that csrc/cpu/module.cpp reads, and the tensors that must live until it is done."""
    lists: tuple[Tensor | None, ...] = ()
    list_words = _NO_LISTS
    if mask.indptr is not None:
        lists = tuple(None if t is None else t.contiguous() for t in mask[4:11])
        entries, tiles = (0 if t is None else t.shape[0] for t in (lists[1], lists[3]))
        list_words = (entries, tiles, *map(pointer, lists))
    lengths = None if mask.kv_lengths is None else mask.kv_lengths.expand(query.shape[0]).contiguous()
    bias_words = _NO_BIAS
    if bias is not None:
        if bias.stride(3) != 1 and bias.shape[3] != 1:
            bias = bias.contiguous()
        strides = (0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True))
        bias_words = (bias.data_ptr(), DTYPES[bias.dtype], *strides)
    B, Hq, Nq, D = query.shape
    _, Hkv, Nk, Dv = value.shape
    words = FORWARD.pack(
        DTYPES[query.dtype],
        B,
        Hq,
        Hkv,
        Nq,
        Nk,
        D,
        Dv,
        scale,
        dropout_p,
        0 if dropout_seed is None else int(dropout_seed),
        *view(query),
        *view(key),
        *view(value),
        *view(out),
        lse.data_ptr(),
        *bias_words,
        *mask[:4],
        *mask[11:14],
        *list_words,
        pointer(lengths),
    )
    return (query, key, value, out, lse, bias, *lists, lengths), words


def view(tensor: Tensor) -> tuple[int, ...]:
    """Pointer and strides of (B, H, N, D), in elements."""
    return (tensor.data_ptr(), *tensor.stride()[:3])


def pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def readable(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension has stride 1, else a contiguous copy."""
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()
