"""Soft cap, sinks and structured biases: what they mean, through what calls they go, and who refuses them by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_attn import (
    ALiBi,
    LowRankBias,
    RelativeBias,
    SlidingWindow,
    T5Bias,
    attention,
    attention_weights,
    explain,
    parse,
)
from efficient_attn.errors import InputError, InputTypeError, UnsupportedError
from efficient_attn.functional import attention_with_weights, padded_attention


def drawn(*lengths: int, B: int = 1, H: int = 2, D: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(B, H, n, D, generator=generator, dtype=dtype) for n in lengths]


def modified(H: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    table, sinks = torch.randn(H, 7, generator=generator, dtype=dtype), torch.randn(H, generator=generator, dtype=dtype)
    return {"bias": RelativeBias(table), "softcap": 1.5, "sinks": sinks}


EACH = [{"softcap": 1.5}, {"sinks": torch.zeros(2)}, {"bias": ALiBi(torch.ones(2))}]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_second_derivatives(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in drawn(5, 6, 6, D=3))
    sinks, table = torch.randn(2, dtype=torch.float64).requires_grad_(), torch.randn(2, 5, dtype=torch.float64)

    def call(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, table: Tensor) -> Tensor:
        bias = RelativeBias(table, alignment="bottom_right")
        return attention(q, k, v, softcap=1.5, sinks=sinks, bias=bias, backend=backend, return_lse=True)

    assert torch.autograd.gradcheck(call, (q, k, v, sinks, table.requires_grad_()))
    assert torch.autograd.gradgradcheck(call, (q, k, v, sinks, table))


@pytest.mark.parametrize("heads", [1, 2])
def test_second_derivatives_of_lists_and_one_line_for_all_heads(heads: int) -> None:
    q, k, v = (x.requires_grad_() for x in drawn(18, 18, 18, D=2))
    table = torch.randn(heads, 5, dtype=torch.float64).requires_grad_()
    mask = torch.rand(1, 2, 18, 18, generator=torch.Generator().manual_seed(1)) < 0.5

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attention(q, k, v, mask=mask, bias=RelativeBias(table), softcap=1.0)

    assert torch.autograd.gradgradcheck(call, (q, k, v, table))


def test_the_same_bits_for_any_number_of_threads() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(300, 700, 700, B=2, H=3, dtype=torch.float32))
    sinks = torch.zeros(3, requires_grad=True)
    table = torch.randn(3, 601, generator=torch.Generator().manual_seed(1)).requires_grad_()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            bias = RelativeBias(table, alignment="bottom_right")
            out = attention(q, k, v, softcap=3.0, sinks=sinks, bias=bias, backend="cpu")
            found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, sinks, table))])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_decoding_repeats_the_last_row() -> None:
    q, k, v = drawn(40, 40, 40, dtype=torch.float32)
    named = modified(dtype=torch.float32)
    whole, lse = attention(q, k, v, is_causal=True, return_lse=True, **named)
    row, last = attention(q[:, :, -1:], k, v, causal_alignment="bottom_right", return_lse=True, **named)
    torch.testing.assert_close(row, whole[:, :, -1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(last, lse[:, :, -1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average", [False, True])
def test_weights(average: bool) -> None:
    q, k, v = drawn(9, 12, 12)
    named = modified() | {"causal_alignment": "bottom_right"}
    out, lse, weights = attention_with_weights(q, k, v, average=average, **named)
    exact, exact_lse = attention(q, k, v, return_lse=True, backend="reference", **named)
    torch.testing.assert_close((out, lse), (exact, exact_lse))
    torch.testing.assert_close(attention_weights(q, k, average=average, **named), weights)
    assert bool((weights.sum(-1) < 1).all())  # the sink has the rest
    if not average:
        torch.testing.assert_close(weights @ v, exact)


def test_a_table_hides_by_minus_infinity_whatever_is_hidden() -> None:
    q, k, v = drawn(20, 20, 20, H=2, dtype=torch.float32)
    table = torch.zeros(2, 5)
    table[:, -1] = -torch.inf  # what is two tokens ahead or more
    for backend in ("cpu", "reference"):
        poisoned = v.clone()
        poisoned[:, :, -1] = torch.nan
        out = attention(q, k, poisoned, bias=RelativeBias(table), backend=backend)
        expected = attention(q, k, v, mask=SlidingWindow(left=-1, right=1), backend=backend)
        torch.testing.assert_close(out[:, :, :-2], expected[:, :, :-2])


def test_t5_buckets_are_those_of_transformers() -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-300, 301)
    for bidirectional in (True, False):
        ours = T5Bias(torch.zeros(32, 2), bidirectional=bidirectional).bucket(distance)
        theirs = t5.T5Attention._relative_position_bucket(distance, bidirectional, 32, 128)
        assert torch.equal(ours, theirs)


def test_low_rank_and_lists_of_biases_add_up() -> None:
    q, k, v = drawn(11, 13, 13, B=2)
    u, w = torch.randn(11, 3, dtype=torch.float64), torch.randn(2, 1, 13, 3, dtype=torch.float64)
    slopes, dense = torch.rand(2, 2, dtype=torch.float64), torch.randn(1, 2, 1, 13, dtype=torch.float64)
    i, j = torch.arange(11)[:, None] + 2, torch.arange(13)
    everything = u @ w.mT + dense - slopes[..., None, None] * (i - j).abs()
    expected = attention(q, k, v, bias=everything)
    out = attention(q, k, v, bias=[LowRankBias(u, w), ALiBi(slopes, "bottom_right"), dense])
    torch.testing.assert_close(out, expected)
    padding = torch.arange(13) < torch.tensor([[13], [9]])
    out = padded_attention(q, k, v, padding, bias=[ALiBi(slopes, "bottom_right"), LowRankBias(u, w), dense])
    torch.testing.assert_close(out, padded_attention(q, k, v, padding, bias=everything))


def test_usual_slopes() -> None:
    assert ALiBi.usual_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    torch.testing.assert_close(ALiBi.usual_slopes(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))


def test_compiled_and_mapped() -> None:
    q, k, v = drawn(8, 8, 8, dtype=torch.float32)
    sinks, table = torch.randn(2), torch.randn(2, 7)

    def call(q: Tensor, sinks: Tensor, table: Tensor) -> Tensor:
        return attention(q, k, v, softcap=2.0, sinks=sinks, bias=RelativeBias(table))

    leaves = [x.clone().requires_grad_() for x in (q, sinks, table)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(call(*leaves).sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves).sum(), leaves), expected)
    queries = torch.stack((q, -q))
    mapped = torch.func.vmap(call, in_dims=(0, None, None))(queries, sinks, table)
    torch.testing.assert_close(mapped, torch.stack([call(x, sinks, table) for x in queries]))
    tables = torch.stack((table, -table))
    mapped = torch.func.vmap(call, in_dims=(None, None, 0))(q, sinks, tables)
    torch.testing.assert_close(mapped, torch.stack([call(q, sinks, x) for x in tables]))
    grads = torch.func.grad(lambda *x: call(*x).sum(), argnums=(0, 1, 2))(q, sinks, table)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("named", EACH, ids=lambda n: next(iter(n)))
@pytest.mark.parametrize("spec", ["linformer", "nystrom", "performer", "linear", "sliding_window+nystrom"])
def test_other_methods_refuse(spec: str, named: dict[str, Any]) -> None:
    q, k, v = drawn(32, 32, 32, dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="cannot be served by"):
        parse(spec).attend(q, k, v, **named)


@pytest.mark.parametrize("spec", ["dense", "sliding_window:left=5,right=0", "topk_blocks:block=16,blocks=1", "lsh"])
def test_sparse_methods_pass_them_on(spec: str) -> None:
    q, k, v = drawn(64, 64, 64, dtype=torch.float32)
    method, named = parse(spec), modified(dtype=torch.float32)
    out, _ = method.attend(q, k, v, **named)
    mask = None if spec == "dense" else method.for_inputs(q, k)
    torch.testing.assert_close(out, attention(q, k, v, mask=mask, **named))


def test_explain_says_who_refuses() -> None:
    q, k, v = drawn(16, 16, 16, dtype=torch.float32)
    found = explain(q, k, v, softcap=1.0, sinks=torch.zeros(2))
    assert "it knows no softcap and no sinks" in str(found.reasons["cuda"])
    assert found.backend == "cpu" and not found.reasons["reference"]
    with pytest.raises(UnsupportedError, match="knows no softcap"):
        attention(q, k, v, softcap=1.0, backend="cuda")


@pytest.mark.parametrize(
    ("named", "error", "text"),
    [
        ({"softcap": 0.0}, InputError, "softcap must be None or a positive"),
        ({"softcap": float("nan")}, InputError, "softcap must be"),
        ({"sinks": torch.zeros(3)}, InputError, r"sinks must be \(Hq\) = \(2,\)"),
        ({"sinks": torch.zeros(2, 7)}, InputError, r"or one for each query, \(Hq, Nq\) = \(2, 8\)"),
        ({"sinks": torch.zeros(2, 8, dtype=torch.int64)}, InputTypeError, "sinks must be a floating-point"),
        ({"sinks": torch.zeros(2, dtype=torch.int64)}, InputTypeError, "sinks must be a tensor of"),
        ({"bias": ALiBi(torch.ones(3))}, InputError, "is for batch 1 and 3 heads"),
        ({"bias": "alibi"}, InputTypeError, "bias must be a floating-point tensor, a structured"),
        ({"bias": [torch.ones(1), 3]}, InputTypeError, "got int"),
        ({"bias": LowRankBias(torch.ones(7, 2), torch.ones(8, 2))}, InputError, "does not fit"),
        ({"bias": LowRankBias(torch.ones(8, 2), torch.ones(8, 2)), "softcap": 1.0}, UnsupportedError, "LowRankBias"),
        ({"bias": LowRankBias(torch.ones(8, 600), torch.ones(8, 600))}, InputError, "at most 576 together"),
    ],
)
def test_wrong_input(named: dict[str, Any], error: type[Exception], text: str) -> None:
    q, k, v = drawn(8, 8, 8, dtype=torch.float32)
    with pytest.raises(error, match=text):
        attention(q, k, v, **named)


def test_positions_of_a_bias_are_never_guessed() -> None:
    q, k, v = drawn(3, 8, 8, dtype=torch.float32)
    bias = ALiBi(torch.ones(2))
    with pytest.raises(InputError, match="ALiBi with 3 queries and 8 keys is ambiguous"):
        attention(q, k, v, bias=bias)
    last = attention(q, k, v, bias=bias, causal_alignment="bottom_right")
    torch.testing.assert_close(last, attention(q, k, v, bias=ALiBi(torch.ones(2), "bottom_right")))
    assert not torch.allclose(last, attention(q, k, v, bias=bias, causal_alignment="top_left"))


def test_wrong_tables() -> None:
    with pytest.raises(InputError, match="an odd number of distances"):
        RelativeBias(torch.ones(4))
    with pytest.raises(InputError, match="alignment must be one of"):
        ALiBi(torch.ones(4), alignment="left")
    with pytest.raises(InputError, match="T5Bias needs a bucket"):
        T5Bias(torch.ones(2, 4))
    with pytest.raises(InputError, match="share their last dimension"):
        LowRankBias(torch.ones(3, 2), torch.ones(3, 4))
