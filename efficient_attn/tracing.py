"""What looks on while we run: tracers that know shapes but no values, and torch.profiler, for which there are names.

Names are for what this package does besides its operators, which PyTorch names by itself.

A name costs a function call and a question to the profiler, well below a microsecond, while no profiler runs;
torch.profiler.record_function alone would cost several.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

PLAN = "efficient_attn::plan"  # making a mask: building lists, selecting blocks, hashing and sorting tokens

P = ParamSpec("P")
R = TypeVar("R")


def shapes_only(*tensors: Tensor | None) -> bool:
    """Whether no value may steer Python: torch.compile traces, fake tensors are made, or a tensor is on meta."""
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return True
    return any(tensor is not None and (tensor.is_meta or isinstance(tensor, FakeTensor)) for tensor in tensors)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A range in which autocast leaves the tensor's device alone; the meta device knows none."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def span(name: str) -> AbstractContextManager[Any]:
    """A range of this name in the trace of a running profiler."""
    if not torch.compiler.is_compiling() and torch._C._autograd._profiler_enabled():
        return torch.profiler.record_function(name)
    return nullcontext()


def named(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Function decorator: every call is a `span`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or not torch._C._autograd._profiler_enabled():
                return function(*args, **kwargs)
            with torch.profiler.record_function(name):
                return function(*args, **kwargs)

        return call

    return decorate
