"""Soft cap, sinks and position biases of the module: what they compute, what keeps them, and who refuses them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficient_attn import (
    ALiBi,
    LowRankBias,
    MultiheadAttention,
    PositionBias,
    RelativeBias,
    T5Bias,
    convert,
    replace_attention,
)
from efficient_attn.errors import InputError, InputTypeError, UnsupportedError

E, H, N, L = 12, 4, 2, 9


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bias_of(kind: str, alignment: str | None = None) -> Any:
    return {
        "alibi": lambda: ALiBi(drawn(H).abs(), alignment),
        "relative": lambda: RelativeBias(drawn(H, 7), alignment),
        "t5": lambda: T5Bias(drawn(8, H), max_distance=6, alignment=alignment),
        "low_rank": lambda: LowRankBias(drawn(L, 3), drawn(L, 3, seed=1)),
    }[kind]()


MODIFIERS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    **{kind: {"bias": kind} for kind in ("alibi", "relative", "t5", "low_rank")},
    "all": {"softcap": 0.7, "sinks": True, "bias": "t5"},
}


def made(name: str, *, alignment: str | None = None, attention: str = "dense", **options: Any) -> MultiheadAttention:
    """A module in float64 whose sinks and biases are not 0."""
    given = dict(MODIFIERS[name])
    kind = given.pop("bias", None)
    torch.manual_seed(5)
    options = {"batch_first": True, "dtype": torch.float64} | options
    module = MultiheadAttention(
        E, H, attention=attention, position_bias=None if kind is None else bias_of(kind, alignment), **given, **options
    )
    if module.sinks is not None:
        nn.init.normal_(module.sinks)
    return module


def added(bias: Any, Nq: int, Nk: int, offset: int) -> Tensor:
    """The bias (H, Nq, Nk), pair by pair."""
    if isinstance(bias, LowRankBias):
        return (bias.u @ bias.w.T).expand(H, Nq, Nk)
    d = torch.arange(Nk) - torch.arange(Nq)[:, None] - offset
    if isinstance(bias, ALiBi):
        return -bias.slopes[:, None, None] * d.abs()
    if isinstance(bias, RelativeBias):
        reach = bias.table.shape[1] // 2
        return bias.table[:, d.clamp(-reach, reach) + reach]
    return bias.table[bias.bucket(d)].permute(2, 0, 1)


def definition(module: MultiheadAttention, x: Tensor, y: Tensor, hidden: Any = None, offset: int = 0) -> Any:
    """Output and weights of every head; hidden: bool (L, S) or (N, 1, L, S)."""
    w, b = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = (
        nn.functional.linear(t, *p).unflatten(-1, (H, -1)).transpose(1, 2)
        for t, *p in zip((x, y, y), w, b, strict=True)
    )
    s = q @ k.mT / (E // H) ** 0.5
    if module.softcap is not None:
        s = module.softcap * torch.tanh(s / module.softcap)
    if module.position_bias is not None:
        s = s + added(module.position_bias(), x.shape[1], y.shape[1], offset)
    if hidden is not None:
        s = s.masked_fill(hidden, -torch.inf)
    if module.sinks is not None:
        s = torch.cat([s, module.sinks[:, None, None].expand(*s.shape[:3], 1)], -1)
    weights = torch.softmax(s, -1)[..., : y.shape[1]]
    return module.out_proj((weights @ v).transpose(1, 2).flatten(2)), weights


def check(module: MultiheadAttention, x: Tensor, y: Tensor, hidden: Any = None, offset: int = 0, **call: Any) -> None:
    """Outputs, weights and every gradient."""
    expected, exact = definition(module, x, y, hidden, offset)
    leaves = [p for p in module.parameters() if p.requires_grad]
    grad, weight_grad = drawn(*expected.shape, seed=8), drawn(*exact.shape, seed=9)
    wanted = torch.autograd.grad(expected, leaves, grad, retain_graph=True)
    out, none = module(x, y, y, need_weights=False, **call)
    assert none is None
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, grad), wanted)
    out, weights = module(x, y, y, average_attn_weights=False, **call)
    torch.testing.assert_close((out, weights), (expected, exact))
    found = torch.autograd.grad((out, weights), leaves, (grad, weight_grad), allow_unused=True)
    wanted = torch.autograd.grad((expected, exact), leaves, (grad, weight_grad))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(module(x, y, y, **call)[1], exact.mean(1))
    with torch.no_grad():
        torch.testing.assert_close(module(x, y, y, need_weights=False, **call)[0], expected)


@pytest.mark.parametrize("name", MODIFIERS)
def test_self_attention_and_its_gradients(name: str) -> None:
    x = drawn(N, L, E, seed=1)
    check(made(name), x, x)


@pytest.mark.parametrize("name", MODIFIERS)
def test_masks_of_every_kind(name: str) -> None:
    x, module = drawn(N, L, E, seed=1), made(name)
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    check(module, x, x, causal, attn_mask=causal, is_causal=True)
    padding = torch.arange(L) >= torch.tensor([[L], [6]])
    check(module, x, x, causal | padding[:, None, None], attn_mask=causal, key_padding_mask=padding)
    left = torch.arange(L) < torch.tensor([[0], [3]])
    check(module, x, x, left[:, None, None], key_padding_mask=left)


@pytest.mark.parametrize(("alignment", "offset"), [("top_left", 0), ("bottom_right", 5 - L)])
@pytest.mark.parametrize("name", [name for name in MODIFIERS if name != "low_rank"])
def test_cross_attention(name: str, alignment: str, offset: int) -> None:
    check(made(name, alignment=alignment), drawn(N, L, E, seed=1), drawn(N, 5, E, seed=2), offset=offset)


def test_cross_attention_says_where_queries_stand() -> None:
    module, x, y = made("t5"), drawn(N, L, E), drawn(N, 5, E)
    with pytest.raises(InputError, match="ambiguous"):
        module(x, y, y)
    made("softcap")(x, y, y)


@pytest.mark.parametrize("spec", ["sliding_window:left=3,right=0", "longformer:window=2,global_tokens=1"])
@pytest.mark.parametrize("name", [name for name in MODIFIERS if name != "low_rank"])
def test_sparse_methods(name: str, spec: str) -> None:
    """Also padded on the left, where Longformer's first token is the first real one."""
    x, module = drawn(N, L, E, seed=1), made(name, attention=spec)
    shown = module.attention.block_mask(L, L).to_dense()
    check(module, x, x, ~shown)
    left = torch.arange(L) < torch.tensor([[0], [4]])
    alone = module(x[1:, 4:], x[1:, 4:], x[1:, 4:], need_weights=False)[0]
    out = module(x, x, x, key_padding_mask=left, need_weights=False)[0]
    torch.testing.assert_close(out[1:, 4:], alone)


def test_what_stands_at_absolute_places_is_not_turned() -> None:
    module, x = made("low_rank", attention="longformer:window=2,global_tokens=1"), drawn(N, L, E)
    with pytest.raises(UnsupportedError, match="absolute positions"):
        module(x, x, x, key_padding_mask=torch.arange(L) < torch.tensor([[0], [4]]))


@pytest.mark.parametrize("name", MODIFIERS)
@pytest.mark.parametrize("spec", ["linformer", "nystrom", "performer", "linear", "sliding_window+performer"])
def test_methods_without_them_refuse(name: str, spec: str) -> None:
    with pytest.raises(UnsupportedError, match="cannot be served by attention="):
        made(name, attention=spec)
    module = made(name)
    for call in (
        lambda: MultiheadAttention.from_torch(module, spec),
        lambda: replace_attention(nn.ModuleDict({"a": module}), spec),
        lambda: convert(nn.ModuleDict({"a": module}), spec),
    ):
        with pytest.raises(UnsupportedError, match="cannot be served by attention="):
            call()


@pytest.mark.parametrize("name", MODIFIERS)
def test_other_methods_keep_them(name: str) -> None:
    x, module = drawn(N, L, E), made(name)
    expected = module(x, x, x)[0]
    model = nn.ModuleDict({"a": module})
    replace_attention(model, f"sliding_window:left={L},right={L}")
    torch.testing.assert_close(model["a"](x, x, x)[0], expected)
    assert model["a"].sinks is module.sinks and model["a"].position_bias is module.position_bias
    replace_attention(model, "sliding_window:left=1,right=0")
    assert not torch.allclose(model["a"](x, x, x)[0], expected)


@pytest.mark.parametrize("name", MODIFIERS)
def test_saved_copied_and_read_again(name: str) -> None:
    x, module = drawn(N, L, E), made(name)
    expected = module(x, x, x)[0]
    torch.testing.assert_close(copy.deepcopy(module)(x, x, x)[0], expected)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x, x, x)[0], expected)
    other = made(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x, x, x)[0], expected)
    names = set(module.state_dict()) - set(nn.MultiheadAttention(E, H).state_dict())
    assert all(found == "sinks" or found.startswith("position_bias.") for found in names)
    if "sinks" in MODIFIERS[name]:
        with pytest.raises(RuntimeError, match="sinks"):
            other.load_state_dict(nn.MultiheadAttention(E, H).state_dict())


def test_plain_modules_have_none_of_it() -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(E, H)
    assert set(module.state_dict()) == set(nn.MultiheadAttention(E, H).state_dict())
    assert (module.softcap, module.sinks, module.position_bias) == (None, None, None)
    state = module.__getstate__()  # as pickled before there were any
    state = {k: v for k, v in state.items() if k not in ("softcap", "position_bias")}
    state["_parameters"] = {k: v for k, v in state["_parameters"].items() if k != "sinks"}
    old = MultiheadAttention.__new__(MultiheadAttention)
    old.__setstate__(state)
    assert (old.softcap, old.sinks, old.position_bias) == (None, None, None)
    plain = module.to_torch()
    assert not {"softcap", "sinks", "position_bias"} & (set(vars(plain)) | set(plain._parameters))


@pytest.mark.parametrize("name", MODIFIERS)
def test_pytorchs_own_module_does_not_stand_in(name: str) -> None:
    module, x = made(name), drawn(N, L, E)
    with pytest.raises(UnsupportedError, match=r"torch\.nn\.MultiheadAttention"):
        module.to_torch()
    with pytest.raises(UnsupportedError, match="jit"):
        torch.jit.trace(lambda x: module(x, x, x)[0], x)


def test_one_bias_for_several_layers() -> None:
    shared = PositionBias(bias_of("t5"))
    layers = nn.ModuleList(MultiheadAttention(E, H, position_bias=shared, dtype=torch.float64) for _ in range(3))
    assert sum(p is shared.table for p in layers.parameters()) == 1
    copied = copy.deepcopy(layers)
    assert copied[0].position_bias is copied[2].position_bias is not shared
    x = drawn(L, N, E)
    for layer in layers:
        x = layer(x, x, x, need_weights=False)[0]
    x.sum().backward()
    assert shared.table.grad is not None and bool(shared.table.grad.any())


def test_what_is_learned() -> None:
    assert not list(PositionBias(bias_of("alibi")).parameters())
    assert "slopes" in PositionBias(bias_of("alibi")).state_dict()
    assert [name for name, _ in PositionBias(bias_of("alibi"), learned=True).named_parameters()] == ["slopes"]
    assert not list(PositionBias(bias_of("t5"), learned=False).parameters())
    table = nn.Parameter(torch.zeros(8, H))
    assert PositionBias(T5Bias(table)).table is table
    module = MultiheadAttention(E, H, position_bias=T5Bias(torch.zeros(8, H)), dtype=torch.float64)
    assert module.position_bias.table.dtype == torch.float64
    with pytest.raises(InputTypeError, match="PositionBias takes"):
        PositionBias(torch.zeros(3))


@pytest.mark.parametrize("name", ["alibi", "t5", "all"])
def test_nested_sequences(name: str) -> None:
    module = made(name)
    rows = [drawn(n, E, seed=n) for n in (3, L, 1)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    for row, out in zip(rows, module(nested, nested, nested, need_weights=False)[0].unbind(), strict=True):
        torch.testing.assert_close(out, module(row[None], row[None], row[None])[0][0])
    others = torch.nested.nested_tensor([drawn(n, E) for n in (4, 2, 5)], layout=torch.jagged)
    for alignment in (None, "bottom_right"):
        with pytest.raises(InputError, match="top_left"):
            made(name, alignment=alignment)(nested, others, others)
    placed = made(name, alignment="top_left")
    found = placed(nested, others, others, need_weights=False)[0].unbind()
    for q, k, out in zip(rows, others.unbind(), found, strict=True):
        torch.testing.assert_close(out, placed(q[None], k[None], k[None])[0][0])


@pytest.mark.parametrize("name", ["softcap", "sinks", "alibi"])
def test_keys_that_are_appended(name: str) -> None:
    for option in ("add_bias_kv", "add_zero_attn"):
        if name == "alibi":
            with pytest.raises(UnsupportedError, match="positions of keys"):
                made(name, **{option: True})
        else:
            x = drawn(N, L, E)
            assert made(name, **{option: True})(x, x, x)[1].shape == (N, L, L + 1)


@pytest.mark.parametrize("name", MODIFIERS)
def test_compiled(name: str) -> None:
    x, module = drawn(N, L, E), made(name)
    leaves = [p for p in module.parameters() if p.requires_grad]
    compiled = torch.compile(lambda x: module(x, x, x, need_weights=False)[0], fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(module(x, x, x)[0].sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), leaves), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    module, x = made("all"), drawn(N, L, E)
    expected = module(x, x, x)[0]
    half = copy.deepcopy(module).to(dtype)
    assert half.sinks.dtype == dtype and half.position_bias.table.dtype == dtype
    torch.testing.assert_close(half(*[x.to(dtype)] * 3)[0].double(), expected, rtol=0.1, atol=0.1)
    single = copy.deepcopy(module).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = single(*[x.float()] * 3)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=0.1, atol=0.1)


def test_shapes_without_values() -> None:
    with torch.device("meta"):
        module = MultiheadAttention(E, H, softcap=2.0, sinks=True, position_bias=T5Bias(torch.zeros(8, H)))
        x = torch.zeros(L, N, E)
        assert module(x, x, x)[0].shape == (L, N, E)
    assert module.sinks.is_meta and module.position_bias.table.is_meta


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("nan"), float("inf")])
def test_a_softcap_that_is_none(softcap: float) -> None:
    with pytest.raises(InputError, match="softcap"):
        MultiheadAttention(E, H, softcap=softcap)


def test_a_bias_for_other_heads() -> None:
    module, x = MultiheadAttention(E, H, position_bias=T5Bias(torch.zeros(8, H + 1))), drawn(L, N, E).float()
    with pytest.raises(InputError, match="heads"):
        module(x, x, x)
