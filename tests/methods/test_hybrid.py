"""Hybrids against their definitions, written out pair by pair in float64: split, tails, one denominator, gradients."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch

from efficient_attn import MultiheadAttention, attention, attention_weights, branch_share, replace_attention
from efficient_attn.errors import InputError, InputTypeError, UnsupportedError
from efficient_attn.masks import BlockMask
from efficient_attn.methods import (
    TAILS as REGISTERED,
)
from efficient_attn.methods import (
    CentroidTail,
    Hybrid,
    PerformerTail,
    Tail,
    from_json,
    methods_table,
    parse,
    register,
)
from efficient_attn.methods.hybrid import Branch, TailCall, plan, split
from efficient_attn.patterns import BigBird, Dense, Longformer, SlidingWindow

B, N, D, DV, BLOCK = 2, 75, 6, 5, 16
SCALE = D**-0.5
TAILS = [
    "centroid:block=16",
    "centroid:block=16,second_order=diagonal",
    "centroid:block=16,second_order=full",
    "performer:features=7,block=16",
    "nystrom:landmarks=5,block=16",
]
SPARSE = [
    "sliding_window:left=5,right=3",
    "bigbird:block=16,window=1,global_blocks=1,random_blocks=1",
    "longformer:window=6",
    "(longformer:window=2 | bigbird:block=16,window=1,global_blocks=0,random_blocks=1)",
]


# --- the definitions ---


def parts(pattern, allowed):
    """Exact pairs and tail pairs, bool (Nq, Nk) each, by looking at every block of pairs."""
    exact, tail = torch.zeros_like(allowed), torch.zeros_like(allowed)
    for r in range(0, allowed.shape[0], BLOCK):
        for c in range(0, allowed.shape[1], BLOCK):
            here = (slice(r, r + BLOCK), slice(c, c + BLOCK))
            if allowed[here].all() and not pattern[here].any():
                tail[here] = True
            else:
                exact[here] = allowed[here] & (pattern[here].logical_and(allowed[here]).any() | ~allowed[here].all())
    return exact, tail


def kernel(tail, q, k, kept, projection, queries):
    """The tail's estimate of e^{scale q_i . k_j}, (Nq, Nk), on the keys that are kept."""
    if tail.name == "performer":
        q, k = q * SCALE**0.5, k * SCALE**0.5
        phi_q, phi_k = (torch.exp(x @ projection.T - x.square().sum(1, keepdim=True) / 2) for x in (q, k))
        return phi_q @ phi_k.T / len(projection)
    if tail.name == "nystrom":

        def landmarks(x):
            m = min(tail.landmarks, len(q), len(k))
            s = min(m, len(x))
            return torch.stack([x[[i for i in range(len(x)) if i * s // len(x) == g]].mean(0) for g in range(s)])

        near, far = landmarks(q[queries]), landmarks(k[kept])
        U = torch.exp(SCALE * near @ far.T)
        A = U / U.sum(1, keepdim=True)
        Z = A.T / (A.abs().sum(0).max() * A.abs().sum(1).max())
        one = torch.eye(len(near), dtype=q.dtype)
        for _ in range(tail.pinv_iterations):
            Z = 0.25 * Z @ (13 * one - A @ Z @ (15 * one - A @ Z @ (7 * one - A @ Z)))
        return torch.exp(SCALE * q @ far.T) @ Z @ torch.diag(1 / U.sum(1)) @ torch.exp(SCALE * near @ k.T)
    estimate = []
    for c in range(0, len(k), BLOCK):
        members = kept[c : c + BLOCK]
        n = int(members.sum())
        if n == 0:
            estimate.append(torch.zeros(len(q), len(members), dtype=q.dtype))
            continue
        block = k[c : c + BLOCK][members]
        exponent = SCALE * q @ block.mean(0)
        covariance = (block - block.mean(0)).T @ (block - block.mean(0)) / n
        if tail.second_order == "diagonal":
            covariance = torch.diag(torch.diag(covariance))
        if tail.second_order != "none":
            exponent = exponent + SCALE**2 * torch.einsum("id,de,ie->i", q, covariance, q) / 2
        estimate.append(torch.exp(exponent)[:, None].expand(-1, len(members)))
    return torch.cat(estimate, 1)


def definition(method, q, k, v, kept, pattern, allowed, projection):
    """Numerators and denominators of one head added up: (out, share of the tail)."""
    exact, tail = parts(pattern, allowed)
    queries = kept if len(q) == len(k) else torch.ones(len(q), dtype=torch.bool)
    k, v = k.masked_fill(~kept[:, None], 0.0), v.masked_fill(~kept[:, None], 0.0)
    true = torch.exp(SCALE * q @ k.T)
    near = true * (exact & kept)
    if not kept.any():
        return torch.zeros(len(q), v.shape[1], dtype=q.dtype), torch.zeros(len(q), dtype=q.dtype)
    far = kernel(method.tail, q, k, kept, projection, queries) * (tail & kept)
    far = far * (far.sum(1, keepdim=True) > 0)
    total = near.sum(1) + far.sum(1)
    out = (near @ v + far @ v) / total.masked_fill(total == 0, 1.0)[:, None]
    return out, far.sum(1) / total.masked_fill(total == 0, 1.0)


def by_head(method, q, k, v, key_mask, allowed, state, alignment=None):
    Hq, Hkv = q.shape[1], k.shape[1]
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    allowed = allowed.expand(q.shape[0], Hq, q.shape[2], k.shape[2])
    if method.sparse.pattern.by_content:
        within = BlockMask.from_dense(allowed)
        pattern = method.sparse.pattern.for_inputs(q, k, scale=SCALE, key_mask=key_mask, within=within).to_dense()
    else:
        pattern = method.sparse.pattern.aligned(alignment).visible(i, j, q.shape[2], k.shape[2])
    pattern = pattern.expand(q.shape[0], Hq, q.shape[2], k.shape[2])
    kept = torch.ones(q.shape[0], k.shape[2], dtype=torch.bool) if key_mask is None else key_mask
    projection = None if state is None else state.projection
    rows = [
        definition(
            method, q[b, h], k[b, h * Hkv // Hq], v[b, h * Hkv // Hq], kept[b], pattern[b, h], allowed[b, h], projection
        )
        for b in range(q.shape[0])
        for h in range(Hq)
    ]
    outs, shares = zip(*rows, strict=True)
    shape = q.shape[:2]
    return torch.stack(outs).unflatten(0, shape), torch.stack(shares).unflatten(0, shape)


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def make(hq=4, hkv=2, nq=N, nk=N, dtype=torch.float64):
    g = generator(0)
    shapes = ((B, hq, nq, D), (B, hkv, nk, D), (B, hkv, nk, DV))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def padding(name, nk=N):
    tail = torch.arange(nk) < torch.tensor([[33], [nk]])  # whole blocks of padding
    holes = torch.rand(B, nk, generator=generator(5)) < 0.7
    return {"none": None, "tail": tail, "holes": holes}[name]


def state_of(method, dtype=torch.float64):
    return method.build(4 * D, 4, D, dtype=dtype)


def check(method, inputs, key_mask, allowed, **keywords):
    state = state_of(method)
    out, weights = method.attend(*inputs, state=state, key_mask=key_mask, need_weights=True, **keywords)
    expected, share = by_head(method, *inputs, key_mask, allowed, state, keywords.get("causal_alignment"))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    group = inputs[0].shape[1] // inputs[1].shape[1]
    torch.testing.assert_close(weights @ inputs[2].repeat_interleave(group, 1), expected, rtol=1e-9, atol=1e-9)
    grad_out = torch.randn(out.shape, generator=generator(6), dtype=out.dtype)
    found = torch.autograd.grad(out, inputs, grad_out)
    wanted = torch.autograd.grad(expected, inputs, grad_out)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    found_share = method.branch_share(*inputs[:2], state=state, key_mask=key_mask, **keywords)
    torch.testing.assert_close(found_share[..., 1], share, rtol=1e-9, atol=1e-9)
    return found_share


# --- equality ---


@pytest.mark.parametrize("pad", ["none", "tail", "holes"])
@pytest.mark.parametrize("sparse", SPARSE)
@pytest.mark.parametrize("tail", TAILS)
def test_equals_its_definition(tail, sparse, pad):
    share = check(parse(f"{sparse}+{tail}"), make(), padding(pad), torch.ones(1, 1, N, N, dtype=torch.bool))
    assert 0.01 < share[..., 1].mean() < 0.99
    torch.testing.assert_close(share.sum(-1), torch.ones_like(share[..., 0]))


@pytest.mark.parametrize("pad", ["none", "holes"])
@pytest.mark.parametrize(
    ("nq", "nk", "alignment"),
    [(75, 75, None), (40, 75, "bottom_right"), (75, 40, "top_left"), (75, 40, "bottom_right")],
)
@pytest.mark.parametrize("tail", [tail for tail in TAILS if not tail.startswith("nystrom")])
def test_causal_equals_its_definition(tail, nq, nk, alignment, pad):
    offset = nk - nq if alignment == "bottom_right" else 0
    allowed = (torch.arange(nk) <= torch.arange(nq)[:, None] + offset)[None, None]
    method = parse(f"sliding_window:left=5,right=3+{tail}")
    check(method, make(3, 1, nq, nk), padding(pad, nk), allowed, is_causal=True, causal_alignment=alignment)


@pytest.mark.parametrize("shape", [(1, 1), (B, 1), (1, 4), (B, 4)])
@pytest.mark.parametrize("tail", [TAILS[0], TAILS[3], TAILS[4]])
def test_masks_of_pairs(tail, shape):
    """A token-level mask: blocks that it cuts are exact, blocks that it leaves whole may go to the tail."""
    allowed = torch.ones(*shape, N, N, dtype=torch.bool)
    allowed[:, :, 20:24, 50:60] = False
    allowed[..., 64:, :] = torch.rand(*shape, N - 64, N, generator=generator()) < 0.5
    allowed[:, -1:, :30] &= torch.arange(N) < 48
    allowed[:, :, 3] = False
    method = parse(f"sliding_window:left=5,right=3+{tail}")
    share = check(method, make(), None, allowed, mask=allowed)
    assert (share[:, :, 3] == 0).all() and (share[:, :, 64:, 1] == 0).all() and (share[:, :, 32:48, 1] > 0).all()
    state = state_of(method)
    out = method.attend(*make(), state=state, mask=allowed)[0]
    same = method.attend(*make(), state=state, mask=BlockMask.from_dense(allowed, block_size=32))[0]
    torch.testing.assert_close(out, same)
    assert (out[:, :, 3] == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pad", ["none", "holes"])
@pytest.mark.parametrize(
    "spec", ["topk_blocks:block=16,blocks=2+centroid:block=16", "topp_blocks:block=16,mass=0.3+" + TAILS[3]]
)
def test_blocks_chosen_by_content(spec, pad, is_causal):
    """The best key blocks exactly, all others by the tail."""
    method = parse(spec)
    allowed = torch.ones(N, N, dtype=torch.bool).tril() if is_causal else torch.ones(N, N, dtype=torch.bool)
    share = check(method, make(), padding(pad), allowed[None, None], is_causal=is_causal)
    assert (share[:, :, -5:, 1] > 0).all()


def test_across_lengths():
    for tail in TAILS:
        method = parse(f"sliding_window:left=5,right=3+{tail}")
        call = make(2, 2, 40, 75), padding("holes"), torch.ones(1, 1, 40, 75, dtype=torch.bool)
        for alignment in ("top_left", "bottom_right"):
            check(method, *call, causal_alignment=alignment)
        with pytest.raises(InputError, match="goes by positions"):
            check(method, *call)


def test_scatterbrain_as_its_paper_writes_it():
    """O = D^-1 (phi(Q) phi(K)^T + S) V with S = exp(QK^T) - phi(Q) phi(K)^T on the support."""
    method = parse("sliding_window:left=5,right=3+performer:features=9,block=16")
    q, k, v = make(1, 1)
    state = state_of(method)
    support, _ = parts(SlidingWindow(5, 3).block_mask(N, N).to_dense()[0, 0], torch.ones(N, N, dtype=torch.bool))
    x, y = q[:, 0] * SCALE**0.5, k[:, 0] * SCALE**0.5
    W = state.projection
    phi = [torch.exp(t @ W.T - t.square().sum(-1, keepdim=True) / 2) / math.sqrt(len(W)) for t in (x, y)]
    low = phi[0] @ phi[1].mT
    S = torch.where(support, torch.exp(x @ y.mT) - low, 0.0)
    expected = (low + S) @ v[:, 0] / (low + S).sum(-1, keepdim=True)
    torch.testing.assert_close(method.attend(q, k, v, state=state)[0][:, 0], expected)


def test_the_parts_are_a_partition():
    g = generator(3)
    for pattern in (
        SlidingWindow(9, 0),
        BigBird(block=16, random_blocks=1),
        Longformer(window=10),
        SlidingWindow(0, 0),
    ):
        found = BlockMask.from_dense(pattern.block_mask(130, 130).to_dense()[..., :100])
        random = torch.rand(2, 1, 130, 100, generator=g) < 0.8
        random[:, :, :64] = True
        for allowed in (
            BlockMask(130, 100),
            BlockMask(130, 100).with_causal("bottom_right"),
            BlockMask.from_dense(random),
        ):
            for block in (16, 48, 64):
                made = split(found, allowed, block)
                near = made.exact.to_dense()
                far = made.tail.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :130, :100]
                assert torch.equal(made.over_blocks.to_dense(), made.tail.repeat_interleave(block, 2)[:, :, :130])
                assert not (near & far).any()
                assert torch.equal(near | far, allowed.to_dense().expand_as(near))
                assert not (far & found.to_dense()).any()


# --- what follows from it ---


@pytest.mark.parametrize("tail", TAILS)
def test_nothing_left_for_the_tail_is_exact_attention(tail):
    q, k, v = make()
    for sparse in ("dense", "sliding_window:left=80,right=80"):
        method = parse(f"{sparse}+{tail}")
        torch.testing.assert_close(method.attend(q, k, v, state=state_of(method))[0], attention(q, k, v))
        assert (method.branch_share(q, k, state=state_of(method))[..., 1] == 0).all()


def test_centroids_are_exact_for_equal_keys_and_second_order_for_normal_ones():
    q, k, v = (t.detach() for t in make(2, 2, 512, 512))
    method = parse("sliding_window:left=5,right=5+centroid:block=64")
    k = k[:, :, ::64].repeat_interleave(64, 2)
    torch.testing.assert_close(method.attend(q, k, v)[0], attention(q, k, v))
    k = k + 0.5 * torch.randn(k.shape, generator=generator(), dtype=k.dtype)
    lse = attention(2 * q, k, v, return_lse=True)[1]
    errors = []
    for order in ("none", "diagonal", "full"):
        tail = CentroidTail(64, order)
        everything = plan(SlidingWindow(0, 0), q, k, 64)
        nothing_exact = type(everything)(everything.exact, torch.ones_like(everything.tail), 64)
        found = tail.branch(2 * q, k, v, TailCall(nothing_exact, scale=SCALE))
        errors.append((found.lse - lse).abs().mean().item())
    assert (errors[0] > 2 * errors[1]) and errors[1] > errors[2], errors


@pytest.mark.parametrize("tail", TAILS)
def test_no_visible_key_gives_zero(tail):
    method = parse(f"sliding_window:left=5,right=3+{tail}")
    inputs, state = make(), state_of(method)
    key_mask = torch.ones(B, N, dtype=torch.bool)
    key_mask[0] = False
    out, weights = method.attend(*inputs, state=state, key_mask=key_mask, need_weights=True)
    assert (out[0] == 0).all() and (weights[0] == 0).all() and out[1].isfinite().all()
    for gradient in torch.autograd.grad(out.square().sum(), inputs):
        assert (gradient[0] == 0).all() and gradient.isfinite().all()
    assert (method.branch_share(*inputs[:2], state=state, key_mask=key_mask)[0] == 0).all()


@pytest.mark.parametrize("poison", [9.0, math.inf, math.nan])
@pytest.mark.parametrize("tail", [tail for tail in TAILS if not tail.startswith("nystrom")])
def test_causal_hybrids_do_not_look_ahead(tail, poison):
    method = parse(f"sliding_window:left=5,right=3+{tail}")
    q, k, v = (t.detach() for t in make(dtype=torch.float32))
    state = state_of(method, torch.float32)
    before = method.attend(q, k, v, state=state, is_causal=True)[0]
    future = torch.arange(N)[:, None] >= 37
    after = method.attend(q, k.masked_fill(future, poison), v.masked_fill(future, poison), state=state, is_causal=True)[
        0
    ]
    assert torch.equal(before[:, :, :37], after[:, :, :37])
    assert not torch.equal(before[:, :, 37:], after[:, :, 37:])


@pytest.mark.parametrize("tail", TAILS)
def test_stable_for_large_scores(tail):
    method = parse(f"sliding_window:left=5,right=3+{tail}")
    q, k, v = make(dtype=torch.float32)
    out = method.attend(20 * q, 20 * k, v, state=state_of(method, torch.float32))[0]
    assert out.isfinite().all()
    if not tail.startswith("nystrom"):
        assert (out.abs() <= v.abs().max() * (1 + 1e-5)).all()  # an average of values
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", TAILS)
def test_dtypes_and_autocast(tail, dtype):
    method = parse(f"sliding_window:left=5,right=3+{tail}")
    inputs = [t.detach().to(dtype).requires_grad_() for t in make()]
    precise = [t.detach().double().requires_grad_() for t in inputs]
    state = state_of(method)
    out, expected = method.attend(*inputs, state=state)[0], method.attend(*precise, state=state)[0]
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert (out.double() - expected).norm() < tolerance * expected.norm()
    found = torch.autograd.grad(out.double().square().sum(), inputs)
    for ours, theirs in zip(found, torch.autograd.grad(expected.square().sum(), precise), strict=True):
        assert ours.dtype == dtype and (ours.double() - theirs).norm() < 3 * tolerance * theirs.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert method.attend(*(t.detach().float() for t in inputs), state=state)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0), (2, 2, 0, 0)])
@pytest.mark.parametrize("tail", TAILS)
def test_empty_dimensions(tail, shape):
    b, h, nq, nk = shape
    method = parse(f"sliding_window:left=5,right=3+{tail}")
    q, k, v = torch.randn(b, h, nq, D).requires_grad_(), torch.randn(b, h, nk, D), torch.randn(b, h, nk, DV)
    state = state_of(method, torch.float32)
    out, weights = method.attend(q, k, v, state=state, need_weights=True)
    assert out.shape == (b, h, nq, DV) and (out == 0).all() and weights.shape == (b, h, nq, nk)
    out.sum().backward()
    assert method.branch_share(q, k, state=state).shape == (b, h, nq, 2)


@pytest.mark.parametrize(
    "tail", [pytest.param(tail, marks=[pytest.mark.slow] if tail in TAILS[1:3] else []) for tail in TAILS]
)
def test_compiles_without_graph_breaks(tail):
    method = parse(f"bigbird:block=16,window=1,global_blocks=1,random_blocks=1+{tail}")
    state, key_mask, is_causal = state_of(method), padding("holes"), not tail.startswith("nystrom")
    inputs = make()

    def call(q, k, v):
        return method.attend(q, k, v, state=state, key_mask=key_mask, is_causal=is_causal)[0]

    out, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), call(*inputs)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tail", TAILS)
def test_vmap(tail):
    method = parse(f"sliding_window:left=5,right=3+{tail}")
    state = state_of(method)
    q, k, v = (torch.stack([t.detach(), t.detach().flip(2)]) for t in make())
    mapped = torch.vmap(lambda q, k: method.attend(q, k, v[0], state=state)[0])(q, k)
    for n in range(2):
        torch.testing.assert_close(mapped[n], method.attend(q[n], k[n], v[0], state=state)[0])


# --- in a module ---


def test_in_the_module():
    torch.manual_seed(0)
    spec = "sliding_window:left=8,right=8+performer:features=16,block=16"
    module = MultiheadAttention(16, 2, batch_first=True, attention=spec).eval()
    x = torch.randn(2, 80, 16)
    out, weights = module(x, x, x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 80))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x, x, x)[0], out)
    module.attention.branch_share(*(torch.randn(1, 2, 80, 8) for _ in range(2)), state=module.method_state)

    model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, dropout=0.0, batch_first=True), 2)
    replace_attention(model, "sliding_window:left=8,right=8+centroid:block=16")
    causal = torch.nn.Transformer.generate_square_subsequent_mask(80)
    lengths = torch.arange(80) >= torch.tensor([[60], [80]])
    out = model(x, mask=causal, src_key_padding_mask=lengths.float().masked_fill(lengths, -torch.inf), is_causal=True)
    changed = x.clone()
    changed[:, 50:] += 1
    same = model(
        changed, mask=causal, src_key_padding_mask=lengths.float().masked_fill(lengths, -torch.inf), is_causal=True
    )
    assert torch.equal(out[:, :50], same[:, :50]) and not torch.equal(out[:, 50:], same[:, 50:])
    boolean = model(x, mask=causal.isinf(), src_key_padding_mask=lengths)
    torch.testing.assert_close(out, boolean)


def test_a_tail_from_outside_is_one_class():
    """One that knows the answer: a dense tail under the same denominator gives exact attention."""

    @register
    @dataclasses.dataclass(frozen=True)
    class Everything(Tail):
        name = "toy_everything"
        formula = "e^(QK^T) outside the window"
        paper = "this test"
        complexity = "n^2 d"
        accepts_causal = True

        block: int = 16

        def branch(self, query, key, value, call):
            seen = call.split.tail.repeat_interleave(self.block, 2).repeat_interleave(self.block, 3)
            seen = seen[:, :, : query.shape[2], : key.shape[2]]
            if call.key_mask is not None:
                seen = seen & call.key_mask[:, None, None, :]
            out, lse = attention(query, key, value, mask=seen, scale=call.scale, return_lse=True)
            return Branch(out, lse, attention_weights(query, key, mask=seen, scale=call.scale))

    try:
        method = parse("sliding_window:left=5,right=3+toy_everything")
        assert method.tail == Everything() and from_json(method.to_json()) == method and parse(str(method)) == method
        q, k, v = make()
        for is_causal in (False, True):
            key_mask = padding("holes")
            out, weights = method.attend(q, k, v, key_mask=key_mask, is_causal=is_causal, need_weights=True)
            wanted = attention(q, k, v, mask=key_mask[:, None, None, :], is_causal=is_causal)
            torch.testing.assert_close(out, wanted)
            torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), wanted)
        module = MultiheadAttention(16, 2, batch_first=True, attention=str(method))
        assert module(*torch.randn(3, 2, 40, 16))[0].shape == (2, 40, 16)
        (row,) = (row for row in methods_table() if row["name"] == "...+toy_everything")
        assert row["parameters"] == "block=16"
    finally:
        del REGISTERED["toy_everything"]


def test_errors():
    q, k, v = make()
    method = Hybrid(SlidingWindow(left=3, right=3), PerformerTail())
    with pytest.raises(InputError, match="needs state"):
        method.attend(q, k, v)
    with pytest.raises(UnsupportedError, match="cannot add a bias"):
        method.attend(q, k, v, state=state_of(method), bias=torch.zeros(N, N))
    with pytest.raises(UnsupportedError, match=r"nystrom tail cannot be causal.*\+performer"):
        parse("dense+nystrom").attend(q, k, v, is_causal=True)
    with pytest.raises(InputError, match="causal_alignment"):
        parse("dense+centroid").attend(q[:, :, :5], k, v, is_causal=True)
    with pytest.raises(UnsupportedError, match="doubles the head dimension"):
        wide = torch.randn(1, 1, 40, 129)
        parse("sliding_window+centroid:second_order=diagonal,block=16").attend(wide, wide, wide)
    with pytest.raises(InputError, match="has one branch"):
        branch_share(q, k, "sliding_window")
    with pytest.raises(InputTypeError, match="ends with a tail"):
        Hybrid(Dense(), Dense())
    with pytest.raises(InputTypeError, match="block='64' is not an integer"):
        CentroidTail(block="64")
    with pytest.raises(InputError, match="hybrid needs tail, a tail"):
        from_json({"method": "hybrid", "sparse": {"method": "dense"}})
    with pytest.raises(InputError, match="starts with a sparse method"):
        from_json({"method": "hybrid", "sparse": "dense", "tail": {"method": "centroid"}})
    assert Hybrid(Dense(), CentroidTail()) == parse("dense+centroid") == Hybrid(parse("dense"), CentroidTail())
    method = parse("dense+centroid")
    call = torch.compile(
        lambda q: method.attend(q, k, v, mask=torch.ones(N, N) > 0)[0], backend="eager", fullgraph=True
    )
    with pytest.raises(RuntimeError, match="cannot split a mask"):
        call(q)
