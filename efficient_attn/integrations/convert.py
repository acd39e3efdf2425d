"""`convert`: this package's attention in a model of any kind, checked on a sample, reported and reversible.

report = convert(model, attention="bigbird:block=64", sample=batch)
print(report)       # what was converted, what was not and why, and what the change costs on the sample
report.undo()
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConversionError, InputError, InputTypeError
from ..methods import Dense, Method, parse
from ..multihead import MultiheadAttention, replace_attention
from ..patterns import Pattern

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass
class Conversion:
    """What `convert` did.

    Attributes:
        attention: the method that the model has now.
        converted: name of a module ("" is the model) -> what it is and how it was converted.
        skipped: name of a module that looks like attention and was left alone -> why.
        dense_error: with a sample, the largest difference between the original's outputs and those of the converted
            model with dense attention, relative to the largest output; None without a sample.
        error: the same for the chosen attention: what the method changes.
    """

    attention: Method
    converted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    dense_error: float | None = None
    error: float | None = None
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give the model its old attention back; parameters that were trained meanwhile stay as they are."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        lines = [f"attention: {self.attention}", f"converted: {len(self.converted)}"]
        lines += [f"  {name or '(the model)'}: {how}" for name, how in self.converted.items()]
        lines += [f"left alone: {len(self.skipped)}"] if self.skipped else []
        lines += [f"  {name}: {why}" for name, why in self.skipped.items()]
        if self.dense_error is not None:
            lines.append(f"with dense attention: equal to the original within {self.dense_error:.1e}")
        if self.error is not None:
            lines.append(f"with {self.attention}: differs from the original by {self.error:.1e}")
        return "\n".join(lines)


def convert(
    model: nn.Module,
    attention: str | Method | Pattern = "dense",
    *,
    sample: Any = None,
    tolerance: float | None = None,
    predicate: Callable[[str, nn.Module], bool] | None = None,
) -> Conversion:
    """Give every attention layer of a model that this package knows another attention, in place.

    * torch.nn.MultiheadAttention, also inside torch.nn's Transformers, and this package's: by `replace_attention`.
    * models of transformers, anywhere in the model: by `set_attn_implementation`, see `integrations.huggingface`.
    * modules with a method `set_attention(spec)` and an attribute `attention` with what they have: by that.

    Args:
        model: itself none of torch.nn.MultiheadAttention.
        attention: a spec string, `Method` or `Pattern`.
        sample: an input: a tensor, a tuple of positional or a mapping of keyword arguments. The model runs on it in
            eval mode without gradients: as it was, with dense attention, which must give the same (unless the model
            has another method of this package already), and converted.
            transformers' layers make the parameters of methods that have some (linformer) in that run.
        tolerance: of that comparison, relative to the largest output; default by dtype, 1e-4 in float32.
        predicate: called with (name, module) for each of the above; False leaves it alone.

    Returns:
        A `Conversion`: what was converted, what was not and why, errors on the sample, and `undo()`.

    Raises:
        ConversionError: with dense attention the outputs differ, or the sample has no output to compare. The model is
            as before, as it is after every error.
        InputError: nothing to convert, or the model is an attention module itself. UnsupportedError: what the method
            cannot do in this model.
    """
    method = parse(attention)
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"convert takes a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.MultiheadAttention):
        raise InputError(
            f"the model is a {type(model).__name__} and cannot be replaced inside itself; "
            "use MultiheadAttention.from_torch(model, attention=...)"
        )
    before = None if sample is None else _outputs(model, sample)
    report = Conversion(method)
    try:
        comparable = before is not None and _is_dense(model)
        if comparable and method != Dense():
            dense = Conversion(Dense())
            try:
                _convert(model, dense, predicate)
                report.dense_error = _compared(before or [], _outputs(model, sample), tolerance)
            finally:
                dense.undo()
        _convert(model, report, predicate)
        if not report.converted:
            found = "; ".join(f"{name}: {why}" for name, why in report.skipped.items())
            raise InputError(f"the model has no attention that can be converted{': ' + found if found else ''}")
        if before is not None:
            after = _outputs(model, sample)
            if method == Dense() and comparable:
                report.dense_error = _compared(before, after, tolerance)
            else:
                report.error = _difference(before, after)
    except BaseException:
        report.undo()
        raise
    return report


def _is_dense(model: nn.Module) -> bool:
    """Whether no module of the model has a method of this package other than dense."""
    for module in model.modules():
        config = getattr(module, "config", None)
        name, colon, spec = str(getattr(config, "_attn_implementation", "")).partition(":")
        if name == "efficient_attn" and colon and parse(spec) != Dense():
            return False
        own = getattr(module, "attention", None)
        if (isinstance(module, MultiheadAttention) or _has_setter(module)) and parse(own) != Dense():  # type: ignore[arg-type]
            return False
    return True


# --- kinds of modules ------------------------------------------------------------------------------------------------


def _convert(model: nn.Module, report: Conversion, predicate: Callable[[str, nn.Module], bool] | None) -> None:
    """Do it, writing into the report what was done, how to undo it, and what was left."""
    wanted = predicate or (lambda name, module: True)
    _convert_transformers(model, report, wanted)
    _convert_own(model, report, wanted)
    _convert_torch(model, report, wanted)
    _explain_rest(model, report)


def _convert_torch(model: nn.Module, report: Conversion, wanted: Callable[[str, nn.Module], bool]) -> None:
    def replaceable(name: str, module: nn.MultiheadAttention) -> bool:
        if _inside(name, report.converted, but_torch=True):
            return False
        if not wanted(name, module):
            report.skipped[name] = "left out by predicate"
            return False
        if type(module) not in (nn.MultiheadAttention, MultiheadAttention):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            report.skipped[name] = f"{kind} computes something of its own, which would be lost"
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
    from . import huggingface

    for name, module in _topmost(model, lambda m: isinstance(m, transformers.PreTrainedModel)):
        if not wanted(name, module):
            report.skipped[name] = "left out by predicate"
            continue
        huggingface.register()
        parts = [m for m in module.modules() if isinstance(m, transformers.PreTrainedModel)]
        configs = list({id(part.config): part.config for part in parts}.values())
        old = [(config, config._attn_implementation) for config in configs]
        states = [(m, m._modules.get("method_state"), vars(m).get("method_state_of")) for m in module.modules()]
        report._undo.append(_restorer(old, states))
        wished = huggingface.implementation_name(report.attention)
        pretrained: Any = module
        pretrained.set_attn_implementation(wished)
        deaf = sorted({type(part).__name__ for part in parts if part.config._attn_implementation != wished})
        if not deaf:
            report.converted[name] = f"{type(module).__name__} of transformers, {wished!r}"
        elif any(config._attn_implementation == wished for config in configs):
            report.converted[name] = f"{type(module).__name__} of transformers, in part, {wished!r}"
            report.skipped[f"{name} ({', '.join(deaf)})"] = "does not go through transformers' attention interface"
        else:
            report.skipped[name] = f"{type(module).__name__} does not go through transformers' attention interface"


def _restorer(old: list[tuple[Any, str]], states: list[tuple[nn.Module, Any, Any]]) -> Callable[[], None]:
    def undo() -> None:
        for config, implementation in old:
            config._attn_implementation_internal = implementation
        for module, state, method in states:
            if state is None and vars(module).pop("method_state_of", None) is not None:
                del module.method_state
            elif method is not None:
                module.method_state, module.method_state_of = state, method

    return undo


def _convert_own(model: nn.Module, report: Conversion, wanted: Callable[[str, nn.Module], bool]) -> None:
    for name, module in _topmost(model, _has_setter):
        if _inside(name, report.converted):
            continue
        if not wanted(name, module):
            report.skipped[name] = "left out by predicate"
            continue
        own: Any = module
        report._undo.append(functools.partial(own.set_attention, own.attention))
        own.set_attention(report.attention)
        report.converted[name] = f"{type(module).__name__}, by set_attention"


def _explain_rest(model: nn.Module, report: Conversion) -> None:
    """Name what looks like attention and was left."""
    known = {**report.converted, **report.skipped}
    for name, module in _topmost(model, lambda m: "attention" in type(m).__name__.lower()):
        if not _inside(name, known) and not any(other.startswith(f"{name}.") for other in known):
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            report.skipped[name] = f"{kind} is of no kind that convert knows"


def _has_setter(module: Any) -> bool:
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


# --- the sample ------------------------------------------------------------------------------------------------------


def _outputs(model: nn.Module, sample: Any) -> list[Tensor]:
    """The floating-point tensors that the model returns for a sample, in eval mode; the mode of each module is kept."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(sample, Mapping):
                returned = model(**sample)
            else:
                returned = model(*sample) if isinstance(sample, tuple) else model(sample)
    finally:
        for module, training in modes:
            module.training = training
    found = list(_tensors(returned))
    if not found:
        raise ConversionError(
            f"the model returned {type(returned).__name__} without a floating-point tensor, so nothing can be compared"
        )
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _compared(before: list[Tensor], after: list[Tensor], tolerance: float | None) -> float:
    """The relative difference; raises ConversionError if it is not within the tolerance."""
    limit = max(TOLERANCES.get(t.dtype, 1e-4) for t in before) if tolerance is None else tolerance
    error = _difference(before, after)
    if not error <= limit:
        raise ConversionError(
            f"with dense attention the converted model differs from the original by {error:.1e} of its largest output, "
            f"more than {limit:.1e}. Is the sample padded, with outputs of padding (leave it out), or the model random "
            "in eval mode? Else raise tolerance=, or leave modules out with predicate="
        )
    return error


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of its output; inf where shapes or NaN differ."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return torch.inf
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        old, new = old.double(), new.double()
        if not old.numel() or torch.equal(old.nan_to_num(), new.nan_to_num()):
            if not torch.equal(old.isnan(), new.isnan()):
                return torch.inf
            continue
        if not torch.equal(old.isnan(), new.isnan()):
            return torch.inf
        gap = (old - new).nan_to_num().abs().max() / old.nan_to_num().abs().max().clamp(min=1e-30)
        worst = max(worst, gap.item())
    return worst
