"""C++ kernels for CPUs (csrc/cpu)."""

from . import attention, linear_attention

NEEDS_TRANSPOSED = False  # the backward walks the lists as they are
TAKES_ORDERS = True
JOINS_PARTS = True

__all__ = ["JOINS_PARTS", "NEEDS_TRANSPOSED", "TAKES_ORDERS", "attention", "linear_attention"]
