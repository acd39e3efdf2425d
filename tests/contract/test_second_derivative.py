"""The derivative of the backward walks visited pairs only, in O(n) memory (efficient_attn/ops/second_derivative.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_attn import BigBird, BlockMask, SlidingWindow, attention
from efficient_attn.ops import second_derivative

pytestmark = pytest.mark.filterwarnings("ignore:Input #")


class Sizes(TorchDispatchMode):
    """The elements that operators make: the most at a time, and all together."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:  # no view
                self.most = max(self.most, tensor.numel())
                self.total += tensor.numel()
        return result


def double_backward_sizes(n: int, mask: Any, dtype: torch.dtype = torch.float32) -> Sizes:
    leaves = [torch.randn(1, 2, n, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    first = torch.autograd.grad(attention(*leaves, mask=mask).square().sum(), leaves, create_graph=True)
    loss = sum(g.square().sum() for g in first)
    with Sizes() as sizes:
        torch.autograd.grad(loss, leaves)
    return sizes


@pytest.mark.parametrize("mask", [SlidingWindow(20, 20), BigBird(block=16, window=3)], ids=str)
def test_time_and_memory_follow_the_visited_pairs(mask: Any) -> None:
    short, long = double_backward_sizes(512, mask), double_backward_sizes(2048, mask)
    assert long.most < 2048 * 2 * 700  # an n x n tensor has 2048 * 2 * 2048
    assert long.total < 6 * short.total  # quadratic work would be 16 times


def test_dense_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_derivative, "SCORES", 2**14)
    assert double_backward_sizes(2048, None).most <= 2048 * 2 * 64


def masks(case: str) -> Any:
    if case == "window":
        return SlidingWindow(3, 2, alignment="bottom_right")
    if case == "lists of heads":
        bits = torch.rand(1, 4, 37, 41, generator=torch.Generator().manual_seed(1)) < 0.3
        bits[:, :, 5] = False  # a row without a key
        return BlockMask.from_dense(bits, block_size=16)
    if case == "lists of the batch and lengths":
        bits = torch.rand(2, 1, 37, 41, generator=torch.Generator().manual_seed(2)) < 0.5
        padding = BlockMask.from_lengths([41, 18], q_len=37, kv_len=41, block_size=(16, 32))
        return BlockMask.from_dense(bits, block_size=(16, 32)) & padding
    if case == "window within lists":
        blocks = BlockMask.from_csr([0, 2, 3, 5], [0, 2, 1, 0, 2], q_len=37, kv_len=41, block_size=16)
        return blocks & BlockMask(37, 41).with_causal("bottom_right")
    if case == "lengths":
        return BlockMask.from_lengths([0, 30], q_len=37, kv_len=41)
    return None


@pytest.mark.parametrize("extra", ["", "bias", "bias of heads", "dropout"])
@pytest.mark.parametrize(
    "case", ["dense", "window", "lists of heads", "lists of the batch and lengths", "window within lists", "lengths"]
)
def test_gradgradcheck(case: str, extra: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(4)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    leaves = [leaf(2, 4, 37, 3), leaf(2, 2, 41, 3), leaf(2, 2, 41, 2)]
    if extra.startswith("bias"):
        leaves.append(leaf(4, 37, 41) if extra == "bias of heads" else leaf(2, 1, 1, 41))
    mask = masks(case)

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attention(
            *tensors[:3], bias=tensors[3] if len(tensors) > 3 else None, mask=mask, return_lse=True, backend=backend,
            dropout_p=0.3 if extra == "dropout" else 0.0, dropout_seed=5,
        )  # fmt: skip
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradgradcheck(call, leaves, nondet_tol=0.0, fast_mode=True)
