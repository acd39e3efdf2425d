"""Shards and plans: arithmetic of masks, in one process."""

from __future__ import annotations

import itertools

import pytest
import torch

from efficient_attn import BlockMask, Longformer, SlidingWindow
from efficient_attn.distributed import Link, Shape, Shards, make_plan
from efficient_attn.distributed.plan import TRANSPORTS, head_ranks, kv_heads_for
from efficient_attn.distributed.shards import GRAIN, size
from efficient_attn.errors import InputError
from efficient_attn.masks.algebra import visited_pairs

SHAPE = Shape(1, 8, 2, 64, 64, 4)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 50, 1000, 4096, 65536])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("make", [Shards.contiguous, Shards.zigzag], ids=["contiguous", "zigzag"])
def test_every_token_has_one_rank(make, length, ranks):
    shards = make(length, ranks)
    places = torch.cat([shards.positions(rank) for rank in range(ranks)])
    assert torch.equal(places.sort().values, torch.arange(length))
    assert max(shards.counts) - min(shards.counts) <= max(2 * GRAIN, length // 12)
    x = torch.arange(3 * length).view(3, length)
    parts = [shards.part(x, rank, 1) for rank in range(ranks)]
    assert torch.equal(shards.whole(parts, 1), x)


def test_zigzag_is_even_under_a_causal_mask_and_contiguous_is_not():
    mask = BlockMask(65536, 65536).with_causal()
    uneven = {}
    for name, shards in (("zigzag", Shards.zigzag(65536, 8)), ("contiguous", Shards.contiguous(65536, 8))):
        pairs = make_plan(mask, shards, shards).pairs.sum(1)
        uneven[name] = float(pairs.max() / pairs.mean())
    assert uneven["zigzag"] < 1.01 and uneven["contiguous"] > 1.8


@pytest.mark.parametrize(
    ("mask", "uneven"),
    [
        (BlockMask(8192, 8192).with_causal(), 1.01),
        (Longformer(window=128, global_tokens=64).block_mask(8192, 8192), 1.6),  # one block of queries sees all keys
        (BlockMask.from_documents(torch.arange(8192).sqrt().long()), 1.15),
        (BlockMask.from_documents((torch.arange(8192) > 6000).long()).with_causal(), 1.15),
    ],
    ids=["causal", "longformer", "documents", "two documents"],
)
def test_balanced_shards(mask, uneven):
    shards = Shards.balanced(mask, 4)
    pairs = make_plan(mask, shards, shards).pairs.sum(1)
    assert max(shards.counts) == min(shards.counts) == 2048
    assert float(pairs.max() / pairs.mean()) < uneven


def test_a_window_needs_one_run_a_rank():
    mask = SlidingWindow(left=512, right=0).block_mask(65536, 65536)
    assert all(len(runs) == 1 for runs in Shards.balanced(mask, 8).runs)


def random_mask(number: int, generator: torch.Generator) -> BlockMask:
    length = int(torch.randint(1, 400, (), generator=generator))
    bits = torch.rand(length, length, generator=generator) < (0.02 if number % 2 else 0.5)
    mask = BlockMask.from_dense(bits, block_size=int(torch.randint(1, 4, (), generator=generator)) * 16)
    if number % 3 == 0:
        mask = mask.with_window((40, 3))
    if number % 5 == 0:
        mask = mask.with_lengths(torch.tensor([length // 2 + 1]))
    return BlockMask(length, length).with_window((30, 5)) if number % 4 == 0 else mask


def test_pieces_are_the_mask_each_pair_once():
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        mask = random_mask(number, generator)
        length, ranks = mask.q_len, 1 + number % 5
        whole = mask.to_dense()[0, 0]
        makers = (Shards.contiguous, Shards.zigzag)
        shards = Shards.balanced(mask, ranks) if number % 7 == 0 else makers[number % 2](length, ranks)
        plan = make_plan(mask, shards, shards)
        assert float(plan.pairs.sum()) == visited_pairs(*plan.mask.parts)
        for way in ("gather", "spread", "ring"):
            seen = torch.zeros(length, length, dtype=torch.bool)
            for rank in range(ranks):
                queries = shards.positions(rank)
                if way == "ring":
                    met = [(piece, shards.positions(s)) for s in range(ranks) for piece in plan.met(rank, s)]
                else:
                    runs = plan.at_hand(rank, way == "spread")
                    keys = torch.cat([torch.arange(0), *(torch.arange(*run) for run in runs)])
                    fetched = plan.fetched(rank, way == "spread")
                    met = [(piece, shards.positions(rank) if piece.own else keys) for piece in fetched]
                    assert size(plan.fetches(rank)) <= size(runs)
                for piece, keys in met:
                    i, j = queries[slice(*piece.rows)], keys[slice(*piece.columns)]
                    BlockMask(**piece.mask._fields())  # checks its arrays
                    assert int(i[0]) == piece.first_row and (len(piece.keys) > 1 or int(j[0]) == piece.first_column)
                    assert torch.equal(j, torch.cat([torch.arange(*run) for run in piece.keys]))
                    part = piece.mask.to_dense()[0, 0]
                    assert not (seen[i[:, None], j] & part).any()
                    seen[i[:, None], j] |= part
            assert torch.equal(seen, whole), (number, way)


def test_a_window_sends_what_it_needs_and_a_ring_everything():
    length, ranks = 65536, 8
    mask, shards = SlidingWindow(left=512, right=0).block_mask(length, length), Shards.contiguous(length, ranks)
    plan = make_plan(mask, shards, shards)
    pairs = torch.arange(512, length, length // ranks)[1:]  # the first query of each rank but the first sees 512 keys
    assert plan.least_sent(SHAPE) == SHAPE.token_bytes * 512 * len(pairs)
    assert sum(plan.sent("gather", SHAPE)) <= 1.1 * plan.least_sent(SHAPE)
    assert sum(plan.sent("ring", SHAPE)) == SHAPE.token_bytes * length * (ranks - 1)
    assert plan.choose(SHAPE, Link()) == "gather"


def test_explain_names_every_rank():
    shards = Shards.zigzag(4096, 4)
    plan = make_plan(BlockMask(4096, 4096).with_causal(), shards, shards)
    found = plan.explain(SHAPE, Link())
    assert found.transport in TRANSPORTS and len(found.ranks) == 4 and found.predicted.keys() == set(TRANSPORTS)
    assert sum(rank.tokens for rank in found.ranks) == 4096
    assert sum(rank.pairs for rank in found.ranks) == 8 * visited_pairs(*plan.mask.parts)
    assert all(word in str(found) for word in ("bytes sent", "predicted ms", found.transport))


@pytest.mark.parametrize(("Hq", "Hkv"), [(1, 1), (6, 2), (8, 8), (12, 3), (5, 1), (9, 3)])
def test_heads_apart_serve_every_head(Hq, Hkv):
    for degree in range(1, Hq + 1):
        assert head_ranks(Hq, degree) == degree
        bounds = [(Hq * n // degree, Hq * (n + 1) // degree) for n in range(degree)]
        for bound in bounds:
            heads, kv = list(range(*bound)), kv_heads_for(bound, Hq, Hkv)
            assert len(heads) % max(len(kv), 1) == 0
            group = len(heads) // len(kv)
            assert [kv[n // group] for n in range(len(heads))] == [h // (Hq // Hkv) for h in heads]
        assert list(itertools.chain(*(range(*bound) for bound in bounds))) == list(range(Hq))


@pytest.mark.parametrize(
    "runs", [(((0, 16),), ((32, 64),)), (((0, 64),), ((0, 64),)), (((0, 20),), ((20, 64),)), ()], ids=str
)
def test_wrong_shards_are_refused(runs):
    with pytest.raises(InputError, match="shard"):
        Shards(64, runs)
