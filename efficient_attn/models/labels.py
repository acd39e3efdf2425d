"""Labels: what they may be, and the loss that follows from them.

| labels | problem_type | loss |
| --- | --- | --- |
| int64 (B), -100 is ignored | "single_label_classification" | cross entropy |
| float (B, L), rows of probabilities (soft labels, mixup) | "single_label_classification", by name | cross entropy |
| (B, L) of 0 and 1, any number of labels each | "multi_label_classification" | binary cross entropy |
| float (B, L), or (B) for L = 1 | "regression" | mean squared error |

Without a problem_type it follows from the labels, as in transformers: one label is a regression, an integer an example
is a class, rows of 0 and 1 (of any type) are several labels. Letters: B batch, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, InputTypeError

REGRESSION, ONE, SEVERAL = "regression", "single_label_classification", "multi_label_classification"
PROBLEMS = (REGRESSION, ONE, SEVERAL)
IGNORED = -100


@dataclass(frozen=True)
class LabelConfig:
    """What the labels of a model are, and how its loss counts them.

    Fields:
        problem_type: one of `PROBLEMS`; None: by the labels, see the head of this file.
        class_weights: L numbers. Of one label: how much an example of each class counts in the mean; of several: how
            much a 1 counts compared with a 0.
        label_smoothing: the part of the target that all classes share (Szegedy et al. 2016); of several labels
            it is shared by yes and no.
        names: of the labels, in order; `config.id2label` has them by number.

    Raises:
        InputError: values out of range, or weights and smoothing of a regression.
    """

    problem_type: str | None = None
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.problem_type not in (None, *PROBLEMS):
            raise InputError(f"problem_type must be one of {', '.join(PROBLEMS)}; got {self.problem_type!r}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise InputError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.class_weights is not None:
            weights = tuple(float(weight) for weight in self.class_weights)
            if not all(0.0 <= weight < float("inf") for weight in weights) or not any(weights):
                raise InputError(f"class_weights must be finite, not negative and not all 0; got {weights}")
            object.__setattr__(self, "class_weights", weights)
        if self.names is not None:
            object.__setattr__(self, "names", tuple(str(name) for name in self.names))
        if self.problem_type == REGRESSION:
            self._check_regression()

    def _check_regression(self) -> None:
        if self.class_weights is not None or self.label_smoothing:
            raise InputError(
                "class_weights and label_smoothing are of classes, and this is a regression; leave them out"
            )

    def check(self, num_labels: int | None) -> None:
        """Raise InputError unless there are as many names and weights as labels."""
        for name in ("class_weights", "names"):
            value = getattr(self, name)
            if value is not None and len(value) != num_labels:
                raise InputError(f"{len(value)} {name} for num_labels={num_labels}; give one a label")

    def id2label(self, num_labels: int | None) -> dict[int, str]:
        """Names by number, LABEL_0 and so on where there are none."""
        return dict(enumerate(self.names or (f"LABEL_{i}" for i in range(num_labels or 0))))

    def loss(self, logits: Tensor, labels: Tensor, *, of_numbers: str = SEVERAL) -> Tensor:
        """The loss of a batch, a scalar.

        Args:
            logits: (B, L). labels: see the head of this file.
            of_numbers: what rows of numbers are where no problem_type says so.

        Raises:
            InputTypeError, InputError: labels of another type, shape or range.
        """
        B, L = logits.shape
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if not isinstance(labels, Tensor):
            raise InputTypeError(f"labels must be a tensor, got {type(labels).__name__}")
        numbers = labels.dim() != 1
        kind = self.problem_type or (REGRESSION if L == 1 else of_numbers if numbers else ONE)
        if kind == REGRESSION:
            self._check_regression()
            labels = labels[:, None] if L == 1 and labels.dim() == 1 else labels
            _check_shape(labels, (B, L), kind)
            return F.mse_loss(logits, labels.to(logits.dtype))
        weights = None if self.class_weights is None else logits.new_tensor(self.class_weights)
        if kind == ONE and not numbers:
            check_labels(labels, B, L)
            return F.cross_entropy(logits, labels, weights, label_smoothing=self.label_smoothing)
        _check_shape(labels, (B, L), kind)
        labels = labels.to(logits.dtype)
        if kind == ONE:
            return F.cross_entropy(logits, labels, weights, label_smoothing=self.label_smoothing)
        _check_yes_or_no(labels, self.problem_type)
        target = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, target, pos_weight=weights)


def _check_shape(labels: Tensor, shape: tuple[int, int], kind: str) -> None:
    if labels.shape != shape:
        raise InputError(f"labels of a {kind} must be {shape}, got {tuple(labels.shape)}")


def _check_yes_or_no(labels: Tensor, problem_type: str | None) -> None:
    """Numbers that are neither 0 nor 1 may be soft labels or a regression as well; looked at on the CPU alone."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = (labels < 0) | (labels > 1) | labels.isnan()
    wrong = outside if problem_type == SEVERAL else outside | ((labels > 0) & (labels < 1))
    if wrong.any():
        raise InputError(
            f"labels hold {float(labels[wrong][0]):g}, and several labels are 0 or 1 each; say what they are in "
            f"the config: labels={{'problem_type': one of {', '.join(PROBLEMS)}}}"
        )


def check_labels(labels: Tensor, batch: int, classes: int | None) -> None:
    """Raise InputTypeError or InputError unless labels are int64 (batch) below classes, or -100, which cross entropy
    ignores; their values are looked at on the CPU alone."""
    if labels.dtype != torch.int64:
        raise InputTypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != (batch,):
        raise InputError(f"labels must be ({batch},), one an example; got {tuple(labels.shape)}")
    if classes is not None and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORED)]
        if len(wrong):
            raise InputError(f"labels must be from 0 to {classes - 1}, the model's classes; got {int(wrong[0])}")


def of_checkpoint(text: Mapping[str, Any], num_labels: int | None) -> dict[str, Any]:
    """The fields of a `LabelConfig` that a config.json of transformers speaks of."""
    names = {int(number): str(name) for number, name in (text.get("id2label") or {}).items()}
    ordered = [names.get(number, "") for number in range(num_labels or 0)]
    named = num_labels is not None and len(names) == num_labels and "" not in ordered
    default = ordered == [f"LABEL_{number}" for number in range(num_labels or 0)]
    kind = text.get("problem_type")
    return {
        "problem_type": kind if num_labels is not None and kind in PROBLEMS else None,
        "names": tuple(ordered) if named and not default else None,
    }
