"""Statistics of what every method applies, each against the matrix that the method itself returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from efficient_attn import InputError, RelativeBias, UnsupportedError, parse
from efficient_attn.insight import method_statistics
from efficient_attn.insight.methods import LINEAR_WANT
from efficient_attn.insight.statistics import WANT
from efficient_attn.methods import Sparse

N, D, BLOCK = 75, 8, 20
SPECS = (
    "dense", "causal", "sliding_window:left=9,right=4", "dilated:left=3,right=3,dilation=4", "strided:stride=7",
    "fixed:stride=8,summary=2", "longformer:window=8,global_tokens=2", "bigbird:block=16",
    "neighborhood:axes=1,kernel=5", "axial:size=5x15", "prefix_lm:prefix=9", "documents:lengths=25",
    "topk_blocks:block=16,blocks=2",
    "topp_blocks:block=16,mass=0.6", "lsh:n_buckets=4", "lsh:n_buckets=4,shared_qk=true", "sorted_buckets:size=16",
    "per_head(strided:stride=7; sliding_window:left=3,right=3)",
    "linformer:rank=8,max_len=75", "nystrom:landmarks=8", "performer:features=16", "linear",
    "sliding_window:left=9,right=4+nystrom:landmarks=8", "sliding_window:left=9,right=4+performer:features=16",
    "topk_blocks:block=16,blocks=2+centroid",
)  # fmt: skip


def definition(W: torch.Tensor, sets: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    cells = (
        torch.nn.functional.pad(W, (0, -N % BLOCK, 0, -N % BLOCK)).unflatten(2, (-1, BLOCK)).unflatten(4, (-1, BLOCK))
    )
    gap = (torch.arange(N)[:, None] - torch.arange(N)).abs()
    return {
        "received": W.sum(2), "received_weighted": torch.einsum("bhqk,rbhq->rbhk", W, rows), "map": cells.sum((3, 5)),
        "entropy": -torch.xlogy(W.clamp(min=0), W.clamp(min=0)).sum(-1), "distance": (W * gap).sum(-1),
        "top_weights": W.topk(3).values, "nearby": (W * (gap <= 6)).sum(-1),
        **{name: (W * members).sum(-1) for name, members in sets.items()},
    }  # fmt: skip


def call_of(spec: str, how: str) -> tuple[Any, Any, dict[str, Any]]:
    """The method, its state and what is passed beside query and key."""
    torch.manual_seed(1)
    method = parse(spec)
    state = method.build(2 * D, 2, D) if how == "grouped" else method.build(4 * D, 4, D)
    padding = torch.arange(N) < torch.tensor([[N], [60]])
    return method, state, {
        "plain": {}, "grouped": {}, "padded": {"key_mask": padding}, "causal": {"is_causal": True},
        "modified": {"softcap": 2.0, "sinks": torch.randn(4), "bias": RelativeBias(torch.randn(4, 9))},
    }[how]  # fmt: skip


@pytest.mark.parametrize("how", ["plain", "grouped", "padded", "causal", "modified"])
@pytest.mark.parametrize("spec", SPECS)
def test_every_statistic_of_every_method(spec: str, how: str) -> None:
    method, state, arguments = call_of(spec, how)
    query, key = torch.randn(2, 4, N, D), torch.randn(2, 2 if how == "grouped" else 4, N, D)
    options = {
        "key_sets": {"first": torch.arange(N) < 2, "odd": torch.arange(N) % 2 == 1},
        "row_weights": torch.rand(1, 2, 4, N), "map_block": BLOCK,
    }  # fmt: skip
    try:
        _, W = method.attend(query, key, key, state=state, need_weights=True, **arguments)
    except (UnsupportedError, InputError) as refused:  # then the statistics refuse it too, for the same reason
        with pytest.raises(type(refused)) as found:
            method_statistics(method, query, key, state=state, **arguments, **options)
        assert how in ("modified", "causal", "grouped") and str(found.value) == str(refused)
        return
    sparse = isinstance(method, Sparse)
    more = {"top_k": 3, "nearby": 6} if sparse else {}
    found = method_statistics(method, query, key, state=state, **arguments, **options, **more)
    right = definition(W.detach(), options["key_sets"], options["row_weights"])
    for name, expected in right.items():
        got = found.shares[name] if name in options["key_sets"] else getattr(found, name)
        if not sparse and name in ("entropy", "distance", "top_weights", "nearby"):
            assert got is None, name
            continue
        scale = 1.0 if sparse else float(W.detach().abs().sum((2, 3)).max()) / N  # low-rank weights may cancel
        torch.testing.assert_close(
            got, expected, rtol=1e-4, atol=2e-5 * max(scale, 1.0), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "spec", ["linformer:rank=8,max_len=75", "nystrom:landmarks=8", "linear", "sliding_window+centroid"]
)
def test_single_weights_of_low_rank_methods_are_refused(spec: str) -> None:
    method, state, _ = call_of(spec, "plain")
    query = torch.randn(1, 4, N, D)
    for name in sorted(set(WANT) - set(LINEAR_WANT)):
        with pytest.raises(UnsupportedError, match=rf"{name}.* need the weights of .* one by one; \['received', 'map'"):
            method_statistics(method, query, query, state=state, want=("received", name))
    with pytest.raises(InputError, match="want must be"):
        method_statistics(method, query, query, state=state, want=("recieved",))
    nothing = method_statistics(method, query, query, state=state, want=())
    assert nothing.received is None and nothing.shares is None and nothing.map is None
