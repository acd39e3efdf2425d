"""One suite for every backend: forward and backward of every case against float64, within the budget of rule 8."""

from __future__ import annotations

import pytest
import torch
from accuracy import Problem, assert_conforms, gradients
from cases import CASES, Case, draw

from efficient_attn import attention
from efficient_attn.backends.reference import dropout_keep

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SEED = 0x1234_5678_9ABC


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case: Case, dtype: torch.dtype, backend: str) -> None:
    drawn = draw(case, dtype)
    names = [n for n in ("query", "key", "value", "bias") if drawn[n] is not None]
    leaves = {n: drawn[n].detach().requires_grad_() for n in names}
    out, lse = attention(
        **leaves,
        mask=drawn["mask"],
        is_causal=case.causal is not None,
        causal_alignment=case.causal,
        scale=case.scale,
        dropout_p=case.dropout_p,
        dropout_seed=SEED,
        return_lse=True,
        backend=backend,
    )
    outputs, cotangents = (out,), (drawn["grad_out"],)
    if case.grad_lse:
        outputs, cotangents = (out, lse), (*cotangents, drawn["grad_lse"])
    found = gradients(outputs, list(leaves.values()), cotangents)

    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(gradient.dtype == drawn[n].dtype for n, gradient in zip(names, found, strict=True))
    shape = torch.Size((case.B, case.Hq, case.Nq, case.Nk))
    kept = dropout_keep(shape, case.dropout_p, torch.tensor(SEED), out.device) if case.dropout_p else None
    scale = case.D**-0.5 if case.scale is None else case.scale
    problem = Problem(
        *(drawn[n] for n in ("query", "key", "value", "bias", "visible")),
        scale, drawn["grad_out"], drawn["grad_lse"], kept, case.dropout_p,
    )  # fmt: skip
    assert_conforms(problem, {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, found, strict=True))})
