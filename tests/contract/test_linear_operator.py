"""The operator of linear attention in float64: derivatives, chunks, normalisers and memory.

test_linear_attention.py has its kernels in every dtype, test_lowrank.py the methods that stand on it.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_attn import backends
from efficient_attn.backends.call import LinearCall
from efficient_attn.backends.features import FEATURE_MAPS, SHIFTED
from efficient_attn.backends.reference import linear_attention as reference_linear
from efficient_attn.errors import UnsupportedError
from efficient_attn.methods import linear_attention, linear_attention_weights

B = 2
FORWARD = torch.ops.efficient_attn.linear_attention_forward
BACKWARD = torch.ops.efficient_attn.linear_attention_backward
CPU = torch.device("cpu")
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why), reason="; ".join(why)))
    for name, why in backends.not_supported_reasons(LinearCall(CPU, torch.float64)).items()
    if name != "triton"  # no float64 there; test_triton.py tests it
]


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def features(hq, hkv, nq, nk, f=4, dtype=torch.float64):
    g = generator()
    shapes = ((B, hq, nq, f), (B, hkv, nk, f), (B, hkv, nk, 3))
    return [torch.rand(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def projection_for(feature_map):
    """For 2 key/value heads of 4 inputs: 5 features a head, or None where the map takes no projection."""
    if feature_map.startswith("performer"):
        return torch.randn(2, 5, 4, generator=generator(7), dtype=torch.float64)
    return None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("is_causal", "offset"), [(False, 0), (True, 0), (True, 2), (True, -2)])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_primitive_gradcheck(backend, feature_map, is_causal, offset, masked):
    inputs = [t.detach().sub(0.4).requires_grad_() for t in features(4, 2, 5, 7)]
    if feature_map == "identity":
        inputs = features(4, 2, 5, 7)
    key_mask = torch.rand(B, 7, generator=generator()) < 0.6 if masked else None
    operands = (key_mask, projection_for(feature_map), is_causal, offset, feature_map, 0.5, backend)
    # With a shift the normaliser is only defined up to a factor that has no gradient.
    results = 1 if feature_map in SHIFTED else 2
    # Fast: along random directions, which a wrong element does not survive, instead of element by element.
    assert torch.autograd.gradcheck(lambda *t: FORWARD(*t, *operands)[:results], inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("feature_map", "is_causal"), [("identity", True), ("elu", True), ("performer_softmax", False)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_primitive_opcheck(backend, feature_map, is_causal):
    inputs = features(4, 2, 5, 7)
    key_mask = torch.rand(B, 7, generator=generator()) < 0.6
    key_mask, rest = (key_mask, projection_for(feature_map)), (is_causal, 2, feature_map, 0.5, backend)
    torch.library.opcheck(FORWARD.default, (*inputs, *key_mask, *rest))
    saved = [t.detach() for t in FORWARD(*inputs, *key_mask, *rest)]
    torch.library.opcheck(
        BACKWARD.default,
        (torch.ones_like(saved[0]), None, *inputs, *key_mask, *saved, *rest),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("nq", "nk", "alignment"),
    [(300, 300, None), (129, 400, "bottom_right"), (400, 129, "bottom_right"), (260, 300, "top_left")],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_primitive_over_chunks(backend, nq, nk, alignment):
    inputs = features(4, 2, nq, nk)
    out, normaliser = linear_attention(
        *inputs, is_causal=True, causal_alignment=alignment, return_normaliser=True, backend=backend
    )
    offset = nk - nq if alignment == "bottom_right" else 0
    q, k, v = inputs[0], *(t.repeat_interleave(2, 1) for t in inputs[1:])
    A = torch.tril(q @ k.mT, offset)
    total = A.sum(-1)
    expected = torch.where(total[..., None] == 0, 0.0, A @ v / total[..., None].clamp(min=1e-9))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(normaliser, total)
    P = linear_attention_weights(*inputs[:2], is_causal=True, causal_alignment=alignment)
    torch.testing.assert_close(P @ v, expected)
    cotangents = (torch.randn_like(out), torch.randn_like(total))
    found = torch.autograd.grad((out, normaliser), inputs, cotangents)
    for ours, theirs in zip(found, torch.autograd.grad((expected, total), inputs, cotangents), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_normaliser_zero_gives_zero_and_no_gradient(backend, is_causal):
    q, k, v = features(2, 2, 6, 6)
    with torch.no_grad():
        q[:, :, 2] = 0
    out, normaliser = linear_attention(q, k, v, is_causal=is_causal, return_normaliser=True, backend=backend)
    assert (out[:, :, 2] == 0).all() and (normaliser[:, :, 2] == 0).all()
    gradients = torch.autograd.grad(out[:, :, 2].sum(), (q, k, v), retain_graph=True)
    assert all((g == 0).all() for g in gradients)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_branches_join_by_their_normalisers(backend):
    q, k, v = features(2, 2, 6, 10)
    whole = linear_attention(q, k, v, backend=backend)
    parts = [
        linear_attention(q, k[:, :, s], v[:, :, s], return_normaliser=True, backend=backend)
        for s in (slice(0, 4), slice(4, 10))
    ]
    joined = sum(o * n[..., None] for o, n in parts) / sum(n for _, n in parts)[..., None]
    torch.testing.assert_close(joined, whole)
    for ours, theirs in zip(
        torch.autograd.grad(joined.square().sum(), (q, k, v)),
        torch.autograd.grad(whole.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_float32_for_half_inputs(backend):
    n = 5000
    one = torch.ones(1, 1, n, 1, dtype=torch.bfloat16)
    for is_causal in (False, True):
        out, normaliser = linear_attention(one, one, one, is_causal=is_causal, return_normaliser=True, backend=backend)
        assert normaliser.dtype == torch.float32 and normaliser.max() == n  # bfloat16 sums stop at 256
        assert out.dtype == torch.bfloat16 and (out == 1).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_primitive_memory_is_linear(is_causal):
    n = 2048
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    q, k, v = (torch.rand(1, 1, n, 4) for _ in range(3))
    with Watch():
        saved = reference_linear.linear_attention_forward(q, k, v, None, None, is_causal, 0, "elu", 1.0)
        reference_linear.linear_attention_backward(
            saved[0], None, q, k, v, None, None, *saved, is_causal, 0, "elu", 1.0
        )
    assert largest <= n * 8 * 4  # bytes: no tensor beyond a few features a row; n x n would be 17 MB


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend):
    q, k, v = features(2, 2, 4, 4)
    (gradient,) = torch.autograd.grad(linear_attention(q, k, v, backend=backend).sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="first derivative only"):
        gradient.sum().backward()
