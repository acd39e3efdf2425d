"""A whole model on a sample: time, memory, operations, and what attention's share of them is.

`find_attention` says which modules count as attention, `measured` makes one row, and `run_cell` does so in a worker
process for a model that a text names (see `sources`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, InputTypeError, UnsupportedError
from ..measuring import clock
from ..measuring.options import MODES, check_choice
from . import counts, phases

PROFILED_S = 2.0


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """One row of a model in a worker process: a suite of the benchmark runner.

    `config`: model (see `sources.load`), attention (spec or None), seqlen, mode, batch, dtype, seed, threads,
    budget_s, and optionally trace (a path).
    """
    from . import sources

    model, sample = sources.load(config)
    trace = config.get("trace")
    return measured(model, sample, config["mode"], config["budget_s"], trace=None if trace is None else Path(trace))


def measured(
    model: nn.Module,
    sample: Any,
    mode: str,
    budget_s: float,
    *,
    attention: Iterable[str] | None = None,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Time, peak memory, operations and bytes, phases and attention modules of one call, in eval mode.

    Gradients go nowhere: in mode "fwd_bwd" those of all parameters are computed and dropped.
    """
    modules = find_attention(model, attention)
    call = caller(model, sample, mode)
    with evaluating(model), torch.random.fork_rng(devices=[]):
        call()  # thread pools, code pages and caches of libraries are not this call's memory
        with clock.PeakMemory() as peak:
            call()
        times = clock.interleaved({"model": call}, budget_s)["model"]
        with without_fast_path():
            count = counts.count(call)
        rounds = max(1, min(5, int(PROFILED_S * 1e3 / times["ms"])))
        with phases.watched(modules):
            shares, by_module = phases.profiled(call, rounds, trace)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        **times,
        "peak_bytes": peak.bytes,
        "input_bytes": parameters,
        "fixed_bytes": parameters,
        "fast_path": mode == "fwd" and has_fast_path(model),
        **count.as_dict(),
        "phases": {name: round(share, 4) for name, share in shares.items()},
        "modules": {
            name: {"kind": type(module).__name__, "share": round(by_module.get(name, 0.0), 4)}
            for name, module in modules.items()
        },
    }


def find_attention(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """The attention modules of a model by name, outermost ones alone ("" is the model).

    Without `names`: torch.nn.MultiheadAttention and its subclasses, this package's among them, and modules that have
    "attention" or "attn" in the name of their class and parameters of their own or below, as transformers' and timm's.

    Raises:
        InputTypeError: not a module. InputError: a name that the model does not have, or no attention in the model.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    known = dict(model.named_modules())
    if names is not None:
        given = list(names)
        missing = [name for name in given if name not in known]
        if missing:
            raise InputError(f"the model has no module {missing[0]!r}; names are those of model.named_modules()")
        return {name: known[name] for name in given}
    found: dict[str, nn.Module] = {}
    for name, module in known.items():
        inside = any(name.startswith(outer + ".") for outer in found)
        if name and not inside and _is_attention(module):
            found[name] = module
    if not found and _is_attention(model):
        return {"": model}
    if not found:
        raise InputError(
            "the model has no module that looks like attention (torch.nn.MultiheadAttention, or a class with "
            "'Attention' in its name); say which modules are with attention=[names of model.named_modules()]"
        )
    return found


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    named = isinstance(module, nn.MultiheadAttention) or "attention" in name or name.endswith("attn")
    return named and any(True for _ in module.parameters())


def run(model: nn.Module, sample: Any) -> Any:
    """Call a model on a tensor, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(sample, Mapping):
        return model(**sample)
    return model(*sample) if isinstance(sample, (tuple, list)) else model(sample)


def caller(model: nn.Module, sample: Any, mode: str) -> Callable[[], object]:
    """A call of no arguments that runs the model forward, or forward and backward.

    Raises:
        InputError: a mode that does not exist, or nothing to differentiate.
        UnsupportedError: a model elsewhere than on the CPU.
    """
    check_choice("mode", mode, MODES)
    check_on_cpu(model)
    if mode == "fwd":

        def forward() -> object:
            with torch.no_grad():
                return run(model, sample)

        return forward
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("mode 'fwd_bwd' needs a parameter that requires gradients, and this model has none")

    def both() -> object:
        with torch.enable_grad():
            outputs = [t for t in _tensors(run(model, sample)) if t.requires_grad]
            if not outputs:
                raise InputError("mode 'fwd_bwd' needs an output that depends on the parameters, and there is none")
            loss = torch.stack([t.float().square().mean() for t in outputs]).sum()
            return torch.autograd.grad(loss, parameters, allow_unused=True)

    return both


def check_on_cpu(model: nn.Module) -> None:
    """Raise UnsupportedError for a model with parameters or buffers elsewhere."""
    places = {t.device.type for t in (*model.parameters(), *model.buffers())} - {"cpu"}
    if places:
        raise UnsupportedError(
            f"the model is on {', '.join(sorted(places))}; clocks and memory counters here are those of the CPU. "
            "Profile a copy: copy.deepcopy(model).cpu()"
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def has_fast_path(model: nn.Module) -> bool:
    """Whether torch.nn runs whole layers of this model as single operators in inference, unless they are watched."""
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    return torch.backends.mha.get_fastpath_enabled() and any(type(m.self_attn) is nn.MultiheadAttention for m in layers)


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """torch.nn's Transformers run as single operators in inference, inside which nothing can be counted."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
