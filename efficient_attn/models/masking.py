"""Random masking of patches and the reconstruction loss of the masked autoencoder. He et al. 2022, arXiv:2111.06377."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError


class Masking(NamedTuple):
    """Which patches an encoder sees.

    visible: (B, V) indices of the visible patches, ascending: methods that go by the order of tokens keep it.
    restore: (B, N): where patch n stands in (visible patches, masked patches).
    masked: bool (B, N), True = masked.
    """

    visible: Tensor
    restore: Tensor
    masked: Tensor


def random_masking(noise: Tensor, ratio: float) -> Masking:
    """Keep the floor(N (1 - ratio)) patches of least noise; with uniform noise, any choice is as likely.

    Args:
        noise: (B, N), for instance torch.rand.
        ratio: the share that is masked, 0 <= ratio < 1.

    Raises:
        InputError: another shape, or a ratio that leaves no patch to see.
    """
    if noise.dim() != 2:
        raise InputError(f"noise must be (batch, patches), got {tuple(noise.shape)}")
    N = noise.shape[1]
    keep = int(N * (1 - ratio) + 1e-9)  # 10 * (1 - 0.9) is a little less than 1
    if not 0 <= ratio < 1 or keep < 1:
        raise InputError(f"a mask ratio of {ratio} leaves none of {N} patches to see; choose 0 <= ratio <= 1 - 1/{N}")
    masked = noise.argsort(dim=1, stable=True).argsort(dim=1) >= keep
    order = masked.long().argsort(dim=1, stable=True)
    return Masking(order[:, :keep], order.argsort(dim=1), masked)


def take(tokens: Tensor, indices: Tensor) -> Tensor:
    """(B, N, E) and (B, V) indices -> (B, V, E)."""
    return tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def normalise_patches(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Every patch (..., P*P*C) to zero mean and unit (unbiased) variance: the target that the paper found best."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + eps).sqrt()


def masked_mse(prediction: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    """Mean squared error over the masked patches alone.

    Args:
        prediction, target: (B, N, F). masked: bool (B, N).

    Raises:
        InputError: other shapes.
    """
    if prediction.shape != target.shape or prediction.dim() != 3 or masked.shape != prediction.shape[:2]:
        raise InputError(
            f"prediction and target are (B, N, F) and masked (B, N); got {tuple(prediction.shape)}, "
            f"{tuple(target.shape)}, {tuple(masked.shape)}"
        )
    error = (prediction.float() - target.float()).square().mean(dim=-1)
    return torch.where(masked, error, 0).sum() / masked.sum().clamp(min=1)
