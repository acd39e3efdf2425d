"""CUDA C++ kernels (csrc/cuda) for NVIDIA GPUs."""

from . import attention, linear_attention

NEEDS_TRANSPOSED = True

__all__ = ["NEEDS_TRANSPOSED", "attention", "linear_attention"]
