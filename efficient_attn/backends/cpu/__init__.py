"""C++ kernels for CPUs (csrc/cpu)."""

from . import attention, linear_attention

__all__ = ["attention", "linear_attention"]
