"""How every kernel is launched."""

from __future__ import annotations

from typing import Any


def launch(kernel: Any, programs: int, *arguments: Any, warps: int, stages: int = 3) -> None:
    """Run so many programs of a kernel.

    A score costs one multiply-add and one exp2 (kernels/attention.py) only where the compiler may join a product and a
    sum. Triton does so without being asked up to 3.9, and from 3.10 on only where it is asked; no result depends on it
    beyond its rounding.
    """
    kernel[(programs,)](*arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)
