"""Methods by name: specs and JSON, what each accepts, padding, weights and parameters."""

import copy
import dataclasses
import itertools
import json
import math
import pickle

import pytest
import torch
import torch.utils.checkpoint

import efficient_attn
from efficient_attn import methods, patterns
from efficient_attn.errors import EfficientAttnError, InputError, InputTypeError, UnsupportedError
from efficient_attn.functional import attention
from efficient_attn.masks import BlockMask
from efficient_attn.methods import (
    DENSE,
    METHODS,
    Hybrid,
    Linear,
    Linformer,
    Method,
    Nystrom,
    Performer,
    Sparse,
    from_json,
    methods_table,
    parse,
)
from efficient_attn.options import convert, kind_of, read, write
from efficient_attn.patterns import BigBird, Dense, SlidingWindow

B, H, N, D = 2, 2, 90, 8
SPECS = [
    "dense",
    "causal",
    "sliding_window:left=9,right=4",
    "dilated:left=3,right=3,dilation=3",
    "strided:stride=16",
    "fixed:stride=16,summary=3",
    "longformer:window=16",
    "longformer:window=8,global_tokens=0,global_indices=3x70",
    "bigbird:block=16,window=1",
    "prefix_lm:prefix=20",
    "documents:lengths=40x30x20",
    "neighborhood:size=9x10,kernel=3x5",
    "neighborhood:size=9x10,kernel=4x5,stride=2x5",
    "axial:size=8x11,prefix=2",
    "deepspeed_fixed:num_local_blocks=2",
    "deepspeed_bigbird:different_layout_per_head=true,seed=3",
    "per_head(strided:stride=16,part=local; fixed:stride=16,causal=false)",
    "bigbird:block=16 & (causal | sliding_window:left=3,right=3)",
    "topk_blocks:block=16,blocks=3",
    "topp_blocks:block=16,mass=0.5,summary=minmax",
    "lsh:n_buckets=4,rounds=2",
    "lsh:n_buckets=4,shared_qk=true,chunk=8",
    "sorted_buckets:size=30,rounds=2",
    "linformer:rank=8,max_len=100",
    "linformer:rank=8,max_len=100,share=none,init=normal",
    "linformer:rank=8,max_len=100,share=kv",
    "nystrom:landmarks=8",
    "nystrom:landmarks=8,conv=5",
    "performer:features=32",
    "performer:features=16,feature=relu,orthogonal=false",
    "linear",
]
SPARSE = [spec for spec in SPECS if isinstance(parse(spec), Sparse)]
STATIC = [spec for spec in SPARSE if not parse(spec).pattern.by_content]
LOW_RANK = [spec for spec in SPECS if spec not in SPARSE]
HYBRIDS = [
    "sliding_window:left=9,right=4+centroid:block=16,second_order=full",
    "bigbird:block=16,window=1+nystrom:landmarks=8,block=16",
    "longformer:window=16+performer:features=16,block=16",
]


def make(dtype=torch.float64, heads=(H, H), n=N):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, h, n, D, generator=g, dtype=torch.float64).to(dtype) for h in (heads[0], heads[1], heads[1])]


def state_of(method, dtype=torch.float64):
    state = method.build(H * D, H, D, dtype=dtype)
    if isinstance(method, Nystrom) and state is not None:
        torch.nn.init.normal_(state.conv_weight, generator=torch.Generator().manual_seed(1))
    return state


def padding(name):
    tail = torch.arange(N) < torch.tensor([[61], [N]])
    holes = torch.rand(B, N, generator=torch.Generator().manual_seed(2)) < 0.7
    return {"none": None, "tail": tail, "holes": holes}[name]


# --- specs ---


@pytest.mark.parametrize("spec", [*SPECS, *HYBRIDS, *METHODS])
def test_specs_and_json_come_back(spec):
    method = parse(spec)
    assert parse(str(method)) == method and parse(method) is method
    assert from_json(method.to_json()) == method == from_json(json.loads(method.to_json()))
    assert str(parse(str(method))) == str(method)
    assert pickle.loads(pickle.dumps(method)) == method and hash(copy.deepcopy(method)) == hash(method)
    assert json.loads(method.to_json())["method"] == method.name
    assert method.name not in METHODS or str(METHODS[method.name]()) == method.name


def test_specs_are_short_and_forgiving():
    assert str(parse(" bigbird : window = 3 , block=32 ")) == "bigbird:block=32"
    assert parse("performer:orthogonal=false") == Performer(orthogonal=False)
    assert from_json({"method": "nystrom", "landmarks": 5}) == Nystrom(landmarks=5)


def test_a_pattern_becomes_a_sparse_method():
    pattern = SlidingWindow(left=3, right=2)
    method = parse(pattern)
    assert method == Sparse(pattern) == parse("sliding_window:left=3,right=2") and isinstance(method, Method)
    assert (method.name, method.paper, str(method)) == (pattern.name, pattern.paper, str(pattern))
    q, k, v = make()
    for mask in (pattern, method):
        torch.testing.assert_close(attention(q, k, v, mask=mask), method.attend(q, k, v)[0])
    assert method.left == 3 and method.block_mask(9, 9) == pattern.block_mask(9, 9)
    for again in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert again == method and again.is_dense is False and not hasattr(again, "nothing")
    both = parse(BigBird() & patterns.Causal())
    assert both == parse("bigbird & causal") == Sparse(BigBird() & patterns.Causal())
    assert parse("dense").is_dense and not both.is_dense and not parse("linear").is_dense
    with pytest.raises(InputTypeError, match="Sparse takes a pattern"):
        Sparse("bigbird")


def test_a_name_stands_for_one_class():
    assert efficient_attn.SlidingWindow is SlidingWindow is METHODS["sliding_window"]
    for name, cls in patterns.PATTERNS.items():
        assert METHODS[name] is cls and issubclass(cls, patterns.Pattern)
        assert getattr(efficient_attn, cls.__name__, cls) is cls
    assert all(issubclass(cls, patterns.Pattern | Method) for cls in METHODS.values())


def test_specs_with_operators():
    a, b, c = BigBird(block=32), SlidingWindow(left=3, right=4), Dense()
    for text, pattern in (
        ("bigbird:block=32&sliding_window:left=3,right=4", a & b),
        ("bigbird:block=32 | sliding_window:left=3,right=4 & dense", a | (b & c)),
        ("(bigbird:block=32 | sliding_window:left=3,right=4) & dense", (a | b) & c),
        ("per_head(bigbird:block=32;(dense|causal))", patterns.per_head([a, c | patterns.Causal()])),
        ("per_head(per_head(dense; causal); dense) | (dense)", None),
    ):
        method = parse(text)
        assert pattern is None or method == parse(pattern), text
        assert parse(str(method)) == method == from_json(method.to_json())
        again = patterns.Pattern.from_json(method.to_json())
        assert again == method.pattern
        assert again.block_mask(50, 50, num_heads=4) == method.pattern.block_mask(50, 50, num_heads=4)
    assert str(parse("longformer:global_indices=none")) == "longformer"
    assert parse("deepspeed_bslongformer:global_block_indices=none").pattern.global_block_indices == ()


@pytest.mark.parametrize(
    ("spec", "error", "text"),
    [
        ("bigbird & nystrom", UnsupportedError, "nystrom is no pattern"),
        ("bigbird & ", InputError, "no method ''"),
        ("(bigbird", InputError, "parentheses"),
        ("bigbird)(", InputError, "parentheses"),
        ("(" * 30 + "dense" + ")" * 30, InputError, "deep"),
        ("per_head()", InputError, "no method ''"),
        ("per_head", InputError, "no method 'per_head'"),
        ("fixed:stride=16,summary=9,shift=1", InputError, "exceeds the segment"),
        ("fixed:part=left", InputError, "part must be one of"),
        ("documents:lengths=0", InputError, "lengths must be >= 1"),
        ("documents:lengths=none", InputError, "at least one document"),
        ("neighborhood:size=3x4,kernel=3x3x3", InputError, "kernel needs one value"),
        ("neighborhood:kernel=3,stride=4", InputError, "stride may not exceed"),
        ("neighborhood:axes=3", InputError, "axes must be 1 or 2"),
        ("neighborhood:causal=1", InputError, "is not"),
        ("axial:size=3x4x5", InputError, "2 axes"),
        ("topk_blocks:fraction=0", InputError, r"fraction must be a number in \(0, 1\]"),
        ("topp_blocks:mass=none", InputError, "not a number"),
        ("topk_blocks:summary=max", InputError, "summary must be one of mean, minmax"),
        ("lsh:n_buckets=3", InputError, "n_buckets must be even"),
        ("lsh:chunk=8", InputError, "shared_qk=true"),
        ("deepspeed_fixed:num_local_blocks=4,num_global_blocks=3", InputError, "multiple of num_global_blocks"),
        ("nystorm", InputError, r"no method 'nystorm' \(did you mean 'nystrom'.*choose from axial, bigbird, causal"),
        ("", InputError, "no method ''"),
        (
            "nystrom:landmark=3",
            InputError,
            r"no option 'landmark' \(did you mean 'landmarks'\?\); its options: landmarks",
        ),
        ("dense:block=3", InputError, "its options: none"),
        ("nystrom:landmarks=x", InputError, "landmarks='x' is not an integer"),
        ("nystrom:landmarks", InputError, "write options as nystrom:key=value"),
        ("nystrom:", InputError, "cannot read ''"),
        ("nystrom:landmarks=3,landmarks=4", InputError, "gives landmarks twice"),
        ("nystrom:landmarks=0", InputError, "landmarks must be >= 1, got 0"),
        ("nystrom:conv=4", InputError, "conv must be 0 or odd"),
        ("nystrom:pinv_iterations=101", InputError, "from 1 to 100"),
        ("performer:feature=cosine", InputError, "feature must be one of softmax, relu"),
        ("performer:orthogonal=1", InputError, "orthogonal='1' is not true or false"),
        ("linformer:rank=600", InputError, "rank=600 exceeds max_len=512"),
        ("linformer:share=all", InputError, "share must be one of headwise, kv, layerwise, none"),
        ("bigbird:block=17", InputError, "block"),
        ("sliding_window+nystorm", InputError, r"no tail 'nystorm' \(did you mean 'nystrom'.*from centroid, nystrom"),
        ("nystrom+nystrom", InputError, "starts with a sparse method"),
        ("dense+centroid+centroid", InputError, "joins 3 parts"),
        ("centroid:block=64", InputError, r"write sliding_window\+centroid"),
        ("dense+centroid:block=17", InputError, "multiple of 16"),
        ("dense+centroid:second_order=third", InputError, "one of none, diagonal, full"),
        ("__import__('os')", InputError, "no method"),
        (3, InputTypeError, "a method is a spec"),
        (None, InputTypeError, "a method is a spec"),
    ],
)
def test_wrong_specs_say_what_is_allowed(spec, error, text):
    with pytest.raises(error, match=text) as caught:
        parse(spec)
    assert isinstance(caught.value, EfficientAttnError)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", InputError, "not JSON"),
        ("[]", InputError, "object with a 'method' name"),
        ('{"landmarks": 3}', InputError, "object with a 'method' name"),
        ('{"method": "nystrom", "landmark": 3}', InputError, "did you mean 'landmarks'"),
        ('{"method": "nystrom", "landmarks": "3"}', InputTypeError, "landmarks='3' is not an integer"),
        ('{"method": "nystrom", "landmarks": true}', InputTypeError, "not an integer"),
        ('{"method": "nystrom", "landmarks": -1}', InputError, ">= 1"),
        ('{"method": "performer", "orthogonal": 1}', InputTypeError, "true or false"),
        ({"method": "nystrom", "landmarks": 3.0}, InputTypeError, "not an integer"),
    ],
)
def test_json_is_checked(text, error, message):
    with pytest.raises(error, match=message):
        from_json(text)


def test_constructors_check_types():
    for build in (lambda: Nystrom(landmarks="8"), lambda: Performer(orthogonal="yes"), lambda: Linformer(rank=True)):
        with pytest.raises(InputTypeError, match="is not"):
            build()


def test_option_values_of_every_kind():
    for text, kind, value in [
        ("64x128", tuple[int, int], (64, 128)),
        ("1x2x3", tuple[int, ...], (1, 2, 3)),
        ("none", int | None, None),
        ("3", int | None, 3),
        ("0.5", float, 0.5),
        ("7", int | str, 7),
        ("auto", int | str, "auto"),
    ]:
        assert read(text, kind_of(kind), "m", "o") == value and write(value) == text
        assert convert(list(value) if isinstance(value, tuple) else value, kind_of(kind), "m", "o") == value
    assert convert(2, kind_of(float), "m", "o") == 2.0
    with pytest.raises(InputTypeError, match="an integer x"):
        convert([1, 2, 3], kind_of(tuple[int, int]), "m", "o")


def test_the_table_has_a_row_for_each_method():
    rows = methods_table()
    assert [row["name"] for row in rows] == [*METHODS, "...+centroid", "...+nystrom", "...+performer"]
    assert all(isinstance(cell, str) and cell for row in rows for cell in row.values())
    by_name = {row["name"]: row for row in rows}
    assert by_name["nystrom"]["causal"] == "no" and by_name["performer"]["causal"] == "yes"
    assert by_name["bigbird"]["exact"] == "yes" and by_name["linear"]["exact"] == "no"
    assert "cpu" in by_name["nystrom"]["backends"] and "reference" in by_name["linear"]["backends"]
    assert by_name["...+nystrom"]["causal"] == "no" and by_name["...+performer"]["paper"].endswith("(Scatterbrain)")
    assert by_name["nystrom"]["parameters"] == "landmarks=32, pinv_iterations=6, conv=0"


# --- sparse ---


@pytest.mark.parametrize("pad", ["none", "tail", "holes"])
@pytest.mark.parametrize("spec", STATIC)
def test_sparse_methods_equal_their_definition(spec, pad):
    method = parse(spec)
    key_mask = padding(pad)
    g = torch.Generator().manual_seed(3)
    user = torch.rand(N, N, generator=g) < 0.7
    bias = torch.randn(1, H, N, N, generator=g, dtype=torch.float64)
    i = torch.arange(N)
    for mask in (None, user, BlockMask.from_dense(user, block_size=16)):
        for extra in (None, bias):
            for is_causal in (False, True):
                inputs = [t.requires_grad_() for t in make(heads=(H, 1))]
                visible = torch.stack([method.pattern.visible(i[:, None], i[None], N, N, head) for head in range(H)])
                visible = visible.expand(B, H, N, N).clone()
                visible &= True if key_mask is None else key_mask[:, None, None, :]
                visible &= True if mask is None else user
                visible &= i[None] <= i[:, None] if is_causal else True
                q, k, v = inputs
                scores = q @ k.mT / math.sqrt(D) + (0.0 if extra is None else extra)
                P = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1)
                P = torch.where(visible.any(-1, keepdim=True), P, 0.0)
                out, weights = method.attend(
                    q, k, v, key_mask=key_mask, mask=mask, bias=extra, is_causal=is_causal, need_weights=True
                )
                torch.testing.assert_close(out, P @ v)
                torch.testing.assert_close(weights, P)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    for ours, theirs in zip(gradients, torch.autograd.grad((P @ v).square().sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs.nan_to_num(0.0))


@pytest.mark.parametrize(
    ("dtype", "pad"), [(torch.float32, "tail"), (torch.float64, "holes"), (torch.bfloat16, "holes")]
)
@pytest.mark.parametrize("spec", [*SPECS, *HYBRIDS])
def test_what_padding_holds_changes_no_bit(spec, dtype, pad):
    method = parse(spec)
    state = state_of(method, dtype)
    key_mask = padding(pad)
    hidden = ~key_mask[:, None, :, None]
    results = []
    for content in (0.0, math.inf, math.nan):
        q, k, v = make(dtype)
        inputs = [q, k.masked_fill(hidden, content), v.masked_fill(hidden, content)]
        for t in inputs:
            t.requires_grad_()
        out, weights = method.attend(*inputs, state=state, key_mask=key_mask, need_weights=True)
        gradients = torch.autograd.grad(out.float().square().sum(), inputs, allow_unused="shared" in spec)
        gradients = [torch.zeros_like(q) if g is None else g for g in gradients]  # shared queries and keys
        assert all((g.masked_select(hidden) == 0).all() for g in gradients[1:])
        assert (weights.masked_select(hidden.mT) == 0).all()
        results.append((out, weights, *gradients))
    assert all(r.isfinite().all() for r in results[0])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_self_attention_ignores_padding_end_to_end():
    """Nystrom pools the queries: with a key mask and Nq = Nk, the padded ones do not count either."""
    for spec in [*SPECS, *HYBRIDS]:
        method = parse(spec)
        state = state_of(method)
        key_mask = padding("tail")
        q, k, v = make()
        hidden = ~key_mask[:, None, :, None]
        first, second = (
            method.attend(*(t.masked_fill(hidden, fill) for t in (q, k, v)), state=state, key_mask=key_mask)[0]
            for fill in (0.0, 50.0)
        )
        assert torch.equal(first.masked_fill(hidden, 0.0), second.masked_fill(hidden, 0.0)), spec


def test_full_padding_mask_costs_nothing_and_changes_nothing():
    q, k, v = make()
    full = torch.ones(B, N, dtype=torch.bool)
    for spec in SPARSE:
        assert torch.equal(parse(spec).attend(q, k, v, key_mask=full)[0], parse(spec).attend(q, k, v)[0])


# --- weights and dropout ---


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("spec", [*SPECS, *HYBRIDS])
def test_weights_are_what_multiplied_the_values(spec, dropout_p):
    method = parse(spec)
    state = state_of(method)
    q, k, v = make(heads=(H, H))
    key_mask = padding("holes")
    for seed in (5, None):
        torch.manual_seed(0)
        out, weights = method.attend(
            q, k, v, state=state, key_mask=key_mask, dropout_p=dropout_p, dropout_seed=seed, need_weights=True
        )
        assert weights.shape == (B, H, N, N)
        torch.testing.assert_close(weights @ v, out)
    plain, nothing = method.attend(q, k, v, state=state, key_mask=key_mask)
    assert nothing is None and torch.allclose(plain, out) == (dropout_p == 0.0)


# --- low rank ---


@pytest.mark.parametrize("spec", LOW_RANK)
def test_low_rank_methods_refuse_what_they_cannot_do(spec):
    method = parse(spec)
    state = state_of(method)
    q, k, v = make()
    for keywords in ({"mask": torch.ones(N, N, dtype=torch.bool)}, {"bias": torch.zeros(N, N)}):
        with pytest.raises(UnsupportedError, match=rf"{method.name}.*forms no scores of pairs.*key_mask"):
            method.attend(q, k, v, state=state, **keywords)
    if method.accepts_causal:
        future = v.clone()
        future[:, :, 40:] = math.nan
        before = method.attend(q, k, v, state=state, is_causal=True)[0]
        assert torch.equal(before[:, :, :40], method.attend(q, k, future, state=state, is_causal=True)[0][:, :, :40])
    else:
        with pytest.raises(UnsupportedError, match="cannot be causal"):
            method.attend(q, k, v, state=state, is_causal=True)
    if state is not None:
        with pytest.raises(InputError, match=r"needs state.*build\("):
            method.attend(q, k, v)


def test_options_reach_the_functions():
    q, k, v = make()
    method = Linformer(rank=8, max_len=N, share="none", init="normal")
    state = method.build(H * D, H, D, dtype=q.dtype)
    assert state.key_projection.shape == (H, 8, N)
    torch.testing.assert_close(
        method.attend(q, k, v, state=state)[0],
        methods.linformer_attention(q, k, v, state.key_projection, state.value_projection),
    )
    method = Nystrom(landmarks=5, pinv_iterations=2, conv=3)
    state = state_of(method)
    torch.testing.assert_close(
        method.attend(q, k, v, state=state)[0],
        methods.nystrom_attention(q, k, v, landmarks=5, pinv_iterations=2, conv_weight=state.conv_weight),
    )
    method = Performer(features=12, feature="relu")
    state = state_of(method)
    torch.testing.assert_close(
        method.attend(q, k, v, state=state, scale=0.2, is_causal=True)[0],
        methods.performer_attention(q, k, v, state.projection, feature="relu", scale=0.2, is_causal=True),
    )
    torch.testing.assert_close(Linear().attend(q, k, v)[0], methods.elu_attention(q, k, v))


# --- parameters ---


def test_building_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    for spec in [*SPECS, *HYBRIDS]:
        state_of(parse(spec))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("spec", [*LOW_RANK, HYBRIDS[-1]])
def test_states_copy_pickle_save_and_train(spec):
    method = parse(spec)
    state = state_of(method)
    if state is None:
        return
    q, k, v = make()
    out = method.attend(q, k, v, state=state)[0]
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert torch.equal(method.attend(q, k, v, state=twin)[0], out)
    if isinstance(method, Hybrid):
        other = dataclasses.replace(method, tail=dataclasses.replace(method.tail, seed=9))
    else:
        other = dataclasses.replace(method, seed=9) if hasattr(method, "seed") else method
    loaded = other.build(H * D, H, D, dtype=torch.float64)
    loaded.load_state_dict(state.state_dict())
    assert torch.equal(method.attend(q, k, v, state=loaded)[0], out)
    parameters = list(state.parameters())
    if parameters:
        for gradient in torch.autograd.grad(out.square().sum(), parameters):
            assert gradient.isfinite().all() and (gradient != 0).any()
    dtypes = {t.dtype for t in method.build(H * D, H, D, dtype=torch.bfloat16).state_dict().values()}
    assert dtypes - {torch.int64} == {torch.bfloat16}
    meta = method.build(H * D, H, D, device="meta")
    assert all(t.device.type == "meta" for t in meta.state_dict().values())
    meta.to_empty(device="cpu").reset_parameters()
    fresh = method.build(H * D, H, D)
    assert all(torch.equal(a, b) for a, b in zip(meta.state_dict().values(), fresh.state_dict().values(), strict=True))


def test_linformer_starts_as_pooling():
    state = Linformer(rank=4, max_len=10).build(H * D, H, D)
    pooled = methods.segment_means(torch.arange(10.0)[None, None, :, None], 4)[0].flatten()
    torch.testing.assert_close(state.key_projection @ torch.arange(10.0), pooled)
    assert torch.equal(state.key_projection, state.value()) and state.key_projection is not state.value()
    shared = Linformer(rank=4, max_len=10, share="kv").build(H * D, H, D)
    assert shared.value() is shared.key_projection and len(list(shared.parameters())) == 1
    wide = Linformer(rank=64, max_len=512, init="normal").build(H * D, H, D)
    torch.testing.assert_close(wide.key_projection.std(), torch.tensor(512**-0.5), rtol=0.02, atol=0)
    assert not torch.equal(wide.key_projection, wide.value())


def test_performer_redraws_in_place():
    method = Performer(features=12)
    state = method.build(H * D, H, D)
    first, where = state.projection.clone(), state.projection.data_ptr()
    state.redraw(torch.Generator().manual_seed(5))
    assert not torch.equal(state.projection, first) and state.projection.data_ptr() == where
    state.reset_parameters()
    assert torch.equal(state.projection, first)
    assert not list(state.parameters())
    before = torch.get_rng_state()
    state.redraw()
    state.redraw()
    again = method.build(H * D, H, D)
    again.redraw()
    assert not torch.equal(again.projection, state.projection) and not torch.equal(again.projection, first)
    again.redraw()
    assert torch.equal(again.projection, state.projection) and torch.equal(before, torch.get_rng_state())
    assert int(state.draws) == 2


@pytest.mark.parametrize(
    "spec", ["performer:features=12,redraw_interval=3", "dense+performer:features=12,redraw_interval=3"]
)
def test_performer_redraws_at_an_interval(spec):
    method = parse(spec)
    q, k, v = make(torch.float32)
    q.requires_grad_()

    def run(state, calls):
        seen = []
        for _ in range(calls):
            method.attend(q, k, v, state=state)
            seen.append(state.projection.clone())
        return torch.stack(seen)

    seen = run(method.build(H * D, H, D), 7)
    changes = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert changes == [False, False, True, False, False, True]
    first = method.build(H * D, H, D)
    half = run(first, 4)
    resumed = method.build(H * D, H, D)
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(torch.cat([half, run(resumed, 3)]), seen)  # a checkpoint goes on where it was
    still = run(method.build(H * D, H, D).eval(), 7)
    assert (still == still[0]).all()


def test_redrawing_leaves_gradients_right():
    """Features are drawn in place, between forwards whose backward is yet to come, and never when one is repeated."""
    method = Performer(features=12, redraw_interval=1)
    q, k, v = make(torch.float32)
    q.requires_grad_()
    state, twin = method.build(H * D, H, D), method.build(H * D, H, D)
    outs = [method.attend(q, k, v, state=state)[0].square().sum() for _ in range(3)]
    found = torch.autograd.grad(sum(outs), q)[0]
    for reentrant in (False, True):
        twin.reset_parameters()
        total = torch.zeros_like(found)
        for _ in range(3):
            out = torch.utils.checkpoint.checkpoint(
                lambda q: method.attend(q, k, v, state=twin)[0].square().sum(), q, use_reentrant=reentrant
            )
            q.grad = None
            out.backward()
            total += q.grad
        torch.testing.assert_close(total, found)
        assert torch.equal(twin.projection, state.projection)
    compiled = torch.compile(lambda q: method.attend(q, k, v, state=state)[0], backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="cannot be counted under"):
        compiled(q)


# --- compile ---


@pytest.mark.parametrize("spec", SPARSE[:1] + SPARSE[2:3] + ["bigbird:block=16,window=1"] + LOW_RANK[-2:])
def test_compiles_without_graph_breaks(spec):
    method = parse(spec)
    state = state_of(method)
    masks = {"key_mask": padding("holes")}
    if method.accepts_mask:
        masks["mask"] = torch.rand(N, N, generator=torch.Generator().manual_seed(4)) < 0.7
    compiled = torch.compile(
        lambda q, k, v, **masks: method.attend(q, k, v, state=state, **masks)[0], fullgraph=True, backend="aot_eager"
    )
    inputs = [t.requires_grad_() for t in make()]
    out, expected = compiled(*inputs, **masks), method.attend(*inputs, state=state, **masks)[0]
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_compile_says_when_two_lists_cannot_be_joined():
    mask = patterns.BigBird(block=16).block_mask(N, N)

    def call(q, k, v):
        return parse(BigBird(block=16)).attend(q, k, v, mask=mask)[0]

    with pytest.raises(RuntimeError, match=r"cannot join the lists of bigbird.*or pass the mask as a bool tensor"):
        torch.compile(call, backend="eager", fullgraph=True)(*make())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(call, backend="eager")(*make()), call(*make()))  # a graph break


def test_wrong_padding_raises():
    q, k, v = make()
    for spec in [*SPECS, *HYBRIDS]:
        method = parse(spec)
        with pytest.raises(InputError, match="key_mask must be"):
            method.attend(q, k, v, state=state_of(method), key_mask=torch.ones(B, 3, dtype=torch.bool))
        with pytest.raises(InputTypeError, match="key_mask must be a bool"):
            method.attend(q, k, v, state=state_of(method), key_mask=torch.ones(B, N))
    with pytest.raises(InputTypeError, match="bool tensor"):
        parse(BigBird()).attend(q, k, v, mask=torch.ones(N, N))
    assert DENSE.build(16, 2, 8) is None
