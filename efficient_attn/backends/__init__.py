"""The backends, fastest first, and the choice between them: the only place that asks about devices.

A backend is a package with two modules, equal in signature and meaning to those of `reference`: attention.py
(`attention_forward`, `attention_backward`, `not_supported_reasons`) and linear_attention.py (the same for linear
attention). Its `NEEDS_TRANSPOSED` says whether attention_backward reads the lists of query blocks for each key block,
`TAKES_ORDERS` whether attention_forward and attention_backward take a mask with `query_order` and `key_order`,
`JOINS_PARTS` whether they take `joined` and `added_to`, results of other parts of a mask, and go on from these, and
`into`, where the first part's are made.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch

from ..errors import InputError, UnsupportedError
from . import cpu, cuda, reference, triton
from .call import Call, LinearCall

BACKENDS: dict[str, ModuleType] = {"triton": triton, "cuda": cuda, "cpu": cpu, "reference": reference}
EXPERIMENTAL = {"cuda": "never run on a GPU"}  # only when asked for by name, and why


def check_name(backend: str) -> None:
    """Raise InputError unless `backend` is "auto" or the name of a backend."""
    if backend != "auto" and backend not in BACKENDS:
        raise InputError(f"backend={backend!r} does not exist; choose from {['auto', *BACKENDS]}")


def automatic(name: str, device: torch.device) -> bool:
    """Whether backend="auto" may take a backend that can serve: Triton's interpreter serves tests, and only by name."""
    return name not in EXPERIMENTAL and (name != "triton" or device.type != "cpu")


def not_supported_reasons(call: Call | LinearCall) -> dict[str, list[str]]:
    """Every backend with the reasons why it cannot serve `call`; an empty list means that it can."""
    return {name: _reasons(name, call) for name in BACKENDS}


def select(backend: str, call: Call | LinearCall) -> str:
    """The backend that will serve `call`: the one asked for, or with "auto" the first that can.

    Raises:
        InputError: an unknown name.
        UnsupportedError: the backend asked for cannot serve; the text says why.
    """
    check_name(backend)
    for name in BACKENDS if backend == "auto" else (backend,):
        if (backend != "auto" or automatic(name, call.device)) and not _reasons(name, call):
            return name
    reasons = "; ".join(_reasons(backend, call))
    raise UnsupportedError(f"backend={backend!r} cannot serve this call: {reasons}. Use backend='auto' or 'reference'")


def _reasons(name: str, call: Call | LinearCall) -> list[str]:
    backend = BACKENDS[name]
    primitive = backend.attention if isinstance(call, Call) else backend.linear_attention
    reasons: list[str] = primitive.not_supported_reasons(call)
    return reasons


cached_select = lru_cache(maxsize=4096)(select)
