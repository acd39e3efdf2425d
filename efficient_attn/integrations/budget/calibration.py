"""What each candidate would do in each layer: its error, how much the model's outputs mind, and its time.

With dense attention's output O of a layer (of a head, its columns), a candidate's C, the layer's projection W and
the outputs y of the model, whose Jacobian by O is J, there are

    error        |(C - O) W| / |O W|
    sensitivity  |J (C - O)| / |y|, to first order what the outputs change by

The second from K random signs u of the outputs, E[(u^T J e)^2] = |J e|^2 (Hutchinson 1990), where u^T J is one
gradient that serves all layers and candidates, e = C - O, and batch elements count as samples of their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConversionError, EfficientAttnError, InputError
from ...methods import DENSE, Method
from . import layers
from .comparing import Compared
from .distillation import distilled
from .kept import Kept
from .layers import Call, Layer, State

Cost = Callable[[Method, Call], float]
Note = Callable[[str, int, int], None]


@dataclass
class Figures:
    """What one candidate does in one layer: whole, and head by head; sums over the layer's calls."""

    method: Method
    cost: float  # seconds, or what `cost=` says
    error: float = math.nan
    sensitivity: float = math.nan
    head_errors: list[float] = field(default_factory=list)
    head_sensitivities: list[float] = field(default_factory=list)
    refused: str = ""  # why it is none for this layer
    fitted: State | None = None  # its parameters, where they were distilled

    def numbers(self) -> dict[str, Any]:
        """All fields but the method and its parameters, as JSON values."""
        return {name: value for name, value in vars(self).items() if name not in ("method", "fitted")}

    @property
    def weight(self) -> float:
        """The error that the knapsack counts: the sensitivity, where there is one."""
        return self.error if math.isnan(self.sensitivity) else self.sensitivity

    @property
    def head_weights(self) -> list[float]:
        return self.head_errors if math.isnan(self.sensitivity) else self.head_sensitivities


@dataclass
class Table:
    """Name of a layer -> its dense cost and the figures of all candidates; `fixed`: layers that stay dense, and why."""

    dense: dict[str, float] = field(default_factory=dict)
    figures: dict[str, list[Figures]] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    differentiable: bool = True

    def fitted(self, methods: Mapping[str, Method]) -> dict[str, State]:
        """Name of a layer -> the distilled parameters of the method that it gets, where there are some."""
        found = ((name, f) for name, method in methods.items() for f in self.figures[name] if f.method == method)
        return {name: f.fitted for name, f in found if f.fitted is not None}


def calibrate(
    model: nn.Module,
    sample: Any,
    candidates_for: Callable[[int], list[Method]],
    *,
    compared: Compared,
    probes: int,
    seed: int,
    cost: Cost | None,
    note: Note,
    distill: int = 0,
    kept: Kept | None = None,
) -> Table:
    """One pass over a sample, of a model that attends densely by this package.

    Raises:
        ConversionError: no layer attends by this package on the sample. InputError: a batch of one to distill on.
    """
    note("forward with gradients", 0, 1)
    returned, found = layers.record(model, sample)
    if not found:
        raise ConversionError("no layer attended on the sample; give a sample that runs the model's attention")
    table = Table(fixed={name: layer.fixed for name, layer in found.items() if layer.fixed})
    free = {name: layer for name, layer in found.items() if not layer.fixed}
    gradients = _gradients(returned, sample, compared, free, probes, seed, note)
    table.layers, table.differentiable = free, gradients is not None
    costs: dict[tuple[Any, ...], dict[Method, float | str]] = {}
    for number, (name, layer) in enumerate(free.items()):
        note("layers measured", number, len(free))
        length = layer.calls[0].query.shape[2]
        candidates = candidates_for(length)
        if distill and min(call.out.shape[0] for call in layer.calls) < 2:
            raise InputError(
                f"distillation trains on one half of the batch that calibrates and checks on the other, and {name!r} "
                "attends with a batch of 1; give a sample of 4 or more, half of which is held out, or 2 and held_out="
            )
        table.heads[name], table.lengths[name] = layer.heads, length
        own = None if gradients is None else gradients.pop(name)
        if kept is not None and name in kept.layers:
            by_name, known = {str(method): method for method in candidates}, kept.layers[name]
            table.figures[name] = [Figures(by_name[f["method"]], **f["figures"]) for f in known["figures"]]
            table.dense[name] = known["dense"]
            continue
        for call in layer.calls:
            if call.shape not in costs:
                costs[call.shape] = _costs(call, [DENSE, *candidates], cost)
        by_call = [costs[call.shape] for call in layer.calls]
        table.dense[name] = sum(float(found[DENSE]) for found in by_call)
        figures = [
            _figures(model, layer, method, [f.get(method, math.nan) for f in by_call], table.dense[name], own, distill)
            for method in candidates
        ]
        table.figures[name] = figures
        if kept is not None and all(f.fitted is None for f in figures):  # parameters are no figures: fitted again
            kept.put_layer(
                name, table.dense[name], [{"method": str(f.method), "figures": f.numbers()} for f in figures]
            )
    note("layers measured", len(free), len(free))
    return table


def _gradients(
    returned: Any, sample: Any, compared: Compared, free: dict[str, Layer], probes: int, seed: int, note: Note
) -> dict[str, list[Tensor]] | None:
    """By layer and call, K gradients (K, B, H, N, Dv) by the outputs of attention; None where there is no gradient."""
    outputs = compared.outputs(returned, sample)
    there = [y for y in outputs if y.requires_grad]
    calls = [call for layer in free.values() for call in layer.calls]
    if not there or not calls or probes == 0:
        return None
    generator = torch.Generator().manual_seed(seed)
    found: list[list[Tensor]] = [[] for _ in calls]
    for number in range(probes):
        note("gradients", number, probes)
        total = torch.zeros((), dtype=torch.float64, device=there[0].device)
        for y in there:
            signs = (torch.randint(0, 2, y.shape, generator=generator) * 2 - 1).to(y.device, y.dtype)
            total = total + (signs * y).double().sum() / y.detach().double().norm().clamp(min=1e-30)
        last = number == probes - 1
        grads = torch.autograd.grad(total, [c.probe for c in calls], retain_graph=not last, allow_unused=True)
        for own, gradient, call in zip(found, grads, calls, strict=True):
            own.append(torch.zeros_like(call.out) if gradient is None else gradient)
    stacked = iter([torch.stack(own) for own in found])
    return {name: [next(stacked) for _ in layer.calls] for name, layer in free.items()}


def _figures(
    model: nn.Module, layer: Layer, method: Method, costs: Sequence[float | str], dense: float,
    gradients: Sequence[Tensor] | None, distill: int,
) -> Figures:  # fmt: skip
    refusals = [cost for cost in costs if isinstance(cost, str)]
    if refusals:
        return Figures(method, math.nan, refused=refusals[0])
    total = sum(float(cost) for cost in costs)
    if not total < dense:
        return Figures(method, total, refused="no faster than dense attention here")
    wrong, whole = torch.zeros(2, dtype=torch.float64), torch.zeros(layer.heads, 2, dtype=torch.float64)
    own: Sequence[Tensor | None] = [None] * len(layer.calls) if gradients is None else gradients
    moved, moved_heads = 0.0, torch.zeros(layer.heads, dtype=torch.float64)
    try:
        layers.set_method(model.get_submodule(layer.name), method)()
        fitted = distilled(layer.calls, method, distill) if distill else None
        with torch.no_grad():
            for call, gradient in zip(layer.calls, own, strict=True):
                error = call.attend(method, call.build(method, fitted)) - call.out
                if not bool(error.isfinite().all()):
                    return Figures(method, total, refused="gives numbers that are not finite here")
                for column, part in enumerate((error, call.out)):
                    heads, together = _projected(part, call.project)
                    wrong[column] += together
                    whole[:, column] += heads
                if gradient is not None:
                    inner = (gradient.double() * error.double()).sum((3, 4))  # [K, B, H]
                    moved += float(inner.sum(2).square().sum(1).mean())
                    moved_heads += inner.square().sum(1).mean(0).cpu()
    except EfficientAttnError as error:
        return Figures(method, total, refused=str(error))
    output = wrong[1].clamp(min=1e-300)
    return Figures(
        method,
        total,
        error=math.sqrt(wrong[0] / output),
        sensitivity=math.nan if gradients is None else math.sqrt(moved),
        head_errors=(whole[:, 0] / output).sqrt().tolist(),
        head_sensitivities=[] if gradients is None else moved_heads.sqrt().tolist(),
        fitted=fitted,
    )


def _projected(heads: Tensor, project: Tensor | None) -> tuple[Tensor, float]:
    """|part W|^2 of each head's share, (H,), and of all heads together, for part (B, H, N, Dv)."""
    H, Dv = heads.shape[1], heads.shape[3]
    part = heads.double()
    if project is None or project.shape[1] != H * Dv:
        each = part.square().sum((0, 2, 3))
        return each.cpu(), float(each.sum())
    weight = project.double().unflatten(1, (H, Dv))  # [E, H, Dv]
    own = torch.einsum("bhnd,bhne->hde", part, part)  # Gram matrices: no head is projected token by token
    each = torch.einsum("hde,ohd,ohe->h", own, weight, weight)
    together = part.transpose(1, 2).flatten(2) @ weight.flatten(1).T
    return each.clamp(min=0).cpu(), float(together.square().sum())


def _costs(call: Call, methods: Sequence[Method], cost: Cost | None) -> dict[Method, float | str]:
    """Seconds of each method on the inputs of a call, in alternation, or why it cannot attend there."""
    found: dict[Method, float | str] = {}
    runs: dict[str, Callable[[], object]] = {}
    for method in methods:
        try:
            with torch.no_grad():
                state = call.build(method)
                call.attend(method, state)
                found[method] = cost(method, call) if cost is not None else math.nan
        except EfficientAttnError as error:
            found[method] = str(error)
            continue
        runs[str(method)] = functools.partial(_timed, call, method, state)
    if cost is not None:
        return found
    from ...measuring.clock import interleaved  # reads what only some systems tell

    with torch.no_grad():
        times = interleaved(runs, 0.03 * len(runs), patience_s=0.1 * len(runs))
    return {m: times[str(m)]["ms"] / 1e3 if str(m) in runs else found[m] for m in methods}


def _timed(call: Call, method: Method, state: nn.Module | None) -> None:
    call.attend(method, state)
    if call.query.is_cuda:
        torch.cuda.synchronize()
