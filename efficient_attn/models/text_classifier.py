"""`TextClassifier`: BERT, RoBERTa, MiniLM: an encoder of text, with a classifier on top or as an embedding of texts.

    logits = W tanh(P h_0 + p) + b     h_0: the first token's output (Devlin et al. 2019)

Letters: B batch, N tokens, E features, L labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedError
from .base import Model
from .embeddings import Embeddings, as_padding
from .labels import LabelConfig
from .outputs import ClassifierOutput, answer, either
from .transformer import Outputs, Transformer, TransformerConfig, initialise

POOLING = ("first", "mean")


@dataclass(frozen=True)
class TextClassifierConfig:
    """Sizes and kinds of a `TextClassifier`.

    Fields:
        vocab_size, max_len: tokens of the vocabulary, and the longest text.
        encoder: the layers.
        num_labels: L; None for a model without a classifier.
        pooling: what represents the text: the "first" token, or the "mean" of all.
        pooler: a linear layer and tanh between that and the classifier.
        types: number of token types (segments); 0 for none.
        positions: "learned", "sinusoidal", or "none" (with encoder.rotary, say).
        pad_token_id: of padding, None: only the mask counts.
        skip_padding: positions count tokens that are not padding, after as many rows of the table as pad_token_id + 1,
            as in RoBERTa.
        embedding_norm: a LayerNorm on the embeddings.
        dropout: of embeddings and before the classifier.
        labels: their names and what the loss makes of them.
    """

    vocab_size: int = 30522
    max_len: int = 512
    encoder: TransformerConfig = field(default_factory=TransformerConfig)
    num_labels: int | None = None
    pooling: str = "first"
    pooler: bool = True
    types: int = 0
    positions: str = "learned"
    pad_token_id: int | None = None
    skip_padding: bool = False
    embedding_norm: bool = True
    dropout: float = 0.0
    labels: LabelConfig = field(default_factory=LabelConfig)

    def __post_init__(self) -> None:
        if self.encoder.causal or self.encoder.cross_attention:
            raise InputError("a TextClassifier reads in both directions; its encoder is not causal, without memory")
        if self.pooling not in POOLING:
            raise InputError(f"pooling must be one of {', '.join(POOLING)}; got {self.pooling!r}")
        if self.skip_padding and self.pad_token_id is None:
            raise InputError("skip_padding needs a pad_token_id")
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


class TextClassifier(Model):
    """Classifies texts, or embeds them.

        model(**tokenizer(texts, padding=True, return_tensors="pt"), labels=labels).loss.backward()

    ids (B, N) -> embeddings -> `encoder` -> pooling -> (`pooler`) -> (`classifier`) -> logits (B, L)
    """

    config_class = TextClassifierConfig

    def __init__(self, config: TextClassifierConfig) -> None:
        super().__init__(config)
        dim, eps = config.encoder.hidden_dim, config.encoder.norm_eps
        self.embeddings = Embeddings(
            config.vocab_size,
            dim,
            config.max_len,
            positions=config.positions,
            offset=config.pad_token_id + 1 if config.skip_padding and config.pad_token_id is not None else 0,
            types=config.types,
            norm_eps=eps if config.embedding_norm else None,
            dropout=config.dropout,
        )
        self.encoder = Transformer(config.encoder)
        self.pooler = nn.Linear(dim, dim) if config.pooler else None
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = None if config.num_labels is None else nn.Linear(dim, config.num_labels)
        for linear in (self.pooler, self.classifier):
            if linear is not None:
                initialise(linear)

    def forward(
        self,
        ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Classify.

        Args:
            ids: int64 (B, N). input_ids: the same.
            attention_mask: bool or int (B, N), 1 = a token, 0 = padding; None: no padding.
            token_type_ids: int64 (B, N), for a model with types; zeros say nothing and are taken by any.
            labels: see `labels`; with them there is a loss.
            return_dict: see `outputs`.

        Returns:
            logits (B, L); with input_ids by name or labels a `ClassifierOutput`.

        Raises:
            UnsupportedError: the model has no classifier.
            InputError, InputTypeError: ids, masks and labels that do not fit.
        """
        logits = self._logits(either("input_ids", ids, input_ids), attention_mask, token_type_ids)
        loss = None if labels is None else self._config.labels.loss(logits, labels)
        by_name = input_ids is not None or labels is not None
        return answer(ClassifierOutput(loss, logits), logits, by_name=by_name, return_dict=return_dict)

    def _logits(self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None) -> Tensor:
        if self.classifier is None:
            raise UnsupportedError(
                "the model has no classifier; use encode() or embed(), or from_pretrained(..., num_labels=2)"
            )
        hidden = self.encode(input_ids, attention_mask, token_type_ids)
        found: Tensor = self.classifier(self.dropout(self.pool(hidden, attention_mask)))
        return found

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """The encoder's output (B, N, E). Arguments as in `forward`."""
        x, padding = self._embed(input_ids, attention_mask, token_type_ids)
        found: Tensor = self.encoder(x, key_padding_mask=padding)
        return found

    def inspect(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        need_weights: bool = True,
    ) -> Outputs:
        """The outputs of all layers, and what each attends to. Arguments as in `forward`."""
        x, padding = self._embed(input_ids, attention_mask, token_type_ids)
        found: Outputs = self.encoder(x, key_padding_mask=padding, return_hidden=True, need_weights=need_weights)
        return found

    def pool(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The vector of each text, (B, E), of the encoder's output (B, N, E)."""
        pooled = hidden[:, 0] if self._config.pooling == "first" else mean_of_tokens(hidden, attention_mask)
        return pooled if self.pooler is None else torch.tanh(self.pooler(pooled))

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        normalize: bool = True,
    ) -> Tensor:
        """The mean of each text's token outputs, (B, E), of length 1 unless normalize=False: a sentence embedding.

        Reimers and Gurevych 2019. Arguments as in `forward`.
        """
        mean = mean_of_tokens(self.encode(input_ids, attention_mask, token_type_ids), attention_mask)
        return nn.functional.normalize(mean, dim=-1) if normalize else mean

    def head_prefixes(self) -> tuple[str, ...]:
        return ("classifier.", "pooler.")

    def _embed(self, ids: Tensor, attention_mask: Tensor | None, types: Tensor | None) -> tuple[Tensor, Tensor | None]:
        config = self._config
        if config.skip_padding:
            tokens = ids != config.pad_token_id
            positions = (tokens.long().cumsum(-1) * tokens) - 1  # -1 for padding, whose vector is the row before
        else:
            positions = torch.arange(ids.shape[-1], device=ids.device)
        x = self.embeddings(ids, positions, types=types)
        return x, as_padding("attention_mask", attention_mask, ids)


def mean_of_tokens(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mean over tokens that are not padding, (B, N, E) -> (B, E); 0 for a text without any."""
    if attention_mask is None:
        return hidden.mean(1)
    tokens = (attention_mask != 0)[..., None]
    total = hidden.masked_fill(~tokens, 0.0).sum(1)
    return total / tokens.sum(1).clamp(min=1).to(hidden.dtype)
