"""Low-rank methods against their papers' formulas, written out here in float64.

The transcriptions work on one head and plain (N, D) matrices. A masked key is simply not in them.
"""

import dataclasses
import functools
import itertools
import math

import pytest
import torch

from efficient_attn import MultiheadAttention
from efficient_attn.errors import InputError, InputTypeError, UnsupportedError
from efficient_attn.functional import attention
from efficient_attn.integrations.layer_state import layer_state
from efficient_attn.methods import (
    METHODS,
    LowRankMethod,
    elu_attention,
    elu_weights,
    from_json,
    iterative_pinv,
    linear_attention,
    linformer_attention,
    linformer_weights,
    methods_table,
    nystrom_attention,
    nystrom_weights,
    parse,
    performer_attention,
    performer_features,
    performer_weights,
    random_projection,
    register,
    segment_means,
)
from efficient_attn.models.attention import Attention

B, NQ, NK, D, DV = 2, 11, 11, 6, 5
HEADS = [(2, 2), (4, 2), (3, 1)]


# --- the papers ---


def softmax(scores):
    e = torch.exp(scores - scores.max(1, keepdim=True).values)
    return e / e.sum(1, keepdim=True)


def linformer_paper(q, k, v, kept, h, E, F):
    E, F = E[:, : len(k)][:, kept], F[:, : len(k)][:, kept]
    return softmax(q @ (E @ k[kept]).T / math.sqrt(D)) @ (F @ v[kept])


def nystrom_paper(q, k, v, kept, h, m, conv=None, queries_too=True):
    def landmarks(x):
        s = min(m, len(x))
        rows = [[i for i in range(len(x)) if i * s // len(x) == segment] for segment in range(s)]
        return torch.stack([x[r].mean(0) for r in rows])

    ql, kl = landmarks(q[kept] if queries_too else q), landmarks(k[kept])
    A = softmax(ql @ kl.T / math.sqrt(D))
    Z = A.T / (A.abs().sum(0).max() * A.abs().sum(1).max())
    one = torch.eye(len(A), dtype=A.dtype)
    for _ in range(6):
        Z = 0.25 * Z @ (13 * one - A @ Z @ (15 * one - A @ Z @ (7 * one - A @ Z)))
    out = softmax(q @ kl.T / math.sqrt(D)) @ Z @ softmax(ql @ k[kept].T / math.sqrt(D)) @ v[kept]
    if conv is not None:
        filter_ = conv[h]
        for i in range(len(q)):
            near = [(j - i + len(filter_) // 2, j) for j in range(len(k)) if kept[j]]
            for t, j in near:
                if 0 <= t < len(filter_):
                    out = out + torch.eye(len(q), dtype=q.dtype)[i][:, None] * filter_[t] * v[j]
    return out


def kernel_paper(phi, q, k, v, kept, h, offset=None):
    rows = []
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if kept[j] and (offset is None or j <= i + offset)]
        w = [phi(q[i]) @ phi(k[j]) for j in seen]
        rows.append(sum(a * v[j] for a, j in zip(w, seen, strict=True)) / sum(w) if seen else torch.zeros_like(v[0]))
    return torch.stack(rows)


def favor(x, W):
    x = x / D**0.25
    return torch.exp(W @ x - x @ x / 2) / math.sqrt(len(W))


def favor_relu(x, W):
    return torch.relu(W @ x / D**0.25) / math.sqrt(len(W)) + 1e-3


def elu_plus_one(x):
    return torch.nn.functional.elu(x) + 1


def make(hq, hkv, nq=NQ, nk=NK, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, hq, nq, D), (B, hkv, nk, D), (B, hkv, nk, DV))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


E2 = torch.randn(4, 16, generator=generator(), dtype=torch.float64)
F2 = torch.randn(4, 16, generator=generator(2), dtype=torch.float64)
W = random_projection(7, D, generator=generator(3), dtype=torch.float64)
CONV = torch.randn(3, generator=generator(4), dtype=torch.float64).expand(3, 3)

#  name -> (function, weights, paper on one head); each takes the same keywords where it accepts them
CASES = {
    "linformer": (
        functools.partial(linformer_attention, key_projection=E2, value_projection=F2),
        functools.partial(linformer_weights, key_projection=E2, value_projection=F2),
        functools.partial(linformer_paper, E=E2, F=F2),
    ),
    "nystrom": (
        functools.partial(nystrom_attention, landmarks=4),
        functools.partial(nystrom_weights, landmarks=4),
        functools.partial(nystrom_paper, m=4),
    ),
    "nystrom+conv": (
        functools.partial(nystrom_attention, landmarks=3, conv_weight=CONV[0]),
        functools.partial(nystrom_weights, landmarks=3, conv_weight=CONV[0]),
        functools.partial(nystrom_paper, m=3, conv=CONV),
    ),
    "performer": (
        functools.partial(performer_attention, projection=W),
        functools.partial(performer_weights, projection=W),
        functools.partial(kernel_paper, lambda x: favor(x, W)),
    ),
    "performer-relu": (
        functools.partial(performer_attention, projection=W, feature="relu"),
        functools.partial(performer_weights, projection=W, feature="relu"),
        functools.partial(kernel_paper, lambda x: favor_relu(x, W)),
    ),
    "linear": (elu_attention, elu_weights, functools.partial(kernel_paper, elu_plus_one)),
}
KERNELS = ("performer", "performer-relu", "linear")


def paddings(name):
    tail = torch.arange(NK) < torch.tensor([[8], [NK]])
    holes = torch.rand(B, NK, generator=generator(5)) < 0.7
    few = torch.arange(NK) == torch.tensor([[2], [9]])
    return {"none": None, "tail": tail, "holes": holes, "one": few}[name]


def by_head(paper, q, k, v, key_mask, **keywords):
    kept = torch.ones(q.shape[0], k.shape[2], dtype=torch.bool) if key_mask is None else key_mask
    group = q.shape[1] // k.shape[1]
    return torch.stack(
        [
            torch.stack(
                [
                    paper(q[b, h], k[b, h // group], v[b, h // group], kept[b], h // group, **keywords)
                    for h in range(q.shape[1])
                ]
            )
            for b in range(q.shape[0])
        ]
    )


def masks_of(name, key_mask):
    return {"key_mask": key_mask, **({"query_mask": key_mask} if name.startswith("nystrom") else {})}


@pytest.mark.parametrize(
    ("hq", "hkv", "padding"),
    [*((*heads, "holes") for heads in HEADS), *((*HEADS[-1], padding) for padding in ("none", "tail", "one"))],
)
@pytest.mark.parametrize("name", CASES)
def test_forward_gradients_and_weights_equal_the_paper(name, hq, hkv, padding):
    function, weights, paper = CASES[name]
    inputs = make(hq, hkv)
    key_mask = paddings(padding)
    masks = masks_of(name, key_mask)
    out = function(*inputs, **masks)
    expected = by_head(paper, *inputs, key_mask)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)

    grad_out = torch.randn(out.shape, generator=generator(6), dtype=out.dtype)
    found = torch.autograd.grad(out, inputs, grad_out)
    wanted = torch.autograd.grad(expected, inputs, grad_out)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)

    P = weights(*inputs[:2], **masks)
    assert P.shape == (B, hq, NQ, NK)
    torch.testing.assert_close(P @ inputs[2].repeat_interleave(hq // hkv, 1), expected, rtol=1e-9, atol=1e-10)
    if key_mask is not None:
        assert (P.masked_select(~key_mask[:, None, None, :]) == 0).all()


@pytest.mark.parametrize("padding", ["none", "holes"])
@pytest.mark.parametrize(
    ("nq", "nk", "alignment"), [(11, 11, None), (7, 11, "top_left"), (7, 11, "bottom_right"), (14, 11, "bottom_right")]
)
@pytest.mark.parametrize("name", KERNELS)
def test_causal_kernels_equal_the_paper(name, nq, nk, alignment, padding):
    function, weights, paper = CASES[name]
    inputs = make(4, 2, nq, nk)
    key_mask = paddings(padding)
    keywords = {"key_mask": key_mask, "is_causal": True, "causal_alignment": alignment}
    out = function(*inputs, **keywords)
    expected = by_head(paper, *inputs, key_mask, offset=nk - nq if alignment == "bottom_right" else 0)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    grad_out = torch.randn(out.shape, generator=generator(6), dtype=out.dtype)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, grad_out), torch.autograd.grad(expected, inputs, grad_out), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)
    P = weights(*inputs[:2], **keywords)
    torch.testing.assert_close(P @ inputs[2].repeat_interleave(2, 1), expected, rtol=1e-9, atol=1e-10)


def test_projections_and_filters_per_head():
    q, k, v = make(4, 2)
    E = torch.randn(2, 3, 12, generator=generator(), dtype=torch.float64).requires_grad_()
    F = torch.randn(2, 3, 12, generator=generator(2), dtype=torch.float64).requires_grad_()
    out = linformer_attention(q, k, v, E, F)
    expected = by_head(lambda q, k, v, kept, h: linformer_paper(q, k, v, kept, h, E[h], F[h]), q, k, v, None)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), (E, F)),
        torch.autograd.grad(expected.square().sum(), (E, F)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(linformer_weights(q, k, E, F) @ v.repeat_interleave(2, 1), expected)

    W = random_projection(5, D, num_heads=2, generator=generator(), dtype=torch.float64)
    out = performer_attention(q, k, v, W)
    torch.testing.assert_close(
        out, by_head(lambda q, k, v, kept, h: kernel_paper(lambda x: favor(x, W[h]), q, k, v, kept, h), q, k, v, None)
    )

    conv = torch.randn(2, 5, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(
        nystrom_attention(q, k, v, landmarks=4, conv_weight=conv),
        by_head(functools.partial(nystrom_paper, m=4, conv=conv), q, k, v, None),
    )


STATES = [
    *(f"linformer:rank=3,max_len=16,share={share}" for share in ("headwise", "kv", "layerwise", "none")),
    "nystrom:landmarks=4",
    "nystrom:landmarks=4,conv=5",
    "performer:features=7",
    "linear",
    "sliding_window:left=2,right=2+performer:features=7,block=16",
]


@pytest.mark.parametrize("hkv", [1, 2, 4])
@pytest.mark.parametrize("spec", STATES)
def test_state_belongs_to_the_heads_of_the_keys(spec, hkv):
    """Grouped queries: the operator, a layer with Hkv heads of keys, and a layer of another library."""
    method, group = parse(spec), 4 // hkv
    q, k, v = (t.detach() for t in make(4, hkv))
    state = method.build(4 * D, hkv, D, dtype=torch.float64)
    for parameter in [] if state is None else state.parameters():
        torch.nn.init.normal_(parameter, generator=generator())
    out, weights = method.attend(q, k, v, state=state, need_weights=True)
    torch.testing.assert_close(weights @ v.repeat_interleave(group, 1), out)
    for h in range(hkv):  # one head of keys and its queries alone
        own = method.build(D, 1, D, dtype=torch.float64)
        if own is not None:
            shapes = {name: tensor.shape for name, tensor in own.state_dict().items()}
            full = state.state_dict()
            own.load_state_dict({n: t if t.shape == shapes[n] else t[h : h + 1] for n, t in full.items()})
        queries = q[:, h * group : (h + 1) * group]
        alone = method.attend(queries, k[:, h : h + 1], v[:, h : h + 1], state=own)[0]
        torch.testing.assert_close(out[:, h * group : (h + 1) * group], alone)
    layer = Attention(4 * D, 4, hkv, attention=method).double()
    layer(torch.randn(B, NQ, 4 * D, dtype=torch.float64))[0].sum().backward()
    if not method.shares_state:
        held = layer_state(method, torch.nn.Module().eval(), q, k)
        assert method.attend(q, k, v, state=held)[0].shape == out.shape


def test_nystrom_across_lengths():
    q, k, v = make(2, 2, 5, 13)
    kept = torch.rand(B, 13, generator=generator()) < 0.8
    paper = functools.partial(nystrom_paper, m=4, queries_too=False)
    torch.testing.assert_close(nystrom_attention(q, k, v, landmarks=4), by_head(paper, q, k, v, None))
    torch.testing.assert_close(nystrom_attention(q, k, v, landmarks=4, key_mask=kept), by_head(paper, q, k, v, kept))


# --- a new method ---


def pooled_attention(query, key, value, *, size, key_mask=None, scale=None, dropout_p=0.0, dropout_seed=None, **_):
    """The mean of the first `size` values."""
    return value[:, :, :size].mean(2, keepdim=True).expand(-1, -1, query.shape[2], -1)


def pooled_weights(query, key, *, size, **_):
    first = (torch.arange(key.shape[2]) < size).to(query.dtype)
    return (first / first.sum()).expand(*query.shape[:3], -1)


def test_a_method_from_outside_is_one_class():
    """In text, JSON, a module and the table, with what its class says and nothing else."""

    @register
    @dataclasses.dataclass(frozen=True)
    class Pooled(LowRankMethod):
        name = "toy_pooled"
        formula = "mean(V)"
        paper = "this test"
        complexity = "d"
        needs_state = False
        _attention = staticmethod(pooled_attention)
        _weights = staticmethod(pooled_weights)

        size: int = 4

        def _options(self, state, query, key, key_mask):
            return {"size": self.size}

    try:
        method = parse("toy_pooled:size=3")
        assert method == Pooled(3) and str(method) == "toy_pooled:size=3" and from_json(method.to_json()) == method
        q, k, v = make(2, 2)
        out, weights = method.attend(q, k, v, need_weights=True)
        torch.testing.assert_close(out, v[:, :, :3].mean(2, keepdim=True).expand_as(out))
        torch.testing.assert_close(weights @ v, out)
        with pytest.raises(UnsupportedError, match="toy_pooled:size=3 cannot be causal"):
            method.attend(q, k, v, is_causal=True)
        module = MultiheadAttention(8, 2, attention="toy_pooled", batch_first=True)
        assert module(*(torch.randn(3, 2, 5, 8)))[0].shape == (2, 5, 8)
        (row,) = (row for row in methods_table() if row["name"] == "toy_pooled")
        assert row["parameters"] == "size=4" and row["formula"] == "mean(V)"
    finally:
        del METHODS["toy_pooled"]


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


# --- approximation ---


def relative_error(out, exact):
    return ((out - exact).norm() / exact.norm()).item()


def smooth(n=64, d=16, seed=0):
    """Queries, keys and values that vary slowly along the sequence, as activations do."""
    walk = torch.randn(3, 2, 2, n, d, generator=generator(seed), dtype=torch.float64).cumsum(3)
    walk = (walk - walk.mean(3, keepdim=True)) / walk.std(3, keepdim=True)
    return list(walk)


def test_linformer_with_identity_projections_is_exact():
    q, k, v = make(4, 2)
    eye = torch.eye(NK, dtype=torch.float64)
    torch.testing.assert_close(linformer_attention(q, k, v, eye, eye), attention(q, k, v))


def test_linformer_error_falls_with_rank():
    q, k, v = smooth()
    errors = []
    for rank in (4, 8, 16, 32, 64):
        pool = (torch.arange(64) * rank // 64 == torch.arange(rank)[:, None]).double()
        pool = pool / pool.sum(-1, keepdim=True)
        errors.append(relative_error(linformer_attention(q, k, v, pool, pool), attention(q, k, v)))
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[3] and errors[-1] < 1e-12


def test_nystrom_error_falls_with_landmarks_to_none_at_n():
    q, k, v = smooth()
    exact = attention(q, k, v)
    errors = [
        relative_error(nystrom_attention(q, k, v, landmarks=m, pinv_iterations=24), exact) for m in (2, 8, 32, 64)
    ]
    assert errors == sorted(errors, reverse=True) and errors[1] < 0.5 * errors[0]
    assert errors[-1] < 1e-6


def test_iterative_pinv_converges_to_the_pseudo_inverse():
    A = torch.softmax(4 * torch.randn(3, 8, 8, generator=generator(), dtype=torch.float64), -1)
    torch.testing.assert_close(iterative_pinv(A, 30), torch.linalg.pinv(A))
    A[:, 5:] = 0
    A[:, :, 6:] = 0
    Z = iterative_pinv(A, 30)
    assert (Z[:, 6:] == 0).all() and (Z[:, :, 5:] == 0).all() and iterative_pinv(A.half()).dtype == torch.float32
    assert (iterative_pinv(torch.zeros(2, 3, 3)) == 0).all()


def test_performer_error_falls_with_features_and_orthogonality():
    q, k, v = smooth()
    q, k = 0.4 * q, 0.4 * k
    exact = attention(q, k, v)

    def mean_error(m, orthogonal):
        draws = (
            random_projection(m, 16, orthogonal=orthogonal, generator=generator(s), dtype=q.dtype) for s in range(12)
        )
        return sum(relative_error(performer_attention(q, k, v, w), exact) for w in draws) / 12

    errors = [mean_error(m, True) for m in (8, 32, 128, 512)]
    assert all(b < 0.75 * a for a, b in itertools.pairwise(errors))
    assert mean_error(16, True) < mean_error(16, False)


def test_performer_weights_estimate_softmax_without_bias():
    """The numerator and denominator estimate exp(scale q.k) and its row sum: many features come close to softmax."""
    q, k = (0.5 * t for t in make(1, 1)[:2])
    w = random_projection(60000, D, generator=generator(), dtype=torch.float64)
    P = torch.softmax(q @ k.mT / math.sqrt(D), -1)
    torch.testing.assert_close(performer_weights(q, k, w), P, rtol=0.15, atol=0.01)


@pytest.mark.parametrize("is_causal", [False, True])
def test_performer_is_stable_for_large_inputs(is_causal):
    q, k, v = (t.detach().float() for t in make(2, 2, 200, 200))
    w = random_projection(32, D, generator=generator())
    factor = 3.0 if is_causal else 30.0
    inputs = [(factor * q).requires_grad_(), (factor * k).requires_grad_(), v.requires_grad_()]
    a, b = performer_features(*inputs[:2], w, is_causal=is_causal)
    out, normaliser = linear_attention(a, b, v, is_causal=is_causal, return_normaliser=True)
    assert (normaliser > 0).all() and (is_causal or (normaliser >= 1).all())
    assert (out.abs() <= v.abs().max() * (1 + 1e-5)).all()  # an average of values
    for gradient in torch.autograd.grad(out.square().sum(), inputs):
        assert gradient.isfinite().all()


def test_random_projection():
    w = random_projection(40, 16, generator=generator())
    blocks = [w[:16], w[16:32], w[32:]]
    for block in blocks:
        direction = block / block.norm(dim=1, keepdim=True)
        torch.testing.assert_close(direction @ direction.T, torch.eye(len(block)), atol=1e-5, rtol=0)
    many = random_projection(4000, 16, num_heads=2, generator=generator())
    assert many.shape == (2, 4000, 16) and many.dtype == torch.float32
    torch.testing.assert_close(many.square().sum(-1).mean(), torch.tensor(16.0), rtol=0.03, atol=0)  # chi-squared, mean
    torch.testing.assert_close(many.square().sum(-1).var(), torch.tensor(32.0), rtol=0.1, atol=0)  # and variance 2 D
    torch.testing.assert_close(
        many.mean((0, 1)), torch.zeros(16), rtol=0, atol=0.05
    )  # uniform directions, no sign kept
    assert torch.equal(w, random_projection(40, 16, generator=generator()))
    assert not torch.equal(w, random_projection(40, 16, generator=generator(9)))
    plain = random_projection(3, 16, orthogonal=False, generator=generator())
    assert (plain @ plain.T).fill_diagonal_(0).abs().max() > 0.1
    with pytest.raises(InputError, match="must be >= 1"):
        random_projection(0, 16)


def test_segment_means_are_balanced():
    x = torch.arange(10.0)[None, None, :, None]
    means, used = segment_means(x, 3)
    assert used is None
    torch.testing.assert_close(means.flatten(), torch.tensor([1.5, 5.0, 8.0]))  # 0..3, 4..6, 7..9
    means, used = segment_means(x, 4, torch.tensor([[True, False, True] + [False] * 6 + [True]]))
    assert used.tolist() == [[True, True, True, False]]
    torch.testing.assert_close(means.flatten(), torch.tensor([0.0, 2.0, 9.0, 0.0]))


def test_elu_features_keep_small_numbers():
    """Of a query beside one key whose feature is 1, the normaliser is the feature."""
    x = torch.tensor([-80.0, -20.0, -1.0, 0.0, 2.0], requires_grad=True)
    one = torch.zeros(1, 1, 1, 1)
    _, n = linear_attention(x[None, None, :, None], one, one, feature_map="elu", return_normaliser=True)
    out = n.flatten()
    torch.testing.assert_close(
        out, torch.tensor([math.exp(-80), math.exp(-20), math.exp(-1), 1.0, 3.0]), rtol=1e-6, atol=0
    )
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(
        gradient, torch.tensor([math.exp(-80), math.exp(-20), math.exp(-1), 1.0, 1.0]), rtol=1e-6, atol=0
    )


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


def test_linformer_starts_as_means_of_neighbours() -> None:
    state = parse("linformer:rank=4,max_len=10").build(8, 2, 4)
    projection = state.key_projection.detach()
    torch.testing.assert_close(projection.sum(-1), torch.ones(4))
    assert ((projection > 0).sum(0) == 1).all()


@pytest.mark.parametrize("init", ["pool", "normal"])
@pytest.mark.parametrize("share", ["headwise", "kv", "none"])
def test_linformer_keeps_its_size_at_every_length(init: str, share: str) -> None:
    """What is built for 512 keys and gets few of them is as large as what is built for these few."""
    torch.manual_seed(0)
    size = {}
    for max_len, length in itertools.product((512, 0), (32, 100, 512)):
        method = parse(f"linformer:rank=32,max_len={max_len or length},init={init},share={share}")
        q, k, v = torch.randn(3, 2, 2, length, 16)
        size[max_len, length] = float(method.attend(q, k, v, state=method.build(32, 2, 16))[0].norm())
    for length in (32, 100, 512):
        assert 0.6 < size[512, length] / size[0, length] < 1.4, size


def test_linformer_of_an_older_checkpoint_is_as_it_was() -> None:
    """A checkpoint without the powers of the length computes what it was trained for, strictly loaded."""
    method = parse("linformer:rank=4,max_len=64")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 16, 4)
    kept, state, assigned = method.build(8, 2, 4), method.build(8, 2, 4), method.build(8, 2, 4)
    old = {name: tensor for name, tensor in kept.state_dict().items() if name != "length_powers"}
    state.load_state_dict(old, strict=True)
    assigned.load_state_dict(old, strict=True, assign=True)
    expected = linformer_attention(q, k, v, kept.key_projection, kept.value())
    for loaded in (state, assigned):
        torch.testing.assert_close(method.attend(q, k, v, state=loaded)[0], expected)
        again = method.build(8, 2, 4)
        again.load_state_dict(loaded.state_dict())
        torch.testing.assert_close(method.attend(q, k, v, state=again)[0], expected)
    torch.testing.assert_close(method.attend(q, k, v, state=kept)[0], 4 * expected)


def test_linformer_weights_are_those_of_the_scaled_output() -> None:
    method = parse("linformer:rank=4,max_len=64,init=normal")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 16, 4)
    key_mask = torch.arange(16) < torch.tensor([[16], [5]])
    state = method.build(8, 2, 4)
    out, weights = method.attend(q, k, v, state=state, key_mask=key_mask, need_weights=True)
    torch.testing.assert_close(weights @ v, out)
    alone = method.attend(q[1:], k[1:, :, :5], v[1:, :, :5], state=state)[0]
    torch.testing.assert_close(out[1:], alone)
