"""A structured bias as a module."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from ..errors import InputTypeError
from .base import Bias
from .sequence import ALiBi


class PositionBias(nn.Module):
    """A structured bias whose tensors belong to a module: learned or fixed, saved, moved, shared by all that hold it.

        PositionBias(T5Bias(torch.zeros(32, 8)))               # a table of 32 buckets for 8 heads, learned
        PositionBias(ALiBi(ALiBi.usual_slopes(8)))             # fixed, unless learned=True

    Args:
        bias: what the module gives when it is called, by the tensors that it has then. A parameter stays the same one.
        learned: whether its tensors are parameters, which default is for all but ALiBi, or buffers.

    Raises:
        InputTypeError: anything but a structured bias.
    """

    def __init__(self, bias: Bias, *, learned: bool | None = None) -> None:
        super().__init__()
        if not isinstance(bias, Bias):
            raise InputTypeError(
                f"PositionBias takes a structured bias such as ALiBi or T5Bias; got {type(bias).__name__}"
            )
        self._kind = type(bias)
        self._options: dict[str, Any] = {}
        self._names: list[str] = []
        for field in fields(bias):  # type: ignore[arg-type]
            value = getattr(bias, field.name)
            if not isinstance(value, Tensor):
                self._options[field.name] = value
                continue
            self._names.append(field.name)
            if not isinstance(value, nn.Parameter):
                value = value.detach().clone()
            if not isinstance(bias, ALiBi) if learned is None else learned:
                self.register_parameter(field.name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
            else:
                self.register_buffer(field.name, value.detach())

    def forward(self) -> Bias:
        """The bias, of the tensors that the module has now."""
        made: Bias = self._kind(**{name: getattr(self, name) for name in self._names}, **self._options)
        return made

    def extra_repr(self) -> str:
        options = (f"{name}={value}" for name, value in self._options.items())
        return ", ".join([self._kind.__name__, *options])
