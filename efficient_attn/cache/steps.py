"""Steps like one that was made before: what takes longer than a short step itself is done once.

As `repeated` does it for single calls. From step to step only addresses, lengths and the table of pages change, so that
these are arguments of what is kept here; sizes, strides, dtypes and options are its key.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import sharding
from ..backends import cpu
from ..backends.call import accumulation_dtype
from ..functional import Prepared, prepare
from ..masks import MaskArrays
from ..ops.attention import is_plain

LIMIT = 1024  # steps, of which one takes some hundred bytes; the table starts again beyond


class Step(NamedTuple):
    """What a step like this one needs."""

    run: Callable[..., None]  # see backends.cpu.attention.cached_of_pointers
    out: tuple[int, ...]  # shapes
    lse: tuple[int, ...]
    lse_dtype: torch.dtype


_known: dict[Hashable, Step | None] = {}  # None: not for the kernel alone


def key_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: tuple[int, int],
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    backend: str,
    on_pages: bool,
) -> Hashable:
    """What decides over a step on tensors that nothing looks at; None: more than that does."""
    if (
        not is_plain(query, key, value, sinks)
        or not (query.is_cpu and key.is_cpu and value.is_cpu and (sinks is None or sinks.is_cpu))
        or not (scale is None or type(scale) is float)
        or not (softcap is None or type(softcap) is float)
        or type(backend) is not str
        or sharding.active is not None
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, sinks)):
        return None
    sunk = None if sinks is None else (sinks.shape, sinks.stride(), sinks.dtype)
    views = ((x.shape, x.stride(), x.dtype) for x in (query, key, value))
    return (*views, window, scale, softcap, sunk, backend, on_pages)


def find(
    known: Hashable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: tuple[int, int],
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    backend: str,
    on_pages: bool,
) -> Step | None:
    """The step of this key, checked and settled the first time; None where more than the kernel is needed.

    Raises what `attention` raises.
    """
    if known in _known:
        return _known[known]
    length = 1 if on_pages else key.shape[2]
    call = settled(query, (key, value), length, scale=scale, softcap=softcap, sinks=sinks, backend=backend)
    step, dtype = None, accumulation_dtype(query.dtype)
    if call is not None and (sinks is None or (sinks.is_contiguous() and sinks.dtype == dtype)):
        mask = MaskArrays(window_left=window[0], window_right=window[1])
        rows = tuple(query.shape[:3])
        out = torch.empty((*rows, value.shape[3]), dtype=query.dtype, device="meta")  # its strides are meant
        run = cpu.attention.cached_of_pointers(query, key, value, out, mask, call.scale, call.softcap, on_pages)
        if run is not None:
            step = Step(run, tuple(out.shape), rows, dtype)
    if len(_known) >= LIMIT:
        _known.clear()
    _known[known] = step
    return step


def run(
    step: Step, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, table: Tensor | None, ends: list[int]
) -> tuple[Tensor, Tensor]:
    """out and lse of the last queries of sequences of `ends` keys."""
    out = query.new_empty(*step.out)  # sizes as numbers: the quickest of the ways to allocate
    lse = torch.empty(step.lse, dtype=step.lse_dtype)
    longest = max(ends)
    lengths = None if min(ends) == longest else torch.tensor(ends, dtype=torch.int32)
    step.run(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        0 if table is None else table.data_ptr(),
        0 if table is None else table.stride(0),
        0 if lengths is None else lengths.data_ptr(),
        longest,
        torch.get_num_threads(),
    )
    return out, lse


def settled(query: Tensor, held: tuple[Tensor, Tensor], length: int, **arguments: Any) -> Prepared | None:
    """The call of `length` keys of each sequence, checked, if the CPU's kernel serves it where `held` lies."""
    if any(x.stride(3) != 1 or x.numel() == 0 for x in held):
        return None
    B = query.shape[0] if query.dim() == 4 else 1
    key, value = (x.new_empty(()).expand(B, x.shape[1], length, x.shape[3]) for x in held)  # a shape and a type
    call = prepare(query, key, value, **arguments)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in held)
    served = call.backend == "cpu" and call.query.dtype == held[0].dtype and not (call.differentiable or learns)
    return call if served else None
