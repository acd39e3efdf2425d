"""Neighbourhoods and axes of grids against their definitions, written out again here coordinate by coordinate."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from efficient_attn import InputError
from efficient_attn.patterns import Axial, Neighborhood


def one_axis(x: int, n: int, kernel: int, dilation: int, causal: bool, stride: int = 1) -> set[int]:
    """What x sees along an axis: the window is built by walking, among the positions of its residue.

    A stride group, a run of `stride` of them, sees what its leader does: its last query on a causal axis, of which
    nobody sees the future, and else that in its middle, to the right of it if the group is even. The last group may be
    cut, and its last query leads it where the leader is cut off.
    """
    group = [y for y in range(n) if y % dilation == x % dilation]
    place = group.index(x)
    together = [p for p in range(len(group)) if p // stride == place // stride]
    if causal:
        window = group[max(0, together[-1] - kernel + 1) : together[-1] + 1]
        return {y for y in window if y <= x}
    leader = together[min(stride // 2, len(together) - 1)]
    first = leader - kernel // 2
    while first < 0:
        first += 1
    while first + kernel > len(group):
        first -= 1
    return set(group[first : first + kernel])


def on_grid(shape, prefix, sees) -> Tensor:
    """The mask of sees(query coordinates, key coordinates), prefix tokens first."""
    tokens = list(itertools.product(*map(range, shape)))
    n = prefix + len(tokens)
    mask = torch.ones(n, n, dtype=torch.bool)
    for i, x in enumerate(tokens):
        mask[prefix + i, prefix:] = torch.tensor([sees(x, y) for y in tokens])
    return mask


def agrees(pattern, expected: Tensor) -> None:
    lengths = expected.shape
    i, j = map(torch.arange, lengths)
    assert torch.equal(pattern.visible(i[:, None], j, *lengths), expected), pattern
    for block_size in (None, 16, (48, 128)):
        assert torch.equal(pattern.block_mask(*lengths, block_size=block_size).to_dense()[0, 0], expected), pattern


@pytest.mark.parametrize("seed", range(24))
def test_neighborhoods_equal_the_definition(seed):
    draw = random.Random(seed)
    axes = draw.choice((1, 2, 2, 2, 3))
    shape = tuple(draw.randint(2, {1: 300, 2: 20, 3: 7}[axes]) for _ in range(axes))
    kernel = tuple(draw.randint(1, min(n, 9)) for n in shape)
    dilation = tuple(draw.randint(1, n // k) for n, k in zip(shape, kernel, strict=True))
    causal = tuple(draw.random() < 0.3 for _ in shape)
    prefix = draw.choice((0, 0, 1, 5))
    stride = tuple(draw.randint(1, k) for k in kernel) if seed % 3 else (1,) * axes
    additional = draw.choice((0, 1, 70)) if seed % 2 else 0
    pattern = Neighborhood(shape, kernel, dilation, causal, prefix, stride=stride, additional_keys=additional)
    options = list(zip(shape, kernel, dilation, causal, stride, strict=True))
    sets = [[one_axis(x, *option) for x in range(option[0])] for option in options]
    expected = on_grid(shape, prefix, lambda x, y: all(b in s[a] for a, b, s in zip(x, y, sets, strict=True)))
    agrees(pattern, torch.nn.functional.pad(expected, (0, additional), value=True))


def test_a_stride_group_sees_what_its_leader_sees():
    rows = Neighborhood(kernel=(5,), stride=(3,), axes=1).block_mask(11, 11).to_dense()[0, 0]
    seen = [row.nonzero().flatten().tolist() for row in rows]
    assert seen[0] == seen[1] == seen[2] == [0, 1, 2, 3, 4]  # the leader is 1, at the border
    assert seen[3] == seen[4] == seen[5] == [2, 3, 4, 5, 6]
    assert seen[6] == seen[8] == [5, 6, 7, 8, 9] and seen[9] == seen[10] == [6, 7, 8, 9, 10]  # 10 leads 9, 10
    rows = Neighborhood(kernel=(4,), stride=(3,), axes=1, causal=(True,)).block_mask(8, 8).to_dense()[0, 0]
    assert [row.nonzero().flatten().tolist() for row in rows[3:]] == [
        [2, 3],
        [2, 3, 4],
        [2, 3, 4, 5],
        [4, 5, 6],
        [4, 5, 6, 7],
    ]


def test_windows_that_do_not_overlap_are_those_of_swin():
    pattern = Neighborhood((12, 8), 4, stride=4)
    tile = [(x // 4, y // 4) for x in range(12) for y in range(8)]
    agrees(pattern, torch.tensor([[a == b for b in tile] for a in tile]))


def test_a_window_is_shifted_at_the_border_not_cut():
    rows = Neighborhood(kernel=(4,), axes=1).block_mask(10, 10).to_dense()[0, 0]
    seen = [row.nonzero().flatten().tolist() for row in rows]
    assert seen[0] == seen[1] == seen[2] == [0, 1, 2, 3]  # an even kernel looks further to the left
    assert seen[5] == [3, 4, 5, 6] and seen[8] == seen[9] == [6, 7, 8, 9]
    assert (Neighborhood(kernel=(3, 5)).block_mask(64, 64).to_dense().sum(-1) == 15).all()


@pytest.mark.parametrize("part", ["both", "rows", "columns"])
@pytest.mark.parametrize(("size", "prefix"), [((9, 14), 0), ((20, 17), 3), ((3, 100), 1), ((150, 2), 40), ((1, 5), 0)])
def test_axes_equal_the_definition(size, prefix, part):
    for causal in (False, True):

        def sees(x, y, causal=causal):
            same = {"both": x[0] == y[0] or x[1] == y[1], "rows": x[0] == y[0], "columns": x[1] == y[1]}[part]
            return same and (not causal or y <= x)

        agrees(Axial(size, part, causal, prefix), on_grid(size, prefix, sees))


def test_without_a_size_the_sequence_is_a_square_or_a_line():
    assert Neighborhood(prefix=1).block_mask(197, 197) == Neighborhood((14, 14), prefix=1).block_mask(197, 197)
    assert Axial().block_mask(400, 400) == Axial((20, 20)).block_mask(400, 400)
    assert Neighborhood(axes=1).block_mask(50, 50) == Neighborhood((50,)).block_mask(50, 50)
    for pattern in (Neighborhood(axes=1), Neighborhood(), Axial()):
        assert pattern.block_mask(0, 0).shape == (1, 1, 0, 0)
    assert Neighborhood(axes=1, additional_keys=3).block_mask(0, 3).shape == (1, 1, 0, 3)


@pytest.mark.parametrize(
    ("pattern", "lengths", "why"),
    [
        (Neighborhood(), (50, 50), "no square image; say size=HEIGHTxWIDTH"),
        (Axial(prefix=1), (64, 64), "no square image"),
        (Neighborhood((5, 5)), (26, 26), "size 5x5 with prefix=0 is a sequence of 25 tokens; got 26"),
        (Neighborhood((5, 5)), (25, 26), "self-attention; got 25 queries and 26 keys"),
        (Axial(), (25, 36), "self-attention"),
        (Neighborhood((7, 9), (3, 5), (2, 2)), (63, 63), "5 with dilation 2 spans 10 positions; the axis has 9"),
        (Neighborhood(axes=1, prefix=5), (3, 3), "prefix=5 exceeds the 3 tokens"),
        (Neighborhood((5, 5), 3, additional_keys=4), (25, 25), "of the 25 tokens, 29 in all; got 25"),
    ],
)
def test_lengths_that_do_not_fit_raise(pattern, lengths, why):
    with pytest.raises(InputError, match=why):
        pattern.block_mask(*lengths)
