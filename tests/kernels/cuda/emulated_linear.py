"""What test_linear_attention.py does not ask of the CUDA kernels, run by test_cuda_emulator.py in the emulator."""

from __future__ import annotations

import pytest
import torch
from support.linear_cases import CASES, LinearChecks, draw, run

from efficient_attn import UnsupportedError, linear_attention
from efficient_attn.backends.cuda import attention as cuda
from efficient_attn.backends.cuda import linear_attention as cuda_linear

pytestmark = pytest.mark.interpreter
CAUSAL = (1, 2, 1, 150, 150, 16, 16, True, 0, False)


class TestLinearAttention(LinearChecks):
    backend, module, dtype = "cuda", cuda_linear, torch.bfloat16
    rtol, atol = 2e-2, 2e-2
    rounding = 2.0**-20  # of the normaliser, whose operands are split in two

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_equals_the_definition(self, case: tuple, dtype: torch.dtype) -> None:
        self.check_against_the_definition(case, dtype)


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


def test_float32_is_refused_with_a_reason() -> None:
    with pytest.raises(UnsupportedError, match="these tensors are float32"):
        linear_attention(*(torch.rand(1, 1, 8, 8) for _ in range(3)), backend="cuda")
