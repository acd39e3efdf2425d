"""The attention layers of a model: which calls they make on a sample, and how one of them gets a method of its own."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConversionError, InputError
from ...methods import Method
from ...methods.base import MethodState
from ...multihead import MultiheadAttention
from .. import fidelity, routed
from ..layer_state import LAYER_METHOD, state_restorer


@dataclass(frozen=True)
class State:
    """Fitted parameters of a layer's method: what `Method.build` takes, and the tensors that it then holds."""

    sizes: tuple[int, int, int]  # embed_dim, heads of keys, head_dim
    tensors: Mapping[str, Tensor]

    def build(self, method: Method, device: Any, dtype: torch.dtype) -> nn.Module:
        """A module of the method with these parameters.

        Raises:
            InputError: parameters of another method.
        """
        state = method.build(*self.sizes, device=device, dtype=dtype)
        try:
            if state is None:
                raise RuntimeError("it has no parameters")
            state.load_state_dict(dict(self.tensors))
        except RuntimeError as error:
            raise InputError(f"the distilled parameters are not those of {method}: {error}") from None
        return state.eval()


@dataclass
class Call:
    """One call of attention, B batch, H query heads, N tokens.

    out is dense attention's output (B, H, N, Dv), `probe` the zeros that were added to it, whose gradient is that of
    `out`, and `project` what the layer multiplies its heads with, (E, H Dv), or None where it could not be seen.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    out: Tensor
    probe: Tensor
    project: Tensor | None = None

    def attend(self, method: Method, state: nn.Module | None) -> Tensor:
        """What a method gives here, (B, H, N, Dv)."""
        out: Tensor = method.attend(self.query, self.key, self.value, **{**self.options, "state": state})[0]
        return out

    def build(self, method: Method, fitted: State | None = None) -> nn.Module | None:
        """The method's parameters as the layer would make them, or those that were fitted."""
        if fitted is not None:
            return fitted.build(method, self.query.device, self.query.dtype)
        (Hq, D), Hkv = (self.query.shape[1], self.query.shape[3]), self.key.shape[1]
        like = self.query
        state = method.build(Hq * D, Hkv, D, device=like.device, dtype=like.dtype)
        return state.eval() if isinstance(state, MethodState) else state

    @property
    def shape(self) -> tuple[Any, ...]:
        """What the time of a call depends on."""
        given = tuple(sorted(name for name, value in self.options.items() if value is not None and value is not False))
        return (tuple(self.query.shape), tuple(self.key.shape), self.value.shape[3], self.query.dtype, given)


@dataclass
class Layer:
    """An attention layer by its name in the model, with its calls; `fixed` says why it must stay dense, or is empty."""

    name: str
    calls: list[Call] = field(default_factory=list)
    fixed: str = ""

    @property
    def heads(self) -> int:
        return self.calls[0].query.shape[1]


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters and buffers are the model's own: to be changed without changing the model.

    Raises:
        ConversionError: the model holds something that cannot be copied.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the model's attributes raise
        raise ConversionError(
            "the search tries methods in a copy of the model, which shares its parameters, and this model cannot be "
            f"copied: {type(error).__name__}: {error}. Take off what holds locks, files or generators meanwhile"
        ) from error


def record(model: nn.Module, sample: Any) -> tuple[Any, dict[str, Layer]]:
    """Run the sample with gradients: what the model returned, and its layers in the order in which they ran."""
    found: dict[str, Layer] = {}
    running: list[str] = []
    open_calls: list[tuple[str, Call]] = []  # whose projection has not come yet
    names = {id(module): name for name, module in model.named_modules()}

    def watch(attend: Callable[..., Any], method: Method, *args: Any, **kwargs: Any) -> Any:
        out, weights = attend(method, *args, **kwargs)
        name = running[-1] if running else ""
        layer = found.setdefault(name, Layer(name))
        query, key, value = (t.detach() for t in args[:3])
        probe = torch.zeros_like(out, requires_grad=True)
        held = {name: v.detach() if isinstance(v, Tensor) else v for name, v in kwargs.items()}
        held |= {"need_weights": False, "dropout_p": 0.0}
        call = Call(query, key, value, held, out.detach(), probe)
        layer.calls.append(call)
        layer.fixed = layer.fixed or _why_fixed(model, name, call)
        module = model.get_submodule(name) if running else None
        if isinstance(module, MultiheadAttention):  # which never calls its projection
            call.project = module.out_proj.weight.detach()
        else:
            open_calls[:] = [(name, call)]
        return out + probe, weights

    def enter(module: nn.Module, args: Any) -> None:
        running.append(names[id(module)])
        if open_calls and isinstance(module, nn.Linear):  # the first that takes as many features as the heads have
            _, call = open_calls.pop()
            if module.in_features == call.out.shape[1] * call.out.shape[3]:
                call.project = module.weight.detach()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    handles: list[Any] = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with fidelity.attends_watched(watch):
            returned = fidelity.run(model, sample, grad=True)
    finally:
        for handle in handles:
            handle.remove()
    return returned, found


def _why_fixed(model: nn.Module, name: str, call: Call) -> str:
    if call.query.shape[2] != call.key.shape[2]:
        return (
            f"{call.query.shape[2]} queries attend to {call.key.shape[2]} keys, where methods other than dense differ"
        )
    module: Any = model.get_submodule(name)
    if getattr(module, "cross", False) is True or getattr(module, "is_cross_attention", False) is True:
        return "attends to a memory"
    if not _takes_method(model, name):
        return f"{type(module).__qualname__} calls attention itself and takes no method"
    return ""


def _takes_method(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name)
    if isinstance(module, MultiheadAttention) or routed.is_routed(module) or hasattr(module, "set_attention"):
        return True
    parents = [model, *(model.get_submodule(name[:at]) for at, sign in enumerate(name) if sign == ".")]
    configs = (getattr(parent, "config", None) for parent in parents)
    return any(str(getattr(c, "_attn_implementation", "")).startswith("efficient_attn") for c in configs)


def set_method(module: Any, method: Method, fitted: State | None = None) -> Callable[[], None]:
    """Give one layer of a converted model a method, and the parameters that were fitted. Returns what undoes it.

    Raises:
        UnsupportedError: what the method cannot do in this layer, which is left as it was.
    """
    made = None if fitted is None else _made(module, method, fitted)
    if isinstance(module, MultiheadAttention):
        old = (module.attention, module.method_state)
        module._set_method(method, made)
        return functools.partial(module._set_method, *old)
    if routed.is_routed(module):
        both = _both(state_restorer(module), routed.route(module, method))
        _hold(module, method, made)
        return both
    if hasattr(module, "set_attention"):
        attention, state = module.attention, module._modules.get("method_state")
        module.set_attention(method, method_state=made)
        return functools.partial(module.set_attention, attention, method_state=state)
    restore, held = state_restorer(module), vars(module)
    before = held.get(LAYER_METHOD)
    held[LAYER_METHOD] = method
    _hold(module, method, made)

    def undo() -> None:
        held.pop(LAYER_METHOD, None)
        if before is not None:
            held[LAYER_METHOD] = before

    return _both(restore, undo)


def _made(module: nn.Module, method: Method, fitted: State) -> nn.Module:
    """The fitted parameters as a module in the layer's dtype, on its device and in its mode."""
    floating = (p for p in module.parameters() if p.is_floating_point())
    like: Tensor = next(floating, next(iter(fitted.tensors.values())))
    return fitted.build(method, like.device, like.dtype).train(module.training)


def _hold(module: Any, method: Method, made: nn.Module | None) -> None:
    """A layer of another library holds its method's parameters as `layer_state` would have made them."""
    if made is not None:
        module.method_state, module.method_state_of = made, method


def _both(first: Callable[[], None], last: Callable[[], None]) -> Callable[[], None]:
    def undo() -> None:
        last()
        first()

    return undo


def set_methods(
    model: nn.Module, methods: Iterable[tuple[str, Method]], fitted: Mapping[str, State] | None = None
) -> Callable[[], None]:
    """Give layers of a converted model methods, and those named in `fitted` these parameters; all or none. Returns
    what undoes it."""
    states = fitted or {}
    undone: list[Callable[[], None]] = []

    def undo() -> None:
        while undone:
            undone.pop()()

    try:
        for name, method in methods:
            undone.append(set_method(model.get_submodule(name), method, states.get(name)))
    except BaseException:
        undo()
        raise
    return undo
