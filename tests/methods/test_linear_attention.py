"""Every backend of linear attention against the definition in float64: dtypes, feature maps, sizes, masks, threads."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import pytest
import torch

from efficient_attn import backends
from efficient_attn.backends.call import LinearCall
from efficient_attn.backends.features import FEATURE_MAPS as MAPS
from efficient_attn.backends.features import query_constants
from efficient_attn.errors import UnsupportedError
from efficient_attn.methods import linear_attention, performer_attention, random_projection

# Triton's interpreter and the emulator of the CUDA kernels are slow: test_triton.py and test_cuda_emulator.py run some
# of these cases in processes of their own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = bool(os.environ.get("EFFICIENT_ATTN_CUDA_EMULATOR"))
REASONS = backends.not_supported_reasons(LinearCall(torch.device("cpu"), torch.bfloat16 if EMULATED else torch.float32))
HERE = {"triton"} if INTERPRETED else {"cuda"} if EMULATED else REASONS.keys() - {"triton", "cuda"}
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why), reason="; ".join(why)))
    for name, why in REASONS.items()
    if name in HERE
]
KERNELS = [backend for backend in BACKENDS if backend.values != ("reference",)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORWARD = torch.ops.efficient_attn.linear_attention_forward
# Room beside 1.5 times the error of the reference in the same dtype: the order of the sums, and 1 ulp of the result.
SUMS = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 5e-4}


class Case(NamedTuple):
    hq: int
    hkv: int
    nq: int
    nk: int
    d: int
    dv: int
    features: int = 9  # of a projection
    offset: int | None = None  # None: not causal
    masked: bool = False


CASES = {
    "one": Case(1, 1, 1, 1, 2, 1),
    "odd": Case(3, 1, 67, 131, 5, 7),
    "no-values": Case(2, 1, 20, 30, 3, 0, offset=10),
    "vectors": Case(2, 2, 128, 64, 16, 32, features=48),
    "masked": Case(4, 2, 70, 150, 17, 3, masked=True),
    "causal": Case(4, 2, 150, 150, 8, 5, offset=0, features=33),
    "causal-masked": Case(2, 1, 130, 200, 6, 18, offset=70, masked=True),
    "causal-early": Case(2, 2, 200, 90, 4, 4, offset=-110),
    "causal-none": Case(1, 1, 30, 90, 4, 4, offset=-200),
    "causal-all": Case(1, 1, 90, 30, 4, 4, offset=10**9),
    "segments": Case(1, 1, 2100, 2300, 4, 6, features=5),
    "causal-segments": Case(2, 1, 2300, 2300, 4, 6, features=5, offset=0),
}


def draw(case: Case, feature_map: str, dtype: torch.dtype):
    """Inputs with NaN behind the mask, the mask and the projection."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, *shape, generator=g, dtype=torch.float64)
        for shape in ((case.hq, case.nq, case.d), (case.hkv, case.nk, case.d), (case.hkv, case.nk, case.dv))
    )
    if feature_map in ("identity", "relu"):  # mostly positive: the normaliser stays away from 0
        q, k = q.abs() + 0.1, k.abs() + 0.1
    projection = None
    if feature_map.startswith("performer"):
        projection = torch.randn(case.hkv, case.features, case.d, generator=g, dtype=torch.float64)
        projection = projection.to(torch.float64 if dtype == torch.float64 else torch.float32)
    key_mask = None
    if case.masked:
        key_mask = torch.rand(2, case.nk, generator=g) < 0.6
        hidden = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.inf)
    return [t.to(dtype) for t in (q, k, v)], key_mask, projection


def results(backend: str, inputs, key_mask, projection, case: Case, feature_map: str):
    """out, normaliser, dq, dk, dv for cotangents that depend on the shapes only.

    The normaliser is that of features without a shift, Performer's its logarithm: half gradients could not hold others.
    """
    leaves = [t.detach().requires_grad_() for t in inputs]
    causal = case.offset is not None
    out, normaliser, shift = FORWARD(*leaves, key_mask, projection, causal, case.offset or 0, feature_map, 0.4, backend)
    if shift.shape[2]:
        constants = query_constants(shift, normaliser)
        if feature_map == "elu":
            normaliser = normaliser * constants.exp()
        else:
            seen = normaliser > 0
            normaliser = torch.where(seen, normaliser.masked_fill(~seen, 1.0).log() + constants, 0.0)
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in (out, normaliser)]
    return [t.detach() for t in (out, normaliser, *torch.autograd.grad((out, normaliser), leaves, cotangents))]


# Rows are read and written alike for all maps: types other than float32 see one without and one with a projection, and
# half features as they are.
MAPS_AND_TYPES = [
    *((feature_map, torch.float32) for feature_map in MAPS),
    *(
        (feature_map, dtype)
        for dtype in DTYPES
        if dtype != torch.float32
        for feature_map in ("elu", "performer_softmax")
    ),
    *(("identity", dtype) for dtype in (torch.bfloat16, torch.float16)),
]


@pytest.mark.parametrize(("feature_map", "dtype"), MAPS_AND_TYPES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", KERNELS)
def test_equals_the_definition(backend, name, feature_map, dtype):
    if backend == "cuda" and dtype in (torch.float32, torch.float64):
        pytest.skip("tensor cores multiply halves")
    case = CASES[name]
    inputs, key_mask, projection = draw(case, feature_map, dtype)
    exact = results("reference", [t.double() for t in inputs], key_mask, projection, case, feature_map)
    plain = results("reference", inputs, key_mask, projection, case, feature_map)
    found = results(backend, inputs, key_mask, projection, case, feature_map)
    for ours, theirs, wanted in zip(found, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype and ours.isfinite().all()
        if not wanted.numel():
            continue
        size = wanted.abs().max()
        allowed = 1.5 * (theirs.double() - wanted).abs().max() + SUMS[dtype] * size
        assert (ours.double() - wanted).abs().max() <= allowed
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        assert all((t.masked_select(hidden) == 0).all() for t in found[3:])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1, 2, 130])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tiny_normaliser_divides(backend, keys, dtype, is_causal):
    """phi = e^x near the root of the smallest number: 1 / n is infinite, and out still an average of the values."""
    if backend == "cuda" and dtype in (torch.float32, torch.float64):
        pytest.skip("tensor cores multiply halves")
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("it serves no float64")
    x = -360.0 if dtype == torch.float64 else -46.0
    for width in (1, 5, 17):
        q, k = torch.full((1, 2, keys, 3), x, dtype=dtype), torch.full((1, 1, keys, 3), x, dtype=dtype)
        v = torch.rand(1, 1, keys, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        out = FORWARD(q, k, v, None, None, is_causal, 0, "elu", 1.0, backend)[0]
        count = torch.arange(1, keys + 1)[:, None] if is_causal else keys
        exact = (v.double().cumsum(2) if is_causal else v.double().sum(2, keepdim=True)) / count
        assert (out.double() - exact).abs().max() < {torch.bfloat16: 4e-3, torch.float16: 1e-3}.get(dtype, 1e-4)


@pytest.mark.parametrize("feature_map", ["elu", "performer_softmax"])
@pytest.mark.parametrize("name", ["masked", "causal", "causal-early", "segments", "causal-segments"])
@pytest.mark.parametrize("backend", KERNELS)
def test_any_number_of_threads_gives_the_same_bits(backend, name, feature_map):
    case = CASES[name]
    case = case._replace(nq=2 * case.nq, nk=2 * case.nk)  # enough work for threads, several segments
    inputs, key_mask, projection = draw(case, feature_map, torch.float32)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            runs.append(results(backend, inputs, key_mask, projection, case, feature_map))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["query", "key", "value", "grad"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_gradients_do_not_mix_what_is_not_visible(backend, what, poison):
    """A NaN at place 100 reaches out and dq from there on, and dk and dv up to there at most."""
    now, case = 100, Case(1, 1, 200, 200, 4, 3, offset=0)
    inputs, _, _ = draw(case, "elu", torch.float32)
    g = torch.Generator().manual_seed(2)
    grad_out = torch.randn(2, 1, 200, 3, generator=g)

    def run(*tensors):
        q, k, v, grad = (t.clone() for t in tensors)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = linear_attention(*leaves, is_causal=True, feature_map="elu", backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    clean = run(*inputs, grad_out)
    tensors = dict(zip(("query", "key", "value", "grad"), (*inputs, grad_out), strict=True))
    tensors[what] = tensors[what].clone()
    tensors[what][:, :, now, 1] = poison
    out, dq, _, _ = run(*tensors.values())
    assert torch.equal(out[:, :, :now], clean[0][:, :, :now]) and torch.equal(dq[:, :, :now], clean[1][:, :, :now])
    if what in ("query", "grad"):
        _, _, dk, dv = run(*tensors.values())
        assert torch.equal(dk[:, :, now + 1 :], clean[2][:, :, now + 1 :])
        assert torch.equal(dv[:, :, now + 1 :], clean[3][:, :, now + 1 :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_read_in_place(backend):
    base = [torch.rand(2, 90, 3, 5, dtype=torch.float64) for _ in range(3)]  # (B, N, H, D), as a module splits heads
    views = [t.transpose(1, 2) for t in base]
    odd = [t.mT.contiguous().mT for t in views]  # the last dimension has a stride
    for is_causal in (False, True):
        expected = linear_attention(*(t.contiguous() for t in views), is_causal=is_causal, backend=backend)
        for inputs in (views, odd):
            found = linear_attention(*inputs, is_causal=is_causal, backend=backend)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_features_in_float32_beside_half_values():
    q, k = torch.rand(1, 2, 70, 4), torch.rand(1, 2, 70, 4)
    v = torch.randn(1, 2, 70, 3).bfloat16()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    for is_causal in (False, True):
        gradients = []
        for backend in ("auto", "reference"):
            out = linear_attention(*leaves, is_causal=is_causal, backend=backend)
            assert out.dtype == torch.bfloat16
            gradients.append(torch.autograd.grad(out.float().square().sum(), leaves))
        for ours, theirs in zip(*gradients, strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_a_projection_that_learns_goes_through_autograd():
    q, k, v = (torch.randn(1, 2, 20, 4, dtype=torch.float64) for _ in range(3))
    projection = random_projection(6, 4, dtype=torch.float64)
    expected = performer_attention(q, k, v, projection)
    projection.requires_grad_()
    out = performer_attention(q, k, v, projection)
    torch.testing.assert_close(out, expected)
    assert torch.autograd.grad(out.sum(), projection)[0].isfinite().all()
    out, _, _ = FORWARD(q, k, v, None, projection, False, 0, "performer_relu", 1.0, "reference")
    with pytest.raises(UnsupportedError, match="no gradient"):
        out.sum().backward()


def test_vmap_over_projections():
    q, k, v = (torch.randn(1, 2, 20, 4, dtype=torch.float64) for _ in range(3))
    projections = torch.stack([random_projection(6, 4, dtype=torch.float64) for _ in range(3)])
    mapped = torch.vmap(lambda w: performer_attention(q, k, v, w))(projections)
    for out, projection in zip(mapped, projections, strict=True):
        torch.testing.assert_close(out, performer_attention(q, k, v, projection))


def test_an_explicit_backend_never_falls_back(monkeypatch):
    here, meta = (LinearCall(torch.device(kind), torch.float32) for kind in ("cpu", "meta"))
    reasons = backends.not_supported_reasons(meta)
    assert "CPU tensors" in reasons["cpu"][-1] and reasons["reference"] == []
    assert backends.select("auto", meta) == "reference"
    with pytest.raises(UnsupportedError, match=r"backend='cpu' cannot serve this call.*meta"):
        backends.select("cpu", meta)
    with pytest.raises(UnsupportedError, match=r"not torch\.float8"):
        backends.select("cpu", here._replace(dtype=torch.float8_e4m3fn))
    monkeypatch.setattr("efficient_attn.backends.cpu.attention.MISSING", "not built")
    assert backends.select("auto", here) == "reference"
    with pytest.raises(UnsupportedError, match="not built"):
        linear_attention(*(torch.rand(1, 1, 2, 2) for _ in range(3)), backend="cpu")
