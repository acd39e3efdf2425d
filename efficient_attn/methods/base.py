"""What a method is: an object that a user names, that makes its state and attends."""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import sharding
from ..errors import InputError, UnsupportedError
from ..inputs import refuse_modifiers
from ..masks import BlockMask
from ..options import Named
from ..patterns import PATTERNS, Pattern
from ..tracing import OBSERVERS, has_tangent, is_jit_traced, no_forward_mode, unobserved

METHODS: ChainMap[str, Any] = ChainMap({}, PATTERNS)  # what a spec names: the patterns, which attend as `Sparse`, first
TAILS: dict[str, Any] = {}  # what may stand behind a +, see hybrid/


class Method(Named):
    """A way to attend. Subclasses are frozen dataclasses: their fields are the options, with usable defaults.

    Class attributes say, beside what `Named` has, whether it is `exact` (softmax attention over the pairs it looks at,
    none of them approximated) and `is_dense` (over all pairs), and what calls may ask of it: `accepts_causal`,
    `accepts_mask` (any mask of pairs), `accepts_bias`, `accepts_modifiers` (softcap, sinks, structured biases).
    """

    family = "method"
    registry = METHODS
    compounds: ClassVar[ChainMap[str, Any]] = ChainMap({}, Pattern.compounds)
    exact: ClassVar[bool] = False
    is_dense: ClassVar[bool] = False
    accepts_causal: ClassVar[bool] = False
    accepts_mask: ClassVar[bool] = False
    accepts_bias: ClassVar[bool] = False
    accepts_modifiers: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Every `attend`, a user's own too, keeps the promises that are the same for all methods: see `_settled`."""
        super().__init_subclass__(**options)
        if "attend" in vars(cls):
            attend: Any = vars(cls)["attend"]
            cls.attend = _settled(attend)  # type: ignore[method-assign]

    @property
    def shares_state(self) -> bool:
        """Whether the paper gives all layers of a model one state, which `replace_attention` then shares among them."""
        return False

    @property
    def counts_positions(self) -> bool:
        """Whether it matters how many tokens stand before the first real one, beyond the distance of two tokens."""
        return False

    def build(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module | None:
        """Make what `attend` needs as `state`: learned parameters and random features; None for methods without any.

        num_heads: those of keys and values, fewer than the queries' when heads are grouped: what a head has of its own
            belongs to its keys.

        Draws nothing from PyTorch's global generator: a model's other parameters start the same with any method.
        """
        return None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        state: nn.Module | None = None,
        key_mask: Tensor | None = None,
        mask: BlockMask | Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        causal_alignment: str | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int | Tensor | None = None,
        backend: str = "auto",
        need_weights: bool | Literal["mean"] = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend by this method.

        Args:
            query, key, value: (B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv), as in `attention`.
            state: what `build` returned.
            key_mask: bool (B, Nk), True = attend: padding. What a masked key holds, NaN included, has no influence.
            mask, bias, is_causal, causal_alignment, scale, dropout_p, dropout_seed, backend: as in `attention`; where
                `accepts_modifiers` says so, softcap and sinks too.
            need_weights: also return what this method multiplies the values with, dropout included: n x n memory;
                "mean": their average over the heads.

        Returns:
            out (B, Hq, Nq, Dv) and weights (B, Hq, Nq, Nk), their average (B, Nq, Nk), or None. Weights of each head
            that need a gradient are on the way of the output's: `weights.retain_grad()` has what out.backward() gives
            them. An average is not, as in plain PyTorch: out.backward() pays nothing for it.

        Raises:
            UnsupportedError: what the class attributes say this method does not accept.
            InputError, InputTypeError: arguments that do not belong together, or a missing state.
        """
        raise NotImplementedError


Attend = Callable[..., tuple[Tensor, Tensor | None]]


def _settled(attend: Attend) -> Attend:
    """An `attend` that refuses torch.jit.trace, unless it is dense, puts the weights of the heads on the way of the
    output's gradient, and averages them where their mean is asked for and the method has not."""

    def settled(self: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        if not self.accepts_modifiers:
            asked = {name: options.pop(name, None) for name in ("softcap", "sinks")}
            refuse_modifiers(f"by {self}", options.get("bias"), **asked)
        if sharding.active is not None:
            if OBSERVERS:
                sharding.refuse("observing attention")
            return sharding.active.attend(self, query, key, value, **options)
        if not self.is_dense and is_jit_traced():
            raise UnsupportedError(
                f"torch.jit.trace and torch.onnx.export would freeze what {self} chooses for the sample: blocks, "
                "landmarks and lengths. Trace dense attention, or use torch.export or torch.compile"
            )
        if has_tangent(query, key, value):
            raise no_forward_mode(str(self))
        if OBSERVERS and not torch.compiler.is_compiling():
            with unobserved() as observers:
                out, weights = attend(self, query, key, value, **options)
                for observer in observers:
                    observer(self, query, key, value, options, out)
        else:
            out, weights = attend(self, query, key, value, **options)
        if options.get("need_weights") == "mean":
            return out, weights.mean(1) if weights is not None and weights.dim() == 4 else weights
        if weights is not None and weights.requires_grad and torch.is_grad_enabled():
            out = _through_weights(out, weights, value)
        return out, weights

    @functools.wraps(attend)
    def call(self: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        state = options.get("state")
        if not isinstance(state, MethodState):
            return settled(self, query, key, value, **options)
        within = state if state.is_wrapped else state.forward
        return within(lambda: settled(self, query, key, value, **options), query.device)

    return call


def _through_weights(out: Tensor, weights: Tensor, value: Tensor) -> Tensor:
    """`out`, to the bit, whose gradient goes to the weights and through them: what relevance by gradients of attention
    weights asks for (Chefer et al., CVPR 2021), and what plain PyTorch gives whose output is weights @ value."""
    value = value.masked_fill(~value.isfinite(), 0.0)  # hidden, or the output tells
    kv_heads = value.shape[1]
    grouped = (
        weights.unflatten(1, (kv_heads, weights.shape[1] // max(kv_heads, 1))) @ value.to(weights.dtype)[:, :, None]
    )
    product: Tensor = grouped.flatten(1, 2).to(out.dtype)
    return out.detach() + (product - product.detach())


class MethodState(nn.Module):
    """What a method's `build` returns: parameters and buffers that `reset_parameters` fills in place.

    After `to_empty`, the step from the meta device to a real one, they start as `reset_parameters` says: no checkpoint
    of a model without the method would fill them.
    """

    def reset_parameters(self) -> None:
        """Start again as the method says."""
        raise NotImplementedError

    def forward(
        self, attend: Callable[[], tuple[Tensor, Tensor | None]], device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Call `attend`, which reads this state, for tensors on the device."""
        if self.is_meta and device.type != "meta":
            raise InputError(
                f"{type(self).__name__} is on the meta device and has no values, while query is on {device}; load it, "
                "or call to_empty() on the module that holds it"
            )
        return attend()

    @property
    def is_wrapped(self) -> bool:
        """Whether others put something around this module's calls, such as the hooks by which accelerate brings
        parameters and takes them away again: then the use of the state must be a call of it."""
        return "forward" in self.__dict__ or bool(self._forward_pre_hooks) or bool(self._forward_hooks)

    @property
    def is_meta(self) -> bool:
        """Whether the state has shapes but no values yet."""
        return any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MethodState:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not self.is_meta and _leaves_values_behind(fn):
            self.reset_parameters()
        return self


def _leaves_values_behind(fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether a step of `nn.Module._apply` only makes room: it gets a real tensor out of one that has no values."""
    try:
        return not fn(torch.empty(0, device="meta")).is_meta
    except Exception:  # a step that takes values along cannot leave the meta device
        return False


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a parameter or buffer, also one that FSDP has spread over processes, which all know them."""
    mesh: Any = getattr(tensor, "device_mesh", None)
    if mesh is not None:
        from torch.distributed.tensor import distribute_tensor

        spread: Any = tensor
        values = values.to(tensor.device, tensor.dtype)
        values = distribute_tensor(values, mesh, spread.placements, src_data_rank=None)
    with torch.no_grad():
        tensor.copy_(values)


def keep_state(
    method_state: nn.Module | None, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any]
) -> None:
    """Let a checkpoint without parameters of the method load strictly: a module's own, `prefix`method_state, stay.

    With assign=True they go where the checkpoint's parameters are; a state that has no values yet gets its first.
    """
    own = f"{prefix}method_state."
    if method_state is None or any(name.startswith(own) for name in state_dict):
        return
    given = (value for name, value in state_dict.items() if name.startswith(prefix) and isinstance(value, Tensor))
    like = next((value for value in given if value.is_floating_point()), None)
    if like is not None and local_metadata.get("assign_to_params_buffers", False):
        if getattr(method_state, "is_meta", False) and not like.is_meta:
            method_state.to_empty(device=like.device)
        method_state.to(like.device, like.dtype)
    state_dict.update({own + name: value for name, value in method_state.state_dict(keep_vars=True).items()})
