"""Losses that pull pairs together and everything else apart: SimCLR's NT-Xent and CLIP's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError


def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
    """Normalised temperature-scaled cross entropy of two views of B images. Chen et al. 2020, arXiv:2002.05709, eq. 1.

    With z the 2 B unit vectors and s = z z^T / temperature, the mean over i of
    -log(e^s_ij / sum over k != i of e^s_ik), j the other view of i's image. Computed in float32.

    Args:
        first, second: (B, d), row b of both from one image.

    Raises:
        InputError: other shapes, fewer than two images, or a temperature that is not positive.
    """
    _check_pairs(first, second)
    if not temperature > 0:
        raise InputError(f"temperature must be positive, got {temperature}")
    B = first.shape[0]
    with torch.autocast(first.device.type, enabled=False):  # it would compute the product in half precision
        z = F.normalize(torch.cat([first, second]).float(), dim=1)
        scores = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        partner = torch.arange(2 * B, device=z.device).roll(B)
        return F.cross_entropy(scores, partner)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """CLIP's symmetric cross entropy: each image must find its text, each text its image, among the batch's.

    Radford et al. 2021, arXiv:2103.00020, figure 3. Computed in float32.

    Args:
        image, text: (B, d) unit vectors, row b of both a pair. scale: the cosine's factor, e^logit_scale.

    Raises:
        InputError: other shapes or fewer than two pairs.
    """
    _check_pairs(image, text)
    with torch.autocast(image.device.type, enabled=False):  # it would compute the product in half precision
        logits = scale * image.float() @ text.float().T
        own = torch.arange(image.shape[0], device=image.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _check_pairs(first: Tensor, second: Tensor) -> None:
    if first.dim() != 2 or first.shape != second.shape:
        raise InputError(
            f"pairs are two tensors (batch, features) of one shape; got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if first.shape[0] < 2:
        raise InputError(
            f"a contrastive loss tells the pairs of a batch apart, and this one has {first.shape[0]}: its loss would "
            "be 0 and nothing learned; give at least 2"
        )
