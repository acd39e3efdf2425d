"""Patterns that sort tokens into buckets by what they hold: a query sees the keys of its own bucket.

Several rounds of bucketing are joined: a pair is visible when any of them puts it together. `BlockMask` keeps tokens in
their order, where a bucket is scattered over everything and the mask of one takes n^2 / 8 bytes; the methods `lsh` and
`sorted_buckets` sort tokens instead and never see more than the pairs of neighbouring buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..masks import BlockMask
from ..masks.algebra import seen_keys
from ..masks.lists import Grid, entry_rows, predicate_lists
from ..options import register
from ..tracing import shapes_only
from .content import ContentPattern


class Buckets(NamedTuple):
    """Where tokens are put. All of them int32 (rounds, B, H, N), H as many as the heads of query or key.

    A key with bucket -1 is in none. chunk: places in the order of buckets, when only a key's own chunk and the one
    after it may look at it; None: the whole bucket.
    """

    query: Tensor
    key: Tensor
    query_chunk: Tensor | None = None
    key_chunk: Tensor | None = None

    def of(self, r: int) -> Buckets:
        """Round r alone."""
        parts: Any = (None if x is None else x[r : r + 1] for x in self)
        return Buckets(*parts)

    def ordered(self, query_order: Tensor, key_order: Tensor) -> Buckets:
        """The same with tokens in another order, (B, H, N) for queries and keys."""
        pairs = ((self.query, query_order), (self.key, key_order),
                 (self.query_chunk, query_order), (self.key_chunk, key_order))  # fmt: skip
        parts: Any = (None if x is None else x.gather(-1, order.expand_as(x)) for x, order in pairs)
        return Buckets(*parts)

    def together(self, rounds: int, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whether a round before `rounds` puts query i of head h together with key j."""
        group = max(self.query.shape[2] // max(self.key.shape[2], 1), 1)
        found = torch.zeros((), dtype=torch.bool, device=i.device)
        for r in range(rounds):
            same = self.query[r][b, h, i] == self.key[r][b, h // group, j]
            if self.query_chunk is not None and self.key_chunk is not None:
                ahead = self.query_chunk[r][b, h, i] - self.key_chunk[r][b, h // group, j]
                same = same & (ahead >= 0) & (ahead <= 1)
            found = found | same
        return found


class BucketPattern(ContentPattern):
    """A pattern with a field `rounds`, whose `buckets` says where tokens go."""

    rounds: int
    shared_qk: bool = False

    def buckets(self, query: Tensor, key: Tensor, key_mask: Tensor | None = None) -> Buckets:
        """Where the tokens of query (B, Hq, Nq, D) and key (B, Hkv, Nk, D) go; keys masked by (B, Nk) go nowhere."""
        raise NotImplementedError

    @torch.no_grad()
    def for_inputs(
        self,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None = None,
        key_mask: Tensor | None = None,
        within: BlockMask | None = None,
    ) -> BlockMask:
        if within is not None:  # a key that no query sees is in no bucket, as padding is in none
            seen = seen_keys(*within.parts).to(key.device).expand(key.shape[0], -1)
            key_mask = seen if key_mask is None else key_mask & seen
        found = self.buckets(query, key, key_mask)
        batch, heads, q_len = query.shape[:3]

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = found.together(self.rounds, b, h, i, j)
            return seen & (i != j) if self.shared_qk else seen

        mask = BlockMask.from_predicate(
            visible, q_len=q_len, kv_len=key.shape[2], batch=batch, heads=heads, device=query.device
        )
        return _or_oneself(mask, within, found.key[0, :, :1] >= 0) if self.shared_qk else mask

    def _check_tracing(self, query: Tensor) -> None:
        if (torch.compiler.is_compiling() or shapes_only(query)) or torch._C._functorch.is_batchedtensor(query):
            raise UnsupportedError(
                f"{self.name} makes lists whose number depends on what queries and keys hold; torch.compile and vmap "
                "cannot trace that, and fake and meta tensors hold nothing. Compile around it (fullgraph=False), or "
                "use topk_blocks"
            )


def _or_oneself(mask: BlockMask, within: BlockMask | None, there: Tensor) -> BlockMask:
    """The mask, and for queries that see nothing within it themselves, if `there` (B, 1, N) says that they exist."""
    seen = mask if within is None else mask & within
    grid, lists = seen.grid, seen.explicit_lists()
    some = torch.cat([(lists.tiles != 0).any(-1), lists.tiles.new_ones(1, grid.block_q, dtype=torch.bool)])
    rows = torch.zeros(lists.indptr.numel() - 1, grid.block_q, dtype=torch.int32, device=there.device)
    rows.index_add_(0, entry_rows(lists), some[lists.tile_ids.long()].int())
    alone = (rows == 0).view(lists.batch, lists.heads, -1)[..., : grid.q_len] & there
    diagonal = BlockMask.from_predicate(
        lambda b, h, i, j: (i == j) & alone[b, h, i],
        q_len=grid.q_len,
        kv_len=grid.kv_len,
        batch=lists.batch,
        heads=lists.heads,
        device=there.device,
        within=BlockMask(grid.q_len, grid.kv_len, (grid.block_q, grid.block_k), window=(0, 0)),
    )
    return mask | diagonal


def sorted_lists(
    found: Buckets, r: int, query_order: Tensor, key_order: Tensor, *, offset: int | None, others: bool, block: int
) -> BlockMask:
    """The mask of round r for tokens in the order of its buckets, without the pairs of earlier rounds.

    Args:
        query_order, key_order: (B, H, N) that sort found.query[r] and found.key[r].
        offset: a query at position p sees keys up to p + offset; None: all.
        others: without oneself.
    """
    found = found.ordered(query_order, key_order)
    _, batch, heads, q_len = found.query.shape
    group = heads // max(found.key.shape[2], 1)
    grid = Grid(q_len, found.key.shape[-1], block, block)
    low_q, high_q = _ends(found.query[r], grid.block_q)
    low_k, high_k = (x.repeat_interleave(group, 1) for x in _ends(found.key[r], grid.block_k))
    meets = (low_q[..., None] <= high_k[..., None, :]) & (low_k[..., None, :] <= high_q[..., None])
    lines, cols = meets.flatten(0, 2).nonzero().unbind(1)
    low = torch.minimum(low_q.flatten()[lines], low_k.flatten(0, 1)[lines // max(grid.n_q, 1), cols])
    high = torch.maximum(high_q.flatten()[lines], high_k.flatten(0, 1)[lines // max(grid.n_q, 1), cols])
    plain = r == 0 and offset is None and not others and found.query_chunk is None
    keys = torch.arange(lines.numel(), device=lines.device)
    keys = torch.where(low == high, -1, keys) if plain else keys  # one bucket alone: nothing to ask

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = found.of(r).together(1, b, h, i, j)
        seen = seen & ~found.together(r, b, h, i, j) if r else seen
        p, position = query_order[b, h, i], key_order[b, h // group, j]
        seen = seen if offset is None else seen & (position <= p + offset)
        return seen & (p != position) if others else seen

    lists = predicate_lists(visible, grid, batch, heads, lines, cols, keys=(keys, grid.edge(lines, cols)))
    return BlockMask.from_lists(grid, lists)


def _ends(buckets: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and last bucket of each block of sorted (B, H, N)."""
    N = buckets.shape[-1]
    stops = torch.arange(0, N + size, size, device=buckets.device).clamp(max=N)
    return buckets[..., stops[:-1]], buckets[..., stops[1:] - 1]


@register
@dataclass(frozen=True)
class LSH(BucketPattern):
    """Tokens that a random rotation sends to the same of n_buckets. Reformer, Kitaev et al. 2020, arXiv:2001.04451.

        h(x) = argmax([x R; -x R]),  R of shape (D, n_buckets / 2)        query i sees key j  <=>  h(q_i) = h(k_j)

    rounds: of independent R; a pair is visible when one round puts it together. The paper's weights exp(lse_r - lse),
        with its correction by the number of rounds N_ij, make of these exactly one softmax over the union.
    shared_qk: the paper's attention: keys are the queries, of length one (k_j = q_j / |q_j|), and a token sees itself
        only when it sees no other. The method `lsh` puts these in the place of the keys of the call; the pattern alone
        leaves them as they are. False: queries and keys keep their own vectors, both hashed by h; a query whose bucket
        holds no key gives 0.
    chunk: 0: whole buckets. m > 0: the paper's batches: in the order of (bucket, position) the token at place s sees
        those of its own and of the preceding chunk of m; needs shared_qk. What is to the right of a token moves its
        place, so that with chunks the past is not wholly blind to the future.
    seed: of the rotations, the same for all heads.
    """

    name = "lsh"
    formula = "softmax(QK^T)V over h(q_i) = h(k_j), h(x) = argmax([xR; -xR]), any of r rounds"
    paper = "Kitaev et al. 2020"
    complexity = "r n^2 d / buckets"

    n_buckets: int = 16
    rounds: int = 2
    shared_qk: bool = False
    chunk: int = 0
    seed: int = 0

    def check(self) -> None:
        self._at_least(n_buckets=2, rounds=1, chunk=0, seed=0)
        if self.n_buckets % 2:
            raise InputError(f"{self.name}: n_buckets must be even, got {self.n_buckets}")
        if self.chunk and not self.shared_qk:
            raise InputError(f"{self.name}: chunk={self.chunk} needs one order of queries and keys: shared_qk=true")

    def buckets(self, query: Tensor, key: Tensor, key_mask: Tensor | None = None) -> Buckets:
        self._check_tracing(query)
        of_query = self._hash(query)
        if not self.shared_qk:
            of_key = self._hash(key if key_mask is None else key.masked_fill(~key_mask[:, None, :, None], 0.0))
            return Buckets(of_query, _hide(of_key, key_mask))
        if query.shape != key.shape:
            raise InputError(
                f"{self.name}: shared_qk makes the queries the keys; got {tuple(query.shape)} and {tuple(key.shape)}"
            )
        if not self.chunk:
            return Buckets(of_query, _hide(of_query, key_mask))
        order = _hide(of_query, key_mask).long().argsort(dim=-1, stable=True)
        chunk = (order.argsort(-1) // self.chunk).int()
        return Buckets(of_query, _hide(of_query, key_mask), chunk, chunk)

    def _hash(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        rotations = _rotations(x.shape[-1], self.rounds, self.n_buckets // 2, self.seed).to(x)
        turned = torch.einsum("bhnd,dra->rbhna", x, rotations)
        return torch.cat([turned, -turned], -1).argmax(-1).int()


@register
@dataclass(frozen=True)
class SortedBuckets(BucketPattern):
    """Equal buckets: queries and keys, each sorted along a random direction and cut into as many pieces.

    With places s in these orders query i sees key j when floor(s_i n / Nq) = floor(s_j n / Nk), n = ceil(Nk / size):
    balanced where the buckets of `LSH` are not, as in SMYRF (Daras et al. 2020, arXiv:2010.05315). Places depend on the
    whole sequence, future included, so that the method refuses causal calls. Masked keys have no place; in
    self-attention (Nq = Nk) neither have these queries.

    size: keys of a bucket; rounds: directions, a pair is visible when one puts it together; seed: of the directions.
    """

    name = "sorted_buckets"
    formula = "softmax(QK^T)V over equal pieces of Q and K sorted by xu, any of r rounds"
    paper = "Daras et al. 2020"
    complexity = "r n s d"
    accepts_causal = False

    size: int = 128
    rounds: int = 1
    seed: int = 0

    def check(self) -> None:
        self._at_least(size=1, rounds=1, seed=0)

    def buckets(self, query: Tensor, key: Tensor, key_mask: Tensor | None = None) -> Buckets:
        self._check_tracing(query)
        n = max(-(-key.shape[2] // self.size), 1)
        own = key_mask if query.shape[2] == key.shape[2] else None
        return Buckets(self._places(query, own, n).clamp(min=0), _hide(self._places(key, key_mask, n), key_mask))

    def _places(self, x: Tensor, mask: Tensor | None, n: int) -> Tensor:
        """Bucket of each token, (rounds, B, H, N)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x if mask is None else x.masked_fill(~mask[:, None, :, None], 0.0)
        along = torch.einsum("bhnd,dra->rbhn", x, _rotations(x.shape[-1], self.rounds, 1, self.seed).to(x))
        count = torch.tensor(x.shape[2], device=x.device) if mask is None else mask.sum(-1)[:, None, None]
        along = along if mask is None else along.masked_fill(~mask[:, None], torch.inf)
        place: Tensor = along.argsort(dim=-1, stable=True).argsort(-1)
        return (place * n // count.clamp(min=1)).clamp(max=n - 1).int()


def _hide(buckets: Tensor, key_mask: Tensor | None) -> Tensor:
    return buckets if key_mask is None else buckets.masked_fill(~key_mask[:, None], -1)


def _rotations(head_dim: int, rounds: int, columns: int, seed: int) -> Tensor:
    """Gaussian (head_dim, rounds, columns), the same on every device."""
    return torch.randn(head_dim, rounds, columns, generator=torch.Generator().manual_seed(seed), device="cpu")
