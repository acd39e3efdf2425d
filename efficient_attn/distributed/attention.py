"""Exact attention of a sequence that is spread over ranks, forward and backward, by the three transports of plan.py.

A rank's queries meet its keys in pieces. Each piece is one call of a kernel and gives (out_p, lse_p); they are joined
as `merge_attention` does, with shares w_p = exp(lse_p - lse). Backward, with the whole row's out and lse,

    dS_p = w_p P_p (g V^T - delta),   delta = g . out - g_lse,   P_p the softmax within the piece,

which is what a kernel's backward gives for grad_out = w_p g, grad_lse = w_p g_lse, the row's out and the piece's lse.
So only lse_p is kept of a piece, and keys are sent again in the backward instead of being kept. A backend that joins
pieces itself, in its accumulator, is told lse, for which the same call gives dS_p without shares.

Sinks are a key without a value that each query sees once: they go with the first piece of a run of queries. A bias by
relative position goes to a piece as the diagonals that its corner of the whole has.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.call import accumulation_dtype
from ..errors import UnsupportedError
from ..functional import describe
from ..inputs import modifier_names
from ..masks import MaskArrays
from ..ops import attention as ops
from .exchange import Buffers, Exchange, Passing, Swapping
from .plan import Piece, Plan, head_range
from .shards import Run, size

AT_ONCE = 2**22  # bytes of keys and values that may be here of other ranks before heads take turns


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

    def of_heads(self, heads: slice) -> Settled:
        """The call of some query heads."""
        plan = self.plan.of_heads(heads.start, heads.stop)
        return replace(self, plan=plan, first_head=self.first_head + heads.start)

    @property
    def place(self) -> int:
        """This rank among those of the plan."""
        return self.ranks.index(self.exchange.rank)


class Added(NamedTuple):
    """What joins the scores of this rank's queries."""

    bias: Tensor | None = None  # (1 | B, 1 | Hq, 1 | n, 1 | Nk)
    sinks: Tensor | None = None  # (Hq)
    diagonals: Tensor | None = None  # (1 | B, 1 | Hq, Nq + Nk - 1), of the whole sequence

    def of_heads(self, heads: slice) -> Added:
        """That of some query heads, as views."""
        bias, sinks, diagonals = self
        return Added(
            bias if bias is None or bias.shape[1] == 1 else bias[:, heads],
            None if sinks is None else sinks[heads],
            diagonals if diagonals is None or diagonals.shape[1] == 1 else diagonals[:, heads],
        )


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, added: Added, call: Settled, transport: str
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, n, Dv) and lse (B, Hq, n) of this rank's queries."""
    rows = {"gather": _Fetched, "ring": _Ring}[transport]
    out, lse = _Attend.apply(query, key, value, *added, call, rows)  # type: ignore[no-untyped-call]
    return out, lse


def _turns(
    query: Tensor, key: Tensor, value: Tensor, call: Settled, added: Added, ring: bool
) -> list[tuple[slice, slice]]:
    """The query heads and the key heads that are worked on at once: what is here of other ranks' keys stays small
    beside the tensors of the call, as long as there are heads to take one after the other."""
    plan, Hkv = call.plan, key.shape[1]
    if plan.ranks == 1 or not Hkv:
        return [(slice(0, query.shape[1]), slice(0, Hkv))]
    spread = _is_spread(call, added)
    tokens = max(plan.keys.counts) if ring else max(size(plan.at_hand(rank, spread)) for rank in range(plan.ranks))
    there = tokens * key.shape[0] * Hkv * (key.shape[3] + value.shape[3]) * key.element_size()
    count = max(1, min(Hkv, there // AT_ONCE))
    group = query.shape[1] // Hkv
    bounds = [head_range(Hkv, turn, count) for turn in range(count)]
    return [(slice(a * group, b * group), slice(a, b)) for a, b in bounds]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sinks: Tensor | None,
        diagonals: Tensor | None, call: Settled, kind: type[_Rows],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        added = Added(bias, sinks, diagonals)
        turns = _turns(query, key, value, call, added, kind is _Ring)
        buffers, lses = Buffers(), list[list[Tensor | None]]()
        if len(turns) > 1:
            out = query.new_empty(*query.shape[:3], value.shape[3])
            lse = query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))
        for heads, kv_heads in turns:
            rows = kind(call.of_heads(heads), added.of_heads(heads), buffers)
            if len(turns) == 1:
                out, lse = rows.forward(query, key, value)
            else:
                rows.place = out[:, heads]
                part, lse[:, heads] = rows.forward(query[:, heads], key[:, kv_heads], value[:, kv_heads])
                if part is not rows.place:
                    out[:, heads] = part
            lses.append(rows.lses)
        call.exchange.buffers.end()
        ctx.save_for_backward(query, key, value, bias, sinks, diagonals, out, lse, *itertools.chain(*lses))
        ctx.call, ctx.kind, ctx.turns, ctx.kept = call, kind, turns, [len(part) for part in lses]
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
        added, kept = Added(bias, sinks, diagonals), iter(lses)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        whole = Row(grad_out, grad_lse, query, out, lse)
        wanted = [t is not None and asked for t, asked in zip(added, ctx.needs_input_grad[3:6], strict=True)]
        found: list[Any] = []
        buffers = Buffers()
        grad_query = torch.zeros(query.shape, dtype=query.dtype, device=query.device) if len(ctx.turns) > 1 else None
        for (heads, kv_heads), count in zip(ctx.turns, ctx.kept, strict=True):
            rows = ctx.kind(ctx.call.of_heads(heads), added.of_heads(heads), buffers)
            rows.lses = list(itertools.islice(kept, count))
            rows.place = None if grad_query is None else grad_query[:, heads]
            part = rows.backward(whole.of_heads(heads), key[:, kv_heads], value[:, kv_heads], wanted)
            if len(ctx.turns) == 1:
                ctx.call.exchange.buffers.end()
                return *part, None, None
            if part[0] is not rows.place:
                rows.place.copy_(part[0])
            if not found:
                found = [
                    None if t is None or g is None else torch.zeros_like(t, memory_format=torch.contiguous_format)
                    for t, g in zip((key, value, *added), part[1:], strict=True)
                ]
            into = (found[0][:, kv_heads], found[1][:, kv_heads], *Added(*found[2:]).of_heads(heads))
            for total, gradient in zip(into, part[1:], strict=True):
                if total is not None:
                    total += gradient
        ctx.call.exchange.buffers.end()
        return grad_query, *found, None, None


class Row(NamedTuple):
    """What the backward of every piece asks of the whole rows of this rank's queries."""

    grad_out: Tensor
    grad_lse: Tensor | None
    query: Tensor
    out: Tensor
    lse: Tensor

    def of_heads(self, heads: slice) -> Row:
        """That of some query heads, as views."""
        return Row(*(None if t is None else t[:, heads] for t in self))  # type: ignore[arg-type]


def _is_spread(call: Settled, added: Added) -> bool:
    """Whether something goes by a key's distance, which a buffer without gaps would change."""
    return call.dropout_p > 0.0 or added.diagonals is not None


class _Rows:
    """What the transports share: the pieces of this rank's queries."""

    def __init__(self, call: Settled, added: Added, buffers: Buffers) -> None:
        self.call, self.plan, self.exchange, self.buffers = call, call.plan, call.exchange, buffers
        self.given = added  # as they came; kernels take sinks that no piece rounds
        dtype = torch.float32 if added.sinks is None else accumulation_dtype(added.sinks.dtype)
        self.added = added if added.sinks is None else added._replace(sinks=added.sinks.to(dtype))
        self.lses: list[Tensor | None] = []  # of each piece whose run of queries has several; None: backward takes lse
        self.place: Tensor | None = None  # where out, or dq, may be made
        self.spread = _is_spread(call, added)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse of this rank's queries; `lses` is what the backward needs of pieces."""
        raise NotImplementedError

    def backward(self, row: Row, key: Tensor, value: Tensor, wanted: Sequence[bool]) -> tuple[Any, ...]:
        """Gradients of query, key, value, bias, sinks and diagonals; `wanted` is of the last three."""
        raise NotImplementedError

    def _begin(self, query: Tensor, value: Tensor, pieces: list[Piece]) -> None:
        self._count(pieces)
        whole = (0, query.shape[2])
        self.exact = self.counts == {whole: 1}  # then the one piece is the result
        several = any(count > 1 for count in self.counts.values())
        dtype = accumulation_dtype(query.dtype)
        if not self.exact:
            shape = (*query.shape[:3], value.shape[3])
            kind = dtype if several else query.dtype
            place = self.place if self.place is not None and self.place.dtype == kind else None
            self.out = query.new_empty(shape, dtype=kind) if place is None else place
            self.lse = query.new_empty(query.shape[:3], dtype=dtype)
            for a, b in self._bare(query.shape[2]):
                self.out[:, :, a:b], self.lse[:, :, a:b] = 0.0, -torch.inf

    def _zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """What is added up: where it belongs, if that has the dtype."""
        if self.place is not None and self.place.dtype == dtype:
            return self.place.zero_()
        return torch.zeros(shape, dtype=dtype, device=device)

    def _take(self, piece: Piece, query: Tensor, key: Tensor, value: Tensor) -> None:
        """One piece forward, joined with those before; key and value are those at hand."""
        a, b = piece.rows
        q, k, v = query[:, :, a:b], _columns(key, piece), _columns(value, piece)
        first = self._is_first(piece)
        part, arrays, several = self._added(piece, first), piece.mask.arrays(), self.counts[piece.rows] > 1
        numbers = self.call.scale, self.call.dropout_p, self._seed(piece), self.call.softcap
        backend = self._backend(q, k, v, part, arrays)
        if self._goes_on(backend, q, several) and not self.exact and self.out.dtype == q.dtype:
            kept = self.lse[:, :, a:b]
            lse = torch.empty_like(kept, memory_format=torch.contiguous_format) if first else kept.contiguous()
            backends.BACKENDS[backend].attention.attention_forward(
                q, k, v, part.bias, arrays, *numbers, part.sinks, part.diagonals,
                **{"into" if first else "joined": (self.out[:, :, a:b], lse)},
            )  # fmt: skip
            kept.copy_(lse)
            if several:
                self.lses.append(None)
            return
        out, lse = ops.attention_forward(
            q, k, v, part.bias, *ops.operands(arrays), *numbers, part.sinks, part.diagonals, backend
        )
        if several:
            self.lses.append(lse)
        if self.exact:
            self.out, self.lse = out, lse
        elif first:
            self.out[:, :, a:b], self.lse[:, :, a:b] = out, lse
        else:
            _join(self.out[:, :, a:b], self.lse[:, :, a:b], out, lse)

    def _goes_on(self, backend: str, query: Tensor, several: bool) -> bool:
        """Whether a backend makes its results where they belong, and joins them itself with those of other pieces.

        Not under a bias, since the backward then takes the whole row's lse, which large numbers leave no digit; and not
        in half precision, where each join would round.
        """
        plain = self.added.bias is None and self.added.diagonals is None
        exact = plain and query.dtype == accumulation_dtype(query.dtype)
        return backends.BACKENDS[backend].JOINS_PARTS and ops.is_plain(query) and (exact or not several)

    def _end(self, query: Tensor) -> tuple[Tensor, Tensor]:
        if self.added.sinks is not None:
            for a, b in self._bare(query.shape[2]):
                self.lse[:, :, a:b] = self.added.sinks[:, None]
        return self.out.to(query.dtype), self.lse

    def _count(self, pieces: list[Piece]) -> None:
        """How many pieces each run of queries has."""
        self.counts: dict[Run, int] = {}
        for piece in pieces:
            self.counts[piece.rows] = self.counts.get(piece.rows, 0) + 1
        self.begun = set[Run]()

    def _is_first(self, piece: Piece) -> bool:
        """Whether this is the first piece of its queries."""
        first = piece.rows not in self.begun
        self.begun.add(piece.rows)
        return first

    def _begin_backward(self, pieces: list[Piece], row: Row, wanted: Sequence[bool]) -> None:
        self._count(pieces)
        self.left = list(self.lses)
        dtype = accumulation_dtype(row.query.dtype)
        self.dq: Tensor | None = None  # made when a piece has not all queries
        self.sums = Added(
            *(torch.zeros_like(t, dtype=dtype) if t is not None and asked else None
              for t, asked in zip(self.added, wanted, strict=True))
        )  # fmt: skip
        if self.sums.sinks is not None and row.grad_lse is not None:
            for a, b in self._bare(row.query.shape[2]):
                self.sums.sinks.add_(row.grad_lse[:, :, a:b].sum((0, 2)))

    def _give_back(self, piece: Piece, row: Row, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """One piece backward: adds to dq and sums; the gradients of its keys and values."""
        a, b = piece.rows
        q, k, v = row.query[:, :, a:b], _columns(key, piece), _columns(value, piece)
        first = self._is_first(piece)
        part, sums, whole = self._added(piece, first), self.sums, row.lse[:, :, a:b]
        g, g_lse = row.grad_out[:, :, a:b], None if row.grad_lse is None else row.grad_lse[:, :, a:b]
        arrays = piece.mask.arrays()
        backend, part_lse = self._backend(q, k, v, part, arrays), whole
        kept = self.left.pop(0) if self.counts[piece.rows] > 1 else None
        if kept is not None:
            part_lse = kept
            share = torch.exp(part_lse - whole.masked_fill(whole == -torch.inf, 0.0))
            g = (g * share[..., None]).to(row.out.dtype)
            g_lse = None if g_lse is None else g_lse * share
        if backends.BACKENDS[backend].NEEDS_TRANSPOSED:
            arrays = piece.mask.arrays(transposed=True)
        dq, part_dk, part_dv, dbias, dsinks, ddiagonals = ops.attention_backward(
            g, g_lse, None, q, k, v, part.bias, row.out[:, :, a:b], part_lse.contiguous(), *ops.operands(arrays),
            self.call.scale, self.call.dropout_p, self._seed(piece), sums.bias is not None, self.call.softcap,
            part.sinks, part.diagonals, sums.diagonals is not None, backend,
        )  # fmt: skip
        if self.counts == {(0, row.query.shape[2]): 1}:
            self.dq = dq
        else:
            if self.dq is None:
                several = any(count > 1 for count in self.counts.values())
                dtype = accumulation_dtype(dq.dtype) if several else dq.dtype
                self.dq = self._zeros(row.query.shape, dtype, dq.device)
            self.dq[:, :, a:b] += dq
        if sums.bias is not None:
            _add_bias(sums.bias, dbias, piece)
        if sums.sinks is not None and first:
            sums.sinks.add_(dsinks)
        if sums.diagonals is not None:
            self._diagonals(sums.diagonals, piece).add_(ddiagonals)
        return part_dk, part_dv

    def _gradients(self, query: Tensor, dk: Tensor, dv: Tensor, key: Tensor) -> tuple[Any, ...]:
        added = (
            None if found is None or given is None else found.to(given.dtype)
            for found, given in zip(self.sums, self.given, strict=True)
        )
        dq = torch.zeros_like(query) if self.dq is None else self.dq.to(query.dtype)
        return dq, dk.to(key.dtype), dv.to(key.dtype), *added

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

    def _bare(self, count: int) -> list[Run]:
        """The rows of `count` that have no piece: their queries see no key."""
        edges = [(0, 0), *sorted(self.counts), (count, count)]
        return [(end, start) for (_, end), (start, _) in itertools.pairwise(edges) if end < start]

    def _seed(self, piece: Piece) -> Tensor | None:
        if self.call.dropout_p == 0.0:
            return None
        origin = (self.call.seed, self.call.first_head, piece.first_row, piece.first_column)
        return torch.tensor(origin, dtype=torch.int64)


class _Fetched(_Rows):
    """Each rank fetches the keys that its queries read, and attends meanwhile where those that it has are enough."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        here, there = self._pieces()
        self._begin(query, value, here + there)
        k, v, fetching = self._fetch(key, value)
        for piece in here:
            self._take(piece, query, key, value)
        self.exchange.finish(fetching, what="keys and values")
        for piece in there:
            self._take(piece, query, k, v)
        return self._end(query)

    def backward(self, row: Row, key: Tensor, value: Tensor, wanted: Sequence[bool]) -> tuple[Any, ...]:
        here, there = self._pieces()
        self._begin_backward(here + there, row, wanted)
        k, v, fetching = self._fetch(key, value)
        own = _KeyGradients(key, value)
        for piece in here:
            own.add(piece, *self._give_back(piece, row, key, value))
        self.exchange.finish(fetching, what="keys and values")
        fetched = _KeyGradients(k, v)
        for piece in there:
            fetched.add(piece, *self._give_back(piece, row, k, v))
        del k, v
        if self.plan.travels or there:
            # A contribution travels in the dtype of keys: as exact as the kernel that gave it.
            self.exchange.swap(
                self._at_hand(*fetched.found), self._held(*own.summable()), what="gradients of keys and values",
                travels=key.dtype, add=True, alone=not self.plan.travels,
            )  # fmt: skip
        return self._gradients(row.query, *own.found, key)

    def _pieces(self) -> tuple[list[Piece], list[Piece]]:
        """Those on this rank's own keys, and those on fetched ones."""
        pieces = self.plan.fetched(self.call.place, self.spread)
        return [p for p in pieces if p.own], [p for p in pieces if not p.own]

    def _fetch(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Swapping]:
        """Begin to fill the keys and values of `Plan.at_hand`."""
        tokens = size(self.plan.at_hand(self.call.place, self.spread))
        k, v = (
            self.exchange.buffers.take(name, (*t.shape[:2], tokens, t.shape[3]), t.dtype, t.device)
            for name, t in (("keys 0", key), ("values 0", value))
        )
        alone = not self.plan.travels
        held, at_hand = self._held(key, value), self._at_hand(k, v)
        return k, v, self.exchange.begin(held, at_hand, what="keys and values", alone=alone)

    def _held(self, *tensors: Tensor) -> list[list[Tensor]]:
        """What of this rank's tokens each rank reads, stretch by stretch."""
        found: list[list[Tensor]] = [[] for _ in range(self.exchange.ranks)]
        for n, rank in enumerate(self.call.ranks):
            cuts = self.plan.stretches(self.call.place, n, self.spread)
            found[rank] = [t.narrow(2, cut.there, cut.tokens) for t in tensors for cut in cuts]
        return found

    def _at_hand(self, *tensors: Tensor) -> list[list[Tensor]]:
        """What each rank has of the tokens at hand, in the same stretches."""
        found: list[list[Tensor]] = [[] for _ in range(self.exchange.ranks)]
        for n, rank in enumerate(self.call.ranks):
            cuts = self.plan.stretches(n, self.call.place, self.spread)
            found[rank] = [t.narrow(2, cut.here, cut.tokens) for t in tensors for cut in cuts]
        return found


class _Ring(_Rows):
    """Every shard of keys passes by every rank: while one is worked on, the next one comes."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self._begin(query, value, self._met())
        for owner, k, v in self._passing(key, value):
            for piece in self.plan.met(self.call.place, owner):
                self._take(piece, query, k, v)
        return self._end(query)

    def backward(self, row: Row, key: Tensor, value: Tensor, wanted: Sequence[bool]) -> tuple[Any, ...]:
        plan, me, R = self.plan, self.call.place, self.plan.ranks
        self._begin_backward(self._met(), row, wanted)
        (B, H, _, D), dtype, device = key.shape, accumulation_dtype(key.dtype), key.device
        what = "gradients of keys and values"
        passing: Passing | None = None
        for step, (owner, k, v) in enumerate(self._passing(key, value)):
            here = _KeyGradients(k, v)
            for piece in plan.met(me, owner):
                here.add(piece, *self._give_back(piece, row, k, v))
            found: tuple[Tensor, ...] = here.summable()
            del here
            if passing is not None:
                came = self.exchange.arrived(passing, what=what)
                for total, part in zip(came, found, strict=True):
                    total += part
                found = came
            if R > 1:
                after = plan.keys.counts[(owner - 1) % R]  # the shard that is worked on next, here
                coming = tuple(
                    self.buffers.take(f"{name} {step % 2}", (B, H, after, width), dtype, device)
                    for name, width in (("keys", D), ("values", value.shape[3]))
                )
                passing = self.exchange.pass_on(found, coming, self._neighbour(1), self._neighbour(-1), what=what)
        if passing is not None:
            found = self.exchange.arrived(passing, what=what)
        return self._gradients(row.query, found[0], found[1], key)

    def _met(self) -> list[Piece]:
        """All pieces of this rank, in the order in which shards come."""
        plan, me, R = self.plan, self.call.place, self.plan.ranks
        return [piece for step in range(R) for piece in plan.met(me, (me - step) % R)]

    def _passing(self, key: Tensor, value: Tensor) -> Any:
        """Yield (owner, its keys, its values), this rank's first, then those of the rank before it, and so on."""
        plan, me, R = self.plan, self.call.place, self.plan.ranks
        if R == 1:
            yield me, key, value
            return
        both: tuple[Tensor, ...] = (key, value)
        what = "keys and values"
        for step in range(R):
            owner = (me - step) % R
            if step < R - 1:
                after = plan.keys.counts[(owner - 1) % R]
                coming = [
                    self.exchange.buffers.take(
                        f"{name} {step % 2}", (*t.shape[:2], after, t.shape[3]), t.dtype, t.device
                    )
                    for name, t in (("keys", key), ("values", value))
                ]
                passing = self.exchange.pass_on(both, coming, self._neighbour(1), self._neighbour(-1), what=what)
            yield owner, *both
            if step < R - 1:
                both = self.exchange.arrived(passing, what=what)

    def _neighbour(self, step: int) -> int:
        return self.call.ranks[(self.call.place + step) % self.plan.ranks]


class _KeyGradients:
    """The gradients of some keys and values, added up over pieces."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.like, self.dtype = (key, value), accumulation_dtype(key.dtype)
        self.kept: tuple[Tensor, Tensor] | None = None

    def add(self, piece: Piece, dk: Tensor, dv: Tensor) -> None:
        """Those of one piece, in the columns that it has."""
        if self.kept is None and piece.columns == (0, self.like[0].shape[2]):
            self.kept = dk, dv
            return
        for total, part in zip(self.summable(), (dk, dv), strict=True):
            total[:, :, slice(*piece.columns)] += part

    def summable(self) -> tuple[Tensor, Tensor]:
        """In the dtype in which sums are made; what is added to them stays."""
        if self.kept is None:
            dk, dv = (torch.zeros(t.shape, dtype=self.dtype, device=t.device) for t in self.like)
        else:
            dk, dv = (part.to(self.dtype) for part in self.kept)
        self.kept = dk, dv
        return dk, dv

    @property
    def found(self) -> tuple[Tensor, Tensor]:
        return self.kept or self.summable()


def _join(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """`functional.merge_attention` of two parts, into the first."""
    top = torch.maximum(lse, more_lse)
    top = top.masked_fill(top == -torch.inf, 0.0)
    share, more_share = torch.exp(lse - top), torch.exp(more_lse - top)
    total = share + more_share
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    out.mul_((share / total)[..., None]).addcmul_(more.to(out.dtype), (more_share / total)[..., None])
    lse.copy_((torch.log(total) + top).masked_fill(empty, -torch.inf))


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
