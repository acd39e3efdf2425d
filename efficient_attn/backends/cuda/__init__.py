"""CUDA C++ kernels (csrc/cuda) for NVIDIA GPUs."""

from . import attention, linear_attention

NEEDS_TRANSPOSED = True
TAKES_ORDERS = False
JOINS_PARTS = False

__all__ = ["JOINS_PARTS", "NEEDS_TRANSPOSED", "TAKES_ORDERS", "attention", "linear_attention"]
