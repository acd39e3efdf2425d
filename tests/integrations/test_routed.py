"""Attention modules of other libraries whose one call of scaled_dot_product_attention gets a method.

The classes here stand in for those of timm and open_clip, which need torchvision: the same names, attributes and call.
tests/test_timm.py does this with the libraries themselves (make test-timm), tests/test_diffusers.py with diffusers.
"""

from __future__ import annotations

import copy
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficient_attn import InputError, SlidingWindow, UnsupportedError, attention, convert, parse
from efficient_attn.integrations import routed

WINDOW = "sliding_window:left=2,right=2"


class Attention(nn.Module):
    """As timm's: packed projection, norms of queries and keys, a fused and another path."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.num_heads, self.fused_attn = heads, False
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        else:
            x = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class Pool(Attention):
    """As timm's pooling by attention: one query."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q[:, :, :1], k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Manual(Attention):
    def forward(self, x):
        return x


for cls in (Attention, Pool, Manual):
    cls.__module__ = "timm.layers.attention"


class OpenClip(Attention):
    def __init__(self, scaled_cosine=False):
        super().__init__()
        self.fused_attn = True
        self.logit_scale = nn.Parameter(torch.ones(1)) if scaled_cosine else None


OpenClip.__name__, OpenClip.__module__ = "Attention", "open_clip.transformer"


class Own(Attention):
    """Somebody's own subclass of timm's: what it does differently stays."""

    def forward(self, x):
        return super().forward(x) * 2.0


class Model(nn.Module):
    def __init__(self, attn=Attention):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = attn(), attn()

    def forward(self, x):
        return self.second(x + self.first(x))


X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))


def by_hand(layer, x, **call):
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    out = attention(layer.q_norm(q), layer.k_norm(k), v, **call)
    return layer.proj(out.transpose(1, 2).flatten(2))


def test_the_call_gets_the_method_and_everything_else_stays():
    model = Model()
    names, expected = set(model.state_dict()), model(X)
    report = convert(model, WINDOW, sample=X)
    assert report.converted == dict.fromkeys(
        ("first", "second"), "Attention of timm, its call of scaled_dot_product_attention"
    )
    assert report.dense_error < 1e-5 < report.error and model.first.fused_attn and set(model.state_dict()) == names
    torch.testing.assert_close(model.first(X), by_hand(model.first, X, mask=SlidingWindow(left=2, right=2)))
    model(X).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    report.undo()
    assert torch.equal(model(X), expected) and not model.first.fused_attn
    assert "forward" not in vars(model.first) and not routed.is_routed(model.first)


def test_masks_of_the_call_count():
    model = Model()
    convert(model, WINDOW)
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    expected = by_hand(model.first, X, mask=SlidingWindow(left=2, right=2).block_mask(12, 12).to_dense() & visible)
    torch.testing.assert_close(model.first(X, attn_mask=visible), expected)


def test_one_method_after_another():
    model = Model()
    first = convert(model, WINDOW)
    second = convert(model, "bigbird:block=16", sample=X)
    assert second.dense_error is None and second.error > 1e-3  # it was not dense before
    second.undo()
    assert model.first.efficient_attn_method == parse(WINDOW)
    first.undo()
    assert "forward" not in vars(model.first)


def test_cross_attention_stays_dense():
    model = nn.Sequential(Attention(), Pool())
    expected = by_hand(model[1], model[0](X))
    report = convert(model, WINDOW, sample=X)
    assert list(report.converted) == ["0", "1"]
    assert report.layers["0"].attention > 1e-3 and report.layers["1"].attention is None
    assert expected.shape == (2, 12, 16)
    x = model[0](X)
    q = model[1].qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    out = attention(q[0][:, :, :1], q[1], q[2]).transpose(1, 2).flatten(2)
    torch.testing.assert_close(model[1](x), model[1].proj(out))


def test_parameters_of_a_method_live_in_the_layer():
    model = Model()
    spec = "linformer:rank=4,max_len=16"
    report = convert(model, spec, sample=X)
    added = [name for name, _ in model.named_parameters() if "method_state" in name]
    assert len(added) == 4
    model(X).sum().backward()
    assert all(dict(model.named_parameters())[name].grad.abs().sum() > 0 for name in added)
    report.undo()
    assert not any("method_state" in name for name in model.state_dict())
    convert(model.train(), spec)
    with pytest.raises(UnsupportedError, match="sample="):
        model(X)


def test_subclasses_keep_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(Own())
    report = convert(model, WINDOW)
    torch.testing.assert_close(model(X), 2 * by_hand(model[0], X, mask=SlidingWindow(left=2, right=2)))
    assert report.converted["0"].startswith("Own of timm")


def test_open_clip():
    model = nn.ModuleDict({"plain": OpenClip(), "cosine": OpenClip(scaled_cosine=True)})
    report = convert(model, WINDOW)
    assert list(report.converted) == ["plain"] and "scaled cosine" in report.skipped["cosine"]
    torch.testing.assert_close(model["plain"](X), by_hand(model["plain"], X, mask=SlidingWindow(left=2, right=2)))


def test_a_forward_that_does_not_call_it_raises():
    model = Model(Manual)
    with pytest.raises(UnsupportedError, match="did not call scaled_dot_product_attention"):
        convert(model, WINDOW, sample=X)
    assert not routed.is_routed(model.first)
    report = convert(nn.Sequential(Attention(), Manual()), WINDOW, predicate=lambda name, module: name == "0")
    assert report.skipped == {"1": "left out by predicate"}
    with pytest.raises(InputError, match="left out by predicate"):
        convert(model, WINDOW, predicate=lambda name, module: False)


def test_copies_and_pickles_are_converted_too(monkeypatch):
    for name in ("timm", "timm.layers.attention"):  # where pickle looks for the class
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(Attention=Attention))
    model = Model()
    convert(model, WINDOW)
    expected = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), expected)
        with torch.no_grad():
            other.first.qkv.weight.zero_()
        assert not torch.equal(other(X), expected) and torch.equal(model(X), expected)


def test_a_forward_on_the_instance_stays_in_between():
    model = Model()
    calls = []
    original = model.first.forward
    model.first.forward = lambda x: calls.append(1) or original(x)
    report = convert(model, WINDOW)
    torch.testing.assert_close(model.first(X), by_hand(model.first, X, mask=SlidingWindow(left=2, right=2)))
    assert calls == [1]
    report.undo()
    model(X)
    assert calls == [1, 1]


@pytest.mark.parametrize("spec", ["dense", WINDOW])
def test_torch_compile_in_one_graph(spec):
    model = Model()
    convert(model, spec)
    expected = model(X)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), expected)
