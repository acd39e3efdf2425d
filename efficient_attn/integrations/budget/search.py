"""The search for the cheapest methods whose error on held-out samples, measured, is within a budget.

1. `calibration` says what each candidate would do in each layer, to first order.
2. A knapsack (`choice`) picks for an allowance A of these errors. They are estimates, so A is no budget: it is doubled
   or halved, then bisected, until what the whole model loses on the held-out samples is as near to it as it gets.
3. The next choice above the budget is mended: its layers go back, the one with the most error for its gain first, until
   it is within. The cheaper of the two stays; what nothing helps is dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...errors import ConversionError, InputError, InputTypeError
from ...methods import DENSE, Hybrid, Method, Sparse
from ...patterns import per_head
from .. import fidelity
from . import candidates, layers
from .calibration import Cost, Note, Table, calibrate
from .choice import Option, choose
from .comparing import Compared, Pick, check_finite, split
from .kept import Kept
from .plan import Plan

Methods = dict[str, Method]
PER = ("layer", "head")
DOUBLINGS, BISECTIONS = 12, 5
NOTHING = 0.01  # of the mass: a hybrid's branch that carries less carries nothing


@dataclass(frozen=True)
class Budget:
    """What `convert(budget=...)` may lose, and how it looks for what to gain.

    Fields:
        limit: the largest error: |y' - y| / |y| of the model's outputs on the held-out samples, of the sample where it
            is largest; with a metric, how far that may fall.
        held_out: a sample, or a list of samples, on which the error is measured. Default: the second half of the
            sample's batch, which then does not calibrate.
        metric: called with a model, returns a number, higher for better: accuracy, say, over data of your own.
        outputs: what of that which the model returns is compared; default: every floating-point tensor.
        candidates: specs, methods or patterns to choose from. Default: windows, Longformer, BigBird, chosen blocks,
            hybrids, Nyström, Linformer, and neighbourhoods where the tokens are a square, in sizes that fit the length.
        per: "layer", or "head": each head its own pattern, joined by per_head.
        probes: how many gradients estimate the sensitivities; 0: errors of the layers themselves count.
        seed: of the gradients' random signs.
        distill: steps in which what a candidate learns (Linformer's projections) is fitted to dense attention, layer by
            layer with all else frozen, on one half of the calibrating batch; the other half says when to stop.
        cost: (method, call) -> a number that takes the place of measured seconds, as for another machine's; then no
            time decides.
        progress: called with (what, done, of how many).
        kept: where what is measured is kept, and taken from; with a metric only the figures of the layers are.
    """

    limit: float
    held_out: Any = None
    metric: Callable[[nn.Module], float] | None = None
    outputs: Pick | None = None
    candidates: candidates.Specs | None = None
    per: str = "layer"
    probes: int = 4
    seed: int = 0
    distill: int = 0
    cost: Cost | None = None
    progress: Note | None = None
    kept: Kept | None = None

    def __post_init__(self) -> None:
        if isinstance(self.limit, bool) or not isinstance(self.limit, (int, float)):
            raise InputTypeError(f"a budget is a number such as 0.02, or a Budget; got {type(self.limit).__name__}")
        if not 0.0 <= self.limit < math.inf:
            raise InputError(f"a budget must be a finite number of 0 or more, such as 0.02; got {self.limit}")
        if self.per not in PER:
            raise InputError(f"per must be one of {', '.join(PER)}; got {self.per!r}")
        if self.candidates is not None:
            candidates.read(self.candidates, 0)
        for name, value in (("probes", self.probes), ("distill", self.distill)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"{name} must be a whole number of 0 or more; got {value!r}")


@dataclass(frozen=True)
class Trial:
    """One choice for the whole model: what it was predicted to cost and measured to lose."""

    methods: Methods
    cost: float
    predicted: float
    error: float
    why: str


@dataclass
class Found:
    """What a search found.

    Attributes:
        plan: what is applied. error: what it loses, measured on the held-out samples, within `limit`.
        table: the figures of calibration. trials: the choices that were measured.
        dense_error: what our dense attention differs by on them, which is rounding.
        seconds: a forward of the held-out sample by the same kernels, (dense, plan); None where `cost=` was given.
        metric: (before, after), or None.
        shares: name of a layer with a hybrid -> the mass of its exact part and of its tail.
        nothing: why nothing is gained, or empty.
    """

    limit: float
    per: str
    plan: Plan
    error: float
    dense_error: float
    table: Table
    trials: list[Trial]
    seconds: tuple[float, float] | None = None
    metric: tuple[float, float] | None = None
    shares: dict[str, tuple[float, float]] = field(default_factory=dict)
    nothing: str = ""

    @property
    def speedup(self) -> float | None:
        """How many times as fast as dense attention with the same kernels the whole model is."""
        return None if self.seconds is None else self.seconds[0] / self.seconds[1]

    def __str__(self) -> str:
        changed = sum(not method.is_dense for method in self.plan.methods.values())
        lines = [
            f"budget {self.limit:g}: measured error {self.error:.2e} on held-out samples, {len(self.trials)} trials"
        ]
        lines.append(f"  {changed} of {len(self.plan.layers)} layers changed")
        if self.plan.fitted:
            lines.append(f"  {len(self.plan.fitted)} with distilled parameters")
        if self.speedup is not None and self.seconds is not None:
            lines.append(
                f"  {self.seconds[0] * 1e3:.2f} ms dense -> {self.seconds[1] * 1e3:.2f} ms ({self.speedup:.2f}x)"
            )
        if self.metric is not None:
            lines.append(f"  metric {self.metric[0]:.4g} -> {self.metric[1]:.4g}")
        if self.nothing:
            lines.append(f"  nothing is gained: {self.nothing}")
        for name, (near, far) in self.shares.items():
            empty = (
                "; its tail carries nothing" if far < NOTHING else "; its pattern carries nothing" * (near < NOTHING)
            )
            lines.append(f"  {name}: exact part {near:.0%}, tail {far:.0%} of the mass{empty}")
        return "\n".join(lines)


class Search:
    """One search on a copy of the model; `run` does it.

    Args:
        model: as the user has it; only run.
        make_dense: gives a copy this package's dense attention.
        tolerance: how far that may be from the model as it is; default: the budget.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Any,
        budget: Budget,
        make_dense: Callable[[nn.Module], None],
        tolerance: float | None = None,
    ) -> None:
        self.tolerance = tolerance
        self.budget, self.compared = budget, Compared(budget.outputs)
        self.sample, self.held_out = split(sample, budget.held_out)
        self.note: Note = budget.progress or (lambda what, done, of: None)
        self.before = [self.compared.run(model, sample) for sample in self.held_out]
        if not any(y.isfinite().any() for outputs in self.before for y in outputs):
            raise InputError(
                "the model returns no finite number for the samples held out, so that no error can be measured; "
                "give a sample= or held_out= that it is meant for"
            )
        self.metric_before = None if budget.metric is None else check_finite(budget.metric(model))
        self.dense = layers.skeleton(model)
        make_dense(self.dense)
        self.changed = layers.skeleton(model)
        make_dense(self.changed)
        self.measured: dict[tuple[str, ...], float] = {}
        self.trials: list[Trial] = []
        self.metrics: dict[tuple[str, ...], float] = {}

    def run(self) -> Found:
        """Search. Raises ConversionError if even dense attention is not within the budget."""
        budget = self.budget
        dense_error = self._error({}, "dense")
        limit = budget.limit if self.tolerance is None else min(self.tolerance, budget.limit)
        if not dense_error <= limit:
            raise ConversionError(
                f"dense attention by this package's kernels already differs by {dense_error:.1e}, more than {limit:g}: "
                "rounding, outputs of padding, or a model that is random in eval mode. Raise the budget, or say with "
                "Budget(outputs=...) what counts"
            )
        self.table = calibrate(
            self.dense, self.sample, lambda length: candidates.read(budget.candidates, length),
            compared=self.compared, probes=budget.probes, seed=budget.seed, cost=budget.cost, note=self.note,
            distill=budget.distill, kept=budget.kept,
        )  # fmt: skip
        best, nothing = self._best()
        seconds = self._seconds(best)
        if best and seconds is not None and not seconds[1] < seconds[0]:
            nothing = (
                f"the whole model was no faster, {seconds[1] * 1e3:.2f} ms against {seconds[0] * 1e3:.2f} ms dense"
            )
            best, seconds = {}, self._seconds({})
        error = self._error(best, "chosen")
        metric = None
        if self.metric_before is not None:
            metric = (self.metric_before, self.metrics[_key(best)])
        shares = {name: self._shares(name, m) for name, m in best.items() if isinstance(m, Hybrid)}
        named = {name: str(best.get(name, DENSE)) for name in self.table.figures}
        plan = Plan(named, self._about(error, seconds), self.table.fitted(best))
        return Found(
            budget.limit,
            budget.per,
            plan,
            error,
            dense_error,
            self.table,
            self.trials,
            seconds,
            metric,
            shares,
            nothing,
        )

    # --- choices ---

    def _best(self) -> tuple[Methods, str]:
        """The cheapest methods within the budget, without the dense ones, and why there are none."""
        groups = self._groups()
        if not any(len(options) > 1 for _, _, options in groups):
            return {}, "no candidate is faster than dense attention in any layer at this length"
        within: Trial | None = None
        beyond: Trial | None = None
        low, high = 0.0, math.inf
        allowance = max(self.budget.limit, 1e-6) if self.budget.metric is None else 0.05
        for step in range(DOUBLINGS + BISECTIONS):
            trial = self._trial(groups, allowance, f"allowance {allowance:.3g}")
            if trial.error <= self.budget.limit:
                low = allowance
                within = trial if within is None or trial.cost < within.cost else within
                if self._is_all(groups, allowance):
                    break
            else:
                high, beyond = allowance, trial
            if math.isinf(high):
                allowance *= 2.0
            elif low == 0.0:
                allowance /= 2.0
            elif step > DOUBLINGS or high / low < 1.05:
                break
            else:
                allowance = math.sqrt(low * high)
        if beyond is not None:
            mended = self._mended(groups, beyond)
            if within is None or mended.cost < within.cost:
                within = mended
        if within is None or not within.methods:
            return {}, "every choice that was measured exceeds the budget"
        return within.methods, ""

    def _groups(self) -> list[tuple[str, int | None, list[Option]]]:
        """(layer, head or None, options) of each thing that chooses."""
        found: list[tuple[str, int | None, list[Option]]] = []
        for name, figures in self.table.figures.items():
            dense, heads = self.table.dense[name], self.table.heads[name]
            usable = [f for f in figures if not f.refused]
            if self.budget.per == "layer":
                options = [Option(str(f.method), f.weight, f.cost) for f in usable]
                found.append((name, None, [Option(str(DENSE), 0.0, dense), *options]))
                continue
            usable = [f for f in usable if isinstance(f.method, Sparse)]  # per_head joins patterns
            for head in range(heads):
                options = [Option(str(f.method), f.head_weights[head], f.cost / heads) for f in usable]
                found.append((name, head, [Option(str(DENSE), 0.0, dense / heads), *options]))
        return found

    def _trial(self, groups: Sequence[tuple[str, int | None, list[Option]]], allowance: float, why: str) -> Trial:
        return self._measure(groups, choose([options for _, _, options in groups], allowance), why)

    def _is_all(self, groups: Sequence[tuple[str, int | None, list[Option]]], allowance: float) -> bool:
        """Whether an allowance leaves every group its cheapest option."""
        return allowance >= sum(min(options, key=lambda o: (o.cost, o.error)).error for _, _, options in groups)

    def _measure(
        self, groups: Sequence[tuple[str, int | None, list[Option]]], chosen: Sequence[Option], why: str
    ) -> Trial:
        by_layer: dict[str, list[str]] = {}
        for (name, _, _), option in zip(groups, chosen, strict=True):
            by_layer.setdefault(name, []).append(option.name)
        known = {str(f.method): f.method for figures in self.table.figures.values() for f in figures}
        methods = {name: _joined([known.get(spec, DENSE) for spec in specs]) for name, specs in by_layer.items()}
        methods = {name: method for name, method in methods.items() if not method.is_dense}
        key = _key(methods)
        new = key not in self.measured
        trial = Trial(
            methods, sum(o.cost for o in chosen), sum(o.error for o in chosen), self._error(methods, why), why
        )
        if new:
            self.trials.append(trial)
        return trial

    def _mended(self, groups: Sequence[tuple[str, int | None, list[Option]]], beyond: Trial) -> Trial:
        """A choice beyond the budget whose groups go back until it is within, at the latest when all are dense."""
        chosen = choose([options for _, _, options in groups], max(beyond.predicted, 1e-12))
        trial = self._measure(groups, chosen, "promoted")
        while not trial.error <= self.budget.limit:
            changed = [n for n, option in enumerate(chosen) if option.error > 0.0 or option.name != str(DENSE)]
            if not changed:
                break
            several = max(1, len(changed) // 8)  # heads are many; layers go one by one

            def worth(n: int) -> float:
                return chosen[n].error / max(groups[n][2][0].cost - chosen[n].cost, 1e-12)

            for n in sorted(changed, key=worth, reverse=True)[:several]:
                better = [o for o in groups[n][2] if o.error < 0.5 * chosen[n].error]
                chosen[n] = min(better or groups[n][2][:1], key=lambda o: o.cost)
            trial = self._measure(groups, chosen, "promoted")
        return trial

    # --- measurements ---

    def _error(self, methods: Methods, why: str) -> float:
        """What the whole model loses with these methods, on the held-out samples."""
        key = _key(methods)
        if methods and key in self.measured:
            return self.measured[key]
        kept = self.budget.kept if methods and self.budget.metric is None else None
        if kept is not None and key in kept.errors:
            self.measured[key] = kept.errors[key]
            return self.measured[key]
        self.note(f"trials on held-out samples ({why})", len(self.trials), 0)
        undo = self._changed_to(methods)
        try:
            error = self.error_of(self.changed, key)
        finally:
            undo()
        self.measured[key] = error
        if kept is not None:
            kept.put_error(key, error)
        return error

    def _changed_to(self, methods: Methods) -> Callable[[], None]:
        fitted = self.table.fitted(methods) if methods else {}
        return layers.set_methods(self.changed, methods.items(), fitted)

    def error_of(self, model: nn.Module, key: tuple[str, ...] = ()) -> float:
        """What a model loses on the held-out samples: of the sample where it is largest, or by the metric."""
        if self.budget.metric is None or self.metric_before is None:
            found = [self.compared.run(model, sample) for sample in self.held_out]
            return max(self.compared.error(old, new) for old, new in zip(self.before, found, strict=True))
        self.metrics[key] = value = float(self.budget.metric(model))
        return math.inf if math.isnan(value) else max(0.0, self.metric_before - value)

    def _seconds(self, methods: Methods) -> tuple[float, float] | None:
        """A forward of the whole model on the first held-out sample, dense and with these methods, in alternation."""
        if self.budget.cost is not None:
            return None
        from ...measuring.clock import interleaved  # reads what only some systems tell

        sample = self.held_out[0]
        cuda = any(t.is_cuda for t in self.dense.parameters())

        def forward(model: nn.Module) -> None:
            fidelity.run(model, sample)
            if cuda:
                torch.cuda.synchronize()

        if not methods:
            found = interleaved({"dense": lambda: forward(self.dense)}, 0.3)
            return (found["dense"]["ms"] / 1e3,) * 2
        self.note("forwards timed", 0, 1)
        undo = self._changed_to(methods)
        try:
            calls = {"dense": lambda: forward(self.dense), "plan": lambda: forward(self.changed)}
            found = interleaved(calls, 1.0, min_rounds=5)
        finally:
            undo()
        return found["dense"]["ms"] / 1e3, found["plan"]["ms"] / 1e3

    def _shares(self, name: str, method: Hybrid) -> tuple[float, float]:
        taken = ("key_mask", "mask", "is_causal", "causal_alignment", "scale")
        call, fitted = self.table.layers[name].calls[0], self.table.fitted({name: method}).get(name)
        options = {option: call.options[option] for option in taken if call.options.get(option) is not None}
        with torch.no_grad():
            mass = method.branch_share(call.query, call.key, state=call.build(method, fitted), **options).double()
        total = mass.sum().clamp(min=1e-300)
        return float(mass[..., 0].sum() / total), float(mass[..., 1].sum() / total)

    def _about(self, error: float, seconds: tuple[float, float] | None) -> dict[str, Any]:
        return {
            "budget": self.budget.limit,
            "error": error,
            "measure": "metric" if self.budget.metric is not None else "relative error of the outputs",
            "per": self.budget.per,
            "speedup": None if seconds is None else round(seconds[0] / seconds[1], 3),
            "length": max(self.table.lengths.values(), default=0),
            "held_out": len(self.held_out),
            "threads": torch.get_num_threads(),
            "seed": self.budget.seed,
            **({"distill": self.budget.distill} if self.budget.distill else {}),
        }


def _joined(methods: Sequence[Method]) -> Method:
    """One method for a layer: that of all its heads, or theirs side by side."""
    if len(set(methods)) == 1:
        return methods[0]
    return Sparse(per_head([method.pattern for method in methods if isinstance(method, Sparse)]))


def _key(methods: Mapping[str, Method]) -> tuple[str, ...]:
    return tuple(f"{name}={methods[name]}" for name in sorted(methods))
