"""The thirteen rules of the contract (docs/contract.md), each with at least one test that carries its number."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys

import pytest
import torch
from support.accuracy import eager_attention
from support.cases import CASES, Case, draw, random_blocks

import efficient_attn
from efficient_attn import BlockMask, InputError, InputTypeError, SlidingWindow, UnsupportedError, attention, explain
from efficient_attn.backends.reference.attention import dropout_keep, philox4x32
from efficient_attn.functional import padded_attention

CASE = {case.name: case for case in CASES}


def tensors(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """query, key and value of one shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


# --- rule 1: fully masked rows ---


@pytest.mark.parametrize("how", ["bits", "lengths", "bias", "window"])
def test_rule_01_fully_masked_rows_give_zero(how: str, backend: str) -> None:
    query, key, value = tensors(2, 2, 20, 8)
    mask, bias, empty = None, None, (slice(None), slice(None), slice(0, 5))
    if how == "bits":
        mask = torch.ones(20, 20, dtype=torch.bool)
        mask[:5] = False
    elif how == "lengths":
        mask, empty = BlockMask.from_lengths(torch.tensor([0, 20]), q_len=20, kv_len=20), (0,)
    elif how == "bias":
        bias = torch.zeros(20, 20)
        bias[:5] = -torch.inf
    else:
        mask = SlidingWindow(left=-1, right=0, alignment="top_left")
        query = torch.cat([query.detach()] * 2, 2).requires_grad_()
        mask = mask.block_mask(40, 20) & BlockMask.from_dense(torch.arange(40)[:, None].expand(40, 20) >= 5)
    out, lse = attention(query, key, value, mask=mask, bias=bias, return_lse=True, backend=backend)
    gradients = torch.autograd.grad(out.sum(), (query, key, value))
    assert (out[empty] == 0).all() and (lse[empty] == -torch.inf).all() and (gradients[0][empty] == 0).all()
    assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_rule_01_finite_minimum_is_not_a_mask(backend: str) -> None:
    """A row whose every bias is finfo.min is an ordinary row (PyTorch issue 109517)."""
    query, key, value = tensors(1, 1, 3, 4)
    bias = torch.full((3, 3), torch.finfo(torch.float32).min)
    out = attention(query, key, value, bias=bias, backend=backend)
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(out))


# --- rule 2: what is masked has no influence ---


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("how", ["keys", "bits", "blocks", "lengths", "window", "causal", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_02_masked_keys_never_influence(poison: float, how: str, dtype: torch.dtype, backend: str) -> None:
    n, hidden = 70, slice(50, 60)
    query, key, value = tensors(2, 2, n, 16, dtype=dtype)
    visible = torch.ones(n, n, dtype=torch.bool)
    arguments: dict = {}
    if how in ("keys", "bits", "blocks", "bias"):
        rows = slice(None) if how == "keys" else slice(10, 40)
        visible[rows, hidden] = False
    if how == "lengths":
        hidden = slice(50, n)
        visible[:, hidden] = False
        arguments["mask"] = BlockMask.from_lengths(torch.tensor([50, 50]), q_len=n, kv_len=n)
    elif how == "window":
        arguments["mask"] = SlidingWindow(left=8, right=8)
        i = torch.arange(n)
        visible = (i[:, None] - i[None]).abs() <= 8
    elif how == "causal":
        arguments["is_causal"] = True
        visible = visible.tril()
    elif how == "blocks":
        arguments["mask"] = BlockMask.from_dense(visible, block_size=(16, 16))
    elif how == "bias":
        arguments["bias"] = torch.zeros(n, n, dtype=dtype).masked_fill(~visible, -torch.inf)
    else:
        arguments["mask"] = visible
    clean_rows = ~visible[:, hidden].any(1)
    grad_out = torch.randn(2, 2, n, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad_out[:, :, ~clean_rows] = 0  # rows that do see a poisoned key are NaN, rightly; keep them out of the gradients

    def run(fill: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        k, v = key.detach().clone(), value.detach().clone()
        k[:, :, hidden], v[:, :, hidden] = fill, fill
        leaves = [query.detach().clone().requires_grad_(), k.requires_grad_(), v.requires_grad_()]
        out = attention(*leaves, **arguments, backend=backend)
        return out.detach(), list(torch.autograd.grad(out, leaves, grad_out))

    out, gradients = run(poison)
    expected, expected_gradients = run(0.25)
    assert torch.equal(out[:, :, clean_rows], expected[:, :, clean_rows])
    assert torch.equal(gradients[0][:, :, clean_rows], expected_gradients[0][:, :, clean_rows])
    if clean_rows.all():
        seen = torch.ones(n, dtype=torch.bool)
        seen[hidden] = False
        assert torch.equal(gradients[1][:, :, seen], expected_gradients[1][:, :, seen])
        for gradient in gradients[1:]:
            assert (gradient[:, :, hidden] == 0).all()


@pytest.mark.parametrize("poisoned", ["query", "key", "value"])
def test_rule_02_a_query_that_sees_nan_leaves_keys_alone_that_it_does_not_see(poisoned: str, backend: str) -> None:
    leaves = dict(zip(("query", "key", "value"), tensors(1, 1, 70, 16), strict=True))
    with torch.no_grad():
        leaves[poisoned][:, :, 20] = torch.nan
    out = attention(*leaves.values(), mask=SlidingWindow(left=8, right=0), backend=backend)
    _, grad_key, grad_value = torch.autograd.grad(out.sum(), leaves.values())
    beyond = torch.ones(70, dtype=torch.bool)
    beyond[12:29] = False  # what queries 20 to 28 see
    assert grad_key[:, :, beyond].isfinite().all() and grad_value[:, :, beyond].isfinite().all()


# --- rule 3: causal alignment ---


def test_rule_03_causal_alignment_is_explicit(backend: str) -> None:
    query, (key, value) = torch.randn(1, 1, 3, 4), torch.randn(2, 1, 1, 5, 4)
    with pytest.raises(InputError, match=r"top_left.*bottom_right"):
        attention(query, key, value, is_causal=True, backend=backend)
    with pytest.raises(InputError, match="causal_alignment"):
        attention(query, key, value, is_causal=True, causal_alignment="left", backend=backend)
    first = attention(query, key, value, is_causal=True, causal_alignment="top_left", backend=backend)
    torch.testing.assert_close(first[0, 0, 0], value[0, 0, 0])
    last = attention(query, key, value, is_causal=True, causal_alignment="bottom_right", backend=backend)
    torch.testing.assert_close(last[:, :, 2:], attention(query[:, :, 2:], key, value, backend=backend))


# --- rule 4: empty dimensions ---


@pytest.mark.parametrize("B, H, Nq, Nk", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (0, 0, 0, 0)])
def test_rule_04_empty_dimensions(B: int, H: int, Nq: int, Nk: int, backend: str) -> None:
    query, key = torch.randn(B, H, Nq, 4, requires_grad=True), torch.randn(B, H, Nk, 4, requires_grad=True)
    value = torch.randn(B, H, Nk, 5, requires_grad=True)
    out, lse = attention(query, key, value, return_lse=True, backend=backend)
    assert (out.shape == (B, H, Nq, 5) and (out == 0).all()) or Nk > 0
    assert lse.shape == (B, H, Nq) and ((lse == -torch.inf).all() or Nk > 0)
    for leaf, gradient in zip((query, key, value), torch.autograd.grad(out.sum(), (query, key, value)), strict=True):
        assert gradient.shape == leaf.shape and (gradient == 0).all()


# --- rule 5: bias (the conformance suite covers values) ---


@pytest.mark.parametrize("shape", [(), (7,), (5, 1), (3, 5, 7), (2, 1, 1, 7), (2, 3, 5, 7), (1, 1, 1, 1)])
def test_rule_05_bias_gradient_has_the_shape_of_the_bias(shape: tuple[int, ...], backend: str) -> None:
    query, key, value = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    bias = torch.randn(shape, requires_grad=True)
    weights = torch.softmax(query @ key.mT / 2 + bias, -1)
    (expected,) = torch.autograd.grad((weights @ value).square().sum(), bias)
    (found,) = torch.autograd.grad(attention(query, key, value, bias=bias, backend=backend).square().sum(), bias)
    assert found.shape == bias.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- rule 6: dropout ---


def test_rule_06_philox_known_answers() -> None:
    """The published test vectors of Philox4x32-10 (Random123, kat_vectors)."""
    words = lambda *v: [torch.tensor(x) for x in v]  # noqa: E731
    zero = philox4x32(words(0, 0, 0, 0), *words(0, 0))
    assert [int(w) for w in zero] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = philox4x32(words(*[0xFFFFFFFF] * 4), *words(*[0xFFFFFFFF] * 2))
    assert [int(w) for w in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_rule_06_dropout_depends_on_position_and_seed_only(backend: str) -> None:
    """With the identity as values, the output is the dropped weights: zero exactly where the definition says so."""
    n = 37
    query, key = torch.randn(2, 2, n, 8), torch.randn(2, 2, n, 8)
    value = torch.eye(n).expand(2, 2, n, n)
    seed = -(2**62) + 12345
    out = attention(query, key, value, dropout_p=0.4, dropout_seed=seed, backend=backend)
    kept = dropout_keep(out.shape, 0.4, torch.tensor(seed), out.device)
    assert torch.equal(out != 0, kept)
    assert abs(kept.float().mean() - 0.6) < 0.02
    assert torch.equal(attention(query, key, value, dropout_p=0.4, dropout_seed=seed, backend=backend), out)
    assert not torch.equal(attention(query, key, value, dropout_p=0.4, dropout_seed=seed + 1, backend=backend), out)


def test_rule_06_unseeded_dropout_follows_the_generator(backend: str) -> None:
    query, key, value = tensors(1, 2, 16, 8)
    torch.manual_seed(5)
    first, second = (attention(query, key, value, dropout_p=0.5, backend=backend) for _ in range(2))
    torch.manual_seed(5)
    again = attention(query, key, value, dropout_p=0.5, backend=backend)
    assert torch.equal(first, again) and not torch.equal(first, second)


# --- rule 7: bitwise repeatable ---


@pytest.mark.parametrize(
    "name", ["dense_long", "blocks_128", "bias_heads_pairs", "grouped", "dropout_blocks", "one_query_grouped"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rule_07_same_bits_for_any_thread_count(name: str, dtype: torch.dtype, backend: str) -> None:
    if backend == "reference":
        pytest.skip("the reference multiplies with PyTorch's own matmul, which splits by thread count")
    case, drawn = CASE[name], draw(CASE[name], dtype)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            leaves = {
                k: drawn[k].detach().requires_grad_() for k in ("query", "key", "value", "bias") if drawn[k] is not None
            }
            out = attention(
                **leaves, mask=drawn["mask"], is_causal=bool(case.causal), causal_alignment=case.causal,
                dropout_p=case.dropout_p, dropout_seed=1, backend=backend,
            )  # fmt: skip
            results.append([out, *torch.autograd.grad(out, list(leaves.values()), drawn["grad_out"])])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# --- rule 8: see test_conformance.py; here the gradient itself, by finite differences ---


@pytest.mark.parametrize(
    "name", ["dense", "bits", "blocks_window_lengths", "bias_grouped", "dropout", "causal_bottom_right", "grad_lse"]
)
def test_rule_08_gradcheck_in_float64(name: str, backend: str) -> None:
    case = Case(**{**CASE[name].__dict__, "B": 1, "Nq": 19, "Nk": 21, "D": 3, "Dv": 2})
    drawn = draw(case, torch.float64)
    names = [k for k in ("query", "key", "value", "bias") if drawn[k] is not None]

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        out, lse = attention(
            **dict(zip(names, leaves, strict=True)), mask=drawn["mask"], is_causal=bool(case.causal),
            causal_alignment=case.causal, dropout_p=case.dropout_p, dropout_seed=3, return_lse=True, backend=backend,
        )  # fmt: skip
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    leaves = [drawn[k].clone().requires_grad_() for k in names]
    assert torch.autograd.gradcheck(call, leaves, nondet_tol=0.0)


# --- rule 9: memory ---

PEAK = """
import resource, sys, torch
from efficient_attn import attention, SlidingWindow
backend, n, backward = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "backward"
torch.set_num_threads(2)
small = [torch.randn(1, 1, 256, 32, requires_grad=backward) for _ in range(3)]
run = lambda q, k, v: attention(q, k, v, mask=SlidingWindow(left=64, right=64) , backend=backend)
out = run(*small)
if backward: out.sum().backward()
q, k, v = (torch.randn(1, 1, n, 32, requires_grad=backward) for _ in range(3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = run(q, k, v)
if backward: out.sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_rule_09_memory_is_linear(mode: str) -> None:
    """Peak extra memory of a window at 64k tokens stays under 40 numbers of float32 a token and dimension."""
    n = 65536
    command = [sys.executable, "-c", PEAK, "cpu", str(n), mode]
    extra = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert extra < 40 * n * 32 * 4, f"{extra / 2**20:.1f} MiB extra for {n} tokens"


# --- rule 10: 64-bit indices ---


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse virtual memory")
def test_rule_10_strides_beyond_32_bits(backend: str) -> None:
    """Heads that lie 2^31 elements apart: any 32-bit offset would read elsewhere or crash."""
    import mmap

    far, n, d = 2**31 + 64, 5, 8
    pages = mmap.mmap(-1, (far + n * d) * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    memory = torch.frombuffer(pages, dtype=torch.bfloat16)
    wide = memory.as_strided((1, 2, n, d), (2 * far, far, d, 1))
    wide.copy_(torch.randn(1, 2, n, d))
    narrow = wide.contiguous()
    assert torch.equal(attention(wide, wide, wide, backend=backend), attention(narrow, narrow, narrow, backend=backend))


# --- rule 11: wrong input ---

Q = torch.randn(2, 4, 6, 8)


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"query": Q[0]}, InputError, "4 dimensions"),
        ({"query": [1]}, InputTypeError, "must be a tensor"),
        ({"query": Q.long()}, InputTypeError, "share one dtype"),
        ({"key": Q.half()}, InputTypeError, "share one dtype"),
        ({"key": Q.to("meta")}, InputError, "one device"),
        ({"key": Q[..., :4]}, InputError, "expected query"),
        ({"key": Q[:1]}, InputError, "expected query"),
        ({"value": Q[:, :, :5]}, InputError, "expected query"),
        ({"key": Q[:, :3], "value": Q[:, :3]}, InputError, "multiple of the key/value heads"),
        ({"query": Q[..., :0], "key": Q[..., :0]}, InputError, "head_dim"),
        ({"value": torch.randn(2, 4, 6, 577)}, InputError, "head_dim"),
        ({"bias": torch.ones(6, 6, dtype=torch.bool)}, InputTypeError, "mask="),
        ({"bias": torch.ones(6, 6, dtype=torch.float16)}, InputTypeError, "bias must be"),
        ({"bias": torch.ones(5, 6)}, InputError, "does not broadcast"),
        ({"bias": torch.ones(1, 1, 1, 1, 6)}, InputError, "at most 4"),
        ({"mask": torch.ones(6, 6)}, InputTypeError, "bias="),
        ({"mask": torch.ones(3, 6, dtype=torch.bool)}, InputError, "does not broadcast"),
        ({"mask": "causal"}, InputTypeError, "mask must be"),
        ({"mask": BlockMask.from_dense(torch.ones(6, 7, dtype=torch.bool))}, InputError, "the mask is for"),
        ({"mask": BlockMask.from_dense(torch.ones(3, 1, 6, 6, dtype=torch.bool))}, InputError, "the mask is for"),
        ({"mask": BlockMask.from_lengths(torch.tensor([1, 2, 3]), q_len=6, kv_len=6)}, InputError, "the mask is for"),
        ({"dropout_p": 1.0}, InputError, "dropout_p"),
        ({"dropout_p": -0.1}, InputError, "dropout_p"),
        ({"dropout_p": 0.1, "dropout_seed": torch.ones(2)}, InputTypeError, "dropout_seed"),
        ({"is_causal": True, "causal_alignment": "middle"}, InputError, "causal_alignment"),
        ({"backend": "fastest"}, InputError, "choose from"),
    ],
)
def test_rule_11_wrong_input_raises_a_named_error(arguments: dict, error: type, text: str) -> None:
    call = {"query": Q, "key": Q, "value": Q, **arguments}
    with pytest.raises(error, match=text):
        attention(**call)


# --- rule 12: the choice of backend ---


def test_rule_12_auto_takes_the_fastest_and_explains() -> None:
    told = explain(Q, Q, Q, mask=SlidingWindow(left=1, right=1))
    assert told.backend == next(name for name, why in told.reasons.items() if not why)
    assert told.density == pytest.approx((6 * 3 - 2) / 36)
    assert told.flops == 2 * 16 * 8 * (8 + 8)
    assert told.backend in str(told)


def test_rule_12_explain_takes_the_arguments_of_attention_and_no_others() -> None:
    with pytest.raises(TypeError, match="is_casual"):
        explain(Q, Q, Q, is_casual=True)
    with pytest.raises(InputError, match="ambiguous"):
        explain(Q, Q[:, :, :4], Q[:, :, :4], is_causal=True)
    asked, known = (list(inspect.signature(function).parameters) for function in (explain, attention))
    assert asked == known


def test_rule_12_explain_counts_the_bytes_of_lse() -> None:
    single, double = (explain(*[Q.to(dtype)] * 3).bytes for dtype in (torch.float32, torch.float64))
    assert double == 2 * single  # every tensor, lse included


@pytest.mark.parametrize("masked", [False, True])
def test_rule_12_explain_needs_no_backend(masked: bool) -> None:
    told = explain(Q, Q, Q, mask=torch.ones(6, 6, dtype=torch.bool) if masked else None, backend="cuda")
    assert told.backend is None and told.density == 1.0 and told.reasons["cuda"]


def test_rule_12_explicit_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from efficient_attn import backends

    monkeypatch.setattr(backends.BACKENDS["cpu"].attention, "not_supported_reasons", lambda call: ["out of order"])
    backends.cached_select.cache_clear()
    try:
        with pytest.raises(UnsupportedError, match="out of order"):
            attention(Q, Q, Q, backend="cpu")
        told = explain(Q, Q, Q)
        assert told.backend == "reference" and told.reasons["cpu"] == ["out of order"]
        torch.testing.assert_close(attention(Q, Q, Q), attention(Q, Q, Q, backend="reference"))
    finally:
        backends.cached_select.cache_clear()


# --- rule 13: transformations ---


@pytest.mark.parametrize("dynamic", [False, True])
def test_rule_13_compile(dynamic: bool, backend: str) -> None:
    mask = random_blocks((16, 16))(Case("", Nq=40, Nk=40), torch.Generator().manual_seed(0))

    def step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        dense = attention(query, key, value, is_causal=True, backend=backend)
        dropped = attention(query, key, value, dropout_p=0.5, dropout_seed=7, backend=backend)
        return dense + dropped * 2 + attention(query, key, value, mask=mask, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    leaves = tensors(2, 2, 40, 8)
    for _ in range(2):
        expected, found = step(*leaves), compiled(*leaves)
        torch.testing.assert_close(found, expected)
        for a, b in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in (found, expected)), strict=True):
            torch.testing.assert_close(a, b)


def test_rule_13_compile_bool_mask_and_unseeded_dropout(backend: str) -> None:
    visible = torch.rand(33, 33) < 0.5
    compiled = torch.compile(
        lambda q, k, v, m: attention(q, k, v, mask=m, dropout_p=0.1, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    leaves = tensors(1, 2, 33, 8)
    assert compiled(*leaves, visible).isfinite().all()
    plain = torch.compile(
        lambda q, k, v, m: attention(q, k, v, mask=m, backend=backend), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(plain(*leaves, visible), attention(*leaves, mask=visible, backend=backend))


def test_rule_13_autocast(backend: str) -> None:
    query, key, value = tensors(1, 2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(query, key, value, backend=backend)
        (gradient,) = torch.autograd.grad(out.sum(), query)
    assert out.dtype == torch.bfloat16 and gradient.dtype == torch.float32


def test_rule_13_checkpoint_repeats_dropout(backend: str) -> None:
    leaves = tensors(1, 2, 16, 8)
    call = lambda *t: attention(*t, dropout_p=0.5, backend=backend)  # noqa: E731
    torch.manual_seed(0)
    plain = torch.autograd.grad(call(*leaves).sum(), leaves)
    torch.manual_seed(0)
    out = torch.utils.checkpoint.checkpoint(call, *leaves, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, torch.autograd.grad(out.sum(), leaves), strict=True))


@pytest.mark.parametrize("name", ["dense", "bits", "bias_per_batch", "lengths", "dropout"])
def test_rule_13_vmap(name: str, backend: str) -> None:
    case, drawn = CASE[name], draw(CASE[name], torch.float32)
    stack = [torch.stack([drawn[k], drawn[k] * 0.5, drawn[k] + 1]) for k in ("query", "key", "value")]

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention(
            query,
            key,
            value,
            mask=drawn["mask"],
            bias=drawn["bias"],
            dropout_p=case.dropout_p,
            dropout_seed=1,
            backend=backend,
        )

    mapped = torch.func.vmap(call)(*stack)
    torch.testing.assert_close(mapped, torch.stack([call(*(t[k] for t in stack)) for k in range(3)]))
    per_sample = torch.func.vmap(torch.func.grad(lambda q, k, v: call(q, k, v).square().sum()))(*stack)
    leaf = stack[0][1].clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(leaf, stack[1][1], stack[2][1]).square().sum(), leaf)
    torch.testing.assert_close(per_sample[1], expected)


@pytest.mark.parametrize(
    "name", ["dense", "blocks_64_32", "bias_heads_pairs", "bias_per_key", "grouped", "dropout", "grad_lse", "lengths"]
)
def test_rule_13_double_backward(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from efficient_attn.ops import second_derivative

    monkeypatch.setattr(second_derivative, "SCORES", 1)  # the 19 rows in two pieces
    case = Case(**{**CASE[name].__dict__, "B": 1, "Nq": 19, "Nk": 21, "D": 3, "Dv": 2})
    drawn = draw(case, torch.float64)
    names = [k for k in ("query", "key", "value", "bias") if drawn[k] is not None]

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        out, lse = attention(
            **dict(zip(names, leaves, strict=True)), mask=drawn["mask"], is_causal=bool(case.causal),
            causal_alignment=case.causal, dropout_p=case.dropout_p, dropout_seed=3, return_lse=True, backend=backend,
        )  # fmt: skip
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    leaves = [drawn[k].clone().requires_grad_() for k in names]
    assert torch.autograd.gradgradcheck(call, leaves, nondet_tol=0.0, fast_mode=True)


def test_rule_13_third_derivative_is_a_named_error(backend: str) -> None:
    leaf = torch.randn(1, 1, 4, 3, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(attention(leaf, leaf, leaf, backend=backend).sum(), leaf, create_graph=True)[0]
    with pytest.raises(UnsupportedError, match="third"):
        torch.autograd.grad(first.square().sum(), leaf, create_graph=True)


class Windowed(torch.nn.Module):
    """A module that holds a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = SlidingWindow(left=3, right=0).block_mask(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return attention(x, x, x, mask=self.mask)


def test_rule_13_forward_mode_is_a_named_error() -> None:
    x = torch.randn(1, 1, 4, 3)
    with pytest.raises(UnsupportedError, match="reverse mode"):
        torch.func.jvp(lambda q: attention(q, x, x), (x,), (x,))


def test_rule_13_export_and_copies() -> None:
    x, model = torch.randn(1, 2, 12, 8), Windowed()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)


def test_import_and_calls_leave_the_process_as_it_was() -> None:
    """No flush-to-zero, no changed rounding, thread count, random state or working directory (bug class B44)."""
    script = """
import os, torch
state = lambda: (5e-324 / 2, 1e-310 * 1.0, 0.1 + 0.2, torch.get_num_threads(), torch.initial_seed(), os.getcwd(),
                 torch.tensor(1e-40) * 1, torch.get_rng_state().sum(), dict(os.environ))
before = state()
import efficient_attn
x = torch.full((1, 2, 300, 16), 1e-3, requires_grad=True)
efficient_attn.attention(x, x, x).sum().backward()
after = state()
assert before == after, (before[:-1], after[:-1])
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=dict(os.environ))


def test_fork_after_use_does_not_hang() -> None:
    """A child forked after the parent's kernels ran may call them too (GNU OpenMP alone would hang, bug class B41)."""
    script = """
import os, torch
from efficient_attn import attention
torch.set_num_threads(2)
x = torch.randn(1, 4, 600, 32)
result = lambda: attention(x, x, x).numpy().tobytes()  # no PyTorch operator of the child may meet OpenMP either
expected = result()
child = os.fork()
if child == 0:
    os._exit(0 if result() == expected else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_merge_attention_joins_disjoint_keys(backend: str) -> None:
    query, key, value = tensors(2, 2, 30, 8)
    whole, whole_lse = attention(query, key, value, return_lse=True, backend=backend)
    cuts = [slice(0, 11), slice(11, 11), slice(11, 30)]
    parts = [attention(query, key[:, :, c], value[:, :, c], return_lse=True, backend=backend) for c in cuts]
    merged, merged_lse = efficient_attn.merge_attention([p[0] for p in parts], [p[1] for p in parts])
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(merged_lse, whole_lse)
    a, b = (torch.autograd.grad(o.square().sum(), (query, key, value)) for o in (merged, whole))
    for mine, expected in zip(a, b, strict=True):
        torch.testing.assert_close(mine, expected)


def test_attention_weights_are_those_of_attention(backend: str) -> None:
    query, key, value = tensors(1, 4, 20, 8)
    visible = torch.rand(20, 20) < 0.6
    arguments: dict = {"mask": visible, "bias": torch.randn(20, 20), "dropout_p": 0.3, "dropout_seed": 2}
    if backend == "cuda":
        with pytest.raises(UnsupportedError, match="returns no attention weights"):
            efficient_attn.attention_weights(query, key, **arguments, backend=backend)
        return
    weights = efficient_attn.attention_weights(query, key, **arguments, backend=backend)
    mean = efficient_attn.attention_weights(query, key, **arguments, average=True, backend=backend)
    torch.testing.assert_close(mean, weights.mean(1))
    torch.testing.assert_close(weights @ value, attention(query, key, value, **arguments, backend=backend))
    expected, _, _ = eager_attention(query, key, value, visible, arguments["bias"], 8**-0.5)
    torch.testing.assert_close(
        attention(query, key, value, mask=visible, bias=arguments["bias"], backend=backend), expected
    )


def test_padding_hides_as_nothing_else_does(backend: str, device: torch.device) -> None:
    """Padding with holes becomes -inf and no large number: a row of nothing but padding has lse -inf."""
    query, key = (torch.randn(2, 1, n, 8, device=device) for n in (3, 5))
    key_mask = torch.tensor([[True, False, True, True, False], [False] * 5], device=device)
    out, lse = padded_attention(query, key, key, key_mask, return_lse=True, backend=backend)
    assert torch.isfinite(lse[0]).all() and (lse[1] == -torch.inf).all() and (out[1] == 0).all()
