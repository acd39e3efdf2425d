"""Tensors that have shapes and no values, meta and fake ones: a call gives the right shape or one of our errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from efficient_attn import BlockMask, MultiheadAttention, attention, explain
from efficient_attn.errors import EfficientAttnError, UnsupportedError
from efficient_attn.methods import METHODS, parse
from efficient_attn.patterns import PATTERNS, SlidingWindow

SPECS = [
    *(name for name in METHODS if name != "hybrid"),
    "nystrom:landmarks=4,conv=3",
    "linformer:init=normal,share=none",
    "bigbird:block=16 & causal",
    "sliding_window:left=4,right=4+performer:features=16,block=16",
    "bigbird:block=16+centroid:block=16",
    "sliding_window:left=4,right=4+nystrom:landmarks=4,block=16",
]
VALUES_NEEDED = ("lsh", "sorted_buckets")  # whose lists are made of what tokens hold
NEVER_CAUSAL = ("sorted_buckets", "linformer", "nystrom")
B, HQ, HKV, N, D = 2, 4, 2, 64, 8


@contextlib.contextmanager
def kind_of(kind: str) -> Iterator[str]:
    """The device to make tensors on, and what is around."""
    if kind == "fake":
        with FakeTensorMode():
            yield "cpu"
    elif kind == "meta by default":
        with torch.device("meta"):
            yield "meta"
    else:
        yield kind


KINDS = ["meta", "fake", "meta by default"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS)
def test_every_method_gives_shapes(spec: str, kind: str) -> None:
    method = parse(spec)
    refused = spec in VALUES_NEEDED
    for causal, padded, weights in ((False, True, True), (True, False, False)):
        with kind_of(kind) as device:
            q = torch.randn(B, HQ, N, D, device=device, requires_grad=True)
            k = torch.randn(B, HKV, N, D, device=device)
            v = torch.randn(B, HKV, N, D, device=device)
            key_mask = torch.ones(B, N, dtype=torch.bool, device=device) if padded else None
            state = method.build(HQ * D, HKV, D, device=device)
            call: dict[str, Any] = {"state": state, "key_mask": key_mask, "need_weights": weights, "is_causal": causal}
            if refused or (causal and spec.rpartition("+")[2].startswith(NEVER_CAUSAL)):
                with pytest.raises(UnsupportedError):
                    method.attend(q, k, v, **call)
                continue
            out, drawn = method.attend(q, k, v, dropout_p=0.1, dropout_seed=3, **call)
            assert out.shape == (B, HQ, N, D) and out.device.type == device
            assert drawn is None if not weights else drawn.shape == (B, HQ, N, N)
            (gradient,) = torch.autograd.grad(out.sum(), q)
            assert gradient.shape == q.shape and gradient.device.type == device


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("spec", SPECS)
def test_every_module_gives_shapes(spec: str, kind: str) -> None:
    for training, padded in ((False, True), (True, False)):
        with kind_of(kind) as device:
            module = MultiheadAttention(32, 4, dropout=0.1, batch_first=True, attention=spec, device=device)
            x = torch.randn(B, N, 32, device=device)
            padding = torch.zeros(B, N, dtype=torch.bool, device=device) if padded else None
            with pytest.raises(UnsupportedError) if spec in VALUES_NEEDED else contextlib.nullcontext():
                out, weights = module.train(training)(x, x, x, padding, need_weights=padded)
                assert out.shape == x.shape and out.device.type == device
                assert weights is None if not padded else weights.shape == (B, N, N)


@pytest.mark.parametrize("name", sorted(set(PATTERNS) - set(VALUES_NEEDED)))
def test_operations_of_patterns_can_be_planned_on_meta(name: str) -> None:
    counts = []
    for device in ("meta", "cpu"):
        x = torch.randn(B, HQ, 24 * 24, D, device=device)
        with FlopCounterMode(display=False) as counter:
            parse(name).attend(x, x, x)
        counts.append(counter.get_flop_counts()["Global"][torch.ops.efficient_attn.attention_forward])
    assert counts[0] >= counts[1] > 0, "every listed block counts where values cannot be read"
    if not parse(name).pattern.by_content:
        assert counts[0] <= 1.5 * counts[1]


@pytest.mark.parametrize("spec", [s for s in SPECS if "linformer" not in s and "performer" not in s])
def test_a_default_device_has_no_say_over_real_tensors(spec: str) -> None:
    method = parse(spec)
    torch.manual_seed(0)
    q, k = torch.randn(B, HQ, N, D), torch.randn(B, HKV, N, D)
    key_mask = torch.arange(N) < torch.tensor([N, 40])[:, None]
    state = method.build(HQ * D, HKV, D)
    for causal in (False, True):
        if causal and spec.rpartition("+")[2].startswith(NEVER_CAUSAL):
            continue
        call: dict[str, Any] = {"state": state, "key_mask": key_mask, "is_causal": causal, "need_weights": True}
        wanted = method.attend(q, k, k, dropout_p=0.2, dropout_seed=5, **call)
        with torch.device("meta"):
            found = method.attend(q, k, k, dropout_p=0.2, dropout_seed=5, **call)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_explain_and_density_under_a_default_device(name: str) -> None:
    q = torch.randn(B, HQ, N, D)
    pattern = PATTERNS[name]()
    wanted = explain(q, q, q, mask=pattern, is_causal=pattern.accepts_causal)
    with torch.device("meta"):
        found = explain(q, q, q, mask=pattern, is_causal=pattern.accepts_causal)
        assert found == wanted
        if not pattern.by_content:
            mask = pattern.block_mask(N, N)
            assert 0 < mask.density <= 1 and mask.to_dense().shape[-1] == N and repr(mask)


def test_what_needs_values_says_so() -> None:
    q = torch.randn(B, HQ, N, D, device="meta")
    with pytest.raises(EfficientAttnError, match="values"):
        explain(q, q, q, mask=PATTERNS["bigbird"]())
    mask = PATTERNS["bigbird"](block=16).block_mask(N, N, device="meta")
    with pytest.raises(EfficientAttnError, match="values"):
        _ = mask.density
    assert "BlockMask" in repr(mask)
    assert attention(q, q, q, mask=mask).shape == q.shape
    assert explain(q, q, q, mask=SlidingWindow(left=4, right=4)).density < 0.2
    assert explain(q, q, q, mask=BlockMask(N, N)).density == 1
