"""Linear attention in Triton's interpreter against the definition, run by test_triton.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from support.linear_cases import CASES, LinearChecks

from efficient_attn.backends.triton import linear_attention as triton_linear

pytestmark = pytest.mark.interpreter


class TestLinearAttention(LinearChecks):
    backend, module, dtype = "triton", triton_linear, torch.float32
    rtol, atol = 1e-4, 1e-5

    def assert_same(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """The same up to numpy, whose products may differ in a last bit with the place of their operands in memory."""
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        ("case", "dtype"),
        [
            *((c, torch.float32) for c in CASES),
            *((c, t) for c in CASES[2:10:3] for t in (torch.float16, torch.bfloat16)),
        ],
        ids=str,
    )
    def test_equals_the_definition(self, case: tuple, dtype: torch.dtype) -> None:
        self.check_against_the_definition(case, dtype)
