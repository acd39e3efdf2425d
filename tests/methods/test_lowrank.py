"""Low-rank methods against their papers' formulas (support/lowrank_papers.py), and a method from outside."""

import dataclasses
import functools

import pytest
import torch
from support.lowrank_papers import (
    CASES,
    HEADS,
    KERNELS,
    NK,
    NQ,
    B,
    D,
    by_head,
    favor,
    generator,
    kernel_paper,
    linformer_paper,
    make,
    masks_of,
    nystrom_paper,
    paddings,
)

from efficient_attn import MultiheadAttention
from efficient_attn.errors import UnsupportedError
from efficient_attn.integrations.layer_state import layer_state
from efficient_attn.methods import (
    METHODS,
    LowRankMethod,
    from_json,
    linformer_attention,
    linformer_weights,
    methods_table,
    nystrom_attention,
    parse,
    performer_attention,
    random_projection,
    register,
)
from efficient_attn.models.attention import Attention


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
