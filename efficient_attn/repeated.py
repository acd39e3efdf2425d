"""Calls like one that was made before: what takes longer than a short call itself is done once.

A kernel of some microseconds is soon outlasted by the checks before it. So a call that was checked, and that nothing
but sizes, strides, dtypes and options decided, leaves an entry here; the third one like it is one look into a table,
an allocation and the kernel. Whatever else may change what a call means is asked at every call, before the table is:
see `ops.is_plain` for what looks on, and `key_of` for autocast. A call with a gradient is the same kernel in an
autograd function that knows how to go back.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends.call import accumulation_dtype, readable
from .masks import MaskArrays
from .ops import attention as ops
from .ops import union
from .patterns import Pattern

LIMIT = 1024  # entries, of which one holds some hundred bytes; the table starts again beyond
LISTED_LIMIT = 16  # of those with lists, which may hold megabytes; the oldest goes


class Entry(NamedTuple):
    """What a call like this one needs."""

    run: Callable[[int, int, int, int, int, int, int], None]  # see backends.cpu.attention.forward_of_pointers
    out: tuple[int, ...]  # shapes
    lse: tuple[int, ...]
    lse_dtype: torch.dtype
    arrays: MaskArrays
    scale: float
    backend: str
    backward: dict[Hashable, Callable[..., None]] | None  # by strides; None: nobody wants a gradient
    parts: union.Parts | None = None  # of a mask that is a union


_known: dict[Hashable, Entry | None] = {}  # None: seen once, which may be the only time, as while a cache grows
_listed: list[Hashable] = []  # the keys of those entries that keep the lists of a mask alive


def key_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: object,
    is_causal: bool,
    causal_alignment: str | None,
    scale: float | None,
    backend: str,
) -> Hashable:
    """What decides over a call without bias and dropout on tensors that nothing looks at; None: more than that does.

    Only what is equal exactly if it means the same stands in a key: no tensor, and no number that is one.
    """
    if (
        not (query.is_cpu and key.is_cpu and value.is_cpu)
        or not (mask is None or isinstance(mask, Pattern))
        or not (scale is None or type(scale) is float)
        or type(is_causal) is not bool
        or type(backend) is not str
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    return (
        torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
        query.shape,
        key.shape,
        value.shape,
        query.stride(),
        key.stride(),
        value.stride(),
        query.dtype,
        key.dtype,
        value.dtype,
        mask,
        is_causal,
        causal_alignment,
        scale,
        backend,
    )


def find(key: Hashable) -> Entry | None:
    """The entry of a call like this one, if there was one."""
    return _known.get(key)


def run(entry: Entry, query: Tensor, key: Tensor, value: Tensor, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Make the call; lse only where it is wanted."""
    if entry.backward is not None:
        found: tuple[Tensor, Tensor] = _Again.apply(query, key, value, entry)  # type: ignore[no-untyped-call]
        return found if return_lse else (found[0], None)
    return _forward(entry, query, key, value, return_lse)


def _forward(entry: Entry, query: Tensor, key: Tensor, value: Tensor, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    out = query.new_empty(*entry.out)  # sizes as numbers: the quickest of the ways to allocate
    lse = torch.empty(entry.lse, dtype=entry.lse_dtype) if return_lse or entry.parts is not None else None
    entry.run(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        0,
        torch.get_num_threads(),
    )
    if entry.parts is not None and lse is not None:
        out, lse = union.mended(query, key, value, None, entry.parts, entry.scale, 0.0, None, out, lse)
    return out, lse if return_lse else None


class _Again(torch.autograd.Function):
    """A call with its gradient; where more than the gradient of `out` is asked for, the operator's own."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, entry: Entry) -> tuple[Tensor, Tensor | None]:
        out, lse = _forward(entry, query, key, value, True)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.entry = entry
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = saved = ctx.saved_tensors
        entry: Entry = ctx.entry
        backward = None
        if grad_out is not None and grad_lse is None and ops.goes_back_plainly(grad_out, *saved):
            grad_out = readable(grad_out)
            backward = _backward_of(entry, grad_out, query, key, value, out, lse)
        if backward is None:
            grad_out = torch.zeros_like(out) if grad_out is None else grad_out
            options = (entry.scale, 0.0, None, False, 0.0, None, None, False, entry.backend)
            mask = ops.operands(entry.arrays)
            found = ops.attention_backward(grad_out, grad_lse, None, query, key, value, None, out, lse, *mask, *options)
            return (*found[:3], None)
        dq, dk, dv = query.new_empty(*query.shape), key.new_empty(*key.shape), value.new_empty(*value.shape)
        backward(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            out.data_ptr(),
            lse.data_ptr(),
            grad_out.data_ptr(),  # type: ignore[union-attr]
            0,
            dq.data_ptr(),
            dk.data_ptr(),
            dv.data_ptr(),
            torch.get_num_threads(),
        )
        return dq, dk, dv, None


def _backward_of(
    entry: Entry, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
) -> Callable[..., None] | None:
    """What goes back from tensors like these. Hooks for saved tensors may have laid them out anew: None where that asks
    for copies."""
    known = entry.backward
    assert known is not None
    kind = (grad_out.stride(), query.stride(), key.stride(), value.stride(), out.stride(), lse.stride(), query.dtype)
    found = known.get(kind)
    if found is None and lse.is_contiguous() and all(readable(t) is t for t in (query, key, value, out)):
        if len(known) >= LIMIT:
            known.clear()
        gradients: Any = (torch.empty(t.shape, dtype=t.dtype, device="meta") for t in (query, key, value))
        operands = (grad_out, query, key, value, out, tuple(gradients))
        found = backends.cpu.attention.backward_of_pointers(*operands, entry.arrays, entry.scale)
        known[kind] = found
    return found


def remember(
    known: Hashable,
    mask: object,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arrays: MaskArrays,
    scale: float,
    backend: str,
    differentiable: bool,
    parts: union.Parts | None = None,
) -> None:
    """Keep a checked call of this key when it comes the second time, if its backend can run it from pointers alone."""
    has_lists = parts is not None or arrays.indptr is not None
    if (
        getattr(mask, "by_content", False)
        or backend != "cpu"
        or arrays.kv_lengths is not None
        or (has_lists and differentiable)
    ):
        return
    if known not in _known:
        if len(_known) >= LIMIT:
            _known.clear()
            _listed.clear()
        _known[known] = None
        return
    rows = tuple(query.shape[:3])
    out = torch.empty((*rows, value.shape[3]), dtype=query.dtype, device="meta")  # its strides are meant
    if parts is None:
        runs = backends.cpu.attention.forward_of_pointers(query, key, value, out, arrays, scale)
    else:
        runs = union.forward_of_pointers(query, key, value, out, parts, scale)
    if runs is None:
        return
    if has_lists:
        _listed.append(known)
        if len(_listed) > LISTED_LIMIT:
            _known.pop(_listed.pop(0), None)
    shapes = (tuple(out.shape), rows, accumulation_dtype(query.dtype))
    _known[known] = Entry(runs, *shapes, arrays, scale, backend, {} if differentiable else None, parts)
