"""Linear attention in Triton's interpreter against the definition, run by test_triton.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from support.linear_cases import CASES, LinearChecks

from efficient_attn.backends.triton import linear_attention as triton_linear

pytestmark = pytest.mark.interpreter


def nearly(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


CHECKS = LinearChecks("triton", triton_linear, torch.float32, 0.0, {"rtol": 1e-4, "atol": 1e-5}, nearly)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((c, torch.float32) for c in CASES), *((c, t) for c in CASES[2:10:3] for t in (torch.float16, torch.bfloat16))],
    ids=str,
)
def test_equals_the_definition(case: tuple, dtype: torch.dtype) -> None:
    CHECKS.equals_the_definition(case, dtype)


def test_nan_is_not_met_before_its_time() -> None:
    CHECKS.nan_is_not_met_before_its_time()


def test_nan_in_a_masked_key_changes_nothing() -> None:
    CHECKS.nan_in_a_masked_key_changes_nothing()


def test_zero_normaliser_gives_zero() -> None:
    CHECKS.zero_normaliser_gives_zero()


def test_by_name_and_through_autograd() -> None:
    CHECKS.by_name_and_through_autograd()
