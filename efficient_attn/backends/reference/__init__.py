"""The definition of every operator, in plain PyTorch; the other backends are tested against it."""

from . import attention, linear_attention

NEEDS_TRANSPOSED = False
TAKES_ORDERS = False
JOINS_PARTS = False

__all__ = ["JOINS_PARTS", "NEEDS_TRANSPOSED", "TAKES_ORDERS", "attention", "linear_attention"]
