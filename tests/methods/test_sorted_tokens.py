"""Buckets on sorted tokens are the same attention as their mask in the order of the sequence, by whatever call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from efficient_attn import attention
from efficient_attn.methods.spec import parse

SPECS = (
    "lsh:n_buckets=8,rounds=3",
    "lsh:n_buckets=8,rounds=2,shared_qk=true,chunk=16",
    "sorted_buckets:size=32,rounds=2",
)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("batch, heads, kv_heads, tokens", [(2, 4, 2, 100), (1, 2, 2, 130)])
def test_sorted_tokens_and_the_mask_agree(spec: str, batch: int, heads: int, kv_heads: int, tokens: int) -> None:
    method, shared = parse(spec), "shared" in spec
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, heads if shared else kv_heads, heads if shared else kv_heads)
    leaves = [
        torch.randn(batch, h, tokens, 8, generator=generator, dtype=torch.float64).requires_grad_() for h in sizes
    ]
    padding = (torch.arange(tokens) < tokens - 9).expand(batch, tokens)
    calls: list[dict[str, Any]] = [{}, {"key_mask": padding}]
    calls += [] if shared else [{"dropout_p": 0.2, "dropout_seed": 3}]  # alone, a token's own weight is never dropped
    calls += [{"is_causal": True}] if method.accepts_causal else []
    for call in calls:
        out, weights = method.attend(*leaves, need_weights=True, **call)
        pairs = torch.zeros(tokens, tokens, dtype=torch.float64)
        in_order = method.attend(*leaves, bias=pairs, **call)[0]  # a bias keeps tokens where they are
        found = method.attend(*leaves, **call)[0]
        torch.testing.assert_close(found, out)
        torch.testing.assert_close(found, in_order)
        torch.testing.assert_close(weights @ leaves[2].repeat_interleave(heads // sizes[2], 1), out)
        for ours, expected in zip(
            *(torch.autograd.grad(o.square().sum(), leaves, allow_unused=True) for o in (found, in_order)), strict=True
        ):
            assert (ours is None) == (expected is None)
            if ours is not None:
                torch.testing.assert_close(ours, expected)


def test_the_mask_of_a_pattern_of_buckets_drops_the_same_pairs() -> None:
    method = parse("lsh:n_buckets=4,rounds=2")
    query, key, value = torch.randn(3, 1, 2, 90, 8, generator=torch.Generator().manual_seed(0))
    found = method.attend(query, key, value, dropout_p=0.3, dropout_seed=7)[0]
    expected = attention(query, key, value, mask=method.pattern, dropout_p=0.3, dropout_seed=7)
    torch.testing.assert_close(found, expected)
