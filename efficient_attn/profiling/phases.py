"""Where the time of a call goes, from a run under torch.profiler.

plan          making masks: what `efficient_attn.tracing.PLAN` names
kernel        attention itself: our operators and PyTorch's SDPA; beside them, or in a module that has neither, batched
              matrix products and softmax
projections   linear layers of attention modules, and whatever else multiplies by a plain matrix there
other         what else happens in attention modules (features, pooling, sorting, copies)
rest          everything outside of them

A backward counts where its forward did, which the profiler's sequence numbers tell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from ..tracing import PLAN

PHASES = ("plan", "kernel", "projections", "other", "rest")
CALL = "efficient_attn::profile"  # around each profiled call
MODULE = "attention module: "  # around the forward of one, followed by its name

_KERNELS = ("efficient_attn::attention_", "efficient_attn::linear_attention_", "aten::scaled_dot_product")
_PRODUCTS = ("aten::bmm", "aten::baddbmm", "aten::softmax", "aten::_softmax", "aten::_masked_softmax")
_LINEAR = ("aten::linear", "aten::addmm", "aten::mm")
_NORMS = ("aten::layer_norm", "aten::rms_norm", "aten::dropout")
_BACKWARD = "autograd::engine::evaluate_function: "


def profiled(call: Callable[[], object], rounds: int = 1, trace: Path | None = None, *, inside: str = "rest") -> Any:
    """Run a call under torch.profiler; returns (phases, attention modules), both as shares of the calls' time.

    `inside` is the phase of what stands outside of attention modules: "other" for a call that is attention. With
    `trace`, a Chrome trace (chrome://tracing, ui.perfetto.dev) is written there.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=trace is not None) as found:
        for _ in range(rounds):
            with record_function(CALL):
                call()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(trace))
    return split(found.events(), inside)


def split(events: Sequence[Any], inside: str = "rest") -> tuple[dict[str, float], dict[str, float]]:
    """Shares of the profiled calls' time: of each phase (they add up to 1), and of each attention module."""
    calls = [event for event in events if event.name == CALL]
    total = sum(_duration(event) for event in calls) or 1.0
    forwards = _Forwards()
    times: dict[str, float] = defaultdict(float)
    modules: dict[str, float] = defaultdict(float)
    for event in calls:
        for phase, module, duration in _walk(event, inside, None, forwards):
            times[phase] += duration
            if module is not None:
                modules[module] += duration
    return {phase: times[phase] / total for phase in PHASES}, {name: t / total for name, t in modules.items()}


class _Forwards(dict[int, tuple[str, str | None]]):
    """Sequence number of a forward operator -> its phase and module."""


def _walk(event: Any, phase: str, module: str | None, forwards: _Forwards) -> Iterator[tuple[str, str | None, float]]:
    """(phase, module, own time) of an event and all below it, in the order of their start."""
    name, number = event.name, event.sequence_nr
    if name.startswith(_BACKWARD):
        phase, module = forwards.get(number, (phase, module))
    elif name.startswith(MODULE):
        module = name[len(MODULE) :] if module is None else module
    phase = _phase(name, phase, module is not None)
    if number >= 0 and not name.startswith(_BACKWARD):
        forwards.setdefault(number, (phase, module))
    children = sorted(event.cpu_children, key=lambda child: child.time_range.start)
    yield phase, module, max(_duration(event) - sum(map(_duration, children)), 0.0)
    for child in children:
        yield from _walk(child, phase, module, forwards)


def _phase(name: str, phase: str, in_module: bool) -> str:
    """The phase of an event of this name, found in an event of the given phase."""
    if phase in ("plan", "kernel", "projections"):
        return phase
    if name == PLAN:
        return "plan"
    if name.startswith(_KERNELS):
        return "kernel"
    if name.startswith(MODULE):
        return "other"
    if name.startswith(_NORMS) and in_module:
        return "rest"
    if name in _LINEAR and phase == "other":
        return "projections" if in_module else "kernel"
    if name in _PRODUCTS and phase == "other":
        return "kernel"
    return phase


def _duration(event: Any) -> float:
    return float(event.time_range.elapsed_us())


@contextmanager
def watched(modules: dict[str, nn.Module]) -> Iterator[None]:
    """Name the forwards of these modules in the trace, while the block lasts."""
    open_ranges: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            open_ranges.append(record_function(MODULE + name))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    handles: list[Any] = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
