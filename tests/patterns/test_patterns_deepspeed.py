"""DeepSpeed's layouts: tables derived by hand, and its rules written out again here, block by block."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from efficient_attn import InputError, InputTypeError, Pattern
from efficient_attn.patterns import (
    DeepSpeedBigBird,
    DeepSpeedBSLongformer,
    DeepSpeedFixed,
    DeepSpeedLocalSlidingWindow,
    DeepSpeedVariable,
    Dense,
    deepspeed,
)
from efficient_attn.patterns.deepspeed import from_config

B = 16


def layout(pattern: Pattern, blocks: int, heads: int = 1) -> Tensor:
    """int (heads, blocks, blocks); every visible block must be wholly visible."""
    n = blocks * B
    bits = pattern.block_mask(n, n, num_heads=heads).to_dense()[0].expand(heads, n, n)
    counts = bits.unflatten(2, (-1, B)).unflatten(1, (-1, B)).sum((2, 4))
    assert ((counts == 0) | (counts == B * B)).all()
    i = torch.arange(n)
    for head in range(heads):
        assert torch.equal(pattern.visible(i[:, None], i, n, n, head), bits[head])
    return (counts > 0).int()


def table(text: str) -> Tensor:
    return torch.tensor([[int(letter == "x") for letter in row] for row in text.split()])


# Derived by hand from the rules, 10 blocks each: the last window is cut short.
TABLES = [
    (
        DeepSpeedFixed(),  # windows of 4; the last block of each is global, in the short one the last block
        """xxxx...x.x xxxx...x.x xxxx...x.x xxxx...x.x
           ...xxxxx.x ...xxxxx.x ...xxxxx.x ...xxxxx.x
           ...x...xxx ...x...xxx""",
    ),
    (
        DeepSpeedFixed(attention="unidirectional", num_global_blocks=2),  # runs of two: the first sees one ahead
        """x......... xx........ xxxx...... xxxx......
           ..xxx..... ..xxxx.... ..xxxxxx.. ..xxxxxx..
           ..xx..xxxx ..xx..xxxx""",
    ),
    (
        DeepSpeedFixed(horizontal_global_attention=True, num_local_blocks=4, num_global_blocks=4),
        """xxxxxxxxxx xxxxxxxxxx xxxxxxxxxx xxxxxxxxxx
           xxxxxxxxxx xxxxxxxxxx xxxxxxxxxx xxxxxxxxxx
           xxxxxxxxxx xxxxxxxxxx""",
    ),
    (
        DeepSpeedVariable(local_window_blocks=(1, 2, 3), global_block_indices=(5,)),
        """x....x.... .xx..x.... .xx..x.... ...xxx....
           ...xxx.... ...xxx.... .....xxxx. .....xxxx.
           .....xxxx. .....x...x""",
    ),
    (
        DeepSpeedVariable(
            attention="unidirectional", global_block_indices=(1, 8), global_block_end_indices=(3, 99)
        ),
        """x......... xxx....... xxx....... xxxx......
           .xx.x..... .xx.xx.... .xx.xxx... .xx.xxxx..
           .xx.....xx .xx.....xx""",
    ),
    (
        DeepSpeedVariable(local_window_blocks=(5,), global_block_indices=(9, 12), horizontal_global_attention=True),
        """xxxxx....x xxxxx....x xxxxx....x xxxxx....x xxxxx....x
           .....xxxxx .....xxxxx .....xxxxx .....xxxxx xxxxxxxxxx""",
    ),
    (
        DeepSpeedBSLongformer(global_block_indices=(4,)),
        """xx..x..... xxx.x..... .xxxx..... ..xxx.....
           xxxxxxxxxx ....xxx... ....xxxx.. ....x.xxx.
           ....x..xxx ....x...xx""",
    ),
    (
        DeepSpeedBSLongformer(
            attention="unidirectional", global_block_indices=(2, 8), global_block_end_indices=(4, 9)
        ),
        """x......... xx........ xxx....... xxxx......
           ..xxx..... ..xxxx.... ..xx.xx... ..xx..xx..
           xxxxxxxxx. ..xx....xx""",
    ),
    (
        DeepSpeedBigBird(num_random_blocks=0, num_sliding_window_blocks=5, num_global_blocks=1),
        """xxxxxxxxxx xxxx...... xxxxx..... xxxxxx....
           x.xxxxx... x..xxxxx.. x...xxxxx. x....xxxxx
           x.....xxxx x......xxx""",
    ),
    (
        DeepSpeedLocalSlidingWindow(),
        """x......... xx........ .xx....... ..xx......
           ...xx..... ....xx.... .....xx... ......xx..
           .......xx. ........xx""",
    ),
    (
        DeepSpeedLocalSlidingWindow(attention="bidirectional", num_sliding_window_blocks=4),
        """xxx....... xxxx...... xxxxx..... .xxxxx....
           ..xxxxx... ...xxxxx.. ....xxxxx. .....xxxxx
           ......xxxx .......xxx""",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "text"), TABLES, ids=[str(k) + p.name for k, (p, _) in enumerate(TABLES)])
def test_tables(pattern, text):
    assert torch.equal(layout(pattern, 10)[0], table(text))


def test_each_head_may_have_its_own_global_run():
    pattern = DeepSpeedFixed(different_layout_per_head=True, num_different_global_patterns=3)
    found = layout(pattern, 10, heads=5)
    # Block 3, then 2, then 1 of each window of four; of the last two blocks the last, for all.
    for head, seen in enumerate(({3, 7, 9}, {2, 6, 9}, {1, 5, 9}, {3, 7, 9}, {2, 6, 9})):
        windows = [set(range(0, 4)), set(range(4, 8)), {8, 9}]
        for row in range(10):
            assert set(found[head, row].nonzero().flatten().tolist()) == windows[row // 4] | seen
    assert DeepSpeedFixed().block_mask(160, 160, num_heads=5).heads == 1


# --- the rules again, with loops and a table, and Python's global generator as DeepSpeed uses it ---


def transcribed(pattern, n: int, heads: int) -> Tensor:
    t = torch.zeros(heads, n, n, dtype=torch.int)
    one_way = pattern.attention == "unidirectional"
    apart = getattr(pattern, "different_layout_per_head", False)
    for h in range(heads if apart else 1):
        if getattr(pattern, "num_random_blocks", 0):
            for r in range(n):
                most = r + 1 if one_way and isinstance(pattern, DeepSpeedBigBird) else n
                for c in random.sample(range(most), pattern.num_random_blocks):
                    t[h, r, c] = 1
        if hasattr(pattern, "num_sliding_window_blocks"):
            for r in range(n):
                for c in range(n):
                    if abs(r - c) <= pattern.num_sliding_window_blocks // 2:
                        t[h, r, c] = 1
        lengths = getattr(pattern, "local_window_blocks", (getattr(pattern, "num_local_blocks", 0),))
        owner, k = [], 0
        while len(owner) < n and lengths[0]:
            owner += [k] * lengths[min(k, len(lengths) - 1)]
            k += 1
        for r in range(n) if owner else ():
            for c in range(n):
                if owner[r] == owner[c] and not (one_way and c > r):
                    t[h, r, c] = 1
        ranges = []
        if isinstance(pattern, DeepSpeedFixed):
            local, size = pattern.num_local_blocks, pattern.num_global_blocks
            first = local - (1 + h % pattern.num_different_global_patterns) * size
            for window in range(0, n, local):
                start = window + first if window + local <= n else min(window + first, n - size)
                ranges.append((start, start + size))
        elif isinstance(pattern, DeepSpeedBigBird):
            ranges.append((0, pattern.num_global_blocks))
        elif hasattr(pattern, "global_block_indices"):
            ends = pattern.global_block_end_indices or [s + 1 for s in pattern.global_block_indices]
            ranges += [(s, min(e, n)) for s, e in zip(pattern.global_block_indices, ends, strict=True) if s < n]
        lower = isinstance(pattern, DeepSpeedBigBird | DeepSpeedBSLongformer | DeepSpeedLocalSlidingWindow)
        across = getattr(pattern, "horizontal_global_attention", lower)
        for start, stop in ranges:
            t[h, start if one_way and not lower else 0 :, start:stop] = 1
            if across:
                t[h, start:stop] = 1
        if one_way and lower:
            t[h] = t[h].tril()
    return t if apart else t[:1].expand(heads, -1, -1)


@pytest.mark.parametrize("seed", range(25))
def test_random_configurations(seed):
    draw = random.Random(seed)
    direction = draw.choice(("bidirectional", "unidirectional"))
    apart = draw.random() < 0.5
    size, runs = draw.randint(1, 3), draw.randint(1, 4)
    starts = tuple(sorted(draw.sample(range(20), draw.randint(0, 4))))
    ends = tuple(s + draw.randint(1, 3) for s in starts) if draw.random() < 0.5 else None
    across = direction == "bidirectional" and draw.random() < 0.5
    width = draw.randint(1, 5)
    pattern = draw.choice([
        DeepSpeedFixed(B, apart, size * runs, size, direction, across, draw.randint(1, runs) if apart else 1),
        DeepSpeedVariable(B, apart, draw.randint(0, 3), (size, runs), starts, ends, direction, across, seed),
        DeepSpeedBigBird(B, apart, draw.randint(0, 1 if direction[0] == "u" else 4), width, size, direction, seed),
        DeepSpeedBSLongformer(B, apart, width, starts, ends, direction),
        DeepSpeedLocalSlidingWindow(B, width, direction),
    ])  # fmt: skip
    n, heads = draw.randint(5, 15), 3
    random.seed(seed)  # what DeepSpeed's draws start from
    assert torch.equal(layout(pattern, n, heads), transcribed(pattern, n, heads)), (pattern, n)


def test_lengths_need_not_be_a_multiple_of_the_block():
    for pattern in (DeepSpeedFixed(), DeepSpeedBigBird(), DeepSpeedBSLongformer(attention="unidirectional")):
        whole = pattern.block_mask(160, 160).to_dense()
        assert torch.equal(pattern.block_mask(150, 150).to_dense(), whole[..., :150, :150])


def test_draws_leave_the_global_generator_alone():
    random.seed(1)
    state = random.getstate()
    DeepSpeedBigBird(seed=123).block_mask(320, 320)
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        ({"mode": "dense", "block": 16}, Dense()),
        (
            {"mode": "fixed", "block": 32, "num_local_blocks": 8, "num_random_blocks": 3, "seed": 9},
            DeepSpeedFixed(block=32, num_local_blocks=8),
        ),
        ({"mode": "variable", "local_window_blocks": [2, 4]}, DeepSpeedVariable(local_window_blocks=(2, 4))),
        ({"mode": "bigbird", "num_global_blocks": 2}, DeepSpeedBigBird(num_global_blocks=2)),
        ({"mode": "bslongformer", "global_block_end_indices": None}, DeepSpeedBSLongformer()),
        ({"mode": "local_sliding_window", "attention": "bidirectional"},
         DeepSpeedLocalSlidingWindow(attention="bidirectional")),
    ],
)  # fmt: skip
def test_configurations_carry_over(config, pattern):
    assert from_config(config) == pattern


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: from_config({"mode": "spiral"}), "no mode 'spiral'"),
        (lambda: DeepSpeedFixed(num_different_global_patterns=2), "needs different_layout_per_head"),
        (lambda: DeepSpeedFixed(B, True, 4, 2, num_different_global_patterns=3), "a window has 2 runs"),
        (lambda: DeepSpeedFixed(attention="unidirectional", horizontal_global_attention=True), "looks ahead"),
        (lambda: DeepSpeedFixed(attention="both"), "attention must be one of"),
        (lambda: DeepSpeedFixed(different_layout_per_head=1), "is not true or false"),
        (lambda: DeepSpeedFixed(block=8), "block must be"),
        (lambda: DeepSpeedVariable(local_window_blocks=()), "at least one window"),
        (
            lambda: DeepSpeedVariable(global_block_indices=(1, 2), global_block_end_indices=(3,)),
            "larger number for each",
        ),
        (lambda: DeepSpeedVariable(global_block_indices=(4,), global_block_end_indices=(4,)), "larger number for each"),
        (lambda: DeepSpeedVariable(attention="unidirectional", horizontal_global_attention=True), "looks ahead"),
        (lambda: DeepSpeedBigBird(attention="unidirectional", num_random_blocks=2), "one block to choose from"),
        (lambda: DeepSpeedBigBird().block_mask(32, 32), "num_sliding_window_blocks=3 exceeds the 2 blocks"),
        (lambda: DeepSpeedBigBird(num_random_blocks=9).block_mask(64, 64), "num_random_blocks=9 exceeds the 4"),
        (lambda: DeepSpeedBSLongformer().block_mask(64, 80), "self-attention"),
    ],
)
def test_what_is_not_defined_raises(make, why):
    with pytest.raises((InputError, InputTypeError), match=why):
        make()


@pytest.mark.parametrize("lower", [False, True])
def test_rows_by_sorting_and_from_strips_are_the_same(lower, monkeypatch):
    monkeypatch.setattr(deepspeed, "STRIP", 100)  # strips of three rows
    draw = random.Random(0)
    for n in (1, 7, 31):
        rectangles = [
            tuple(slice(*sorted(draw.sample(range(n + 1), 2))) for _ in range(2)) for _ in range(draw.randint(1, 12))
        ]
        edges = deepspeed._edges(rectangles, n)
        drawn = torch.randint(n, (n, 2), generator=torch.Generator().manual_seed(n))
        seen = torch.zeros(n, n, dtype=torch.bool).scatter_(1, drawn, True)
        for rows, cols in rectangles:
            seen[rows, cols] = True
        seen = seen.tril() if lower else seen
        for rows_of in (deepspeed._sorted, deepspeed._strips):
            counts, columns = rows_of(edges, drawn, n, lower)
            assert torch.equal(counts, seen.sum(1)) and columns.dtype == torch.int32
            assert torch.equal(columns.long(), seen.nonzero()[:, 1])
