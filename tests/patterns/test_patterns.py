"""Patterns against their definitions, written out again here token by token; JSON, caching, compilation, time."""

from __future__ import annotations

import copy
import json
import pickle
import random
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor

from efficient_attn import InputError, InputTypeError, MaskError, patterns
from efficient_attn.patterns import (
    LSH,
    Axial,
    BigBird,
    Causal,
    Combined,
    DeepSpeedBigBird,
    DeepSpeedBSLongformer,
    DeepSpeedFixed,
    DeepSpeedLocalSlidingWindow,
    DeepSpeedVariable,
    Dense,
    Dilated,
    Documents,
    Fixed,
    Longformer,
    Neighborhood,
    Pattern,
    PrefixLM,
    SlidingWindow,
    SortedBuckets,
    Strided,
    TopKBlocks,
    TopPBlocks,
    per_head,
)

LENGTHS = [(67, 67), (300, 300), (129, 257), (257, 100), (1, 1), (1, 50), (0, 20), (20, 0)]

# (pattern, its definition: (position of the query, that of the key) -> bool)
TOKEN_PATTERNS = [
    (Dense(), lambda i, j: True),
    (Causal(), lambda i, j: j <= i),
    (Causal("bottom_right"), lambda i, j: j <= i),
    (SlidingWindow(7, 30), lambda i, j: i - 7 <= j <= i + 30),
    (SlidingWindow(-1, 5), lambda i, j: j <= i + 5),
    (SlidingWindow(0, -1, "bottom_right"), lambda i, j: j >= i),
    (SlidingWindow(3, 2, "bottom_right"), lambda i, j: i - 3 <= j <= i + 2),
    (Dilated(4, 9, 3), lambda i, j: j in range(i - 12, i + 28, 3)),
    (Dilated(5, 0, 1), lambda i, j: i - 5 <= j <= i),
    (Strided(17), lambda i, j: j <= i and (i - j <= 17 or (i - j) % 17 == 0)),
    (Strided(40, causal=False), lambda i, j: abs(i - j) <= 40 or (i - j) % 40 == 0),
    (Strided(17, part="local"), lambda i, j: j <= i and j >= max(0, i - 17)),
    (Strided(17, part="summary"), lambda i, j: j <= i and (i - j) % 17 == 0),
    (Fixed(24, 5), lambda i, j: j <= i and (j // 24 == i // 24 or j % 24 in range(19, 24))),
    (Fixed(24, 5, 2), lambda i, j: j <= i and (j // 24 == i // 24 or j % 24 in range(9, 14))),
    (Fixed(150, 40, part="summary"), lambda i, j: j <= i and j % 150 in range(110, 150)),
    (Fixed(7, 7, part="local"), lambda i, j: j <= i and j // 7 == i // 7),
    (Fixed(37, 4, causal=False), lambda i, j: j // 37 == i // 37 or j % 37 in range(33, 37)),
    (PrefixLM(40), lambda i, j: j < 40 or j <= i),
    (PrefixLM(11, "bottom_right"), lambda i, j: j < 11 or j <= i),
    (
        Longformer(8, 1, (5, 130, 999)),
        lambda i, j: abs(i - j) <= 4 or bool({i, j} & {0, 5, 130}),
    ),
    (Longformer(20, 3), lambda i, j: abs(i - j) <= 10 or 0 <= i < 3 or j < 3),
    (Longformer(0, 150), lambda i, j: i == j or 0 <= i < 150 or j < 150),
    (Longformer(30, 0), lambda i, j: abs(i - j) <= 15),
    (Strided(9) & SlidingWindow(50, 0), lambda i, j: 0 <= i - j <= 50 and (i - j <= 9 or (i - j) % 9 == 0)),
    (SlidingWindow(3, 3) | Longformer(0, 2), lambda i, j: abs(i - j) <= 3 or 0 <= i < 2 or j < 2),
    (SlidingWindow(9, 0) | SlidingWindow(0, 4), lambda i, j: i - 9 <= j <= i + 4),
]


def drawn(definition, q_len: int, kv_len: int, offset: int = 0) -> Tensor:
    rows = [[bool(definition(i + offset, j)) for j in range(kv_len)] for i in range(q_len)]
    return torch.tensor(rows, dtype=torch.bool).view(q_len, kv_len)


def placed(pattern: Pattern, q_len: int, kv_len: int) -> list[tuple[Pattern, int]]:
    """The pattern with each alignment that it can have for these lengths, and the position of query 0."""
    offsets = {"top_left": 0, "bottom_right": kv_len - q_len}
    own = getattr(pattern, "alignment", None)
    return [(pattern.aligned(a), offset) for a, offset in offsets.items() if own in (None, a)]


@pytest.mark.parametrize("pattern, definition", TOKEN_PATTERNS, ids=[str(p) for p, _ in TOKEN_PATTERNS])
def test_masks_equal_the_definition(pattern, definition):
    for q_len, kv_len in LENGTHS:
        for aligned, offset in placed(pattern, q_len, kv_len):
            expected = drawn(definition, q_len, kv_len, offset)
            i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
            assert torch.equal(aligned.visible(i, j, q_len, kv_len).expand(q_len, kv_len), expected)
            for block_size in (None, 16, (48, 128)):
                mask = aligned.block_mask(q_len, kv_len, num_heads=2, block_size=block_size)
                assert mask.shape == (1, 1, q_len, kv_len)
                assert torch.equal(mask.to_dense()[0, 0], expected), (q_len, kv_len, offset)
                assert block_size is None or mask.block_size == ((16, 16) if block_size == 16 else block_size)


@pytest.mark.parametrize("pattern", [Dense(), Causal(), SlidingWindow(), Causal() & SlidingWindow(4, 4)], ids=str)
def test_windows_need_no_memory(pattern):
    mask = pattern.block_mask(10**9, 10**9)
    assert mask.nbytes == 0 and mask.indptr is None


@pytest.mark.parametrize(
    "pattern, definition",
    [
        (Documents((30,)), lambda i, j, ids: i // 30 == j // 30),
        (Documents((1, 100, 7, 59, 133)), lambda i, j, ids: ids[i] == ids[j]),
        (Documents((1, 100, 7, 59, 133), causal=True), lambda i, j, ids: ids[i] == ids[j] and j <= i),
    ],
    ids=["equal", "unequal", "causal"],
)
def test_documents(pattern, definition):
    ids = [k for k, length in enumerate((1, 100, 7, 59, 133)) for _ in range(length)]
    expected = drawn(lambda i, j: definition(i, j, ids), 300, 300)
    i = torch.arange(300)
    assert torch.equal(pattern.visible(i[:, None], i, 300, 300), expected)
    for block_size in (None, 16, (48, 128)):
        assert torch.equal(pattern.block_mask(300, 300, block_size=block_size).to_dense()[0, 0], expected)
    with pytest.raises(InputError, match="self-attention"):
        pattern.block_mask(300, 200)
    with pytest.raises(InputError, match="300 tokens together, the sequence has 100"):
        Documents((1, 299)).block_mask(100, 100)


def test_each_head_has_its_own_pattern():
    parts = [Strided(9, part="local"), SlidingWindow(4, 2), BigBird(16, 1, 1, 1), DeepSpeedBigBird(16, True, seed=5)]
    pattern = per_head(parts)
    for n in (50, 200):
        mask = pattern.block_mask(n, n, num_heads=8)
        assert mask.shape == (1, 8, n, n)
        i = torch.arange(n)
        for head in range(8):
            alone = parts[head % 4].block_mask(n, n, num_heads=8)
            own = alone.to_dense()[0, head if alone.heads == 8 else 0]
            assert torch.equal(mask.to_dense()[0, head], own)
            assert torch.equal(pattern.visible(i[:, None], i, n, n, head), own)
    with pytest.raises(InputError, match="6 heads cannot be shared out among 4 patterns"):
        pattern.block_mask(50, 50, num_heads=6)
    joined = (pattern & Causal() | SlidingWindow(1, 1)).block_mask(50, 50, num_heads=4).to_dense()
    near = (torch.arange(50)[:, None] - torch.arange(50)).abs() <= 1
    assert torch.equal(joined, pattern.block_mask(50, 50, num_heads=4).to_dense().tril() | near)


def test_random_options_equal_their_definition():
    """Options, lengths and block sizes drawn at random; `visible` is the definition, checked above and elsewhere."""
    draw = random.Random(0)
    for _ in range(60):
        n, m, s = draw.randint(1, 400), draw.randint(1, 400), draw.randint(1, 90)
        c = draw.randint(1, s)
        pattern = draw.choice([
            Fixed(s, c, draw.randint(0, s // c - 1), draw.random() < 0.5, draw.choice(("both", "local", "summary"))),
            Strided(s, draw.random() < 0.5, draw.choice(("both", "local", "summary"))),
            PrefixLM(s),
            Longformer(2 * s, draw.randint(0, 3), tuple(draw.sample(range(400), 5))),
            Dilated(draw.randint(0, 9), draw.randint(0, 9), draw.randint(1, 20)),
        ])  # fmt: skip
        size = (16 * draw.randint(1, 16), 16 * draw.randint(1, 16))
        pattern = pattern.aligned(draw.choice(("top_left", "bottom_right")))
        expected = pattern.visible(torch.arange(n)[:, None], torch.arange(m), n, m)
        assert torch.equal(pattern.block_mask(n, m, block_size=size).to_dense()[0, 0], expected), (pattern, n, m, size)


# --- BigBird ---


def blocks_of(pattern: BigBird, n: int) -> list[set[int]]:
    """The visible key blocks of each query block; every visible block must be wholly visible."""
    b = pattern.block
    bits = pattern.block_mask(n, n).to_dense()[0, 0]
    padded = torch.nn.functional.pad(bits, (0, -n % b, 0, -n % b))
    counts = padded.unflatten(1, (-1, b)).unflatten(0, (-1, b)).sum((1, 3))
    sizes = torch.tensor([min(b, n - r) for r in range(0, n, b)])
    assert ((counts == 0) | (counts == sizes[:, None] * sizes)).all()
    return [set(row.nonzero().flatten().tolist()) for row in counts]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 5, "global_blocks": 3, "random_blocks": 2},
        {"window": 1, "global_blocks": 0, "random_blocks": 0},
        {"global_blocks": 1, "random_blocks": 100},
        {"window": 99, "random_blocks": 1},
        {"global_blocks": 50},
    ],
    ids=str,
)
def test_bigbird_equals_the_paper(options):
    pattern = BigBird(block=16, seed=3, **options)
    first, last = (pattern.global_blocks + 1) // 2, pattern.global_blocks // 2
    for n in (330, 150, 400, 10):
        blocks = -(-n // 16)
        for r, seen in enumerate(blocks_of(pattern, n)):
            everything = set(range(blocks))
            if r < first or r >= blocks - last:
                assert seen == everything
                continue
            window = {c for c in everything if abs(c - r) <= pattern.window // 2}
            globals_ = {c for c in everything if c < first or c >= blocks - last}
            assert window | globals_ <= seen
            others = everything - window - globals_
            assert len(seen & others) == min(pattern.random_blocks, len(others))


def test_bigbird_draws_are_seeded_spread_and_stable():
    n = 16 * 200
    rows = blocks_of(BigBird(block=16), n)
    assert rows != blocks_of(BigBird(block=16, seed=1), n)
    drawn = [c for r, seen in enumerate(rows[1:-1], 1) for c in seen - {0, 199, r - 1, r, r + 1}]
    assert len(drawn) == 3 * 198
    counts = torch.bincount(torch.tensor(drawn), minlength=200)[1:-1]
    assert counts.max() <= 12 and (counts == 0).sum() < 40  # Poisson with mean 3: P(0) = 5 %
    assert abs(sum(drawn) / len(drawn) - 99.5) < 10
    # The draw itself, so that no platform or version can change a trained model's mask unnoticed.
    assert sorted(rows[100] - {0, 199, 99, 100, 101}) == [28, 64, 142]


def test_bigbird_draws_every_free_block_equally_often():
    hits = torch.zeros(12)
    for seed in range(300):
        for c in blocks_of(BigBird(block=16, window=1, global_blocks=0, random_blocks=4, seed=seed), 192)[0]:
            hits[c] += 1
    expected = 300 * 4 / 11
    assert hits[0] == 300 and ((hits[1:] - expected).abs() < 5 * (expected * 7 / 11) ** 0.5).all()


# --- options and JSON ---

ALL = [pattern for pattern, _ in TOKEN_PATTERNS] + [
    BigBird(),
    BigBird(16, 5, 1, 2, 7) & Causal() | Dense(),
    per_head(
        [Documents((3, 4)), Neighborhood((3, 4), (3, 2), causal=(True, False)), Axial((3, 4)) & TopPBlocks(mass=0.3)]
    ),
    DeepSpeedVariable(global_block_indices=(1, 5), global_block_end_indices=(3, 6)),
    TopKBlocks(fraction=0.125, summary="minmax"),
    LSH(shared_qk=True, chunk=32) | SortedBuckets(),
]


@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_json_pickle_and_copies_round_trip(pattern):
    text = pattern.to_json()
    assert Pattern.from_json(text) == pattern and Pattern.from_json(json.loads(text)) == pattern
    for again in (pickle.loads(pickle.dumps(pattern)), copy.deepcopy(pattern)):
        assert again == pattern and hash(again) == hash(pattern)


def test_json_leaves_out_defaults():
    assert Pattern.from_json('{"method": "bigbird"}') == BigBird()
    for name, cls in patterns.PATTERNS.items():
        assert Pattern.from_json({"method": name}) == cls()


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "object with a 'method'"),
        ("[]", "object with a 'method'"),
        ("{}", "object with a 'method'"),
        ('{"method": 3}', "object with a 'method'"),
        ('{"method": "no"}', "no pattern 'no'"),
        ('{"method": "__import__"}', "no pattern '__import__'"),
        ('{"method": "bigbird", "blok": 64}', "no option 'blok'"),
        ('{"method": "dense", "name": "x"}', "no option 'name'"),
        ('{"method": "bigbird", "block": 65}', "multiple of 16"),
        ('{"method": "bigbird", "block": 512}', "multiple of 16"),
        ('{"method": "bigbird", "block": "64"}', "not an integer"),
        ('{"method": "bigbird", "block": 64.0}', "not an integer"),
        ('{"method": "bigbird", "window": 4}', "odd"),
        ('{"method": "bigbird", "seed": -1}', "seed must be >= 0"),
        ('{"method": "bigbird", "random_blocks": 1e99}', "not an integer"),
        ('{"method": "bigbird", "random_blocks": 99999999999}', "random_blocks must be from 0 to"),
        ('{"method": "sliding_window", "left": true}', "left=True is not an integer"),
        ('{"method": "sliding_window", "left": -2}', "left must be >= -1 .-1: unlimited."),
        ('{"method": "sliding_window", "alignment": "middle"}', "alignment must be one of"),
        ('{"method": "causal", "alignment": ["top_left"]}', "is not a word"),
        ('{"method": "dilated", "dilation": 0}', "dilation must be >= 1"),
        ('{"method": "strided", "stride": 0}', "stride must be >= 1"),
        ('{"method": "strided", "causal": 1}', "not true or false"),
        ('{"method": "longformer", "window": 7}', "even"),
        ('{"method": "longformer", "global_tokens": null}', "global_tokens=None is not an integer"),
        ('{"method": "combined"}', "at least one"),
        ('{"method": "combined", "parts": "dense"}', "dense is no pattern"),
        ('{"method": "combined", "parts": [1]}', "1 is no pattern"),
        ('{"method": "combined", "operator": "xor", "parts": [{"method": "dense"}]}', "operator must be"),
        ('{"method": "combined", "parts": [' * 20 + '{"method": "dense"}' + "]}" * 20, "deep"),
    ],
)
def test_bad_json_raises(text, why):
    with pytest.raises((InputError, InputTypeError), match=why):
        Pattern.from_json(text)


def test_patterns_combine_only_with_patterns():
    assert Dense() & Causal() == Combined("and", (Dense(), Causal()))
    for other in (3, None, torch.ones(2, 2, dtype=torch.bool)):
        with pytest.raises(TypeError):
            Dense() & other
        with pytest.raises(TypeError):
            Dense() | other


@pytest.mark.parametrize("pattern", [Dense(), BigBird(), Longformer() & Causal()], ids=str)
def test_bad_lengths_raise(pattern):
    for q_len, kv_len, block_size in [(-1, 4, None), (4, 2**40, None), (4, 4.0, None), (4, 4, 17)]:
        with pytest.raises(MaskError):
            pattern.block_mask(q_len, kv_len, block_size=block_size)


# --- caching, compilation, time ---


def test_lists_are_kept_whatever_mode_asks_first():
    pattern = BigBird(block=16, seed=12345)
    with torch.inference_mode():
        mask = pattern.block_mask(100, 100)
    assert not mask.indices.is_inference() and not mask.transposed()[0].is_inference()
    assert pattern.block_mask(100, 100) is mask is BigBird(block=16, seed=12345).block_mask(100, 100, device="cpu")
    assert pattern.block_mask(101, 101) is not mask
    with torch.device("meta"):
        assert BigBird(block=16, seed=54321).block_mask(100, 100).device.type == "cpu"
    outside = Longformer(6, 1).block_mask(50, 50).arrays(True).t_indices.sum()
    inside = torch.vmap(lambda x: x * Longformer(6, 2).block_mask(50, 50).arrays(True).t_indices.sum())(torch.ones(3))
    assert inside.shape == (3,) and outside >= 0


def weigh(x: Tensor, pattern: Pattern) -> Tensor:
    arrays = pattern.block_mask(x.shape[0], x.shape[0]).arrays(True)
    lists = [t.float().sum() for t in arrays if isinstance(t, Tensor)]
    return x * sum(lists, torch.zeros(())) + arrays.window_right


@pytest.mark.parametrize("dynamic", [False, True])
def test_patterns_inside_a_compiled_function(dynamic):
    torch._dynamo.reset()

    def program(x):
        return weigh(x, BigBird(16)) + weigh(x, Longformer(8, 2)) + weigh(x, SlidingWindow(3, 4))

    compiled = torch.compile(program, backend="eager", fullgraph=True, dynamic=dynamic)
    for n in (100, 130):
        x = torch.randn(n)
        torch.testing.assert_close(compiled(x), program(x))


def test_a_combined_pattern_inside_a_compiled_function():
    pattern = BigBird(16) & Causal()
    arrays = torch.compile(
        lambda x: pattern.block_mask(100, 100).arrays(True).t_indices + x, backend="eager", fullgraph=True
    )
    explicit = pattern.block_mask(100, 100).explicit()
    assert torch.equal(arrays(torch.zeros((), dtype=torch.int32)), explicit.transposed()[1])


def test_the_compiled_operator_is_sound():
    torch.library.opcheck(
        patterns.pattern_lists, (Longformer(alignment="top_left").to_json(), 300, 200, 1, 64, 64, "cpu")
    )


@pytest.mark.parametrize(
    "pattern",
    [
        SlidingWindow(),
        Dilated(),
        Strided(),
        Fixed(),
        Longformer(global_indices=(70000,)),
        PrefixLM(),
        Documents(),
        BigBird(),
        Neighborhood((256, 512)),
        Neighborhood((256, 512), (13,), (4,), prefix=0),
        Axial((256, 512)),
        DeepSpeedFixed(64),
        DeepSpeedVariable(),
        DeepSpeedBigBird(),
        DeepSpeedBSLongformer(),
        DeepSpeedLocalSlidingWindow(),
        Longformer() & BigBird() & Causal(),
        per_head([SlidingWindow(), BigBird()]),
    ],
    ids=lambda pattern: pattern.name,
)
def test_128k_tokens_build_fast_and_small(pattern):
    start = time.process_time()  # not the wall clock: other processes may share the core
    mask = pattern.block_mask(131072, 131072, num_heads=2)
    elapsed = time.process_time() - start
    assert elapsed < 3.0  # each takes less than 1 s of an idle core, most 0.1 to 0.5 s
    assert mask.nbytes < 32 * 2**20 and mask.density < {"prefix_lm": 0.51, "deepspeed_fixed": 0.26}.get(
        pattern.name, 0.07
    )


def test_long_lists_are_transposed_when_a_backward_asks(monkeypatch):
    pattern = BigBird(block=16, seed=99)
    monkeypatch.setattr(patterns.base, "MANY_BLOCKS", 10)
    mask = pattern.block_mask(200, 200)
    assert not mask._kept and mask.arrays(True).t_indices is mask.transposed()[1]


def test_building_at_128k_takes_memory_for_the_blocks_only():
    code = """
import resource, torch
from efficient_attn.patterns import *
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
torch.arange(10).sort(); before = peak()
for pattern in (Longformer(), BigBird(), Documents(), Axial((256, 512)), Neighborhood((256, 512)), Fixed(), Strided()):
    pattern.block_mask(131072, 131072)
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 700  # MiB; the pairs are 2 GiB of bits, and blocks 1024 x 1024


def test_the_module_draws_every_pattern():
    run = [sys.executable, "-W", "ignore", "-m", "efficient_attn.patterns"]
    output = subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout
    for cls in (*patterns.PATTERNS.values(), Combined, patterns.PerHead):
        assert f"{cls.__name__}(" in output
    assert output.count("└") == output.count("BlockMask(") >= len(patterns.PATTERNS)
