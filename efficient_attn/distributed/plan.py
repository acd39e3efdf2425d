"""Who computes what and which keys travel: `Plan`, made of a mask and of how queries and keys are spread.

    gather       each rank fetches the keys that its queries read, and no other
    ring         every shard of keys passes by every rank, and meets there the part of the mask between the two
    all_to_all   each rank gets some heads of all queries and keys; with more ranks than heads, of some ranks' (Ulysses,
                 Jacobs et al. 2023; mixed with the others as in USP, Fang and Zhao 2024)

A plan is the same on every rank, since all make it of the same mask, and nothing needs to be told.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..masks import BlockMask
from ..masks.algebra import reach
from .links import Link
from .needs import entries, hulls, keys_read, packed_mask, submask
from .shards import GRAIN, Run, Runs, Shards, joined, overlap, size
from .tokens import Stretch, stretches

TRANSPORTS = ("gather", "ring", "all_to_all")
EVEN = 1.05  # predicted times that differ by less are not told apart


class Piece(NamedTuple):
    """One call of a kernel: some of a rank's queries against some of the keys that it has at the moment."""

    rows: Run  # of the rank's queries
    columns: Run  # of the keys at hand
    mask: BlockMask  # rows x columns
    first_row: int  # where the first query and the first key stand in the whole sequence
    first_column: int
    keys: Runs  # the columns as tokens of the whole sequence
    own: bool = False  # the keys at hand are those that the rank holds, and nothing needs to come for it


class Shape(NamedTuple):
    """The sizes of a call over all ranks."""

    B: int
    Hq: int
    Hkv: int
    D: int
    Dv: int
    itemsize: int

    @property
    def token_bytes(self) -> int:
        """Of the keys and values of one token."""
        return self.B * self.Hkv * (self.D + self.Dv) * self.itemsize

    @property
    def pair_flops(self) -> int:
        """Of one pair in every head, forward."""
        return 2 * self.B * self.Hq * (self.D + self.Dv)


@dataclass(frozen=True, eq=False)
class Plan:
    """What each rank computes and sends in one call; see `make_plan`.

    Attributes:
        mask: of the whole sequence, in blocks that no shard cuts.
        queries, keys: who holds which.
        reads: the keys that each rank reads.
        pairs: float64 [ranks, ranks], the pairs that rank r visits among the keys of rank s, a batch element and head.
    """

    mask: BlockMask
    queries: Shards
    keys: Shards
    reads: tuple[Runs, ...]
    pairs: Tensor

    @property
    def ranks(self) -> int:
        return self.queries.ranks

    def move(self, owner: int, reader: int) -> Runs:
        """The keys that `owner` sends to `reader` when only needed ones travel; to itself, those between them."""
        return overlap(self.keys.runs[owner], self.fetches(reader))

    def stretches(self, owner: int, reader: int, spread: bool) -> tuple[Stretch, ...]:
        """Where the tokens of `move` stand among those that the owner holds and those at the reader's hand."""
        key = (owner, reader, spread)
        if key not in self._cut:
            there, here = self.keys.runs[owner], self.at_hand(reader, spread)
            self._cut[key] = stretches(there, here, self.move(owner, reader))
        return self._cut[key]

    @functools.cached_property
    def _cut(self) -> dict[tuple[int, int, bool], tuple[Stretch, ...]]:
        return {}

    def arrivals(self, reader: int) -> dict[int, int]:
        """From whom a rank gets how many tokens when only needed ones travel."""
        if reader not in self._arrivals:
            runs, found = self._key_runs, dict[int, int]()
            for start, stop in self.reads[reader]:
                place = bisect.bisect_right(runs, ((start, self.keys.length + 1), 0)) - 1
                for (first, last), owner in itertools.islice(runs, max(place, 0), None):
                    if first >= stop:
                        break
                    tokens = min(last, stop) - max(first, start)
                    if tokens > 0 and owner != reader:
                        found[owner] = found.get(owner, 0) + tokens
            self._arrivals[reader] = found
        return self._arrivals[reader]

    @functools.cached_property
    def _key_runs(self) -> list[tuple[Run, int]]:
        return sorted((run, owner) for owner, runs in enumerate(self.keys.runs) for run in runs)

    @functools.cached_property
    def _arrivals(self) -> dict[int, dict[int, int]]:
        return {}

    def at_hand(self, rank: int, spread: bool) -> Runs:
        """What a rank's buffer of fetched keys holds, one run after the other.

        spread: as one run with gaps, in which a key's distance from the first is that in the sequence; dropout, which
            goes by it, needs that. The gaps cost memory on a GPU, and on a CPU only addresses.
        """
        reads = self.fetches(rank)
        return ((reads[0][0], reads[-1][1]),) if spread and reads else reads

    @functools.cached_property
    def travels(self) -> bool:
        """Whether any rank reads keys of another one."""
        return any(self.arrivals(rank) for rank in range(self.ranks))

    def fetches(self, rank: int) -> Runs:
        """The keys that those queries of a rank read that read a key of another rank, its own ones among them."""
        if rank not in self._fetches:
            runs = [run for run, home in self._parts(rank) if home is None]
            self._fetches[rank] = joined(keys_read(self.mask, runs))
        return self._fetches[rank]

    @functools.cached_property
    def _fetches(self) -> dict[int, Runs]:
        return {}

    def _parts(self, rank: int) -> list[tuple[Run, Run | None]]:
        """The runs of queries of a rank, each cut where a long stretch of it reads keys of one run of the rank alone;
        with that run of keys."""
        if rank not in self._cut_queries:
            found: list[tuple[Run, Run | None]] = []
            (first, last), grain = self._hulls, self._grain
            for start, stop in self.queries.runs[rank]:
                a, b = start // grain, -(-stop // grain)
                best: tuple[int, int, Run | None] = (a, a, None)
                for keys in self.keys.runs[rank]:
                    inside = (first[a:b] >= keys[0]) & (last[a:b] <= keys[1]) | (first[a:b] >= last[a:b])
                    c, d = _longest(inside)
                    if d - c > best[1] - best[0]:
                        best = a + c, a + d, keys
                c, d = (min(edge * grain, stop) for edge in best[:2])
                if 4 * (d - c) < stop - start:  # not worth a call of its own
                    found.append(((start, stop), None))
                    continue
                cuts: list[tuple[Run, Run | None]] = [((start, c), None), ((c, d), best[2]), ((d, stop), None)]
                found += [part for part in cuts if part[0][0] < part[0][1]]
            self._cut_queries[rank] = found
        return self._cut_queries[rank]

    @functools.cached_property
    def _cut_queries(self) -> dict[int, list[tuple[Run, Run | None]]]:
        return {}

    @property
    def _grain(self) -> int:
        """The queries of a block of `_hulls`, of which every run starts at a multiple."""
        return GRAIN if self.mask.indptr is None else self.mask.block_size[0]

    @functools.cached_property
    def _hulls(self) -> tuple[Tensor, Tensor]:
        return hulls(self.mask if self.mask.indptr is not None else self.mask.reblock((GRAIN, GRAIN)))

    def fetched(self, rank: int, spread: bool) -> list[Piece]:
        """The calls of a rank on its own keys and on the buffer `at_hand`, at most one for each part of its queries."""
        key = (rank, spread)
        if key not in self._kept:
            self._kept[key] = self._fetched(rank, self.at_hand(rank, spread))
        return self._kept[key]

    def _fetched(self, rank: int, buffer: Runs) -> list[Piece]:
        pieces, row = [], 0
        for run, home in self._parts(rank):
            rows = (row, row + run[1] - run[0])
            row = rows[1]
            wanted = keys_read(self.mask, [run])
            if not wanted:
                continue
            hull, place = (wanted[0][0], wanted[-1][1]), 0
            for start, stop in buffer if home is None else self.keys.runs[rank]:
                if start <= hull[0] and hull[1] <= stop:
                    part = submask(self.mask, run, hull)
                    columns = (place + hull[0] - start, place + hull[1] - start)
                    if part is not None:
                        pieces.append(Piece(rows, columns, part, run[0], hull[0], (hull,), home is not None))
                    break
                place += stop - start
            else:
                part = packed_mask(self.mask, run, buffer)
                pieces.append(Piece(rows, (0, size(buffer)), part, run[0], 0, buffer))
        return pieces

    def met(self, rank: int, owner: int) -> list[Piece]:
        """The calls of a rank when it has the shard of `owner`."""
        if (rank, owner, "ring") not in self._kept:
            pieces, row = [], 0
            for run in self.queries.runs[rank]:
                rows, column = (row, row + run[1] - run[0]), 0
                row = rows[1]
                for keys in self.keys.runs[owner]:
                    columns = (column, column + keys[1] - keys[0])
                    column = columns[1]
                    part = submask(self.mask, run, keys)
                    if part is not None:
                        pieces.append(Piece(rows, columns, part, run[0], keys[0], (keys,)))
            self._kept[rank, owner, "ring"] = pieces
        return self._kept[rank, owner, "ring"]

    @functools.cached_property
    def _kept(self) -> dict[tuple[object, ...], list[Piece]]:
        return {}

    def of_heads(self, first: int, last: int) -> Plan:
        """The plan of some query heads alone; the same where all heads have one mask."""
        if self.mask.indptr is None or self.mask.heads == 1 or (first, last) == (0, self.mask.heads):
            return self
        if (first, last) not in self._of_heads:
            self._of_heads[first, last] = make_plan(self.mask[:, first:last], self.queries, self.keys)
        return self._of_heads[first, last]

    @functools.cached_property
    def _of_heads(self) -> dict[Run, Plan]:
        return {}

    # --- what it costs ---

    def sent(self, transport: str, shape: Shape, heads_ranks: int = 1) -> list[int]:
        """The bytes that each rank sends in a forward."""
        R, (q_counts, k_counts) = self.ranks, (self.queries.counts, self.keys.counts)
        if transport == "gather":
            leaving = [0] * R
            for r in range(R):
                for owner, tokens in self.arrivals(r).items():
                    leaving[owner] += shape.token_bytes * tokens
            return leaving
        if transport == "ring":
            return [shape.token_bytes * sum(k_counts[(r - step) % R] for step in range(R - 1)) for r in range(R)]
        bounds = [head_range(shape.Hq, place, heads_ranks) for place in range(heads_ranks)]
        heads = [b - a for a, b in bounds]
        kv_heads = [len(kv_heads_for(bound, shape.Hq, shape.Hkv)) for bound in bounds]
        found = []
        for r in range(R):
            first, place = r - r % heads_ranks, r % heads_ranks
            others = [n for n in range(heads_ranks) if n != place]
            elements = sum(q_counts[r] * heads[n] * shape.D for n in others)
            elements += sum(k_counts[r] * kv_heads[n] * (shape.D + shape.Dv) for n in others)
            elements += sum(q_counts[first + n] * heads[place] * shape.Dv for n in others)
            found.append(elements * shape.B * shape.itemsize)
        return found

    def least_sent(self, shape: Shape) -> int:
        """The bytes that must travel in a forward: every key that a rank reads and does not hold, once."""
        return shape.token_bytes * sum(sum(self.arrivals(r).values()) for r in range(self.ranks))

    def seconds(self, transport: str, shape: Shape, link: Link, heads_ranks: int = 1) -> list[float]:
        """The predicted time of each rank in a forward, waiting for others included; see links.py for the model."""
        start = link.start if self.ranks > 1 else 0.0
        return [start + seconds for seconds in self._replayed(transport, shape, link, heads_ranks)]

    def _replayed(self, transport: str, shape: Shape, link: Link, heads_ranks: int) -> list[float]:
        R, flops = self.ranks, shape.pair_flops / link.flops
        if transport == "gather":  # as if nothing were computed until all keys are here
            work = self.pairs.sum(1) * flops
            arrive = [
                link.exchange(r, [(owner, shape.token_bytes * n) for owner, n in self.arrivals(r).items()])
                for r in range(R)
            ]
            return [float(work[r]) + link.call + arrive[r] for r in range(R)]
        if transport == "ring":
            return self._replayed_ring(shape, link, flops)
        inner = self.grouped(heads_ranks)
        part = shape._replace(
            Hq=-(-shape.Hq // heads_ranks),
            Hkv=max(
                len(kv_heads_for(head_range(shape.Hq, n, heads_ranks), shape.Hq, shape.Hkv)) for n in range(heads_ranks)
            ),
        )
        apart = replace(link, node=max(1, link.node // heads_ranks) if link.node else 0)  # neighbours in the ring
        rest = inner._replayed("ring" if inner.ranks > 1 else "gather", part, apart, 1)
        moved = self.sent(transport, shape, heads_ranks)
        found = []
        for r in range(R):
            first = r - r % heads_ranks
            peers = [n for n in range(first, first + heads_ranks) if n != r]
            each = [(n, moved[r] / max(len(peers), 1)) for n in peers]
            found.append(rest[r // heads_ranks] + link.exchange(r, each) + link.latency * len(peers))
        return found

    def _replayed_ring(self, shape: Shape, link: Link, flops: float) -> list[float]:
        """The ring, step by step: a rank works on a shard when it has come and the one before is done, and passes it
        on meanwhile; the next one comes when its sender has begun with it and this rank waits for it."""
        R, ranks = self.ranks, torch.arange(self.ranks)
        counts = torch.tensor(self.keys.counts, dtype=torch.float64) * shape.token_bytes
        hops = [link.of(r, (r - 1) % R) for r in range(R)]
        latency, per_byte = (torch.tensor(column, dtype=torch.float64) for column in zip(*hops, strict=True))
        done, came = torch.zeros(R, dtype=torch.float64), torch.zeros(R, dtype=torch.float64)
        for step in range(R):
            start, owners = torch.maximum(done, came), (ranks - step) % R
            work = self.pairs[ranks, owners] * flops + link.call
            passing = latency + counts[(ranks - step - 1) % R] * per_byte if step < R - 1 else torch.zeros_like(work)
            hidden = torch.minimum(work, passing) * (1 - link.overlap)
            done = start + work + hidden
            came = torch.maximum(start, start.roll(1)) + passing + hidden
        return done.tolist()

    def grouped(self, heads_ranks: int) -> Plan:
        """The plan of ranks that each hold what `heads_ranks` neighbours held, as they do with heads apart."""
        if heads_ranks == 1:
            return self
        groups = [range(first, first + heads_ranks) for first in range(0, self.ranks, heads_ranks)]
        return make_plan(self.mask, self.queries.together(groups), self.keys.together(groups))

    def choose(self, shape: Shape, link: Link, *, allowed: tuple[str, ...] = TRANSPORTS) -> str:
        """The transport of the least predicted time; of equals the one that sends least.

        A ring works while keys travel, and holds one shard of others at a time. The model counts neither in full, so
        where gather is ahead by less than EVEN and sends more than half as much, it is taken to be behind.
        """
        if (shape, link, allowed) not in self._chosen:
            self._chosen[shape, link, allowed] = self._choose(shape, link, allowed)
        return self._chosen[shape, link, allowed]

    @functools.cached_property
    def _chosen(self) -> dict[tuple[Shape, Link, tuple[str, ...]], str]:
        return {}

    def _choose(self, shape: Shape, link: Link, allowed: tuple[str, ...]) -> str:
        degree = head_ranks(shape.Hq, self.ranks)
        options = [t for t in allowed if t != "all_to_all" or degree > 1]

        def price(transport: str) -> tuple[float, int, int]:
            degrees = degree if transport == "all_to_all" else 1
            times = self.seconds(transport, shape, link, degrees)
            return max(times), sum(self.sent(transport, shape, degrees)), TRANSPORTS.index(transport)

        prices = {transport: price(transport) for transport in options}
        if "gather" in prices and "ring" in prices:
            (gather, gathered, _), (ring, passed, _) = prices["gather"], prices["ring"]
            if ring <= EVEN * gather and 2 * gathered > passed > 0:
                del prices["gather"]
        return min(prices, key=prices.__getitem__)

    def explain(self, shape: Shape, link: Link, transport: str = "auto") -> Explanation:
        """What each rank computes and sends, by the transport or by the one that would be chosen."""
        check_transport(transport)
        chosen = self.choose(shape, link) if transport == "auto" else transport
        degree = head_ranks(shape.Hq, self.ranks) if chosen == "all_to_all" else 1
        rows = [
            RankWork(
                tokens=self.queries.counts[r],
                pairs=int(self.pairs[r].sum()) * shape.B * shape.Hq,
                sent=self.sent(chosen, shape, degree)[r],
                seconds=self.seconds(chosen, shape, link, degree)[r],
            )
            for r in range(self.ranks)
        ]
        predicted = {
            t: max(self.seconds(t, shape, link, head_ranks(shape.Hq, self.ranks) if t == "all_to_all" else 1))
            for t in TRANSPORTS
        }
        return Explanation(chosen, tuple(rows), predicted, self.least_sent(shape))


class RankWork(NamedTuple):
    """One rank's part of a forward."""

    tokens: int
    pairs: int  # visited, over batch and heads
    sent: int  # bytes
    seconds: float  # predicted


@dataclass(frozen=True)
class Explanation:
    """What a call would do: `str()` is a table.

    Attributes:
        transport: the one that is taken.
        ranks: one `RankWork` each.
        predicted: the time of the slowest rank, of every transport.
        least_sent: the bytes that the mask makes necessary, over all ranks.
    """

    transport: str
    ranks: tuple[RankWork, ...]
    predicted: dict[str, float]
    least_sent: int

    def __str__(self) -> str:
        lines = [f"{'rank':>4} {'tokens':>9} {'pairs':>15} {'bytes sent':>14} {'predicted ms':>13}"]
        for number, rank in enumerate(self.ranks):
            lines.append(
                f"{number:>4} {rank.tokens:>9,} {rank.pairs:>15,} {rank.sent:>14,} {rank.seconds * 1e3:>13.3f}"
            )
        sent = sum(rank.sent for rank in self.ranks)
        times = ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in self.predicted.items())
        lines.append(f"{self.transport} of {times}; sends {sent:,} bytes, the mask needs {self.least_sent:,}")
        return "\n".join(lines)


@functools.lru_cache(maxsize=64)
def make_plan(mask: BlockMask, queries: Shards, keys: Shards) -> Plan:
    """The plan of a mask of the whole sequence; the last 64 are kept.

    Raises:
        InputError: shards that do not belong to the mask or to each other.
    """
    if (queries.length, keys.length) != (mask.q_len, mask.kv_len) or queries.ranks != keys.ranks:
        raise InputError(
            f"shards of {queries.length} queries in {queries.ranks} ranks and {keys.length} keys in {keys.ranks} do "
            f"not belong to a mask of {mask.q_len} x {mask.kv_len} pairs"
        )
    if mask.indptr is not None:
        block_q, block_k = mask.block_size
        mask = mask.reblock((math.gcd(block_q, queries.alignment), math.gcd(block_k, keys.alignment)))
    reads = tuple(joined(keys_read(mask, runs)) for runs in queries.runs)
    return Plan(mask, queries, keys, reads, visited(mask, queries, keys))


def visited(mask: BlockMask, queries: Shards, keys: Shards) -> Tensor:
    """The pairs that a kernel visits, float64 [rank of the query, rank of the key], the mean over batch and heads."""
    grid, lists, window, lengths = mask.parts
    R = queries.ranks
    found = torch.zeros(R, R, dtype=torch.float64)
    starts = torch.tensor([run[0] for runs in queries.runs for run in runs], dtype=torch.int64)
    owners = torch.tensor([r for r, runs in enumerate(queries.runs) for _ in runs], dtype=torch.int64)
    if not starts.numel() or not keys.length:
        return found
    order = starts.argsort()
    top = torch.arange(grid.n_q) * grid.block_q
    row_owner = _owner(top, starts[order], owners[order])
    key_runs = sorted((run, s) for s, runs in enumerate(keys.runs) for run in runs)
    key_owner = torch.tensor([s for _, s in key_runs])
    if lists is None:
        heights = (grid.q_len - top).clamp(max=grid.block_q)
        first, counts = (part.cpu() for part in reach(grid, window, lengths))
        low, high = first * grid.block_k, ((first + counts) * grid.block_k).clamp(max=grid.kv_len)
        for (start, stop), s in key_runs:
            meets = (high.clamp(max=stop) - low.clamp(min=start)).clamp(min=0)
            meets = torch.where(counts > 0, meets, 0).double().mean(0) * heights
            found[:, s].index_add_(0, row_owner, meets)
        return found
    rows, cols, touched = (part.cpu() for part in entries(mask))
    pairs = torch.where(touched, grid.pairs(rows, cols), 0).double() / max(lists.batch * lists.heads, 1)
    column_owner = _owner(cols * grid.block_k, torch.tensor([run[0] for run, _ in key_runs]), key_owner)
    place = row_owner[rows % max(grid.n_q, 1)] * R + column_owner
    return found.view(-1).index_add_(0, place, pairs).view(R, R)


def _longest(flags: Tensor) -> Run:
    """The longest stretch of true flags, the first of equals."""
    edges = torch.cat([flags.new_zeros(1), flags, flags.new_zeros(1)]).int().diff()
    starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    if not starts.numel():
        return 0, 0
    n = int((stops - starts).argmax())
    return int(starts[n]), int(stops[n])


def _owner(tokens: Tensor, starts: Tensor, owners: Tensor) -> Tensor:
    """The rank of each token, of runs that begin at `starts`, ascending."""
    return owners[torch.searchsorted(starts, tokens, right=True) - 1]


def check_transport(transport: str) -> None:
    """Raise InputError unless it is "auto" or in TRANSPORTS."""
    if transport != "auto" and transport not in TRANSPORTS:
        raise InputError(f"transport must be one of {('auto', *TRANSPORTS)}, got {transport!r}")


def head_ranks(heads: int, ranks: int) -> int:
    """In how many ranks heads can be spread: the largest divisor of the ranks that is no more than the heads."""
    return max((d for d in range(1, ranks + 1) if ranks % d == 0 and d <= heads), default=1)


def head_range(heads: int, place: int, degree: int) -> Run:
    """The query heads of a place among `degree`."""
    return heads * place // degree, heads * (place + 1) // degree


def kv_heads_for(bound: Run, Hq: int, Hkv: int) -> list[int]:
    """The key heads that the query heads of `bound` read: each once where all serve as many, else one for each."""
    group = Hq // max(Hkv, 1)
    each = [h // max(group, 1) for h in range(*bound)]
    once = sorted(set(each))
    return once if all(each.count(h) * len(once) == len(each) for h in once) else each
