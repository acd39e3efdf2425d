"""Images as patches: cutting and joining, 2-D positions, and the embedding of patches.

A grid of H/P x W/P patches is a sequence in row-major order. Letters: B batch, C channels, H height, W width, P patch,
N patches, E width of the model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, InputTypeError

Size = tuple[int, int]


def as_size(value: int | tuple[int, int] | list[int], name: str) -> Size:
    """An int as a square, two ints as (height, width).

    Raises:
        InputError, InputTypeError: anything else, or sizes below 1.
    """
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else None
    if pair is None or not all(isinstance(v, int) and not isinstance(v, bool) for v in pair):
        raise InputTypeError(f"{name} must be an int or (height, width) of ints, got {value!r}")
    if len(pair) != 2 or min(pair) < 1:
        raise InputError(f"{name} must be an int or (height, width), each at least 1, got {value!r}")
    return pair[0], pair[1]


def grid_of(height: int, width: int, patch: Size) -> Size:
    """(rows, columns) of the patches that tile an image.

    Raises:
        InputError: the patch does not divide the image.
    """
    if height % patch[0] or width % patch[1] or min(height, width) < 1:
        raise InputError(
            f"an image of {height}x{width} is no whole number of {patch[0]}x{patch[1]} patches; resize or crop it to "
            f"multiples of {patch[0]} and {patch[1]}, for instance {_near(height, patch[0])}x{_near(width, patch[1])}"
        )
    return height // patch[0], width // patch[1]


def _near(length: int, patch: int) -> int:
    return max(1, round(length / patch)) * patch


def check_images(images: Tensor, channels: int) -> None:
    """Raise InputError or InputTypeError unless `images` is floating point (B, channels, H, W)."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise InputTypeError(f"images must be a floating-point tensor (scale bytes: images.float() / 255), got {kind}")
    if images.dim() != 4 or images.shape[1] != channels:
        raise InputError(f"images must be (batch, {channels}, height, width), got {tuple(images.shape)}")


def patchify(images: Tensor, patch: Size) -> Tensor:
    """(B, C, H, W) -> (B, N, P*P*C): patches in row-major order; within one rows, columns, then channels (He 2022).

    Raises:
        InputError: not four dimensions, or sizes that the patch does not divide.
    """
    if images.dim() != 4:
        raise InputError(f"images must be (batch, channels, height, width), got {tuple(images.shape)}")
    B, C, H, W = images.shape
    rows, columns = grid_of(H, W, patch)
    cut = images.reshape(B, C, rows, patch[0], columns, patch[1])
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(B, rows * columns, patch[0] * patch[1] * C)


def unpatchify(patches: Tensor, patch: Size, grid: Size) -> Tensor:
    """The inverse of `patchify`: (B, N, P*P*C) -> (B, C, H, W) for a grid of N = rows x columns.

    Raises:
        InputError: other shapes.
    """
    area, (rows, columns) = patch[0] * patch[1], grid
    if patches.dim() != 3 or patches.shape[1] != rows * columns or patches.shape[2] % area:
        raise InputError(
            f"patches must be (batch, {rows * columns}, {area} * channels) for a grid of {rows}x{columns}, got "
            f"{tuple(patches.shape)}"
        )
    cut = patches.reshape(patches.shape[0], rows, columns, patch[0], patch[1], -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, rows * patch[0], columns * patch[1])


def sinusoidal_2d(width: int, grid: Size) -> Tensor:
    """(N, width) fixed positions of a grid: half of the features for the column, half for the row, as MAE has them.

    Each half is the sine-cosine encoding of Vaswani et al. 2017 (sines first, then cosines).

    Raises:
        InputError: a width that 4 does not divide.
    """
    if width % 4:
        raise InputError(f"two-dimensional sinusoidal positions need a width that 4 divides, got {width}")
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (column, row)]
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1).float()


def resize_positions(positions: Tensor, old: Size, new: Size) -> Tensor:
    """(old rows * columns, E) -> (new rows * columns, E): bicubic, as ViT does for images of other sizes."""
    if old == new:
        return positions
    half = positions.dtype in (torch.float16, torch.bfloat16)
    as_image = (positions.float() if half else positions).reshape(1, *old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(as_image, size=new, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(math.prod(new), -1).to(positions.dtype)


class PatchEmbedding(nn.Module):
    """A linear map of every patch, as a convolution whose stride is the patch.

    Args:
        channels, width: C and E.
        patch: (height, width) of a patch.
        overlap: pixels that a patch reaches into its neighbours on each side, zeros beyond the border. A little helps
            small images; 0 is ViT.
        bias: of the map.
    """

    def __init__(self, channels: int, width: int, patch: Size, *, overlap: int = 0, bias: bool = True) -> None:
        super().__init__()
        self.channels, self.patch = channels, patch
        kernel = (patch[0] + 2 * overlap, patch[1] + 2 * overlap)
        self.projection = nn.Conv2d(channels, width, kernel, stride=patch, padding=overlap, bias=bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Size]:
        """(B, C, H, W) -> (B, N, E) and the grid.

        Raises:
            InputTypeError, InputError: no floating-point images of C channels, or not a whole number of patches.
        """
        check_images(images, self.channels)
        grid = grid_of(images.shape[2], images.shape[3], self.patch)
        tokens: Tensor = self.projection(images.to(self.projection.weight.dtype))
        return tokens.flatten(2).transpose(1, 2), grid
