"""Which tokens each rank holds: `Shards`, and how a sequence is cut so that all ranks have as much to do.

A rank holds runs of consecutive tokens. One run each is enough for windows and for dense attention; a causal mask gives
the last tokens more to do, and zigzag shards pair an early run with a late one (Brandon et al. 2023, "Striped
Attention", name the problem; ring-flash-attention and Megatron the cure). `balanced` does the same for any mask.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..masks import BlockMask
from .needs import visited_by_block

GRAIN = 16  # tokens: runs start at multiples of it, as the blocks of a mask do
EVEN = 1.05  # a rank may have so much more to do than the mean before another cut is looked for

Run = tuple[int, int]  # tokens start <= i < stop
Runs = tuple[Run, ...]


@dataclass(frozen=True)
class Shards:
    """Which tokens of a sequence each rank holds.

    Attributes:
        length: of the whole sequence.
        runs: for each rank its runs (start, stop), ascending; every start is a multiple of 16. A rank may have none.

    Raises:
        InputError: runs that leave tokens out, hold some twice, or start elsewhere.
    """

    length: int
    runs: tuple[Runs, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(joined(runs) for runs in self.runs))
        edge = 0
        for start, stop in sorted(run for runs in self.runs for run in runs):
            if start != edge or stop <= start:
                raise InputError(
                    f"shards must hold each of {self.length} tokens once; run ({start}, {stop}) follows token {edge}"
                )
            if start % GRAIN:
                raise InputError(f"a run of a shard must start at a multiple of {GRAIN}, got ({start}, {stop})")
            edge = stop
        if edge != self.length or not self.runs:
            raise InputError(f"shards must hold {self.length} tokens in at least one rank; they hold {edge}")

    @classmethod
    def contiguous(cls, length: int, ranks: int) -> Shards:
        """One run each, of lengths that differ by as little as multiples of 16 allow."""
        return cls(length, tuple((run,) if run[0] < run[1] else () for run in cut(length, ranks)))

    @classmethod
    def zigzag(cls, length: int, ranks: int) -> Shards:
        """Run r and run 2 * ranks - 1 - r of 2 * ranks: as many pairs for every rank under a causal mask."""
        runs = cut(length, 2 * ranks)
        pairs = ((runs[r], runs[2 * ranks - 1 - r]) for r in range(ranks))
        return cls(length, tuple(tuple(run for run in pair if run[0] < run[1]) for pair in pairs))

    @classmethod
    def balanced(cls, mask: BlockMask, ranks: int) -> Shards:
        """Shards of equally many tokens whose ranks visit about as many pairs of the mask, in as few runs as do.

        For self-attention: keys are cut like queries. Tried are 1, 2, 4 and 8 runs a rank; with more than one, the
        runs are dealt out, the most expensive first, each to the rank with the least to do that has one to get.
        """
        if mask.q_len != mask.kv_len:
            raise InputError(f"balanced shards are for self-attention; got {mask.q_len} queries, {mask.kv_len} keys")
        return _balanced(mask, ranks)

    @property
    def ranks(self) -> int:
        return len(self.runs)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of tokens of each rank."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.runs)

    @property
    def alignment(self) -> int:
        """The largest power of two up to 256 that every start is a multiple of."""
        return math.gcd(256, *(start for runs in self.runs for start, _ in runs))

    def positions(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """The places of a rank's tokens in the whole sequence, int64, ascending."""
        runs = [torch.arange(*run, device=device) for run in self.runs[rank]]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device=device)

    def part(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """A rank's tokens of x, whose dimension `dim` is the whole sequence."""
        runs = self.runs[rank]
        if x.shape[dim] != self.length:
            raise InputError(
                f"these shards are of {self.length} tokens, and dimension {dim} of {tuple(x.shape)} is not"
            )
        if not runs:
            return x.narrow(dim, 0, 0)
        parts = [x.narrow(dim, start, stop - start) for start, stop in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def whole(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The whole sequence of every rank's part."""
        pieces = []
        for runs, part in zip(self.runs, parts, strict=True):
            sizes = [stop - start for start, stop in runs]
            pieces += list(zip(runs, part.split(sizes, dim) if sizes else (), strict=True))
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])] or [parts[0]], dim)

    def together(self, groups: Sequence[Sequence[int]]) -> Shards:
        """Fewer ranks: each holds what the ranks of one group held."""
        return Shards(self.length, tuple(tuple(sorted(run for r in group for run in self.runs[r])) for group in groups))


def joined(runs: Sequence[Run]) -> Runs:
    """Runs, ascending, neighbours made one and empty ones left out."""
    found: list[Run] = []
    for start, stop in sorted(runs):
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        elif start < stop:
            found.append((start, stop))
    return tuple(found)


def overlap(a: Sequence[Run], b: Sequence[Run]) -> Runs:
    """The tokens that both have."""
    both = ((max(x[0], y[0]), min(x[1], y[1])) for x, y in itertools.product(a, b))
    return joined([run for run in both if run[0] < run[1]])


def size(runs: Sequence[Run]) -> int:
    """The number of tokens of runs."""
    return sum(stop - start for start, stop in runs)


def cut(length: int, parts: int) -> list[Run]:
    """`parts` runs of 0 .. length that start at multiples of 16, of 128 where that keeps them even."""
    if length < 0 or parts < 1:
        raise InputError(f"cannot cut {length} tokens for {parts} ranks")
    grains = next((g for g in (128, 64, 32) if length % (g * parts) == 0 or length >= 24 * g * parts), GRAIN)
    units = -(-length // grains)
    edges = [min(length, units * part // parts * grains) for part in range(parts + 1)]
    return list(itertools.pairwise(edges))


@functools.lru_cache(maxsize=64)
def _balanced(mask: BlockMask, ranks: int) -> Shards:
    best: tuple[float, Shards] | None = None
    for each in (1, 2, 4, 8):
        runs = cut(mask.q_len, each * ranks)
        if any(start == stop for start, stop in runs) and best is not None:
            break
        costs = run_costs(mask, runs)
        total, held = [0.0] * ranks, [list[Run]() for _ in range(ranks)]
        order = range(len(runs)) if each == 1 else sorted(range(len(runs)), key=lambda n: (-costs[n], n))
        for place, n in enumerate(order):
            if each == 1:
                rank = place
            else:
                rank = min((r for r in range(ranks) if len(held[r]) < each), key=lambda r: (total[r], len(held[r]), r))
            total[rank] += costs[n]
            held[rank].append(runs[n])
        shards = Shards(mask.q_len, tuple(joined(runs) for runs in held))
        uneven = max(total) / max(sum(total) / ranks, 1e-9)
        if best is None or uneven < best[0] - 0.01:
            best = (uneven, shards)
        if uneven <= EVEN:
            break
    assert best is not None
    return best[1]


def run_costs(mask: BlockMask, runs: Sequence[Run]) -> list[float]:
    """The pairs that a kernel visits for the queries of each run, for one batch element and head on average."""
    costs, block = visited_by_block(mask), mask.block_size[0]
    edges = torch.cat([costs.new_zeros(1), costs.cumsum(0)])

    def before(token: int) -> float:
        whole, rest = divmod(token, block)
        height = min(block, mask.q_len - whole * block)
        return float(edges[whole]) + (float(costs[whole]) * rest / height if rest else 0.0)

    return [before(stop) - before(start) for start, stop in runs]
