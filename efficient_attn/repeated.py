"""Calls like one that was made before: what takes longer than a short call itself is done once.

A kernel of some microseconds is soon outlasted by the checks before it. So a call that was checked, and that nothing
but sizes, strides, dtypes and options decided, leaves an entry here; the third one like it is one look into a table,
an allocation and the kernel. Whatever else may change what a call means is asked at every call, before the table is:
see `ops.is_plain` for what looks on, and `key_of` for gradients and autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends.call import accumulation_dtype
from .masks import MaskArrays
from .patterns import Pattern

LIMIT = 1024  # entries, of which one holds some hundred bytes; the table starts again beyond


class Entry(NamedTuple):
    """What a call like this one needs."""

    run: Callable[[int, int, int, int, int, int], None]  # pointers to query, key, value, out and lse, and threads
    out: tuple[int, ...]  # shapes
    lse: tuple[int, ...]
    lse_dtype: torch.dtype


_known: dict[Hashable, Entry | None] = {}  # None: seen once, which may be the only time, as while a cache grows


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
        or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
    ):
        return None
    return (
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
    out = query.new_empty(*entry.out)  # sizes as numbers: the quickest of the ways to allocate
    lse = torch.empty(entry.lse, dtype=entry.lse_dtype) if return_lse else None
    entry.run(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        torch.get_num_threads(),
    )
    return out, lse


def remember(
    known: Hashable,
    mask: object,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arrays: MaskArrays,
    scale: float,
    backend: str,
) -> None:
    """Keep a checked call of this key when it comes the second time, if its backend can run it from pointers alone."""
    if (
        getattr(mask, "by_content", False)
        or backend != "cpu"
        or arrays.indptr is not None
        or arrays.kv_lengths is not None
    ):
        return  # lists and lengths are tensors, which an entry would keep alive, and whose content may change
    if known not in _known:
        if len(_known) >= LIMIT:
            _known.clear()
        _known[known] = None
        return
    runs = backends.cpu.attention.forward_of_pointers(query, key, value, arrays, scale)
    if runs is None:
        return
    rows = tuple(query.shape[:3])
    _known[known] = Entry(runs, (*rows, value.shape[3]), rows, accumulation_dtype(query.dtype))
