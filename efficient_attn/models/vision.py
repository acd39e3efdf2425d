"""Images: the backbone of all image models, and the vision transformer that classifies.

Dosovitskiy et al. 2020, arXiv:2010.11929.

    patches -> linear map -> [class token, patches] + positions -> Transformer -> class token or mean -> head

The class token stands first, so that specs of two-dimensional patterns take prefix=1:
`model.set_attention("neighborhood:kernel=7,prefix=1")`. Letters: B batch, C channels, H height, W width, N patches,
E features.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import patterns
from ..errors import InputError, InputTypeError, UnsupportedError
from ..methods import Hybrid, Sparse
from .base import Model
from .labels import LabelConfig, check_labels
from .outputs import ClassifierOutput, answer, either
from .patches import PatchEmbedding, Size, as_size, grid_of, resize_positions, sinusoidal_2d
from .transformer import Outputs, Transformer, TransformerConfig

POOLS = ("cls", "mean")
POSITIONS = ("learned", "sinusoidal")


@dataclass(frozen=True)
class ImageConfig:
    """An `ImageBackbone`.

    Fields:
        image_size: of the learned positions' grid, an int or (height, width); images of other sizes are accepted, their
            positions interpolated.
        patch_size: an int or (height, width); divides the image.
        channels: C.
        overlap: pixels that a patch reaches into its neighbours on each side; helps small images.
        patch_bias: whether the map of patches has a bias.
        positions: "learned", or "sinusoidal": fixed, two-dimensional, as in MAE.
        embedding_norm: a norm between positions and Transformer, as in CLIP.
        pool: "cls", the class token, or "mean" over the patches.
        encoder: the Transformer; encoder.dropout is that of the embedding too.

    Raises:
        InputError, InputTypeError: values out of range, a patch that does not divide the image, a causal encoder.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    channels: int = 3
    overlap: int = 0
    patch_bias: bool = True
    positions: str = "learned"
    embedding_norm: bool = False
    pool: str = "cls"
    encoder: TransformerConfig = field(default_factory=TransformerConfig)

    def __post_init__(self) -> None:
        grid_of(*as_size(self.image_size, "image_size"), self.patch)
        check_choice("pool", self.pool, POOLS)
        check_choice("positions", self.positions, POSITIONS)
        if self.channels < 1 or self.overlap < 0:
            raise InputError(f"channels must be >= 1 and overlap >= 0; got {self.channels}, {self.overlap}")
        if self.encoder.causal or self.encoder.cross_attention:
            raise InputError("an image is not causal and has no memory; leave encoder.causal and cross_attention False")

    @property
    def patch(self) -> Size:
        """(height, width) of a patch."""
        return as_size(self.patch_size, "patch_size")

    @property
    def grid(self) -> Size:
        """(rows, columns) of an image of `image_size`."""
        return grid_of(*as_size(self.image_size, "image_size"), self.patch)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise InputError for a value that is not allowed."""
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


class ImageBackbone(nn.Module):
    """Images to features: what ViT, MAE, SimCLR and CLIP share. `encoder` is its Transformer."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self._config = config
        E, (rows, columns) = config.encoder.hidden_dim, config.grid
        self.embedding = PatchEmbedding(
            config.channels, E, config.patch, overlap=config.overlap, bias=config.patch_bias
        )
        self.class_token = nn.Parameter(torch.empty(E))
        self.positions = nn.Parameter(torch.empty(1 + rows * columns, E))  # row 0: the class token's
        self.embedding_norm = nn.LayerNorm(E, config.encoder.norm_eps) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.encoder.dropout)
        self.encoder = Transformer(config.encoder)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        if config.positions == "sinusoidal":
            fixed = torch.cat([torch.zeros(1, E), sinusoidal_2d(E, config.grid)])
            self.positions = nn.Parameter(fixed, requires_grad=False)

    def resized(self, tensors: dict[str, Tensor], before: ImageConfig, name: str) -> dict[str, Tensor]:
        """A checkpoint's tensors with positions, under `name`, for this image_size instead of that `before`."""
        config = self._config
        if name not in tensors or before.grid == config.grid:
            return tensors
        if config.positions == "sinusoidal":  # computed, not learned
            return {**tensors, name: self.positions.detach()}
        first, rest = tensors[name][:1], tensors[name][1:]
        return {**tensors, name: torch.cat([first, resize_positions(rest, before.grid, config.grid)])}

    def embed(self, images: Tensor) -> tuple[Tensor, Size]:
        """Images to the tokens that `encode` takes.

        Args:
            images: (B, C, H, W), floating point, normalised as in training.

        Returns:
            (B, 1 + N, E), the class token first, then the patches row by row; and their grid (rows, columns).

        Raises:
            InputTypeError, InputError: images of another type or shape, or no whole number of patches.
        """
        patches, grid = self.embedding(images)
        positions: Tensor = self.positions
        if grid != self._config.grid:
            inner = resize_positions(positions[1:], self._config.grid, grid)
            positions = torch.cat([positions[:1], inner])
        first = self.class_token.expand(patches.shape[0], 1, -1)
        return torch.cat([first, patches], dim=1) + positions, grid

    def encode(self, tokens: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """Tokens of `embed`, or some of them, (B, M, E) -> (B, M, E).

        Args:
            key_padding_mask: bool (B, M), True = a token that none sees.
        """
        encoded: Tensor = self.encoder(self._prepared(tokens), key_padding_mask=key_padding_mask)
        return encoded

    def _prepared(self, tokens: Tensor) -> Tensor:
        prepared: Tensor = self.dropout(tokens if self.embedding_norm is None else self.embedding_norm(tokens))
        return prepared

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1 + N, E): the class token, then the patches row by row. Raises as `embed` does."""
        return self.encode(self.embed(images)[0])

    def inspect(self, images: Tensor, *, need_weights: bool = True) -> Outputs:
        """The outputs of all layers, and with need_weights what each attends to: (1 + N) x (1 + N) memory a head."""
        tokens = self._prepared(self.embed(images)[0])
        found: Outputs = self.encoder(tokens, return_hidden=True, need_weights=need_weights)
        return found

    def pooled(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, E): the class token, or with pool="mean" the mean of the patches."""
        return self.pool(self.forward(images))

    def pool(self, tokens: Tensor) -> Tensor:
        """(B, 1 + N, E) -> (B, E), as the config says."""
        return tokens[:, 0] if self._config.pool == "cls" else tokens[:, 1:].mean(dim=1)

    def goes_by_grid(self) -> bool:
        """Whether a layer's attention reads positions in the image, so that tokens cannot be left out before it."""
        layers: Any = self.encoder.layers
        return any(_on_grid(layer.attention.attention) for layer in layers)


def _on_grid(method: object) -> bool:
    if isinstance(method, Hybrid):
        return _on_grid(method.sparse)
    if isinstance(method, Sparse):
        return _on_grid(method.pattern)
    parts = getattr(method, "parts", ())
    return isinstance(method, (patterns.Neighborhood, patterns.Axial)) or any(map(_on_grid, parts))


@dataclass(frozen=True)
class ViTConfig:
    """A `ViT`.

    Fields:
        backbone: of images.
        num_labels: classes; None for a model of features, without a head.
        labels: their names and what the loss makes of them.

    Raises:
        InputError: fewer than one class.
    """

    backbone: ImageConfig = field(default_factory=ImageConfig)
    num_labels: int | None = 1000
    labels: LabelConfig = field(default_factory=LabelConfig)

    def __post_init__(self) -> None:
        if self.num_labels is not None and self.num_labels < 1:
            raise InputError(f"num_labels must be at least 1, or None; got {self.num_labels}")
        self.labels.check(self.num_labels)

    @property
    def id2label(self) -> dict[int, str]:
        """The labels' names by number."""
        return self.labels.id2label(self.num_labels)

    @property
    def label2id(self) -> dict[str, int]:
        """The labels' numbers by name."""
        return {name: number for number, name in self.id2label.items()}


class ViT(Model):
    """Classifies images.

        model = ViT(ViTConfig(ImageConfig(image_size=32, patch_size=4, encoder=TransformerConfig(192, 6, 3)), 10))
        model.loss(images, labels).backward()
        model(images).argmax(dim=1)
        model(**processor(images=pictures, return_tensors="pt"), labels=labels).loss   # as transformers' models

    `from_pretrained` reads transformers' ViT checkpoints too; with num_labels=... the head starts fresh.
    """

    config_class = ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.backbone = ImageBackbone(config.backbone)
        self.head = None
        if config.num_labels is not None:
            self.head = nn.Linear(config.backbone.encoder.hidden_dim, config.num_labels)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self._frozen: frozenset[str] = frozenset()  # parameters of the backbone that train when it is frozen no more

    @classmethod
    def from_backbone(cls, source: nn.Module, num_labels: int, *, frozen: bool = False, pool: str | None = None) -> ViT:
        """A classifier on a copy of a trained backbone: transfer learning.

        Args:
            source: a model with a backbone: `MAE`, `SimCLR`, another `ViT`, or CLIP's image tower.
            num_labels: classes of the new head.
            frozen: train the head alone (see `freeze`), else everything.
            pool: another way to pool; MAE suggests "mean".

        Raises:
            InputTypeError: a source without a backbone. InputError: an unknown pool.
        """
        backbone = source if isinstance(source, ImageBackbone) else getattr(source, "backbone", None)
        if not isinstance(backbone, ImageBackbone):
            raise InputTypeError(f"{type(source).__name__} has no ImageBackbone; give a MAE, a SimCLR or a ViT")
        config = backbone_config(backbone, pool=pool)
        model = cls(ViTConfig(config, num_labels))
        trained = copy.deepcopy(backbone)
        trained._config = config
        for name in getattr(source, "_frozen", ()):
            trained.get_parameter(name).requires_grad_(True)
        model.backbone = trained
        model.to(device=trained.class_token.device, dtype=trained.class_token.dtype)
        if frozen:
            model.freeze()
        return model

    def freeze(self, frozen: bool = True) -> None:
        """Leave the backbone as it is: no gradients, no dropout; only the head trains. False: train it again."""
        parameters = dict(self.backbone.named_parameters())
        if frozen:
            self._frozen |= {name for name, parameter in parameters.items() if parameter.requires_grad}
        for name in self._frozen & parameters.keys():
            parameters[name].requires_grad_(not frozen)
        self._frozen = self._frozen if frozen else frozenset()
        self.train(self.training)

    def train(self, mode: bool = True) -> ViT:
        """As in nn.Module; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self._frozen:
            self.backbone.eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, E), what the head reads."""
        return self.backbone.pooled(images)

    def forward(
        self,
        images: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Classify.

        Args:
            images: (B, C, H, W), floating point; H and W multiples of the patch. pixel_values: the same.
            labels: see `labels`; with them there is a loss.
            return_dict: see `outputs`.

        Returns:
            logits (B, num_labels); with pixel_values or labels a `ClassifierOutput`.

        Raises:
            InputTypeError, InputError: images or labels of another type, shape or range.
            UnsupportedError: a model without a head.
        """
        logits = self._logits(either("pixel_values", images, pixel_values))
        loss = None if labels is None else self._config.labels.loss(logits, labels)
        by_name = pixel_values is not None or labels is not None
        return answer(ClassifierOutput(loss, logits), logits, by_name=by_name, return_dict=return_dict)

    def _logits(self, images: Tensor) -> Tensor:
        if self.head is None:
            raise UnsupportedError("the model has no head; use features(), or from_pretrained(..., num_labels=10)")
        logits: Tensor = self.head(self.features(images))
        return logits

    def inspect(self, images: Tensor, *, need_weights: bool = True) -> Outputs:
        """The outputs of all layers, and what each attends to. Images as in `forward`."""
        return self.backbone.inspect(images, need_weights=need_weights)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, a scalar: cross entropy for labels that are classes.

        Args:
            images: as in `forward`. labels: see `labels`; int64 (B), below num_labels, -100 is ignored.

        Raises:
            InputTypeError, InputError: images or labels of another type, shape or range.
            UnsupportedError: a model without a head.
        """
        loss: Tensor = self._config.labels.loss(self._logits(images), labels)
        return loss

    def resized(self, tensors: dict[str, Tensor], before: Any, extend: str) -> dict[str, Tensor]:
        return self.backbone.resized(super().resized(tensors, before, extend), before.backbone, "backbone.positions")

    def head_prefixes(self) -> tuple[str, ...]:
        """The head may start fresh."""
        return ("head.",)


def backbone_config(backbone: ImageBackbone, *, pool: str | None = None) -> ImageConfig:
    """A backbone's config with the attention that it has now, and another pool if given."""
    config = backbone._config
    return dataclasses.replace(config, encoder=backbone.encoder.config, pool=config.pool if pool is None else pool)


def accuracy(logits: Tensor, labels: Tensor, *, top: int = 1) -> float:
    """The share of rows whose label is among the `top` largest logits.

    Args:
        logits: (B, classes). labels: int64 (B).
    """
    check_labels(labels, logits.shape[0], logits.shape[1])
    best = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(dim=1).float().mean().item()
