"""What looks on while we run: tracers that know shapes but no values, and torch.profiler, for which there are names.

Names are for what this package does besides its operators, which PyTorch names by itself.

A name costs a function call and a question to the profiler, well below a microsecond, while no profiler runs;
torch.profiler.record_function alone would cost several.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from .errors import UnsupportedError

PLAN = "efficient_attn::plan"  # making a mask: building lists, selecting blocks, hashing and sorting tokens

OBSERVERS: list[Callable[..., None]] = []  # asked after each attention: (method, query, key, value, options, out)

P = ParamSpec("P")
R = TypeVar("R")


def is_onnx_export() -> bool:
    """Whether an exporter to ONNX records the calls: only PyTorch's own operators have a translation."""
    return torch.onnx.is_in_onnx_export()


# What torch.compiler.assume_constant_result does, without the second that importing torch._dynamo takes: one of ONNX's
# exporters stands on dynamo, which otherwise takes PyTorch's function for False.
is_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_jit_traced() -> bool:
    """Whether torch.jit.trace or an exporter to ONNX records the calls, which know PyTorch's own operators only; where
    sizes are tensors, what Python decides by a value or a size stays as the sample had it."""
    if is_onnx_export():
        return True
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def is_recorded() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace records a graph that will run on other values."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor under the wrappers of torch.func, whose values can be read; vmap's dimensions are there, too."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def has_tangent(*operands: Any) -> bool:
    """Whether forward-mode differentiation (jvp, jacfwd, hessian, dual numbers) goes through any of these."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    functorch = torch._C._functorch
    # Under hessian the tangents are wrapped where nobody sees them: whatever torch.func follows there may have one.
    pushed = any(level.key() == functorch.TransformType.Jvp for level in functorch.get_interpreter_stack() or ())
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    return any(
        forward_ad.unpack_dual(tensor).tangent is not None or (pushed and functorch.is_functorch_wrapped_tensor(tensor))
        for tensor in tensors
    )


def no_forward_mode(what: str) -> UnsupportedError:
    """The error of everything that has no forward-mode derivative."""
    return UnsupportedError(
        f"{what} has no forward-mode derivative (jvp, jacfwd, hessian); use reverse mode: torch.func.vjp, jacrev, "
        "grad, or torch.autograd"
    )


def shapes_only(*tensors: Tensor | None) -> bool:
    """Whether no value may steer Python: fake tensors are made, or a tensor is on meta.

    So it is while torch.compile traces; that the caller asks itself: `torch.compiler.is_compiling() or shapes_only(x)`.
    Asked in here, the answer would be compiled to True after a graph break, for callers that then run as they are.
    """
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return True
    return any(tensor is not None and (tensor.is_meta or isinstance(tensor, FakeTensor)) for tensor in tensors)


@contextmanager
def unobserved() -> Iterator[list[Callable[..., None]]]:
    """A range in which nobody observes, what observers themselves call and what a method is made of; yields who did."""
    observers = OBSERVERS[:]
    OBSERVERS.clear()
    try:
        yield observers
    finally:
        OBSERVERS[:] = observers


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
