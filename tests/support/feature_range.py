"""Linear attention with positive features of any range against its definition in float64, on logarithms."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.methods import random_projection

# causal, Nq, Nk, offset, spread of queries and keys, how much keys grow along the sequence, whether keys are masked
CASES = [
    (True, 150, 150, 0, 1.0, 1.0, 0.0, True),
    (True, 150, 150, 0, 1.0, 8.0, 0.0, False),
    (True, 150, 150, 0, 8.0, 8.0, 0.0, True),
    (True, 40, 150, 110, 8.0, 8.0, 0.0, True),
    (True, 150, 40, -110, 8.0, 8.0, 0.0, False),
    (True, 150, 60, 0, 1.0, 8.0, 0.0, True),
    (True, 40, 150, 0, 30.0, 30.0, 0.0, False),
    (True, 90, 70, -20, 1.0, 1.0, -20.0, True),
    (True, 150, 150, 0, 1.0, 1.0, 20.0, False),
    (True, 1, 150, 149, 8.0, 8.0, 0.0, False),
    (True, 1, 1, 0, 60.0, 60.0, 0.0, False),
    (False, 50, 150, 0, 1.0, 8.0, 0.0, True),
    (False, 50, 150, 0, 30.0, 30.0, 0.0, False),
    (False, 70, 70, 0, 1.0, 1.0, -60.0, False),
]


def inputs_of(
    feature_map: str, case: tuple, heads: tuple[int, int] = (4, 2), dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """query, key, value, projection and key_mask."""
    _, Nq, Nk, _, of_queries, of_keys, growth, masked = case
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(2, *shape, generator=generator)  # noqa: E731
    q, k = normal(heads[0], Nq, 8) * of_queries, normal(heads[1], Nk, 8) * of_keys
    k = k + growth * torch.linspace(-1, 1, Nk)[:, None]
    v = normal(heads[1], Nk, 6)
    key_mask = torch.rand(2, Nk, generator=generator) < 0.6 if masked else None
    if key_mask is not None:
        key_mask[:, :3] = False
    projection = random_projection(13, 8, generator=generator) if feature_map.startswith("performer") else None
    return q.to(dtype), k.to(dtype), v.to(dtype), projection, key_mask


def definition(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor | None, key_mask: Tensor | None,
    is_causal: bool, offset: int, feature_map: str, scale: float,
) -> Tensor:  # fmt: skip
    """sum_j w_ij v_j / sum_j w_ij with log w_ij = logsumexp_f(log a_if + log b_jf)."""
    if feature_map == "elu":
        q, k = (torch.where(x > 0, x.clamp(min=0).log1p(), x) for x in (q, k))
    elif projection is not None:
        q, k = q * scale**0.5, k * scale**0.5
        W = projection.to(q.dtype)
        q, k = q @ W.mT, k @ W.mT - k.square().sum(-1, keepdim=True) / 2
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logs = torch.stack([torch.logsumexp(q[:, :, i : i + 1] + k, -1) for i in range(q.shape[2])], 2)
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    visible = (visible.tril(offset) if is_causal else visible).expand(logs.shape)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    return logs.masked_fill(~visible, -1e30).softmax(-1).masked_fill(~visible, 0.0) @ v


def check_range(
    backend: str, feature_map: str, case: tuple, dtype: torch.dtype, heads: tuple[int, int] = (4, 2)
) -> list[Tensor]:
    """Compare out and the gradients of one call; returns them."""
    is_causal, _, _, offset, *spreads, _ = case
    q, k, v, projection, key_mask = inputs_of(feature_map, case, heads, dtype)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    how = (projection, key_mask, is_causal, offset, feature_map, 0.25)
    out = torch.ops.efficient_attn.linear_attention_forward(
        *leaves, key_mask, projection, is_causal, offset, feature_map, 0.25, backend
    )[0]
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    gold = definition(*exact, *how)
    right = [gold.detach(), *torch.autograd.grad(gold, exact, grad_out.double())]
    # Exponents of some hundreds are rounded to 2^-16 in float32, and so is every weight; nor is a gradient that all but
    # cancels better than the terms of it.
    largest = max(abs(x) for x in spreads)
    allowed = 1e-9 if dtype == torch.float64 else {torch.float32: 1.0}.get(dtype, 100.0) * 1e-4 * max(1.0, largest)
    for name, ours, theirs in zip("oqkv", found, right, strict=True):
        scale = theirs.norm() + 1e-2 * (grad_out if name != "o" else theirs).norm()
        error = float((ours.double() - theirs).norm() / scale)
        assert error < allowed, f"{name}: relative error {error:.2g}, allowed {allowed:.2g}"
    return found
