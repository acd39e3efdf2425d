"""Triton kernels (kernels/) for any GPU that Triton compiles for."""

from . import attention, linear_attention

NEEDS_TRANSPOSED = True
TAKES_ORDERS = True
JOINS_PARTS = False

__all__ = ["JOINS_PARTS", "NEEDS_TRANSPOSED", "TAKES_ORDERS", "attention", "linear_attention"]
