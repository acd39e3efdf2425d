"""The state of MultiheadAttention: the parent's, in both directions, and the parameters of a method beside it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.multihead import LAYOUTS, SPARSE, E, H, pair
from torch import nn

from efficient_attn.multihead import MultiheadAttention, keep_own_forward

X = torch.randn(4, 3, E)


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
    assert old.attention.is_dense and old._qkv_same_embed_dim and keep_own_forward in old._forward_pre_hooks.values()
    assert old(X, X, X)[0].shape == X.shape


def test_repr_names_the_method() -> None:
    assert "attention='dense'" in repr(MultiheadAttention(E, H))
    assert "sliding_window" in repr(MultiheadAttention(E, H, attention=SPARSE))


# --- a method with parameters ---

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
