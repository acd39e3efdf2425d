"""Edges of the walks over tiles, forward and backward, small: run by test_triton.py with TRITON_INTERPRET=1. What the
whole conformance suite finds, these find in seconds; windows that end beside a tile only these."""

from __future__ import annotations

import pytest
import torch
from support.kernel_checks import draw, results

from efficient_attn import BlockMask, SlidingWindow

pytestmark = pytest.mark.interpreter
N = 130


def check(Hq: int, Hkv: int, **options) -> None:
    inputs = [3 * draw(2, Hq, N, 16), draw(2, Hkv, N, 16, seed=1), draw(2, Hkv, N, 16, seed=2)]
    found = (results(name, inputs, draw(2, Hq, N, 16, seed=3), **options) for name in ("triton", "reference"))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("right", [0, 1, 2, 31, 33, 63, 65])
@pytest.mark.parametrize("left", [0, 33])
def test_windows_that_end_beside_a_tile(left: int, right: int) -> None:
    check(1, 1, mask=SlidingWindow(left=left, right=right))


@pytest.mark.parametrize("length", [1, 31, 64, 65, 129])
def test_lengths_that_end_beside_a_tile(length: int) -> None:
    check(1, 1, mask=BlockMask.from_lengths([length, N], q_len=N, kv_len=N))


def test_heads_with_lists_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    shown = (torch.rand(2, 4, 9, 9, generator=generator) < 0.5).repeat_interleave(16, 2).repeat_interleave(16, 3)
    check(4, 2, mask=BlockMask.from_dense(shown[..., :N, :N], block_size=16))


def test_grouped_heads_under_dropout() -> None:
    check(4, 2, dropout_p=0.3, dropout_seed=5)
