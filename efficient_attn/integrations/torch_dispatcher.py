"""This package's kernels in the place of PyTorch's flash attention, for the whole process: `activate` and `restore`.

scaled_dot_product_attention chooses a kernel for each call. Where it chooses flash attention, it calls one of

    CPU   aten::_scaled_dot_product_flash_attention_for_cpu, and its _backward
    CUDA  aten::_scaled_dot_product_flash_attention, and its _backward

`activate` replaces these four operators through PyTorch's own registry of flash attention implementations, so
calls from C++, from compiled graphs, other threads and recomputations arrive here too. What our kernels do not serve
goes on to the kernel that was there before; both save the same logsumexp, so either can do the backward of the other.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .. import backends, functional, inputs
from ..defaults import default_scale
from ..errors import EfficientAttnError, UnsupportedError
from ..masks import MaskArrays

NAME = "efficient_attn"

_CPU = "_scaled_dot_product_flash_attention_for_cpu"
_CUDA = "_scaled_dot_product_flash_attention"
_NEEDED = (
    "register_flash_attention_impl",
    "activate_flash_attention_impl",
    "restore_flash_attention_impl",
    "current_flash_attention_impl",
)


def activate() -> None:
    """Let scaled_dot_product_attention use this package's kernels where it would use PyTorch's flash attention.

    It holds for every thread and every model, on CPU and CUDA, until `restore`; again does nothing. Which calls flash
    attention gets is PyTorch's choice: on CPU all but those with dropout, a gradient for the mask, or Dv != D; on CUDA
    half precision without a mask. Head dims above 256, dropout and debug masks go on to PyTorch's kernel.

    Raises:
        UnsupportedError: a PyTorch without this registry, or whose registry cannot restore (2.10); or one that holds
            another implementation now. `use_for_sdpa` works with those.
    """
    registry = _registry()
    current = registry.current_flash_attention_impl()
    if current == NAME:
        return
    if current is not None:
        raise UnsupportedError(
            f"PyTorch's flash attention is {current} now; call torch.nn.attention.restore_flash_attention_impl() first"
        )
    registry.register_flash_attention_impl(NAME, register_fn=_Kernels)
    registry.activate_flash_attention_impl(NAME)


def restore() -> None:
    """Undo `activate`: PyTorch's flash attention is its own again. Without `activate` it does nothing.

    Raises:
        UnsupportedError: a PyTorch without the registry.
    """
    registry = _registry()
    if registry.current_flash_attention_impl() == NAME:
        registry.restore_flash_attention_impl()


def _registry() -> Any:
    missing = [name for name in _NEEDED if not hasattr(torch.nn.attention, name)]
    missing += [] if hasattr(torch.library, "get_kernel") else ["torch.library.get_kernel"]
    if missing:
        raise UnsupportedError(
            f"torch {torch.__version__} has no {', '.join(missing)}; use a later PyTorch, or the with block "
            "efficient_attn.integrations.torch_sdpa.use_for_sdpa(), which does not need it"
        )
    return torch.nn.attention


class _Kernels:
    """The four operators, registered from the moment this is made until `remove`: what the registry calls a handle."""

    def __init__(self) -> None:
        self._library = torch.library.Library("aten", "IMPL")
        operators = [(_CPU, "CPU", _cpu_forward), (f"{_CPU}_backward", "CPU", _cpu_backward)]
        operators += [(_CUDA, "CUDA", _cuda_forward), (f"{_CUDA}_backward", "CUDA", _cuda_backward)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*[Oo]verriding a previously registered kernel")
            for name, key, function in operators:
                self._library.impl(name, _guarded(function, _existing(name, key)), key, with_keyset=True)

    def remove(self) -> None:
        self._library._destroy()


def _existing(name: str, key: str) -> Any:
    """The kernel that is registered now, None where PyTorch was built without one."""
    try:
        return torch.library.get_kernel(f"aten::{name}", key)
    except RuntimeError:
        return None


def _guarded(function: Any, original: Any) -> Any:
    """`function`, and where it returns NotImplemented the kernel that was there before."""

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if original is None:
            raise UnsupportedError(
                f"{function.__name__} cannot serve this call, and PyTorch was built without a kernel that could"
            )
        return original.call_boxed(keyset, *args, **kwargs)

    return kernel


# --- the operators ---


def _cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """(out, logsumexp), laid out in memory as PyTorch's are."""
    found = _forward(query, key, value, attn_mask, dropout_p, is_causal, scale)
    if found is NotImplemented:
        return found
    out, logsumexp = found
    if attn_mask is not None:  # for a query that sees nothing, PyTorch's backward wants 0
        logsumexp = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)
    return _like(out, query), _tokens_first(logsumexp)


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """(dq, dk, dv), laid out in memory as PyTorch's are."""
    found = _backward(grad_out, query, key, value, out, logsumexp, attn_mask, dropout_p, is_causal, scale)
    return found if found is NotImplemented else tuple(map(_tokens_first, found))


def _cuda_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    """(out, logsumexp, no cum_seq_q, no cum_seq_k, Nq, Nk, rng_state, unused, debug_attn_mask)."""
    found = NotImplemented
    if not return_debug_mask:
        found = _forward(query, key, value, None, dropout_p, is_causal, scale)
    if found is NotImplemented:
        return found
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    unused = torch.zeros((), dtype=torch.uint64, device=query.device)
    lengths = query.shape[2], key.shape[2]
    return _like(found[0], query), found[1], None, None, *lengths, state, unused, query.new_empty(0)


def _cuda_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> Any:
    """(dq, dk, dv), each laid out in memory as its tensor is."""
    found = _backward(grad_out, query, key, value, out, logsumexp, None, dropout_p, is_causal, scale)
    return found if found is NotImplemented else tuple(map(_like, found, (query, key, value)))


# --- what both have in common ---


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Any:
    backend, bias = _chosen(query, key, value, attn_mask, dropout_p)
    if backend is None:
        return NotImplemented
    scale = default_scale(scale, query.shape[-1])
    return backend.attention_forward(query, key, value, bias, _mask(is_causal), scale, 0.0, None)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Any:
    backend, bias = _chosen(query, key, value, attn_mask, dropout_p)
    if backend is None:
        return NotImplemented
    scale = default_scale(scale, query.shape[-1])
    saved = (grad_out, None, None, query, key, value, bias, out, logsumexp)
    return backend.attention_backward(*saved, _mask(is_causal), scale, 0.0, None, False)[:3]


def _chosen(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float
) -> tuple[Any, Tensor | None]:
    """The backend that serves a call, None if none is faster than PyTorch's own, and the bias."""
    if dropout_p > 0.0 or query.numel() == 0 or key.numel() == 0:
        return None, None
    if max(query.shape[-1], value.shape[-1]) > inputs.MAX_HEAD_DIM:
        return None, None
    try:
        inputs.check_inputs(query, key, value)
        bias = None if attn_mask is None else inputs.check_bias(attn_mask, query, key)
    except EfficientAttnError:
        return None, None
    call = functional.describe(query, key, value, bias, MaskArrays(), 0.0)
    name = backends.cached_select("auto", call)
    return (None if name == "reference" else backends.BACKENDS[name].attention), bias


def _mask(is_causal: bool) -> MaskArrays:
    """Causal as PyTorch has it: query i sees keys up to i."""
    return MaskArrays(window_right=0) if is_causal else MaskArrays()


def _like(found: Tensor, tensor: Tensor) -> Tensor:
    """`found` laid out as torch.empty_like(tensor) would be."""
    return _copied(found, torch.empty_like(tensor))


def _tokens_first(found: Tensor) -> Tensor:
    """(B, H, N, ...) as a view of memory in the order (B, N, H, ...)."""
    B, H, N, *rest = found.shape
    return _copied(found, found.new_empty(B, N, H, *rest).transpose(1, 2))


def _copied(found: Tensor, place: Tensor) -> Tensor:
    return found if found.stride() == place.stride() else place.copy_(found)
