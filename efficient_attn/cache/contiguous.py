"""`KVCache`: one layer's keys and values, a row of memory for each sequence of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..biases import RelativePosition
from ..errors import InputError, UnsupportedError
from .reading import Lengths, attend_rows, check_query, checked_integers, written
from .rotary import turned

FIRST_CAPACITY = 64


class KVCache:
    """Keys (B, Hkv, N, D) and values (B, Hkv, N, Dv) of tokens seen before; sequences may have different lengths.

        cache = KVCache()                                # or capacity=4096, growing=False, or window=1024
        out = cache.attend(query, key, value)            # the prompt, then token by token

    Args:
        capacity: tokens to make room for at once; 0 starts small.
        growing: the space doubles when it is full; else more tokens than `capacity` are an InputError.
        window: tokens see themselves and the `window` - 1 before. Older keys are dropped, so that the memory stays that
            of 2 `window` tokens, but while a longer chunk is appended.
        rotary: (cos, sin), each (positions, rotary_dim / 2): keys are turned by their positions as they are written,
            and queries in `attend`.
        interleaved: rotary features 2i and 2i + 1 are a pair, else i and i + rotary_dim / 2.

    Without gradients: memory that later steps share would break autograd.

    Raises:
        InputError: a negative capacity, a window below 1, growing=False without a capacity.
    """

    def __init__(
        self,
        capacity: int = 0,
        *,
        growing: bool = True,
        window: int | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        interleaved: bool = False,
    ) -> None:
        if capacity < 0 or (window is not None and window < 1) or (capacity == 0 and not growing and window is None):
            raise InputError(
                f"a cache has capacity >= 0, more with growing=False, and a window >= 1 or None; got {capacity}, "
                f"growing={growing}, window={window}"
            )
        self.capacity, self.growing, self.window = capacity, growing, window
        self.rotary, self.interleaved = rotary, interleaved
        self.store: tuple[Tensor, Tensor] | None = None
        self._rows: list[int] = []  # of each sequence, in use
        self._dropped: list[int] = []  # tokens before them, of which a window has no more need

    # --- what it holds ---

    @property
    def lengths(self) -> list[int]:
        """How many tokens each sequence has had; [] before the first."""
        return [rows + dropped for rows, dropped in zip(self._rows, self._dropped, strict=True)]

    @property
    def length(self) -> int:
        """How many tokens the longest sequence has had."""
        return max(self.lengths, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(x.numel() * x.element_size() for x in self.store or ())

    # --- writing ---

    def append(self, key: Tensor, value: Tensor, *, counts: Lengths | None = None) -> tuple[Tensor, Tensor]:
        """Add keys (B, Hkv, n, D) and values (B, Hkv, n, Dv) behind those of each sequence.

        Args:
            counts: integers (B), how many of the n are real, the first ones; default all.

        Returns:
            All keys and values that are held, as views (B, Hkv, rows of the longest sequence, .).

        Raises:
            InputError: tensors that do not fit what is held, or no room with growing=False.
            UnsupportedError: keys that take part in autograd.
        """
        self._append(key, value, counts)
        assert self.store is not None
        keys, values = (x[:, :, : max(self._rows, default=0)] for x in self.store)
        self._trim()
        return keys, values

    def attend(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        counts: Lengths | None = None,
        is_causal: bool = True,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        bias: RelativePosition | None = None,
        return_lse: bool = False,
        backend: str = "auto",
    ) -> Any:
        """Append key and value, if given, and attend from the last tokens of each sequence.

        Args:
            query: (B, Hq, Nq, D), of the last Nq tokens: those just appended, or appended before (a layer that shares
                another's keys). A cache of one sequence serves a batch of queries.
            key, value: (B, Hkv, Nq, D) and (B, Hkv, Nq, Dv), or None.
            counts: integers (B), how many of the Nq tokens are real; the rows behind give 0.
            is_causal: a token sees no later one.
            scale, softcap, sinks, return_lse, backend: as in `attention`.
            bias: an `ALiBi`, `RelativeBias` or `T5Bias`, of the distances in each sequence.

        Returns:
            out (B, Hq, Nq, Dv), or (out, lse (B, Hq, Nq)).

        Raises:
            InputError: an empty cache, and what `append` and `attention` raise.
        """
        check_query(query)
        if key is not None and value is not None:
            self._append(key, value, counts)
        elif key is not None or value is not None:
            raise InputError("key and value are appended together; give both or none")
        if self.store is None:
            raise InputError("the cache is empty: append keys and values first, or give them")
        (keys, values), rows, dropped = self.store, self._rows, self._dropped
        if keys.shape[0] == 1 != query.shape[0]:
            keys, values = (x.expand(query.shape[0], -1, -1, -1) for x in (keys, values))
            rows, dropped = (x * query.shape[0] for x in (rows, dropped))
        B, Nq = query.shape[0], query.shape[2]
        real = [Nq] * B if counts is None else checked_integers("counts", counts, B, Nq)
        if len(rows) != B or any(n > r for n, r in zip(real, rows, strict=True)):
            raise InputError(f"{real} queries at the end of sequences of which the cache holds {rows} tokens")
        if self.rotary is not None:
            firsts = [r + d - n for r, d, n in zip(rows, dropped, real, strict=True)]
            query = turned(query, firsts, real, *self.rotary, interleaved=self.interleaved)
        found = attend_rows(
            query, keys, values, rows, counts=real, is_causal=is_causal,
            window=(-1 if self.window is None else self.window - 1, -1), scale=scale, softcap=softcap,
            sinks=sinks, bias=bias, return_lse=return_lse, backend=backend,
        )  # fmt: skip
        self._trim()
        return found

    def rewind(self, lengths: int | Lengths) -> None:
        """Forget the tokens from a length on: one for all sequences, or one for each.

        Raises:
            InputError: a length that a sequence has not had, or whose window is dropped already.
        """
        before = self.lengths
        wanted = [min(lengths, n) for n in before] if isinstance(lengths, int) else lengths
        found = checked_integers("lengths", wanted, len(before), self.length)
        for new, old, dropped in zip(found, before, self._dropped, strict=True):
            if new > old or (dropped and new - dropped < (self.window or 1) - 1):
                raise InputError(
                    f"a sequence of {old} tokens, of which {dropped} are dropped, cannot be rewound to {new}: the "
                    f"tokens that its next one would see are not there"
                )
        self._rows = [new - dropped for new, dropped in zip(found, self._dropped, strict=True)]

    def reorder(self, rows: Tensor) -> None:
        """Make sequence b what sequence rows[b] was, as beam search does when it picks its best beams.

        Args:
            rows: int64 (B'), any number of them.
        """
        if self.store is not None:
            self.store = (self.store[0].index_select(0, rows), self.store[1].index_select(0, rows))
            chosen = rows.tolist()
            self._rows, self._dropped = ([x[b] for b in chosen] for x in (self._rows, self._dropped))

    def clear(self) -> None:
        """Forget everything, and keep the space."""
        self._rows, self._dropped = [0] * len(self._rows), [0] * len(self._rows)

    # --- inside ---

    def _append(self, key: Tensor, value: Tensor, counts: Lengths | None) -> None:
        if (key.requires_grad or value.requires_grad) and torch.is_grad_enabled():
            raise UnsupportedError("a cache is for generation; call the model under torch.no_grad(), or without cache=")
        self._check(key, value)
        B, _, n, _ = key.shape
        if self.store is None:
            self._rows, self._dropped = [0] * B, [0] * B
        real = [n] * B if counts is None else checked_integers("counts", counts, B, n)
        if self.rotary is not None:
            key = turned(key, self.lengths, real, *self.rotary, interleaved=self.interleaved)
        self._make_room(n, key, value)
        assert self.store is not None
        if written(self.store, (key, value), self._rows, real):
            pass
        elif len(set(self._rows)) <= 1 and len(set(real)) <= 1:
            first, count = max(self._rows, default=0), max(real, default=0)
            for kept, new in zip(self.store, (key, value), strict=True):
                kept[:, :, first : first + count] = new[:, :, :count]
        else:
            for b, (start, count) in enumerate(zip(self._rows, real, strict=True)):
                for kept, new in zip(self.store, (key, value), strict=True):
                    kept[b, :, start : start + count] = new[b, :, :count]
        self._rows = [rows + count for rows, count in zip(self._rows, real, strict=True)]

    def _check(self, key: Tensor, value: Tensor) -> None:
        if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise InputError(
                f"key and value are (B, Hkv, n, D) and (B, Hkv, n, Dv); got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        for name, held, new in zip(("key", "value"), self.store or (), (key, value), strict=False):
            alike = (*held.shape[:2], held.shape[3], held.dtype, held.device)
            if (*new.shape[:2], new.shape[3], new.dtype, new.device) != alike:
                raise InputError(
                    f"the cache holds a {name} {tuple(held.shape)} of {held.dtype} on {held.device}; got "
                    f"{tuple(new.shape)} of {new.dtype} on {new.device}"
                )

    def _make_room(self, n: int, key: Tensor, value: Tensor) -> None:
        """Space for n more tokens; a window drops what no later token sees before it grows."""
        space = 0 if self.store is None else self.store[0].shape[2]
        end = max(self._rows, default=0) + n
        if self.store is not None and end <= space:
            return
        if self.window is not None:
            self._drop()
            end = max(self._rows, default=0) + n
            capacity = max(2 * self.window, end)
            if capacity == space:
                return
        elif not self.growing:
            capacity = self.capacity
            if end > capacity:
                raise InputError(
                    f"{n} tokens behind {max(self._rows, default=0)} do not fit a cache of {capacity}; make it longer, "
                    "or growing=True"
                )
        else:
            capacity = max(self.capacity if self.store is None else 2 * space, end, FIRST_CAPACITY)
        self._resize(capacity, key, value)

    def _resize(self, capacity: int, key: Tensor, value: Tensor) -> None:
        old, used = self.store, max(self._rows, default=0)
        self.store = tuple(x.new_zeros(*x.shape[:2], capacity, x.shape[3]) for x in (key, value))  # type: ignore[assignment]
        for kept, before in zip(self.store or (), old or (), strict=False):
            kept[:, :, :used] = before[:, :, :used]

    def _drop(self) -> None:
        """Move the last `window` - 1 tokens of each sequence to the front."""
        assert self.window is not None
        if self.store is None or max(self._rows, default=0) < self.window:
            return
        surplus = [max(0, rows - (self.window - 1)) for rows in self._rows]
        for b, first in enumerate(surplus):
            for kept in self.store:
                kept[b, :, : self._rows[b] - first] = kept[b, :, first : self._rows[b]].clone()
        self._rows = [rows - first for rows, first in zip(self._rows, surplus, strict=True)]
        self._dropped = [dropped + first for dropped, first in zip(self._dropped, surplus, strict=True)]

    def _trim(self) -> None:
        """The space of a window again, after a chunk that was longer."""
        if self.window is not None and self.store is not None and self.store[0].shape[2] > 2 * self.window:
            self._drop()
            self._resize(2 * self.window, *self.store)
