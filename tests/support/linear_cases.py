"""Calls of the operator of linear attention, and what kernels that run in a process of their own promise of them:
interpreted_linear.py has Triton's, emulated_linear.py CUDA's."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from efficient_attn import UnsupportedError, linear_attention
from efficient_attn.backends.reference import linear_attention as reference_linear
from support.feature_range import CASES as RANGES
from support.feature_range import check_range

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


def run(module: ModuleType, case: tuple, a, b, v, grad_out, grad_n) -> list[torch.Tensor]:
    *_, causal, offset, masked = case
    alive = torch.rand(b.shape[0], b.shape[2], generator=torch.Generator().manual_seed(1)) < 0.8 if masked else None
    how = (causal, offset, "identity", 1.0)
    out, n, shift = module.linear_attention_forward(a, b, v, alive, None, *how)
    gradients = module.linear_attention_backward(grad_out, grad_n, a, b, v, alive, None, out, n, shift, *how)
    return [out, n, *gradients]


class LinearChecks:
    """The tests of one backend, `module`, on `dtype`; a file of tests makes a class of its own of it.

    rtol, atol: the tolerance beside the reference; rounding: what products leave out at least, whatever the dtype.
    """

    backend: str
    module: ModuleType
    dtype: torch.dtype
    rtol: float
    atol: float
    rounding = 0.0

    def assert_same(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """That two results of the backend are the same."""
        assert torch.equal(a, b)

    def check_against_the_definition(self, case: tuple, dtype: torch.dtype) -> None:
        """Against the definition in float64: a few roundings of float32, and one of the dtype at the end."""
        drawn = draw(case, dtype)
        ours = run(self.module, case, *drawn)
        gold = run(reference_linear, case, *(t.double() for t in drawn[:4]), drawn[4])
        plain = run(reference_linear, case, *drawn)
        for mine, same, exact in zip(ours, plain, gold, strict=True):
            assert mine.shape == exact.shape and mine.dtype == same.dtype
            error = (mine.double() - exact).abs().max()
            eps = max(torch.finfo(mine.dtype).eps, self.rounding)
            budget = 2 * (same.double() - exact).abs().max() + 4 * eps * exact.abs().max()
            assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"

    def test_nan_is_not_met_before_its_time(self) -> None:
        """A causal sum sees no NaN of a later key; a gradient none of an earlier query."""
        case = (1, 2, 1, 150, 150, 16, 16, True, 0, False)
        drawn = draw(case, self.dtype)
        drawn[2][:, :, 75] = torch.nan
        drawn[2][:, :, 20, 3] = torch.inf
        drawn[3][:, :, 90] = torch.nan
        ours, expected = run(self.module, case, *drawn), run(reference_linear, case, *drawn)
        assert ours[0][:, :, :20].isfinite().all() and ours[0][:, :, 75:].isnan().any()
        assert torch.equal(ours[0].isfinite(), expected[0].isfinite())
        for mine, theirs in zip(ours[3:], expected[3:], strict=True):
            assert torch.equal(mine[:, :, 91:].isfinite(), theirs[:, :, 91:].isfinite())

    def test_nan_in_a_masked_key_changes_nothing(self) -> None:
        case = (2, 2, 2, 67, 67, 5, 3, True, 0, True)
        drawn = draw(case, self.dtype)
        clean = run(self.module, case, *drawn)
        alive = torch.rand(2, 67, generator=torch.Generator().manual_seed(1)) < 0.8
        for tensor in drawn[1:3]:
            tensor.masked_fill_(~alive[:, None, :, None], torch.nan)
        for before, after in zip(clean, run(self.module, case, *drawn), strict=True):
            self.assert_same(after, before)

    def test_zero_normaliser_gives_zero(self) -> None:
        a = torch.zeros(1, 1, 40, 16, dtype=self.dtype)
        b, v = (torch.rand(1, 1, 40, 16).to(self.dtype) for _ in range(2))
        out, n, _ = self.module.linear_attention_forward(a, b, v, None, None, True, 0, "identity", 1.0)
        assert (out == 0).all() and (n == 0).all()

    @pytest.mark.parametrize("feature_map", ["elu", "exp", "performer_softmax"])
    def test_exponents_of_any_range(self, feature_map: str) -> None:
        """With the kernels where one shift serves, and beyond."""
        for case in (RANGES[0], RANGES[2], RANGES[11]):
            check_range(self.backend, feature_map, case, self.dtype)

    def test_by_name_and_through_autograd(self) -> None:
        a, b, v = (torch.rand(1, 2, 50, 8).to(self.dtype).requires_grad_() for _ in range(3))
        ours, theirs = (
            torch.autograd.grad(linear_attention(a, b, v, is_causal=True, backend=name).sin().sum(), (a, b, v))
            for name in (self.backend, "reference")
        )
        for mine, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, expected, rtol=self.rtol, atol=self.atol)
        wide = torch.rand(1, 1, 8, 300).to(self.dtype)
        with pytest.raises(UnsupportedError, match="up to 256 features"):
            linear_attention(wide, wide, wide[..., :8], backend=self.backend)
