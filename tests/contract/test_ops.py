"""The registered operators: schema, fakes, autograd registration and ahead-of-time dispatch, by torch's opcheck."""

from __future__ import annotations

import pytest
import torch
from support.cases import CASES, Case, draw

from efficient_attn import BlockMask, SlidingWindow
from efficient_attn.masks import MaskArrays
from efficient_attn.ops import attention as ops

CHECKED = [
    "dense",
    "grouped",
    "bits",
    "blocks_window_lengths",
    "bias_heads_pairs",
    "bias_float32",
    "dropout",
    "value_dim_3",
    "softcap_sinks_table",
]


def modifiers(case: Case) -> tuple:
    """softcap, sinks and diagonals, as operators take them."""
    generator = torch.Generator().manual_seed(7)
    sinks = torch.randn(case.Hq, generator=generator) if case.sinks else None
    table = torch.randn(1, case.Hq, case.Nq + case.Nk - 1, generator=generator) if case.structured else None
    return case.softcap or 0.0, sinks, table


def operands(case: Case, requires_grad: bool) -> tuple[dict, list]:
    """The case's tensors and the operators' mask operands."""
    drawn = draw(case, torch.float32)
    mask = drawn["mask"]
    if mask is None:
        arrays = MaskArrays()
    elif isinstance(mask, SlidingWindow):
        arrays = mask.block_mask(case.Nq, case.Nk).arrays(True)
    else:
        arrays = (mask if isinstance(mask, BlockMask) else BlockMask.from_dense(mask)).arrays(True)
    for name in ("query", "key", "value", "bias"):
        if drawn[name] is not None:
            drawn[name].requires_grad_(requires_grad)
    return drawn, list(ops.operands(arrays))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", CHECKED)
def test_opcheck_forward(name: str, requires_grad: bool, backend: str) -> None:
    case = next(c for c in CASES if c.name == name)
    t, mask = operands(case, requires_grad)
    seed = torch.tensor(5) if case.dropout_p else None
    arguments = (
        t["query"],
        t["key"],
        t["value"],
        t["bias"],
        *mask,
        0.25,
        case.dropout_p,
        seed,
        *modifiers(case),
        backend,
    )
    torch.library.opcheck(torch.ops.efficient_attn.attention_forward, arguments)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", CHECKED)
def test_opcheck_with_weights(name: str, average: bool, backend: str) -> None:
    case = next(c for c in CASES if c.name == name)
    t, mask = operands(case, True)
    seed = torch.tensor(5) if case.dropout_p else None
    arguments = (t["query"], t["key"], t["value"], t["bias"], *mask, 0.25, case.dropout_p, seed, average)
    arguments = (*arguments, *modifiers(case), backend)
    torch.library.opcheck(torch.ops.efficient_attn.attention_with_weights, arguments)


@pytest.mark.parametrize("weights", [None, "heads", "mean"])
@pytest.mark.parametrize("name", CHECKED)
def test_opcheck_backward(name: str, weights: str | None, backend: str) -> None:
    case = next(c for c in CASES if c.name == name)
    t, mask = operands(case, False)
    seed = torch.tensor(5) if case.dropout_p else None
    tail = (*mask, 0.25, case.dropout_p, seed)
    inputs = (t["query"], t["key"], t["value"], t["bias"])
    softcap, sinks, diagonals = modifiers(case)
    out, lse = torch.ops.efficient_attn.attention_forward(*inputs, *tail, softcap, sinks, diagonals, backend)
    heads = 1 if weights == "mean" else case.Hq
    grad_weights = None if weights is None else torch.randn(case.B, heads, case.Nq, case.Nk)
    more = (t["bias"] is not None, softcap, sinks, diagonals, diagonals is not None, backend)
    arguments = (t["grad_out"], None, grad_weights, *inputs, out, lse, *tail, *more)
    torch.library.opcheck(torch.ops.efficient_attn.attention_backward, arguments)
