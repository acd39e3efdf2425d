"""Rows whose scores are one large number and little besides: a bias of finfo.min over all padding, or -1e9.

A number that is added to a whole row changes nothing, so the truth is the same call without it. Nor may the rows beside
such a one change. `lse` cannot hold the log of the number of keys there, which no gradient may show.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from efficient_attn import BlockMask, attention

CONSTANTS = [sign * size for size in (0.0, 1e2, 1e3, 1e4, 1e6, 1e7, 1e8, 1e12, 1e20, 1e30, 1e38) for sign in (1, -1)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def truth(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, visible: Tensor) -> Tensor:
    """Plain attention in float64, on scores rounded as the sum with the bias is: its constant taken out exactly."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = (query.to(dtype) @ key.to(dtype).mT * query.shape[-1] ** -0.5).double()
    rounded = (scores.detach().to(dtype) + bias.to(dtype)).double() - bias.double()
    # The gradient is that of the exact scores; the value what is left of them beside the bias.
    scores = scores + (rounded - scores).detach()
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value.double()


def rows_of_constants(constants: list[float], rows: int, dtype: torch.dtype) -> Tensor:
    """(1, 1, rows, 1): the constants in turn, one a row."""
    return torch.tensor([constants[i % len(constants)] for i in range(rows)], dtype=dtype).view(1, 1, rows, 1)


def check(
    backend: str, device: torch.device, dtype: torch.dtype, bias: Tensor, Nk: int, mask: Callable | None = None
) -> None:
    torch.manual_seed(0)
    Nq = bias.shape[2]
    inputs = [torch.randn(1, 2, n, 16, dtype=dtype, device=device, requires_grad=True) for n in (Nq, Nk, Nk)]
    grad_out = torch.randn(1, 2, Nq, 16, dtype=dtype, device=device)
    visible = torch.ones(Nq, Nk, dtype=torch.bool) if mask is None else mask(Nq, Nk)
    visible = visible.to(device)
    full = bias.to(device).expand(1, 1, Nq, Nk).contiguous().requires_grad_()
    passed = None if mask is None else BlockMask.from_dense(visible, block_size=32)
    found = attention(*inputs, bias=full, mask=passed, backend=backend)
    *gradients, dbias = torch.autograd.grad(found, (*inputs, full), grad_out)

    leaves = [t.detach().double().requires_grad_() if dtype == torch.float64 else t for t in inputs]
    gold = truth(*leaves, full.detach(), visible)
    expected = torch.autograd.grad(gold, leaves, grad_out.double())
    allowed = {torch.float32: 2e-4, torch.float64: 1e-11, torch.bfloat16: 2e-2}[dtype]
    for name, ours, right in zip("oqkv", (found, *gradients), (gold, *expected), strict=True):
        error = (ours.double() - right.double()).norm() / (1e-30 + right.double().norm())
        assert error < allowed, f"{name}: relative error {float(error):.2g}"
    # What is added to a whole row has no effect: the gradients of its pairs cancel.
    assert dbias.sum(-1).abs().max() <= 64 * allowed * dbias.abs().max()


def skip_gpu_kernels(backend: str) -> None:
    if backend in ("triton", "cuda"):
        pytest.skip("scores are rounded in units of log2; see interpreted_kernels.py, and docs/contract.md, rule 8")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*map(str, CONSTANTS), "min", "max"])
def test_one_constant(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    skip_gpu_kernels(backend)
    info = torch.finfo(dtype)
    # The least number stays a number beside scores: the sum is rounded back to it.
    constant = {"min": info.min, "max": info.max}.get(name) or float(name)
    bias = torch.full((1, 1, 5, 1), constant, dtype=dtype)
    check(backend, device, dtype, bias, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairs", ["all", "tril", "blocks"])
def test_every_row_its_own_constant(pairs: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Many tiles of queries and keys, ordinary rows among the others, with and without lists of blocks."""
    skip_gpu_kernels(backend)
    info = torch.finfo(dtype)
    bias = rows_of_constants([*CONSTANTS, info.min, info.max], 150, dtype)
    masks: dict[str, Callable | None] = {
        "all": None,
        "tril": lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q),
        "blocks": lambda q, k: (torch.arange(q)[:, None] // 32 + torch.arange(k) // 32) % 2 == 0,
    }
    check(backend, device, dtype, bias, 200, masks[pairs])


def test_large_scores_without_a_bias(backend: str, device: torch.device) -> None:
    """Queries and keys whose products are all 1e8: the values are averaged, and share the gradient."""
    skip_gpu_kernels(backend)
    query, key = (torch.full((1, 1, 4, 4), 1e4, device=device) for _ in range(2))
    value = torch.eye(4, device=device)[None, None].requires_grad_()
    out = attention(query, key, value, backend=backend)
    torch.testing.assert_close(out, torch.full_like(out, 0.25))
    (gradient,) = torch.autograd.grad(out.sum(), value)
    torch.testing.assert_close(gradient, torch.ones_like(gradient))


def test_minus_infinity_still_masks(backend: str, device: torch.device) -> None:
    """finfo.min is a number, and a row of it an average; -inf is none, and a row of it 0."""
    skip_gpu_kernels(backend)
    q, k, v = (torch.ones(1, 1, 4, 4, device=device, requires_grad=True) for _ in range(3))
    bias = torch.full((1, 1, 4, 4), torch.finfo(torch.float32).min, device=device)
    bias[..., 1, :] = -torch.inf
    bias[..., 2, 1:] = -torch.inf
    out = attention(q, k, v, bias=bias, backend=backend)
    (gradient,) = torch.autograd.grad(out.sum(), v)
    assert torch.equal(out[0, 0, :, 0].cpu(), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(gradient[0, 0, :, 0].cpu(), torch.tensor([1.5, 0.5, 0.5, 0.5]))


def test_second_derivative(backend: str, device: torch.device) -> None:
    """Double backward replays the formula on slices of rows: it, too, is that of the call without the constant."""
    skip_gpu_kernels(backend)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 5, 4, dtype=torch.float64, device=device, requires_grad=True) for _ in range(3))

    def second(bias: Tensor | None) -> tuple[Tensor, ...]:
        out = attention(q, k, v, bias=bias, backend=backend)
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        return torch.autograd.grad(dq.square().sum(), (q, k, v))

    # float64 keeps 8 digits of the scores beside 1e7; an lse of it would keep as few of every weight
    bias = torch.full((1, 1, 5, 5), 1e7, dtype=q.dtype, device=device)
    for ours, right in zip(second(bias), second(None), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-7)
