"""`convert`: this package's attention in a model of any kind, checked on a sample, reported and reversible.

report = convert(model, attention="bigbird:block=64", sample=batch)
print(report)       # what was converted, what was not and why, and what the change costs on the sample
report.undo()

With `budget=` the measured error decides which layer gets what, see `budget/`; `plan=` does that again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConversionError, InputError, InputTypeError
from ..methods import DENSE, Method, parse
from ..multihead import MultiheadAttention
from ..patterns import Pattern
from . import fidelity, routed
from .conversion import Conversion
from .fidelity import Trace
from .kinds import convert_kinds, has_setter, unreached
from .layer_state import LAYER_METHOD

if TYPE_CHECKING:
    from .budget import Budget, Plan

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def convert(
    model: nn.Module,
    attention: str | Method | Pattern = "dense",
    *,
    sample: Any = None,
    tolerance: float | None = None,
    predicate: Callable[[str, nn.Module], bool] | None = None,
    repeats: int = 3,
    budget: float | Budget | None = None,
    plan: Plan | Mapping[str, Any] | str | PathLike[str] | None = None,
) -> Conversion:
    """Give every attention layer of a model that this package knows another attention, in place.

    * torch.nn.MultiheadAttention, also inside torch.nn's Transformers, and this package's: by `replace_attention`.
    * models of transformers, anywhere in the model: by `set_attn_implementation`, see `integrations.huggingface`.
    * layers of transformers past its interface that write their attention out (BLOOM, Falcon, DeBERTa, ...), and those
      of classes that `integrations.register_layer` was told: their own scores, see `integrations.eager_layers`.
    * modules with a method `set_attention(spec)` beside an `attention` of this package, as its models have: by that.
    * attention of timm, open_clip and diffusers: its call of scaled_dot_product_attention, see `integrations.routed`.

    Args:
        model: not itself a torch.nn.MultiheadAttention.
        attention: a spec string, `Method` or `Pattern`.
        sample: an input: a tensor, a tuple of positional or a mapping of keyword arguments. The model runs on it in
            eval mode without gradients, more than once: as it was, with dense attention, which must give the same
            (unless the model has another method of this package already), and converted.
            Layers of other libraries make the parameters of methods that have some (linformer) in that run.
        tolerance: of that comparison, relative to the largest output; default by dtype, 1e-4 in float32.
        predicate: called with (name, module) for each of the above; False leaves it alone.
        repeats: forwards of the sample that are timed, of the original and of the converted model; with 0 neither time
            nor memory is measured.
        budget: instead of an attention, the largest error of the outputs, 0.02 for 2 % of their norm, or a `Budget`.
            Each layer gets the fastest attention with which the error, measured on samples that are held out, stays
            within; all are dense if there is nothing to gain. The search runs on a copy that shares the parameters.
        plan: instead of an attention, what a search found: `Conversion.plan`, its JSON, or the path of its file.

    Returns:
        A `Conversion`: what was converted, what was not and why; on the sample errors of outputs and of each layer,
        time and memory, as text and `plot()`; and `undo()`.

    Raises:
        ConversionError: with dense attention the outputs differ, or the sample has no output to compare. The model is
            as before, as it is after every error.
        InputError: nothing to convert, the model is an attention module itself, or repeats that are no number; an
            attention, a budget and a plan together, a budget without a sample, or a plan for another model.
            UnsupportedError: what the method cannot do in this model.
    """
    method = parse(attention)
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"convert takes a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.MultiheadAttention):
        raise InputError(
            f"the model is a {type(model).__name__} and cannot be replaced inside itself; "
            "use MultiheadAttention.from_torch(model, attention=...)"
        )
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 0:
        raise InputError(f"repeats must be a whole number of forwards, 0 or more; got {repeats!r}")
    if sum((not method.is_dense, budget is not None, plan is not None)) > 1:
        raise InputError("attention=, budget= and plan= each say what the layers get: give one of them")
    report = Conversion(method, plan=None if plan is None else _read_plan(plan))
    try:
        if budget is not None:
            _convert_within(model, report, predicate, sample, tolerance, repeats, budget)
        elif sample is None:
            convert_kinds(model, report, predicate)
        else:
            _convert_measured(model, report, predicate, sample, tolerance, repeats)
        if not report.converted:
            found = "; ".join(f"{name}: {why}" for name, why in report.skipped.items())
            raise InputError(f"the model has no attention that can be converted{': ' + found if found else ''}")
    except BaseException:
        report.undo()
        raise
    return report


def _convert_measured(
    model: nn.Module,
    report: Conversion,
    predicate: Callable[[str, nn.Module], bool] | None,
    sample: Any,
    tolerance: float | None,
    repeats: int,
) -> None:
    """Convert, and run the sample as the model was, with dense attention and converted."""
    comparable = _is_dense(model)
    with nullcontext(Trace()) if comparable else fidelity.traced(model) as original:
        before = fidelity.outputs(model, sample)
    report.before = fidelity.cost(model, sample, repeats) if repeats > 0 else None
    if comparable:
        # It must equal the original, so its layers stand for those of the original, which may be of any kind.
        dense = report if report.is_dense else Conversion(DENSE)
        try:
            convert_kinds(model, dense, predicate)
            with fidelity.traced(model) as original:
                outputs = fidelity.outputs(model, sample)
            report.dense_error = _compared(before, outputs, tolerance) if dense.converted else None
        finally:
            if dense is not report:
                dense.undo()
    if not comparable or not report.is_dense:
        convert_kinds(model, report, predicate)
        with fidelity.traced(model) as converted:
            report.error = fidelity.difference(before, fidelity.outputs(model, sample))
    else:
        converted = original
    report.layers = fidelity.compared(original, converted)
    report.unreached = unreached(model, report, converted)
    if not report.layers and report.converted:
        raise ConversionError(
            f"none of the converted modules ({', '.join(report.converted) or 'the model'}) called this package's "
            "attention on the sample, so the conversion changes nothing; give a sample that runs them, or leave them "
            "out with predicate="
        )
    report.after = fidelity.cost(model, sample, repeats) if repeats > 0 else None


def _read_plan(given: Any) -> Plan:
    from .budget import read

    return read(given)


def _convert_within(
    model: nn.Module,
    report: Conversion,
    predicate: Callable[[str, nn.Module], bool] | None,
    sample: Any,
    tolerance: float | None,
    repeats: int,
    budget: float | Budget,
) -> None:
    """Search on copies of the model, convert it by what was found, and measure that once more."""
    from .budget import Budget, Search  # nothing else of this package needs it

    wanted = budget if isinstance(budget, Budget) else Budget(budget)
    if sample is None:
        raise InputError("a budget is measured: give convert a sample=, a batch of what the model is for")
    if not _is_dense(model):
        raise InputError(
            "the model has a method other than dense already, and a budget counts from dense; undo it first"
        )

    def make_dense(copy: nn.Module) -> None:
        made = Conversion(DENSE)
        convert_kinds(copy, made, predicate)
        if not made.converted:
            found = "; ".join(f"{name}: {why}" for name, why in made.skipped.items())
            raise InputError(f"the model has no attention that can be converted{': ' + found if found else ''}")

    search = Search(model, sample, wanted, make_dense, tolerance)
    found = search.run()
    shown = search.held_out[0]
    with fidelity.traced(search.dense) as original:
        fidelity.run(search.dense, shown)
    report.before = fidelity.cost(model, shown, repeats) if repeats > 0 else None
    report.plan, report.found, report.dense_error = found.plan, found, found.dense_error
    convert_kinds(model, report, predicate)
    with fidelity.traced(model) as converted:
        report.error = search.error_of(model)
    if not report.error <= wanted.limit:
        raise ConversionError(
            f"the search measured an error of {found.error:.2e} and the converted model {report.error:.2e}, more than "
            f"the budget of {wanted.limit:g}: what the model returns is not the same from run to run"
        )
    report.layers = fidelity.compared(original, converted)
    report.unreached = unreached(model, report, converted)
    report.after = fidelity.cost(model, shown, repeats) if repeats > 0 else None


def _is_dense(model: nn.Module) -> bool:
    """Whether no module of the model has a method of this package other than dense."""
    for module in model.modules():
        config = getattr(module, "config", None)
        name, colon, spec = str(getattr(config, "_attn_implementation", "")).partition(":")
        if name == "efficient_attn" and colon and not parse(spec).is_dense:
            return False
        if not parse(vars(module).get(LAYER_METHOD, DENSE)).is_dense:
            return False
        known = isinstance(module, MultiheadAttention) or has_setter(module)
        own: Any = module.attention if known else getattr(module, "efficient_attn_method", None)
        if (known or routed.is_routed(module)) and not parse(own).is_dense:
            return False
    return True


def _compared(before: list[Tensor], after: list[Tensor], tolerance: float | None) -> float:
    """The relative difference; raises ConversionError if it is not within the tolerance."""
    limit = max(TOLERANCES.get(t.dtype, 1e-4) for t in before) if tolerance is None else tolerance
    error = fidelity.difference(before, after)
    if not error <= limit:
        raise ConversionError(
            f"with dense attention the converted model differs from the original by {error:.1e} of its largest output, "
            f"more than {limit:.1e}. Is the sample padded, with outputs of padding (leave it out), or the model random "
            "in eval mode? Else raise tolerance=, or leave modules out with predicate="
        )
    return error
