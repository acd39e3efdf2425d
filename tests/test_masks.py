"""BlockMask against its definition as a bool tensor: builders, rules, operators, conversions, pictures, limits."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from efficient_attn import BlockMask, MaskError, mask_build

# (q_len, kv_len, block_size): ragged, rectangular, tiny, empty
SIZES = [
    (67, 67, (16, 16)),
    (100, 257, (64, 32)),
    (300, 130, (48, 112)),
    (128, 256, (128, 128)),
    (1, 1, (128, 128)),
    (40, 1, (16, 256)),
    (0, 33, (16, 16)),
    (33, 0, (16, 16)),
]
sizes = pytest.mark.parametrize("q_len, kv_len, block_size", SIZES)


def random_bits(q_len: int, kv_len: int, *, batch: int = 2, heads: int = 3, seed: int = 0) -> Tensor:
    """bool (batch, heads, q_len, kv_len) with empty, full, sparse and repeated regions."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, 4, (batch, heads, -(-q_len // 23), -(-kv_len // 37)), generator=generator)
    kind = cells.repeat_interleave(23, 2).repeat_interleave(37, 3)[:, :, :q_len, :kv_len]
    sparse = torch.rand(kind.shape, generator=generator) < 0.1
    stripes = ((torch.arange(q_len)[:, None] + torch.arange(kv_len)) % 3 == 0).expand(kind.shape)
    return torch.where(kind == 0, False, torch.where(kind == 1, True, torch.where(kind == 2, sparse, stripes)))


def seen_through(
    q_len: int, kv_len: int, window: tuple[int, int] | None = None, offset: int = 0, lengths: Tensor | None = None
) -> Tensor:
    """The definition of window and lengths, bool (1 | B, 1, q_len, kv_len)."""
    i, j = torch.arange(q_len)[:, None] + offset, torch.arange(kv_len)
    left, right = window or (-1, -1)
    seen = ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))
    return seen & (j < (torch.tensor([kv_len]) if lengths is None else lengths)[:, None, None, None])


def variants(q_len: int, kv_len: int, block_size: tuple[int, int], seed: int = 0) -> list[tuple[BlockMask, Tensor]]:
    """Masks with every combination of list, window and lengths, each with its definition."""
    bits = random_bits(q_len, kv_len, seed=seed)
    lengths = torch.tensor([kv_len // 3, kv_len])
    offset = kv_len - q_len
    made = []
    for listed in (False, True):
        for window in (None, (9, 4), (-1, 0), (2, -1)):
            for given in (None, lengths):
                mask = BlockMask.from_dense(bits, block_size=block_size) if listed else BlockMask(q_len, kv_len)
                mask = mask if window is None else mask.with_window(window, alignment="bottom_right")
                mask = mask if given is None else mask.with_lengths(given)
                seen = seen_through(q_len, kv_len, window, offset, given)
                made.append((mask, seen & bits if listed else seen))
    return made


def assert_draws(mask: BlockMask, expected: Tensor) -> None:
    drawn = mask.to_dense()
    assert drawn.dtype == torch.bool and drawn.shape == mask.shape
    assert torch.equal(*torch.broadcast_tensors(drawn, expected))


def assert_valid(mask: BlockMask) -> None:
    """The checked constructor accepts what the builders made without checks."""
    fields = {field.name: getattr(mask, field.name) for field in dataclasses.fields(mask)}
    assert BlockMask(**fields) == mask


def assert_canonical(mask: BlockMask) -> None:
    """No empty block, no partial block that is full, no tile twice or unused, tiles in order of appearance."""
    grid, lists = mask._grid, mask._listed
    rows = mask_build.entry_rows(lists)
    partial = lists.tile_ids >= 0
    counted = mask_build.unpack_bits(lists.tiles).flatten(1).sum(1)[lists.tile_ids[partial].long()]
    assert (counted > 0).all() and (counted < grid.pairs(rows, lists.indices.long())[partial]).all()
    assert lists.tiles.unique(dim=0).shape == lists.tiles.shape
    seen = lists.tile_ids[partial].tolist()
    assert list(dict.fromkeys(seen)) == list(range(lists.tiles.shape[0]))


# --- from bool tensors ---------------------------------------------------------------------------------------------


@sizes
def test_from_dense_is_exact_valid_and_canonical(q_len, kv_len, block_size):
    for seed in range(3):
        bits = random_bits(q_len, kv_len, seed=seed)
        mask = BlockMask.from_dense(bits, block_size=block_size)
        assert mask.block_size == block_size
        assert torch.equal(mask.to_dense(), bits)
        assert_valid(mask)
        assert_canonical(mask)


@pytest.mark.parametrize("chunk", [1, 1 << 12, 1 << 15])
def test_from_dense_in_strips_and_groups_of_heads(chunk, monkeypatch):
    bits = random_bits(201, 150, batch=2, heads=5)
    whole = BlockMask.from_dense(bits, block_size=32)
    monkeypatch.setattr(mask_build, "CHUNK", chunk)
    assert BlockMask.from_dense(bits, block_size=32) == whole
    assert torch.equal(whole.to_dense(), bits)


@pytest.mark.parametrize(
    "shape", [(50,), (40, 50), (1, 50), (40, 1), (3, 40, 50), (1, 1, 50), (2, 1, 1, 50), (2, 3, 40, 1)]
)
def test_from_dense_broadcasts_any_dimension(shape):
    bits = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = BlockMask.from_dense(bits, q_len=40, kv_len=50, block_size=16)
    four = bits[(None,) * (4 - bits.dim())]
    assert torch.equal(mask.to_dense(), four.expand(-1, -1, 40, 50))
    assert (mask.batch, mask.heads) == four.shape[:2]
    assert_canonical(mask)


def test_from_dense_keeps_expanded_dimensions_broadcast():
    bits = torch.rand(1, 1, 40, 50) < 0.5
    mask = BlockMask.from_dense(bits.expand(8, 4, -1, -1), block_size=16)
    assert (mask.batch, mask.heads) == (1, 1)
    assert torch.equal(mask.to_dense(), bits)


def test_from_dense_reads_any_strides():
    bits = random_bits(70, 90).transpose(0, 1)[:, :, ::2].transpose(2, 3)
    assert torch.equal(BlockMask.from_dense(bits, block_size=32).to_dense(), bits)


def test_identical_tiles_are_stored_once():
    causal = torch.ones(4096, 4096, dtype=torch.bool).tril()
    mask = BlockMask.from_dense(causal)
    assert mask.tiles.shape[0] == 1 and mask.indices.shape[0] == 32 * 33 // 2
    assert mask.nbytes < 4096 * 4096 / 8 / 50


def test_all_visible_ragged_blocks_are_full():
    mask = BlockMask.from_dense(torch.ones(70, 33, dtype=torch.bool), block_size=32)
    assert (mask.tile_ids == -1).all() and mask.tiles.shape[0] == 0


def test_tiles_survive_a_hash_collision(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__or__", lambda a, b: torch.zeros_like(a), raising=True)  # every hash 0
    rows = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6]])
    first, inverse = mask_build.unique_rows(rows)
    assert torch.equal(rows[first][inverse], rows) and first.numel() == 3


def test_static_lists_have_shapes_that_depend_on_no_value():
    for bits in (random_bits(70, 90), torch.zeros(2, 3, 70, 90, dtype=torch.bool)):
        mask = BlockMask.from_dense(bits, block_size=(32, 16), static=True)
        assert mask.indices.shape == (2 * 3 * 3 * 6,) and mask.tiles.shape == (2 * 3 * 3 * 6, 32, 2)
        assert torch.equal(mask.to_dense(), bits)
        assert_valid(mask)
        assert mask.equivalent(BlockMask.from_dense(bits, block_size=(32, 16)))


@pytest.mark.parametrize(
    "given",
    [
        torch.ones(4, 4),
        torch.ones(4, 4, dtype=torch.uint8),
        torch.tensor(True),
        torch.ones(1, 1, 1, 2, 2).bool(),
        [[True]],
    ],
)
def test_from_dense_refuses_other_tensors(given):
    with pytest.raises(MaskError, match="bool tensor"):
        BlockMask.from_dense(given)


def test_from_dense_refuses_what_does_not_broadcast():
    with pytest.raises(MaskError, match="q_len="):
        BlockMask.from_dense(torch.ones(4, dtype=torch.bool))
    with pytest.raises(MaskError, match="broadcast"):
        BlockMask.from_dense(torch.ones(4, 5, dtype=torch.bool), q_len=3)
    with pytest.raises(MaskError, match="broadcast"):
        BlockMask.from_dense(torch.ones(4, 5, dtype=torch.bool), kv_len=7)


# --- from lists ----------------------------------------------------------------------------------------------------

VALID = {
    "indptr": [0, 2, 3, 3],
    "indices": [0, 2, 1],
    "tile_ids": [-1, 0, -1],
    "q_len": 40,
    "kv_len": 48,
    "block_size": 16,
}
TILE = torch.eye(16, dtype=torch.bool)[None]


def test_from_csr_places_blocks_and_tiles():
    mask = BlockMask.from_csr(**VALID, tiles=TILE)
    expected = torch.zeros(40, 48, dtype=torch.bool)
    expected[:16, :16] = True
    expected[:16, 32:48] = TILE[0]
    expected[16:32, 16:32] = True
    assert torch.equal(mask.to_dense()[0, 0], expected)
    assert mask.indptr.dtype == torch.int64 and mask.indices.dtype == mask.tile_ids.dtype == torch.int32


def test_from_csr_round_trips_and_takes_any_integers():
    mask = BlockMask.from_dense(random_bits(67, 90), block_size=(16, 32))
    parts = {"q_len": 67, "kv_len": 90, "block_size": (16, 32), "batch": 2, "heads": 3}
    for kind in (torch.int32, torch.int64):
        lists = (t.to(kind) for t in (mask.indptr, mask.indices))
        assert BlockMask.from_csr(*lists, tile_ids=mask.tile_ids.to(kind), tiles=mask.tiles, **parts) == mask
    bits = mask_build.unpack_bits(mask.tiles)
    lists = (t.tolist() for t in (mask.indptr, mask.indices))
    assert BlockMask.from_csr(*lists, tile_ids=mask.tile_ids.tolist(), tiles=bits, **parts) == mask


@pytest.mark.parametrize(
    "change, text",
    [
        ({"indptr": [1, 2, 3, 3]}, "start with 0"),
        ({"indptr": [0, 2, 1, 3]}, "never decrease"),
        ({"indptr": [0, -1, 3, 3]}, "never decrease"),
        ({"indptr": [0, 2, 3, 4]}, "end with the number of indices, 3"),
        ({"indptr": [0, 2, 2, 2]}, "end with the number of indices, 3"),
        ({"indptr": [0, 2, 3]}, "entries, got 3"),
        ({"indptr": []}, "entries, got 0"),
        ({"indptr": [0, 3]}, "entries, got 2"),
        ({"indptr": [0.0, 2.0, 3.0, 3.0]}, "indptr must be integers"),
        ({"indptr": None}, "indptr must be integers"),
        ({"indptr": "abc"}, "indptr must be integers"),
        ({"indptr": [[0, 2, 3, 3]]}, "with 1 dimension"),
        ({"indices": [0, 3, 1]}, "indices must lie in 0..2"),
        ({"indices": [-1, 2, 1]}, "indices must lie in 0..2"),
        ({"indices": [0, 2**32 + 1, 1]}, "indices must lie in 0..2"),
        ({"indices": [0, -(2**40), 1]}, "indices must lie in 0..2"),
        ({"indices": [2, 0, 1]}, "ascend"),
        ({"indices": [2, 2, 1]}, "twice"),
        ({"indices": torch.tensor([True, False, True])}, "indices must be integers"),
        ({"indices": torch.tensor([0.0, 2.0, 1.0])}, "indices must be integers"),
        ({"tile_ids": [-1, 0]}, "one entry for each of 3"),
        ({"tile_ids": [-1, 1, -1]}, "tile_ids must be -1"),
        ({"tile_ids": [-2, 0, -1]}, "tile_ids must be -1"),
        ({"tiles": None}, "tile_ids must be -1"),
        ({"tiles": torch.ones(1, 16, 8, dtype=torch.bool)}, r"bool tiles must be \(n, 16, 16\)"),
        ({"tiles": torch.ones(1, 16, 16, dtype=torch.uint8)}, r"tiles must be \(n, 16, 2\)"),
        ({"tiles": torch.ones(1, 16, 2)}, "tiles must be torch.uint8"),
        ({"tiles": torch.ones(16, 2, dtype=torch.uint8)}, "with 3 dimension"),
        ({"tiles": [[1]]}, "tiles must be a tensor"),
        ({"kv_len": 47}, "beyond"),
        ({"q_len": 15, "indptr": [0, 3], "indices": [0, 1, 2]}, "beyond|ascend|twice"),
        ({"q_len": -1}, "q_len must be an int"),
        ({"q_len": 40.0}, "q_len must be an int"),
        ({"kv_len": True}, "kv_len must be an int"),
        ({"kv_len": 2**31}, "kv_len must be an int"),
        ({"batch": -1}, "batch must be an int"),
        ({"heads": "2"}, "heads must be an int"),
        ({"batch": 2}, "entries, got 4"),
        ({"heads": 2}, "entries, got 4"),
        ({"block_size": 24}, "multiples of 16"),
        ({"block_size": 0}, "multiples of 16"),
        ({"block_size": (16, 272)}, "multiples of 16"),
        ({"block_size": (16, 16, 16)}, "pair"),
        ({"block_size": "16"}, "pair"),
        ({"window": (1,)}, "window must be"),
        ({"window": (-2, 0)}, "window must be"),
        ({"window": (0.5, 0)}, "window must be"),
        ({"window": 3}, "window must be"),
        ({"window": (1, 1), "window_offset": 0.0}, "window_offset must be an int"),
        ({"kv_lengths": [49]}, "0..48"),
        ({"kv_lengths": [-1]}, "0..48"),
        ({"kv_lengths": [2**40]}, "0..48"),
        ({"kv_lengths": [1.5]}, "kv_lengths must be integers"),
        ({"kv_lengths": [[1]]}, "with 1 dimension"),
        ({"batch": 2, "indptr": [0, 2, 3, 3, 3, 3, 3], "kv_lengths": [1, 2, 3]}, "for a batch of 2"),
    ],
)
def test_invalid_lists_raise_with_the_rule(change, text):
    with pytest.raises(MaskError, match=text):
        BlockMask.from_csr(**({**VALID, "tiles": TILE} | change))


def test_order_is_checked_only_inside_a_row():
    mask = BlockMask.from_csr([0, 1, 1, 2], [2, 0], q_len=48, kv_len=48, block_size=16)
    assert mask.density == pytest.approx(2 / 9)
    mask = BlockMask.from_csr([0, 1, 2, 2], [2, 2], q_len=48, kv_len=48, block_size=16)
    assert mask.density == pytest.approx(2 / 9)


def test_the_constructor_checks_types_as_well():
    good = BlockMask.from_csr(**VALID, tiles=TILE)
    fields = {field.name: getattr(good, field.name) for field in dataclasses.fields(good)}
    for change, text in [
        ({"indptr": None}, "come together"),
        ({"indices": good.indices.long()}, "torch.int32"),
        ({"indptr": good.indptr.int()}, "torch.int64"),
        ({"indices": good.indices.repeat(2)[::2]}, "contiguous"),
        ({"indices": good.indices.tolist()}, "must be a tensor"),
        ({"tiles": good.tiles.to("meta")}, "one device"),
        ({"kv_lengths": torch.tensor([3])}, "torch.int32"),
    ]:
        with pytest.raises(MaskError, match=text):
            BlockMask(**(fields | change))
    with pytest.raises(MaskError, match="leave both 1"):
        BlockMask(4, 4, heads=2)


def test_masks_cannot_be_changed():
    mask = BlockMask(4, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.q_len = 5
    with pytest.raises(TypeError):
        iter(mask)


# --- from lengths, predicates, documents ---------------------------------------------------------------------------


def test_from_lengths():
    mask = BlockMask.from_lengths([0, 3, 70], q_len=5, kv_len=70)
    assert mask.shape == (3, 1, 5, 70) and mask.indptr is None
    assert torch.equal(mask.to_dense(), seen_through(5, 70, lengths=torch.tensor([0, 3, 70])))
    assert mask.density == pytest.approx(73 / 210)


@sizes
def test_from_predicate_is_exact(q_len, kv_len, block_size):
    bits = random_bits(q_len, kv_len)
    mask = BlockMask.from_predicate(
        lambda b, h, i, j: bits[b, h, i, j], q_len=q_len, kv_len=kv_len, batch=2, heads=3, block_size=block_size
    )
    assert mask == BlockMask.from_dense(bits, block_size=block_size)


@sizes
def test_from_predicate_within_and_along_diagonals(q_len, kv_len, block_size):
    bits = random_bits(q_len, kv_len, batch=1, heads=1)
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    fn = lambda b, h, i, j: (i - j + h) % 5 < 2  # noqa: E731
    expected = torch.stack([fn(0, h, i, j) for h in range(2)])[None]
    sizes = {"q_len": q_len, "kv_len": kv_len, "block_size": block_size, "heads": 2}
    plain = BlockMask.from_predicate(fn, **sizes)
    assert_draws(plain, expected)
    assert BlockMask.from_predicate(fn, **sizes, shift_invariant=True) == plain
    for within in (BlockMask.from_dense(bits), BlockMask(q_len, kv_len).with_causal("top_left")):
        for shift_invariant in (False, True):
            mask = BlockMask.from_predicate(fn, **sizes, within=within, shift_invariant=shift_invariant)
            assert_draws(mask, expected & within.to_dense())
            assert_canonical(mask)


def test_from_predicate_asks_only_inside_and_within():
    asked = []
    within = BlockMask.from_csr([0, 1, 1, 2], [3, 0], q_len=40, kv_len=50, block_size=16)

    def visible(b, h, i, j):
        asked.append((i.shape[0], int(i.max()), int(j.max())))
        return (i + j) % 2 == 0

    mask = BlockMask.from_predicate(visible, q_len=40, kv_len=50, block_size=16, within=within)
    assert sum(n for n, _, _ in asked) <= 2 and max(i for _, i, _ in asked) < 40 and max(j for _, _, j in asked) < 50
    checkered = (torch.arange(40)[:, None] + torch.arange(50)) % 2 == 0
    assert_draws(mask, checkered & within.to_dense())
    with pytest.raises(MaskError, match="cannot be combined"):
        BlockMask.from_predicate(visible, q_len=41, kv_len=50, within=within)


@pytest.mark.parametrize("length, block_size", [(67, 16), (300, (32, 64)), (1, 128), (0, 16)])
def test_from_documents(length, block_size):
    generator = torch.Generator().manual_seed(3)
    packed = torch.randint(0, 5, (2, length), generator=generator).sort(1).values
    shuffled = packed.flip(1)[:, torch.randperm(length, generator=generator)]
    for ids in (packed, shuffled, packed[0]):
        mask = BlockMask.from_documents(ids, block_size=block_size)
        rows = ids if ids.dim() == 2 else ids[None]
        expected = rows[:, None, :, None] == rows[:, None, None, :]
        assert torch.equal(mask.to_dense(), expected)
        assert_valid(mask)
        assert_canonical(mask)
    with pytest.raises(MaskError, match="document ids"):
        BlockMask.from_documents(torch.zeros(1, 2, 3, dtype=torch.int64))


# --- what it says --------------------------------------------------------------------------------------------------


@sizes
def test_lists_windows_and_lengths_together(q_len, kv_len, block_size):
    for mask, expected in variants(q_len, kv_len, block_size):
        assert_draws(mask, expected)
        assert_valid(mask)
        share = expected.double().mean().item() if expected.numel() else 0.0
        assert mask.density == pytest.approx(share, abs=1e-12)
        alone = mask.explicit()
        assert alone.window is None and alone.kv_lengths is None
        assert_draws(alone, expected)
        assert_canonical(alone)
        assert alone.equivalent(mask)


@sizes
def test_block_density_counts_what_a_kernel_visits(q_len, kv_len, block_size):
    for mask, _ in variants(q_len, kv_len, block_size):
        q, k = mask.block_size
        listed = random_bits(q_len, kv_len) if mask.indptr is not None else torch.ones(1, 1, q_len, kv_len).bool()
        allowed = seen_through(
            q_len, kv_len, mask.window, mask.window_offset, None if mask.kv_lengths is None else mask.kv_lengths
        )
        pooled = []
        for bits in torch.broadcast_tensors(listed, allowed):
            padded = torch.nn.functional.pad(bits, (0, -kv_len % k, 0, -q_len % q))
            pooled.append(padded.unflatten(3, (-1, k)).unflatten(2, (-1, q)).any(5).any(3))
        visited = pooled[0] & pooled[1]
        assert mask.block_density == pytest.approx(visited.double().mean().item() if visited.numel() else 0.0)


def test_arrays_are_cached_and_complete():
    mask = BlockMask.from_dense(random_bits(67, 90), block_size=16).with_causal("top_left").with_lengths([5, 90])
    arrays = mask.arrays()
    assert arrays is mask.arrays(False) and arrays.t_indptr is None
    assert (arrays.window_left, arrays.window_right, arrays.block_q) == (-1, 0, 16)
    assert arrays.indices is mask.indices and arrays.kv_lengths is mask.kv_lengths
    full = mask.arrays(True)
    assert full.t_indices is mask.arrays(True).t_indices is mask.transposed()[1]
    assert BlockMask(4, 4).arrays(True) == BlockMask(4, 4).arrays()


@sizes
def test_transposed_lists_hold_the_same_blocks(q_len, kv_len, block_size):
    mask = BlockMask.from_dense(random_bits(q_len, kv_len), block_size=block_size)
    n_q, n_k = mask._grid.n_q, mask._grid.n_k
    t_indptr, t_indices, t_tile_ids = mask.transposed()
    assert (t_indptr.dtype, t_indices.dtype, t_tile_ids.dtype) == (torch.int64, torch.int32, torch.int32)
    assert t_indptr.numel() == 2 * 3 * n_k + 1 and t_indptr[-1] == mask.indices.numel()
    blocks, t_blocks = set(), set()
    for row, (start, stop) in enumerate(zip(mask.indptr[:-1].tolist(), mask.indptr[1:].tolist(), strict=True)):
        for e in range(start, stop):
            blocks.add((row // max(n_q, 1), row % n_q, int(mask.indices[e]), int(mask.tile_ids[e])))
    for row, (start, stop) in enumerate(zip(t_indptr[:-1].tolist(), t_indptr[1:].tolist(), strict=True)):
        assert (t_indices[start:stop].diff() > 0).all()
        for e in range(start, stop):
            t_blocks.add((row // max(n_k, 1), int(t_indices[e]), row % n_k, int(t_tile_ids[e])))
    assert blocks == t_blocks
    assert torch.equal(mask.swapped().to_dense(), mask.to_dense().mT)


def test_masks_with_the_same_lists_share_their_transpose():
    mask = BlockMask.from_dense(random_bits(67, 90), block_size=16)
    assert mask.with_causal("top_left").transposed()[0] is mask.transposed()[0]
    with pytest.raises(MaskError, match="nothing to transpose"):
        BlockMask(4, 4).transposed()


def test_to_dense_refuses_absurd_sizes():
    huge = BlockMask(2**20, 2**20)
    with pytest.raises(MaskError, match="max_pairs"):
        huge.to_dense()
    with pytest.raises(MaskError, match="max_pairs"):
        BlockMask(4, 4).to_dense(max_pairs=15)


# --- operators -----------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr("efficient_attn.mask_algebra.CHUNK", 1)
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


# --- FlexAttention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_len, kv_len, block_size", [s for s in SIZES if s[0] * s[1]])
def test_flex_round_trip(q_len, kv_len, block_size):
    for mask, bits in variants(q_len, kv_len, block_size):
        theirs = mask.to_flex()
        assert mask.block_size == theirs.BLOCK_SIZE and theirs.seq_lengths == (q_len, kv_len)
        again = BlockMask.from_flex(theirs)
        assert again.equivalent(mask)
        asked = flex_attention.create_mask(theirs.mask_mod, 2, 3, q_len, kv_len, device="cpu")
        assert torch.equal(asked, bits.expand(2, 3, -1, -1))


@pytest.mark.parametrize("block_size", [(128, 128), (32, 64), (512, 512), (48, 16), (20, 128), (8, 8)])
def test_from_flex_is_exact_for_any_block_size(block_size):
    documents = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(0)).sort().values

    def mods():
        yield lambda b, h, q, k: q >= k
        yield lambda b, h, q, k: (documents[q] == documents[k.clamp(max=299)]) & (h + b < 3)
        yield lambda b, h, q, k: torch.where(b == 0, q - k < 20, k % 3 == h)

    for mod in mods():
        theirs = flex_attention.create_block_mask(mod, 2, 3, 300, 400, device="cpu", BLOCK_SIZE=block_size)
        mask = BlockMask.from_flex(theirs)
        assert torch.equal(mask.to_dense(), flex_attention.create_mask(mod, 2, 3, 300, 400, device="cpu"))
        assert_valid(mask)
        assert_canonical(mask)


def test_from_flex_takes_full_blocks_as_they_are():
    counts, columns = torch.tensor([[[0, 1, 0]]], dtype=torch.int32), torch.zeros(1, 1, 3, 3, dtype=torch.int32)
    full_counts = torch.tensor([[[2, 0, 1]]], dtype=torch.int32)
    full = torch.tensor([[[[0, 2, 9], [0, 0, 0], [1, 0, 0]]]], dtype=torch.int32)  # past the count: undefined
    theirs = flex_attention.BlockMask.from_kv_blocks(
        counts,
        columns,
        full_counts,
        full,
        BLOCK_SIZE=16,
        mask_mod=lambda b, h, q, k: k > q + 1000,
        compute_q_blocks=False,
    )
    expected = torch.zeros(48, 48, dtype=torch.bool)
    expected[:16, :16] = expected[:16, 32:] = expected[32:, 16:32] = True
    assert torch.equal(BlockMask.from_flex(theirs).to_dense()[0, 0], expected)
    with pytest.raises(RuntimeError, match="sliced BlockMask"):
        BlockMask.from_flex(theirs[0])  # has lost the mask_mod that decides the partial block
    theirs.kv_num_blocks.zero_()
    assert torch.equal(BlockMask.from_flex(theirs[0]).to_dense()[0, 0], expected)


def test_from_flex_checks_what_it_reads():
    with pytest.raises(MaskError, match="flex_attention"):
        BlockMask.from_flex(torch.ones(3))
    counts, columns = torch.tensor([[[1]]], dtype=torch.int32), torch.tensor([[[[7]]]], dtype=torch.int32)
    theirs = flex_attention.BlockMask.from_kv_blocks(counts, columns, BLOCK_SIZE=16, compute_q_blocks=False)
    with pytest.raises(MaskError, match="outside"):
        BlockMask.from_flex(theirs)


def test_flex_attention_runs_under_our_mask():
    bits = random_bits(70, 90)
    bits[..., 0] = True
    mask = BlockMask.from_dense(bits, block_size=32).with_lengths([60, 90])
    q, k, v = (torch.randn(2, 3, n, 8) for n in (70, 90, 90))
    out = flex_attention.flex_attention(q, k, v, block_mask=mask.to_flex())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_dense())
    torch.testing.assert_close(out, expected)


# --- pictures ------------------------------------------------------------------------------------------------------


def test_repr_draws_a_small_picture():
    for mask, _ in variants(300, 130, (48, 112)):
        lines = repr(mask).splitlines()
        assert lines[0].startswith("BlockMask(shape=") and "density=" in lines[0]
        assert len(lines) <= 19 and all(len(line) <= 34 for line in lines[1:])
    picture = repr(BlockMask(64, 64).with_causal()).splitlines()[2:-1]
    assert picture[0][1] in "▒▓█" and picture[0][32] == " " and picture[-1][1] == "█"
    assert len(repr(BlockMask(0, 5)).splitlines()) == 1


def test_a_single_visible_pair_shows():
    bits = torch.zeros(3000, 3000, dtype=torch.bool)
    bits[1500, 2999] = True
    assert "░" in repr(BlockMask.from_dense(bits))
    assert "░" in repr(BlockMask(2**20, 2**20).with_window((0, 0)))


def test_large_pictures_agree_with_small_ones():
    from efficient_attn import mask_picture

    bits = random_bits(1024, 768, batch=1, heads=1)
    for mask in (
        BlockMask.from_dense(bits, block_size=32),
        BlockMask(1024, 768).with_window((200, 30), alignment="top_left"),
    ):
        exact = mask_picture.coverage(mask, 16, 24)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mask_picture, "EXACT_PAIRS", 0)
            coarse = mask_picture.coverage(mask, 16, 24)
        assert (exact - coarse).abs().max() < (1e-9 if mask.indptr is not None else 0.05)


def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    mask = BlockMask.from_dense(random_bits(67, 90), block_size=16)
    axes = mask.plot(batch=1, head=2)
    drawn = torch.from_numpy(axes.images[0].get_array().data.copy())
    assert torch.equal(drawn.bool(), random_bits(67, 90)[1, 2])
    assert mask.plot(ax=axes) is axes
    pyplot.close("all")
    with pytest.raises(MaskError, match="nothing to plot"):
        BlockMask(0, 3).plot()


# --- compilation ---------------------------------------------------------------------------------------------------


def weigh(x: Tensor, mask: BlockMask) -> Tensor:
    arrays = mask.arrays(True)
    return x * arrays.t_indices.sum() + arrays.indices.sum() * arrays.batch + arrays.window_right + mask.q_len


def test_compiled_functions_take_and_close_over_masks():
    x = torch.randn(8)
    mask = BlockMask.from_dense(random_bits(67, 67), block_size=16).with_causal()
    expected = weigh(x, copy.deepcopy(mask))
    assert torch.equal(torch.compile(weigh, backend="eager", fullgraph=True)(x, mask), expected)
    assert torch.equal(torch.compile(lambda x: weigh(x, mask), backend="eager", fullgraph=True)(x), expected)
    restrict = torch.compile(lambda x, m: weigh(x, m.with_causal()), backend="eager", fullgraph=True)
    assert torch.equal(restrict(x, mask), expected)
    assert not mask._transposed, "a traced call must not keep what it traced"


def test_from_dense_static_and_from_lengths_can_be_traced():
    bits = random_bits(67, 90)
    made = torch.compile(
        lambda bits, lengths: (BlockMask.from_dense(bits, block_size=16, static=True) & BlockMask.from_lengths(
            lengths, q_len=67, kv_len=90)).arrays(True)[4:],
        backend="eager", fullgraph=True,
    )(bits, torch.tensor([3, 90]))  # fmt: skip
    whole = (BlockMask.from_dense(bits, block_size=16, static=True).with_lengths([3, 90])).arrays(True)[4:]
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(made, whole, strict=True))


def test_lists_kept_in_inference_mode_still_train():
    mask = BlockMask.from_dense(random_bits(20, 20))
    with torch.inference_mode():
        mask.transposed()
    assert not mask.transposed()[0].is_inference()


def test_lists_of_a_transformation_are_not_kept():
    mask = BlockMask.from_dense(random_bits(20, 20)[:1, :1])
    seen = torch.func.grad(lambda x: (x * mask.transposed()[1].sum()).sum())(torch.ones(2))
    assert torch.equal(seen, mask.transposed()[1].sum().expand(2).float())
    assert not torch._C._functorch.is_functorch_wrapped_tensor(mask.transposed()[0])


# --- size and time -------------------------------------------------------------------------------------------------


def test_memory_of_builders_is_bounded():
    """At 16k x 16k a bool mask has 256 MiB; no builder may come near it."""
    program = """
import resource, torch
from efficient_attn import BlockMask
n = 16384
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
BlockMask.from_predicate(lambda b, h, i, j: (i >= j) & (i % 7 > j % 5), q_len=1024, kv_len=1024)
before = peak()
mask = BlockMask.from_predicate(lambda b, h, i, j: (i - j).abs() * 50 < n + j % 3, q_len=n, kv_len=n)
predicate = peak() - before
expanded = BlockMask.from_dense((torch.arange(n) % 3 > 0)[None, None, None].expand(4, 1, n, n))
dense = BlockMask.from_dense((torch.arange(n) % 3 > 0).expand(n, n))
combined = (mask & expanded) | ~mask.with_causal()
combined.density, repr(combined), combined.reblock(64)
print(predicate, peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    predicate, everything = map(float, result.stdout.split())
    assert predicate < 150 and everything < 220, result.stdout


def test_documents_of_128k_tokens_build_fast():
    ids = torch.arange(131072) // 1000
    BlockMask.from_documents(ids[:1000])
    start = time.perf_counter()
    mask = BlockMask.from_documents(ids).with_causal()
    elapsed = time.perf_counter() - start
    assert elapsed < 5.0 and mask.nbytes < 16 * 2**20
    assert mask.density == pytest.approx(131 * 1000 * 1001 / 2 / 131072**2 + 72 * 73 / 2 / 131072**2, rel=1e-9)
