"""`tau_max`: no row drops more of its softmax mass, whatever the inputs, by the exact certificate."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from efficient_attn import InputError, SlidingWindow, TopKBlocks, TopPBlocks, UnsupportedError, attention, parse
from efficient_attn.insight import certificate, growth

D, BLOCK = 16, 16


def gaussian(B, N, generator):
    return tuple(torch.randn(B, 2, N, D, generator=generator) for _ in range(2))


def clustered(B, N, generator):
    """Keys of a block are alike, and queries look at one block: what a bound can see."""
    centres = 2.5 * torch.randn(B, 2, N // BLOCK, 1, D, generator=generator)
    key = (centres + 0.1 * torch.randn(B, 2, N // BLOCK, BLOCK, D, generator=generator)).flatten(2, 3)
    return key, key


def needle(B, N, generator):
    """One key of an otherwise uninteresting block has all the mass: what means do not see."""
    query, key = gaussian(B, N, generator)
    key = 0.1 * key
    key[:, :, N // 2 + 3] = 12.0 * torch.nn.functional.normalize(query[:, :, 1], dim=-1)
    return query * 4, key


def opposed(B, N, generator):
    """Keys that cancel in the mean: +v and -v, of every size."""
    query, key = gaussian(B, N, generator)
    key[:, :, 1::2] = -key[:, :, ::2]
    return query * 5, key * torch.logspace(-2, 1, N)[:, None]


def drifting(B, N, generator):
    query, key = gaussian(B, N, generator)
    return query * 0.3, key.cumsum(2) * 0.3


INPUTS = {f.__name__: f for f in (gaussian, clustered, needle, opposed, drifting)}
PATTERNS = [
    TopKBlocks(block=BLOCK, blocks=1, sink=0, local=1),
    TopKBlocks(block=BLOCK, fraction=0.25, summary="minmax", queries="first"),
    TopPBlocks(block=BLOCK, mass=0.5),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("inputs", INPUTS)
def test_no_row_drops_more(inputs, pattern, causal):
    """30 cases of some 7,000 rows, 220,000 in all, none of which may violate the bound."""
    generator = torch.Generator().manual_seed(0)
    for N, tau_max in ((96, 0.01), (96, 0.1), (75, 0.3)):
        query, key = (x[:, :, :N] for x in INPUTS[inputs](14, 96, generator))
        grown = dataclasses.replace(pattern, tau_max=tau_max)
        found = certificate(query, key, key, mask=grown, is_causal=causal)
        assert float(found.tau.max()) <= tau_max * (1 + 1e-4)


def test_it_adds_what_is_needed_and_no_more():
    generator = torch.Generator().manual_seed(1)
    query, key = clustered(2, 256, generator)
    pattern = TopKBlocks(block=BLOCK, blocks=1, sink=0, tau_max=0.05)
    found = growth(pattern, query, key)
    assert found.density < 0.9 and found.dense < 0.5
    loose, tight = (growth(dataclasses.replace(pattern, tau_max=t), query, key).density for t in (0.5, 0.001))
    assert loose <= found.density <= tight
    query, key = gaussian(2, 256, generator)
    nothing = growth(dataclasses.replace(pattern, tau_max=0.001), query * 3, key)
    assert nothing.dense == 1.0 and nothing.density == 1.0 and nothing.grown == 1.0
    dense = attention(query, key, key, mask=dataclasses.replace(pattern, tau_max=1e-9))
    torch.testing.assert_close(dense, attention(query, key, key))


@pytest.mark.parametrize("heads", [(4, 2), (4, 1)])
def test_groups_padding_other_lengths_and_scales(heads):
    generator = torch.Generator().manual_seed(2)
    query = 2 * torch.randn(3, heads[0], 50, D, generator=generator)
    key = torch.randn(3, heads[1], 90, D, generator=generator)
    there = torch.ones(3, 90, dtype=torch.bool)
    there[0, 70:] = there[1, :20] = there[2, ::3] = False
    key = key.masked_fill(~there[:, None, :, None], torch.nan)
    for scale in (None, 1.0, -0.5):
        pattern = TopKBlocks(block=BLOCK, blocks=1, sink=0, tau_max=0.2)
        found = certificate(query, key, key, mask=pattern, key_mask=there, scale=scale)
        assert float(found.tau.max()) <= 0.2 * (1 + 1e-4) and found.out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_and_what_is_not_finite(dtype):
    generator = torch.Generator().manual_seed(3)
    query, key = (x.to(dtype) for x in needle(2, 96, generator))
    pattern = TopKBlocks(block=BLOCK, blocks=1, tau_max=0.05)
    assert float(certificate(query, key, key, mask=pattern).tau.max()) <= 0.05 * 1.02
    query[0, 0, 20] = torch.inf
    assert growth(pattern, query, key).dense > 0  # what is no number has no bound: all is kept
    single = attention(query[:, :, :1], key[:, :, :1], key[:, :, :1], mask=pattern)
    assert single.shape == (2, 2, 1, D)


def test_a_bias_and_wrong_values_are_refused_and_the_spec_holds_it():
    query = torch.randn(1, 2, 64, D)
    pattern = parse("topp_blocks:block=16,tau_max=0.1")
    assert parse(str(pattern)) == pattern and pattern.pattern.tau_max == 0.1
    bias = torch.zeros(1, 2, 64, 64)
    for mask in (pattern.pattern, pattern, pattern.pattern & SlidingWindow()):
        with pytest.raises(UnsupportedError, match="bias"):
            attention(query, query, query, mask=mask, bias=bias)
        with pytest.raises(UnsupportedError, match="softcap"):
            attention(query, query, query, mask=mask, softcap=5.0)
    for modifier in ({"bias": bias}, {"softcap": 5.0}):
        with pytest.raises(UnsupportedError, match="tau_max"):
            pattern.attend(query, query, query, **modifier)
    with pytest.raises(InputError, match="tau_max"):
        TopKBlocks(tau_max=0.0)
    with pytest.raises(InputError, match="tau_max"):
        growth(SlidingWindow(), query, query)
