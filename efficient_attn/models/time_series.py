"""A time series in, an answer at its last step: `TimeSeriesTransformer`.

Letters: T time, B batch, F features, E features of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .base import Model
from .forecasting import check_positive, check_series
from .labels import REGRESSION, LabelConfig
from .outputs import ClassifierOutput, answer
from .positions import check_length, make_positions
from .transformer import Specs, Transformer, TransformerConfig


@dataclass(frozen=True)
class TimeSeriesConfig:
    """A `TimeSeriesTransformer`.

    Fields:
        input_dim, output_dim: features of a step, and of the answer.
        batch_first: (batch, time, features) instead of (time, batch, features).
        positions: "sinusoidal", "learned" or "none" (for an encoder with rotary positions).
        max_len: longest sequence.
        encoder: the Transformer; its dropout is that of the embedding too.
        labels: what the loss makes of targets; floating-point ones are a regression unless it says otherwise.

    Raises:
        InputError: values out of range.
    """

    input_dim: int = 1
    output_dim: int = 1
    batch_first: bool = False
    positions: str = "sinusoidal"
    max_len: int = 4096
    encoder: TransformerConfig = field(default_factory=TransformerConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)

    def __post_init__(self) -> None:
        check_positive(self, "input_dim", "output_dim", "max_len")
        self.labels.check(self.output_dim)

    @property
    def id2label(self) -> dict[int, str]:
        """The labels' names by number."""
        return self.labels.id2label(self.output_dim)

    @property
    def label2id(self) -> dict[str, int]:
        """The labels' numbers by name."""
        return {name: number for number, name in self.id2label.items()}


class TimeSeriesTransformer(Model):
    """Reads a sequence of steps and answers at the last one: the next value, a class, a state.

        model = TimeSeriesTransformer(input_dim=3, hidden_dim=64, nhead=4, num_layers=2)
        model(torch.randn(100, 8, 3))  # (time, batch, features) -> (batch, output_dim)

    Args:
        input_dim: features of a step, or a whole `TimeSeriesConfig` and nothing else.
        hidden_dim, nhead, num_layers: of the Transformer.
        output_dim, batch_first, max_len: see `TimeSeriesConfig`.
        dropout: of the Transformer. attention: a spec, or one a layer.
        causal: each step sees itself and those before.

    Raises:
        InputError: values out of range. UnsupportedError: causal with an attention that cannot be.
    """

    config_class = TimeSeriesConfig

    def __init__(
        self,
        input_dim: int | TimeSeriesConfig,
        hidden_dim: int = 64,
        nhead: int = 4,
        num_layers: int = 2,
        *,
        output_dim: int = 1,
        dropout: float = 0.1,
        batch_first: bool = False,
        max_len: int = 4096,
        causal: bool = False,
        attention: Specs = "dense",
    ) -> None:
        if isinstance(input_dim, TimeSeriesConfig):
            config = input_dim
        else:
            encoder = TransformerConfig(
                hidden_dim, num_layers, nhead, dropout=dropout, causal=causal, attention=attention
            )
            config = TimeSeriesConfig(input_dim, output_dim, batch_first, max_len=max_len, encoder=encoder)
        super().__init__(config)
        E = config.encoder.hidden_dim
        self.embedding = nn.Linear(config.input_dim, E)
        self.positions = make_positions(config.positions, config.max_len, E)
        self.dropout = nn.Dropout(config.encoder.dropout)
        self.encoder = Transformer(config.encoder)
        self.head = nn.Linear(E, config.output_dim)

    def forward(
        self,
        series: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """The answer at the last step.

        Args:
            series: (T, B, F), or (B, T, F) with batch_first, floating point.
            key_padding_mask: bool (B, T), True = padding; the answer is then at the last step that is not padding.
            labels: int64 (B), classes, or floating point (B, output_dim); with them there is a loss.
            return_dict: see `outputs`.

        Returns:
            (B, output_dim); with labels a `ClassifierOutput`.

        Raises:
            InputTypeError, InputError: other shapes or dtypes, no step, or more than max_len; labels that do not fit.
        """
        logits = self._answer(series, key_padding_mask)
        loss = None if labels is None else self._config.labels.loss(logits, labels, of_numbers=REGRESSION)
        return answer(ClassifierOutput(loss, logits), logits, by_name=labels is not None, return_dict=return_dict)

    def _answer(self, series: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        config: TimeSeriesConfig = self._config
        x = check_series(series, config.input_dim, "(batch, time, {})" if config.batch_first else "(time, batch, {})")
        x = x if config.batch_first else x.transpose(0, 1)
        B, T = x.shape[:2]
        check_length(T, config.max_len)
        if T < 1:
            raise InputError("a series needs at least one step")
        x = self.embedding(x.to(self.embedding.weight.dtype))
        if self.positions is not None:
            x = x + self.positions(torch.arange(T, device=x.device)).to(x.dtype)
        hidden = self.encoder(self.dropout(x), key_padding_mask=key_padding_mask)
        if key_padding_mask is None:
            last = hidden[:, -1]
        else:
            steps = torch.arange(T, device=x.device)
            at = torch.where(key_padding_mask, -1, steps).amax(dim=1).clamp(min=0)
            last = hidden[torch.arange(B, device=x.device), at]
        answer: Tensor = self.head(last)
        return answer

    def loss(self, series: Tensor, target: Tensor, *, key_padding_mask: Tensor | None = None) -> Tensor:
        """The loss of a batch, a scalar: mean squared error for numbers, cross entropy for int64 (B).

        Args:
            series, key_padding_mask: as in `forward`. target: (B, output_dim), or what the config's labels are.

        Raises:
            InputTypeError, InputError: as `forward`, or a target of another shape.
        """
        answer = self._answer(series, key_padding_mask)
        labels: LabelConfig = self._config.labels
        numbers = target.is_floating_point() and labels.problem_type in (None, REGRESSION)
        if numbers and target.shape != answer.shape:
            raise InputError(f"target must be {tuple(answer.shape)}, got {tuple(target.shape)}")
        return labels.loss(answer, target, of_numbers=REGRESSION)

    def head_prefixes(self) -> tuple[str, ...]:
        """The head may start fresh."""
        return ("head.",)
