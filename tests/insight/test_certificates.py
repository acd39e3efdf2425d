"""Certificates of sparse masks against the n x n definition."""

from __future__ import annotations

import math

import pytest
import torch
from support.certify import certify

from efficient_attn import (
    ALiBi,
    BigBird,
    BlockMask,
    InputError,
    SlidingWindow,
    TopKBlocks,
    UnsupportedError,
    attention,
    attention_weights,
    parse,
)
from efficient_attn.insight import certificate, sampled_certificate


def definition(query, key, value, shown, visible, scale):
    groups = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(groups, 1) for t in (key, value))
    scores = (query.double() @ key.mT * scale).masked_fill(~visible, -torch.inf)
    P = torch.softmax(scores, -1).nan_to_num(0.0)
    tau = (P * ~shown).sum(-1)
    kept = torch.softmax(scores.masked_fill(~shown, -torch.inf), -1).nan_to_num(0.0)
    return tau, (P @ value - kept @ value).norm(dim=-1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["window", "bigbird", "bits", "all", "none", "topk"])
def test_mass_and_error_are_exact(mask: str, causal: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 150, 16), torch.randn(2, 2, 150, 16), torch.randn(2, 2, 150, 8)
    padding = torch.arange(150) < torch.tensor([[150], [90]])
    masks = {
        "window": SlidingWindow(left=9, right=4), "bigbird": BigBird(block=16), "bits": torch.rand(150, 150) < 0.3,
        "all": BlockMask(150, 150), "none": torch.zeros(150, 150, dtype=torch.bool), "topk": TopKBlocks(block=16),
    }  # fmt: skip
    found = certificate(query, key, value, mask=masks[mask], key_mask=padding, is_causal=causal)
    visible = padding[:, None, None, :] & (
        torch.ones(150, 150, dtype=torch.bool).tril() if causal else torch.tensor(True)
    )
    visible = visible.expand(2, 4, 150, 150)
    plain = attention(query, key, value, mask=visible)
    torch.testing.assert_close(found.dense, plain, rtol=1e-4, atol=1e-5)
    if mask == "topk":  # which blocks it takes is its own affair: what it gives is what is certified
        torch.testing.assert_close(found.error, (plain - found.out).norm(dim=-1), rtol=1e-4, atol=1e-5)
        return
    given = masks[mask]
    shown = (
        given
        if isinstance(given, torch.Tensor)
        else (given if isinstance(given, BlockMask) else given.block_mask(150, 150, num_heads=4)).to_dense()
    )
    tau, error = definition(query, key, value, shown & visible, visible, 16**-0.5)
    torch.testing.assert_close(found.tau.double(), tau, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.error.double(), error, rtol=1e-3, atol=1e-5)
    assert found.relative_error == pytest.approx(float(error.norm() / plain.double().norm()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("modified", ["softcap", "sinks", "alibi", "softcap sinks alibi"])
def test_mass_and_error_beside_what_is_done_to_scores(modified: str) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 60, 16), torch.randn(2, 2, 60, 16), torch.randn(2, 2, 60, 8)
    given = {
        "softcap": 1.5 if "softcap" in modified else None,
        "sinks": torch.randn(4) if "sinks" in modified else None,
        "bias": ALiBi(torch.rand(4) / 8) if "alibi" in modified else None,
        "is_causal": True,
    }
    shown = torch.rand(60, 60) < 0.3
    found = certificate(query, key, value, mask=shown, **given)
    dense, kept = attention(query, key, value, **given), attention(query, key, value, mask=shown, **given)
    torch.testing.assert_close(found.dense, dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.out, kept)
    torch.testing.assert_close(found.error, (dense - kept).norm(dim=-1), rtol=1e-3, atol=1e-5)
    P = attention_weights(query, key, **given)
    torch.testing.assert_close(found.tau, (P * ~shown).sum(-1), rtol=1e-4, atol=1e-6)
    if "alibi" in modified:
        with pytest.raises(UnsupportedError, match="where they stand"):
            sampled_certificate(query, key, mask=shown, **given)
    else:
        del given["bias"]
        interval = sampled_certificate(query, key, mask=shown, **given, samples=400)
        assert interval.low <= float(found.tau.mean()) <= interval.high


def test_a_mass_far_below_a_float_of_one_is_still_known() -> None:
    query = torch.full((1, 1, 1, 1), 40.0)
    key = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    found = certificate(query, key, key, mask=torch.tensor([[False, True]]), scale=1.0)
    assert float(found.tau) == pytest.approx(math.exp(-40), rel=1e-4)


def test_a_sparse_method_is_a_mask_too() -> None:
    x = torch.randn(1, 2, 64, 8)
    a, b = (
        certificate(x, x, x, mask=m) for m in (parse("sliding_window:left=3,right=3"), SlidingWindow(left=3, right=3))
    )
    assert torch.equal(a.tau, b.tau)


def test_a_sampled_interval_holds_the_mean() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 301, 16) * 2, torch.randn(2, 2, 301, 16)
    mask = SlidingWindow(left=60, right=60)
    right = float(certificate(query, key, key, mask=mask, is_causal=True).tau.mean())
    missed = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        found = sampled_certificate(query, key, mask=mask, is_causal=True, samples=40, generator=generator)
        assert 0 <= found.low <= found.mean <= found.high <= 1
        missed += not found.low <= right <= found.high
    assert missed <= 3
    wide = sampled_certificate(query, key, mask=mask, is_causal=True, samples=10)
    near = sampled_certificate(query, key, mask=mask, is_causal=True, samples=400)
    assert near.high - near.low < wide.high - wide.low and near.rows == 1600


def test_refusals() -> None:
    x = torch.randn(1, 1, 8, 4)
    with pytest.raises(InputError, match="about a mask"):
        certificate(x, x, x, mask=None)
    with pytest.raises(InputError, match="samples"):
        sampled_certificate(x, x, mask=BlockMask(8, 8), samples=1)
    with pytest.raises(InputError, match="no row"):
        sampled_certificate(x[:, :, :0], x, mask=BlockMask(0, 8))


def test_no_bound_is_broken_by_random_and_adversarial_inputs() -> None:
    """2,000 of them; `make certify` tries 100,000."""
    counts = certify(2_000, seed=3)
    assert counts.inputs >= 2_000 and counts.rows > 60_000
    assert not counts.violated(), counts
