"""Calls of torch.nn.functional.scaled_dot_product_attention, in any model, computed by this package.

    with use_for_sdpa():                    # in this thread and block, also under torch.compile
        model(x)

    activate()                              # in the whole process, until restore(): see torch_dispatcher.py

`use_for_sdpa` sees every call from Python through a TorchFunctionMode. A dense call that this package cannot serve goes
on to PyTorch with the very same arguments. Letters as in `functional`.
"""

from __future__ import annotations

import collections
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from .. import backends, functional, inputs
from ..errors import UnsupportedError
from ..masks import MaskArrays
from ..methods import Method, parse
from ..patterns import Pattern
from ..tracing import is_onnx_export
from .torch_dispatcher import activate, restore

__all__ = ["activate", "restore", "use_for_sdpa"]

_SDPA = F.scaled_dot_product_attention


class SDPAMode(TorchFunctionMode):
    """Serves calls of scaled_dot_product_attention by a method. Subclasses say more: which call, and by what state."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def method_for(self, call: dict[str, Any]) -> Method:
        return self.method

    def state_for(self, method: Method, query: Tensor, key: Tensor) -> nn.Module | None:
        return None

    def seen(self, reason: str | None) -> None:
        """Take note of a call, and why it is not served."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Serve the call, and let functions of PyTorch that call it themselves do so: this mode is off in here."""
        kwargs = kwargs or {}
        if func is _SDPA:
            return self._serve(*args, **kwargs)
        if func is F.multi_head_attention_forward and not torch.compiler.is_compiling():  # which looks into it
            own = {**func.__globals__, "scaled_dot_product_attention": self._serve}
            return FunctionType(func.__code__, own, func.__name__, func.__defaults__)(*args, **kwargs)
        if func is Tensor.unflatten:  # the one that torch.compile can only trace as a method
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)

    def _serve(self, *args: Any, **kwargs: Any) -> Any:
        call = bound(*args, **kwargs)
        method = self.method_for(call)
        reason = why_left(method, **call)
        self.seen(reason)
        if reason is None:
            return attend(method, **call, state=self.state_for(method, call["query"], call["key"]))
        if not method.is_dense:
            raise UnsupportedError(f"{method} cannot serve a call of scaled_dot_product_attention: {reason}")
        return _SDPA(*args, **kwargs)


class use_for_sdpa(SDPAMode):
    """Within a with block, `torch.nn.functional.scaled_dot_product_attention` is computed by this package.

    It holds for calls from Python in this thread, so not for the fused path that nn.TransformerEncoderLayer takes in
    eval mode without gradients (`replace_attention` serves that).
    Activation checkpointing recomputes in the backward, where this is over, and raises; `activate` serves that.

    Args:
        attention: a spec string, `Method` or `Pattern`. With "dense" nothing changes but who computes: a call that is
            not served goes to PyTorch (a head_dim above 256, nested tensors and other subclasses, forward-mode
            derivatives, no fast backend here, sdpa_kernel() without flash attention, what PyTorch itself refuses).
            Another method changes every result, so a call that it cannot serve raises.

    Attributes:
        served: how many calls were computed here.
        left: why calls were left to PyTorch -> how many. Under torch.compile neither is counted.

    Raises:
        UnsupportedError: a method with parameters or random features (use `convert`, which gives each layer its own).
            Calls raise it for what a method other than dense cannot do; one of them is Nq != Nk, where a call does not
            say at which keys its queries stand.
    """

    def __init__(self, attention: str | Method | Pattern = "dense") -> None:
        super().__init__(parse(attention))
        if needs_state(self.method):
            raise UnsupportedError(
                f"{self.method} has parameters or random features, and a call of scaled_dot_product_attention has no "
                "place for them; use efficient_attn.convert(model, attention=...)"
            )
        self.served = 0
        self.left: collections.Counter[str] = collections.Counter()

    def method_for(self, call: dict[str, Any]) -> Method:
        if self.method.is_dense or call["query"].is_nested:
            return self.method
        Nq, Nk = call["query"].shape[-2], call["key"].shape[-2]
        if Nq != Nk:
            raise UnsupportedError(
                f"{self.method} needs to know where {Nq} queries stand among {Nk} keys, which a call of "
                "scaled_dot_product_attention does not say; use efficient_attn.convert, or 'dense'"
            )
        return self.method

    def seen(self, reason: str | None) -> None:
        if not torch.compiler.is_compiling():
            self.served += reason is None
            self.left.update([] if reason is None else [reason])

    def __str__(self) -> str:
        lines = [f"scaled_dot_product_attention: {self.served} calls served by {self.method}"]
        return "\n".join(lines + [f"  {count} left to PyTorch: {reason}" for reason, count in self.left.items()])


def needs_state(method: Method) -> bool:
    """Whether a method has something to build for each layer."""
    return type(method).build is not Method.build and method.build(8, 1, 8, device="meta") is not None


def bound(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    """The arguments of scaled_dot_product_attention by name."""
    return {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": attn_mask,
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
    }


# --- which calls are served ---


def why_left(
    method: Method,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> str | None:
    """Why a call of scaled_dot_product_attention cannot be served, or None. It asks for facts, never for values."""
    tensors = [query, key, value] + ([] if attn_mask is None else [attn_mask])
    reason = _why_other_tensors(tensors)
    if reason is not None:
        return reason
    if query.device.type not in ("cpu", "cuda"):
        return f"tensors on {query.device.type}"
    query, key, value = inputs.autocast(query, key, value)
    for found, why in (
        (min(t.dim() for t in tensors[:3]) < 3, "query, key and value need 3 dimensions"),
        (query.dtype not in inputs.DTYPES, f"{query.dtype}"),
        (len({t.dtype for t in (query, key, value)}) > 1, "query, key and value differ in dtype"),
        (len({t.device for t in tensors}) > 1, "tensors on different devices"),
        (any(size == 0 for t in tensors for size in t.shape), "an empty tensor"),
        (not 0.0 <= dropout_p < 1.0, f"dropout_p={dropout_p}"),
        (is_causal and attn_mask is not None, "both is_causal and attn_mask"),
    ):
        if found:
            return why
    if max(query.shape[-1], value.shape[-1]) > inputs.MAX_HEAD_DIM:
        return f"a head_dim above {inputs.MAX_HEAD_DIM}"
    same = query.shape[:-3] == key.shape[:-3] == value.shape[:-3] and key.shape[-2] == value.shape[-2]
    if not same or query.shape[-1] != key.shape[-1] or key.shape[-3] != value.shape[-3]:
        return "shapes that broadcast"
    Hq, Hkv = query.shape[-3], key.shape[-3]
    if Hq != Hkv and (not enable_gqa or Hq % Hkv):
        return f"{Hq} query heads and {Hkv} key heads, enable_gqa={enable_gqa}"
    reason = None if attn_mask is None else _why_other_mask(attn_mask, query, key)
    return reason if reason is not None or not method.is_dense else _why_not_faster(query, key, value, dropout_p)


def _why_other_tensors(tensors: list[Tensor]) -> str | None:
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            return f"{type(tensor).__name__} is no tensor"
        if tensor.is_nested:
            return "nested tensors"
        if not torch.compiler.is_compiling() and type(tensor) not in (Tensor, nn.Parameter):
            return f"{type(tensor).__name__}, a subclass of Tensor"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives"
    if is_onnx_export() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "an export to ONNX or TorchScript"
    return None


def _why_other_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> str | None:
    full = (*query.shape[:-1], key.shape[-2])
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype) and not torch.is_autocast_enabled(
        query.device.type
    ):
        return f"attn_mask of {attn_mask.dtype}"
    if not 2 <= attn_mask.dim() <= len(full) or (len(full) > 4 and attn_mask.dim() > 2):
        return f"attn_mask with {attn_mask.dim()} dimensions"
    if any(given not in (1, size) for given, size in zip(attn_mask.shape[::-1], full[::-1], strict=False)):
        return "attn_mask of another shape"
    return None


def _why_not_faster(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> str | None:
    """Dense calls that PyTorch's own kernels serve better, or were asked to."""
    if not torch.compiler.is_compiling() and not torch.backends.cuda.flash_sdp_enabled():
        return "flash attention is turned off (sdpa_kernel)"
    query, key, value = _four_dims(query, key, value)
    call = functional.describe(query, key, value, None, MaskArrays(), dropout_p)
    select = backends.select if torch.compiler.is_compiling() else backends.cached_select
    return "only the reference backend can serve it" if select("auto", call) == "reference" else None


# --- the computation ---


def attend(
    method: Method,
    query: Tensor,  # (..., Hq, Nq, D)
    key: Tensor,  # (..., Hkv, Nk, D)
    value: Tensor,  # (..., Hkv, Nk, Dv)
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    *,
    state: nn.Module | None = None,
) -> Tensor:
    """What a call that `why_left` has nothing against returns, (..., Hq, Nq, Dv), by a method.

    Raises:
        UnsupportedError: what the method cannot do.
    """
    lead = query.shape[:-3]
    query, key, value = inputs.autocast(query, key, value)
    query, key, value = _four_dims(query, key, value)
    masks: dict[str, Any] = {"is_causal": is_causal, "causal_alignment": "top_left" if is_causal else None}
    if attn_mask is not None:
        masks = _masks(attn_mask, method, query, key)
    out, _ = method.attend(query, key, value, state=state, scale=scale, dropout_p=float(dropout_p), **masks)
    return out.reshape(*lead, *out.shape[1:])


def _four_dims(*tensors: Tensor) -> list[Tensor]:
    """(..., H, N, D) -> (B, H, N, D)."""
    return [t[None] if t.dim() == 3 else t.flatten(0, -4) for t in tensors]


def _masks(attn_mask: Tensor, method: Method, query: Tensor, key: Tensor) -> dict[str, Any]:
    """An attn_mask as the arguments that a method takes: one bit a key where it is the same for all queries."""
    if attn_mask.dtype != torch.bool and not method.accepts_bias:
        attn_mask = only_hides(attn_mask)
    if attn_mask.dtype != torch.bool:
        exact = (query.dtype, torch.float32) if query.dtype != torch.float64 else (query.dtype,)
        return {"bias": attn_mask if attn_mask.dtype in exact else attn_mask.to(query.dtype)}
    mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    if mask.shape[-1] == key.shape[2] and all(mask.shape[d] == 1 or mask.stride(d) == 0 for d in (1, 2)):
        return {"key_mask": mask[:, 0, 0].expand(query.shape[0], -1)}
    if method.accepts_causal and not method.accepts_mask and _is_causal(mask):
        return {"is_causal": True, "causal_alignment": "top_left"}
    return {"mask": mask}


def only_hides(mask: Tensor) -> Tensor:
    """A float mask of 0 and the dtype's smallest number (or -inf) as True = attend; others stay, and are refused."""
    hidden = mask <= torch.finfo(mask.dtype).min
    if torch.compiler.is_compiling() or not bool((hidden | (mask == 0)).all()):
        return mask
    return ~hidden


def _is_causal(mask: Tensor) -> bool:
    """Whether a bool mask (.., Nq, Nk) is the causal one, for methods that know causality but no masks of pairs."""
    if torch.compiler.is_compiling():
        return False
    Nq, Nk = mask.shape[-2:]
    return bool((mask == torch.ones(Nq, Nk, dtype=torch.bool, device=mask.device).tril()).all())
