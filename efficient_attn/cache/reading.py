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
from ..backends.cpu import attention as cpu
from ..backends.words import Pages
from ..biases import ALiBi, RelativePosition, aligned
from ..errors import InputError, InputTypeError
from ..functional import attention
from ..inputs import tensors_of
from ..masks import BlockMask
from ..ops.attention import is_plain
from . import steps

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
    check_query(query)
    ends = checked_integers("lengths", lengths, query.shape[0], key.shape[2])
    return attend_rows(
        query, key, value, ends, counts=counts, is_causal=is_causal, window=window, scale=scale, softcap=softcap,
        sinks=sinks, bias=bias, return_lse=return_lse, backend=backend,
    )  # fmt: skip


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: list[int],
    *,
    counts: Lengths | None,
    is_causal: bool,
    window: tuple[int, int],
    bias: RelativePosition | None,
    return_lse: bool,
    **options: Any,
) -> Any:
    """`cached_attention` of lengths that are checked; `options`: scale, softcap, sinks, backend."""
    sharding.refuse("attention over a cache")

    def run(
        queries: Tensor, rows: slice, end: int, mask: BlockMask | None, placed: RelativePosition | None
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = attention(
            queries, key[rows, :, :end], value[rows, :, :end], mask=mask, bias=placed, return_lse=True, **options
        )
        return found

    seen = window[0], 0 if is_causal else window[1]
    found = _by_one_step(query, key, value, None, ends, counts, seen, bias, **options)
    out, lse = found or _at_the_ends(run, query, ends, counts, seen, bias)
    return (out, lse) if return_lse else out


def _by_one_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor | None,
    ends: list[int],
    counts: Lengths | None,
    window: tuple[int, int],
    bias: RelativePosition | None,
    **options: Any,
) -> tuple[Tensor, Tensor] | None:
    """The call as a step like one before, which is quicker to start; None where it is none."""
    if bias is not None or not ends or len(ends) != query.shape[0]:
        return None
    Nq, least = query.shape[2], min(ends)
    if Nq == 1:
        window = (window[0], -1)  # there is nothing behind the last key
    alike = least == max(ends) or (Nq == 1 and window[0] < 0)
    if not alike or least < Nq or not (counts is None or (isinstance(counts, list) and counts == [Nq] * len(ends))):
        return None
    given = (query, key, value, window, options["scale"], options["softcap"], options["sinks"], options["backend"])
    known = steps.key_of(*given, table is not None)
    step = None if known is None else steps.find(known, *given, table is not None)
    return None if step is None else steps.run(step, query, key, value, options["sinks"], table, ends)


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
    check_query(query)
    ends = check_pages(key_pages, value_pages, block_table, lengths, query.shape[0])
    # An entry behind a sequence's length may be anything; kernels may look where it points, and see nothing of it.
    table = block_table.clamp(0, max(key_pages.shape[0] - 1, 0)).int()
    return attend_pages(
        query, key_pages.transpose(1, 2), value_pages.transpose(1, 2), table, ends, counts=counts,
        is_causal=is_causal, window=window, scale=scale, softcap=softcap, sinks=sinks, bias=bias,
        return_lse=return_lse, backend=backend,
    )  # fmt: skip


def attend_pages(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    ends: list[int],
    *,
    counts: Lengths | None,
    is_causal: bool,
    window: tuple[int, int],
    bias: RelativePosition | None,
    return_lse: bool,
    **options: Any,
) -> Any:
    """`paged_attention` of keys and values (pages, Hkv, rows of a page, .), lengths that are checked and an int32 table
    of which every entry is a page; `options`: scale, softcap, sinks, backend."""
    sharding.refuse("attention over a cache")

    def run(
        queries: Tensor, rows: slice, end: int, mask: BlockMask | None, placed: RelativePosition | None
    ) -> tuple[Tensor, Tensor]:
        own = table[rows]
        call = None
        if is_plain(queries, keys, values, options["sinks"], *tensors_of(placed)):
            call = steps.settled(queries, (keys, values), end, mask=mask, bias=placed, **options)
        if call is not None:
            pages = Pages(own, end)
            return cpu.paged_forward(call.query, keys, values, pages, call.mask, call.scale, *call.modifiers)
        key, value = (read_pages(pool.transpose(1, 2), own, end) for pool in (keys, values))
        found: tuple[Tensor, Tensor] = attention(
            queries, key, value, mask=mask, bias=placed, return_lse=True, **options
        )
        return found

    seen = window[0], 0 if is_causal else window[1]
    found = _by_one_step(query, keys, values, table, ends, counts, seen, bias, **options)
    out, lse = found or _at_the_ends(run, query, ends, counts, seen, bias)
    return (out, lse) if return_lse else out


def check_query(query: Tensor) -> None:
    """Raise unless query is (B, Hq, Nq, D)."""
    if not isinstance(query, Tensor):
        raise InputTypeError(f"query must be a tensor, got {type(query).__name__}")
    if query.dim() != 4:
        raise InputError(f"query must have 4 dimensions (batch, heads, length, head_dim), got {tuple(query.shape)}")


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


def written(
    cache: tuple[Tensor, Tensor],
    added: tuple[Tensor, Tensor],
    firsts: list[int],
    counts: list[int],
    table: Tensor | None = None,
) -> bool:
    """Write new keys and values as `append_rows` says, where the CPU's module can; returns whether it did."""
    if cpu.MISSING or not is_plain(*added):
        return False
    for old, new in zip(cache, added, strict=True):
        if not (old.is_cpu and new.is_cpu and old.dtype == new.dtype and old.stride(3) == 1 and new.stride(3) == 1):
            return False
    for old, new in zip(cache, added, strict=True):
        cpu.append_rows(old, new, firsts, counts, table)
    return True


def checked_integers(name: str, given: Lengths, count: int, most: int) -> list[int]:
    """Integers from 0 to `most`, `count` of them.

    Raises:
        InputError, InputTypeError: others.
    """
    if isinstance(given, Tensor) and (given.is_floating_point() or given.dtype == torch.bool):
        raise InputTypeError(f"{name} must be integers, got {given.dtype}")
    found = [int(n) for n in (given.tolist() if isinstance(given, Tensor) else given)]
    if len(found) != count or (found and not 0 <= min(found) <= max(found) <= most):
        raise InputError(f"{name} must be {count} integers from 0 to {most}; got {found}")
    return found
