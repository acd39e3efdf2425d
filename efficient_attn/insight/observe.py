"""`observe`: the statistics of every attention of a model, gathered while it runs as always.

Calls are seen where they are made: our methods tell (tracing.OBSERVERS), those of scaled_dot_product_attention come
by a TorchFunctionMode, and torch.nn's way around it is closed while somebody looks. The output of a model stays what it
is with that function.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import InputError, InputTypeError
from ..inputs import MAX_HEAD_DIM
from ..integrations.routed import library_of
from ..integrations.torch_sdpa import bound
from ..methods import Method, Sparse
from ..methods.sparse import DENSE
from ..tracing import OBSERVERS, shapes_only, unobserved
from .methods import LINEAR_WANT, method_statistics
from .statistics import AttentionStatistics, check_want

_SDPA = F.scaled_dot_product_attention
_MULTI_HEAD = F.multi_head_attention_forward
_SIGNATURE = inspect.signature(_MULTI_HEAD)
_OPTIONS = ("top_k", "row_weights", "key_sets", "nearby", "map_block", "backend")


@dataclass
class Observation:
    """One call of attention in a model.

    With keep=True there are `inputs`, what `method_statistics` takes, and after a backward `grad_out` (B, Hq, Nq, Dv),
    the gradient of what the call returned.
    """

    name: str  # of the module that called, as in model.named_modules()
    method: str
    queries: int
    keys: int
    statistics: AttentionStatistics | None = None
    inputs: dict[str, Any] | None = None
    grad_out: Tensor | None = None


@dataclass
class observe:
    """Within a with block, gather `attention_statistics` of every attention that a model computes.

        with observe(model) as seen:
            model(**inputs)
        seen.layers[0].statistics.entropy

    Our module and methods, torch.nn, timm, diffusers, open_clip and whatever calls scaled_dot_product_attention from
    Python are seen, and so are models of transformers; one that was loaded with attn_implementation="eager" runs with
    "sdpa" meanwhile, the same function, and so does timm's that is told not to use the fused one. What torch.compile
    compiled runs as the Python that it was made from.

    Args:
        model: the module to watch; calls outside its forward are seen, too, as of the module "".
        want: as in `attention_statistics`; () gathers nothing. None: all that is defined for the layer's method.
        keep: keep each call's query, key, value and masks, and the gradient of its output: what `rollout` and
            `relevance` need.
        to: a folder; each call is written there, at once and whole, as <number>.pt, and only its name stays in memory.
            For runs that do not fit: `observe.load(folder)` reads them back, also while the run goes on or after it was
            killed.
        options: top_k, row_weights, key_sets, nearby, map_block, backend as in `attention_statistics`.

    Attributes:
        layers: an `Observation` of each call, in order.
        left: why calls were not observed -> how many: nested tensors, wide heads, tensors without values, and modules
            that multiply by a softmax themselves.

    Raises:
        InputTypeError: the model is no module.
        InputError: unknown names in `want` or `options`; `to` is a folder that already holds something.
    """

    model: nn.Module
    want: Sequence[str] | None = None
    keep: bool = False
    to: str | Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    layers: list[Observation] = field(default_factory=list, init=False)
    left: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise InputTypeError(f"observe takes the torch.nn.Module to watch; got {type(self.model).__name__}")
        check_want(() if self.want is None else self.want)
        unknown = [name for name in self.options if name not in _OPTIONS]
        if unknown:
            raise InputError(f"options {unknown} are unknown; choose from {list(_OPTIONS)}")
        if self.keep and self.to is not None:
            raise InputError("keep=True holds every call in memory, to= writes it to disk: choose one")
        self._running: list[str] = []
        self._mode: Any = None
        self._undo: list[Any] = []

    def __enter__(self) -> observe:
        if self.to is not None:
            folder = Path(self.to)
            if folder.exists() and any(folder.iterdir()):
                raise InputError(f"{folder} is not empty; give observe(to=...) a new folder")
            folder.mkdir(parents=True, exist_ok=True)
        self._watch_names()
        self._leave_eager()
        self._leave_unfused()
        self._leave_compiled()
        self._mode = _Calls(self)
        self._mode.__enter__()
        OBSERVERS.append(self._see)
        return self

    def __exit__(self, *error: Any) -> None:
        OBSERVERS.remove(self._see)
        self._mode.__exit__(*error)
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._running.clear()

    @staticmethod
    def load(folder: str | Path) -> Iterator[Observation]:
        """The calls that `observe(to=folder)` has written so far, one at a time, in order.

        Raises:
            InputError: no such folder.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}; give the one that observe(to=...) wrote to")
        return _written(folder)

    # --- who calls ---

    def _watch_names(self) -> None:
        for name, module in self.model.named_modules():
            handles: list[RemovableHandle] = [
                module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name)),
                module.register_forward_hook(lambda *_: self._leave(), always_call=True),
            ]
            self._undo += [handle.remove for handle in handles]

    def _leave(self) -> None:
        if self._running:
            self._running.pop()

    def _leave_eager(self) -> None:
        """Models of transformers that multiply matrices themselves call PyTorch's function for the time being."""
        configs: dict[int, Any] = {id(m.config): m.config for m in self.model.modules() if hasattr(m, "config")}
        for config in configs.values():
            if getattr(config, "_attn_implementation", None) == "eager":
                config._attn_implementation = "sdpa"
                self._undo.append(lambda config=config: setattr(config, "_attn_implementation", "eager"))

    def _leave_unfused(self) -> None:
        """Attention of timm that multiplies matrices itself, likewise."""
        for module in self.model.modules():
            held = vars(module)
            if library_of(module) == "timm" and held.get("fused_attn") is False:
                held["fused_attn"] = True
                self._undo.append(lambda held=held: held.update(fused_attn=False))

    def _leave_compiled(self) -> None:
        """A graph that was compiled before anybody looked would tell nothing."""
        stance = torch.compiler.set_stance("force_eager")
        stance.__enter__()
        self._undo.append(lambda: stance.__exit__(None, None, None))

    # --- what is called ---

    def _see(
        self, method: Method, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], out: Tensor
    ) -> None:
        """Take note of a call of `method.attend` and what it returned."""
        if _has_no_values(query):
            return self._pass("tensors without values, or those of torch.func")
        inputs: dict[str, Any] = {name: options.get(name) for name in _ARGUMENTS} | {
            "query": query,
            "key": key,
            "value": value,
        }
        inputs = {name: v.detach() if isinstance(v, Tensor) else v for name, v in inputs.items() if v is not None}
        name = self._running[-1] if self._running else ""
        seen = Observation(name, str(method), query.shape[2], key.shape[2])
        if self.want is None or self.want:
            with torch.no_grad():
                want = self.want if isinstance(method, Sparse) or self.want is None else _defined(self.want)
                places = dict(inputs)
                if "distance" in (want or ()) and query.shape[2] != key.shape[2] and "causal_alignment" not in places:
                    want = [name for name in want or () if name != "distance"]
                seen.statistics = method_statistics(method, **places, want=want, **self.options)
        if self.keep:
            seen.inputs = {"method": method, **inputs}
            if out.requires_grad:
                out.register_hook(lambda gradient: setattr(seen, "grad_out", gradient.detach()))
        if self.to is not None:
            self._write(seen)
            seen.statistics = None
        self.layers.append(seen)

    def _write(self, seen: Observation) -> None:
        assert self.to is not None
        fields = {name: getattr(seen, name) for name in ("name", "method", "queries", "keys")}
        path = Path(self.to) / f"{len(self.layers):08d}.pt"
        part = path.with_suffix(".part")  # a reader, also after this process was killed, finds whole files only
        torch.save({**fields, "statistics": seen.statistics and seen.statistics._asdict()}, part)
        part.replace(path)

    def _pass(self, reason: str) -> None:
        self.left[reason] = self.left.get(reason, 0) + 1

    def _see_written_out(self) -> None:
        """Take note of an attention that is made of matrix products and a softmax, whose weights go unseen."""
        module = self.model.get_submodule(self._running[-1]) if self._running else self.model
        self._pass(f"attention written out by {type(module).__qualname__}")

    def _see_function(self, call: dict[str, Any], out: Tensor) -> None:
        """Take note of a call of scaled_dot_product_attention."""
        query, key, value, mask = call["query"], call["key"], call["value"], call["attn_mask"]
        if any(t.is_nested for t in (query, key, value)):
            reason = "nested tensors"
        elif max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
            reason = f"a head_dim above {MAX_HEAD_DIM}"
        elif not query.shape[:-3] == key.shape[:-3] == value.shape[:-3] or query.dim() < 3:
            reason = "shapes that broadcast"
        else:
            reason = ""
        if reason:
            return self._pass(reason)
        options = {"scale": call["scale"], "is_causal": call["is_causal"]}
        if call["is_causal"]:
            options["causal_alignment"] = "top_left"
        query, key, value = (t[None] if t.dim() == 3 else t.flatten(0, -4) for t in (query, key, value))
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask.flatten(0, -4)
            hidden = mask <= torch.finfo(mask.dtype).min if mask.dtype != torch.bool else None
            if hidden is not None and bool((hidden | (mask == 0)).all()):
                mask = ~hidden
            options |= {"mask": mask} if mask.dtype == torch.bool else {"bias": mask.to(query.dtype)}
        self._see(DENSE, query, key, value, options, out)


_ARGUMENTS = ("state", "key_mask", "mask", "bias", "is_causal", "causal_alignment", "scale", "softcap", "sinks")


def _has_own_function(tensors: Sequence[Any]) -> bool:
    """Of tensors, not of modes: another observer's would take the call away before its attention is seen."""
    return any(isinstance(t, Tensor) and type(t) not in (Tensor, nn.Parameter) for t in tensors)


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or shapes_only(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _written(folder: Path) -> Iterator[Observation]:
    for path in sorted(folder.glob("*.pt")):
        fields = torch.load(path, weights_only=True)
        statistics = fields.pop("statistics")
        yield Observation(**fields, statistics=statistics and AttentionStatistics(**statistics))


def _defined(want: Sequence[str]) -> list[str]:
    return [name for name in want if name in LINEAR_WANT]


_SOFTMAXES = frozenset((F.softmax, torch.softmax, Tensor.softmax))
_PRODUCTS = frozenset((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.einsum))


class _Calls(TorchFunctionMode):
    """Calls of scaled_dot_product_attention, also those of torch.nn.MultiheadAttention.

    A softmax that, dropped out, cast or reshaped, ends in a matrix product is an attention that somebody wrote out;
    `weights` holds those that have not come to their product yet.
    """

    def __init__(self, watcher: observe) -> None:
        super().__init__()
        self.watcher = watcher
        self.weights = WeakIdKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA:
            return self._call(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        result = func(*args, **kwargs)
        if OBSERVERS:  # not within a method, which tells of itself
            self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if not isinstance(result, Tensor):
            return
        if func in _SOFTMAXES:
            if result.dim() > 2:  # rows without heads and batches choose experts or classes
                self.weights[result] = True
        elif len(self.weights):
            first = [*args, *kwargs.values()][:3]  # einsum has its equation before them
            held = [t for t in first if isinstance(t, Tensor) and t in self.weights]
            if held and func in _PRODUCTS:
                self.weights.pop(held[0])
                self.watcher._see_written_out()
            elif held and result.numel() == held[0].numel():
                self.weights[result] = True

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        out = _SDPA(*args, **kwargs)
        with unobserved() as observers:
            if observers:
                self.watcher._see_function(bound(*args, **kwargs), out)
        return out

    def _multi_head(self, *args: Any, **kwargs: Any) -> Any:
        function = FunctionType(
            _MULTI_HEAD.__code__,
            {
                **_MULTI_HEAD.__globals__,
                "scaled_dot_product_attention": self._call,
                "has_torch_function": _has_own_function,
            },
            _MULTI_HEAD.__name__,
            _MULTI_HEAD.__defaults__,
        )
        arguments = _SIGNATURE.bind(*args, **kwargs)
        arguments.apply_defaults()
        if not arguments.arguments["need_weights"]:
            return function(*args, **kwargs)
        result = _MULTI_HEAD(*args, **kwargs)  # multiplies matrices itself; what it multiplies is seen without weights
        with torch.no_grad(), torch._C.DisableTorchFunction():
            function(**{**arguments.arguments, "need_weights": False, "training": False})
        return result
