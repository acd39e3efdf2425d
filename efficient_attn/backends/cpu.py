"""The C++ backend for CPUs (csrc/cpu): the same functions as `reference`, in blocks and without n x n memory."""

from __future__ import annotations

from .call import Call


def not_supported_reasons(call: Call) -> list[str]:
    """Why this backend cannot serve `call`."""
    return ["the native kernels are not part of this build yet"]
