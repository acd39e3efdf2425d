"""Pre-training on images without labels: the masked autoencoder and SimCLR. `ViT.from_backbone` fine-tunes from both.

MAE: He et al. 2022, arXiv:2111.06377. SimCLR: Chen et al. 2020, arXiv:2002.05709. Letters: B batch, C channels,
H height, W width, N patches, V visible patches, P patch, E features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from .augment import Augmentation
from .base import Model
from .contrastive import nt_xent
from .masking import Masking, masked_mse, normalise_patches, random_masking, take
from .outputs import ReconstructionOutput, answer, either
from .patches import Size, patchify, resize_positions, sinusoidal_2d, unpatchify
from .transformer import Transformer, TransformerConfig
from .vision import ImageBackbone, ImageConfig

# --- masked autoencoder ---


@dataclass(frozen=True)
class MAEConfig:
    """A `MAE`.

    Fields:
        backbone: the encoder; without overlap, or patches would show a piece of their masked neighbours.
        decoder: a light Transformer that pre-training needs and fine-tuning drops; 4 divides its hidden_dim.
        mask_ratio: the share of patches that is masked.
        normalise_target: reconstruct patches of zero mean and unit variance; the paper's better target.

    Raises:
        InputError: an overlap, or a ratio that masks nothing or everything.
    """

    backbone: ImageConfig = field(default_factory=lambda: ImageConfig(positions="sinusoidal"))
    decoder: TransformerConfig = field(default_factory=lambda: TransformerConfig(hidden_dim=128, num_layers=2))
    mask_ratio: float = 0.75
    normalise_target: bool = True

    def __post_init__(self) -> None:
        if self.backbone.overlap:
            raise InputError("MAE cannot mask patches that overlap; give backbone.overlap=0")
        if not 0 < self.mask_ratio < 1:
            raise InputError(f"mask_ratio must be between 0 and 1, got {self.mask_ratio}")
        if self.decoder.causal or self.decoder.cross_attention:
            raise InputError("MAE's decoder is not causal and has no memory; leave causal and cross_attention False")


class Reconstruction(NamedTuple):
    """What `MAE.forward` returns: predicted patches (B, N, P*P*C), and bool (B, N) with True = masked."""

    patches: Tensor
    masked: Tensor


class MAE(Model):
    """Reconstructs images from a quarter of their patches.

        model = MAE(MAEConfig(ImageConfig(image_size=32, patch_size=4, positions="sinusoidal", encoder=...)))
        model.loss(images).backward()
        classifier = ViT.from_backbone(model, num_labels=10)

    The encoder runs on the class token and the visible patches alone, in row-major order, with any method. For methods
    that go by the grid (neighborhood, axial) it runs on all patches instead, and none sees a masked one. The decoder
    always sees 1 + N tokens. `from_pretrained` reads transformers' ViTMAE checkpoints too.
    """

    config_class = MAEConfig

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config)
        backbone, E = config.backbone, config.decoder.hidden_dim
        self.backbone = ImageBackbone(backbone)
        self.decoder_embedding = nn.Linear(backbone.encoder.hidden_dim, E)
        self.mask_token = nn.Parameter(torch.empty(E))
        fixed = torch.cat([torch.zeros(1, E), sinusoidal_2d(E, backbone.grid)])
        self.decoder_positions = nn.Parameter(fixed, requires_grad=False)
        self.decoder = Transformer(config.decoder)
        self.to_pixels = nn.Linear(E, backbone.patch[0] * backbone.patch[1] * backbone.channels)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        images: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Predict every patch from the visible ones.

        Args:
            images: (B, C, H, W), floating point; H and W multiples of the patch. pixel_values: the same.
            noise: (B, N), the patches of least noise stay visible; None: uniform, from torch's generator.
            return_dict: see `outputs`.

        Returns:
            A `Reconstruction`: patches in `patchify`'s layout, of normalised pixels with normalise_target; and which
            were masked. With pixel_values a `ReconstructionOutput`, which has the loss.

        Raises:
            InputTypeError, InputError: images or noise of another type or shape.
        """
        images = either("pixel_values", images, pixel_values)
        found = self._reconstruction(images, noise)
        if return_dict is None and pixel_values is None:
            return found
        loss = self._loss_of(found, images)
        output = ReconstructionOutput(loss, found.patches, found.masked.to(found.patches.dtype))
        return answer(output, found, by_name=pixel_values is not None, return_dict=return_dict)

    def _reconstruction(self, images: Tensor, noise: Tensor | None) -> Reconstruction:
        tokens, grid = self.backbone.embed(images)
        B, N = tokens.shape[0], tokens.shape[1] - 1
        if noise is None:
            noise = torch.rand(B, N, device=tokens.device)
        elif noise.shape != (B, N):
            raise InputError(f"noise must be ({B}, {N}), one number a patch; got {tuple(noise.shape)}")
        masking = random_masking(noise, self._config.mask_ratio)
        hidden = self._encode_visible(tokens, masking)
        decoded = self.decoder(self._with_mask_tokens(hidden, masking, grid))
        return Reconstruction(self.to_pixels(decoded[:, 1:]), masking.masked)

    def _encode_visible(self, tokens: Tensor, masking: Masking) -> Tensor:
        """(B, 1 + N, E) -> (B, 1 + V, E)."""
        first, patches = tokens[:, :1], tokens[:, 1:]
        if not self.backbone.goes_by_grid():
            return self.backbone.encode(torch.cat([first, take(patches, masking.visible)], dim=1))
        hidden_from = torch.cat([masking.masked.new_zeros(tokens.shape[0], 1), masking.masked], dim=1)
        hidden = self.backbone.encode(tokens, key_padding_mask=hidden_from)
        return torch.cat([hidden[:, :1], take(hidden[:, 1:], masking.visible)], dim=1)

    def _with_mask_tokens(self, hidden: Tensor, masking: Masking, grid: Size) -> Tensor:
        """(B, 1 + V, E) of the encoder -> (B, 1 + N, E) of the decoder, every patch at its place again."""
        hidden = self.decoder_embedding(hidden)
        B, N = masking.masked.shape
        blank = self.mask_token.to(hidden.dtype).expand(B, N - masking.visible.shape[1], -1)
        patches = take(torch.cat([hidden[:, 1:], blank], dim=1), masking.restore)
        positions = self.decoder_positions
        inner = resize_positions(positions[1:], self._config.backbone.grid, grid)
        return torch.cat([hidden[:, :1], patches], dim=1) + torch.cat([positions[:1], inner])

    def loss(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Mean squared error over the masked patches, a scalar. Arguments and errors are those of `forward`."""
        return self._loss_of(self._reconstruction(images, noise), images)

    def _loss_of(self, found: Reconstruction, images: Tensor) -> Tensor:
        target = patchify(images.float(), self._config.backbone.patch)
        if self._config.normalise_target:
            target = normalise_patches(target)
        return masked_mse(found.patches, target, found.masked)

    def resized(self, tensors: dict[str, Tensor], before: Any, extend: str) -> dict[str, Tensor]:
        found = self.backbone.resized(super().resized(tensors, before, extend), before.backbone, "backbone.positions")
        return found | {"decoder_positions": self.decoder_positions.detach()}  # computed, not learned

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, C, H, W): the images with their masked patches as the model fills them in.

        With normalise_target each predicted patch gets back the mean and variance that the true one has.
        """
        found = self._reconstruction(images, noise)
        patch = self._config.backbone.patch
        own = patchify(images.float(), patch)
        predicted = found.patches.float()
        if self._config.normalise_target:
            variance, mean = torch.var_mean(own, dim=-1, keepdim=True)
            predicted = predicted * (variance + 1e-6).sqrt() + mean
        filled = torch.where(found.masked[..., None], predicted, own)
        return unpatchify(filled, patch, (images.shape[2] // patch[0], images.shape[3] // patch[1])).to(images.dtype)


# --- SimCLR ---


@dataclass(frozen=True)
class SimCLRConfig:
    """A `SimCLR`.

    Fields:
        backbone: the encoder of images.
        projection_dim: of the vectors that the loss compares.
        temperature: of the loss.
        augmentation: what makes two views of an image; the default is for photographs.

    Raises:
        InputError: values out of range.
    """

    backbone: ImageConfig = field(default_factory=ImageConfig)
    projection_dim: int = 128
    temperature: float = 0.5
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if self.projection_dim < 1 or not self.temperature > 0:
            raise InputError(
                f"projection_dim must be >= 1 and temperature > 0; got {self.projection_dim}, {self.temperature}"
            )


class SimCLR(Model):
    """Pulls two views of an image together and those of other images apart.

        model = SimCLR(SimCLRConfig(ImageConfig(...)))
        model.loss(images).backward()                       # images in [0, 1]
        classifier = ViT.from_backbone(model, num_labels=10)

    The projection head (two layers, ReLU between) is for the loss alone; features for other tasks come before it.
    """

    config_class = SimCLRConfig

    def __init__(self, config: SimCLRConfig) -> None:
        super().__init__(config)
        E = config.backbone.encoder.hidden_dim
        self.backbone = ImageBackbone(config.backbone)
        self.projection = nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.Linear(E, config.projection_dim))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, projection_dim), not normalised.

        Raises:
            InputTypeError, InputError: no floating-point images of a whole number of patches.
        """
        projected: Tensor = self.projection(self.backbone.pooled(images))
        return projected

    def loss(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """NT-Xent of two random views of every image, a scalar.

        Args:
            images: (B, C, H, W) in [0, 1], floating point.
            generator: of the augmentations; None: torch's.

        Raises:
            InputTypeError, InputError: images of another type or shape.
        """
        augment = self._config.augmentation
        return self.loss_of_views(augment(images, generator), augment(images, generator))

    def resized(self, tensors: dict[str, Tensor], before: Any, extend: str) -> dict[str, Tensor]:
        return self.backbone.resized(super().resized(tensors, before, extend), before.backbone, "backbone.positions")

    def loss_of_views(self, first: Tensor, second: Tensor) -> Tensor:
        """NT-Xent of two views that the caller made, each (B, C, H, W), a scalar."""
        both = self.forward(torch.cat([first, second]))
        return nt_xent(both[: first.shape[0]], both[first.shape[0] :], self._config.temperature)
