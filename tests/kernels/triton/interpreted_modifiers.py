"""Soft caps, sinks and biases by relative position on the Triton kernels, small: run by test_triton.py with
TRITON_INTERPRET=1. The whole conformance suite, with more of them, is `make test-triton`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.kernel_checks import draw
from torch import Tensor

from efficient_attn import ALiBi, BlockMask, LowRankBias, RelativeBias, SlidingWindow, T5Bias, attention, parse

pytestmark = pytest.mark.interpreter


def check(Nq: int, Nk: int, softcap: float | None = None, sinks: Tensor | None = None, **more: Any) -> list[Tensor]:
    """Out, lse and all gradients are those of the reference; `bias` is a pair of a class and its tensors, or a list."""
    parts = more.pop("bias", [])
    shared = [draw(2, 4, Nq, 16), draw(2, 2, Nk, 16, seed=1), draw(2, 2, Nk, 16, seed=2)]
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in shared]
        own = None if sinks is None else sinks.clone().requires_grad_()
        made: list[Any] = []
        learned = [] if own is None else [own]
        for kind, *tensors in parts:
            learned += [t.clone().requires_grad_() for t in tensors]
            made.append(kind(*learned[-len(tensors) :]))
        out, lse = attention(
            *leaves, bias=made or None, softcap=softcap, sinks=own, backend=backend, return_lse=True, **more
        )
        generator = torch.Generator().manual_seed(5)
        cotangents = [torch.randn(t.shape, generator=generator) for t in (out, lse)]
        empty = lse == -torch.inf
        gradients = torch.autograd.grad((out, lse.masked_fill(empty, 0.0)), [*leaves, *learned], cotangents)
        found.append([out, lse, *gradients])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)
    return found[0]


def test_lists_of_blocks_under_everything_at_once() -> None:
    """Diagonals of tiles that leave the lists at both ends, rows without a key, dropout and lengths."""
    shown = torch.rand(1, 4, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    shown[:, :, 1] = False
    bits = shown.repeat_interleave(32, 2).repeat_interleave(32, 3)[..., :70, :100]
    mask = BlockMask.from_dense(bits, block_size=32).with_lengths([100, 33])
    check(
        70, 100, softcap=2.0, sinks=torch.randn(4), mask=mask, dropout_p=0.2, dropout_seed=3,
        causal_alignment="bottom_right",
        bias=[(RelativeBias, draw(4, 81)), (ALiBi, draw(2, 4).abs() / 8), (torch.clone, draw(1, 4, 1, 100, seed=9))],
    )  # fmt: skip


@pytest.mark.parametrize("Nq", [1, 3])
def test_few_queries_whose_keys_are_shared_out(Nq: int) -> None:
    check(
        Nq, 300, softcap=2.0, sinks=torch.randn(4), bias=[(RelativeBias, draw(4, 81))], causal_alignment="bottom_right"
    )


def test_t5_buckets_and_low_rank_factors() -> None:
    named: dict[str, Any] = {"is_causal": True, "causal_alignment": "bottom_right"}
    check(70, 90, bias=[(T5Bias, draw(32, 4)), (LowRankBias, draw(70, 3), draw(1, 2, 90, 3))], **named)


def test_no_keys_leave_the_sinks() -> None:
    check(5, 0, sinks=torch.randn(4), causal_alignment="top_left", bias=[(ALiBi, torch.ones(4))])
    nothing = BlockMask.from_csr([0, 0], [], q_len=5, kv_len=9, block_size=16)
    check(5, 9, sinks=torch.randn(4), mask=nothing)


def test_a_table_hides_by_minus_infinity_and_not_by_the_least_number() -> None:
    table = torch.zeros(4, 5)
    table[:, -1] = -torch.inf
    q, k, v = draw(1, 4, 70, 16), draw(1, 4, 70, 16, seed=1), draw(1, 4, 70, 16, seed=2)
    spoilt = v.clone()
    spoilt[:, :, -1] = torch.nan
    out = attention(q, k, spoilt, bias=RelativeBias(table), softcap=1.0, backend="triton")
    expected = attention(q, k, v, mask=SlidingWindow(left=-1, right=1), softcap=1.0, backend="triton")
    torch.testing.assert_close(out[:, :, :-2], expected[:, :, :-2])
    assert out[:, :, -2:].isnan().all()
    least = RelativeBias(torch.full((4, 3), torch.finfo(torch.float32).min))
    out = attention(q, k, v, bias=least, backend="triton")
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand(out.shape))


@pytest.mark.parametrize("mean", [True, "mean"])
def test_rows_whose_bias_is_one_large_number(mean: bool | str) -> None:
    """Their lse has no digits left: gradients and weights are made from the scores again."""
    size = torch.full((4, 1), -1e20)
    check(20, 70, softcap=2.0, sinks=torch.full((4,), -3e38), bias=[(RelativeBias, size)], causal_alignment="top_left")
    q, k = draw(1, 4, 20, 16), draw(1, 4, 70, 16, seed=1)
    given: dict[str, Any] = {"bias": RelativeBias(size), "need_weights": mean, "causal_alignment": "top_left"}
    found = [parse("dense").attend(q, k, k, backend=name, **given)[1] for name in ("triton", "reference")]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(found[0], torch.full_like(found[0], 1 / 70))
