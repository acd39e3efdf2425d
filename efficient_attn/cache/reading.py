"""Attention of the last queries of sequences to all of their keys, which lie in rows or on pages.

Letters: B sequences, Hq and Hkv heads, Nq queries of each, N rows of keys, D and Dv head dimensions. Sequence b has
lengths[b] keys; its queries are those of its last tokens, so that query i stands at key lengths[b] - Nq + i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..biases import ALiBi, RelativePosition, aligned
from ..errors import InputError, InputTypeError
from ..functional import attention
from ..masks import BlockMask

Lengths = Tensor | Sequence[int]


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
    """
    ends = checked_integers("lengths", lengths, query.shape[0], key.shape[2])
    B, _, Nq, _ = query.shape
    real = [Nq] * B if counts is None else checked_integers("counts", counts, B, Nq)
    sides, longest, everything = (window[0], 0 if is_causal else window[1]), max(ends, default=0), slice(None)

    placed = _placed(bias)

    def run(queries: Tensor, rows: slice, end: int, mask: BlockMask | None) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = attention(
            queries, key[rows, :, :end], value[rows, :, :end], mask=mask, scale=scale, softcap=softcap, sinks=sinks,
            bias=_of_rows(placed, rows), return_lse=True, backend=backend,
        )  # fmt: skip
        return found

    if len(set(ends)) <= 1 and len(set(real)) <= 1:
        n = max(real, default=0)
        found = run(query[:, :, :n], everything, longest, _end_mask(n, longest, sides))
    elif (
        Nq == 1 and sides[0] < 0 and min(real) == 1 and bias is None
    ):  # what the last token sees is up to the length alone
        tensor = torch.tensor(ends, device=query.device)
        found = run(query, everything, longest, BlockMask.from_lengths(tensor, q_len=Nq, kv_len=longest))
    else:
        parts = [
            _padded(run(query[b : b + 1, :, :n], slice(b, b + 1), end, _end_mask(n, end, sides)), Nq)
            for b, (end, n) in enumerate(zip(ends, real, strict=True))
        ]
        found = torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    out, lse = _padded(found, Nq)
    return (out, lse) if return_lse else out


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

    The pages that a call needs are put together first: O(B N) memory for the time of the call.

    Args:
        key_pages, value_pages: (pages, page, Hkv, D) and (pages, page, Hkv, Dv).
        block_table: int32 or int64 (B, pages of the longest sequence). Entries behind a sequence's length are not
            looked at. The same page may stand in many rows.
        lengths and the rest: as in `cached_attention`.

    Raises:
        InputError, InputTypeError: what `cached_attention` raises; pages that are not there.
    """
    ends = check_pages(key_pages, value_pages, block_table, lengths, query.shape[0])
    key, value = (read_pages(pages, block_table, max(ends, default=0)) for pages in (key_pages, value_pages))
    return cached_attention(
        query, key, value, ends, counts=counts, is_causal=is_causal, window=window, scale=scale, softcap=softcap,
        sinks=sinks, bias=bias, return_lse=return_lse, backend=backend,
    )  # fmt: skip


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
    table = table[:, : -(-length // pages.shape[1])]
    rows = pages[table.clamp(0, max(pages.shape[0] - 1, 0)).long()]  # beyond a sequence's length anything may stand
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
