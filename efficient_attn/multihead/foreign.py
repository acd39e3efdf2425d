"""Calls that are not ours to serve: what only PyTorch's own module can compute, trace or call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from ..errors import UnsupportedError
from ..inputs import MAX_HEAD_DIM
from ..tracing import is_onnx_export

_plain_torch_function: Any = Tensor.__torch_function__
_modules: Any = nn.modules.module
_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_PLAIN = (Tensor, nn.Parameter, type(None))


def why_foreign(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Name what keeps our operators from serving a call that PyTorch's dense module can serve, or return None."""
    if module.head_dim > MAX_HEAD_DIM:
        return f"head_dim={module.head_dim} (at most {MAX_HEAD_DIM})"
    if module.training and module.dropout == 1.0:
        return "dropout=1.0"
    if is_onnx_export():
        return "an export to ONNX, which has no operator for it"
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "torch.jit.trace, which would freeze the block lists of one length (torch.export keeps them apart)"
    tensors = (
        query,
        key,
        value,
        module.in_proj_weight,
        module.in_proj_bias,
        module.out_proj.weight,
        module.out_proj.bias,
    )
    for tensor in tensors:
        if type(tensor) not in _PLAIN and _overrides_torch_function(tensor):
            return f"{type(tensor).__name__}, which overrides __torch_function__"
    return None


def record_as_leaf(module: nn.Module, *args: Any) -> Any:
    """Under FX symbolic tracing, record one call of this module, as FX does for the modules of torch.nn."""
    tracer: Any = next(arg for arg in args if isinstance(arg, Proxy)).tracer
    path = tracer.path_of_module(module)
    if not path:
        raise UnsupportedError("torch.fx cannot trace into MultiheadAttention; trace the model that contains it")
    return tracer.create_proxy("call_module", path, args, {})


def is_more_than_linear(module: nn.Module) -> bool:
    """Whether a call of it may do something else than to multiply by its weight and add its bias: an adapter, hooks."""
    known: Any = module
    return (
        type(module) not in _LINEAR
        or "forward" in module.__dict__
        or bool(known._forward_hooks or known._forward_pre_hooks or known._backward_hooks or known._backward_pre_hooks)
        or _modules._has_any_global_hook()
    )


def _overrides_torch_function(tensor: Any) -> bool:
    """Whether a class overrides torch functions; tensors, parameters and bare subclasses do not."""
    override = getattr(type(tensor), "__torch_function__", None)
    if override is None or override is torch._C._disabled_torch_function_impl:
        return False
    return getattr(override, "__func__", None) is not _plain_torch_function.__func__
