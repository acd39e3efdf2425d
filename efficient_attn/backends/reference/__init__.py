"""The definition of every operator, in plain PyTorch; the other backends are tested against it."""

from . import attention, linear_attention

NEEDS_TRANSPOSED = False

__all__ = ["NEEDS_TRANSPOSED", "attention", "linear_attention"]
