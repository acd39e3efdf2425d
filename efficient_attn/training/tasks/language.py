"""Writing: characters of a text, and translation of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...methods import Hybrid, parse
from ...models import CausalLM, CausalLMConfig, Seq2Seq, Seq2SeqConfig, TransformerConfig
from ..data import characters, translation
from ..data.base import PAD, Batch, Splits
from ..data.text import BEGIN, END
from ..task import Task, Values, option


@dataclass(frozen=True)
class LanguageModelling(Task):
    """A :class:`CausalLM` on characters."""

    name: ClassVar[str] = "lm"
    help: ClassVar[str] = "The next character of a text."
    data_help: ClassVar[str | None] = "A text file. Default: the descriptions of the language that come with Python."
    defaults: ClassVar[Mapping[str, Any]] = {"steps": 500, "batch": 16, "lr": 2e-3}

    data: str | None = None
    length: int = option(256, "Characters of a piece.")
    dim: int = option(96, "Features of the model.")
    layers: int = option(3, "Layers of the model.")
    heads: int = option(4, "Attention heads.")
    dropout: float = option(0.0, "Dropout.")

    def splits(self, seed: int) -> Splits:
        return characters.load(None if self.data is None else Path(self.data), length=self.length)

    def model(self, about: Mapping[str, Any]) -> CausalLM:
        decoder = TransformerConfig(
            self.dim, self.layers, self.heads, dropout=self.dropout, causal=True, attention=self.attention, rotary=True
        )
        return CausalLM(
            CausalLMConfig(about["vocabulary"], about["max_length"], decoder, positions="none", dropout=self.dropout)
        )

    def loss(self, model: CausalLM, batch: Batch) -> Tensor:
        return _cross_entropy(model(batch["tokens"]), batch["targets"]).mean()

    def weight(self, batch: Batch, about: Mapping[str, Any]) -> float:
        return batch["targets"].numel()

    def evaluate(self, model: CausalLM, batch: Batch, about: Mapping[str, Any]) -> Values:
        logits = model(batch["tokens"])
        right = logits.argmax(dim=-1) == batch["targets"]
        return {
            "loss": _cross_entropy(logits, batch["targets"]).mean(dim=1),
            "accuracy": right.float().mean(dim=1),
        }

    def summary(self, values: Values, about: Mapping[str, Any]) -> dict[str, float]:
        found = super().summary(values, about)
        return found | {"bits_per_character": found["loss"] / math.log(2)}


@dataclass(frozen=True)
class Translation(Task):
    """A :class:`Seq2Seq` model on numbers; `attention` is the encoder's."""

    name: ClassVar[str] = "translate"
    help: ClassVar[str] = "Numbers from one notation to another: digits, english, german."
    defaults: ClassVar[Mapping[str, Any]] = {"steps": 1000, "batch": 64, "lr": 2e-3}
    metric: ClassVar[str] = "exact"
    higher: ClassVar[bool] = True

    decoder_attention: str = option("dense", "Spec of the decoder's causal attention.")
    source: str = option("english", f"Notation to read: {', '.join(translation.NOTATIONS)}.")
    target: str = option("digits", "Notation to write.")
    below: int = option(10_000, "Numbers are below this.")
    examples: int = option(8_000, "Training examples; the numbers left are for validation and test.")
    dim: int = option(64, "Features of the model.")
    layers: int = option(2, "Layers of encoder and of decoder.")
    heads: int = option(4, "Attention heads.")
    dropout: float = option(0.0, "Dropout.")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse(self.decoder_attention)
        for notation in (self.source, self.target):
            if notation not in translation.NOTATIONS:
                raise InputError(f"there is no notation {notation!r}; choose from {', '.join(translation.NOTATIONS)}")

    def splits(self, seed: int) -> Splits:
        return translation.load(seed, source=self.source, target=self.target, below=self.below, train=self.examples)

    def model(self, about: Mapping[str, Any]) -> Seq2Seq:
        def part(**kind: Any) -> TransformerConfig:
            return TransformerConfig(
                self.dim, self.layers, self.heads, dropout=self.dropout, mlp_dim=2 * self.dim, **kind
            )

        return Seq2Seq(
            Seq2SeqConfig(
                about["vocabulary"],
                about["max_length"],
                part(attention=self.attention),
                part(attention=self.decoder_attention, causal=True, cross_attention=True),
                scaled=False,
                dropout=self.dropout,
                pad_token_id=PAD,
                eos_token_id=END,
                start_token_id=BEGIN,
            )
        )

    def loss(self, model: Seq2Seq, batch: Batch) -> Tensor:
        losses, inside = self._losses(model, batch)
        return losses.sum() / inside.sum()

    def weight(self, batch: Batch, about: Mapping[str, Any]) -> float:
        return int((batch["target"][:, 1:] != PAD).sum())

    def evaluate(self, model: Seq2Seq, batch: Batch, about: Mapping[str, Any]) -> Values:
        losses, inside = self._losses(model, batch)
        target = batch["target"]
        written = model.generate(
            batch["source"],
            batch["source"] != PAD,
            max_new_tokens=about["max_length"] - 1,
            use_cache=not isinstance(parse(self.decoder_attention), Hybrid),
        )
        width = max(written.shape[1], target.shape[1])
        written, target = (F.pad(ids, (0, width - ids.shape[1]), value=PAD) for ids in (written, target))
        return {
            "loss": losses.sum(dim=1) / inside.sum(dim=1),
            "exact": (written == target).all(dim=1).float(),
        }

    def _losses(self, model: Seq2Seq, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss at each place of the target `[B, N - 1]`, 0 behind its end, and where it is not behind."""
        read, target = batch["target"][:, :-1], batch["target"][:, 1:]
        inside = target != PAD
        logits = model(batch["source"], read, batch["source"] != PAD)
        return torch.where(inside, _cross_entropy(logits, target), 0.0), inside


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses `[B, N]` of logits `[B, N, V]`."""
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
