"""The CUDA C++ backend (csrc/cuda): the same functions as `reference`, on tensor cores of NVIDIA GPUs.

EXPERIMENTAL: compiled for sm_80 and sm_90a and proved in a host twin, never yet run on a GPU; taken only when asked for
by name. EFFICIENT_ATTN_CUDA_TWIN=<path of the twin's module> runs the very same kernels on CPU tensors, one fiber a
thread, for tests (tests/cuda_host); Hopper's where EFFICIENT_ATTN_CUDA_TWIN_CAPABILITY is 90. Nothing here waits
for the GPU, and memory is allocated for results and O(n) workspace only.

The bits of a result are the same in every run. EFFICIENT_ATTN_CUDA_ANY_ORDER=1 gives that up for speed: on Hopper,
heads of 65 to 128 without bias and dropout then get a backward in one pass, whose sums over blocks of threads come in
any order.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..masks import MaskArrays
from .call import Call, zeroed
from .cpu import BACKWARD, pack, pointer, readable, view

LONGEST = 2**30 - 256  # positions, in whole tiles, and their sums fit in 32 bits


def twin_path() -> str:
    """Where the host twin's module lies, or an empty string."""
    return os.environ.get("EFFICIENT_ATTN_CUDA_TWIN", "")


@cache
def kernels() -> Any:
    """The module that launches kernels: the host twin if one is asked for, else the compiled one, else None."""
    if twin_path():
        spec = importlib.util.spec_from_file_location("_cuda_twin", twin_path())
        if spec is None or spec.loader is None:
            raise ImportError(f"EFFICIENT_ATTN_CUDA_TWIN={twin_path()} is not a Python extension module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return None


def not_supported_reasons(call: Call) -> list[str]:
    """Why this backend cannot serve `call`."""
    reasons = []
    if kernels() is None:
        reasons.append("its kernels are not part of this build; only the host twin of the tests runs them so far")
    if call.device.type != "cpu" and twin_path():
        reasons.append(
            f"EFFICIENT_ATTN_CUDA_TWIN is set, under which it runs on CPU tensors; these are on {call.device}"
        )
    elif call.device.type != "cuda" and not twin_path():
        reasons.append(f"it runs on CUDA tensors; these are on {call.device}")
    if call.dtype not in (torch.bfloat16, torch.float16):
        name = str(call.dtype).removeprefix("torch.")
        reasons.append(f"it multiplies bfloat16 and float16 on tensor cores; these tensors are {name}")
    if max(call.Nq, call.Nk) > LONGEST:
        reasons.append(f"it serves up to {LONGEST} queries and keys; these are {call.Nq} and {call.Nk}")
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
    """Return out (B, Hq, Nq, Dv) in the query's dtype and lse (B, Hq, Nq) float32, as `reference.attention_forward`."""
    query, key, value = map(readable, (query, key, value))
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if out.numel() == 0 or key.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    kept, words, seed = _pack(query, key, value, bias, out, lse, mask, scale, dropout_p, dropout_seed)
    flags = query.new_empty(kernels().flag_count(words, False), dtype=torch.int32)
    kernels().attention_forward(words, pointer(seed), _workspace(flags), _stream(query.device))
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
    dq, dk, dv = (t.new_empty(t.shape) for t in (query, key, value))
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_requires_grad else None
    if out.numel() == 0 or key.shape[2] == 0:
        return zeroed((dq, dk, dv, dbias))
    query, key, value, out, grad_out = map(readable, (query, key, value, out, grad_out))
    grad_lse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
    kept, words, seed = _pack(query, key, value, bias, out, lse.contiguous(), mask, scale, dropout_p, dropout_seed)
    target = _bias_target(dbias, query, key)
    words += BACKWARD.pack(
        *view(grad_out), *view(dq), *view(dk), *view(dv), pointer(grad_lse), pointer(target),
        *(target.shape if target is not None else (0, 0, 0, 0)),
    )  # fmt: skip
    flags = query.new_empty(kernels().flag_count(words, True), dtype=torch.int32)
    delta = torch.empty_like(lse)
    sums, stream = target is not dbias, _stream(query.device)
    in_any_order = _query_sums(words, query)
    kernels().attention_backward(
        words, pointer(seed), _workspace(flags), delta.data_ptr(), sums, stream, _workspace(in_any_order)
    )
    if dbias is not None and target is not None and target is not dbias:
        dbias.copy_(target.sum_to_size(dbias.shape))
    del kept
    return dq, dk, dv, dbias


def _pack(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], bytes, Tensor | None]:
    """What must live until the call is done, the words that csrc/common/words.h reads, and a seed on the GPU."""
    if mask.indices is not None and mask.indices.numel() >= 2**31:
        raise UnsupportedError(
            f"backend='cuda' reads lists of fewer than 2^31 blocks, got {mask.indices.numel()}; use larger blocks"
        )
    if mask.tiles is not None:
        tiles = mask.tiles.contiguous()  # bits are read in words of 16
        mask = mask._replace(tiles=tiles if tiles.data_ptr() % 2 == 0 else tiles.clone())
    on_gpu = seed.reshape(1) if seed is not None and seed.device.type == "cuda" else None
    kept, words = pack(
        query, key, value, bias, out, lse, mask, scale, dropout_p, None if on_gpu is not None else seed
    )  # fmt: skip
    return (*kept, on_gpu), words, on_gpu


def _bias_target(dbias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """What the kernel writes: dbias itself, or where it is one for all queries or keys, a row of sums for each head."""
    if dbias is None:
        return None
    (B, Hq, Nq, _), Nk = query.shape, key.shape[2]
    if dbias.shape[3] == 1 and Nk > 1:
        return query.new_empty(B, Hq, Nq, 1, dtype=torch.float32)
    if dbias.shape[2] == 1 and Nq > 1:
        return query.new_empty(B, Hq, 1, Nk, dtype=torch.float32)
    return dbias


def _query_sums(words: bytes, query: Tensor) -> Tensor:
    """Where a backward in one pass adds up dq; empty unless it is asked for and serves the call."""
    asked_for = os.environ.get("EFFICIENT_ATTN_CUDA_ANY_ORDER") == "1"
    count = kernels().query_sum_count(words) if asked_for else 0
    return query.new_zeros(count, dtype=torch.float32)


def _workspace(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() else 0


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
