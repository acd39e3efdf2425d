"""Suite `memory`: peak extra memory of one call against its length, the check that sparse attention needs O(n).

So does its second derivative ("second"); and a call that returns its weights averaged over the heads ("weights"), or a
module that does ("module", which projects too), needs little more than those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from efficient_attn import MultiheadAttention, parse
from efficient_attn.measuring import clock
from efficient_attn.measuring.fit import fit

from .. import cases
from . import Chart, Claim, Column, Options, Row, Suite, grid, groups
from .ops import bound


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Peak bytes above the inputs of planning and running the method of `config` once.

    `config`: method (spec), seqlen, mode ("fwd", "fwd_bwd", "second", "weights", "module"), dtype, batch, heads,
    head_dim, threads.
    """
    mode, length = config["mode"], config["seqlen"]
    if mode in _CALLS:
        make = _CALLS[mode]
        make(config, 256)()  # what is made once
        call: Callable[[], object] = make(config, length)
    else:
        call = bound(config)
        call.warm_up()
    with clock.PeakMemory() as peak:
        call()
    found = {"peak_bytes": peak.bytes, "bytes_per_token": round(peak.bytes / length, 1)}
    if mode in ("weights", "module"):
        found["weights_ratio"] = round(peak.bytes / (4 * config["batch"] * length * length), 3)
    return found


def _second_derivative(config: Mapping[str, Any], length: int) -> Callable[[], object]:
    shape = (config["batch"], config["heads"], length, config["head_dim"])
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    method = parse(config["method"])

    def call() -> object:
        out, _ = method.attend(*inputs)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)  # type: ignore[arg-type]

    return call


def _weights(config: Mapping[str, Any], length: int) -> Callable[[], object]:
    shape = (config["batch"], config["heads"], length, config["head_dim"])
    inputs, method = [torch.randn(shape) for _ in range(3)], parse(config["method"])
    return lambda: method.attend(*inputs, need_weights="mean")


def _module(config: Mapping[str, Any], length: int) -> Callable[[], object]:
    width = config["heads"] * config["head_dim"]
    module = MultiheadAttention(width, config["heads"], batch_first=True, attention=config["method"]).eval()
    x = torch.randn(config["batch"], length, width)
    return torch.no_grad()(lambda: module(x, x, x))


_CALLS = {"second": _second_derivative, "weights": _weights, "module": _module}


def configs(options: Options) -> Iterable[dict[str, Any]]:
    lengths = options.seqlens or (cases.QUICK_MEMORY_LENGTHS if options.quick else cases.MEMORY_LENGTHS)
    common = {key: value for key, value in options.common().items() if key != "budget_s"}
    yield from grid(method=options.specs(cases.MEMORY_METHODS), seqlen=lengths, **cases.MEMORY_SHAPE, **common)
    if not options.methods and not options.seqlens:
        yield from grid(seqlen=cases.SECOND_LENGTHS, **cases.SECOND_SHAPE, **common)
        yield from grid(**cases.WEIGHTS_SHAPE, **common)


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    for (method, mode), group in groups(rows, "method", "mode").items():
        for row in group if mode in ("weights", "module") else ():
            what = "m(x, x, x)" if mode == "module" else "attention with weights"
            text = f"{what} of {row['seqlen']} tokens with {row['heads']} heads takes {row['weights_ratio']:.2f} of the"
            found.append(Claim(f"{text} averaged weights that it returns.", (row["id"],)))
        if len({row["seqlen"] for row in group}) > 1:
            slope = fit([r["seqlen"] for r in group], [max(r["peak_bytes"], 1) for r in group]).exponent
            what = "with its second derivative" if mode == "second" else "forward and backward"
            text = f"Extra memory of {method}, {what}, grows as N^{slope:.2f}."
            found.append(Claim(text, tuple(row["id"] for row in group)))
    return found


SUITE = Suite(
    name="memory",
    about="Peak resident memory of one call above its inputs, plan included, in a fresh process.",
    configs=configs,
    run_cell=run_cell,
    key=(Column("method", "method", "text"), Column("mode", "mode", "text"), Column("N", "seqlen", "integer")),
    columns=(Column("MiB", "peak_bytes", "mib"), Column("bytes a token", "bytes_per_token", "integer")),
    charts=(Chart("Peak extra memory", "seqlen", "peak_mib", "sequence length", "MiB", split=("mode",)),),
    claims=claims,
)
