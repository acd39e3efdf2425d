"""What a conversion costs on a sample: errors of outputs and of each layer, time and memory, as a table and a picture.

Errors are the largest difference, relative to the largest number of the original (`difference`). For each layer there
are two: `attention`, of its attention alone, against dense attention on the very same queries, keys and values; and
`output`, of what the layer returns against what it returned in the original, where the errors of the layers before have
come in too.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConversionError, UnsupportedError
from ..methods import DENSE, Method

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """A forward of a sample in eval mode: median seconds, and peak bytes of the tensors that were allocated in it."""

    seconds: float
    bytes: int


@dataclass(frozen=True)
class LayerFidelity:
    """Errors of one layer on the sample: `attention` alone, and `output`, with those of the layers before.

    None where there is nothing to compare with: `attention` of a dense layer, `output` of a layer that was not ours in
    the original.
    """

    attention: float | None
    output: float | None


@dataclass
class Trace:
    """What layers did in one forward: by name, what they returned and the errors of their attention, call by call.

    ran: the names of all modules whose forward ran, with its class.
    """

    ran: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)


def compared(before: Trace, after: Trace) -> dict[str, LayerFidelity]:
    """The layers of `after`, in the order in which they ran, against those of `before`."""
    found = {}
    for name, outputs in after.outputs.items():
        own = after.errors.get(name, [])
        known = before.outputs.get(name)
        found[name] = LayerFidelity(max(own) if own else None, None if known is None else difference(known, outputs))
    return found


# --- running a sample ---


def run(model: nn.Module, sample: Any, *, grad: bool = False) -> Any:
    """What the model returns for a sample, in eval mode without gradients; the mode of each module is kept."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.set_grad_enabled(grad):
            if isinstance(sample, Mapping):
                return model(**sample)
            return model(*sample) if isinstance(sample, tuple) else model(sample)
    finally:
        for module, training in modes:
            module.training = training


def outputs(model: nn.Module, sample: Any) -> list[Tensor]:
    """The floating-point tensors that the model returns for a sample; raises ConversionError if there are none."""
    return comparable(run(model, sample))


def comparable(returned: Any) -> list[Tensor]:
    """The floating-point tensors in what a model returned; raises ConversionError if there are none."""
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


def padded(tensor: Tensor) -> Tensor:
    return torch.nested.to_padded_tensor(tensor, 0.0) if tensor.is_nested else tensor


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor; inf where shapes or NaN differ."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return torch.inf
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        old, new = old.double(), new.double()
        if not torch.equal(old.isnan(), new.isnan()):
            return torch.inf
        old, new = old.nan_to_num(), new.nan_to_num()
        if old.numel() and not torch.equal(old, new):
            worst = max(worst, ((old - new).abs().max() / old.abs().max().clamp(min=1e-30)).item())
    return worst


@contextlib.contextmanager
def traced(model: nn.Module) -> Iterator[Trace]:
    """Record in a block which layers of the model attend by a method of this package, and what comes out.

    Every `Method.attend` is wrapped meanwhile. A call belongs to the innermost module of the model that is running.
    """
    trace = Trace()
    running: list[list[Any]] = []  # [name, whether it has attended]
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        running.append([names[id(module)], False])
        trace.ran[names[id(module)]] = type(module).__name__

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        name, attended = running.pop()
        if attended:
            trace.outputs.setdefault(name, []).extend(padded(t).detach().clone() for t in list(_tensors(output))[:1])

    def watch(attend: Callable[..., Any], method: Method, *args: Any, **kwargs: Any) -> Any:
        result = attend(method, *args, **kwargs)
        if running:
            running[-1][1] = True
            if not method.is_dense:
                exact, _ = DENSE.attend(*args, **{**kwargs, "state": None, "need_weights": False})
                trace.errors.setdefault(running[-1][0], []).append(difference([exact], [result[0]]))
        return result

    handles: list[Any] = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with attends_watched(watch):
            yield trace
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def attends_watched(watch: Callable[..., Any]) -> Iterator[None]:
    """Let `watch(attend, method, ...)` be called for every `method.attend(...)` in the block.

    Not for those inside another, through which methods that are made of others attend, nor for those of `watch` itself.
    """
    watching: list[bool] = []

    def wrapper(attend: Callable[..., Any]) -> Callable[..., Any]:
        def call(method: Method, *args: Any, **kwargs: Any) -> Any:
            if watching:
                return attend(method, *args, **kwargs)
            watching.append(True)
            try:
                return watch(attend, method, *args, **kwargs)
            finally:
                watching.clear()

        return call

    classes, own = [Method], []
    for cls in classes:
        classes += [c for c in cls.__subclasses__() if c not in classes]
        if cls is not Method and "attend" in vars(cls):
            own.append((cls, cls.attend))
    try:
        for cls, attend in own:
            cls.attend = wrapper(attend)  # type: ignore[method-assign]
        yield
    finally:
        for cls, attend in own:
            cls.attend = attend  # type: ignore[method-assign]


# --- time and memory ---


def cost(model: nn.Module, sample: Any, repeats: int) -> Cost:
    """Time `repeats` forwards of a sample, which has run before, and measure the memory of one more."""
    cuda = any(t.is_cuda for t in [*model.parameters(), *model.buffers()])
    seconds = []
    for _ in range(repeats):
        _settle(cuda)
        started = time.perf_counter()
        run(model, sample)
        _settle(cuda)
        seconds.append(time.perf_counter() - started)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        run(model, sample)
        peak = torch.cuda.max_memory_allocated() - resident
    else:
        peak = _peak_on_cpu(model, sample)
    import statistics  # brings fractions and decimals, which nothing else here needs

    return Cost(statistics.median(seconds), peak)


def _settle(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _peak_on_cpu(model: nn.Module, sample: Any) -> int:
    """From the allocations that PyTorch's profiler sees, one by one."""
    profiler: Any = torch.autograd.profiler.profile(profile_memory=True)
    with _without_stderr():
        profiler.__enter__()
    try:
        run(model, sample)
    finally:
        with _without_stderr():
            profiler.__exit__(None, None, None)
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """The profiler writes to the standard error at any logging level."""
    try:
        kept = os.dup(2)
    except OSError:  # a process without one
        yield
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# --- table and picture ---


def table(layers: Mapping[str, LayerFidelity], before: Cost | None, after: Cost | None) -> list[str]:
    """Lines of text: errors by layer, time and memory."""
    lines = []
    if layers:
        width = max(len("layer"), *map(len, layers))
        lines.append(f"  {'layer':{width}}  attention   output")
        lines += [f"  {n:{width}}  {_number(f.attention):>9}  {_number(f.output):>7}" for n, f in layers.items()]
    if before is not None and after is not None:
        lines.append(
            f"forward: {before.seconds * 1e3:.2f} ms -> {after.seconds * 1e3:.2f} ms "
            f"({before.seconds / after.seconds:.2f}x as fast)"
        )
        lines.append(f"memory: {before.bytes / MIB:.2f} MiB -> {after.bytes / MIB:.2f} MiB above model and sample")
    return lines


def _number(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def plot(
    title: str, layers: Mapping[str, LayerFidelity], before: Cost | None, after: Cost | None, path: Any = None
) -> Figure:
    """Draw what `table` says; also written to `path` if there is one.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("matplotlib is not installed; pip install 'efficient-attn[bench]'") from None
    costs = before is not None and after is not None
    rows = max(len(layers), 1)
    figure = Figure(figsize=(9.0 if costs else 6.0, 1.6 + 0.34 * rows), layout="constrained")
    axes = figure.subplots(1, 3 if costs else 1, squeeze=False, width_ratios=[3, 1, 1] if costs else [1])[0]
    _draw_layers(axes[0], layers)
    if before is not None and after is not None:
        _draw_pair(axes[1], "forward, ms", before.seconds * 1e3, after.seconds * 1e3)
        _draw_pair(axes[2], "memory, MiB", before.bytes / MIB, after.bytes / MIB)
    figure.suptitle(title)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _draw_layers(axis: Any, layers: Mapping[str, LayerFidelity]) -> None:
    names = list(layers)
    for shift, colour, part in ((-0.2, "C0", "attention"), (0.2, "C1", "output")):
        values = [getattr(layers[name], part) for name in names]
        known = [(k, value) for k, value in enumerate(values) if value is not None]
        label = {"attention": "its attention alone", "output": "its output, with all before"}[part]
        axis.barh([k + shift for k, _ in known], [v for _, v in known], height=0.36, color=colour, label=label)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(xlabel="error, relative to the largest number", title="layers")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)


def _draw_pair(axis: Any, title: str, before: float, after: float) -> None:
    bars = axis.bar(["original", "converted"], [before, after], color=["0.6", "C0"])
    axis.bar_label(bars, fmt=lambda value: f"{value:.3g}" if value < 1000 else f"{value:.0f}")
    axis.set_title(title)
    axis.set_yticks([])
    axis.tick_params(axis="x", labelsize=8)
    axis.margins(y=0.15)
    axis.spines[["top", "right"]].set_visible(False)
