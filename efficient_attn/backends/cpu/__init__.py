"""C++ kernels for CPUs (csrc/cpu)."""

from . import attention, linear_attention

NEEDS_TRANSPOSED = False  # the backward walks the lists as they are

__all__ = ["NEEDS_TRANSPOSED", "attention", "linear_attention"]
