"""Attention of the last queries of sequences to all of their keys, which lie in rows or on pages.

Letters: B sequences, Hq and Hkv heads, Nq queries of each, N rows of keys, D and Dv head dimensions. Sequence b has
lengths[b] keys; its queries are those of its last tokens, so that query i stands at key lengths[b] - Nq + i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import sharding
from ..backends.cpu.attention import paged_forward
from ..backends.words import Pages
from ..biases import ALiBi, RelativePosition, aligned
from ..errors import InputError, InputTypeError
from ..functional import Prepared, attention, prepare
from ..inputs import tensors_of
from ..masks import BlockMask
from ..ops.attention import is_plain

Lengths = Tensor | Sequence[int]
# out and lse of some queries, of the sequences of a slice, of their first keys, under a mask and a bias.
Run = Callable[[Tensor, slice, int, BlockMask | None, RelativePosition | None], tuple[Tensor, Tensor]]


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Lengths,
    *,
    counts: Lengths | None = None,
    is_causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: RelativePosition | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """Attention of new queries to caches that are filled to different lengths.

    Args:
        query: (B, Hq, Nq, D).
        key, value: (B, Hkv, N, D) and (B, Hkv, N, Dv); rows from lengths[b] on are not looked at.
        lengths: integers (B), the keys of each sequence, those of its queries included.
        counts: integers (B), how many of the Nq queries are real; rows of `query` behind them give 0. Default: all.
        is_causal: a query sees no key behind itself.
        window: (left, right) keys before and behind a query's own that it sees; -1 is without limit.
        scale, softcap, sinks, return_lse, backend: as in `attention`.
        bias: an `ALiBi`, `RelativeBias` or `T5Bias`, of the distances in each sequence.

    Returns:
        out (B, Hq, Nq, Dv), or (out, lse (B, Hq, Nq)); a query that sees no key gives 0 (lse -inf, or its sink; rows
        behind the counts -inf).

    Raises:
        InputError, InputTypeError: what `attention` raises, lengths that are not there, another bias.
        UnsupportedError: inside `context_parallel`, whose ranks have a part of the keys each.
    """
    sharding.refuse("attention over a cache")
    ends = checked_integers("lengths", lengths, query.shape[0], key.shape[2])

    def run(
        queries: Tensor, rows: slice, end: int, mask: BlockMask | None, placed: RelativePosition | None
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = attention(
            queries, key[rows, :, :end], value[rows, :, :end], mask=mask, scale=scale, softcap=softcap, sinks=sinks,
            bias=placed, return_lse=True, backend=backend,
        )  # fmt: skip
        return found

    out, lse = _at_the_ends(run, query, ends, counts, (window[0], 0 if is_causal else window[1]), bias)
    return (out, lse) if return_lse else out


def _at_the_ends(
    run: Run,
    query: Tensor,
    ends: list[int],
    counts: Lengths | None,
    window: tuple[int, int],
    bias: RelativePosition | None,
) -> tuple[Tensor, Tensor]:
    """out and lse of queries that are the last tokens of sequences of `ends` keys, in as few calls as say it."""
    B, _, Nq, _ = query.shape
    real = [Nq] * B if counts is None else checked_integers("counts", counts, B, Nq)
    longest, everything, placed = max(ends, default=0), slice(None), _placed(bias)
    if len(set(ends)) <= 1 and len(set(real)) <= 1:
        n = max(real, default=0)
        found = run(query[:, :, :n], everything, longest, _end_mask(n, longest, window), placed)
    elif Nq == 1 and window[0] < 0 and min(real) == 1 and bias is None:
        lengths = torch.tensor(ends, device=query.device)  # what the last token sees is up to the length alone
        found = run(query, everything, longest, BlockMask.from_lengths(lengths, q_len=Nq, kv_len=longest), None)
    else:
        parts = []
        for b, (end, n) in enumerate(zip(ends, real, strict=True)):
            one = slice(b, b + 1)
            part = run(query[one, :, :n], one, end, _end_mask(n, end, window), _of_rows(placed, one))
            parts.append(_padded(part, Nq))
        found = torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    return _padded(found, Nq)


def _placed(bias: RelativePosition | None) -> RelativePosition | None:
    """The bias, for queries that are those of the last keys."""
    if bias is None:
        return None
    if not isinstance(bias, RelativePosition):
        raise InputTypeError(
            f"a cache takes an ALiBi, RelativeBias or T5Bias as bias, got {type(bias).__name__}; what goes by absolute "
            "places is for attention()"
        )
    if getattr(bias, "alignment", None) == "top_left":
        raise InputError(
            "queries of a cache stand at its last keys; a bias with alignment='top_left' has no place there"
        )
    (found,) = aligned([bias], "bottom_right")
    assert isinstance(found, RelativePosition)
    return found


def _of_rows(bias: RelativePosition | None, rows: slice) -> RelativePosition | None:
    """That of some sequences: slopes may be of each."""
    if isinstance(bias, ALiBi) and bias.slopes.dim() == 2 and bias.slopes.shape[0] > 1:
        return replace(bias, slopes=bias.slopes[rows])
    return bias


def _end_mask(q_len: int, kv_len: int, window: tuple[int, int]) -> BlockMask | None:
    """The mask of queries that are those of the last keys; None where they see all."""
    left, right = window
    if q_len == 1:  # there is nothing behind the last key
        right = -1
        left = -1 if left >= kv_len - 1 else left
    return (
        None if left < 0 and right < 0 else BlockMask(q_len, kv_len, window=(left, right), window_offset=kv_len - q_len)
    )


def _padded(found: tuple[Tensor, Tensor], Nq: int) -> tuple[Tensor, Tensor]:
    out, lse = found
    behind = Nq - out.shape[2]
    if not behind:
        return out, lse
    pad = torch.nn.functional.pad
    return pad(out, (0, 0, 0, behind)), pad(lse, (0, behind), value=-torch.inf)


# --- pages ---


def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    block_table: Tensor,
    lengths: Lengths,
    *,
    counts: Lengths | None = None,
    is_causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: RelativePosition | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Any:
    """`cached_attention` of keys and values on pages (Kwon et al. 2023): row r of sequence b is row r % page of page
    block_table[b, r // page].

    The CPU backend reads pages where they lie, whatever Nq. The others, and calls that take part in autograd, a
    compilation or a transformation, put those of the call together first: O(B N) memory for the time of the call.

    Args:
        key_pages, value_pages: (pages, page, Hkv, D) and (pages, page, Hkv, Dv).
        block_table: int32 or int64 (B, pages of the longest sequence). Entries behind a sequence's length are not
            looked at. The same page may stand in many rows.
        lengths and the rest: as in `cached_attention`.

    Raises:
        InputError, InputTypeError: what `cached_attention` raises; pages that are not there.
    """
    sharding.refuse("attention over a cache")
    ends = check_pages(key_pages, value_pages, block_table, lengths, query.shape[0])
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks, "backend": backend}
    pools = [x.transpose(1, 2) for x in (key_pages, value_pages)]  # (pages, Hkv, rows of a page, .)
    # An entry behind a sequence's length may be anything; kernels may look where it points, and see nothing of it.
    table = block_table.clamp(0, max(key_pages.shape[0] - 1, 0)).int()

    def run(
        queries: Tensor, rows: slice, end: int, mask: BlockMask | None, placed: RelativePosition | None
    ) -> tuple[Tensor, Tensor]:
        own = table[rows]
        call = _in_place(queries, pools, own.shape[0], end, mask=mask, bias=placed, **options)
        if call is not None:
            pages = Pages(own, end)
            return paged_forward(call.query, pools[0], pools[1], pages, call.mask, call.scale, *call.modifiers)
        key, value = (read_pages(pool, own, end) for pool in (key_pages, value_pages))
        found: tuple[Tensor, Tensor] = attention(
            queries, key, value, mask=mask, bias=placed, return_lse=True, **options
        )
        return found

    out, lse = _at_the_ends(run, query, ends, counts, (window[0], 0 if is_causal else window[1]), bias)
    return (out, lse) if return_lse else out


def _in_place(
    query: Tensor, pools: list[Tensor], B: int, length: int, *, bias: RelativePosition | None, **arguments: Any
) -> Prepared | None:
    """The call of `length` keys of each sequence, settled, if the CPU's kernel serves it on the pages themselves."""
    plain = is_plain(query, *pools, arguments["sinks"], *tensors_of(bias))
    if not plain or sharding.active is not None or any(x.stride(3) != 1 or x.numel() == 0 for x in pools):
        return None
    key, value = (x.new_empty(()).expand(B, x.shape[1], length, x.shape[3]) for x in pools)  # a shape and a type
    call = prepare(query, key, value, bias=bias, **arguments)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in pools)
    served = call.backend == "cpu" and call.query.dtype == pools[0].dtype and not (call.differentiable or learns)
    return call if served else None


def check_pages(key_pages: Tensor, value_pages: Tensor, table: Tensor, lengths: Lengths, B: int) -> list[int]:
    """The lengths, checked: everything that a sequence has lies on pages that are there.

    Raises:
        InputError, InputTypeError: pages that differ, a table of another shape or type,
            entries that are no page, lengths beyond the table.
    """
    for name, pages in (("key_pages", key_pages), ("value_pages", value_pages)):
        if pages.dim() != 4:
            raise InputError(f"{name} must be (pages, rows of a page, heads, head_dim), got {tuple(pages.shape)}")
    if key_pages.shape[:3] != value_pages.shape[:3]:
        raise InputError(
            f"pages of keys {tuple(key_pages.shape)} and of values {tuple(value_pages.shape)} are of different rows"
        )
    count, page = key_pages.shape[:2]
    if page < 1:
        raise InputError("a page has one row or more, got none")
    if not isinstance(table, Tensor) or table.dtype not in (torch.int32, torch.int64):
        kind = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise InputTypeError(f"block_table must be an int32 or int64 tensor, got {kind}")
    if table.dim() != 2 or table.shape[0] != B:
        raise InputError(f"block_table must be (B, pages of a sequence) with B = {B}, got {tuple(table.shape)}")
    if table.device != key_pages.device:
        raise InputError(f"block_table is on {table.device}, the pages on {key_pages.device}; move it")
    ends = checked_integers("lengths", lengths, B, table.shape[1] * page)
    if not table.numel() or 0 <= int(table.min()) <= int(table.max()) < count:
        return ends
    needed = torch.tensor([-(-end // page) for end in ends], device=table.device)[:, None]
    used = table[torch.arange(table.shape[1], device=table.device) < needed]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < count:
        raise InputError(
            f"block_table must lie in 0..{count - 1}, the pages that there are, up to each sequence's length; got "
            f"{int(used.min())} to {int(used.max())}"
        )
    return ends


def read_pages(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` rows of each sequence, put together: (B, heads, length, D)."""
    rows = pages[table[:, : -(-length // pages.shape[1])].long()]
    return rows.flatten(1, 2)[:, :length].transpose(1, 2)


def checked_integers(name: str, given: Lengths, count: int, most: int) -> list[int]:
    """Integers from 0 to `most`, `count` of them.

    Raises:
        InputError, InputTypeError: others.
    """
    if isinstance(given, Tensor) and (given.is_floating_point() or given.dtype == torch.bool):
        raise InputTypeError(f"{name} must be integers, got {given.dtype}")
    found = [int(n) for n in (given.tolist() if isinstance(given, Tensor) else given)]
    if len(found) != count or any(not 0 <= n <= most for n in found):
        raise InputError(f"{name} must be {count} integers from 0 to {most}; got {found}")
    return found
