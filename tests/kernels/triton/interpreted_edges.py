"""Edges of the walks over tiles, forward and backward, small: run by test_triton.py with TRITON_INTERPRET=1. What the
whole conformance suite finds, these find in seconds; windows that end beside a tile only these."""

from __future__ import annotations

import pytest
import torch
from support.kernel_checks import draw, results

from efficient_attn import BlockMask, SlidingWindow, attention, parse

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


def test_full_blocks_that_a_length_cuts() -> None:
    """The plan calls them clean: only a length, which it does not know, hides pairs of them."""
    shown = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril().repeat_interleave(64, 2).repeat_interleave(64, 3)
    mask = BlockMask.from_dense(shown[..., :N, :N], block_size=64)
    assert mask.tiles.shape[0] < mask.indices.numel()
    check(1, 1, mask=mask.with_lengths([33, 65]))


def test_heads_with_lists_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    shown = (torch.rand(2, 4, 9, 9, generator=generator) < 0.5).repeat_interleave(16, 2).repeat_interleave(16, 3)
    check(4, 2, mask=BlockMask.from_dense(shown[..., :N, :N], block_size=16))


def test_grouped_heads_under_dropout() -> None:
    check(4, 2, dropout_p=0.3, dropout_seed=5)


@pytest.mark.parametrize("shape", ["rows", "keys"])
@pytest.mark.parametrize("mean", [None, "heads", "mean"])
def test_rows_whose_bias_is_one_large_number(shape: str, mean: str | None) -> None:
    """finfo.min over all that a row sees, as over padding, is an average; beside such a row an ordinary one."""
    size = torch.tensor([torch.finfo(torch.float32).min, 0.0, -1e9, 3e38, 1e20])
    q, k, v = draw(1, 4, 40, 16), draw(1, 2, 40, 16, seed=1), draw(1, 2, 40, 16, seed=2)
    bias = size[torch.arange(40) % 5][None, None, :, None].repeat(1, 1, 1, 40)
    options: dict = {"dropout_p": 0.2, "dropout_seed": 3}
    if shape == "keys":  # padding on the left: its rows see nothing else, by causality
        bias = torch.where(torch.arange(40) < 9, torch.finfo(torch.float32).min, 0.0)[None, None, None]
        options = {"is_causal": True, "causal_alignment": "top_left"}
    found = []
    for name in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, bias)]
        if mean is None:
            out = attention(*leaves[:3], bias=leaves[3], backend=name, **options)
        else:
            call = {"backend": name, "need_weights": True if mean == "heads" else "mean", **options}
            out = torch.cat([t.flatten() for t in parse("dense").attend(*leaves[:3], bias=leaves[3], **call)])
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        found.append((out.detach(), *torch.autograd.grad(out, leaves, cotangent)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
