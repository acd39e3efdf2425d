"""The backends, fastest first, and the choice between them: the only place that asks about devices.

A backend is a module with `attention_forward`, `attention_backward` and `not_supported_reasons`, equal in signature and
meaning to `reference`.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch

from ..errors import InputError, UnsupportedError
from . import cpu, cuda, reference, triton
from .call import Call

BACKENDS: dict[str, ModuleType] = {
    "triton": triton.attention,
    "cuda": cuda.attention,
    "cpu": cpu.attention,
    "reference": reference.attention,
}
EXPERIMENTAL = {"cuda": "never run on a GPU"}  # only when asked for by name, and why


def check_name(backend: str) -> None:
    """Raise InputError unless `backend` is "auto" or the name of a backend."""
    if backend != "auto" and backend not in BACKENDS:
        raise InputError(f"backend={backend!r} does not exist; choose from {['auto', *BACKENDS]}")


def automatic(name: str, device: torch.device) -> bool:
    """Whether backend="auto" may take a backend that can serve: Triton's interpreter serves tests, and only by name."""
    return name not in EXPERIMENTAL and (name != "triton" or device.type != "cpu")


def not_supported_reasons(call: Call) -> dict[str, list[str]]:
    """Every backend with the reasons why it cannot serve `call`; an empty list means that it can."""
    return {name: module.not_supported_reasons(call) for name, module in BACKENDS.items()}


def select(backend: str, call: Call) -> str:
    """The backend that will serve `call`: the one asked for, or with "auto" the first that can.

    Raises InputError for an unknown name and UnsupportedError, with the reasons, when the one asked for cannot serve.
    """
    check_name(backend)
    for name in BACKENDS if backend == "auto" else (backend,):
        if (backend == "auto" and not automatic(name, call.device)) or BACKENDS[name].not_supported_reasons(call):
            continue
        return name
    reasons = "; ".join(BACKENDS[backend].not_supported_reasons(call))
    raise UnsupportedError(f"backend={backend!r} cannot serve this call: {reasons}. Use backend='auto' or 'reference'")


cached_select = lru_cache(maxsize=4096)(select)
