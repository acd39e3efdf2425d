"""What test_linear_attention.py does not ask of the CUDA kernels, run by test_cuda_host.py in the host twin."""

from __future__ import annotations

import pytest
import torch
from support.linear_cases import CASES, draw, run

from efficient_attn import UnsupportedError, linear_attention
from efficient_attn.backends.cuda import attention as cuda
from efficient_attn.backends.cuda import linear_attention as cuda_linear
from efficient_attn.backends.reference import linear_attention as reference_linear

pytestmark = pytest.mark.interpreter
CAUSAL = (1, 2, 1, 150, 150, 16, 16, True, 0, False)


def against_the_definition(case: tuple, dtype: torch.dtype) -> None:
    """Every result within the rounding of its dtype; of the normaliser the products leave out 2^-20 too."""
    drawn = draw(case, dtype)
    ours = run(cuda_linear, case, *drawn)
    gold = run(reference_linear, case, *(t.double() for t in drawn[:4]), drawn[4])
    plain = run(reference_linear, case, *drawn)
    for mine, same, exact in zip(ours, plain, gold, strict=True):
        assert mine.shape == exact.shape and mine.dtype == same.dtype
        error = (mine.double() - exact).abs().max()
        eps = max(torch.finfo(mine.dtype).eps, 2.0**-20)
        budget = 2 * (same.double() - exact).abs().max() + 4 * eps * exact.abs().max()
        assert error <= budget, f"error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_given_features_give_the_definition(case: tuple, dtype: torch.dtype) -> None:
    against_the_definition(case, dtype)


def test_nan_is_not_met_before_its_time() -> None:
    """A causal sum sees no NaN of a later key; a gradient none of an earlier query."""
    drawn = draw(CAUSAL, torch.bfloat16)
    drawn[2][:, :, 75] = torch.nan
    drawn[2][:, :, 20, 3] = torch.inf
    drawn[3][:, :, 90] = torch.nan
    ours, expected = run(cuda_linear, CAUSAL, *drawn), run(reference_linear, CAUSAL, *drawn)
    assert ours[0][:, :, :20].isfinite().all() and ours[0][:, :, 75:].isnan().any()
    assert torch.equal(ours[0].isfinite(), expected[0].isfinite())
    assert all(
        torch.equal(g[:, :, 91:].isfinite(), e[:, :, 91:].isfinite())
        for g, e in zip(ours[3:], expected[3:], strict=True)
    )


def test_nan_in_a_masked_key_changes_nothing() -> None:
    case = (2, 2, 2, 67, 67, 5, 3, True, 0, True)
    drawn = draw(case, torch.bfloat16)
    clean = run(cuda_linear, case, *drawn)
    alive = torch.rand(2, 67, generator=torch.Generator().manual_seed(1)) < 0.8
    for tensor in drawn[1:3]:
        tensor.masked_fill_(~alive[:, None, :, None], torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(clean, run(cuda_linear, case, *drawn), strict=True))


def test_zero_normaliser_gives_zero() -> None:
    a = torch.zeros(1, 1, 40, 16).bfloat16()
    b, v = torch.rand(1, 1, 40, 16).bfloat16(), torch.rand(1, 1, 40, 16).bfloat16()
    out, n, _ = cuda_linear.linear_attention_forward(a, b, v, None, None, True, 0, "identity", 1.0)
    assert (out == 0).all() and (n == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_sums_are_float32(is_causal: bool) -> None:
    one = torch.ones(1, 1, 2000, 1, dtype=torch.bfloat16)
    out, n = linear_attention(one, one, one, is_causal=is_causal, return_normaliser=True, backend="cuda")
    assert n.dtype == torch.float32 and n.max() == 2000  # bfloat16 sums stop at 256
    assert out.dtype == torch.bfloat16 and (out == 1).all()


def test_the_same_bits_under_every_schedule() -> None:
    drawn = draw(CAUSAL, torch.bfloat16)
    found = []
    for schedule in range(4):
        cuda.kernels().set_schedule(schedule)
        found.append(run(cuda_linear, CAUSAL, *drawn))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("features", [64, 128, 256])
def test_no_bank_conflict(features: int) -> None:
    case = (1, 2, 1, 130, 130, features, 64, True, 0, False)
    cuda.kernels().reset_counters()
    run(cuda_linear, case, *draw(case, torch.bfloat16))
    counted = {name: c for name, c in cuda.kernels().counters().items() if isinstance(c, dict)}
    assert not any(c["conflicts"] for c in counted.values()), counted
    assert all(counted[name]["calls"] for name in ("ldmatrix", "ldmatrix.trans", "mma.bf16", "st.shared.128"))


def test_by_name_and_through_autograd() -> None:
    a, b, v = (torch.rand(1, 2, 50, 8).bfloat16().requires_grad_() for _ in range(3))
    ours, theirs = (
        torch.autograd.grad(linear_attention(a, b, v, is_causal=True, backend=name).sin().sum(), (a, b, v))
        for name in ("cuda", "reference")
    )
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-2, atol=2e-2)
    wide = torch.rand(1, 1, 8, 300).bfloat16()
    with pytest.raises(UnsupportedError, match="up to 256 features"):
        linear_attention(wide, wide, wide[..., :8], backend="cuda")
    with pytest.raises(UnsupportedError, match="these tensors are float32"):
        linear_attention(*(torch.rand(1, 1, 8, 8) for _ in range(3)), backend="cuda")
