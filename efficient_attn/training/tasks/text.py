"""Classification of sequences: ListOps, and texts read byte by byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models import TextClassifier, TextClassifierConfig, TransformerConfig
from ..data import listops, text
from ..data.base import Batch, Splits
from ..task import Task, Values, option


@dataclass(frozen=True)
class Classification(Task):
    """A :class:`TextClassifier` on token sequences of different lengths."""

    metric: ClassVar[str] = "accuracy"
    higher: ClassVar[bool] = True
    pooling: ClassVar[str] = "mean"

    dim: int = option(64, "Features of the model.")
    layers: int = option(2, "Layers of the model.")
    heads: int = option(4, "Attention heads.")
    dropout: float = option(0.1, "Dropout.")

    def model(self, about: Mapping[str, Any]) -> TextClassifier:
        encoder = TransformerConfig(
            self.dim, self.layers, self.heads, dropout=self.dropout, attention=self.attention, mlp_dim=2 * self.dim
        )
        return TextClassifier(
            TextClassifierConfig(
                about["vocabulary"],
                about["max_length"],
                encoder,
                num_labels=about["classes"],
                pooling=self.pooling,
                pooler=False,
                embedding_norm=False,
                dropout=self.dropout,
            )
        )

    def loss(self, model: TextClassifier, batch: Batch) -> Tensor:
        return F.cross_entropy(_logits(model, batch), batch["label"])

    def evaluate(self, model: TextClassifier, batch: Batch, about: Mapping[str, Any]) -> Values:
        return classified(_logits(model, batch), batch["label"])


@dataclass(frozen=True)
class ListOps(Classification):
    name: ClassVar[str] = "listops"
    help: ClassVar[str] = "Value of nested operators on digits (Long Range Arena), generated."
    defaults: ClassVar[Mapping[str, Any]] = {"steps": 500, "batch": 16, "lr": 1e-3}
    # The outermost operator, of which the answer is the value.
    pooling: ClassVar[str] = "first"

    min_length: int = option(500, "Fewest tokens.")
    max_length: int = option(2000, "Most tokens.")
    depth: int = option(10, "Greatest depth of nesting.")
    max_args: int = option(10, "Most arguments of an operator.")
    examples: int = option(96_000, "Training examples.")
    held_out: int = option(2_000, "Examples for validation, and as many for the test.")

    def splits(self, seed: int) -> Splits:
        return listops.load(
            seed,
            train=self.examples,
            held_out=self.held_out,
            min_length=self.min_length,
            max_length=self.max_length,
            max_depth=self.depth,
            max_args=self.max_args,
        )


@dataclass(frozen=True)
class Bytes(Classification):
    name: ClassVar[str] = "bytes"
    help: ClassVar[str] = "Class of a text, read byte by byte."
    data_help: ClassVar[str | None] = (
        "A folder with a folder of texts per class, a .csv with columns text and label, or a hub id. "
        "Default: of which part of Python's library is a piece of source?"
    )
    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 5, "batch": 32, "lr": 1e-3}

    data: str | None = None
    max_length: int = option(1024, "Bytes of a text that are read.")
    labels_per_class: int | None = option(None, "Use only so many training examples of each class.")

    def splits(self, seed: int) -> Splits:
        return text.load(seed, self.data, max_length=self.max_length, labels_per_class=self.labels_per_class)


def classified(logits: Tensor, labels: Tensor) -> Values:
    """Loss and correctness of each example."""
    logits = logits.float()
    return {
        "loss": F.cross_entropy(logits, labels, reduction="none"),
        "accuracy": (logits.argmax(dim=-1) == labels).float(),
    }


def _logits(model: TextClassifier, batch: Batch) -> Tensor:
    tokens, lengths = batch["tokens"], batch["lengths"]
    inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    logits: Tensor = model(tokens, inside)
    return logits.float()


__all__ = ["Bytes", "Classification", "ListOps", "classified"]
