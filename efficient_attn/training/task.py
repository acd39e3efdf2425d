"""A task: data, a model, and what is minimised and measured. The fields of a task are its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import InputError
from ..methods import parse
from .data.base import Batch, Splits

Values = dict[str, Tensor]


def option(default: Any, help: str, least: int = 1) -> Any:
    """A field of a task, with what the command line says about it, and its least value if it is a whole number."""
    return field(default=default, metadata={"help": help, "least": least})


@dataclass(frozen=True)
class Task(ABC):
    """Base of the tasks. `efficient-attn train <name>` offers each field as an option.

    Class attributes:
        name, help: on the command line.
        data_help: what `--data` may name; None for a task that makes its data.
        defaults: of :class:`TrainOptions`, for runs of a few minutes on two cores.
        least_batch: fewest examples that the loss can be computed of.
        metric: by which validations are compared, and whether `higher` is better.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    data_help: ClassVar[str | None] = None
    defaults: ClassVar[Mapping[str, Any]] = {}
    least_batch: ClassVar[int] = 1
    metric: ClassVar[str] = "loss"
    higher: ClassVar[bool] = False

    attention: str = option("dense", "Spec of the attention, e.g. bigbird:block=64,window=3.")

    def __post_init__(self) -> None:
        """Raise InputError for options that cannot be; called before anything is loaded."""
        parse(self.attention)
        for one in fields(self):
            value, least = getattr(self, one.name), one.metadata.get("least", 1)
            if one.type in ("int", "int | None") and value is not None and value < least:
                raise InputError(f"--{one.name.replace('_', '-')} must be at least {least}, given {value}")
        if hasattr(self, "dropout") and not 0 <= self.dropout < 1:
            raise InputError(f"--dropout is a part, from 0 to below 1, given {self.dropout}")

    @abstractmethod
    def splits(self, seed: int) -> Splits:
        """The data, divided."""

    @abstractmethod
    def model(self, about: Mapping[str, Any]) -> nn.Module:
        """A fresh model for data that is so (`Splits.about`)."""

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The mean loss of a batch, a scalar, over as many parts as :meth:`weight` says."""

    @abstractmethod
    def evaluate(self, model: Any, batch: Batch, about: Mapping[str, Any]) -> Values:
        """What is measured, a value (or row) for each example: tensors `[B, ...]`."""

    def weight(self, batch: Batch, about: Mapping[str, Any]) -> float:
        """Of how many parts (examples, tokens) the loss is the mean, so that batches can be joined exactly."""
        return len(next(iter(batch.values())))

    def summary(self, values: Values, about: Mapping[str, Any]) -> dict[str, float]:
        """The metrics of a split, from what :meth:`evaluate` gave for all of its examples."""
        return {name: value.double().mean().item() for name, value in values.items()}

    def details(self, values: Values, about: Mapping[str, Any]) -> dict[str, Any]:
        """More about the test than numbers, as JSON values, for `result.json`: a table of confusions, say."""
        return {}

    def reader(self, about: Mapping[str, Any]) -> Any:
        """What reads new data for the saved model, an object with save_pretrained(folder), such as a tokenizer."""
        return None

    def adopt(self, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's weights under the names that this task's model has for them."""
        return saved


class Objective(nn.Module):
    """A model with its task, as one module: what DDP and FSDP wrap, since they act when it is called."""

    def __init__(self, model: nn.Module, task: Task, about: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.task, self.about = model, task, about

    def forward(self, batch: Batch, evaluate: bool = False) -> Any:
        """The loss, or what :meth:`Task.evaluate` gives."""
        return self.task.evaluate(self.model, batch, self.about) if evaluate else self.task.loss(self.model, batch)
