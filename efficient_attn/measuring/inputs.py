"""Real inputs: query, key and value made from photographs, and scikit-learn's handwritten digits.

Random normal tensors have no structure: every query attends to everything about equally, which flatters low-rank
methods and says nothing about sparse ones. Patches of a photograph are alike near each other and repeat far away, as
tokens of real data are.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..masks import BlockMask

PATCH = 8
FEATURES = 64


def photograph_qkv(
    seqlen: int,
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query (batch, heads, seqlen, head_dim), key and value (batch, kv_heads, seqlen, head_dim) from image patches.

    Tokens are overlapping patches in raster order (as in a ViT), reduced to their principal components, with
    two-dimensional sine positions. Query and key projections share half of their weights, so that alike patches attend
    to each other, as trained heads do.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    tokens = torch.stack([photograph_tokens(seqlen, image=b % 2) for b in range(batch)])  # [batch, seqlen, FEATURES]
    generator = torch.Generator().manual_seed(0)

    def weights(count: int) -> Tensor:
        return torch.randn(count, FEATURES, head_dim, generator=generator) / math.sqrt(FEATURES)

    key_weights, value_weights, own = weights(kv_heads), weights(kv_heads), weights(heads)
    shared = key_weights.repeat_interleave(heads // kv_heads, dim=0)
    query_weights = (shared + own) / math.sqrt(2)
    query, key, value = (
        torch.einsum("bnf,hfd->bhnd", tokens, w).to(dtype).contiguous()
        for w in (query_weights, key_weights, value_weights)
    )
    return query, key, value


def photograph_tokens(seqlen: int, *, image: int = 0) -> Tensor:
    """`(seqlen, FEATURES)` float32 tokens of zero mean and unit variance, in raster order over one photograph."""
    pixels = _photographs()[image]  # [3, height, width]
    height, width = pixels.shape[1:]
    rows = max(1, min(seqlen, round(math.sqrt(seqlen * height / width))))
    columns = math.ceil(seqlen / rows)
    ys = torch.linspace(0, height - PATCH, rows).round().long()
    xs = torch.linspace(0, width - PATCH, columns).round().long()
    window = torch.arange(PATCH)
    y, x = ys.repeat_interleave(columns)[:seqlen], xs.repeat(rows)[:seqlen]
    # [3, seqlen, PATCH, PATCH] -> [seqlen, 3 * PATCH * PATCH]
    patches = pixels[:, (y[:, None] + window)[:, :, None], (x[:, None] + window)[:, None, :]]
    flat = patches.transpose(0, 1).reshape(seqlen, -1)
    flat = flat - flat.mean(dim=0)
    positions = _positions(y / height, x / width)
    _, basis = torch.linalg.eigh(flat.T @ flat)
    components = flat @ basis[:, -(FEATURES - positions.shape[1]) :]
    tokens = torch.cat([components / components.std().clamp_min(1e-6), positions], dim=1)
    return torch.nn.functional.layer_norm(tokens, (FEATURES,))


def _positions(y: Tensor, x: Tensor) -> Tensor:
    frequencies = 2 * math.pi * 2.0 ** torch.arange(4)
    angles = torch.cat([y[:, None] * frequencies, x[:, None] * frequencies], dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)  # [seqlen, 16]


def random_blocks(q_len: int, kv_len: int, density: float, *, block: int = 64, seed: int = 0) -> BlockMask:
    """A mask of whole blocks: in every block row the same number, drawn at random."""
    rows, columns = -(-q_len // block), -(-kv_len // block)
    count = max(1, round(density * columns))
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    chosen = scores.argsort(dim=1)[:, :count].sort(dim=1).values
    indptr = torch.arange(0, rows * count + 1, count)
    return BlockMask.from_csr(indptr, chosen.flatten().int(), q_len=q_len, kv_len=kv_len, block_size=(block, block))


@lru_cache(maxsize=1)
def _photographs() -> tuple[Tensor, ...]:
    from sklearn.datasets import load_sample_images

    return tuple(torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images)


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images and labels, test images and labels: 1437 and 360 of scikit-learn's 8 x 8 digits, pixels 0..1."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images).float()[order] / 16
    labels = torch.tensor(data.target).long()[order]
    held_out = len(labels) // 5 + 1
    return images[held_out:], labels[held_out:], images[:held_out], labels[:held_out]
