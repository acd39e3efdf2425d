"""Triton kernels (kernels/) for any GPU that Triton compiles for."""

from . import attention, linear_attention

__all__ = ["attention", "linear_attention"]
