"""Kinds of attention modules, and how `convert` gives each another method: in place, reported and to be undone.

A kind takes the model, a `Conversion` to write into and what the caller wants, in the order of `convert_kinds`: what an
earlier one has taken a later one leaves.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..handover import hides_forward
from ..methods import Method
from ..multihead import MultiheadAttention, replace_attention
from ..patterns import Pattern
from . import eager_layers, huggingface, routed
from .conversion import Conversion
from .fidelity import Trace
from .layer_state import state_restorer

NO_INTERFACE = "does not go through transformers' attention interface"
ATTENTION = re.compile("attention|attn", re.IGNORECASE)  # in the name of a class


def convert_kinds(model: nn.Module, report: Conversion, predicate: Callable[[str, nn.Module], bool] | None) -> None:
    """Do it, writing into the report what was done, how to undo it, and what was left."""
    wanted = predicate or (lambda name, module: True)
    _convert_eager_layers(model, report, wanted)
    _convert_transformers(model, report, wanted)
    _convert_own(model, report, wanted)
    _convert_routed(model, report, wanted)
    _convert_torch(model, report, wanted)
    _explain_rest(model, report)
    if report.plan is not None:
        from .budget import layers

        report.plan.check(model)
        report._undo.append(layers.set_methods(model, report.plan.methods.items(), report.plan.fitted))


def _convert_torch(model: nn.Module, report: Conversion, wanted: Callable[[str, nn.Module], bool]) -> None:
    def replaceable(name: str, module: nn.MultiheadAttention) -> bool:
        if _inside(name, report.converted, but_torch=True):
            return False
        if not wanted(name, module):
            report.skipped[name] = "left out by predicate"
            return False
        if type(module) not in (nn.MultiheadAttention, MultiheadAttention):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            report.skipped[name] = f"{kind} computes something else, which would be lost"
            return False
        if hides_forward(module):
            report.skipped[name] = "has a forward of its own on the instance that does not lead to the module's"
            return False
        report.converted[name] = f"{type(module).__name__}, replaced"
        return True

    old = replace_attention(model, report.attention, predicate=replaceable)

    def undo() -> None:
        for name, module in old.items():
            model.set_submodule(name, module)

    report._undo.append(undo)


def _convert_transformers(model: nn.Module, report: Conversion, wanted: Callable[[str, nn.Module], bool]) -> None:
    transformers = sys.modules.get("transformers")  # if it was never imported, the model has none of its modules
    if transformers is None:
        return
    for name, module in _topmost(model, lambda m: isinstance(m, transformers.PreTrainedModel)):
        if not wanted(name, module):
            report.skipped[name] = "left out by predicate"
            continue
        huggingface.register()
        parts = [m for m in module.modules() if isinstance(m, transformers.PreTrainedModel)]
        configs = list({id(part.config): part.config for part in parts}.values())
        old = [(config, config._attn_implementation) for config in configs]
        report._undo.append(_restorer(old, state_restorer(module)))
        wished = huggingface.implementation_name(report.attention)
        pretrained: Any = module
        if any(part._can_set_attn_implementation() for part in parts):
            with huggingface.in_part():
                pretrained.set_attn_implementation(wished)
        deaf = [part for part in parts if part.config._attn_implementation != wished]
        served = [part for part in deaf if any(eager_layers.is_served(m) for m in part.modules())]
        for part in served:
            if any(eager_layers.is_served(m) and eager_layers.writes_scores(m) for m in part.modules()):
                huggingface.announce(part, wished)  # its layers take masks of ours
        if not deaf:
            report.converted[name] = f"{type(module).__name__} of transformers, {wished!r}"
        elif len(deaf) < len(parts) and not served:
            report.converted[name] = f"{type(module).__name__} of transformers, in part, {wished!r}"
            kinds = ", ".join(sorted({type(part).__name__ for part in deaf}))
            report.skipped[f"{name} ({kinds})"] = NO_INTERFACE
        else:
            heard = {id(part) for part in parts} - {id(part) for part in deaf}
            for inner, part in _topmost(module, functools.partial(_is_one_of, heard)):
                inner = f"{name}.{inner}" if name else inner
                report.converted[inner] = f"{type(part).__name__} of transformers, {wished!r}"


def _is_one_of(ids: set[int], module: nn.Module) -> bool:
    return id(module) in ids


def _convert_eager_layers(model: nn.Module, report: Conversion, wanted: Callable[[str, nn.Module], bool]) -> None:
    for name, module in _topmost(model, eager_layers.is_known):
        reason = eager_layers.why_left(module, report.attention) if wanted(name, module) else "left out by predicate"
        if reason is not None:
            report.skipped[name] = f"{type(module).__qualname__} {reason}" if wanted(name, module) else reason
            continue
        report._undo.append(state_restorer(module))
        report._undo.append(eager_layers.serve(module, report.attention))
        report.converted[name] = eager_layers.origin(module)
    report._undo += [eager_layers.structure(model), eager_layers.follow_changes(model)]


def _restorer(old: list[tuple[Any, str]], restore_states: Callable[[], None]) -> Callable[[], None]:
    def undo() -> None:
        for config, implementation in old:
            config._attn_implementation_internal = implementation
        restore_states()

    return undo


def _convert_own(model: nn.Module, report: Conversion, wanted: Callable[[str, nn.Module], bool]) -> None:
    for name, module in _topmost(model, has_setter):
        if _inside(name, report.converted):
            continue
        if not wanted(name, module):
            report.skipped[name] = "left out by predicate"
            continue
        own: Any = module
        if getattr(own, "cross", False) is True:  # of this package's models, whose own set_attention leaves it too
            report.skipped[name] = "attends to a memory, which patterns and low-rank methods are not for"
            continue
        report._undo.append(functools.partial(_set_back, own, own.attention, own._modules.get("method_state")))
        own.set_attention(report.attention)
        report.converted[name] = f"{type(module).__name__}, by set_attention"


def _set_back(module: Any, attention: str | Method | Pattern, state: nn.Module | None) -> None:
    module.set_attention(attention)
    if state is not None:  # the parameters that it had, not fresh ones
        module.method_state = state


def _convert_routed(model: nn.Module, report: Conversion, wanted: Callable[[str, nn.Module], bool]) -> None:
    for name, module in _topmost(model, lambda m: routed.library_of(m) is not None):
        if _inside(name, report.converted, but_torch=True):
            continue
        reason = routed.why_not_routed(module) if wanted(name, module) else "left out by predicate"
        if reason is not None:
            report.skipped[name] = reason
            continue
        restore_states = state_restorer(module)
        report._undo.append(restore_states)
        report._undo.append(routed.route(module, report.attention))
        kind = f"{type(module).__qualname__} of {routed.library_of(module)}"
        report.converted[name] = f"{kind}, its call of scaled_dot_product_attention"


def _looks_like_attention(module: nn.Module) -> bool:
    if type(module).__module__.startswith("transformers.") and not any(True for _ in module.parameters()):
        return False  # what makes masks and positions
    return bool(ATTENTION.search(type(module).__name__))


def _explain_rest(model: nn.Module, report: Conversion) -> None:
    """Name what looks like attention and was left."""
    for name, module in model.named_modules():
        reason = eager_layers.why_left(module, report.attention)
        if reason is not None and not _inside(name, report.skipped):
            report.skipped[name] = f"{type(module).__qualname__} {reason}"
    known = {**report.converted, **report.skipped}
    for name, module in _topmost(model, _looks_like_attention):
        holds_known = any(other.startswith(f"{name}.") for other in known) if name else bool(known)
        if not _inside(name, known) and not holds_known:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            report.skipped[name] = (
                f"{kind} {eager_layers.why_left(module, report.attention) or 'is of no kind that convert knows'}"
            )


def unreached(model: nn.Module, report: Conversion, trace: Trace) -> dict[str, str]:
    """Converted modules, and what looks like attention in them, in which nothing attended in a trace."""
    reached = list(trace.outputs)

    def idle(name: str) -> bool:
        return not any(_inside(layer, [name]) or _inside(name, [layer]) for layer in reached)

    found = {name: type(model.get_submodule(name)).__name__ for name in report.converted if idle(name)}
    for name, kind in trace.ran.items():  # in the order in which they ran: what holds others comes first
        if ATTENTION.search(kind) and _inside(name, report.converted) and idle(name) and not _inside(name, found):
            found[name] = kind
    return found


def has_setter(module: Any) -> bool:
    own = getattr(module, "attention", None)
    return callable(getattr(module, "set_attention", None)) and isinstance(own, (str, Method, Pattern))


def _topmost(model: nn.Module, chosen: Callable[[nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are chosen and lie in no other that is."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not _inside(name, found) and chosen(module):
            found.append(name)
            yield name, module


def _inside(name: str, names: Any, *, but_torch: bool = False) -> bool:
    """Whether a module is, or lies in, one of the named. but_torch: transformers' models, whose own nn.MHA count on."""
    for other in names:
        if but_torch and "of transformers" in names[other]:
            continue
        if not other or name == other or name.startswith(f"{other}."):
            return True
    return False
