"""MultiheadAttention against its parent: the same numbers, gradients and errors."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from typing import Any

import pytest
import torch
from support.multihead import SPARSE, E, H, causal_mask, pair
from torch import Tensor, nn
from torch.testing import assert_close

from efficient_attn.errors import InputError, InputTypeError, UnsupportedError
from efficient_attn.multihead import MultiheadAttention
from efficient_attn.multihead.projections import split_heads

TIGHT = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}


# --- the same numbers ---


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


@pytest.mark.parametrize(("need_weights", "average"), [*itertools.product([True, False], repeat=2)])
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


# --- dropout ---


def test_dropout_shows_in_the_weights_and_matches_the_output() -> None:
    _, ours = pair(batch_first=True, dropout=0.4)
    x = torch.randn(2, 40, E)
    output, weights = ours(x, x, x, average_attn_weights=False)
    assert 0.3 < (weights == 0).float().mean() < 0.5
    value = split_heads(ours, nn.functional.linear(x, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :]))
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


# --- the causal hint ---


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


# --- what the parent refuses ---

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


# --- nested tensors ---


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
    for lengths in ((2, 2, 6), (7, 2, 6)) if attention == SPARSE else ():
        keys = torch.nested.as_nested_tensor([torch.randn(n, E) for n in lengths], layout=layout)
        with pytest.raises(InputError, match="goes by positions"):
            ours(nested, keys, keys, need_weights=False)
    _, ours = pair(f"{SPARSE},alignment=top_left" if attention == SPARSE else attention, batch_first=True)
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


@pytest.mark.parametrize("finite", [False, True], ids=["padding alone", "numbers too"])
@pytest.mark.parametrize(
    "attention", ["longformer:window=4,global_tokens=1", "bigbird:block=16,window=1,random_blocks=0"]
)
def test_float_padding_on_the_left_is_padding(attention: str, finite: bool) -> None:
    """As nn.TransformerEncoder writes a bool mask; positions count from the first real token all the same."""
    torch.manual_seed(0)
    module = MultiheadAttention(16, 2, attention=attention, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    padded = torch.arange(40) < torch.tensor([[25], [0]])
    added = torch.randn(2, 40, dtype=torch.float64) if finite else torch.zeros(2, 40, dtype=torch.float64)
    mask = added.masked_fill(padded, -torch.inf).requires_grad_(finite)
    out = module(x, x, x, key_padding_mask=mask, need_weights=False)[0]
    alone = x[:1, 25:]
    expected = module(alone, alone, alone, key_padding_mask=added[:1, 25:], need_weights=False)[0]
    torch.testing.assert_close(out[:1, 25:], expected)
    if finite:
        (gradient,) = torch.autograd.grad(out[0, 25:].square().sum(), mask)
        assert gradient.isfinite().all() and (gradient[0, 25:] != 0).any() and not gradient[0, :25].any()
    else:
        hidden = module(x, x, x, key_padding_mask=padded, need_weights=False)[0]
        torch.testing.assert_close(out, hidden)
    compiled = torch.compile(lambda m: module(x, x, x, key_padding_mask=m, need_weights=False)[0], backend="eager")
    torch.testing.assert_close(compiled(mask), out)
