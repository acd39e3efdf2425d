"""The C++ backend for CPUs (csrc/cpu): the same functions as `reference`, in tiles and without n x n memory."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch  # before _cpu: the process then has one OpenMP runtime, PyTorch's
from torch import Tensor

from ...masks import MaskArrays
from ..call import (
    Call,
    accumulation_dtype,
    check_gradients_in_order,
    leaves_rows,
    lse_without_keys,
    modifier_gradients_without_keys,
    readable,
    refuse_orders,
    run_start,
    sink_gradient,
    zeroed,
)
from ..words import Pages, pack_attention, pack_attention_gradients

_cpu: Any
try:
    _cpu = importlib.import_module("efficient_attn._cpu")
    MISSING = ""
except ImportError as error:
    if os.environ.get("EFFICIENT_ATTN_ISA"):
        raise  # an instruction set asked for by name never falls back
    _cpu = None
    MISSING = f"the native module is not built or cannot be loaded ({error}); reinstall with a C++17 compiler"

LARGE = 64 * 2**20  # bytes from which a result is worth huge pages


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
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
    *,
    joined: tuple[Tensor, Tensor] | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out (B, Hq, Nq, Dv) in the query's dtype and lse (B, Hq, Nq), as `reference.attention_forward`.

    joined: results of the same queries for other keys; those of these keys are joined into them, in place.
    into: where the results are made. Of both, out has any strides with a unit last one, and lse is contiguous.
    """
    query, key, value = readable(query), readable(key), readable(value)
    B, Hq, Nq, _ = query.shape
    dtype = query.dtype
    if joined is None:
        out, lse = into or (
            torch.empty((B, Hq, Nq, value.shape[3]), dtype=dtype, device="cpu"),
            torch.empty((B, Hq, Nq), dtype=accumulation_dtype(dtype), device="cpu"),
        )
        if key.shape[2] == 0 or leaves_rows(mask.query_order, query):
            out.zero_(), lse_without_keys(lse, sinks)
    else:
        out, lse = joined
    if out.numel() > 0 and key.shape[2] > 0:
        runs = _runs(mask, bias, dropout_p)
        own_lse = lse
        if runs is not None:
            query, key, value = _run(runs[0], query), _run(runs[1], key), _run(runs[1], value)
            mask, own_lse = mask._replace(query_order=None, key_order=None), _run(runs[0], lse).contiguous()
        place = out if runs is None else _run(runs[0], out)
        call = (query, key, value, bias, place, own_lse, mask, scale, dropout_p, dropout_seed, None)
        kept, words = pack_attention(*call, softcap, sinks, diagonals, joined is not None)
        _cpu.attention_forward(words, torch.get_num_threads())
        del kept
        if own_lse is not lse and runs is not None:
            _run(runs[0], lse).copy_(own_lse)
    return out, lse


def paged_forward(
    query: Tensor,  # (B, Hq, Nq, D)
    key: Tensor,  # (pages, Hkv, rows of a page, D)
    value: Tensor,  # (pages, Hkv, rows of a page, Dv)
    pages: Pages,
    mask: MaskArrays,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse of `attention_forward` for keys and values on pages, which are read where they lie: the same bits as
    of the rows put together."""
    query = readable(query)
    out = torch.empty((*query.shape[:3], value.shape[3]), dtype=query.dtype, device="cpu")
    lse = torch.empty(query.shape[:3], dtype=accumulation_dtype(query.dtype), device="cpu")
    if out.numel() == 0 or pages.length == 0:
        return out.zero_(), lse_without_keys(lse, sinks)
    call = (query, key, value, None, out, lse, mask, scale, 0.0, None, None)
    kept, words = pack_attention(*call, softcap, sinks, diagonals, pages=pages)
    _cpu.attention_forward(words, torch.get_num_threads())
    del kept
    return out, lse


def tiles_of_a_copy(query: Tensor, key: Tensor, value: Tensor, mask: MaskArrays) -> int:
    """How many tiles of queries of a forward share one copy of the keys and values that they see, gathered or widened
    once for all of them; 0: each loads its own."""
    if _cpu is None or query.numel() == 0 or key.numel() == 0 or _runs(mask, None, 0.0) is not None:
        return 0
    nowhere = torch.empty((), dtype=query.dtype, device="cpu")
    out, lse = nowhere.expand(*query.shape[:3], value.shape[3]), nowhere.expand(query.shape[:3])
    kept, words = pack_attention(query, key, value, None, out, lse, mask, 1.0, 0.0, None)
    tiles: int = _cpu.tiles_of_a_copy(words, torch.get_num_threads())
    del kept
    return tiles


def _runs(mask: MaskArrays, bias: Tensor | None, dropout_p: float) -> tuple[slice, slice] | None:
    """The queries and keys of a call whose orders name a run of tokens each: a kernel reads those where they lie. None
    for what goes by a token's place in the whole."""
    if mask.query_order is None and mask.key_order is None:
        return None
    if bias is not None or dropout_p > 0.0 or mask.kv_lengths is not None:
        return None
    queries, keys = _slice(mask.query_order), _slice(mask.key_order)
    return None if queries is None or keys is None else (queries, keys)


def _slice(order: Tensor | None) -> slice | None:
    start = run_start(order)
    return None if start is None else slice(start, None if order is None else start + order.shape[1])


def _run(run: slice, tensor: Tensor) -> Tensor:
    """Some tokens of (B, H, N, D) or (B, H, N), a view."""
    return tensor[:, :, run]


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
    """Return out, lse and weights (B, Hq | 1, Nq, Nk), as `reference.attention_with_weights`."""
    refuse_orders(mask, "returning weights")
    query, key, value = readable(query), readable(key), readable(value)
    B, Hq, Nq, _ = query.shape
    Nk, dtype = key.shape[2], query.dtype
    out = torch.empty((B, Hq, Nq, value.shape[3]), dtype=dtype, device="cpu")
    lse = torch.empty((B, Hq, Nq), dtype=accumulation_dtype(dtype), device="cpu")
    weights = empty((B, 1 if average else Hq, Nq, Nk), dtype)
    if out.numel() == 0 or Nk == 0:
        return out.zero_(), lse_without_keys(lse, sinks), weights.zero_()
    call = (query, key, value, bias, out, lse, mask, scale, dropout_p, dropout_seed, weights)
    kept, words = pack_attention(*call, softcap, sinks, diagonals)
    _cpu.attention_forward(words, torch.get_num_threads())
    del kept
    return out, lse, weights


def forward_of_pointers(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    mask: MaskArrays,
    scale: float,
    weights: Tensor | None = None,
    joined: bool = False,
) -> Callable[[int, int, int, int, int, int, int], None] | None:
    """The forward of tensors like these (of which sizes and strides are meant), without bias and dropout, as a function
    of the addresses of query, key, value, out, lse (0: not wanted; else contiguous) and weights (0 without), and of the
    number of threads. It reads the tensors of `mask`, which whoever calls it keeps alive. joined: as in
    `attention_forward`, with what these addresses hold.

    None where a call is more than the kernel: copies of the operands, or results without a kernel.
    """
    if not _read_in_place(query, key, value) or _runs(mask, None, 0.0) is not None:
        return None
    if leaves_rows(mask.query_order, query) and not joined:
        return None
    if not all(t.is_contiguous() for t in mask if isinstance(t, Tensor)):
        return None
    lse = torch.empty(query.shape[:3], dtype=accumulation_dtype(query.dtype), device="meta")
    _, words = pack_attention(query, key, value, None, out, lse, mask, scale, 0.0, None, weights, continues=joined)
    run: Callable[[int, int, int, int, int, int, int], None] = _cpu.repeated_forward(words)
    return run


def cached_of_pointers(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    mask: MaskArrays,
    scale: float,
    softcap: float,
    on_pages: bool,
) -> Callable[..., None] | None:
    """The forward of queries that are those of the last keys, of tensors like these (of which sizes and strides are
    meant), as a function of the addresses of query, key, value, out, lse (contiguous), sinks (contiguous, of the
    accumulation dtype; 0 without), of the address and the stride of a table of pages (0 without: rows) and the address
    of lengths (int32; 0 where all are alike), and of the numbers of keys and of threads. The window of `mask` goes
    along with the keys.

    None where a call is more than the kernel.
    """
    if not _read_in_place(query, key, value):
        return None
    lse = torch.empty(query.shape[:3], dtype=accumulation_dtype(query.dtype), device="meta")
    pages = Pages(torch.empty((query.shape[0], 1), dtype=torch.int32), 1) if on_pages else None
    _, words = pack_attention(query, key, value, None, out, lse, mask, scale, 0.0, None, softcap=softcap, pages=pages)
    run: Callable[..., None] = _cpu.cached_forward(words)
    return run


def append_rows(
    cache: Tensor,  # (B, Hkv, capacity, D), or with a table (pages, Hkv, rows of a page, D)
    added: Tensor,  # (B, Hkv, n, D)
    firsts: list[int],
    counts: list[int],
    table: Tensor | None = None,  # int32 (B, pages of the longest)
) -> None:
    """Copy the first counts[b] rows of each sequence behind its first firsts[b] ones; both dense in D, of one dtype."""
    place, stride = (0, 0) if table is None else (table.data_ptr(), table.stride(0))
    _cpu.append_rows(
        cache.data_ptr(), cache.stride(), added.data_ptr(), added.stride(), added.shape[1], added.shape[3],
        added.element_size(), place, stride, cache.shape[2], firsts, counts,
    )  # fmt: skip


def backward_of_pointers(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    mask: MaskArrays,
    scale: float,
    grad_weights: Tensor | None = None,
) -> Callable[[int, int, int, int, int, int, int, int, int, int, int], None]:
    """The backward that belongs to `forward_of_pointers`: a function of the addresses of query, key, value, out, lse,
    grad_out, grad_weights (0 without), dq, dk and dv, and of the number of threads; every last stride is 1."""
    lse = torch.empty(query.shape[:3], dtype=accumulation_dtype(query.dtype), device="meta")
    _, words = pack_attention(query, key, value, None, out, lse, mask, scale, 0.0, None, grad_weights)
    words += pack_attention_gradients(grad_out, *gradients, None, None)
    run: Callable[[int, int, int, int, int, int, int, int, int, int, int], None] = _cpu.repeated_backward(words)
    return run


def _read_in_place(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is something to compute, of operands that need no copy."""
    filled = key.shape[2] > 0 and value.shape[3] * query[..., 0].numel() > 0
    return filled and all(readable(t) is t for t in (query, key, value))


def attention_backward(
    grad_out: Tensor,  # (B, Hq, Nq, Dv)
    grad_lse: Tensor | None,  # (B, Hq, Nq)
    grad_weights: Tensor | None,  # (B, Hq | 1, Nq, Nk)
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
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
    diagonals_require_grad: bool = False,
    *,
    added_to: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return dq, dk, dv, dbias, dsinks and ddiagonals, as `reference.attention_backward`.

    added_to: contiguous dq, dk and dv of other keys and queries, to which those of this call are added, in place.
    """
    check_gradients_in_order(mask, grad_weights, sinks, bias if bias_requires_grad else None, query)
    if added_to is None:
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device="cpu") for t in (query, key, value))
        if leaves_rows(mask.query_order, query):
            dq.zero_()
        if leaves_rows(mask.key_order, key):
            dk.zero_(), dv.zero_()
    else:
        dq, dk, dv = added_to
    dbias = empty(bias.shape, bias.dtype).zero_() if bias is not None and bias_requires_grad else None
    if out.numel() == 0 or key.shape[2] == 0:
        dsinks, ddiagonals = modifier_gradients_without_keys(grad_lse, sinks, diagonals, diagonals_require_grad)
        results = zeroed((dq, dk, dv, dbias)) if added_to is None else (dq, dk, dv, dbias)
        return *results, dsinks, ddiagonals
    query, key, value, out, grad_out = map(readable, (query, key, value, out, grad_out))
    into = (dq, dk, dv)
    runs = _runs(mask, bias, dropout_p)
    if runs is not None:
        queries, keys = runs
        query, out, grad_out, lse = (_run(queries, t) for t in (query, out, grad_out, lse))
        grad_lse = None if grad_lse is None else _run(queries, grad_lse)
        key, value = _run(keys, key), _run(keys, value)
        into = (_run(queries, dq), _run(keys, dk), _run(keys, dv))
        mask = mask._replace(query_order=None, key_order=None)
    grad_lse = None if grad_lse is None else grad_lse.to(lse.dtype).contiguous()
    lse = lse.contiguous()
    call = (query, key, value, bias, out, lse, mask, scale, dropout_p, dropout_seed)
    kept, words = pack_attention(*call, grad_weights, softcap, sinks, diagonals, added_to is not None)
    delta = None if sinks is None else torch.empty_like(lse)
    sums = None
    if diagonals is not None and diagonals_require_grad:
        sums = diagonals.new_zeros(*lse.shape[:2], diagonals.shape[2])
    words += pack_attention_gradients(grad_out, *into, grad_lse, dbias, delta, sums)
    _cpu.attention_backward(words, torch.get_num_threads())
    del kept
    ddiagonals = None if sums is None or diagonals is None else sums.sum_to_size(diagonals.shape)
    return dq, dk, dv, dbias, None if delta is None else sink_gradient(sinks, lse, delta), ddiagonals


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """torch.empty; on huge pages where it is large, for what is written tile by tile, in as many pages as a tile has
    queries: the kernel's first touch of small pages costs as much as the arithmetic."""
    made = torch.empty(shape, dtype=dtype, device="cpu")
    if made.nbytes >= LARGE:
        _cpu.prefer_huge_pages(made.data_ptr(), made.nbytes)
    return made
