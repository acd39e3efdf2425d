"""MultiheadAttention against its parent: the same numbers, gradients, errors and state, also in other tools."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from efficient_attn.errors import InputError, InputTypeError, UnsupportedError
from efficient_attn.methods import Dense
from efficient_attn.multihead import MultiheadAttention, keep_own_forward, replace_attention

TIGHT = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}
SPARSE = "sliding_window:left=2,right=2"
E, H = 12, 4


def pair(attention: str = "dense", **options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """The parent and ours from one seed, biases made non-zero so that they count."""
    torch.manual_seed(7)
    theirs = nn.MultiheadAttention(E, H, **options)
    torch.manual_seed(7)
    ours = MultiheadAttention(E, H, attention=attention, **options)
    for modules in zip(theirs.parameters(), ours.parameters(), strict=False):
        if modules[0].dim() == 1:
            value = torch.randn_like(modules[0])
            for parameter in modules:
                parameter.data.copy_(value)
    return theirs, ours


def causal_mask(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length, dtype=dtype)


# --- the same numbers ------------------------------------------------------------------------------------------------


def draw_call(seed: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """One random use of the module: constructor options, call options, tensors."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.float32, torch.float32, torch.float64])
    kind = draw.choice(["self", "cross", "separate"])
    options = {
        "bias": draw.random() < 0.7,
        "add_bias_kv": draw.random() < 0.3,
        "add_zero_attn": draw.random() < 0.3,
        "batch_first": draw.random() < 0.5,
        "dtype": dtype,
    }
    if kind != "self" and draw.random() < 0.5:
        options.update(kdim=draw.choice([7, E]), vdim=draw.choice([5, E]))
    N, L, S = draw.choice([1, 3]), draw.choice([1, 4, 9]), draw.choice([1, 5, 8])
    batched = draw.random() < 0.8

    def tensor(length: int, features: int) -> Tensor:
        shape = (N, length, features) if options["batch_first"] else (length, N, features)
        return torch.randn(shape if batched else (length, features), dtype=dtype)

    query = tensor(L, E)
    if kind == "self":
        S, key, value = L, query, query
    else:
        key = tensor(S, options.get("kdim", E))
        value = (
            key if kind == "cross" and options.get("vdim", E) == key.shape[-1] else tensor(S, options.get("vdim", E))
        )
    tensors = {"query": query, "key": key, "value": value}
    floats = draw.random() < 0.5
    if draw.random() < 0.5:
        shape = (L, S) if draw.random() < 0.5 else ((N if batched else 1) * H, L, S)
        keep = torch.rand(shape) < 0.6
        keep[..., 0] = True
        tensors["attn_mask"] = torch.randn(shape, dtype=dtype).masked_fill(~keep, -torch.inf) if floats else ~keep
    if draw.random() < 0.5:
        keep = torch.rand((N, S) if batched else (S,)) < 0.7
        keep[..., 0] = True
        tensors["key_padding_mask"] = (
            torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, -torch.inf) if floats else ~keep
        )
    call = {"need_weights": draw.random() < 0.5, "average_attn_weights": draw.random() < 0.5}
    return options, call, tensors


def run(module: nn.Module, call: dict[str, Any], tensors: dict[str, Tensor], grad: bool) -> list[Tensor | None]:
    """Output and weights, followed by the gradients of every parameter and floating input."""
    leaves: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in leaves:
            wanted = grad and tensor.is_floating_point()
            leaves[id(tensor)] = tensor.detach().clone().requires_grad_(wanted)
    inputs = {name: leaves[id(tensor)] for name, tensor in tensors.items()}
    with torch.set_grad_enabled(grad):
        output, weights = module(**inputs, **call)
    results = [output, weights]
    if grad:
        torch.manual_seed(1)
        loss = (output * torch.randn(output.shape, dtype=output.dtype)).sum()
        if weights is not None:
            loss = loss + (weights * torch.randn(weights.shape, dtype=output.dtype)).sum()
        wanted = [*module.parameters(), *(leaf for leaf in leaves.values() if leaf.requires_grad)]
        results += torch.autograd.grad(loss, wanted)
    return results


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("seed", range(60))
def test_parity_with_the_parent(seed: int, grad: bool, training: bool) -> None:
    options, call, tensors = draw_call(seed)
    theirs, ours = (module.train(training) for module in pair(**options))
    expected, found = (run(module, call, tensors, grad) for module in (theirs, ours))
    assert len(expected) == len(found)
    for theirs_result, ours_result in zip(expected, found, strict=True):
        if theirs_result is None:
            assert ours_result is None
        else:
            assert_close(ours_result, theirs_result, **TIGHT[options["dtype"]])


def test_draws_reach_every_option() -> None:
    """The fuzz above is only worth its name if each option and mask kind comes up."""
    seen: set[str] = set()
    for seed in range(60):
        options, call, tensors = draw_call(seed)
        seen.update(f"{name}={value}" for name, value in {**options, **call}.items())
        seen.update(f"{name}:{t.dtype}:{t.dim()}" for name, t in tensors.items() if "mask" in name)
        seen.add(
            "self" if tensors["query"] is tensors["value"] else "cross" if tensors["key"] is tensors["value"] else "3"
        )
    flags = ("bias", "add_bias_kv", "add_zero_attn", "batch_first", "need_weights", "average_attn_weights")
    wanted = {f"{flag}={value}" for flag in flags for value in (True, False)} | {
        "self",
        "cross",
        "3",
        "kdim=7",
        "vdim=5",
    }
    wanted |= {f"attn_mask:torch.{dtype}:{dim}" for dtype in ("bool", "float32", "float64") for dim in (2, 3)}
    wanted |= {f"key_padding_mask:torch.{dtype}:{dim}" for dtype in ("bool", "float32") for dim in (1, 2)}
    assert wanted <= seen, wanted - seen


def test_module_inputs_of_the_installed_pytorch() -> None:
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_modules import module_inputs_torch_nn_MultiheadAttention

    samples = module_inputs_torch_nn_MultiheadAttention(None, "cpu", torch.float64, requires_grad=False, training=True)
    assert len(samples) == 64
    for sample in samples:
        theirs = nn.MultiheadAttention(**sample.constructor_input.kwargs, dtype=torch.float64)
        ours = MultiheadAttention(**sample.constructor_input.kwargs, dtype=torch.float64)
        ours.load_state_dict(theirs.state_dict())
        call = sample.forward_input
        for expected, found in zip(theirs(*call.args, **call.kwargs), ours(*call.args, **call.kwargs), strict=True):
            # The parent gives NaN where every key is masked; its samples mask two of three and pass.
            assert_close(found, expected, rtol=1e-12, atol=1e-12)
        batched = sample.reference_fn(ours, *call.args, **call.kwargs)
        for expected, found in zip(batched, ours(*call.args, **call.kwargs), strict=True):
            assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [True, False])
def test_half_precision(dtype: torch.dtype, need_weights: bool) -> None:
    theirs, ours = pair(batch_first=True, dtype=dtype)
    x = torch.randn(2, 6, E, dtype=dtype)
    exact = copy.deepcopy(theirs).double()(x.double(), x.double(), x.double(), need_weights=need_weights)[0]
    results = [module(x, x, x, need_weights=need_weights)[0] for module in (theirs, ours)]
    assert results[1].dtype == dtype
    errors = [(result.double() - exact).abs().max() for result in results]
    assert errors[1] <= 1.5 * errors[0] + 4 * torch.finfo(dtype).eps


def test_float32_mask_beside_half_inputs_keeps_its_range() -> None:
    """-1e9 is -inf in float16; as float32 a row of it is uniform, as it is in the parent in float32."""
    _, ours = pair(batch_first=True, dtype=torch.float16)
    x = torch.randn(2, 5, E, dtype=torch.float16)
    weights = ours(x, x, x, attn_mask=torch.full((5, 5), -1e9))[1]
    assert_close(weights.float(), torch.full((2, 5, 5), 0.2), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("attention", ["dense", SPARSE])
def test_fully_masked_rows_are_zero(attention: str, need_weights: bool) -> None:
    _, ours = pair(attention, batch_first=True)
    x = torch.randn(2, 4, E, requires_grad=True)
    padding = torch.tensor([[True] * 4, [False] * 4])
    output, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert_close(output[0], ours.out_proj.bias.expand(4, E))
    if need_weights:
        assert (weights[0] == 0).all()
    output.sum().backward()
    assert torch.isfinite(x.grad).all() and (x.grad[0] == 0).all() and (x.grad[1] != 0).any()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 3, 1)])
def test_empty_and_single(shape: tuple[int, int, int], batch_first: bool) -> None:
    N, L, S = shape
    theirs, ours = pair(batch_first=batch_first)
    query, key = torch.randn(N, L, E), torch.randn(N, S, E)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    for need_weights in (True, False):
        for expected, found in zip(
            theirs(query, key, key, need_weights=need_weights),
            ours(query, key, key, need_weights=need_weights),
            strict=True,
        ):
            assert (expected is None and found is None) or found.shape == expected.shape
    assert_close(ours(query, key, key)[0], theirs(query, key, key)[0])


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_shows_in_the_weights_and_matches_the_output() -> None:
    _, ours = pair(batch_first=True, dropout=0.4)
    x = torch.randn(2, 40, E)
    output, weights = ours(x, x, x, average_attn_weights=False)
    assert 0.3 < (weights == 0).float().mean() < 0.5
    value = ours._split_heads(nn.functional.linear(x, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :]))
    attended = (weights @ value).transpose(1, 2).flatten(2)
    assert_close(output, nn.functional.linear(attended, ours.out_proj.weight, ours.out_proj.bias), rtol=1e-4, atol=1e-5)
    weights.sum().backward()
    assert ours.in_proj_weight.grad.abs().sum() > 0
    ours.eval()
    assert_close(ours(x, x, x)[1].sum(-1), torch.ones(2, 40))


def test_dropout_follows_the_seed() -> None:
    _, ours = pair(batch_first=True, dropout=0.4)
    x = torch.randn(2, 8, E)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(ours(x, x, x, need_weights=False)[0])
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


# --- the causal hint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_hint_with_a_mask_that_is_not_causal(need_weights: bool, padded: bool) -> None:
    """The parent trusts the hint only without weights and padding; so do we, whatever the mask says."""
    theirs, ours = pair(batch_first=True)
    x = torch.randn(2, 5, E)
    call = {
        "attn_mask": torch.rand(5, 5).log(),
        "is_causal": True,
        "need_weights": need_weights,
        "key_padding_mask": torch.tensor([[0.0] * 5, [0.0] * 4 + [-torch.inf]]) if padded else None,
    }
    assert_close(ours(x, x, x, **call)[0], theirs(x, x, x, **call)[0], rtol=1e-5, atol=1e-6)
    trusted = ours(x, x, x, attn_mask=causal_mask(5), need_weights=False)[0]
    assert torch.allclose(ours(x, x, x, **call)[0], trusted, atol=1e-5) is (not need_weights and not padded)


@pytest.mark.parametrize("add_bias_kv", [True, False])
def test_hint_with_other_lengths_is_top_left(add_bias_kv: bool) -> None:
    theirs, ours = pair(add_bias_kv=add_bias_kv)
    query, key = torch.randn(3, 2, E), torch.randn(6, 2, E)
    call = {"attn_mask": torch.zeros(3, 6), "is_causal": True, "need_weights": False}
    assert_close(ours(query, key, key, **call)[0], theirs(query, key, key, **call)[0], rtol=1e-5, atol=1e-6)


# --- what the parent refuses -----------------------------------------------------------------------------------------

X, MASK = torch.randn(4, 3, E), torch.zeros(4, 4)
REFUSED: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = {
    "key of 2 dimensions": ({}, (X, X[0], X), {}),
    "value of 2 dimensions": ({}, (X, X, X[0]), {}),
    "unbatched with batched keys": ({}, (X[0], X, X), {}),
    "query of 1 dimension": ({}, (X[0, 0], X, X), {}),
    "query of 4 dimensions": ({}, (X[None], X, X), {}),
    "wrong embed_dim": ({}, (X[..., :5], X[..., :5], X[..., :5]), {}),
    "wrong key width": ({}, (X, X[..., :5], X[..., :5]), {}),
    "key and value of other lengths": ({}, (X, X, X[:2]), {}),
    "key and value of other lengths, kdim": ({"kdim": 5}, (X, X[..., :5], X[:2]), {}),
    "another batch": ({}, (X, X[:, :2], X[:, :2]), {}),
    "hint without mask": ({}, (X, X, X), {"is_causal": True}),
    "hint without mask, no weights": ({}, (X, X, X), {"is_causal": True, "need_weights": False}),
    "integer attn_mask": ({}, (X, X, X), {"attn_mask": MASK.long()}),
    "integer key_padding_mask": ({}, (X, X, X), {"key_padding_mask": torch.zeros(3, 4).int()}),
    "attn_mask of 1 dimension": ({}, (X, X, X), {"attn_mask": MASK[0]}),
    "attn_mask of 4 dimensions": ({}, (X, X, X), {"attn_mask": MASK[None, None]}),
    "attn_mask of another length": ({}, (X, X, X), {"attn_mask": MASK[:, :3]}),
    "attn_mask of another batch": ({}, (X, X, X), {"attn_mask": MASK.expand(5, 4, 4)}),
    "key_padding_mask of 1 dimension": ({}, (X, X, X), {"key_padding_mask": torch.zeros(4, dtype=torch.bool)}),
    "key_padding_mask of another batch": ({}, (X, X, X), {"key_padding_mask": torch.zeros(2, 4)}),
    "key_padding_mask of another length": ({}, (X, X, X), {"key_padding_mask": torch.zeros(3, 5)}),
    "key_padding_mask of another length, bias_kv": (
        {"add_bias_kv": True, "add_zero_attn": True},
        (X, X, X),
        {"key_padding_mask": torch.zeros(3, 5)},
    ),
    "unbatched, attn_mask for other heads": ({}, (X[0], X[0], X[0]), {"attn_mask": torch.zeros(5, 3, 3)}),
    "unbatched, key_padding_mask of 2 dimensions": ({}, (X[0], X[0], X[0]), {"key_padding_mask": torch.zeros(1, 3)}),
    "another dtype": ({}, (X.double(), X.double(), X.double()), {}),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("attention", ["dense", SPARSE])
def test_refused_in_the_parents_words(case: str, attention: str) -> None:
    options, arguments, call = REFUSED[case]
    if attention != "dense" and "add_bias_kv" in options:
        pytest.skip("refused at construction")
    theirs, ours = pair(attention, **options)
    with pytest.raises(Exception) as expected:
        theirs(*arguments, **call)
    for module in (ours, ours.eval()):
        with pytest.raises(expected.type) as found, torch.no_grad():
            module(*arguments, **call)
        assert str(found.value) == str(expected.value)


def test_refused_on_the_parents_fast_path_too() -> None:
    """In eval the parent's fast path lets a hint without a mask pass and ignores it; that would be dense attention."""
    ours = MultiheadAttention(E, H, batch_first=True, attention=SPARSE).eval()
    x = torch.randn(2, 5, E)
    with torch.no_grad(), pytest.raises(RuntimeError, match="Need attn_mask"):
        ours(x, x, x, is_causal=True)


def test_constructor_refuses_as_the_parent() -> None:
    for arguments, error in (((0, 1), ValueError), ((4, 0), ValueError), ((5, 2), AssertionError)):
        with pytest.raises(error) as expected:
            nn.MultiheadAttention(*arguments)
        with pytest.raises(error) as found:
            MultiheadAttention(*arguments)
        assert str(found.value) == str(expected.value)
    with pytest.raises(InputTypeError, match="spec"):
        MultiheadAttention(4, 2, attention=3)
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(UnsupportedError, match="add_zero_attn"):
            MultiheadAttention(4, 2, attention=SPARSE, **options)
        with pytest.raises(UnsupportedError, match="add_zero_attn"):
            MultiheadAttention.from_torch(nn.MultiheadAttention(4, 2, **options), SPARSE)


def test_mismatched_mask_types_warn_as_in_the_parent() -> None:
    _, ours = pair()
    call = {"attn_mask": MASK, "key_padding_mask": torch.zeros(3, 4, dtype=torch.bool)}
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        ours(X, X, X, **call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(X, X, X, attn_mask=MASK, key_padding_mask=torch.zeros(3, 4))


# --- state -----------------------------------------------------------------------------------------------------------

LAYOUTS = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"kdim": 5, "vdim": 7},
    {"kdim": 5, "bias": False, "add_bias_kv": True},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_same_seed_same_state_in_both_directions(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(E, H, **options)
    after = torch.rand(3)
    torch.manual_seed(3)
    ours = MultiheadAttention(E, H, **options)
    assert torch.equal(after, torch.rand(3)), "dense must not draw more than the parent"
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    fresh = nn.MultiheadAttention(E, H, **options)
    fresh.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(nn.MultiheadAttention(E, H, **options).state_dict(), strict=True)
    for name, value in vars(theirs).items():
        if not name.startswith("_") or name == "_qkv_same_embed_dim":
            assert getattr(ours, name) == value
    assert type(ours.out_proj) is type(theirs.out_proj)


@pytest.mark.parametrize("attention", ["dense", SPARSE])
def test_copies_keep_everything(attention: str) -> None:
    _, ours = pair(attention, batch_first=True)
    x = torch.randn(2, 9, E)
    expected = ours(x, x, x)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for a, b in zip(twin(x, x, x), expected, strict=True):
            assert torch.equal(a, b)
        assert twin.attention == ours.attention and repr(twin) == repr(ours)
        assert list(twin._forward_pre_hooks.values()) == [keep_own_forward]


def test_pickles_from_before_this_module_had_a_method() -> None:
    state = pickle.loads(pickle.dumps(MultiheadAttention(E, H)))
    old = MultiheadAttention.__new__(MultiheadAttention)
    attributes = dict(state.__getstate__())
    for name in ("attention", "method_state", "_qkv_same_embed_dim"):
        attributes.pop(name)
    attributes["_forward_pre_hooks"].clear()
    old.__setstate__(attributes)
    assert old.attention == Dense() and old._qkv_same_embed_dim and keep_own_forward in old._forward_pre_hooks.values()
    assert old(X, X, X)[0].shape == X.shape


def test_repr_names_the_method() -> None:
    assert "attention='dense'" in repr(MultiheadAttention(E, H))
    assert "sliding_window" in repr(MultiheadAttention(E, H, attention=SPARSE))


# --- a method with parameters of its own -----------------------------------------------------------------------------

LINFORMER = "linformer:rank=4,max_len=16"


def test_method_parameters_and_checkpoints() -> None:
    theirs, ours = pair(LINFORMER, batch_first=True)
    own = {name: value.clone() for name, value in ours.state_dict().items() if name.startswith("method_state.")}
    assert own, "Linformer has learned projections"
    model = nn.Sequential(nn.Identity(), ours)
    plain = nn.Sequential(nn.Identity(), theirs)
    model.load_state_dict(plain.state_dict(), strict=True)
    for name, value in own.items():
        assert torch.equal(ours.state_dict()[name], value), "kept as initialised"
    other = nn.Sequential(nn.Identity(), MultiheadAttention(E, H, batch_first=True, attention=LINFORMER))
    other.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 9, E)
    assert torch.equal(other[1](x, x, x)[0], ours(x, x, x)[0])
    checkpoint = model.state_dict()
    del checkpoint["1." + next(iter(own))]
    if len(own) > 1:
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict(checkpoint, strict=True)
    for dense in (plain, nn.Sequential(nn.Identity(), MultiheadAttention(E, H, batch_first=True))):
        with pytest.raises(RuntimeError, match="Unexpected key"):
            dense.load_state_dict(model.state_dict(), strict=True)


def test_loading_by_assignment_keeps_method_parameters() -> None:
    theirs, ours = pair(LINFORMER)
    before = dict(ours.method_state.named_parameters())
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    assert dict(ours.method_state.named_parameters()).keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in ours.method_state.named_parameters())


def test_float_padding_that_the_encoder_makes_is_taken_as_bool() -> None:
    _, ours = pair("nystrom:landmarks=4", batch_first=True)
    x = torch.randn(2, 12, E)
    padding = torch.arange(12) >= torch.tensor([[12], [9]])
    floats = torch.zeros(2, 12).masked_fill(padding, -torch.inf)
    assert_close(
        ours(x, x, x, key_padding_mask=floats, need_weights=False)[0],
        ours(x, x, x, key_padding_mask=padding, need_weights=False)[0],
    )
    with pytest.raises(UnsupportedError, match="float"):
        ours(x, x, x, key_padding_mask=floats + 0.5, need_weights=False)


# --- nested tensors --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("attention", ["dense", SPARSE])
def test_nested_tensors(layout: torch.layout, attention: str) -> None:
    _, ours = pair(attention, batch_first=True)
    sequences = [torch.randn(n, E, requires_grad=True) for n in (3, 7, 5)]
    nested = torch.nested.as_nested_tensor(sequences, layout=layout)
    output, weights = ours(nested, nested, nested)
    assert output.is_nested and output.layout is layout and weights.shape == (3, 7, 7)
    assert (output + nested).is_nested, "adds up with its input, as a residual connection wants"
    expected = [ours(x, x, x)[0] for x in sequences]
    for found, wanted in zip(output.unbind(), expected, strict=True):
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(sum(part.square().sum() for part in output.unbind()), sequences)
    for found, wanted in zip(
        gradients, torch.autograd.grad(sum(e.square().sum() for e in expected), sequences), strict=True
    ):
        assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    keys = torch.nested.as_nested_tensor([torch.randn(n, E) for n in (2, 2, 6)], layout=layout)
    crossed = ours(nested, keys, keys, need_weights=False)[0]
    for query, key, found in zip(sequences, keys.unbind(), crossed.unbind(), strict=True):
        assert_close(found, ours(query, key, key)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_that_cannot_be_served_say_why() -> None:
    nested = torch.nested.as_nested_tensor([torch.randn(3, E), torch.randn(2, E)], layout=torch.jagged)
    other = torch.nested.as_nested_tensor([torch.randn(3, E), torch.randn(4, E)], layout=torch.jagged)
    _, ours = pair(batch_first=True)
    with pytest.raises(UnsupportedError, match="enable_nested_tensor"):
        ours(nested, nested, nested, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="together"):
        ours(torch.randn(2, 3, E), nested, nested)
    with pytest.raises(UnsupportedError, match="batch_first"):
        MultiheadAttention(E, H)(nested, nested, nested)
    with pytest.raises(InputError, match="as many values as keys"):
        ours(nested, nested, other)


# --- in other people's tools -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["dense", SPARSE])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_without_graph_breaks(attention: str, training: bool) -> None:
    torch._dynamo.reset()
    _, ours = pair(attention, batch_first=True)
    ours.train(training)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, E)
    mask, padding = torch.rand(9, 9) < 0.3, torch.zeros(2, 9, dtype=torch.bool)
    mask.fill_diagonal_(False)
    for call in (
        {"need_weights": False},
        {"need_weights": False, "attn_mask": causal_mask(9), "is_causal": True},
        {"attn_mask": mask, "key_padding_mask": padding},
    ):
        results = []
        for module in (ours, compiled):
            leaf = x.clone().requires_grad_()
            output = module(leaf, leaf, leaf, **call)[0]
            results.append((output, *torch.autograd.grad(output.square().sum(), [leaf, ours.in_proj_weight])))
        for found, wanted in zip(results[1], results[0], strict=True):
            assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_autocast() -> None:
    for options in ({}, {"add_bias_kv": True, "add_zero_attn": True}):
        theirs, ours = pair(batch_first=True, **options)
        x = torch.randn(2, 6, E)
        for call in ({}, {"need_weights": False}, {"attn_mask": causal_mask(6)}):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                expected, found = (module(x, x, x, **call) for module in (theirs, ours))
            assert found[0].dtype == expected[0].dtype == torch.bfloat16
            assert_close(found[0], expected[0], rtol=5e-2, atol=5e-2)
            if found[1] is not None:
                assert found[1].dtype == expected[1].dtype
                assert_close(found[1], expected[1], rtol=5e-2, atol=5e-2)


def test_vmap_over_models_inputs() -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(4, 2, 6, E)
    found, expected = (
        torch.vmap(lambda x, module=module: module(x, x, x, need_weights=False)[0])(x) for module in (ours, theirs)
    )
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


class Net(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(E), attention

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        output, _ = self.attention(y, y, y, need_weights=False)
        return x + output


class Overriding(torch.Tensor):
    """A tensor class that watches every torch function."""

    calls: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Bare(torch.Tensor):
    """A tensor class that overrides nothing."""


def test_tensor_classes() -> None:
    theirs, ours = pair(batch_first=True)
    sparse = MultiheadAttention.from_torch(theirs, SPARSE)
    x = torch.randn(2, 6, E)
    watched = x.as_subclass(Overriding)
    Overriding.calls.clear()
    output = ours(watched, watched, watched)[0]
    assert torch.nn.functional.multi_head_attention_forward in Overriding.calls
    assert_close(output.as_subclass(Tensor), theirs(x, x, x)[0])
    with pytest.raises(UnsupportedError, match="Overriding"):
        sparse(watched, watched, watched)
    bare = x.as_subclass(Bare)
    assert_close(sparse(bare, bare, bare)[0].as_subclass(Tensor), sparse(x, x, x)[0])
    with torch.device("cpu"):  # a mode is no override
        assert torch.equal(sparse(x, x, x)[0], sparse(x, x, x)[0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_what_only_the_parent_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair(batch_first=True)
    sparse = MultiheadAttention.from_torch(theirs, SPARSE)
    x = torch.randn(2, 6, E)
    traced = torch.jit.trace(Net(ours), x)
    assert_close(traced(x), Net(theirs)(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedError, match="trace"):
        torch.jit.trace(Net(sparse), x)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert torch.equal(ours(x, x, x)[0], theirs(x, x, x)[0])
    with pytest.raises(UnsupportedError, match="ONNX"):
        sparse(x, x, x)
    monkeypatch.undo()
    wide = MultiheadAttention(300, 1)
    y = torch.randn(3, 2, 300)
    assert torch.equal(wide(y, y, y)[0], wide.to_torch()(y, y, y)[0])
    with pytest.raises(UnsupportedError, match="head_dim=300"):
        MultiheadAttention(300, 1, attention=SPARSE)(y, y, y)
    everything = MultiheadAttention(E, H, dropout=1.0)
    assert_close(everything(X, X, X, need_weights=False)[0], everything.out_proj.bias.expand_as(X))


def test_fx_records_one_call_as_for_modules_of_torch_nn() -> None:
    model = Net(MultiheadAttention(E, H, batch_first=True, attention=SPARSE))
    graph = torch.fx.symbolic_trace(model)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert calls == ["norm", "attention"] and isinstance(graph.get_submodule("attention"), nn.MultiheadAttention)
    x = torch.randn(2, 6, E)
    assert torch.equal(graph(x), model(x))
    with pytest.raises(UnsupportedError, match="contains it"):
        torch.fx.symbolic_trace(model.attention)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript() -> None:
    model = Net(MultiheadAttention(E, H, batch_first=True))
    x = torch.randn(2, 6, E)
    assert_close(torch.jit.script(model)(x), model(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedError, match="TorchScript"):
        torch.jit.script(Net(MultiheadAttention(E, H, attention=SPARSE)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation_leaves_out_proj_alone() -> None:
    model = nn.Sequential(nn.Linear(E, E), MultiheadAttention(E, H))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(quantised[0]) is not nn.Linear
    assert type(quantised[1].out_proj) is type(nn.MultiheadAttention(E, H).out_proj)
    x = torch.randn(4, 2, E)
    assert torch.equal(quantised[1](x, x, x)[0], model[1](x, x, x)[0])


def test_wrapping_policies_know_us() -> None:
    wrap = pytest.importorskip("torch.distributed.fsdp.wrap")
    leaves = tuple(wrap.size_based_auto_wrap_policy.FORCE_LEAF_MODULES)
    assert isinstance(MultiheadAttention(E, H), leaves)


def test_lora_merges_into_the_weights_we_read() -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Identity(), MultiheadAttention(E, H, batch_first=True))
    x = torch.randn(2, 5, E)
    before = model[1](x, x, x)[0]
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["1"], init_lora_weights=False))
    assert not torch.allclose(tuned.base_model.model[1](x, x, x)[0], before)


def test_parameters_are_read_at_every_call() -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(2, 5, E)
    ours(x, x, x)
    for module in (theirs, ours):
        delattr(module, "in_proj_weight")  # what LoRA does: a merged tensor in the parameter's place
        module.in_proj_weight = torch.full((3 * E, E), 0.1)
    assert_close(ours(x, x, x)[0], theirs(x, x, x)[0], rtol=1e-5, atol=1e-6)


def test_forward_hooks_fire() -> None:
    _, ours = pair()
    seen: list[str] = []
    ours.register_forward_pre_hook(lambda *_: seen.append("before"))
    handle = ours.register_forward_hook(lambda *_: seen.append("after"))
    ours.register_full_backward_hook(lambda *_: seen.append("backward"))
    x = X.clone().requires_grad_()
    ours(x, x, x)[0].sum().backward()
    handle.remove()
    ours(X, X, X)
    assert seen == ["before", "after", "backward", "before"]


def test_double_backward() -> None:
    for need_weights in (True, False):
        _, ours = pair(dtype=torch.float64)
        x = torch.randn(3, 2, E, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(
            lambda x, ours=ours, need=need_weights: ours(x, x, x, need_weights=need)[0], x, atol=1e-4
        )


# --- from_torch, to_torch, replace_attention -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*LAYOUTS, {"batch_first": True, "dropout": 0.1, "dtype": torch.float64}], ids=str)
def test_from_torch_and_back(options: dict[str, Any]) -> None:
    theirs, _ = pair(**options)
    theirs.eval().note = "kept"
    ours = MultiheadAttention.from_torch(theirs, "dense" if "add_bias_kv" in options else SPARSE)
    back = ours.to_torch()
    assert type(back) is nn.MultiheadAttention and repr(back) == repr(theirs)
    for module in (ours, back):
        assert (
            not module.training and module.note == "kept" and module.state_dict().keys() == theirs.state_dict().keys()
        )
        for (name, a), (other, b) in zip(module.named_parameters(), theirs.named_parameters(), strict=True):
            assert name == other and a is b
    assert not back._forward_pre_hooks and not theirs._forward_pre_hooks and "attention" not in vars(back)
    assert vars(back).keys() == vars(theirs).keys()


def test_to_torch_leaves_method_parameters_behind() -> None:
    ours = MultiheadAttention(E, H, attention=LINFORMER)
    back = ours.to_torch()
    assert back.state_dict().keys() == nn.MultiheadAttention(E, H).state_dict().keys()
    assert ours.method_state is not None


def make_model() -> nn.Module:
    model = nn.Transformer(E, H, 2, 2, 16, dropout=0.0, batch_first=True)
    model.extra = nn.ModuleDict({"a": nn.MultiheadAttention(E, H, kdim=5, dtype=torch.float64).eval()})
    model.shared = model.decoder.layers[0].multihead_attn
    return model


def test_replace_attention_swaps_in_place_and_keeps_what_is_there() -> None:
    model = make_model()
    attentions = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.MultiheadAttention)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    order = list(dict(model.named_modules()))
    calls: list[str] = []
    handle = model.extra["a"].register_forward_hook(lambda *_: calls.append("a"))
    replaced = replace_attention(model, SPARSE)
    assert replaced == attentions and len(replaced) == 8
    for name, old in replaced.items():
        new = model.get_submodule(name)
        assert type(new) is MultiheadAttention and str(new.attention) == str(
            MultiheadAttention(E, H, attention=SPARSE).attention
        )
        assert new.training == old.training and type(old) is nn.MultiheadAttention
    assert model.shared is model.decoder.layers[0].multihead_attn
    assert list(dict(model.named_modules())) == order
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == parameters.keys() and all(after[name] is parameters[name] for name in parameters)
    new, old = model.extra["a"], replaced["extra.a"]
    x, y = torch.randn(4, 2, E, dtype=torch.float64), torch.randn(4, 2, 5, dtype=torch.float64)
    z = torch.randn(4, 2, E, dtype=torch.float64)
    new(x, y, z)
    assert calls == ["a"]
    handle.remove()
    new(x, y, z)
    assert calls == ["a"], "the handle acts on the module that is in the model now"
    assert not old._forward_pre_hooks and len(old._forward_hooks) == 1


def test_replace_attention_again_and_back() -> None:
    model = make_model()
    x = torch.randn(2, 9, E)
    before = model(x, x)
    replace_attention(model, SPARSE)
    assert replace_attention(model, SPARSE) == {}, "nothing left to replace"
    sparse = model(x, x)
    assert not torch.allclose(before, sparse, atol=1e-4)
    swapped = replace_attention(model, "dense")
    assert all(type(m) is MultiheadAttention for m in swapped.values())
    assert_close(model(x, x), before, rtol=1e-5, atol=1e-5)
    for name, module in swapped.items():
        model.set_submodule(name, module)
    assert_close(model(x, x), sparse, rtol=1e-5, atol=1e-5)


def test_replace_attention_with_parameters_of_a_method() -> None:
    model = make_model().eval()
    replace_attention(model, LINFORMER, predicate=lambda name, module: name.startswith("encoder"))
    new = model.encoder.layers[0].self_attn
    assert new.method_state is not None and not any(m.training for m in new.modules())
    assert type(model.decoder.layers[0].self_attn) is nn.MultiheadAttention
    double = nn.Sequential(nn.MultiheadAttention(E, H, dtype=torch.float64))
    replace_attention(double, LINFORMER)
    assert {p.dtype for p in double.parameters()} == {torch.float64}


class Subclass(nn.MultiheadAttention):
    pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_replace_attention_refuses_what_would_lose_something() -> None:
    for stranger in (Subclass(E, H), torch.ao.nn.quantizable.MultiheadAttention(E, H)):
        model = nn.Sequential(nn.MultiheadAttention(E, H), stranger)
        with pytest.raises(UnsupportedError, match=type(stranger).__name__):
            replace_attention(model, SPARSE)
        assert type(model[0]) is nn.MultiheadAttention, "all or nothing"
        assert list(replace_attention(model, SPARSE, predicate=lambda name, module: name == "0")) == ["0"]
        with pytest.raises(UnsupportedError, match="plain"):
            MultiheadAttention.from_torch(stranger)
    with pytest.raises(InputError, match="from_torch"):
        replace_attention(nn.MultiheadAttention(E, H), SPARSE)


def test_quantizable_takes_to_torch() -> None:
    ours = MultiheadAttention(E, H)
    plain = ours.to_torch()
    plain.qconfig = torch.ao.quantization.default_qconfig
    quantizable = torch.ao.nn.quantizable.MultiheadAttention.from_float(plain)
    assert_close(quantizable(X, X, X)[0], ours(X, X, X)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("need_weights", "average"), itertools.product([True, False], repeat=2))
def test_weights_of_a_sparse_method_are_its_own(need_weights: bool, average: bool) -> None:
    _, ours = pair(SPARSE, batch_first=True)
    x = torch.randn(2, 9, E)
    output, weights = ours(x, x, x, need_weights=need_weights, average_attn_weights=average)
    far = (torch.arange(9)[:, None] - torch.arange(9)).abs() > 2
    as_mask = MultiheadAttention.from_torch(ours.to_torch())
    expected = as_mask(x, x, x, attn_mask=far, need_weights=need_weights, average_attn_weights=average)
    assert_close(output, expected[0], rtol=1e-5, atol=1e-6)
    if need_weights:
        assert (weights[..., far] == 0).all()
        assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)
