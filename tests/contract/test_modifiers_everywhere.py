"""Every way into attention with everything that is done to scores: served as the definition says, or refused by name.

What a way neither serves nor refuses would be silently ignored: what `WAYS` does not list as served must raise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_attn import (
    ALiBi,
    DecomposedBias2D,
    KVCache,
    LowRankBias,
    MultiheadAttention,
    PagedKVCache,
    RelativeBias,
    RelativeBias2D,
    T5Bias,
    attention,
    attention_varlen,
    attention_weights,
    branch_share,
    explain,
    merge_attention,
    parse,
)
from efficient_attn.cache import cached_attention, paged_attention
from efficient_attn.compat import flash_attn, xformers
from efficient_attn.errors import EfficientAttnError
from efficient_attn.functional import attention_with_weights, padded_attention
from efficient_attn.insight import attention_statistics, certificate, observe
from efficient_attn.insight.methods import method_statistics

GRID, N, H, D = (3, 4), 12, 2, 8
SEEN = torch.ones(1, N, dtype=torch.bool)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = (drawn(1, H, N, D, seed=s) for s in range(3))
TABLE, SLOPES, SINKS = drawn(H, 2 * N - 1, seed=3), drawn(H, seed=4).abs(), drawn(H, seed=5)
U, W = drawn(N, 3, seed=6), drawn(N, 3, seed=7)
T5, GRID_TABLE = T5Bias(drawn(8, H, seed=8), max_distance=9), drawn(35, H, seed=9)
REL_H, REL_W = drawn(5, D, seed=10), drawn(7, D, seed=11)

MODIFIERS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": SINKS},
    "alibi": {"bias": ALiBi(SLOPES)},
    "relative": {"bias": RelativeBias(TABLE)},
    "t5": {"bias": T5},
    "low rank": {"bias": LowRankBias(U, W)},
    "grid": {"bias": RelativeBias2D(GRID_TABLE, GRID)},
    "decomposed": {"bias": DecomposedBias2D(REL_H, REL_W, GRID)},
    "sinks of queries": {"sinks": drawn(H, N, seed=12)},
}
BY_DISTANCE = ("alibi", "relative", "t5")
EVERY = tuple(MODIFIERS)
OF_KERNELS = tuple(name for name in MODIFIERS if name != "sinks of queries")


def scores(name: str, q: Tensor = Q, k: Tensor = K) -> Tensor:
    """What the softmax is taken of, (1, H, N, N), and the sink's column behind."""
    s = q @ k.mT / D**0.5
    i, j = torch.arange(N)[:, None], torch.arange(N)
    (h, w), d = GRID, j - i
    if name == "softcap":
        return 1.5 * torch.tanh(s / 1.5)
    if name == "sinks":
        return torch.cat([s, SINKS[:, None, None].expand(1, H, N, 1)], -1)
    if name == "sinks of queries":
        return torch.cat([s, MODIFIERS[name]["sinks"].expand(1, H, N)[..., None]], -1)
    if name == "decomposed":
        return s + sum(
            (q @ rel.T).gather(3, apart.expand(1, H, N, N))
            for rel, apart in ((REL_H, i // w - j // w + h - 1), (REL_W, i % w - j % w + w - 1))
        )
    added = {
        "alibi": -SLOPES[:, None, None] * d.abs(),
        "relative": TABLE[:, d + N - 1],
        "t5": T5.table[T5.bucket(d)].permute(2, 0, 1),
        "low rank": U @ W.T,
        "grid": GRID_TABLE[(i // w - j // w + h - 1) * (2 * w - 1) + i % w - j % w + w - 1].permute(2, 0, 1),
    }
    return s + added[name]


def expected(name: str) -> Tensor:
    return torch.softmax(scores(name), -1)[..., :N] @ V


def by_method(spec: str, **more: Any) -> Callable[..., Tensor]:
    method = parse(spec)
    state = method.build(H * D, H, D, dtype=torch.float64)
    return lambda **modifier: method.attend(Q, K, V, state=state, **more, **modifier)[0]


def in_halves(**modifier: Any) -> Tensor:
    """Two halves of the keys, joined; a sink stands beside one of them."""
    first = attention(Q, K[:, :, :6], V[:, :, :6], return_lse=True, **modifier)
    modifier.pop("sinks", None)
    second = attention(Q, K[:, :, 6:], V[:, :, 6:], return_lse=True, **modifier)
    return merge_attention(*zip(first, second, strict=True))[0]


def by_pages(**modifier: Any) -> Tensor:
    pages = [x.transpose(1, 2).reshape(3, 4, H, D) for x in (K, V)]
    return paged_attention(Q, *pages, torch.tensor([[0, 1, 2]]), [N], is_causal=False, **modifier)


def by_paged_cache(**modifier: Any) -> Tensor:
    cache = PagedKVCache(4, 4, num_kv_heads=H, head_dim=D, dtype=torch.float64)
    return cache.attend([cache.add()], Q, K, V, is_causal=False, **modifier)


def packed(**modifier: Any) -> Tensor:
    rows = (x[0].transpose(0, 1) for x in (Q, K, V))
    return attention_varlen(*rows, (0, N), **modifier).transpose(0, 1)[None]


def by_flash(**modifier: Any) -> Tensor:
    """flash-attn's own names."""
    bias = modifier.pop("bias", None)
    named = {"alibi_slopes": bias.slopes} if isinstance(bias, ALiBi) else {} if bias is None else {"bias": bias}
    out = flash_attn.flash_attn_func(*(x.transpose(1, 2) for x in (Q, K, V)), **named, **modifier)
    return out.transpose(1, 2)


def by_xformers(**modifier: Any) -> Tensor:
    bias = modifier.pop("bias", None)
    rows = (x.transpose(1, 2) for x in (Q, K, V))
    return xformers.memory_efficient_attention(*rows, attn_bias=bias, **modifier).transpose(1, 2)


def in_module(**modifier: Any) -> Tensor:
    """A module whose projections are the identity, of one head's width each."""
    modifier["position_bias"] = modifier.pop("bias", None)
    sinks = modifier.pop("sinks", None)
    if sinks is not None and sinks.dim() > 1:
        raise TypeError("a module has sinks of heads, and no argument for others")
    module = MultiheadAttention(
        H * D, H, bias=False, batch_first=True, sinks=sinks is not None, dtype=torch.float64, **modifier
    )
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(H * D, dtype=torch.float64).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(H * D))
        if sinks is not None:
            module.sinks.copy_(sinks)
    q, k, v = (x.transpose(1, 2).flatten(2) for x in (Q, K, V))
    return module(q, k, v, need_weights=False)[0].unflatten(2, (H, D)).transpose(1, 2)


def traced(**modifier: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(lambda q: attention(q, K, V, **modifier), Q)(Q)


WAYS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "attention": (lambda **m: attention(Q, K, V, **m), EVERY),
    "attention, reference": (lambda **m: attention(Q, K, V, backend="reference", **m), EVERY),
    "attention_weights": (lambda **m: attention_weights(Q, K, **m) @ V, EVERY),
    "attention_with_weights": (lambda **m: attention_with_weights(Q, K, V, **m)[0], EVERY),
    "padded_attention": (lambda **m: padded_attention(Q, K, V, SEEN, **m), EVERY),
    "merge_attention": (in_halves, ("softcap", "sinks", "sinks of queries")),
    "attention_varlen": (packed, EVERY),
    "cached_attention": (lambda **m: cached_attention(Q, K, V, [N], is_causal=False, **m),
                         ("softcap", "sinks", *BY_DISTANCE)),
    "paged_attention": (by_pages, ("softcap", "sinks", *BY_DISTANCE)),
    "KVCache": (lambda **m: KVCache().attend(Q, K, V, is_causal=False, **m), ("softcap", "sinks", *BY_DISTANCE)),
    "PagedKVCache": (by_paged_cache, ("softcap", "sinks", *BY_DISTANCE)),
    "MultiheadAttention": (in_module, OF_KERNELS),
    "dense": (by_method("dense"), EVERY),
    "dense, padded": (by_method("dense", key_mask=SEEN), EVERY),
    "dense, with weights": (by_method("dense", need_weights=True), EVERY),
    "a window": (by_method("sliding_window:left=20,right=20"), EVERY),
    "longformer": (by_method("longformer:window=30,global_tokens=1", key_mask=SEEN), EVERY),
    "topk_blocks": (by_method("topk_blocks:block=16,blocks=4"), EVERY),
    "flash-attn": (by_flash, ("softcap", "alibi")),
    "xformers": (by_xformers, ()),
    "linformer": (by_method("linformer"), ()),
    "nystrom": (by_method("nystrom"), ()),
    "performer": (by_method("performer"), ()),
    "linear": (by_method("linear"), ()),
    "a hybrid of nystrom": (by_method("sliding_window:left=2,right=2+nystrom"), ()),
    "a hybrid of performer": (by_method("sliding_window:left=2,right=2+performer"), ()),
    "a hybrid of centroids": (by_method("sliding_window:left=2,right=2+centroid"), ()),
    "branch_share": (lambda **m: branch_share(Q, K, method="sliding_window+centroid", **m), ()),
    "torch.jit.trace": (traced, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", MODIFIERS)
@pytest.mark.parametrize("way", WAYS)
def test_served_or_refused_by_name(way: str, name: str) -> None:
    call, served = WAYS[way]
    if name in served:
        torch.testing.assert_close(call(**MODIFIERS[name]), expected(name), rtol=1e-9, atol=1e-9)
    else:
        with pytest.raises((EfficientAttnError, TypeError)) as error:
            call(**MODIFIERS[name])
        assert str(error.value)


@pytest.mark.parametrize("name", MODIFIERS)
def test_explain_knows_who_serves(name: str) -> None:
    assert explain(Q, K, V, **MODIFIERS[name]).backend == "cpu"


def test_what_looks_at_weights_takes_sinks_of_heads() -> None:
    modifier = MODIFIERS["sinks of queries"]
    with pytest.raises(EfficientAttnError, match="sinks must be"):
        attention_statistics(Q, K, V, want=("received",), **modifier)
    with pytest.raises(EfficientAttnError, match=r"out \* sigmoid\(x\)"):
        method_statistics(parse("dense"), Q, K, V, want=("received",), **modifier)
    lost = certificate(Q, K, V, mask=torch.ones(N, N, dtype=torch.bool).tril(), **modifier)  # which goes by lse
    torch.testing.assert_close(lost.dense, expected("sinks of queries"))
    weights = torch.softmax(scores("sinks of queries"), -1)[..., :N]
    torch.testing.assert_close(lost.tau, weights.triu(1).sum(-1))


@pytest.mark.parametrize("name", OF_KERNELS)
def test_what_looks_at_weights(name: str) -> None:
    """Statistics, of a method and of a model too, and certificates: of the weights that the definition has."""
    modifier = MODIFIERS[name]
    weights = torch.softmax(scores(name), -1)[..., :N]
    found = attention_statistics(Q, K, V, want=("received",), **modifier).received
    torch.testing.assert_close(found, weights.sum(2), rtol=1e-5, atol=1e-6)
    found = method_statistics(parse("dense"), Q, K, V, want=("received",), **modifier).received
    torch.testing.assert_close(found, weights.sum(2), rtol=1e-5, atol=1e-6)
    lost = certificate(Q, K, V, mask=torch.ones(N, N, dtype=torch.bool).tril(), **modifier)
    torch.testing.assert_close(lost.dense, expected(name))
    torch.testing.assert_close(lost.tau, weights.triu(1).sum(-1))
    with observe(torch.nn.Identity(), want=("received",)) as seen:
        parse("dense").attend(Q, K, V, **modifier)
    torch.testing.assert_close(seen.layers[0].statistics.received, weights.sum(2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_caches_of_different_lengths(name: str) -> None:
    """Each sequence as alone, decode and prefill, and slopes of each."""
    bias = MODIFIERS[name]["bias"]
    q, k, v = (drawn(2, H, n, D, seed=s) for s, n in enumerate((3, N, N)))
    for Nq in (1, 3):
        out = cached_attention(q[:, :, :Nq], k, v, [N, 7], bias=bias)
        for b, end in enumerate((N, 7)):
            alone = attention(
                q[b : b + 1, :, :Nq], k[b : b + 1, :, :end], v[b : b + 1, :, :end], bias=bias, is_causal=True,
                causal_alignment="bottom_right",
            )  # fmt: skip
            torch.testing.assert_close(out[b : b + 1], alone)
    slopes = drawn(2, H, seed=20).abs()
    out = cached_attention(q, k, v, [N, 7], bias=ALiBi(slopes))
    for b, end in enumerate((N, 7)):
        torch.testing.assert_close(
            out[b : b + 1], cached_attention(*(x[b : b + 1] for x in (q, k, v)), [end], bias=ALiBi(slopes[b]))
        )


@pytest.mark.parametrize("name", ["softcap", "sinks", *BY_DISTANCE])
def test_packed_sequences(name: str) -> None:
    modifier, starts = MODIFIERS[name], (0, 5, 5, N)
    rows = [x[0].transpose(0, 1) for x in (Q, K, V)]
    out = attention_varlen(*rows, starts, is_causal=True, **modifier)
    for a, b in ((0, 5), (5, N)):
        alone = attention(*(x[:, :, a:b] for x in (Q, K, V)), is_causal=True, **modifier)[0]
        torch.testing.assert_close(out[a:b].transpose(0, 1), alone)
    if name in BY_DISTANCE:
        with pytest.raises(EfficientAttnError, match="as many queries as keys"):
            attention_varlen(*rows, starts, (0, 4, 6, N), **modifier)
    else:
        attention_varlen(*rows, starts, (0, 4, 6, N), **modifier)
