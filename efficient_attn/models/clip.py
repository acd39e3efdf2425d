"""CLIP: images and texts as unit vectors whose cosine says whether they belong together.

Radford et al. 2021, arXiv:2103.00020.

Letters: B batch, N tokens, C channels, H height, W width, E features of a tower, P features of the common space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from .base import Model
from .contrastive import contrastive_loss
from .embeddings import as_padding, check_ids
from .outputs import CLIPOutput, answer, either
from .positions import LearnedPositions, check_length
from .transformer import Transformer, TransformerConfig
from .vision import ImageBackbone, ImageConfig

INITIAL_SCALE = math.log(1 / 0.07)


@dataclass(frozen=True)
class TextTowerConfig:
    """CLIP's text tower.

    Fields:
        vocab_size: token ids. max_len: longest text, in tokens.
        eos_token_id: a text is read at the first token of this id; None: at the first of its largest id, as in the
            original vocabulary, where that is the end of the text.
        encoder: the Transformer; causal in CLIP. Methods that cannot be causal need causal=False.

    Raises:
        InputError: values out of range.
    """

    vocab_size: int = 49408
    max_len: int = 77
    eos_token_id: int | None = 49407
    encoder: TransformerConfig = field(default_factory=lambda: TransformerConfig(causal=True))

    def __post_init__(self) -> None:
        if self.vocab_size < 1 or self.max_len < 1:
            raise InputError(f"vocab_size and max_len must be >= 1; got {self.vocab_size}, {self.max_len}")


class TextTower(nn.Module):
    """Token ids to features: embedding and learned positions, Transformer, the token that ends the text."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self._config = config
        self.embedding = nn.Embedding(config.vocab_size, config.encoder.hidden_dim)
        self.positions = LearnedPositions(config.max_len, config.encoder.hidden_dim)
        self.encoder = Transformer(config.encoder)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, N) ids -> (B, E). Arguments and errors are those of `CLIP.encode_text`."""
        config, N = self._config, input_ids.shape[-1]
        check_ids("input_ids", input_ids, config.vocab_size)
        check_length(N, config.max_len)
        padding = as_padding("attention_mask", attention_mask, input_ids)
        x = self.embedding(input_ids) + self.positions(torch.arange(N, device=input_ids.device))
        hidden: Tensor = self.encoder(x, key_padding_mask=padding)
        return hidden[torch.arange(input_ids.shape[0], device=input_ids.device), self._ends(input_ids)]

    def _ends(self, input_ids: Tensor) -> Tensor:
        """(B): where each text ends.

        Raises:
            InputError: a text without its end token, as of a tokenizer that cut it: argmax would say 0, where a causal
                tower knows nothing but the first token, so that all such texts had one vector. While torch.compile
                traces, values are not looked at.
        """
        end = self._config.eos_token_id
        is_end = input_ids == (input_ids.amax(dim=1, keepdim=True) if end is None else end)
        if not torch.compiler.is_compiling() and input_ids.shape[0]:
            # Without its id the end token is the largest one of the vocabulary, hence the same in all texts.
            largest = input_ids.amax(dim=1)
            cut = largest != largest.max() if end is None else ~is_end.any(dim=1)
            if cut.any():
                rows = cut.nonzero().flatten().tolist()
                raise InputError(
                    f"{len(rows)} of {len(cut)} texts (row {rows[0]} first) lack the end token "
                    f"{int(largest.max()) if end is None else end}, at which the tower reads them; cut texts to "
                    "max_len - 1 tokens and put it after them, as tokenizers do with truncation=True"
                )
        return is_end.int().argmax(dim=1)


@dataclass(frozen=True)
class CLIPConfig:
    """A `CLIP`.

    Fields:
        image, text: the towers.
        projection_dim: P.
        logit_scale: log of the cosine's factor at the start of training; max_scale: largest factor.

    Raises:
        InputError: values out of range.
    """

    image: ImageConfig = field(default_factory=lambda: ImageConfig(patch_bias=False, embedding_norm=True))
    text: TextTowerConfig = field(default_factory=TextTowerConfig)
    projection_dim: int = 512
    logit_scale: float = INITIAL_SCALE
    max_scale: float = 100.0

    def __post_init__(self) -> None:
        if self.projection_dim < 1 or not self.max_scale >= 1:
            raise InputError(f"projection_dim and max_scale must be >= 1; got {self.projection_dim}, {self.max_scale}")


class CLIP(Model):
    """Matches images and texts.

        model = CLIP(CLIPConfig(image=ImageConfig(...), text=TextTowerConfig(...)))
        model.loss(images, ids).backward()
        classes = model.class_embeddings(prompts, labels)       # once
        model.classify(images, classes).argmax(dim=1)           # zero-shot
        outputs = model(**processor(text=texts, images=pictures, return_tensors="pt", padding=True), return_loss=True)
        outputs.loss, outputs.logits_per_image.softmax(dim=1)   # as transformers' CLIPModel

    The text tower is causal, which not every method can be: set_attention({"image.encoder": "nystrom"}) changes the
    image tower alone. `from_pretrained` reads transformers' CLIP checkpoints too.
    """

    config_class = CLIPConfig

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.image = ImageBackbone(config.image)
        self.text = TextTower(config.text)
        self.image_projection = nn.Linear(config.image.encoder.hidden_dim, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text.encoder.hidden_dim, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale)))
        for linear in (self.image_projection, self.text_projection):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> unit vectors (B, P).

        Raises:
            InputTypeError, InputError: no floating-point images of a whole number of patches.
        """
        return F.normalize(self.image_projection(self.image.pooled(images)), dim=1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids to unit vectors (B, P).

        Args:
            input_ids: int64 (B, N), N <= max_len, each row with its end token, padded on the right.
            attention_mask: bool or int (B, N), 1 = a token, 0 = padding; a causal tower needs none.

        Raises:
            InputTypeError, InputError: ids of another type or out of range, too many tokens, or no end token.
        """
        return F.normalize(self.text_projection(self.text(input_ids, attention_mask=attention_mask)), dim=1)

    def forward(
        self,
        images: Tensor | None = None,
        ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Compare images and texts: `scale()` times the cosine.

        Args:
            images: as in `encode_image`. pixel_values: the same.
            ids, attention_mask: as in `encode_text`. input_ids: the ids.
            return_loss: the contrastive loss too; image b belongs to text b.
            return_dict: see `outputs`.

        Returns:
            logits (images, texts); with pixel_values, input_ids by name or return_loss a `CLIPOutput`.

        Raises:
            InputTypeError, InputError: as the encoders; with return_loss unequal numbers, or a single pair.
        """
        if return_loss and self.training:
            self._clamp()
        image = self.encode_image(either("pixel_values", images, pixel_values))
        text = self.encode_text(either("input_ids", ids, input_ids), attention_mask=attention_mask)
        logits = self.scale() * image @ text.T
        loss = contrastive_loss(image, text, self.scale()) if return_loss else None
        by_name = pixel_values is not None or input_ids is not None or bool(return_loss)
        return answer(CLIPOutput(loss, logits, logits.T, text, image), logits, by_name=by_name, return_dict=return_dict)

    def scale(self) -> Tensor:
        """The cosine's factor, e^logit_scale, at most max_scale."""
        return self.logit_scale.clamp(max=math.log(self._config.max_scale)).exp()

    def _clamp(self) -> None:
        """Put logit_scale back below its limit, beyond which it has no gradient and would stay."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(self._config.max_scale))

    def loss(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The contrastive loss of a batch of pairs, a scalar; image b belongs to text b.

        In training it first puts logit_scale back to at most log(max_scale), as the paper does after each step.

        Raises:
            InputTypeError, InputError: as the encoders, unequal numbers of images and texts, or a single pair.
        """
        if self.training:
            self._clamp()
        image, text = self.encode_image(images), self.encode_text(input_ids, attention_mask=attention_mask)
        return contrastive_loss(image, text, self.scale())

    def resized(self, tensors: dict[str, Tensor], before: Any, extend: str) -> dict[str, Tensor]:
        return self.image.resized(super().resized(tensors, before, extend), before.image, "image.positions")

    # --- zero-shot classification and retrieval ---

    @torch.no_grad()
    def class_embeddings(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """A unit vector for each class, the mean of its prompts: the weights of a zero-shot classifier.

        Args:
            input_ids, attention_mask: prompts, as in `encode_text`.
            labels: int64 (prompts): the class of each, 0 .. classes - 1, each with at least one prompt.

        Returns:
            (classes, P).

        Raises:
            InputTypeError, InputError: as `encode_text`, or labels of another type or shape.
        """
        if labels.dtype != torch.int64 or labels.shape != input_ids.shape[:1] or not (labels >= 0).all():
            raise InputError(
                f"labels must be int64 ({input_ids.shape[0]},), from 0 on; got {labels.dtype} {tuple(labels.shape)}"
            )
        counts = torch.bincount(labels)
        if not (counts > 0).all():
            raise InputError(f"classes {(counts == 0).nonzero().flatten().tolist()} have no prompt")
        text = self.encode_text(input_ids, attention_mask=attention_mask)
        sums = text.new_zeros(counts.numel(), text.shape[1]).index_add_(0, labels, text)
        return F.normalize(sums, dim=1)

    @torch.no_grad()
    def classify(self, images: Tensor, classes: Tensor) -> Tensor:
        """Logits (B, classes) of images for the vectors of `class_embeddings`."""
        return self.scale() * self.encode_image(images) @ classes.T


def retrieve(queries: Tensor, gallery: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """The k nearest of a gallery for each query: cosines (queries, k), largest first, and indices (queries, k).

    Args:
        queries, gallery: unit vectors (queries, P), (things, P), of either tower.

    Raises:
        InputError: vectors of unequal width, or a k that is not from 1 to the size of the gallery.
    """
    if queries.dim() != 2 or gallery.dim() != 2 or queries.shape[1] != gallery.shape[1]:
        raise InputError(f"vectors must be (n, P) each, got {tuple(queries.shape)} and {tuple(gallery.shape)}")
    if not 1 <= k <= gallery.shape[0]:
        raise InputError(f"k must be from 1 to the {gallery.shape[0]} vectors of the gallery, got {k}")
    found = (queries @ gallery.T).topk(k, dim=1)
    return found.values, found.indices


def recall_at(k: int, queries: Tensor, gallery: Tensor) -> float:
    """The share of queries whose own thing, gallery's row of the same number, is among the k nearest.

    Raises:
        InputError: as `retrieve`, or more queries than things.
    """
    if queries.shape[0] > gallery.shape[0]:
        raise InputError(f"{queries.shape[0]} queries have no own thing each among {gallery.shape[0]}")
    own = torch.arange(queries.shape[0], device=queries.device)[:, None]
    return (retrieve(queries, gallery, k)[1] == own).any(dim=1).float().mean().item()
