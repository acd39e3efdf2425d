"""Exact attention of a sequence that is spread over ranks, forward and backward, by the three transports of plan.py.

A rank's queries meet its keys in pieces. Each piece is one call of a kernel and gives (out_p, lse_p); they are joined
as `merge_attention` does, with shares w_p = exp(lse_p - lse). Backward, with the whole row's out and lse,

    dS_p = w_p P_p (g V^T - delta),   delta = g . out - g_lse,   P_p the softmax within the piece,

which is what a kernel's backward gives for grad_out = w_p g, grad_lse = w_p g_lse, the row's out and the piece's lse.
So only lse_p is kept of a piece, and keys are sent again in the backward instead of being kept.

Sinks are a key without a value that each query sees once: they go with the first piece of a run of queries. A bias by
relative position goes to a piece as the diagonals that its corner of the whole has.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.call import accumulation_dtype
from ..errors import UnsupportedError
from ..functional import describe, merge_attention
from ..inputs import modifier_names
from ..masks import MaskArrays
from ..ops import attention as ops
from .exchange import Exchange, Passing, swapped
from .plan import Piece, Plan, head_range, kv_heads_for
from .shards import Run, Runs, Shards, overlap, size


@dataclass(frozen=True)
class Settled:
    """All of a call but its tensors."""

    exchange: Exchange
    plan: Plan
    ranks: tuple[int, ...]  # of the exchange, which the plan's ranks are
    scale: float
    dropout_p: float
    seed: int
    backend: str
    softcap: float = 0.0
    first_head: int = 0

    @property
    def place(self) -> int:
        """This rank among those of the plan."""
        return self.ranks.index(self.exchange.rank)


class Added(NamedTuple):
    """What joins the scores of this rank's queries."""

    bias: Tensor | None = None  # (1 | B, 1 | Hq, 1 | n, 1 | Nk)
    sinks: Tensor | None = None  # (Hq)
    diagonals: Tensor | None = None  # (1 | B, 1 | Hq, Nq + Nk - 1), of the whole sequence


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, added: Added, call: Settled, transport: str
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, n, Dv) and lse (B, Hq, n) of this rank's queries."""
    rows = functools.partial({"gather": _Fetched, "ring": _Ring}[transport], call)
    out, lse = _Attend.apply(query, key, value, *added, rows)  # type: ignore[no-untyped-call]
    return out, lse


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sinks: Tensor | None,
        diagonals: Tensor | None, make: Callable[[Added], _Rows],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows = make(Added(bias, sinks, diagonals))
        out, lse = rows.forward(query, key, value)
        ctx.save_for_backward(query, key, value, bias, sinks, diagonals, out, lse, *rows.lses)
        ctx.make = make
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "attention inside context_parallel has a first derivative alone; take create_graph=True away, or "
                "compute second derivatives in one process"
            )
        query, key, value, bias, sinks, diagonals, out, lse, *lses = ctx.saved_tensors
        rows = ctx.make(Added(bias, sinks, diagonals))
        rows.lses = lses
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        row = Row(grad_out, grad_lse, query, out, lse)
        return *rows.backward(row, key, value, ctx.needs_input_grad[3:6]), None


class Row(NamedTuple):
    """What the backward of every piece asks of the whole rows of this rank's queries."""

    grad_out: Tensor
    grad_lse: Tensor | None
    query: Tensor
    out: Tensor
    lse: Tensor


class _Rows:
    """What the transports share: the pieces of this rank's queries."""

    def __init__(self, call: Settled, added: Added) -> None:
        self.call, self.plan, self.exchange = call, call.plan, call.exchange
        self.given = added  # as they came; kernels take sinks that no piece rounds
        dtype = torch.float32 if added.sinks is None else accumulation_dtype(added.sinks.dtype)
        self.added = added if added.sinks is None else added._replace(sinks=added.sinks.to(dtype))
        self.lses: list[Tensor] = []  # of each piece whose run of queries has several
        # Both go by a key's distance, which a buffer without gaps would change.
        self.spread = call.dropout_p > 0.0 or added.diagonals is not None

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse of this rank's queries; `lses` is what the backward needs of pieces."""
        raise NotImplementedError

    def backward(self, row: Row, key: Tensor, value: Tensor, wanted: Sequence[bool]) -> tuple[Any, ...]:
        """Gradients of query, key, value, bias, sinks and diagonals; `wanted` is of the last three."""
        raise NotImplementedError

    def _begin(self, query: Tensor, value: Tensor) -> None:
        dtype = accumulation_dtype(query.dtype)
        self.out = query.new_zeros(*query.shape[:3], value.shape[3], dtype=dtype)
        self.lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
        self.exact: Tensor | None = None  # what the one piece of all rows gave
        self.kept: list[tuple[Run, Tensor]] = []

    def _take(self, piece: Piece, query: Tensor, key: Tensor, value: Tensor) -> None:
        """One piece forward, joined with those before; key and value are those at hand."""
        a, b = piece.rows
        q, k, v = query[:, :, a:b], _columns(key, piece), _columns(value, piece)
        first = not any(rows == piece.rows for rows, _ in self.kept)
        part, arrays = self._added(piece, first), piece.mask.arrays()
        out, lse = ops.attention_forward(
            q, k, v, part.bias, *ops.operands(arrays), self.call.scale, self.call.dropout_p, self._seed(piece),
            self.call.softcap, part.sinks, part.diagonals, self._backend(q, k, v, part, arrays),
        )  # fmt: skip
        if first:
            self.exact = out if (a, b) == (0, query.shape[2]) else None
            self.out[:, :, a:b], self.lse[:, :, a:b] = out, lse
        else:
            self.exact = None
            before = (self.out[:, :, a:b].clone(), self.lse[:, :, a:b].clone())
            self.out[:, :, a:b], self.lse[:, :, a:b] = merge_attention((before[0], out), (before[1], lse))
        self.kept.append((piece.rows, lse))

    def _end(self, query: Tensor) -> tuple[Tensor, Tensor]:
        counts: dict[Run, int] = {}
        for rows, _ in self.kept:
            counts[rows] = counts.get(rows, 0) + 1
        self.lses = [lse for rows, lse in self.kept if counts[rows] > 1]
        if self.added.sinks is not None:
            for a, b in self._bare(counts):
                self.lse[:, :, a:b] = self.added.sinks[:, None]
        return (self.out.to(query.dtype) if self.exact is None else self.exact), self.lse

    def _begin_backward(self, pieces: list[Piece], row: Row, wanted: Sequence[bool]) -> None:
        self.counts: dict[Run, int] = {}
        for piece in pieces:
            self.counts[piece.rows] = self.counts.get(piece.rows, 0) + 1
        self.left, self.begun = list(self.lses), set[Run]()
        dtype = accumulation_dtype(row.query.dtype)
        self.dq = torch.zeros(row.query.shape, dtype=dtype, device=row.query.device)
        self.sums = Added(
            *(torch.zeros_like(t, dtype=dtype) if t is not None and asked else None
              for t, asked in zip(self.added, wanted, strict=True))
        )  # fmt: skip
        if self.sums.sinks is not None and row.grad_lse is not None:
            for a, b in self._bare(self.counts):
                self.sums.sinks.add_(row.grad_lse[:, :, a:b].sum((0, 2)))

    def _give_back(self, piece: Piece, row: Row, key: Tensor, value: Tensor, dk: Tensor, dv: Tensor) -> None:
        """One piece backward: adds to dq and sums, and to dk and dv of the keys at hand."""
        a, b = piece.rows
        q, k, v = row.query[:, :, a:b], _columns(key, piece), _columns(value, piece)
        first = piece.rows not in self.begun
        self.begun.add(piece.rows)
        part, sums, whole = self._added(piece, first), self.sums, row.lse[:, :, a:b]
        g, g_lse = row.grad_out[:, :, a:b], None if row.grad_lse is None else row.grad_lse[:, :, a:b]
        part_lse = whole
        if self.counts[piece.rows] > 1:
            part_lse = self.left.pop(0)
            share = torch.exp(part_lse - whole.masked_fill(whole == -torch.inf, 0.0))
            g = (g * share[..., None]).to(row.out.dtype)
            g_lse = None if g_lse is None else g_lse * share
        arrays = piece.mask.arrays()
        backend = self._backend(q, k, v, part, arrays)
        if backends.BACKENDS[backend].NEEDS_TRANSPOSED:
            arrays = piece.mask.arrays(transposed=True)
        dq, part_dk, part_dv, dbias, dsinks, ddiagonals = ops.attention_backward(
            g, g_lse, None, q, k, v, part.bias, row.out[:, :, a:b], part_lse.contiguous(), *ops.operands(arrays),
            self.call.scale, self.call.dropout_p, self._seed(piece), sums.bias is not None, self.call.softcap,
            part.sinks, part.diagonals, sums.diagonals is not None, backend,
        )  # fmt: skip
        if b - a == self.dq.shape[2] and self.counts[piece.rows] == 1:
            self.dq = dq.to(self.dq.dtype)
        else:
            self.dq[:, :, a:b] += dq
        c, d = piece.columns
        dk[:, :, c:d] += part_dk
        dv[:, :, c:d] += part_dv
        if sums.bias is not None:
            _add_bias(sums.bias, dbias, piece)
        if sums.sinks is not None and first:
            sums.sinks.add_(dsinks)
        if sums.diagonals is not None:
            self._diagonals(sums.diagonals, piece).add_(ddiagonals)

    def _gradients(self, query: Tensor, dk: Tensor, dv: Tensor, key: Tensor) -> tuple[Any, ...]:
        added = (
            None if found is None or given is None else found.to(given.dtype)
            for found, given in zip(self.sums, self.given, strict=True)
        )
        return self.dq.to(query.dtype), dk.to(key.dtype), dv.to(key.dtype), *added

    def _added(self, piece: Piece, first: bool) -> Added:
        """What joins the scores of a piece."""
        bias, sinks, diagonals = self.added
        lines = None if diagonals is None else self._diagonals(diagonals, piece)
        return Added(_bias_part(bias, piece), sinks if first else None, lines)

    def _diagonals(self, diagonals: Tensor, piece: Piece) -> Tensor:
        """Those of a piece: pair (i, j) of the whole has its number at i - j + Nk - 1."""
        (n_q, n_k), Nk = piece.mask.shape[-2:], self.plan.keys.length
        return diagonals.narrow(2, piece.first_row - piece.first_column - n_k + Nk, n_q + n_k - 1)

    def _backend(self, q: Tensor, k: Tensor, v: Tensor, part: Added, arrays: MaskArrays) -> str:
        modifiers = modifier_names(self.call.softcap, part.sinks, part.diagonals)
        facts = describe(q, k, v, part.bias, arrays, self.call.dropout_p, False, modifiers)
        return backends.cached_select(self.call.backend, facts)

    def _bare(self, pieces: Collection[Run]) -> list[Run]:
        """The rows of the runs of queries that have no piece: their queries see no key."""
        sizes = [stop - start for start, stop in self.plan.queries.runs[self.call.place]]
        edges = list(itertools.accumulate(sizes, initial=0))
        return [run for run in itertools.pairwise(edges) if run not in pieces]

    def _seed(self, piece: Piece) -> Tensor | None:
        if self.call.dropout_p == 0.0:
            return None
        origin = (self.call.seed, self.call.first_head, piece.first_row, piece.first_column)
        return torch.tensor(origin, dtype=torch.int64)


class _Fetched(_Rows):
    """Each rank fetches the keys that its queries read."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._fetch(key, value)
        self._begin(query, value)
        for piece in self.plan.fetched(self.call.place, self.spread):
            self._take(piece, query, k, v)
        return self._end(query)

    def backward(self, row: Row, key: Tensor, value: Tensor, wanted: Sequence[bool]) -> tuple[Any, ...]:
        k, v = self._fetch(key, value)
        pieces = self.plan.fetched(self.call.place, self.spread)
        self._begin_backward(pieces, row, wanted)
        dtype = self.dq.dtype
        dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (k, v))
        for piece in pieces:
            self._give_back(piece, row, k, v, dk, dv)
        return self._gradients(row.query, *self._return(dk, dv, key, value), key)

    def _fetch(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of `Plan.at_hand`."""
        plan, me = self.plan, self.call.place
        held, buffer = plan.keys.runs[me], plan.at_hand(me, self.spread)
        if plan.ranks == 1 and buffer == held:
            return key, value
        B, H, _, D = key.shape
        width = D + value.shape[3]
        empty = key.new_empty(0)
        parts, shapes = [empty] * self.exchange.ranks, [torch.Size((0,))] * self.exchange.ranks
        for n, rank in enumerate(self.call.ranks):
            if n != me:
                rows = _picked(torch.cat([key, value], 3), held, plan.move(me, n))
                parts[rank], shapes[rank] = rows, torch.Size((B, H, size(plan.move(n, me)), width))
        found = self.exchange.swap(parts, shapes, what="keys and values") if plan.ranks > 1 else []
        k, v = key.new_empty(B, H, size(buffer), D), value.new_empty(B, H, size(buffer), width - D)
        for n, rank in enumerate(self.call.ranks):
            runs = plan.move(n, me)
            own = tuple(_picked(t, held, runs) for t in (key, value)) if n == me else ()
            came = own or found[rank].split((D, width - D), 3)
            for target, part in zip((k, v), came, strict=True):
                _placed(target, buffer, runs, part)
        return k, v

    def _return(self, dk: Tensor, dv: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Give the gradients of fetched keys to their owners; what each owner has got, in the order of ranks."""
        plan, me = self.plan, self.call.place
        held, buffer = plan.keys.runs[me], plan.at_hand(me, self.spread)
        if plan.ranks == 1 and buffer == held:
            return dk, dv
        B, H, n_keys, D = key.shape
        width = D + value.shape[3]
        both = torch.cat([dk, dv], 3)
        empty = key.new_empty(0)  # each contribution is as exact as the kernel that gave it: in the dtype of keys
        parts, shapes = [empty] * self.exchange.ranks, [torch.Size((0,))] * self.exchange.ranks
        for n, rank in enumerate(self.call.ranks):
            if n != me:
                parts[rank] = _picked(both, buffer, plan.move(n, me)).to(key.dtype)
                shapes[rank] = torch.Size((B, H, size(plan.move(me, n)), width))
        found = self.exchange.swap(parts, shapes, what="gradients of keys and values") if plan.ranks > 1 else []
        total = both.new_zeros(B, H, n_keys, width)
        for n, rank in enumerate(self.call.ranks):
            runs = plan.move(me, n)
            _placed(total, held, runs, found[rank] if n != me else _picked(both, buffer, runs), add=True)
        own_dk, own_dv = total.split((D, width - D), 3)
        return own_dk, own_dv


class _Ring(_Rows):
    """Every shard of keys passes by every rank: while one is worked on, the next one comes."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self._begin(query, value)
        for owner, k, v in self._passing(key, value):
            for piece in self.plan.met(self.call.place, owner):
                self._take(piece, query, k, v)
        return self._end(query)

    def backward(self, row: Row, key: Tensor, value: Tensor, wanted: Sequence[bool]) -> tuple[Any, ...]:
        plan, me, R = self.plan, self.call.place, self.plan.ranks
        met = [piece for step in range(R) for piece in plan.met(me, (me - step) % R)]
        self._begin_backward(met, row, wanted)
        passing: Passing | None = None
        B, H, _, D = key.shape
        width, what = D + value.shape[3], "gradients of keys and values"
        for owner, k, v in self._passing(key, value):
            found = torch.zeros(B, H, k.shape[2], width, dtype=self.dq.dtype, device=key.device)
            for piece in plan.met(me, owner):
                self._give_back(piece, row, k, v, found[..., :D], found[..., D:])
            if passing is not None:
                found += self.exchange.arrived(passing, what=what)
                passing = None  # what was sent is freed before the next one comes
            after = plan.keys.counts[(owner - 1) % R]  # the shard that is worked on next, here
            if R > 1:
                passing = self.exchange.pass_on(
                    found, (B, H, after, width), self._neighbour(1), self._neighbour(-1), what=what
                )
        if passing is not None:
            found = self.exchange.arrived(passing, what=what)
        return self._gradients(row.query, found[..., :D], found[..., D:], key)

    def _passing(self, key: Tensor, value: Tensor) -> Any:
        """Yield (owner, its keys, its values), this rank's first, then those of the rank before it, and so on."""
        plan, me, R = self.plan, self.call.place, self.plan.ranks
        B, H, _, D = key.shape
        both = torch.cat([key, value], 3) if R > 1 else key
        for step in range(R):
            owner = (me - step) % R
            if step < R - 1:
                shape = (B, H, plan.keys.counts[(owner - 1) % R], both.shape[3])
                passing = self.exchange.pass_on(
                    both, shape, self._neighbour(1), self._neighbour(-1), what="keys and values"
                )
            yield (owner, key, value) if step == 0 else (owner, both[..., :D], both[..., D:])
            if step < R - 1:
                both = self.exchange.arrived(passing, what="keys and values")
                del passing  # and with it what was sent

    def _neighbour(self, step: int) -> int:
        return self.call.ranks[(self.call.place + step) % self.plan.ranks]


# --- heads apart ---


def spread_heads(
    x: Tensor, heads: list[list[int]], shards: Shards, ranks: tuple[int, ...], exchange: Exchange, what: str
) -> Tensor:
    """(B, H, own tokens, C) -> (B, heads[own place], tokens of all `ranks`, C), in the order of the sequence.

    shards: who holds what, over all ranks of the exchange.
    """
    B, _, _, C = x.shape
    me = ranks.index(exchange.rank)
    empty = x[:0, :0, :0]
    parts, shapes = [empty] * exchange.ranks, [tuple(empty.shape)] * exchange.ranks
    for n, rank in enumerate(ranks):
        parts[rank] = _heads_of(x, heads[n])
        shapes[rank] = (B, len(heads[me]), shards.counts[rank], C)
    found = swapped(parts, shapes, exchange, what)
    return _in_order([found[rank] for rank in ranks], [shards.runs[rank] for rank in ranks])


def gather_heads(
    x: Tensor, heads: list[list[int]], shards: Shards, ranks: tuple[int, ...], exchange: Exchange, what: str
) -> Tensor:
    """The way back for query heads: (B, own heads, tokens of all `ranks`, C) -> (B, all heads, own tokens, C)."""
    B, _, _, C = x.shape
    group = [shards.runs[rank] for rank in ranks]
    whole = tuple(sorted(run for runs in group for run in runs))
    empty = x[:0, :0, :0]
    parts, shapes = [empty] * exchange.ranks, [tuple(empty.shape)] * exchange.ranks
    for n, rank in enumerate(ranks):
        parts[rank] = _picked(x, whole, group[n])
        shapes[rank] = (B, len(heads[n]), shards.counts[exchange.rank], C)
    found = swapped(parts, shapes, exchange, what)
    return torch.cat([found[rank] for rank in ranks], 1)


def head_lists(Hq: int, Hkv: int, degree: int) -> tuple[list[list[int]], list[list[int]]]:
    """The query heads and the key heads of each of `degree` places."""
    bounds = [head_range(Hq, place, degree) for place in range(degree)]
    return [list(range(*bound)) for bound in bounds], [kv_heads_for(bound, Hq, Hkv) for bound in bounds]


def _heads_of(x: Tensor, heads: list[int]) -> Tensor:
    if heads == list(range(heads[0], heads[0] + len(heads))) if heads else True:
        return x[:, heads[0] : heads[0] + len(heads)] if heads else x[:, :0]
    return x[:, heads]


def _in_order(parts: list[Tensor], runs: list[Runs]) -> Tensor:
    """Tokens of several ranks in the order of the sequence."""
    pieces = []
    for part, own in zip(parts, runs, strict=True):
        sizes = [stop - start for start, stop in own]
        pieces += list(zip(own, part.split(sizes, 2) if sizes else (), strict=True))
    ordered = [piece for _, piece in sorted(pieces, key=lambda pair: pair[0])]
    return torch.cat(ordered, 2) if ordered else parts[0]


# --- tokens of a buffer: dimension 2 holds `held`, run after run ---


def _slices(held: Runs, runs: Runs) -> list[tuple[int, int]]:
    """Where the tokens of `runs`, all of which are held, stand in the buffer: start and number."""
    found, place = [], 0
    for start, stop in held:
        found += [(place + a - start, b - a) for a, b in overlap(((start, stop),), runs)]
        place += stop - start
    return found


def _picked(x: Tensor, held: Runs, runs: Runs) -> Tensor:
    parts = [x.narrow(2, start, count) for start, count in _slices(held, runs)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2) if parts else x[:, :, :0]


def _placed(x: Tensor, held: Runs, runs: Runs, part: Tensor, *, add: bool = False) -> None:
    place = 0
    for start, count in _slices(held, runs):
        target, source = x.narrow(2, start, count), part.narrow(2, place, count)
        if add:
            target += source
        else:
            target.copy_(source)
        place += count


def _columns(x: Tensor, piece: Piece) -> Tensor:
    return x[:, :, piece.columns[0] : piece.columns[1]]


def _bias_part(bias: Tensor | None, piece: Piece) -> Tensor | None:
    if bias is None:
        return None
    part = bias[:, :, piece.rows[0] : piece.rows[1]] if bias.shape[2] > 1 else bias
    if bias.shape[3] == 1:
        return part
    columns = [part[..., start:stop] for start, stop in piece.keys]
    return columns[0] if len(columns) == 1 else torch.cat(columns, 3)


def _add_bias(total: Tensor, part: Tensor, piece: Piece) -> None:
    rows = total[:, :, piece.rows[0] : piece.rows[1]] if total.shape[2] > 1 else total
    if total.shape[3] == 1:
        rows += part
        return
    place = 0
    for start, stop in piece.keys:
        rows[..., start:stop] += part[..., place : place + stop - start]
        place += stop - start


__all__ = ["Added", "Settled", "exact_attention", "gather_heads", "head_lists", "spread_heads"]
