"""Exact attention of a sequence that is spread over ranks, forward and backward, by the three transports of plan.py.

A rank's queries meet its keys in pieces. Each piece is one call of a kernel and gives (out_p, lse_p); they are joined
as `merge_attention` does, with shares w_p = exp(lse_p - lse). Backward, with the whole row's out and lse,

    dS_p = w_p P_p (g V^T - delta),   delta = g . out - g_lse,   P_p the softmax within the piece,

which is what a kernel's backward gives for grad_out = w_p g, grad_lse = w_p g_lse, the row's out and the piece's lse.
So only lse_p is kept of a piece, and keys are sent again in the backward instead of being kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.call import accumulation_dtype
from ..errors import UnsupportedError
from ..functional import describe, merge_attention
from ..ops import attention as ops
from .exchange import Exchange, Passing, swapped
from .plan import Piece, Plan, head_range, kv_heads_for
from .shards import Runs, Shards, overlap, size


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
    first_head: int = 0

    @property
    def place(self) -> int:
        """This rank among those of the plan."""
        return self.ranks.index(self.exchange.rank)


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, call: Settled, transport: str
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, n, Dv) and lse (B, Hq, n) of this rank's queries, with its rows of the bias."""
    rows = {"gather": _Fetched, "ring": _Ring}[transport]
    out, lse = _Attend.apply(query, key, value, bias, functools.partial(rows, call))  # type: ignore[no-untyped-call]
    return out, lse


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, make: Callable[[], _Rows]
    ) -> tuple[Tensor, Tensor]:
        rows = make()
        out, lse = rows.forward(query, key, value, bias)
        ctx.save_for_backward(query, key, value, bias, out, lse, *rows.lses)
        ctx.make, ctx.wants_bias = make, bias is not None and ctx.needs_input_grad[3]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "attention inside context_parallel has a first derivative alone; take create_graph=True away, or "
                "compute second derivatives in one process"
            )
        query, key, value, bias, out, lse, *lses = ctx.saved_tensors
        rows = ctx.make()
        rows.lses = lses
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        return *rows.backward(grad_out, grad_lse, query, key, value, bias, out, lse, ctx.wants_bias), None


class _Rows:
    """What the transports share: the pieces of this rank's queries."""

    def __init__(self, call: Settled) -> None:
        self.call, self.plan, self.exchange = call, call.plan, call.exchange
        self.lses: list[Tensor] = []  # of each piece whose run of queries has several
        self.spread = call.dropout_p > 0.0

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """out and lse of this rank's queries; `lses` is what the backward needs of pieces."""
        raise NotImplementedError

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
        bias: Tensor | None, out: Tensor, lse: Tensor, wants_bias: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Gradients of query, key, value and bias."""
        raise NotImplementedError

    def _begin(self, query: Tensor, value: Tensor) -> None:
        dtype = accumulation_dtype(query.dtype)
        self.out = query.new_zeros(*query.shape[:3], value.shape[3], dtype=dtype)
        self.lse = query.new_full(query.shape[:3], -torch.inf, dtype=dtype)
        self.exact: Tensor | None = None  # what the one piece of all rows gave
        self.kept: list[tuple[tuple[int, int], Tensor]] = []

    def _take(self, piece: Piece, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> None:
        """One piece forward, joined with those before; key and value are those at hand."""
        a, b = piece.rows
        q, k, v = query[:, :, a:b], _columns(key, piece), _columns(value, piece)
        part = _bias_part(bias, piece)
        arrays = piece.mask.arrays()
        backend = backends.cached_select(self.call.backend, describe(q, k, v, part, arrays, self.call.dropout_p))
        out, lse = ops.attention_forward(
            q, k, v, part, *ops.operands(arrays), self.call.scale, self.call.dropout_p, self._seed(piece),
            0.0, None, None, backend,
        )  # fmt: skip
        if not any(rows == piece.rows for rows, _ in self.kept):
            self.exact = out if (a, b) == (0, query.shape[2]) else None
            self.out[:, :, a:b], self.lse[:, :, a:b] = out, lse
        else:
            self.exact = None
            before = (self.out[:, :, a:b].clone(), self.lse[:, :, a:b].clone())
            self.out[:, :, a:b], self.lse[:, :, a:b] = merge_attention((before[0], out), (before[1], lse))
        self.kept.append((piece.rows, lse))

    def _end(self, query: Tensor) -> tuple[Tensor, Tensor]:
        counts: dict[tuple[int, int], int] = {}
        for rows, _ in self.kept:
            counts[rows] = counts.get(rows, 0) + 1
        self.lses = [lse for rows, lse in self.kept if counts[rows] > 1]
        return (self.out.to(query.dtype) if self.exact is None else self.exact), self.lse

    def _begin_backward(self, pieces: list[Piece], bias: Tensor | None, wants_bias: bool, query: Tensor) -> None:
        self.counts: dict[tuple[int, int], int] = {}
        for piece in pieces:
            self.counts[piece.rows] = self.counts.get(piece.rows, 0) + 1
        self.left = list(self.lses)
        dtype = accumulation_dtype(query.dtype)
        self.dq = torch.zeros(query.shape, dtype=dtype, device=query.device)
        self.dbias = None if bias is None or not wants_bias else torch.zeros_like(bias, dtype=dtype)

    def _give_back(
        self, piece: Piece, tensors: tuple[Any, ...], key: Tensor, value: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        """One piece backward: adds to dq and dbias, and to dk and dv of the keys at hand."""
        grad_out, grad_lse, query, bias, out, lse = tensors
        a, b = piece.rows
        q, k, v = query[:, :, a:b], _columns(key, piece), _columns(value, piece)
        part, whole = _bias_part(bias, piece), lse[:, :, a:b]
        g, g_lse, part_lse = grad_out[:, :, a:b], None if grad_lse is None else grad_lse[:, :, a:b], whole
        if self.counts[piece.rows] > 1:
            part_lse = self.left.pop(0)
            share = torch.exp(part_lse - whole.masked_fill(whole == -torch.inf, 0.0))
            g = (g * share[..., None]).to(out.dtype)
            g_lse = None if g_lse is None else g_lse * share
        arrays = piece.mask.arrays()
        backend = backends.cached_select(self.call.backend, describe(q, k, v, part, arrays, self.call.dropout_p))
        if backends.BACKENDS[backend].NEEDS_TRANSPOSED:
            arrays = piece.mask.arrays(transposed=True)
        dq, part_dk, part_dv, dbias, *_ = ops.attention_backward(
            g, g_lse, None, q, k, v, part, out[:, :, a:b], part_lse.contiguous(), *ops.operands(arrays),
            self.call.scale, self.call.dropout_p, self._seed(piece), self.dbias is not None, 0.0, None, None,
            False, backend,
        )  # fmt: skip
        if b - a == self.dq.shape[2] and self.counts[piece.rows] == 1:
            self.dq = dq.to(self.dq.dtype)
        else:
            self.dq[:, :, a:b] += dq
        c, d = piece.columns
        dk[:, :, c:d] += part_dk
        dv[:, :, c:d] += part_dv
        if self.dbias is not None:
            _add_bias(self.dbias, dbias, piece)

    def _gradients(self, query: Tensor, dk: Tensor, dv: Tensor, key: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        dbias = None if self.dbias is None or bias is None else self.dbias.to(bias.dtype)
        return self.dq.to(query.dtype), dk.to(key.dtype), dv.to(key.dtype), dbias

    def _seed(self, piece: Piece) -> Tensor | None:
        if self.call.dropout_p == 0.0:
            return None
        origin = (self.call.seed, self.call.first_head, piece.first_row, piece.first_column)
        return torch.tensor(origin, dtype=torch.int64)


class _Fetched(_Rows):
    """Each rank fetches the keys that its queries read."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        k, v = self._fetch(key, value)
        self._begin(query, value)
        for piece in self.plan.fetched(self.call.place, self.spread):
            self._take(piece, query, k, v, bias)
        return self._end(query)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
        bias: Tensor | None, out: Tensor, lse: Tensor, wants_bias: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        k, v = self._fetch(key, value)
        pieces = self.plan.fetched(self.call.place, self.spread)
        self._begin_backward(pieces, bias, wants_bias, query)
        dtype = self.dq.dtype
        dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (k, v))
        for piece in pieces:
            self._give_back(piece, (grad_out, grad_lse, query, bias, out, lse), k, v, dk, dv)
        return self._gradients(query, *self._return(dk, dv, key, value), key, bias)

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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        self._begin(query, value)
        for owner, k, v in self._passing(key, value):
            for piece in self.plan.met(self.call.place, owner):
                self._take(piece, query, k, v, bias)
        return self._end(query)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
        bias: Tensor | None, out: Tensor, lse: Tensor, wants_bias: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        plan, me, R = self.plan, self.call.place, self.plan.ranks
        met = [piece for step in range(R) for piece in plan.met(me, (me - step) % R)]
        self._begin_backward(met, bias, wants_bias, query)
        tensors = (grad_out, grad_lse, query, bias, out, lse)
        passing: Passing | None = None
        B, H, _, D = key.shape
        width, what = D + value.shape[3], "gradients of keys and values"
        for owner, k, v in self._passing(key, value):
            found = torch.zeros(B, H, k.shape[2], width, dtype=self.dq.dtype, device=key.device)
            for piece in plan.met(me, owner):
                self._give_back(piece, tensors, k, v, found[..., :D], found[..., D:])
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
        return self._gradients(query, found[..., :D], found[..., D:], key, bias)

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


__all__ = ["Settled", "exact_attention", "gather_heads", "head_lists", "spread_heads"]
