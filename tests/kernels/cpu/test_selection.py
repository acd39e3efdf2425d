"""Native lists of buckets are those of `sorted_lists`, entry by entry."""

import pytest
import torch

from efficient_attn.backends.cpu import selection
from efficient_attn.patterns import LSH, SortedBuckets
from efficient_attn.patterns.sorted_tokens import sorted_lists


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 1), (63, 130), (200, 257), (257, 64)])
@pytest.mark.parametrize("offset", [None, 0, 7, -60])
def test_lists_are_those_of_the_reference(key_heads: int, q_len: int, kv_len: int, offset: int | None) -> None:
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, q_len, 16, generator=rng)
    key = torch.randn(2, key_heads, kv_len, 16, generator=rng)
    hidden = torch.rand(2, kv_len, generator=rng) > 0.3
    patterns = [LSH(n_buckets=6, rounds=3)] + [SortedBuckets(size=50, rounds=2)] * (offset is None)
    for pattern in patterns:
        for key_mask in (None, hidden, torch.zeros_like(hidden)):
            found = pattern.buckets(query, key, key_mask)
            assert selection.serves(found)
            for r in range(pattern.rounds):
                orders = found.orders(r)
                for others in (False, True):
                    wanted = sorted_lists(found, r, *orders, offset=offset, others=others)
                    part = selection.sorted_part(found, r, offset=offset, others=others)
                    for name in ("indptr", "indices", "tile_ids", "tiles"):
                        torch.testing.assert_close(getattr(part.mask, name), getattr(wanted, name), rtol=0, atol=0)
                    for made, order in zip(part[1:], orders, strict=True):
                        assert made is not None and torch.equal(made, order.flatten(0, 1).int())
