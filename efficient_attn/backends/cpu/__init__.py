"""C++ kernels for CPUs (csrc/cpu)."""

from . import attention, linear_attention

NEEDS_TRANSPOSED = False  # the backward walks the lists as they are
TAKES_ORDERS = True

__all__ = ["NEEDS_TRANSPOSED", "TAKES_ORDERS", "attention", "linear_attention"]
