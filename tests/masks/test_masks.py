"""BlockMask against its definition as a bool tensor: builders, rules, what it says, compilation, limits."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
import time

import pytest
import torch
from support.mask_cases import assert_canonical, assert_draws, assert_valid, random_bits, seen_through, sizes, variants
from torch import Tensor

from efficient_attn import BlockMask, MaskError
from efficient_attn.masks import lists as mask_build

# --- from bool tensors ---


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


# --- from lists ---

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


# --- from lengths, predicates, documents ---


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


# --- what it says ---


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
    n_q, n_k = mask.grid.n_q, mask.grid.n_k
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


# --- compilation ---


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
    assert not mask._kept, "a traced call must not keep what it traced"


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


# --- size and time ---


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
