"""What all tasks of classes share: how labels count, and what is measured: accuracy, macro F1, confusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...models import LabelConfig
from ..data.base import Batch
from ..task import Task, Values, option

WEIGHTINGS = ("none", "balanced")


@dataclass(frozen=True)
class OfClasses(Task):
    """A task whose batches have `label`, int64 `[B]`."""

    metric: ClassVar[str] = "accuracy"
    higher: ClassVar[bool] = True

    label_smoothing: float = option(0.0, "Part of the target that all classes share.")
    class_weights: str = option("none", "balanced: each class counts alike in the loss, however many examples it has.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_weights not in WEIGHTINGS:
            raise InputError(f"--class-weights must be {' or '.join(WEIGHTINGS)}, given {self.class_weights!r}")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"--label-smoothing is a part, from 0 to below 1, given {self.label_smoothing}")

    def labels(self, about: Mapping[str, Any]) -> LabelConfig:
        """What the model makes of labels: weights n / (classes * examples of the class), of mean 1 over examples."""
        names, counts = about.get("names"), about.get("counts")
        weights = None
        if self.class_weights == "balanced":
            if not counts:
                raise InputError("--class-weights balanced needs the number of examples of each class")
            weights = tuple(sum(counts) / (len(counts) * count) for count in counts)
        return LabelConfig(
            "single_label_classification", weights, self.label_smoothing, None if names is None else tuple(names)
        )

    def weight(self, batch: Batch, about: Mapping[str, Any]) -> float:
        """The examples, by the weights of their classes if those have some: the loss is a weighted mean."""
        weights = self.labels(about).class_weights
        if weights is None:
            return super().weight(batch, about)
        return float(torch.tensor(weights)[batch["label"].cpu()].sum())

    def summary(self, values: Values, about: Mapping[str, Any]) -> dict[str, float]:
        found = {name: value.double().mean().item() for name, value in values.items() if name in ("loss", "accuracy")}
        return found | {"f1": float(scores(confusion(values, about["classes"]))["f1"].mean())}

    def details(self, values: Values, about: Mapping[str, Any]) -> dict[str, Any]:
        """The confusion matrix, a row a true class, and precision, recall and F1 of each."""
        matrix = confusion(values, about["classes"])
        names = about.get("names") or list(map(str, range(about["classes"])))
        each = {name: [round(x, 4) for x in value.tolist()] for name, value in scores(matrix).items()}
        return {"classes": list(names), "confusion": matrix.tolist(), **each}


def classified(logits: Tensor, labels: Tensor) -> Values:
    """Loss, correctness, and class as it is and as it was named, of each example."""
    logits = logits.float()
    predicted = logits.argmax(dim=-1)
    return {
        "loss": F.cross_entropy(logits, labels, reduction="none"),
        "accuracy": (predicted == labels).float(),
        "label": labels,
        "predicted": predicted,
    }


def confusion(values: Values, classes: int) -> Tensor:
    """int64 `[classes, classes]`: how often an example of the row's class was named the column's."""
    pairs = values["label"] * classes + values["predicted"]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def scores(matrix: Tensor) -> dict[str, Tensor]:
    """Precision, recall and F1 of each class, float64; 0 where a class was neither named nor there."""
    right = matrix.diagonal().double()
    precision = right / matrix.sum(dim=0).clamp(min=1)
    recall = right / matrix.sum(dim=1).clamp(min=1)
    both = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / torch.where(both > 0, both, 1)}
