"""Triton kernels (kernels/) for any GPU that Triton compiles for."""

from . import attention, linear_attention

NEEDS_TRANSPOSED = True

__all__ = ["NEEDS_TRANSPOSED", "attention", "linear_attention"]
