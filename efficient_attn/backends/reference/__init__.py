"""The definition of every operator, in plain PyTorch; the other backends are tested against it."""

from . import attention, linear_attention

__all__ = ["attention", "linear_attention"]
