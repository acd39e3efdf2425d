"""Images with texts: CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...methods import parse
from ...models import CLIP, CLIPConfig, ImageConfig, TextTowerConfig, TransformerConfig
from ...models.clip import recall_at
from ..data import captions
from ..data.base import Batch, Splits
from ..data.text import END
from ..task import Task, Values, option
from .vision import GENTLE


@dataclass(frozen=True)
class Clip(Task):
    """A :class:`CLIP` model; `attention` is the image tower's."""

    name: ClassVar[str] = "clip"
    help: ClassVar[str] = "Images and texts that belong together (CLIP)."
    data_help: ClassVar[str | None] = (
        "A folder of images with a .txt beside each, or with captions.csv (file, caption). Default: digits in words."
    )
    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 30, "batch": 64, "lr": 2e-3, "warmup": 0.2}
    least_batch: ClassVar[int] = 2  # the loss tells the examples of a batch apart

    text_attention: str = option("dense", "Spec of the text tower's causal attention.")
    data: str | None = None
    image_size: int | None = option(
        None, "Height and width to which images are resized. Default: 32 for a folder's, 8 for the digits."
    )
    patch_size: int = option(2, "Height and width of a patch, which is a token.")
    overlap: int = option(1, "Pixels that a patch reaches into its neighbours.", least=0)
    max_length: int = option(32, "Bytes of a text that are read, with the marks around it.")
    dim: int = option(64, "Features of both towers.")
    layers: int = option(2, "Layers of each tower.")
    heads: int = option(4, "Attention heads.")
    augment: bool = option(False, "Crop and turn training images a little.")

    def __post_init__(self) -> None:
        parse(self.text_attention)
        super().__post_init__()

    def splits(self, seed: int) -> Splits:
        folder = None if self.data is None else Path(self.data)
        return captions.load(seed, folder, image_size=self.image_size, max_length=self.max_length)

    def model(self, about: Mapping[str, Any]) -> CLIP:
        def tower(attention: str, causal: bool) -> TransformerConfig:
            return TransformerConfig(
                self.dim, self.layers, self.heads, causal=causal, attention=attention, mlp_dim=2 * self.dim
            )

        image = ImageConfig(
            about["image_size"],
            self.patch_size,
            about["channels"],
            overlap=self.overlap,
            positions="sinusoidal",
            pool="mean",
            encoder=tower(self.attention, False),
        )
        text = TextTowerConfig(about["vocabulary"], about["max_length"], END, tower(self.text_attention, True))
        return CLIP(CLIPConfig(image, text, self.dim))

    def loss(self, model: CLIP, batch: Batch) -> Tensor:
        pixels = GENTLE(batch["image"]) if self.augment else batch["image"]
        return model.loss(pixels, batch["tokens"])

    def evaluate(self, model: CLIP, batch: Batch, about: Mapping[str, Any]) -> Values:
        values = {
            "loss": model.loss(batch["image"], batch["tokens"]).expand(len(batch["image"])),
            "image": model.encode_image(batch["image"]).float(),
            "text": model.encode_text(batch["tokens"]).float(),
        }
        if "prompts" in about:
            tokens = about["prompts"]["tokens"].to(batch["image"].device)
            each = len(tokens) // about["classes"]
            labels = torch.arange(len(tokens), device=tokens.device) // each
            found = model.classify(batch["image"], model.class_embeddings(tokens, labels)).argmax(dim=1)
            values["zero_shot"] = (found == batch["label"]).float()
        return values

    def summary(self, values: Values, about: Mapping[str, Any]) -> dict[str, float]:
        """Loss, zero-shot accuracy, and how often the own text is among the five nearest (images that share their
        caption, as the digits do, make that harder than it sounds)."""
        image, text = values.pop("image"), values.pop("text")
        found = super().summary(values, about)
        return found | {"recall_at_5": recall_at(min(5, len(text)), image, text)}
