"""Tokens in an order of their own: the C++ kernels gather and scatter rows, and equal the mask written out."""

from __future__ import annotations

import pytest
import torch
from support.token_orders import DTYPES, DV, HQ, NK, NQ, SEED, B, cases, check, order, results_of, tensors

from efficient_attn import BlockMask
from efficient_attn.backends.call import accumulation_dtype
from efficient_attn.backends.cpu import attention as cpu
from efficient_attn.backends.cpu.statistics import attention_statistics
from efficient_attn.backends.reference import attention as reference
from efficient_attn.backends.statistics import Wanted
from efficient_attn.errors import InputError, UnsupportedError
from efficient_attn.masks import MaskArrays
from efficient_attn.ops.union import join

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


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", list(cases()))
def test_goes_on_from_another_part(name: str, dtype: torch.dtype) -> None:
    """Results are joined into those of other keys as `ops.union.join` does it, and gradients are added."""
    part, extra = cases()[name]
    bias = None if extra.get("bias") is None else extra["bias"].to(dtype)
    dropout_p = extra.get("dropout_p", 0.0)
    seed = SEED if dropout_p else None
    query, key, value, grad_out = tensors(dtype)
    out, lse = torch.randn(B, HQ, NQ, DV).to(dtype), torch.randn(B, HQ, NQ, dtype=accumulation_dtype(dtype))
    out[:, :, 3], lse[:, :, 3] = 0, -torch.inf  # a row that has seen nothing so far
    call = (query, key, value, bias, part, 0.2, dropout_p, seed)
    alone = cpu.attention_forward(*call)
    want = out.to(torch.float64, copy=True), lse.to(torch.float64, copy=True)
    join(*want, *(t.double() for t in alone))
    joined = out.clone(), lse.clone()
    assert cpu.attention_forward(*call, joined=joined)[0] is joined[0]
    rounding = {} if dtype in (torch.float32, torch.float64) else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(joined[0].double(), want[0], **(rounding or {"rtol": 2e-6, "atol": 2e-6}))
    torch.testing.assert_close(joined[1].double(), want[1], rtol=1e-5, atol=1e-5)

    last = (query, key, value, bias, *joined, part, 0.2, dropout_p, seed, False)
    own = cpu.attention_backward(grad_out, None, None, *last)[:3]
    sums = [torch.randn_like(t) for t in own]
    added_to = tuple(t.clone() for t in sums)
    found = cpu.attention_backward(grad_out, None, None, *last, added_to=added_to)  # type: ignore[arg-type]
    for gradient, total, before, into in zip(own, found, sums, added_to, strict=False):
        assert total is into
        torch.testing.assert_close(total, before + gradient, **(rounding or {"rtol": 1e-6, "atol": 1e-6}))  # type: ignore[operator]


def copies(dtype: torch.dtype) -> bool:
    """Whether keys are copied at all: where pairs of bfloat16 are multiplied, they are packed instead."""
    return not (dtype == torch.bfloat16 and cpu._cpu.instruction_set().endswith("_bf16"))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_keys_copied_once_for_some_tiles_are_those_of_the_definition(dtype: torch.dtype) -> None:
    """Grouped heads, lengths, dropout, a bias, a value that some queries must not see, and rows that are no vectors."""
    torch.manual_seed(3)
    n = 300
    given = [torch.randn(2, h, n, d).to(dtype) for h, d in ((2, 20), (1, 20), (1, 12), (2, 12))]
    given[2][:, :, 150] = torch.nan
    pairs = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= 30
    tokens, place = torch.randperm(n).int(), torch.empty(n, dtype=torch.int64)
    place[tokens.long()] = torch.arange(n)
    lengths = torch.tensor([n, 230], dtype=torch.int32)
    lists = BlockMask.from_dense(pairs, block_size=16).arrays(transposed=True)
    part = lists._replace(query_order=tokens[None], key_order=tokens[None], kv_lengths=lengths)
    plain = BlockMask.from_dense(pairs[place][:, place], block_size=128).arrays()._replace(kv_lengths=lengths)
    bias = torch.randn(1, 1, n, n).to(dtype)
    assert (cpu.tiles_of_a_copy(*given[:3], part) > 1) is copies(dtype)
    ours = results_of(cpu, part, given, bias, 0.3)[:5]
    want = results_of(reference, plain, [t.double() for t in given], bias, 0.3)
    rough = results_of(reference, plain, given, bias, 0.3)  # what the dtype itself costs
    for found, exact, same in zip(ours, want, rough, strict=False):
        finite = exact.isfinite()
        assert torch.equal(found.isfinite(), finite) and finite.any()
        allowed = (same.double() - exact)[finite].abs().max()
        units = 32 if dtype == torch.float64 else 4
        least = units * torch.finfo(found.dtype).eps * exact[finite].abs().max()
        assert (found.double() - exact)[finite].abs().max() <= 2 * allowed + least


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_keys_copied_once_give_the_bits_of_keys_in_place(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    n = 520
    given = [torch.randn(1, h, n, d).to(dtype) for h, d in ((4, 24), (2, 24), (2, 24), (4, 24))]
    pairs = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= 30
    plain, tokens = BlockMask.from_dense(pairs, block_size=16).arrays(transposed=True), torch.randperm(n)
    part = plain._replace(query_order=tokens.int()[None], key_order=tokens.int()[None])
    in_order = [t[:, :, tokens] for t in given]
    narrow = dtype in (torch.bfloat16, torch.float16)  # widened, which is a copy too
    assert (cpu.tiles_of_a_copy(*in_order[:3], plain) > 1) is (narrow and copies(dtype))
    assert (cpu.tiles_of_a_copy(*given[:3], part) > 1) is copies(dtype)
    out, lse = cpu.attention_forward(*given[:3], None, part, 0.2, 0.0, None)
    copied = cpu.attention_forward(*in_order[:3], None, plain, 0.2, 0.0, None)
    assert torch.equal(out[:, :, tokens], copied[0]) and torch.equal(lse[:, :, tokens], copied[1])
    last = (None, out, lse, part, 0.2, 0.0, None, False)
    gradients = cpu.attention_backward(given[3], None, None, *given[:3], *last)[:3]
    of_copies = cpu.attention_backward(
        in_order[3], None, None, *in_order[:3], None, *copied, plain, 0.2, 0.0, None, False
    )
    for gradient, in_place in zip(gradients, of_copies, strict=False):
        assert torch.equal(gradient[:, :, tokens], in_place)  # type: ignore[index, arg-type]


@pytest.mark.parametrize("order", [None, "reversed"])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_a_band_has_one_result_for_any_number_of_threads(block: int, order: str | None) -> None:
    """Runs of queries that share keys with a neighbour, see none, or keys that no other run sees; grouped heads."""
    torch.manual_seed(2)
    n, threads = 1100, torch.get_num_threads()
    query, key, value, grad_out = (torch.randn(1, h, n, 24) for h in (4, 2, 2, 4))
    away = torch.arange(n)[:, None] - torch.arange(n)
    pairs = (away.abs() <= 90) & ((away % 3 == 0) | (away > 0))
    pairs[300:700] = False
    pairs[400, 400] = pairs[:, 810:900] = False
    tokens = None if order is None else torch.arange(n - 1, -1, -1, dtype=torch.int32)[None]
    mask = BlockMask.from_dense(pairs, block_size=block).arrays()._replace(query_order=tokens, key_order=tokens)
    made = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            made.append(results_of(cpu, mask, [query, key, value, grad_out], None, 0.0))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in made[1:] for x, y in zip(made[0][:5], other[:5], strict=True))
    flipped = [t.flip(2) if order else t for t in (query, key, value, grad_out)]
    want = reference_results(BlockMask.from_dense(pairs, block_size=128).arrays(), flipped, order is not None)
    for ours, exact in zip(made[0][:5], want, strict=True):
        torch.testing.assert_close(ours.flip(2) if order else ours, exact.float(), rtol=1e-4, atol=1e-5)


def reference_results(mask: MaskArrays, given: list[torch.Tensor], flipped: bool) -> list[torch.Tensor]:
    """out, lse, dq, dk and dv by the definition in float64; the lse has a gradient, as in `results_of`."""
    query, key, value, grad_out = (t.double() for t in given)
    out, lse = reference.attention_forward(query, key, value, None, mask, 0.2, 0.0, None)
    grad_lse = torch.linspace(-1, 1, lse.numel(), dtype=lse.dtype).view_as(lse)
    grad_lse = grad_lse.flip(2) if flipped else grad_lse
    last = (query, key, value, None, out, lse, mask, 0.2, 0.0, None, False)
    return [out, lse, *reference.attention_backward(grad_out, grad_lse, None, *last)[:3]]


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
