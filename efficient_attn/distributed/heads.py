"""Heads apart: each of some ranks gets a part of the heads of all their tokens, and gives the result back (Ulysses)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .exchange import Exchange, Route
from .plan import head_range, kv_heads_for
from .shards import Runs, Shards, joined
from .tokens import place_of


@dataclass(frozen=True)
class HeadsApart:
    """How tokens (B, H, own tokens, C) become (B, heads of this rank, tokens of all `ranks`, C).

    Fields:
        ranks: of the exchange, which share the heads.
        heads: of each of them.
        shards: who holds what, over all ranks of the exchange.
    """

    exchange: Exchange
    ranks: tuple[int, ...]
    heads: Sequence[Sequence[int]]
    shards: Shards

    @property
    def me(self) -> int:
        return self.ranks.index(self.exchange.rank)

    @property
    def whole(self) -> Runs:
        """What all these ranks hold, in the order of the sequence."""
        return joined([run for rank in self.ranks for run in self.shards.runs[rank]])

    def of_tokens(self, x: Tensor) -> list[list[Tensor]]:
        """What of (B, H, own tokens, C) belongs to each rank: its heads, run by run."""
        runs = self.shards.runs[self.exchange.rank]
        found: list[list[Tensor]] = [[] for _ in range(self.exchange.ranks)]
        for rank, heads in zip(self.ranks, self.heads, strict=True):
            for first, last in _ranges(heads):
                found[rank] += [x[:, first:last].narrow(2, place_of(runs, run), run[1] - run[0]) for run in runs]
        return found

    def of_heads(self, x: Tensor) -> list[list[Tensor]]:
        """What of (B, own heads, tokens of all ranks, C) belongs to each rank: its tokens, run by run."""
        whole = self.whole
        found: list[list[Tensor]] = [[] for _ in range(self.exchange.ranks)]
        for rank in self.ranks:
            place = 0
            for first, last in _ranges(self.heads[self.me]):
                part = x[:, place : place + last - first]
                place += last - first
                runs = self.shards.runs[rank]
                found[rank] += [part.narrow(2, place_of(whole, run), run[1] - run[0]) for run in runs]
        return found

    def spread(self, x: Tensor) -> Route:
        """To heads."""
        tokens = sum(stop - start for start, stop in self.whole)
        return Route(x, (x.shape[0], len(self.heads[self.me]), tokens, x.shape[3]), self.of_tokens, self.of_heads)

    def gather(self, x: Tensor) -> Route:
        """Back, where each head is in one rank."""
        heads, tokens = sum(map(len, self.heads)), self.shards.counts[self.exchange.rank]
        return Route(x, (x.shape[0], heads, tokens, x.shape[3]), self.of_heads, self.of_tokens)


def head_lists(Hq: int, Hkv: int, degree: int) -> tuple[list[list[int]], list[list[int]]]:
    """The query heads and the key heads of each of `degree` places."""
    bounds = [head_range(Hq, place, degree) for place in range(degree)]
    return [list(range(*bound)) for bound in bounds], [kv_heads_for(bound, Hq, Hkv) for bound in bounds]


def _ranges(heads: Sequence[int]) -> list[tuple[int, int]]:
    """Numbers as ranges, in their order: [0, 1, 1, 2] is 0..1 and 1..2."""
    found: list[tuple[int, int]] = []
    for head in heads:
        if found and found[-1][1] == head:
            found[-1] = (found[-1][0], head + 1)
        else:
            found.append((head, head + 1))
    return found
