"""Images: classification, and pre-training without labels by masked autoencoding or by SimCLR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...models import (
    MAE,
    Augmentation,
    ImageConfig,
    MAEConfig,
    SimCLR,
    SimCLRConfig,
    TransformerConfig,
    ViT,
    ViTConfig,
)
from ..data import images
from ..data.base import Batch, Splits
from ..task import Task, Values, option
from .classes import OfClasses, classified

# Small images of signs: no mirror images, no colours, crops that leave the sign whole.
GENTLE = Augmentation(
    crop=(0.7, 1.0), ratio=(0.85, 1.18), rotation=10.0, flip=0.0, jitter_p=0.0, grayscale_p=0.0, blur_p=0.0
)
NEIGHBOURS = 5


@dataclass(frozen=True)
class OfImages(Task):
    """A task on the digits, or on a folder of images. Every model has the same backbone, so that one can start from
    another's."""

    data: str | None = None
    image_size: int | None = option(
        None, "Height and width to which images are resized. Default: 32 for a folder's, 8 for the digits."
    )
    patch_size: int = option(2, "Height and width of a patch, which is a token.")
    overlap: int = option(1, "Pixels that a patch reaches into its neighbours.", least=0)
    dim: int = option(64, "Features of the model.")
    layers: int = option(4, "Layers of the model.")
    heads: int = option(4, "Attention heads.")
    dropout: float = option(0.0, "Dropout.")
    channels: int | None = option(None, "1 or 3. Default: 1 if all images are grey, else 3.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels not in (None, 1, 3):
            raise InputError(f"--channels must be 1 or 3, given {self.channels}")

    def splits(self, seed: int) -> Splits:
        return images.load(seed, self._folder(), image_size=self.image_size, channels=self.channels)

    def _folder(self) -> Path | None:
        return None if self.data is None else Path(self.data)

    def backbone(self, about: Mapping[str, Any]) -> ImageConfig:
        encoder = TransformerConfig(
            self.dim, self.layers, self.heads, dropout=self.dropout, attention=self.attention, mlp_dim=2 * self.dim
        )
        return ImageConfig(
            about["image_size"],
            self.patch_size,
            about["channels"],
            overlap=self.overlap,
            positions="sinusoidal",
            pool="mean",
            encoder=encoder,
        )


@dataclass(frozen=True)
class ImageClassification(OfImages, OfClasses):
    """A :class:`ViT`."""

    labels_per_class: int | None = option(None, "Use only so many training examples of each class.")
    augment: bool = option(True, "Crop and turn training images a little.")
    mixup: float = option(0.0, "Mix pairs of images and their labels, by Beta(mixup, mixup); 0.2 is usual, 0: none.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mixup < float("inf"):
            raise InputError(f"--mixup must be at least 0, given {self.mixup}")
        if self.mixup and self.class_weights != "none":
            raise InputError("--mixup makes examples of two classes, which --class-weights cannot weigh; give one")

    def splits(self, seed: int) -> Splits:
        return images.load(
            seed,
            self._folder(),
            image_size=self.image_size,
            channels=self.channels,
            labels_per_class=self.labels_per_class,
        )

    def model(self, about: Mapping[str, Any]) -> ViT:
        return ViT(ViTConfig(self.backbone(about), about["classes"], self.labels(about)))

    def loss(self, model: ViT, batch: Batch) -> Tensor:
        pixels = GENTLE(batch["image"]) if self.augment else batch["image"]
        labels = batch["label"]
        if self.mixup and model.training:
            pixels, labels = mixed(pixels, labels, model.config.num_labels, self.mixup)
        return model.loss(pixels, labels)

    def evaluate(self, model: ViT, batch: Batch, about: Mapping[str, Any]) -> Values:
        return classified(model(batch["image"]), batch["label"])

    def adopt(self, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """The backbone has the same name in MAE, SimCLR and ViT; CLIP calls it `image`."""
        return {f"backbone.{name[6:]}" if name.startswith("image.") else name: value for name, value in saved.items()}


def mixed(images: Tensor, labels: Tensor, classes: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Each image with a part of another one of its batch, and soft labels `[B, classes]`. Zhang et al. 2018, mixup."""
    part = torch.distributions.Beta(alpha, alpha).sample((len(images), 1)).to(images)
    other = torch.randperm(len(images), device=images.device)
    target = F.one_hot(labels, classes).to(images.dtype)
    pixels = part[..., None, None] * images + (1 - part[..., None, None]) * images[other]
    return pixels, part * target + (1 - part) * target[other]


@dataclass(frozen=True)
class Digits(ImageClassification):
    name: ClassVar[str] = "digits"
    help: ClassVar[str] = "Class of a handwritten digit (scikit-learn's, 8 x 8), by a vision transformer."
    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 20, "batch": 64, "lr": 3e-3, "warmup": 0.2}

    augment: bool = option(False, "Crop and turn training images a little; helps with few labels.")

    def __post_init__(self) -> None:
        if self.data is not None:
            raise InputError("digits come with scikit-learn; for a folder of your own: efficient-attn train images")
        super().__post_init__()


@dataclass(frozen=True)
class Images(ImageClassification):
    name: ClassVar[str] = "images"
    help: ClassVar[str] = "Class of an image of a folder, by a vision transformer."
    data_help: ClassVar[str | None] = "A folder with a folder of images per class. Needed."
    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 20, "batch": 64, "lr": 1e-3}

    patch_size: int = option(4, "Height and width of a patch, which is a token.")

    def __post_init__(self) -> None:
        if self.data is None:
            raise InputError("images needs --data FOLDER, with a folder of images for each class")
        super().__post_init__()


@dataclass(frozen=True)
class Pretraining(OfImages):
    """Learns features without labels; they are judged by what the nearest neighbours of an image are."""

    data_help: ClassVar[str | None] = "A folder with a folder of images per class. Default: the digits."

    def loss(self, model: Any, batch: Batch) -> Tensor:
        loss: Tensor = model.loss(batch["image"])
        return loss

    def evaluate(self, model: Any, batch: Batch, about: Mapping[str, Any]) -> Values:
        loss = model.loss(batch["image"]).expand(len(batch["label"]))
        return {"loss": loss, "features": model.backbone.pooled(batch["image"]).float(), "label": batch["label"]}

    def summary(self, values: Values, about: Mapping[str, Any]) -> dict[str, float]:
        return {
            "loss": values["loss"].double().mean().item(),
            "neighbour_accuracy": neighbour_accuracy(values["features"], values["label"]),
        }


@dataclass(frozen=True)
class MaskedAutoencoding(Pretraining):
    name: ClassVar[str] = "mae"
    help: ClassVar[str] = "Pre-training: images from a part of their patches (masked autoencoder)."
    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 60, "batch": 64, "lr": 2e-3}

    overlap: int = option(0, "Must be 0: hidden patches would show at the edges of their neighbours.", least=0)
    mask_ratio: float = option(0.6, "Part of the patches that is hidden.")
    decoder_layers: int = option(1, "Layers of the decoder.")

    def model(self, about: Mapping[str, Any]) -> MAE:
        decoder = TransformerConfig(self.dim, self.decoder_layers, self.heads, mlp_dim=2 * self.dim)
        return MAE(MAEConfig(self.backbone(about), decoder, self.mask_ratio, normalise_target=False))


@dataclass(frozen=True)
class SimClr(Pretraining):
    name: ClassVar[str] = "simclr"
    help: ClassVar[str] = "Pre-training: two views of an image agree (SimCLR)."
    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 60, "batch": 128, "lr": 2e-3}
    least_batch: ClassVar[int] = 2  # the loss tells the examples of a batch apart

    temperature: float = option(0.2, "Of the loss.")
    colours: bool = option(False, "Views of photographs: mirrored, with other colours, blurred.")

    def model(self, about: Mapping[str, Any]) -> SimCLR:
        views = (
            Augmentation()
            if self.colours
            else Augmentation(
                crop=(0.5, 1.0), ratio=(0.75, 1.33), rotation=15.0, flip=0.0, jitter_p=0.0, grayscale_p=0.0, blur_p=0.2
            )
        )
        return SimCLR(SimCLRConfig(self.backbone(about), self.dim, self.temperature, views))


def neighbour_accuracy(features: Tensor, labels: Tensor) -> float:
    """How often the class of most of an example's nearest others (cosine) is its own: features `[B, E]`."""
    unit = F.normalize(features, dim=-1)
    likeness = (unit @ unit.T).fill_diagonal_(-2.0)
    count = min(NEIGHBOURS, len(labels) - 1)
    if count < 1:
        return 0.0
    nearest = labels[likeness.topk(count, dim=-1).indices]
    return (nearest.mode(dim=-1).values == labels).double().mean().item()


__all__ = ["Digits", "ImageClassification", "Images", "MaskedAutoencoding", "SimClr", "neighbour_accuracy"]
