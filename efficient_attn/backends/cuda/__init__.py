"""CUDA C++ kernels (csrc/cuda) for NVIDIA GPUs."""

from . import attention, linear_attention

__all__ = ["attention", "linear_attention"]
