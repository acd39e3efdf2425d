"""Calls of the operator of linear attention, for backends that are tested beside the conformance suite."""

from __future__ import annotations

import torch

# B, Hq, Hkv, Nq, Nk, F, Dv, causal, offset, masked keys
CASES = [
    (1, 1, 1, 64, 64, 16, 16, False, 0, False),
    (2, 2, 2, 67, 90, 5, 3, False, 0, True),
    (1, 4, 2, 70, 70, 16, 40, False, 0, False),
    (1, 1, 1, 64, 64, 16, 16, True, 0, False),
    (2, 2, 2, 67, 67, 5, 3, True, 0, True),
    (1, 4, 2, 150, 150, 16, 80, True, 0, True),
    (1, 2, 1, 45, 150, 20, 20, True, 105, True),
    (1, 1, 1, 150, 45, 20, 20, True, -105, False),
    (1, 1, 1, 100, 45, 20, 20, True, 3, False),
    (1, 1, 1, 40, 130, 20, 20, True, 500, False),
    (1, 1, 1, 40, 130, 20, 20, True, -500, False),
    (1, 1, 1, 40, 50, 200, 130, True, 10, False),
    (1, 1, 1, 700, 700, 16, 16, True, 0, False),
]


def draw(case: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    B, Hq, Hkv, Nq, Nk, F, Dv, *_ = case
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    a, b = (normal(B, Hq, Nq, F).abs() + 0.1).to(dtype), (normal(B, Hkv, Nk, F).abs() + 0.1).to(dtype)
    return [a, b, normal(B, Hkv, Nk, Dv).to(dtype), normal(B, Hq, Nq, Dv).to(dtype), normal(B, Hq, Nq)]


def run(module, case: tuple, a, b, v, grad_out, grad_n) -> list[torch.Tensor]:
    *_, causal, offset, masked = case
    alive = torch.rand(b.shape[0], b.shape[2], generator=torch.Generator().manual_seed(1)) < 0.8 if masked else None
    how = (causal, offset, "identity", 1.0)
    out, n, shift = module.linear_attention_forward(a, b, v, alive, None, *how)
    gradients = module.linear_attention_backward(grad_out, grad_n, a, b, v, alive, None, out, n, shift, *how)
    return [out, n, *gradients]
