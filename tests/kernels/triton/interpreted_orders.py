"""Tokens in an order of their own, run by test_triton.py with TRITON_INTERPRET=1: tiles gather and scatter rows."""

from __future__ import annotations

import pytest
import torch
from support.token_orders import HQ, NQ, cases, check, order, results_of, tensors

from efficient_attn import attention, explain
from efficient_attn.backends.triton import attention as triton
from efficient_attn.errors import InputError, UnsupportedError
from efficient_attn.masks import BlockMask, MaskArrays, Part, PartedMask

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("name", list(cases()))
def test_equals_the_mask_written_out(name: str) -> None:
    check(triton, name, torch.float32)


@pytest.mark.parametrize(("name", "dtype"), [("batch", torch.float16), ("lengths", torch.bfloat16)])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    check(triton, name, dtype)


def test_no_rows_and_rows_that_no_tensor_has() -> None:
    given = tensors(torch.float32)
    none = torch.empty(1, 0, dtype=torch.int32)
    for part in (MaskArrays(query_order=none), MaskArrays(key_order=none)):
        out, lse, dq, dk, dv, _ = results_of(triton, part, given, None, 0.0)
        assert out.eq(0).all() and lse.eq(-torch.inf).all()
        assert all(t.eq(0).all() for t in (dq, dk, dv))
    wrong = order(1, 9, NQ)
    wrong[0, 3:5] = torch.tensor([-7, NQ])  # nobody asks the device; such rows are left out
    right = wrong[:, [0, 1, 2, 5, 6, 7, 8]].contiguous()
    found = (results_of(triton, MaskArrays(query_order=rows), given, None, 0.0) for rows in (wrong, right))
    for ours, expected in zip(*found, strict=True):
        assert ours is expected is None or torch.equal(ours, expected)


def test_what_is_wrong_or_not_served_is_named() -> None:
    query, key, value, grad_out = tensors(torch.float32)
    call = (query, key, value, None)
    with pytest.raises(InputError, match="contiguous int32"):
        triton.attention_forward(*call, MaskArrays(query_order=order(1, NQ, NQ).long()), 0.2, 0.0, None)
    part = MaskArrays(query_order=order(HQ, NQ, NQ))
    with pytest.raises(UnsupportedError, match="returning weights"):
        triton.attention_with_weights(*call, part, 0.2, 0.0, None, False)
    with pytest.raises(UnsupportedError, match="relative position"):
        triton.attention_forward(*call, part, 0.2, 0.0, None, 0.0, None, torch.zeros(1, 1, NQ + key.shape[2] - 1))
    with pytest.raises(UnsupportedError, match="expand the bias"):
        results_of(triton, part, [query, key, value, grad_out], torch.zeros(1, 1, NQ, key.shape[2]), 0.0)


@pytest.mark.parametrize("bias", [None, "coarse"])
def test_a_union_of_parts_is_taken_and_exact(bias: str | None) -> None:
    """With rows, too, whose bias is one large number: their lse has no digits left to join parts by."""
    tokens = 100
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, h, tokens, 16, generator=generator).requires_grad_() for h in (2, 1, 1)]
    places = torch.randperm(tokens, generator=generator).int()[None]
    shown = torch.rand(tokens, tokens, generator=generator) < 0.3
    parts = [
        Part(BlockMask.from_dense(shown[places[0]][:, columns], block_size=(32, 16)), places, columns[None])
        for columns in torch.randperm(tokens, generator=generator).int().split(60)
    ]
    mask = PartedMask.of(parts, q_len=tokens, kv_len=tokens)
    assert torch.equal(mask.to_dense()[0, 0], shown)
    if bias is not None:
        large = torch.finfo(torch.float32).min
        leaves.append(torch.where(torch.arange(tokens) % 7 == 0, large, 0.0)[None, None, :, None].requires_grad_())
    given = {"bias": leaves[3]} if bias is not None else {}
    assert len(explain(*leaves[:3], mask=mask, backend="triton", **given).parts) == 2
    found = []
    for backend in ("triton", "reference"):
        call = attention(
            *leaves[:3], mask=mask, return_lse=True, backend=backend, dropout_p=0.2, dropout_seed=3, **given
        )
        lse = call[1].clamp(min=-100)  # in Triton the least lse is that of a bias of -2.3e38
        found.append((call[0], lse, *torch.autograd.grad((call[0].square().sum(), lse.sum()), leaves)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
