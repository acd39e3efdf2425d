"""What every attention promises, of the low-rank methods: padding, causality, dropout, dtypes, transforms, errors."""

import functools
import math

import pytest
import torch
from support.lowrank_papers import (
    CASES,
    DV,
    E2,
    F2,
    KERNELS,
    NK,
    NQ,
    B,
    D,
    W,
    generator,
    make,
    masks_of,
    paddings,
    relative_error,
)

from efficient_attn.errors import InputError, InputTypeError, UnsupportedError
from efficient_attn.methods import (
    elu_attention,
    linear_attention,
    linformer_attention,
    nystrom_attention,
    nystrom_weights,
    performer_attention,
)

# --- padding ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", ["tail", "holes"])
@pytest.mark.parametrize("name", CASES)
def test_what_padding_holds_changes_no_bit(name, padding, dtype):
    function, weights, _ = CASES[name]
    key_mask = paddings(padding)
    results = []
    for content in (0.0, 1e4, math.inf, math.nan):
        q, k, v = (t.detach().to(dtype) for t in make(4, 2))
        hidden = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(hidden, content), v.masked_fill(hidden, content)
        q = q.requires_grad_()
        k, v = k.requires_grad_(), v.requires_grad_()
        out = function(q, k, v, **masks_of(name, key_mask))
        gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        assert (gradients[1].masked_select(hidden) == 0).all() and (gradients[2].masked_select(hidden) == 0).all()
        results.append((out, *gradients, weights(q, k, **masks_of(name, key_mask))))
    assert all(r.isfinite().all() for r in results[0])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_more_padding_changes_nothing(name):
    function, _, _ = CASES[name]
    q, k, v = make(2, 2)
    longer = [torch.cat([t, torch.full_like(t[:, :, :4], 7.0)], 2) for t in (q, k, v)]
    visible = torch.arange(NK + 4) < NK
    key_mask = visible.expand(B, -1)
    out = function(*longer, **masks_of(name, key_mask))[:, :, :NQ]
    torch.testing.assert_close(out, function(q, k, v))


@pytest.mark.parametrize("name", CASES)
def test_no_visible_key_gives_zero(name):
    function, weights, _ = CASES[name]
    inputs = make(2, 2)
    key_mask = torch.ones(B, NK, dtype=torch.bool)
    key_mask[0] = False
    out = function(*inputs, **masks_of(name, key_mask))
    # Linformer keeps its r mixtures, of zeros; the others have nothing to attend to.
    assert (out[0] == 0).all() and out[1].isfinite().all()
    for gradient in torch.autograd.grad(out.square().sum(), inputs):
        assert (gradient[0] == 0).all() and gradient.isfinite().all()
    assert (weights(*inputs[:2], **masks_of(name, key_mask))[0] == 0).all()


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (2, 2, 0, 0)])
@pytest.mark.parametrize("name", CASES)
def test_empty_dimensions(name, shape):
    function, weights, _ = CASES[name]
    b, h, nq, nk = shape
    q, k, v = torch.randn(b, h, nq, D).requires_grad_(), torch.randn(b, h, nk, D), torch.randn(b, h, nk, DV)
    if name == "nystrom+conv" and nq != nk:
        with pytest.raises(InputError, match="as many queries as keys"):
            function(q, k, v)
        return
    out = function(q, k, v)
    assert out.shape == (b, h, nq, DV) and (out == 0).all()
    out.sum().backward()
    assert weights(q, k).shape == (b, h, nq, nk)


# --- causality ---


@pytest.mark.parametrize("poison", [5.0, math.inf, math.nan])
@pytest.mark.parametrize("name", KERNELS)
def test_causal_kernels_do_not_look_ahead(name, poison):
    function, _, _ = CASES[name]
    length, now = 300, 150  # more than two chunks; `now` is inside the second
    g = generator()
    q, k, v = (torch.randn(1, 2, length, d, generator=g) for d in (D, D, DV))
    before = function(q, k, v, is_causal=True)
    future = torch.arange(length)[:, None] >= now
    q2, k2, v2 = q, k.masked_fill(future, poison).requires_grad_(), v.masked_fill(future, poison).requires_grad_()
    after = function(q2, k2, v2, is_causal=True)
    assert torch.equal(before[:, :, :now], after[:, :, :now])
    assert not torch.equal(before[:, :, now:], after[:, :, now:])
    if math.isfinite(poison):
        for gradient in torch.autograd.grad(after[:, :, :now].sum(), (k2, v2)):
            assert (gradient[:, :, now:] == 0).all()
            assert (gradient[:, :, :now] != 0).any()


def test_causal_needs_an_alignment():
    q, k, v = make(2, 2, 5, 7)
    for call in (elu_attention, functools.partial(performer_attention, projection=W), linear_attention):
        with pytest.raises(InputError, match="causal_alignment"):
            call(q.exp(), k.exp(), v, is_causal=True)


# --- dropout ---


@pytest.mark.parametrize("name", CASES)
def test_dropout_is_repeatable_unbiased_and_in_the_weights(name):
    function, weights, _ = CASES[name]
    q, k, v = make(4, 2)
    value = v.repeat_interleave(2, 1)
    out = function(q, k, v, dropout_p=0.4, dropout_seed=3)
    assert torch.equal(out, function(q, k, v, dropout_p=0.4, dropout_seed=torch.tensor(3)))
    assert not torch.equal(out, function(q, k, v, dropout_p=0.4, dropout_seed=4))
    P = weights(q, k, dropout_p=0.4, dropout_seed=3)
    torch.testing.assert_close(P @ value, out)
    many = (t[:1].expand(300, -1, -1, -1) for t in (q, k, v))
    mean = function(*many, dropout_p=0.4, dropout_seed=3).mean(0)  # every batch element drops for itself
    out, plain = out[0], function(q, k, v)[0]
    assert (mean - plain).abs().mean() < 0.15 * (out - plain).abs().mean()
    with pytest.raises(InputError, match="dropout_p"):
        function(q, k, v, dropout_p=1.0)


# --- dtypes, autocast, transforms ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_dtypes(name, dtype):
    function, weights, _ = CASES[name]
    inputs = [t.detach().to(dtype).requires_grad_() for t in make(4, 2)]
    precise = [t.detach().double().requires_grad_() for t in inputs]
    out, expected = function(*inputs), function(*precise)
    assert out.dtype == dtype and weights(*inputs[:2]).dtype == dtype
    tolerance = {torch.float32: 3e-4, torch.float16: 3e-2, torch.bfloat16: 0.15}[dtype]
    assert relative_error(out.double(), expected) < tolerance
    found = torch.autograd.grad(out.double().square().sum(), inputs)
    wanted = torch.autograd.grad(expected.square().sum(), precise)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours.double(), theirs) < 3 * tolerance


@pytest.mark.parametrize("name", CASES)
def test_autocast_casts_the_inputs_and_nothing_inside(name):
    function, _, _ = CASES[name]
    inputs = [t.detach().float() for t in make(2, 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = function(*inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, function(*(t.bfloat16() for t in inputs)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", [name for name in CASES if name != "nystrom"])
def test_vmap_and_compile(name):
    function, _, _ = CASES[name]
    q, k, v = (torch.stack([t.detach(), t.detach() + 0.1]) for t in make(2, 2))
    mapped = torch.vmap(lambda q, k: function(q, k, v[0]))(q, k)
    for i in range(2):
        torch.testing.assert_close(mapped[i], function(q[i], k[i], v[0]))

    key_mask = paddings("tail")
    inputs = [t[0].clone().requires_grad_() for t in (q, k, v)]
    compiled = torch.compile(
        lambda *args: function(*args, **masks_of(name, key_mask)), fullgraph=True, backend="aot_eager"
    )
    out = compiled(*inputs)
    expected = function(*inputs, **masks_of(name, key_mask))
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


# --- errors ---


def test_what_does_not_apply_raises():
    q, k, v = make(2, 2)
    with pytest.raises(UnsupportedError, match=r"Linformer cannot be causal.*performer"):
        linformer_attention(q, k, v, E2, F2, is_causal=True)
    with pytest.raises(UnsupportedError, match="Nystrom cannot be causal"):
        nystrom_attention(q, k, v, is_causal=True)
    with pytest.raises(UnsupportedError, match="has no scale"):
        elu_attention(q, k, v, scale=0.5)
    with pytest.raises(NotImplementedError):
        nystrom_weights(q, k, is_causal=True)


def test_wrong_arguments_raise_before_work():
    q, k, v = make(2, 2)
    cases = [
        (InputError, "11 keys do not fit.*max_len >= 11", lambda: linformer_attention(q, k, v, E2[:, :8], F2)),
        (InputError, "rank 3, value_projection 4", lambda: linformer_attention(q, k, v, E2[:3], F2)),
        (
            InputError,
            r"\(Hkv, rank, max_len\) with Hkv=2",
            lambda: linformer_attention(q, k, v, E2.expand(3, 4, 16), F2),
        ),
        (InputTypeError, "floating-point", lambda: linformer_attention(q, k, v, E2.long(), F2)),
        (InputError, "landmarks", lambda: nystrom_attention(q, k, v, landmarks=0)),
        (InputError, "odd width", lambda: nystrom_attention(q, k, v, conv_weight=torch.ones(4))),
        (
            InputError,
            "as many queries as keys",
            lambda: nystrom_attention(q[:, :, :3], k, v, conv_weight=torch.ones(3)),
        ),
        (InputError, "query_mask must be", lambda: nystrom_attention(q, k, v, query_mask=torch.ones(B, 3).bool())),
        (InputTypeError, "query_mask", lambda: nystrom_attention(q, k, v, query_mask=torch.ones(B, NQ))),
        (InputError, "feature must be one of", lambda: performer_attention(q, k, v, W, feature="cosine")),
        (InputError, "random_projection", lambda: performer_attention(q, k, v, W[:, :3])),
        (InputTypeError, "projection", lambda: performer_attention(q, k, v, None)),
        (InputError, "positive scale", lambda: performer_attention(q, k, v, W, scale=-1.0)),
        (InputError, "key_mask must be", lambda: performer_attention(q, k, v, W, key_mask=torch.ones(B, 3).bool())),
        (InputTypeError, "key_mask must be a bool", lambda: elu_attention(q, k, v, key_mask=torch.ones(B, NK))),
        (InputError, "backend='tpu' does not exist", lambda: elu_attention(q, k, v, backend="tpu")),
        (InputError, "feature_map must be one of", lambda: linear_attention(q, k, v, feature_map="performer_relu")),
        (InputError, "4-dimensional", lambda: linear_attention(q[0], k, v)),
        (InputError, "expected query_features", lambda: linear_attention(q, k[:, :, :3], v)),
        (InputError, "multiple of the key/value heads", lambda: linear_attention(q[:, :1], k, v)),
        (InputTypeError, "features must share one dtype", lambda: linear_attention(q.float(), k, v)),
        (InputTypeError, "floating-point", lambda: linear_attention(q.long(), k, v)),
    ]
    for error, text, call in cases:
        with pytest.raises(error, match=text):
            call()
