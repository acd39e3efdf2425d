"""What models return when they are called as transformers' are: `model(**inputs, labels=labels)`.

Called by position, `model(images)`, a model returns its tensor. Called by the names that transformers' processors and
tokenizers give, `model(pixel_values=...)`, or with labels, it returns one of the outputs below; `return_dict=True` asks
for one in any case, and `return_dict=False` for the tuple.

Letters: B batch, L labels, N tokens, V vocabulary, P features of CLIP's common space, S horizon, C channels, Q
quantiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from ..errors import InputError


class ModelOutput:
    """Base of the outputs. Like a tuple of what is there, where fields that are None do not count: `output[0]` is the
    loss if there is one, else the logits; `loss, logits = output`; `output["logits"]`; `output.to_tuple()`.

    torch.utils._pytree knows the subclasses, so that DDP, FSDP and torch.compile see the tensors.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)

        def flatten(output: Any) -> tuple[list[Any], list[str]]:
            return list(output.to_tuple()), list(output.keys())

        def unflatten(values: Any, names: list[str]) -> Any:
            return cls(**dict(zip(names, values, strict=True)))

        pytree.register_pytree_node(cls, flatten, unflatten, serialized_type_name=f"{cls.__module__}.{cls.__name__}")

    def keys(self) -> tuple[str, ...]:
        """The names of the fields that are there."""
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return tuple(name for name in names if getattr(self, name) is not None)

    def to_tuple(self) -> tuple[Any, ...]:
        """What is there, in order."""
        return tuple(getattr(self, name) for name in self.keys())

    values = to_tuple

    def items(self) -> tuple[tuple[str, Any], ...]:
        """Names and what is there."""
        return tuple((name, getattr(self, name)) for name in self.keys())

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or the default if it is not there."""
        return getattr(self, name) if name in self.keys() else default

    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(f"{key!r} is not in this output; it has {', '.join(self.keys())}")
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass
class ClassifierOutput(ModelOutput):
    """Of `TextClassifier`, `ViT` and `TimeSeriesTransformer`: loss, a scalar, with labels; logits (B, L)."""

    loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class LMOutput(ModelOutput):
    """Of `CausalLM` and `Seq2Seq`: loss, a scalar, with labels; logits (B, N, V)."""

    loss: Tensor | None = None
    logits: Tensor | None = None


@dataclass
class CLIPOutput(ModelOutput):
    """Of `CLIP`.

    Fields:
        loss: a scalar, with return_loss.
        logits_per_image: (images, texts); logits_per_text: its transpose.
        text_embeds, image_embeds: unit vectors, (texts, P) and (images, P).
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


@dataclass
class ReconstructionOutput(ModelOutput):
    """Of `MAE`: loss, a scalar; logits, all patches as predicted, (B, N, pixels); mask (B, N), 1 = was masked."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    mask: Tensor | None = None


@dataclass
class ForecastOutput(ModelOutput):
    """Of `PatchForecaster`.

    Fields:
        loss: a scalar, with future_values.
        prediction_outputs: (B, S, C), the quantile next to the median; `logits` is another name for it.
        quantile_outputs: (B, S, C, Q), in order.
        loc, scale: (B, 1, C), mean and standard deviation of the context.
    """

    loss: Tensor | None = None
    prediction_outputs: Tensor | None = None
    quantile_outputs: Tensor | None = None
    loc: Tensor | None = None
    scale: Tensor | None = None

    @property
    def logits(self) -> Tensor | None:
        """prediction_outputs, under the name that every model's output has."""
        return self.prediction_outputs


def either(name: str, own: Tensor | None, named: Tensor | None) -> Tensor:
    """An argument that was given by position (`own`) or by transformers' name.

    Raises:
        InputError: neither or both.
    """
    if (own is None) == (named is None):
        raise InputError(f"give {name} once, by position or by its name" if own is not None else f"{name} is missing")
    found = named if own is None else own
    assert found is not None
    return found


def answer(output: Any, tensor: Any, *, by_name: bool, return_dict: bool | None) -> Any:
    """The output, its tuple, or what the model returns when it is called by position: see the head of this file.

    Args:
        by_name: an argument had transformers' name, or labels were given.
    """
    if return_dict is None:
        return output if by_name else tensor
    return output if return_dict else output.to_tuple()
