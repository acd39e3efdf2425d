"""What of a process a library must leave alone, read through the C library. Imports nothing of ours."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

FLUSHING = 0x8040  # MXCSR: flush to zero, denormals are zero
ROUNDING = 0x6000
UPWARD = 0x800


def fenv() -> dict[str, int]:
    """The control bits of this thread's floating point: MXCSR without its sticky flags, and the x87 control word."""
    state = ctypes.create_string_buffer(64)
    assert ctypes.CDLL("libm.so.6").fegetenv(state) == 0
    word = int.from_bytes(state.raw[28:32], "little")
    return {"mxcsr": word & ~0x3F, "x87": int.from_bytes(state.raw[:2], "little")}


def openmp() -> dict[str, int]:
    """What every OpenMP runtime of this process says, for the calling thread."""
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    names = ("max_threads", "dynamic", "nested", "max_active_levels", "thread_limit")
    found = {}
    for number, path in enumerate(sorted(loaded)):
        library = ctypes.CDLL(path)
        found |= {f"{name} {number}": getattr(library, f"omp_get_{name}")() for name in names}
    return found


def state() -> dict[str, int]:
    return {**fenv(), **openmp(), "torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads()}
