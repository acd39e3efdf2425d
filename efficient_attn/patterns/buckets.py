"""Patterns that sort tokens into buckets by what they hold: a query sees the keys of its own bucket.

Several rounds of bucketing are joined: a pair is visible when any of them puts it together. `BlockMask` keeps tokens in
their order, where a bucket is scattered over everything and the mask of one takes n^2 / 8 bytes; the methods `lsh` and
`sorted_buckets` sort tokens instead and never see more than the pairs of neighbouring buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..masks import BlockMask
from ..masks.algebra import seen_keys
from ..masks.lists import entry_rows
from ..options import register
from ..tracing import shapes_only
from .content import ContentPattern


class Buckets(NamedTuple):
    """Where tokens are put. All of them int32 (rounds, B, H, N), H as many as the heads of query or key.

    A key with bucket -1 is in none. chunk: places in the order of buckets, when only a key's own chunk and the one
    after it may look at it; None: the whole bucket. order: tokens sorted by bucket, int64, where they have been sorted
    already.
    """

    query: Tensor
    key: Tensor
    query_chunk: Tensor | None = None
    key_chunk: Tensor | None = None
    query_order: Tensor | None = None
    key_order: Tensor | None = None

    def orders(self, r: int) -> tuple[Tensor, Tensor]:
        """Tokens of queries and of keys in the order of the buckets of round r, (B, H, N)."""
        sides = ((self.query_order, self.query), (self.key_order, self.key))
        query, key = (
            buckets[r].argsort(dim=-1, stable=True) if order is None else order[r] for order, buckets in sides
        )
        return query, key

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
        half = self.n_buckets // 2
        rotations = _rotations(x.shape[-1], self.rounds, half, self.seed).to(x)
        turned = (x @ rotations.flatten(1)).unflatten(-1, (self.rounds, half)).movedim(-2, 0)
        (most, at), (least, opposite) = turned.max(-1), turned.min(-1)
        return torch.where(most >= -least, at, opposite + half).int()


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
        (of_query, query_order), (of_key, key_order) = self._places(query, own, n), self._places(key, key_mask, n)
        orders = (query_order, key_order) if key_mask is None else (None, None)
        return Buckets(of_query.clamp(min=0), _hide(of_key, key_mask), None, None, *orders)

    def _places(self, x: Tensor, mask: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
        """Bucket of each token, (rounds, B, H, N), and the tokens in the order of places."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x if mask is None else x.masked_fill(~mask[:, None, :, None], 0.0)
        along = (x @ _rotations(x.shape[-1], self.rounds, 1, self.seed).to(x).flatten(1)).movedim(-1, 0)
        count = torch.tensor(x.shape[2], device=x.device) if mask is None else mask.sum(-1)[:, None, None]
        along = along if mask is None else along.masked_fill(~mask[:, None], torch.inf)
        order = along.argsort(dim=-1, stable=True)
        place = torch.arange(x.shape[2], device=x.device)
        bucket = (place * n // count.clamp(min=1)).clamp(max=n - 1).int()
        return torch.empty_like(order, dtype=torch.int32).scatter_(-1, order, bucket.expand_as(order)), order


def _hide(buckets: Tensor, key_mask: Tensor | None) -> Tensor:
    return buckets if key_mask is None else buckets.masked_fill(~key_mask[:, None], -1)


def _rotations(head_dim: int, rounds: int, columns: int, seed: int) -> Tensor:
    """Gaussian (head_dim, rounds, columns), the same on every device."""
    return torch.randn(head_dim, rounds, columns, generator=torch.Generator().manual_seed(seed), device="cpu")
