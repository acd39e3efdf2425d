"""Operators on BlockMask: and, or, not, windows, reblocking, slices, equality, copies and devices."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from support.mask_cases import assert_draws, assert_valid, random_bits, seen_through, sizes, variants
from torch import Tensor

from efficient_attn import BlockMask, MaskError
from efficient_attn.masks import lists as mask_build


@sizes
def test_algebra_equals_boolean_algebra(q_len, kv_len, block_size):
    first = variants(q_len, kv_len, block_size)
    second = variants(q_len, kv_len, (32, 16), seed=5)[::3]
    for mask, bits in first:
        assert_draws(~mask, ~bits)
        assert_valid(~mask)
        for other, others in second:
            for result, expected in ((mask & other, bits & others), (mask | other, bits | others)):
                assert_draws(result, expected)
                assert_valid(result)


def test_window_algebra_stays_analytic():
    n = 100
    near, past, future = (BlockMask(n, n).with_window(w) for w in ((8, 3), (-1, 0), (0, -1)))
    assert (near & past).window == (8, 0) and (near & past).indptr is None
    assert (near | past).indptr is None and (near | past).window == (-1, 3)
    assert (past | future) == BlockMask(n, n)
    assert (past & future).window == (0, 0)
    assert (~past).indptr is None and torch.equal((~past).to_dense(), ~past.to_dense())
    assert torch.equal((~future).to_dense(), ~future.to_dense())
    assert (past & ~past).density == 0.0 and (past | ~past) == BlockMask(n, n)
    listed = BlockMask.from_dense(random_bits(n, n), block_size=32)
    assert (listed & near).window == (8, 3) and (listed & near).indices is listed.indices


def test_windows_that_overlap_touch_or_lie_apart_combine():
    """Every two intervals of j - i within a few steps of each other, also those that leave out one diagonal."""
    distance = torch.arange(9) - torch.arange(9)[:, None]
    ends = [(low, high) for low in range(-4, 4) for high in range(low, 4)]
    made = {}
    for low, high in ends:
        made[low, high] = BlockMask(9, 9, window=(high - low, 0), window_offset=high)
        assert_draws(made[low, high], ((distance >= low) & (distance <= high))[None, None])
    for a, b in itertools.product(ends, ((-4, -3), (-1, 0), (1, 1), (2, 3))):
        x, y = (((distance >= low) & (distance <= high))[None, None] for low, high in (a, b))
        assert_draws(made[a] | made[b], x | y)
        assert_draws(made[a] & made[b], x & y)


def test_windows_of_different_alignment_combine():
    top, bottom = (BlockMask(40, 70).with_window((5, 3), alignment=a) for a in ("top_left", "bottom_right"))
    assert torch.equal((top | bottom).to_dense(), top.to_dense() | bottom.to_dense())
    assert (top & bottom).density == 0.0
    wide = BlockMask(40, 70).with_causal("bottom_right") & BlockMask(40, 70).with_window((5, -1), alignment="top_left")
    assert wide.indptr is None
    expected = seen_through(40, 70, (-1, 0), 30) & seen_through(40, 70, (5, -1))
    assert torch.equal(wide.to_dense(), expected)


def test_alignment_must_be_said_when_lengths_differ():
    with pytest.raises(MaskError, match="ambiguous"):
        BlockMask(4, 5).with_causal()
    with pytest.raises(MaskError, match="alignment must be one of"):
        BlockMask(4, 4).with_causal("center")
    assert BlockMask(4, 4).with_causal() == BlockMask(4, 4).with_causal("bottom_right")


def test_operators_broadcast_and_refuse():
    a = BlockMask.from_dense(random_bits(40, 50, batch=2, heads=1), block_size=16)
    b = BlockMask.from_dense(random_bits(40, 50, batch=1, heads=3, seed=2), block_size=16)
    assert (a & b).shape == (a | b).shape == (2, 3, 40, 50)
    for other, text in [
        (BlockMask(40, 51), "cannot be combined"),
        (BlockMask.from_dense(random_bits(40, 50, batch=3, heads=1)), "do not broadcast"),
        (BlockMask.from_lengths([1, 2, 3], q_len=40, kv_len=50), "do not broadcast"),
        (a.to("meta"), "move one"),
    ]:
        with pytest.raises(MaskError, match=text):
            a & other
    with pytest.raises(TypeError):
        a & torch.ones(40, 50, dtype=torch.bool)
    with pytest.raises(TypeError):
        a | 3


@sizes
@pytest.mark.parametrize("new", [(16, 16), (128, 64), (80, 240), (256, 256)])
def test_reblock(q_len, kv_len, block_size, new):
    for mask, bits in variants(q_len, kv_len, block_size)[8:]:
        again = mask.reblock(new)
        assert again.block_size == new and again.window == mask.window
        assert_draws(again, bits)
        assert_valid(again)
    plain = BlockMask.from_dense(random_bits(q_len, kv_len), block_size=block_size)
    assert plain.reblock(new) == BlockMask.from_dense(random_bits(q_len, kv_len), block_size=new)
    assert plain.reblock(new).reblock(block_size) == plain


def test_reblock_works_in_chunks(monkeypatch):
    bits = random_bits(300, 400)
    mask = BlockMask.from_dense(bits, block_size=48)
    monkeypatch.setattr(mask_build, "CHUNK", 1)
    monkeypatch.setattr("efficient_attn.masks.algebra.CHUNK", 1)
    assert torch.equal(mask.reblock(64).to_dense(), bits)
    assert torch.equal((~mask).to_dense(), ~bits) and torch.equal(mask.swapped().to_dense(), bits.mT)


def test_slicing_by_batch_and_head():
    index = [
        0,
        -1,
        (1, 2),
        (slice(None), 0),
        (slice(0, 1), slice(1, 3)),
        (slice(None, None, -1), slice(None)),
        (-2, -3),
    ]
    keep = lambda i, n: [range(n)[i]] if isinstance(i, int) else list(range(n))[i]  # noqa: E731
    for mask, bits in variants(67, 90, (16, 32)):
        for at in index:
            full = (at, slice(None)) if not isinstance(at, tuple) else at
            if mask.indptr is None and mask.kv_lengths is None and full[0] not in (0, -1, slice(None), slice(0, 1)):
                continue
            if mask.heads == 1 and full[1] not in (0, slice(None)):
                continue
            if mask.shape[0] == 1 and full[0] == slice(None, None, -1):
                continue
            part = mask[at]
            expected = bits[keep(full[0], bits.shape[0])][:, keep(full[1], bits.shape[1])]
            assert torch.equal(part.to_dense(), expected)
            assert_valid(part)
    sliced = BlockMask.from_dense(random_bits(67, 90), block_size=16)[1, 1]
    assert sliced == BlockMask.from_dense(random_bits(67, 90)[1:, 1:2], block_size=16)


def test_slicing_out_of_range_raises():
    mask = BlockMask.from_dense(random_bits(20, 20))
    for index, text in [
        (2, "batch 2 of a mask with 2"),
        ((0, 3), "head 3"),
        (-3, "batch -3"),
        ((0, 0, 0), "3 indices"),
        ("a", "ints and slices"),
        (True, "ints and slices"),
    ]:
        with pytest.raises(MaskError, match=text):
            mask[index]
    with pytest.raises(MaskError, match="same for all"):
        BlockMask(4, 4)[1]


def test_equality_and_equivalence():
    bits = random_bits(67, 90)
    mask = BlockMask.from_dense(bits, block_size=16)
    same = BlockMask.from_dense(bits.clone(), block_size=16)
    assert mask == same and hash(mask) == hash(same) and len({mask, same}) == 1
    changed = bits.clone()
    changed[1, 2, 66, 89] ^= True
    for other in (
        BlockMask.from_dense(changed, block_size=16),
        mask.with_causal("top_left"),
        mask.with_lengths([3, 4]),
        BlockMask(67, 90),
    ):
        assert mask != other and not mask.equivalent(other) and not other.equivalent(mask)
    coarse = mask.reblock(64)
    assert mask != coarse and mask.equivalent(coarse) and coarse.equivalent(mask)
    assert mask != "mask" and not mask.equivalent(BlockMask(67, 91))
    one = BlockMask.from_dense(bits[:1, :1], block_size=16)
    assert one.equivalent(BlockMask.from_dense(bits[:1, :1].repeat(4, 3, 1, 1), block_size=32))
    causal = BlockMask(50, 50).with_causal()
    assert causal.equivalent(causal.explicit()) and causal.explicit() != causal
    lengths = BlockMask.from_lengths([9, 9], q_len=50, kv_len=50)
    assert lengths.equivalent(BlockMask.from_predicate(lambda b, h, i, j: j < 9, q_len=50, kv_len=50))


def test_pickle_and_copies():
    for mask, bits in variants(67, 90, (16, 32)):
        mask.arrays(True)
        for again in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), copy.copy(mask)):
            assert again == mask
            assert_draws(again, bits)
        deep = copy.deepcopy(mask)
        assert mask.indices is None or deep.indices.data_ptr() != mask.indices.data_ptr()


def test_a_forged_pickle_is_checked():
    mask = BlockMask.from_csr([0, 1], [0], q_len=16, kv_len=16, block_size=16)
    mask.indices[0] = 9
    with pytest.raises(MaskError, match="indices must lie"):
        pickle.loads(pickle.dumps(mask))


def test_moving_between_devices():
    mask = BlockMask.from_dense(random_bits(20, 20)).with_lengths([3, 20])
    assert mask.to("cpu") is mask and mask.to(None) is mask
    assert BlockMask(4, 4).to("meta").device is None
    moved = mask.to("meta")
    assert {t.device.type for t in moved.arrays(True) if isinstance(t, Tensor)} == {"meta"}
    assert "density" not in repr(moved)


def test_of_two_lengths_the_shorter_counts() -> None:
    short, long = (BlockMask.from_lengths(torch.tensor(n), q_len=4, kv_len=9) for n in ((3, 7, 0), (5, 2, 9)))
    assert torch.equal((short & long).to_dense(), short.to_dense() & long.to_dense())
