"""Linear attention in Triton's interpreter against the definition, run by test_triton.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from support.linear_cases import CASES, draw, run

from efficient_attn import UnsupportedError, linear_attention
from efficient_attn.backends.reference import linear_attention as reference_linear
from efficient_attn.backends.triton import linear_attention as triton_linear

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((c, torch.float32) for c in CASES), *((c, t) for c in CASES[2:10:3] for t in (torch.float16, torch.bfloat16))],
    ids=str,
)
def test_equals_the_definition(case: tuple, dtype: torch.dtype) -> None:
    """Against the definition in float64: a few roundings of float32, and one of the dtype at the end."""
    drawn = draw(case, dtype)
    ours = run(triton_linear, case, *drawn)
    gold = run(reference_linear, case, *(t.double() for t in drawn[:4]), drawn[4])
    plain = run(reference_linear, case, *drawn)
    for mine, same, exact in zip(ours, plain, gold, strict=True):
        assert mine.shape == exact.shape and mine.dtype == same.dtype
        error = (mine.double() - exact).abs().max()
        budget = 2 * (same.double() - exact).abs().max() + 4 * torch.finfo(mine.dtype).eps * exact.abs().max()
        assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"


def test_nan_is_not_met_before_its_time() -> None:
    """A causal sum sees no NaN of a later key; a gradient none of an earlier query."""
    case = (1, 2, 1, 150, 150, 16, 16, True, 0, False)
    drawn = draw(case, torch.float32)
    drawn[2][:, :, 75] = torch.nan
    drawn[2][:, :, 20, 3] = torch.inf
    drawn[3][:, :, 90] = torch.nan
    ours, expected = run(triton_linear, case, *drawn), run(reference_linear, case, *drawn)
    assert ours[0][:, :, :20].isfinite().all() and ours[0][:, :, 75:].isnan().any()
    assert torch.equal(ours[0].isfinite(), expected[0].isfinite())
    assert all(
        torch.equal(g[:, :, 91:].isfinite(), e[:, :, 91:].isfinite())
        for g, e in zip(ours[3:], expected[3:], strict=True)
    )


def test_nan_in_a_masked_key_changes_nothing() -> None:
    case = (2, 2, 2, 67, 67, 5, 3, True, 0, True)
    drawn = draw(case, torch.float32)
    clean = run(triton_linear, case, *drawn)
    alive = torch.rand(2, 67, generator=torch.Generator().manual_seed(1)) < 0.8
    for tensor in drawn[1:3]:
        tensor.masked_fill_(~alive[:, None, :, None], torch.nan)
    for before, after in zip(clean, run(triton_linear, case, *drawn), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_zero_normaliser_gives_zero() -> None:
    a = torch.zeros(1, 1, 40, 16)
    b, v = torch.rand(1, 1, 40, 16), torch.rand(1, 1, 40, 16)
    out, n, _ = triton_linear.linear_attention_forward(a, b, v, None, None, True, 0, "identity", 1.0)
    assert (out == 0).all() and (n == 0).all()


def test_by_name_and_through_autograd() -> None:
    a, b, v = (torch.rand(1, 2, 50, 8).requires_grad_() for _ in range(3))
    ours, theirs = (
        torch.autograd.grad(linear_attention(a, b, v, is_causal=True, backend=name).sin().sum(), (a, b, v))
        for name in ("triton", "reference")
    )
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    wide = torch.rand(1, 1, 8, 300)
    with pytest.raises(UnsupportedError, match="up to 256 features"):
        linear_attention(wide, wide, v[:, :1, :8], backend="triton")
