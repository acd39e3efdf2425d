"""SimCLR's augmentations on batches, in plain torch: every image draws its own crop, flip, colours and blur.

Chen et al. 2020, arXiv:2002.05709, appendix A. Images are (B, C, H, W) with values in [0, 1], on any device; a
generator makes a batch repeatable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, InputTypeError

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Augmentation:
    """What happens to an image, in this order; the defaults are the paper's for photographs.

    crop: smallest and largest area of the crop, as a share of the image, which is resized to the whole.
    ratio: smallest and largest width / height of the crop.
    rotation: largest angle in degrees, either way; part of the crop's own resampling.
    flip: probability of a mirror image (left to right). Text and digits want 0.
    jitter: strength of the colour jitter: brightness, contrast and saturation by a factor within 1 +- 0.8 jitter.
    jitter_p, grayscale_p, blur_p: probabilities. One channel knows no saturation and no grayscale.
    """

    crop: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    rotation: float = 0.0
    flip: float = 0.5
    jitter: float = 1.0
    jitter_p: float = 0.8
    grayscale_p: float = 0.2
    blur_p: float = 0.5

    def __post_init__(self) -> None:
        for name in ("crop", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "crop" and high > 1):
                raise InputError(f"{name} must be (low, high) with 0 < low <= high, a crop up to 1; got {(low, high)}")
        for name in ("flip", "jitter_p", "grayscale_p", "blur_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a probability, from 0 to 1; got {getattr(self, name)}")
        if not 0 <= self.jitter <= 1.25 or not 0 <= self.rotation <= 180:
            raise InputError(f"jitter is from 0 to 1.25 and rotation from 0 to 180; got {self.jitter}, {self.rotation}")

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One random view of every image, (B, C, H, W) in [0, 1] like `images`.

        Raises:
            InputTypeError, InputError: not a floating-point tensor of four dimensions.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            raise InputTypeError("images must be a floating-point tensor with values in [0, 1]")
        if images.dim() != 4:
            raise InputError(f"images must be (batch, channels, height, width), got {tuple(images.shape)}")
        draw = _Draw(images, generator)
        views = self._crop(images, draw)
        if self.jitter > 0 and self.jitter_p > 0:
            views = self._jitter(views, draw)
        if self.grayscale_p > 0 and images.shape[1] == 3:
            views = torch.where(draw.happens(self.grayscale_p), _gray(views), views)
        if self.blur_p > 0:
            views = torch.where(draw.happens(self.blur_p), _blur(views, draw), views)
        return views.clamp(0, 1)

    def _crop(self, images: Tensor, draw: _Draw) -> Tensor:
        """A random rectangle, turned and mirrored, resampled to the image's size; beyond the border is the edge."""
        H, W = images.shape[2:]
        area = draw.uniform(*self.crop)
        ratio = torch.exp(draw.uniform(*(math.log(r) for r in self.ratio)))
        width = (area * ratio * H / W).sqrt().clamp(max=1)  # shares of the image
        height = (area / ratio * W / H).sqrt().clamp(max=1)
        x, y = (draw.uniform(-1, 1) * (1 - share) for share in (width, height))  # centre, in grid_sample's [-1, 1]
        angle = draw.uniform(-self.rotation, self.rotation) * (math.pi / 180)
        mirror = torch.where(draw.happens(self.flip), -1.0, 1.0).to(area.dtype)
        cos, sin = angle.cos(), angle.sin()
        rows = [mirror * width * cos, -height * sin * (H / W), x, mirror * width * sin * (W / H), height * cos, y]
        theta = torch.cat([r.reshape(-1, 1) for r in rows], dim=1).reshape(-1, 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)

    def _jitter(self, images: Tensor, draw: _Draw) -> Tensor:
        strength = 0.8 * self.jitter
        happens = draw.happens(self.jitter_p)
        brightness, contrast, saturation = (draw.uniform(1 - strength, 1 + strength) for _ in range(3))
        changed = (images * brightness).clamp(0, 1)
        mean = _gray(changed).mean(dim=(1, 2, 3), keepdim=True)
        changed = (mean + (changed - mean) * contrast).clamp(0, 1)
        if images.shape[1] == 3:
            gray = _gray(changed)
            changed = (gray + (changed - gray) * saturation).clamp(0, 1)
        return torch.where(happens, changed, images)


class _Draw:
    """Random numbers of one batch, (B, 1, 1, 1) each, on the images' device."""

    def __init__(self, images: Tensor, generator: torch.Generator | None) -> None:
        self._images, self._generator = images, generator

    def uniform(self, low: float, high: float) -> Tensor:
        device = self._images.device if self._generator is None else self._generator.device
        u = torch.rand(self._images.shape[0], 1, 1, 1, generator=self._generator, device=device)
        return low + (high - low) * u.to(self._images.device, self._images.dtype)

    def happens(self, probability: float) -> Tensor:
        return self.uniform(0, 1) < probability


def _gray(images: Tensor) -> Tensor:
    """(B, 1, H, W): luma of three channels, the mean of any other number."""
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    weights = torch.tensor(_LUMA, dtype=images.dtype, device=images.device)
    return (images * weights[:, None, None]).sum(dim=1, keepdim=True)


def _blur(images: Tensor, draw: _Draw) -> Tensor:
    """A Gaussian of standard deviation 0.1 to 2, over a tenth of the image in all, for every image its own."""
    B, C, H, W = images.shape
    radius = max(1, min(H, W) // 20)
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    sigma = draw.uniform(0.1, 2.0).reshape(B, 1)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=1)  # [B, 2 radius + 1]
    weights = kernel.repeat_interleave(C, dim=0)[:, None]  # one group a channel of an image
    flat = F.pad(images.reshape(1, B * C, H, W), (radius,) * 4, mode="replicate")
    flat = F.conv2d(flat, weights[:, :, None], groups=B * C)
    flat = F.conv2d(flat, weights[..., None], groups=B * C)
    return flat.reshape(B, C, H, W)
