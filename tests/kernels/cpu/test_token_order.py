"""Tokens in an order of their own: the C++ kernels gather and scatter rows, and equal the mask written out."""

from __future__ import annotations

import pytest
import torch
from support.token_orders import DTYPES, HQ, NK, NQ, cases, check, order, results_of, tensors

from efficient_attn.backends.cpu import attention as cpu
from efficient_attn.backends.cpu.statistics import attention_statistics
from efficient_attn.backends.statistics import Wanted
from efficient_attn.errors import InputError, UnsupportedError
from efficient_attn.masks import MaskArrays

pytest.importorskip("efficient_attn._cpu", reason="the native module is not built")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", list(cases()))
def test_equals_the_mask_written_out(name: str, dtype: torch.dtype) -> None:
    check(cpu, name, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_a_permutation_has_the_bits_of_a_copy(dtype: torch.dtype) -> None:
    part, _ = cases()["lists"]
    query, key, value, grad_out = tensors(dtype)
    rows, columns = (t[0].long() for t in (part.query_order, part.key_order))  # type: ignore[index]
    ours = results_of(cpu, part, [query, key, value, grad_out], None, 0.0)[:2]
    copies = [query[:, :, rows], key[:, :, columns], value[:, :, columns], grad_out[:, :, rows]]
    plain = part._replace(query_order=None, key_order=None)
    copied = results_of(cpu, plain, copies, None, 0.0)
    assert all(torch.equal(x[:, :, rows], y) for x, y in zip(ours, copied, strict=False))
    last = (None, *ours, part, 0.2, 0.0, None, False)
    gradients = cpu.attention_backward(grad_out, None, None, query, key, value, *last)
    last = (None, *copied[:2], plain, 0.2, 0.0, None, False)
    of_copies = cpu.attention_backward(copies[3], None, None, *copies[:3], *last)
    for gradient, of_copy, tokens in zip(gradients[:3], of_copies, (rows, columns, columns), strict=False):
        assert torch.equal(gradient[:, :, tokens], of_copy)  # type: ignore[index]


@pytest.mark.parametrize("size", [1.0, 1e5])
def test_parts_joined_by_lse_have_the_gradients_of_the_whole(size: float) -> None:
    """With an lse of 1e5 too, which a part does not make from its own scores."""
    query, key, value, grad_out = (t.double() for t in tensors(torch.float32))
    bias = torch.full((1, 1, NQ, NK), size, dtype=torch.float64)
    keys = torch.randperm(NK).int()[None]
    parts = [MaskArrays(key_order=keys[:, :60].contiguous()), MaskArrays(key_order=keys[:, 60:].contiguous())]
    made = [cpu.attention_forward(query, key, value, bias, part, 0.2, 0.0, None) for part in parts]
    lse = torch.logaddexp(made[0][1], made[1][1])
    out = sum(torch.exp(part_lse - lse)[..., None] * part_out for part_out, part_lse in made)
    whole = cpu.attention_forward(query, key, value, bias, MaskArrays(), 0.2, 0.0, None)
    torch.testing.assert_close((out, lse), whole)
    last = (query, key, value, bias, out, lse)
    each = [cpu.attention_backward(grad_out, None, None, *last, part, 0.2, 0.0, None, True) for part in parts]
    want = cpu.attention_backward(grad_out, None, None, *last, MaskArrays(), 0.2, 0.0, None, True)
    for first, second, exact in zip(*(gradients[:4] for gradients in (*each, want)), strict=True):
        torch.testing.assert_close(first + second, exact)  # type: ignore[operator]


def test_no_rows() -> None:
    given = tensors(torch.float32)
    none = torch.empty(1, 0, dtype=torch.int32)
    for part in (MaskArrays(query_order=none), MaskArrays(key_order=none)):
        out, lse, dq, dk, dv, _ = results_of(cpu, part, given, None, 0.0)
        assert out.eq(0).all() and lse.eq(-torch.inf).all()
        assert all(t.eq(0).all() for t in (dq, dk, dv))


def test_what_is_wrong_or_not_served_is_named() -> None:
    query, key, value, grad_out = tensors(torch.float32)
    call = (query, key, value, None)
    with pytest.raises(InputError, match="per key/value head"):
        cpu.attention_forward(*call, MaskArrays(key_order=order(3, NK, NK)), 0.2, 0.0, None)
    with pytest.raises(InputError, match="contiguous int32"):
        cpu.attention_forward(*call, MaskArrays(query_order=order(1, NQ, NQ).long()), 0.2, 0.0, None)
    for wrong in (NQ, -1):
        tokens = order(1, NQ, NQ)
        tokens[0, 7] = wrong
        with pytest.raises(ValueError, match=f"row {wrong} of a tensor that has {NQ}"):
            cpu.attention_forward(*call, MaskArrays(query_order=tokens), 0.2, 0.0, None)
    part = MaskArrays(query_order=order(HQ, NQ, NQ))
    with pytest.raises(UnsupportedError, match="returning weights"):
        cpu.attention_with_weights(*call, part, 0.2, 0.0, None, False)
    with pytest.raises(UnsupportedError, match="statistics"):
        attention_statistics(query, key, None, part, 0.2, Wanted())
    with pytest.raises(UnsupportedError, match="expand the bias"):
        results_of(cpu, part, [query, key, value, grad_out], torch.zeros(1, 1, NQ, NK), 0.0)
