"""Positive features of linear attention whose exponents span far more than float32's range: keys of standard deviation
8 give Performer features around e^-300, and e^-100 of one key is all that an early query sees.

The truth is the definition in float64 on logarithms, where nothing overflows. Triton and CUDA are tested through the
operator in processes of their own: see support/linear_cases.py.
"""

from __future__ import annotations

import pytest
import torch
from support.feature_range import CASES, check_range, inputs_of
from torch import Tensor

from efficient_attn import UnsupportedError, linear_attention, performer_attention
from efficient_attn.backends import not_supported_reasons
from efficient_attn.backends.call import LinearCall
from efficient_attn.methods import (
    elu_attention,
    elu_weights,
    parse,
    performer_features,
    performer_weights,
    random_projection,
)

FORWARD = torch.ops.efficient_attn.linear_attention_forward
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why), reason="; ".join(why)))
    for name, why in not_supported_reasons(LinearCall(torch.device("cpu"), torch.float64)).items()
    if name in ("reference", "cpu")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("feature_map", ["elu", "exp", "performer_softmax"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_range_of_exponents(backend: str, feature_map: str, case: tuple, dtype: torch.dtype) -> None:
    check_range(backend, feature_map, case, dtype)


@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.parametrize("feature_map", ["elu", "performer_softmax"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if "cpu" in name.values])
def test_long_sequences_in_every_schedule(backend: str, feature_map: str, spread: float) -> None:
    """Several segments of the CPU's timeline, taken in turn by one thread or side by side, with the same bits."""
    case = (True, 1200, 1200, 0, spread, spread, -40.0 if spread > 1 else 0.0, False)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 4):
            torch.set_num_threads(number)
            found.append(check_range(backend, feature_map, case, torch.float32, heads=(1, 1)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("hidden", [torch.nan, torch.inf, 1e3, -1e3])
@pytest.mark.parametrize("feature_map", ["elu", "exp", "performer_softmax"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row_depends_on_a_later_key(backend: str, feature_map: str, hidden: float) -> None:
    """Not a bit, although the shift that a later key would raise is shared by a whole chunk of rows. In the reference
    the products have other shapes then, and BLAS other roundings.
    """
    bounds = {"rtol": 1e-5, "atol": 1e-6} if backend == "reference" else {"rtol": 0.0, "atol": 0.0}
    for spread in (1.0, 6.0):
        q, k, v, projection, _ = inputs_of(feature_map, (True, 90, 90, 0, spread, spread, 0.0, False), (2, 1))
        options = (None, projection, True, 0, feature_map, 0.25, backend)
        before = FORWARD(q, k, v, *options)[0]
        for cut in (1, 37, 64, 70):
            later = k.clone(), v.clone()
            for tensor in later:
                tensor[:, :, cut:] = hidden
            torch.testing.assert_close(FORWARD(q, *later, *options)[0][:, :, :cut], before[:, :, :cut], **bounds)


@pytest.mark.parametrize("hidden", [torch.nan, torch.inf, 1e3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_no_query_sees_have_gradient_0(backend: str, hidden: float) -> None:
    def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {"is_causal": True, "causal_alignment": "top_left", "backend": backend}
        if name == "performer":
            return performer_attention(q, k, v, random_projection(16, 8), **options)
        if name == "learned":
            return performer_attention(q, k, v, random_projection(16, 8).requires_grad_(), **options)
        return linear_attention(q, k, v, feature_map=name, **options)

    for name in ("identity", "elu", "relu", "exp", "performer", "learned"):
        q, k, v = (torch.rand(1, 2, n, 8) for n in (3, 9, 9))
        k[:, :, 3:], v[:, :, 3:] = hidden, hidden
        tensors = [t.requires_grad_() for t in (q, k, v)]
        found = torch.autograd.grad(attend(name, *tensors).square().sum(), tensors)
        assert all(g.isfinite().all() for g in found), name
        assert not found[1][:, :, 3:].any() and not found[2][:, :, 3:].any(), name


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_normaliser_is_that_of_unshifted_features(backend: str, is_causal: bool) -> None:
    q, k, v = (torch.randn(1, 2, 50, 8, dtype=torch.float64).sub(3).requires_grad_() for _ in range(3))
    out, n = linear_attention(q, k, v, is_causal=is_causal, feature_map="elu", return_normaliser=True, backend=backend)
    pairs = (torch.nn.functional.elu(q) + 1) @ (torch.nn.functional.elu(k) + 1).mT
    pairs = pairs.tril() if is_causal else pairs
    right = pairs @ v / pairs.sum(-1, keepdim=True), pairs.sum(-1)
    cotangents = torch.randn_like(out), torch.randn_like(n)
    for ours, theirs in zip((out, n), right, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(
        torch.autograd.grad((out, n), (q, k, v), cotangents),
        torch.autograd.grad(right, (q, k, v), cotangents),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("spread", [1.0, 8.0, 30.0])
def test_weights_and_learned_projections_follow(spread: float, is_causal: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 130, 16) * spread for _ in range(3))
    projection = random_projection(32, 16)
    out = performer_attention(q, k, v, projection, is_causal=is_causal)
    weights = performer_weights(q, k, projection, is_causal=is_causal)
    bounds = {"rtol": 1e-4, "atol": 1e-4 * spread}
    torch.testing.assert_close(weights @ v, out, **bounds)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 130))
    learned = projection.clone().requires_grad_()
    ours = performer_attention(q, k, v, learned, is_causal=is_causal)
    torch.testing.assert_close(ours, out, **bounds)
    assert torch.autograd.grad(ours.sum(), learned)[0].isfinite().all()
    out = elu_attention(q, k, v, is_causal=is_causal)
    torch.testing.assert_close(elu_weights(q, k, is_causal=is_causal) @ v, out, **bounds)
    if is_causal and spread > 1:
        with pytest.raises(UnsupportedError, match=r"span more than e\^30 .* Call performer_attention"):
            performer_features(q, k, projection, is_causal=True)


def test_a_causal_tail_keeps_its_mass() -> None:
    """A hybrid's tail of small features: blocks of keys have scales of their own, so that none is lost."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16) * 8, torch.randn(1, 2, 300, 16)
    method = parse("sliding_window:left=8,right=0+performer:features=64,block=16")
    state = method.build(32, 2, 16)
    out, weights = method.attend(q, k, v, state=state, is_causal=True, need_weights=True)
    assert weights is not None
    torch.testing.assert_close(weights @ v, out, rtol=1e-4, atol=1e-4)
    wide, _ = method.attend(*(t.double() for t in (q, k, v)), state=state, is_causal=True)
    torch.testing.assert_close(out.double(), wide, rtol=1e-3, atol=1e-3)
