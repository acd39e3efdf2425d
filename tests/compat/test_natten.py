"""NATTEN's na1d, na2d and na3d against a definition in float64, which loops over queries."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from efficient_attn import InputError, InputTypeError
from efficient_attn.compat import natten

BY_AXES = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def along(x: int, n: int, kernel: int, stride: int, dilation: int, causal: bool) -> range:
    """The positions that x sees along an axis of n."""
    own, residue = x // dilation, x % dilation
    last = (n - 1 - residue) // dilation  # place of the last position with this residue
    group = own - own % stride
    if causal:
        leader = min(group + stride - 1, last)
        first, end = max(leader - kernel + 1, 0), own
    else:
        leader = min(group + stride // 2, last)
        first = min(max(leader - kernel // 2, 0), last + 1 - kernel)
        end = first + kernel - 1
    return range(residue + first * dilation, residue + end * dilation + 1, dilation)


def definition(q, k, v, windows, scale, more_k, more_v) -> tuple[Tensor, Tensor]:
    """Out and lse, query by query: its neighbours and the additional tokens in one softmax."""
    shape, groups = q.shape[1:-2], q.shape[-2] // k.shape[-2]
    outs, lses = [], []
    for x in itertools.product(*map(range, shape)):
        near = list(itertools.product(*(along(*axis) for axis in zip(x, shape, *windows, strict=True))))
        keys = torch.cat([torch.stack([k[(slice(None), *y)] for y in near], 1), more_k], 1)
        values = torch.cat([torch.stack([v[(slice(None), *y)] for y in near], 1), more_v], 1)
        keys, values = (t.repeat_interleave(groups, 2) for t in (keys, values))
        scores = torch.einsum("bhd,bjhd->bhj", q[(slice(None), *x)], keys) * scale
        outs.append(torch.einsum("bhj,bjhd->bhd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1))
    return torch.stack(outs, 1).view(*q.shape[:-1], v.shape[-1]), torch.stack(lses, 1).view(q.shape[:-1])


@pytest.mark.parametrize("seed", range(12))
def test_neighborhoods_with_strides_and_additional_keys(seed: int) -> None:
    choose = random.Random(seed)
    axes = 1 + seed % 3
    shape = tuple(choose.randint(2, {1: 60, 2: 9, 3: 5}[axes]) for _ in range(axes))
    kernel = tuple(choose.randint(1, min(n, 6)) for n in shape)
    stride = tuple(choose.randint(1, k) for k in kernel)
    dilation = tuple(choose.randint(1, n // k) for n, k in zip(shape, kernel, strict=True))
    causal = tuple(choose.random() < 0.3 for _ in shape)
    heads, groups, more = choose.choice((1, 2)), choose.choice((1, 3)), choose.choice((0, 1, 20))
    scale = choose.choice((None, 0.3))
    q, k, v = draw(0, 2, *shape, heads * groups, 8), draw(1, 2, *shape, heads, 8), draw(2, 2, *shape, heads, 5)
    more_k, more_v = draw(3, 2, more, heads, 8), draw(4, 2, more, heads, 5)
    leaves = [q, k, v, more_k, more_v]
    given = {"additional_keys": more_k, "additional_values": more_v} if more else {}
    found = BY_AXES[axes](q, k, v, kernel, stride, dilation, causal, scale, **given, return_lse=True)
    expected = definition(q, k, v, (kernel, stride, dilation, causal), scale or 8**-0.5, more_k, more_v)
    cotangents = [draw(5 + n, *t.shape).detach() for n, t in enumerate(expected)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    used = leaves if more else leaves[:3]
    pairs = zip(*(torch.autograd.grad(outs, used, cotangents) for outs in (found, expected)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_one_number_is_of_all_axes_and_defaults_are_natten_s() -> None:
    q = draw(0, 1, 7, 9, 2, 16)
    same = natten.na2d(q, q, q, (3, 3), (1, 1), (1, 1), (False, False))
    torch.testing.assert_close(natten.na2d(q, q, q, 3), same)
    torch.testing.assert_close(natten.na2d(q, q, q, kernel_size=[3, 3], is_causal=None, torch_compile=False), same)
    assert natten.na1d(q[:, :0, 0], q[:, :0, 0], q[:, :0, 0], 3).shape == (1, 0, 2, 16)


def test_a_grid_of_many_tokens_is_taken_in_parts_and_compiles() -> None:
    q, more = draw(0, 1, 32, 32, 1, 8).float().detach().requires_grad_(), draw(1, 1, 77, 1, 8).float().detach()
    options = {"additional_keys": more, "additional_values": more, "stride": 4}
    out = natten.na2d(q, q, q, 8, **options)
    seen = torch.tensor([[all(0 <= b - min(max(a // 4 * 4 + 2 - 4, 0), 24) < 8 for a, b in zip(x, y, strict=True))
                          for y in itertools.product(range(32), repeat=2)]
                         for x in itertools.product(range(32), repeat=2)])  # fmt: skip
    seen = torch.nn.functional.pad(seen, (0, 77), value=True)
    k = torch.cat([q.flatten(1, 2), more], 1).transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(q.flatten(1, 2).transpose(1, 2), k, k, seen)
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
    grad = torch.autograd.grad(out.square().sum(), q)[0]
    compiled = torch.compile(natten.na2d, backend="aot_eager", fullgraph=True)(q, q, q, 8, **options)
    torch.testing.assert_close(compiled, out)
    torch.testing.assert_close(torch.autograd.grad(compiled.square().sum(), q)[0], grad)


def tokens(count: int, heads: int) -> Tensor:
    return torch.zeros(1, count, heads, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "why"),
    [
        ({"stride": 4}, InputError, "stride may not exceed kernel"),
        ({"kernel_size": 9}, InputError, "the axis has 8"),
        ({"kernel_size": (3, 3, 3)}, InputError, "one value for each of 2 axes"),
        ({"q_tile": (8, 8)}, InputTypeError, "na2d takes no q_tile"),
        ({"additional_keys": tokens(4, 2)}, InputError, "come together"),
        ({"additional_keys": tokens(4, 1), "additional_values": tokens(4, 2)}, InputError, r"\(1, tokens, 2, 16\)"),
        ({"additional_keys": tokens(4, 2), "additional_values": tokens(3, 2)}, InputError, "additional_values 3"),
        ({"backend": "cutlass-fna"}, InputError, "cutlass-fna"),
    ],
)
def test_what_does_not_fit_is_named(arguments, error, why) -> None:
    q = torch.zeros(1, 8, 8, 2, 16)
    with pytest.raises(error, match=why):
        natten.na2d(q, q, q, **({"kernel_size": 3} | arguments))
    with pytest.raises(InputError, match="one axis for each letter"):
        natten.na3d(q, q, q, 3)
    assert math.isfinite(natten.na2d(q, q, q, 3).sum())
