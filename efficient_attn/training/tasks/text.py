"""Classification of sequences: ListOps, texts read byte by byte, and texts by a pretrained model and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import InputError, UnsupportedError
from ...models import TextClassifier, TextClassifierConfig, TransformerConfig, checkpoints
from ..data import listops, text
from ..data.base import Batch, Splits
from ..task import Values, option
from .classes import OfClasses, classified


@dataclass(frozen=True)
class Classification(OfClasses):
    """A :class:`TextClassifier` on token sequences of different lengths."""

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
                labels=self.labels(about),
            )
        )

    def loss(self, model: TextClassifier, batch: Batch) -> Tensor:
        return text_loss(model, batch)

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


@dataclass(frozen=True)
class Text(OfClasses):
    name: ClassVar[str] = "text"
    help: ClassVar[str] = "Class of a text, by a pretrained model (BERT, RoBERTa, MiniLM) and its tokenizer."
    data_help: ClassVar[str | None] = (
        "A folder with a folder of texts per class, a .csv, .tsv or .jsonl with text and label, a folder of those "
        "called train, valid and test, or a hub id. Needed."
    )
    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 3, "batch": 16, "lr": 1e-4, "weight_decay": 0.01}
    metric: ClassVar[str] = "f1"

    data: str | None = None
    checkpoint: str | None = option(None, "Folder or hub id of the pretrained model and its tokenizer. Needed.")
    max_length: int = option(128, "Tokens of a text that are read; more than the model's own extend its positions.")
    pooling: str = option("mean", "What stands for the text: the first token, or the mean of all.")
    pooler: bool = option(False, "Keep the model's pooler between that and the classifier.")
    extend: str = option("tile", "How positions are extended: tile or interpolate.")
    labels_per_class: int | None = option(None, "Use only so many training examples of each class.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None or self.checkpoint is None:
            raise InputError("text needs --data and --checkpoint, a pretrained model's folder or hub id; see --help")

    def splits(self, seed: int) -> Splits:
        tokenizer = self.tokenizer()

        def encode(texts: Any) -> list[Tensor]:
            words = [one.decode(errors="replace") if isinstance(one, bytes) else one for one in texts]
            found = tokenizer(words, truncation=True, max_length=self.max_length)["input_ids"]
            return [torch.tensor(ids) for ids in found]

        return text.load(
            seed,
            self.data,
            max_length=self.max_length,
            labels_per_class=self.labels_per_class,
            encoder=encode,
            vocabulary=len(tokenizer),
        )

    def reader(self, about: Mapping[str, Any]) -> Any:
        return self.tokenizer()

    def tokenizer(self) -> Any:
        """The pretrained model's.

        Raises:
            UnsupportedError: transformers is not installed. InputError: there is none.
        """
        try:
            import transformers
        except ModuleNotFoundError as error:
            raise UnsupportedError(
                "a pretrained model's tokenizer needs transformers; pip install 'efficient-attn[models]'"
            ) from error
        try:
            return transformers.AutoTokenizer.from_pretrained(self.checkpoint)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--checkpoint {self.checkpoint} gives no tokenizer: {error}") from error

    def model(self, about: Mapping[str, Any]) -> TextClassifier:
        assert self.checkpoint is not None
        changes: dict[str, Any] = {
            "pooling": self.pooling,
            "num_labels": about["classes"],
            "labels": self.labels(about),
        }
        folder = checkpoints.locate(self.checkpoint, revision=None, local_files_only=False)
        own = TextClassifier.from_pretrained(folder)
        if own.config.max_len < self.max_length:
            changes["max_len"] = self.max_length
        if own.config.vocab_size < about["vocabulary"]:
            raise InputError(
                f"the tokenizer of {self.checkpoint} has {about['vocabulary']} tokens, the model "
                f"{own.config.vocab_size}: they do not belong together"
            )
        if not self.pooler:
            changes["pooler"] = False
        return TextClassifier.from_pretrained(folder, attention=self.attention, extend=self.extend, **changes)

    def loss(self, model: TextClassifier, batch: Batch) -> Tensor:
        return text_loss(model, batch)

    def evaluate(self, model: TextClassifier, batch: Batch, about: Mapping[str, Any]) -> Values:
        return classified(_logits(model, batch), batch["label"])


def text_loss(model: TextClassifier, batch: Batch) -> Tensor:
    """The loss that the model's config makes of a batch."""
    loss: Tensor = model.config.labels.loss(_logits(model, batch), batch["label"])
    return loss


def _logits(model: TextClassifier, batch: Batch) -> Tensor:
    tokens, lengths = batch["tokens"], batch["lengths"]
    inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    padding = model.config.pad_token_id
    logits: Tensor = model(tokens if padding is None else tokens.masked_fill(~inside, padding), inside)
    return logits.float()


__all__ = ["Bytes", "Classification", "ListOps", "Text"]
