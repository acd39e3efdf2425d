"""What PyTorch offers, callable as ours is, and the papers' formulas as one writes them in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from efficient_attn.masks import BlockMask


def sdpa(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """PyTorch's scaled_dot_product_attention; `mask` is a bool tensor (True = attend) or an additive bias."""
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)


def flex(block_mask: BlockMask) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled FlexAttention under our mask; compiles at its first call. On CPU it has no backward."""
    from torch.nn.attention.flex_attention import flex_attention

    theirs = block_mask.to_flex()
    compiled = torch.compile(flex_attention)
    return lambda query, key, value: compiled(query, key, value, block_mask=theirs)


def torch_module(embed_dim: int, num_heads: int, **options: Any) -> torch.nn.MultiheadAttention:
    """torch.nn.MultiheadAttention with the batch first."""
    return torch.nn.MultiheadAttention(embed_dim, num_heads, batch_first=True, **options)


# The papers' formulas as one writes them in PyTorch, which is what single-method packages run. Equal numbers of heads.


def linformer(query: Tensor, key: Tensor, value: Tensor, E: Tensor, F: Tensor) -> Tensor:
    """softmax(Q (E K)^T) (F V) with its (N, r) weights in memory."""
    mixed_key, mixed_value = (torch.einsum("rn,bhnd->bhrd", m, x) for m, x in ((E, key), (F, value)))
    scores = torch.einsum("bhnd,bhrd->bhnr", query * query.shape[-1] ** -0.5, mixed_key)
    return torch.einsum("bhnr,bhrd->bhnd", scores.softmax(-1), mixed_value)


def nystrom(query: Tensor, key: Tensor, value: Tensor, landmarks: int, iterations: int = 6) -> Tensor:
    """The three softmax matrices of Nystromformer and its iterative pseudo-inverse; N a multiple of `landmarks`."""
    query = query * query.shape[-1] ** -0.5
    near, far = (x.unflatten(2, (landmarks, -1)).mean(3) for x in (query, key))
    outer, middle, inner = ((a @ b.mT).softmax(-1) for a, b in ((query, far), (near, far), (near, key)))
    norms = middle.abs().sum(-2).amax(-1) * middle.abs().sum(-1).amax(-1)
    inverse, one = middle.mT / norms[..., None, None], torch.eye(landmarks, dtype=query.dtype)
    for _ in range(iterations):
        product = middle @ inverse
        inverse = 0.25 * inverse @ (13 * one - product @ (15 * one - product @ (7 * one - product)))
    return (outer @ inverse) @ (inner @ value)


def performer(query: Tensor, key: Tensor, value: Tensor, projection: Tensor) -> Tensor:
    """FAVOR+ with its (N, m) features in memory, stabilised by one maximum a query and one over the keys."""

    def features(x: Tensor, dims: tuple[int, ...]) -> Tensor:
        x = x * x.shape[-1] ** -0.25
        scores = torch.einsum("bhnd,md->bhnm", x, projection)
        top = scores.detach().amax(dims, keepdim=True)
        return torch.exp(scores - x.square().sum(-1, keepdim=True) / 2 - top) + 1e-4

    a, b = features(query, (-1,)), features(key, (-2, -1))
    normaliser = torch.einsum("bhnm,bhm->bhn", a, b.sum(2))
    context = torch.einsum("bhnm,bhnd->bhmd", b, value)
    return torch.einsum("bhmd,bhnm,bhn->bhnd", context, a, 1.0 / normaliser)


def sorted_chunks(query: Tensor, value: Tensor, rotations: Tensor, chunk: int) -> Tensor:
    """Reformer's attention (Kitaev et al. 2020), whose keys are its queries of length 1: in each round tokens are
    sorted by the hash of a random rotation and cut into chunks; a token sees the others of its bucket in its chunk and
    the one before, itself if there are none, and the rounds are joined by their weights. rotations: (rounds, D,
    buckets / 2)."""
    key, outs, sums = torch.nn.functional.normalize(query, dim=-1), [], []
    for rotation in rotations:
        turned = query @ rotation
        bucket = torch.cat([turned, -turned], -1).argmax(-1)
        order = bucket.argsort(dim=-1, stable=True)
        q, k, v = (x.gather(2, order[..., None].expand_as(x)).unflatten(2, (-1, chunk)) for x in (query, key, value))
        own, place = (x.unflatten(2, (-1, chunk)) for x in (bucket.gather(2, order), order))
        k, v, other, at = (torch.cat([x, x.roll(1, 2)], 3) for x in (k, v, own, place))
        scores = (q @ k.mT) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(own[..., None] != other[..., None, :], -torch.inf)
        scores = scores.masked_fill(place[..., None] == at[..., None, :], -1e5)
        lse = scores.logsumexp(-1, keepdim=True)
        out, back = ((scores - lse).exp() @ v).flatten(2, 3), order.argsort(dim=-1)[..., None]
        outs.append(out.gather(2, back.expand_as(out)))
        sums.append(lse.flatten(2, 3).gather(2, back))
    return (torch.stack(outs) * torch.stack(sums).softmax(0)).sum(0)
