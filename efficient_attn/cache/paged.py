"""`PagedKVCache`: sequences of any length on pages of one pool (Kwon et al. 2023), which may share a beginning."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from operator import gt
from typing import Any

import torch
from torch import Tensor

from ..biases import RelativePosition
from ..errors import InputError, UnsupportedError
from .reading import Lengths, attend_pages, check_query, checked_integers, written
from .rotary import turned


class PagedKVCache:
    """One layer's keys and values on pages; sequences come and go, and each takes the pages that it fills.

        cache = PagedKVCache(256, 64, num_kv_heads=8, head_dim=64)
        first = cache.add()
        out = cache.attend([first], query, key, value)   # (1, Hq, N, D): a prompt, then token by token
        other = cache.fork(first)                        # shares every page until one of them writes
        cache.free(first)

    Args:
        num_pages: of the pool.
        page_size: rows of a page.
        num_kv_heads, head_dim: of the keys; value_dim: of the values, default head_dim.
        rotary, interleaved: as in `KVCache`.
        dtype, device: of the pages.

    Attributes:
        key_pages, value_pages: (num_pages, page_size, Hkv, D) and (num_pages, page_size, Hkv, Dv), for
            `paged_attention` and `compat.flash_attn`.

    Without gradients.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        interleaved: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if num_pages < 1 or page_size < 1:
            raise InputError(f"a pool has one page or more, of one row or more; got {num_pages} of {page_size}")
        rows = (num_pages, num_kv_heads, page_size)  # a head's rows lie together, which is how they are read
        widths = head_dim, value_dim or head_dim
        keys, values = (torch.zeros(*rows, width, dtype=dtype, device=device) for width in widths)
        self._pools = keys, values
        self.page_size, self.rotary, self.interleaved = page_size, rotary, interleaved
        self._free = list(range(num_pages - 1, -1, -1))
        self._users = [0] * num_pages  # sequences that have the page
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0
        self._tables = _Tables()
        self._copied: tuple[tuple[list[int], int], Tensor] | None = None  # the last table on another device

    @property
    def key_pages(self) -> Tensor:
        """(num_pages, page_size, num_kv_heads, head_dim), what `paged_attention` takes."""
        return self._pools[0].transpose(1, 2)

    @property
    def value_pages(self) -> Tensor:
        """(num_pages, page_size, num_kv_heads, value_dim)."""
        return self._pools[1].transpose(1, 2)

    # --- sequences ---

    @property
    def free_pages(self) -> int:
        """How many pages no sequence has."""
        return len(self._free)

    def add(self) -> int:
        """A new sequence without tokens; returns its name."""
        name, self._next = self._next, self._next + 1
        self._pages[name], self._lengths[name] = [], 0
        self._tables.add(name)
        return name

    def fork(self, sequence: int, length: int | None = None) -> int:
        """A new sequence that begins as another does, on the same pages; the page on which it goes on is copied when
        one of them writes.

        Args:
            length: how many tokens of it; default all.
        """
        had = self._length(sequence)
        length = had if length is None else checked_integers("length", [length], 1, had)[0]
        name = self.add()
        self._pages[name] = self._pages[sequence][: -(-length // self.page_size)]
        self._lengths[name] = length
        for i, page in enumerate(self._pages[name]):
            self._users[page] += 1
            self._tables.put(name, i, page)
        return name

    def free(self, sequence: int) -> None:
        """Forget a sequence; its pages that no other has are free again."""
        self.rewind(sequence, 0)
        self._tables.remove(sequence)
        del self._pages[sequence], self._lengths[sequence]

    def rewind(self, sequence: int, length: int) -> None:
        """Forget a sequence's tokens from `length` on."""
        if type(length) is not int or not 0 <= length <= self._length(sequence):
            length = checked_integers("length", [length], 1, self._length(sequence))[0]
        pages = self._pages[sequence]
        while len(pages) * self.page_size >= length + self.page_size:
            page = pages.pop()
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)
        self._lengths[sequence] = length

    def lengths(self, sequences: Sequence[int]) -> list[int]:
        """How many tokens sequences have."""
        try:
            return [self._lengths[sequence] for sequence in sequences]
        except KeyError:
            return [self._length(sequence) for sequence in sequences]

    def block_table(self, sequences: Sequence[int]) -> Tensor:
        """int32 (sequences, pages of the longest), -1 behind the last page of each."""
        counts = [len(self._pages[sequence]) for sequence in sequences if self._length(sequence) >= 0]
        table = self._table_of(sequences)[:, : max(counts, default=0)]
        own = torch.arange(table.shape[1], device=table.device) < torch.tensor(counts, device=table.device)[:, None]
        return table.where(own, -1)

    # --- writing and reading ---

    def append(self, sequences: Sequence[int], key: Tensor, value: Tensor, *, counts: Lengths | None = None) -> None:
        """Add keys (S, Hkv, n, D) and values (S, Hkv, n, Dv), row s behind the tokens of sequences[s].

        Args:
            counts: integers (S), how many of the n are real, the first ones; default all.

        Raises:
            InputError: tensors that do not fit, a sequence twice, or too few free pages; nothing is written then.
            UnsupportedError: keys that take part in autograd.
        """
        if (key.requires_grad or value.requires_grad) and torch.is_grad_enabled():
            raise UnsupportedError("a cache is for generation; call the model under torch.no_grad(), or without cache=")
        (_, Hkv, page, D), Dv = self._pools[0].shape, self._pools[1].shape[3]
        S, n = len(sequences), key.shape[2] if key.dim() == 4 else 0
        if key.shape != (S, Hkv, n, D) or value.shape != (S, Hkv, n, Dv) or len(set(sequences)) != S:
            raise InputError(
                f"{S} different sequences take keys ({S}, {Hkv}, n, {D}) and values ({S}, {Hkv}, n, {Dv}); got "
                f"{tuple(key.shape)}, {tuple(value.shape)} for {list(sequences)}"
            )
        before = self.lengths(sequences)
        real = [n] * S if counts is None else checked_integers("counts", counts, S, n)
        self._take_pages(sequences, before, real)
        if self.rotary is not None:
            key = turned(key, before, real, *self.rotary, interleaved=self.interleaved)
        if not written(self._pools, (key, value), before, real, self._table_of(sequences)) and any(real):
            firsts, ends = (torch.tensor(numbers, device=key.device)[:, None] for numbers in (before, real))
            ahead = torch.arange(n, device=key.device)
            at, kept = (firsts + ahead).where(ahead < ends, 0), (ahead < ends).flatten()
            places = self._table_of(sequences).gather(1, at // page).flatten()[kept], (at % page).flatten()[kept]
            for pages, new in ((self.key_pages, key), (self.value_pages, value)):
                pages[places] = new.transpose(1, 2).flatten(0, 1)[kept].to(pages.dtype)
        for sequence, start, count in zip(sequences, before, real, strict=True):
            self._lengths[sequence] = start + count

    def attend(
        self,
        sequences: Sequence[int],
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
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
        """Append key and value, if given, and attend from the last tokens of each sequence.

        Args:
            query: (S, Hq, Nq, D), row s of sequences[s].
            key, value: (S, Hkv, Nq, D) and (S, Hkv, Nq, Dv), or None.
            counts: integers (S), how many of the Nq tokens are real; the rows behind give 0.
            is_causal, window, scale, softcap, sinks, bias, return_lse, backend: as in `paged_attention`.

        Returns:
            out (S, Hq, Nq, Dv), or (out, lse (S, Hq, Nq)).
        """
        check_query(query)
        if (key is None) != (value is None):
            raise InputError("key and value are appended together; give both or none")
        if key is not None and value is not None:
            self.append(sequences, key, value, counts=counts)
        S, Nq = len(sequences), query.shape[2]
        if query.shape[0] != S:
            raise InputError(f"{S} sequences, and queries of {query.shape[0]}")
        lengths = self.lengths(sequences)
        real = [Nq] * S if counts is None else checked_integers("counts", counts, S, Nq)
        if any(map(gt, real, lengths)):
            raise InputError(f"{real} queries at the end of sequences of {lengths} tokens")
        if self.rotary is not None:
            firsts = [length - n for length, n in zip(lengths, real, strict=True)]
            query = turned(query, firsts, real, *self.rotary, interleaved=self.interleaved)
        return attend_pages(
            query, *self._pools, self._table_of(sequences), lengths, counts=real,
            is_causal=is_causal, window=window, scale=scale, softcap=softcap, sinks=sinks, bias=bias,
            return_lse=return_lse, backend=backend,
        )  # fmt: skip

    # --- inside ---

    def _length(self, sequence: int) -> int:
        if sequence not in self._lengths:
            raise InputError(f"there is no sequence {sequence}; there are {sorted(self._lengths)}")
        return self._lengths[sequence]

    def _table_of(self, sequences: Sequence[int]) -> Tensor:
        """int32 (sequences, capacity): what stands behind a sequence's pages means nothing, but is a page."""
        if self._pools[0].is_cpu:
            return self._tables.of(sequences)
        asked = list(sequences), self._tables.version
        if self._copied is None or self._copied[0] != asked:
            self._copied = asked, self._tables.of(sequences).to(self._pools[0].device)
        return self._copied[1]

    def _take_pages(self, sequences: Sequence[int], before: list[int], counts: list[int]) -> None:
        """Pages for `counts` more tokens; one that others have, too, is copied before it is written."""
        size, shared, longer, needed = self.page_size, [], [], 0
        for sequence, start, count in zip(sequences, before, counts, strict=True):
            pages = self._pages[sequence]
            had, end = len(pages), -(-(start + count) // size)
            if end > had:
                needed += end - had
                longer.append((sequence, had, end))
            if count and start % size and self._users[pages[-1]] > 1:
                shared.append(sequence)
        if shared:
            writers = Counter(self._pages[sequence][-1] for sequence in shared)
            needed += sum(min(count, self._users[page] - 1) for page, count in writers.items())
        if needed > len(self._free):
            raise InputError(
                f"{needed} more pages of {size} tokens are needed, and {len(self._free)} are free; free a sequence, or "
                "make the pool larger"
            )
        for sequence in shared:
            old = self._pages[sequence][-1]
            if self._users[old] == 1:  # who shared it has just got a copy
                continue
            new = self._free.pop()
            for pool in self._pools:
                pool[new] = pool[old]
            self._users[old] -= 1
            self._take(sequence, len(self._pages[sequence]) - 1, new)
        for sequence, had, end in longer:
            for i in range(had, end):
                self._take(sequence, i, self._free.pop())

    def _take(self, sequence: int, index: int, page: int) -> None:
        """Give a sequence a page that nobody has, as its page `index`."""
        self._users[page] = 1
        self._pages[sequence][index : index + 1] = [page]
        self._tables.put(sequence, index, page)


class _Tables:
    """Which pages sequences have, as a kernel reads it: int32, a row for each sequence, kept up page by page."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}  # of each sequence
        self._free: list[int] = []
        self.version = 0  # counts pages that were put
        self._count, self._width = 0, 0
        self._numbers = array("i", [0])
        self._tensor = torch.zeros(0, 0, dtype=torch.int32)
        self._asked: tuple[list[int], Tensor] | None = None  # what was asked for last, and the part of the table

    def __getstate__(self) -> dict[str, Any]:
        # A copy's tensor would be memory of its own, which nobody writes to.
        return {**vars(self), "_tensor": None, "_asked": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._tensor = self._view()

    def add(self, sequence: int) -> None:
        if not self._free:
            self._make(max(8, 2 * self._count), self._width)
        self._rows[sequence] = self._free.pop()

    def remove(self, sequence: int) -> None:
        self._asked = None
        self._free.append(self._rows.pop(sequence))

    def put(self, sequence: int, index: int, page: int) -> None:
        if index >= self._width:
            self._make(self._count, max(64, 2 * index))
        self._numbers[self._rows[sequence] * self._width + index] = page
        self.version += 1

    def of(self, sequences: Sequence[int]) -> Tensor:
        """(sequences, width), in place where they stand one behind another: then it is good for later pages too."""
        if self._asked is not None and self._asked[0] == sequences:
            return self._asked[1]
        rows = [self._rows[sequence] for sequence in sequences]
        first = rows[0] if rows else 0
        if rows != list(range(first, first + len(rows))):
            return self._tensor[rows]
        found = self._tensor[first : first + len(rows)]
        self._asked = list(sequences), found
        return found

    def _make(self, count: int, width: int) -> None:
        """Room for so many rows of so many pages. An array, since its elements are written without an operator."""
        old, rows, pages = self._tensor, self._count, self._width
        self._numbers = array("i", bytes(4 * max(1, count * width)))
        self._free += range(count - 1, rows - 1, -1)
        self._count, self._width, self._asked = count, width, None
        self._tensor = self._view()
        self._tensor[:rows, :pages] = old

    def _view(self) -> Tensor:
        size = self._count * self._width
        return torch.frombuffer(self._numbers, dtype=torch.int32)[:size].view(self._count, self._width)
