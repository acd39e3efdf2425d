"""Suite `calls`: every call that users make, with its default arguments, beside each other way to make it.

The operator, decoding, the module with and without weights, encoders of torch.nn, and whole models of transformers. On
an instruction set that PyTorch is held to (see tools/call_table.py) fewer of them, and without engines, which nothing
holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from efficient_attn.backends.cpu import attention as cpu
from efficient_attn.measuring import clock

from .. import engines, users
from . import Claim, Column, Options, Row, Suite

# batch, sequence length, heads, head_dim
DENSE = ((1, 4096, 8, 64), (1, 4096, 8, 128), (16, 128, 12, 64), (4, 197, 12, 64), (8, 512, 12, 64), (1, 16, 4, 64))
MODULES = ((4, 512, 12, 64), (1, 2048, 12, 64), (1, 16, 4, 16))
BRIEFLY = {
    (16, 128, 12, 64),
    (4, 197, 12, 64),
    (8, 512, 12, 64),
    (1, 16, 4, 64),
    (4, 512, 12, 64),
    (1, 16, 4, 16),
    (16, 64, 8, 64),
}
ENCODERS = ((16, 64, 8, 64), (4, 512, 12, 64))
HELD = "ATEN_CPU_CAPABILITY"  # holds PyTorch's kernels to an instruction set
MODELS = {"bert": (4, 256, 8, 64), "vit": (4, 256, 8, 64), "gpt2": (2, 512, 8, 64), "llama": (2, 512, 8, 64)}


def instruction_set() -> str:
    """The one that the CPU kernels use here."""
    return "none" if cpu.MISSING else str(cpu._cpu.instruction_set())


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Times of ours and of every peer in one alternation; the figure is the best peer's time over ours."""
    torch.manual_seed(config["seed"])
    calls = users.BUILDERS[config["work"]](config)
    try:
        with clock.PeakMemory() as peak:
            calls["ours"]()
        times = clock.interleaved(calls, config["budget_s"], patience_s=6 * config["budget_s"])
    finally:
        engines.close(calls.values())
    ours = times["ours"]
    others = {name: found["ms"] for name, found in times.items() if name != "ours"}
    best = min(others, key=lambda name: others[name])
    return {
        **ours, "peer": best, "peer_ms": others[best], "peer_spread": times[best]["spread"],
        "figure": round(others[best] / ours["ms"], 4), "peak_bytes": peak.bytes, "others": others,
    }  # fmt: skip


def configs(options: Options) -> Iterable[dict[str, Any]]:
    for cell in _every(options):
        chosen = (options.modes or (cell["mode"],), options.seqlens or (cell["seqlen"],))
        if cell["mode"] in chosen[0] and cell["seqlen"] in chosen[1]:
            yield cell


def _every(options: Options) -> Iterable[dict[str, Any]]:
    brief = HELD in os.environ  # an engine is held by nothing
    common = {**options.common(), "set": instruction_set(), "engines": not brief}
    dtypes = options.dtypes if options.quick else tuple(dict.fromkeys((*options.dtypes, "bfloat16")))

    def cell(work: str, call: str, sizes: tuple[int, ...], mode: str, **more: Any) -> dict[str, Any]:
        shape = dict(zip(("batch", "seqlen", "heads", "head_dim"), sizes, strict=True))
        return {"work": work, "call": call, "mode": mode, **shape, **more, **common}

    def chosen(every: Iterable[tuple[int, ...]]) -> Iterable[tuple[int, ...]]:
        return (sizes for sizes in every if not brief or sizes in BRIEFLY)

    for dtype in dtypes:
        for sizes in chosen(MODULES):
            for mode in ("fwd", "fwd_bwd"):
                for weights in (True, False):
                    call = "m(x, x, x)" if weights else "m(x, x, x, need_weights=False)"
                    yield cell("module", call, sizes, mode, weights=weights, dtype=dtype)
        for sizes in chosen(ENCODERS):
            for mode, padded in (("fwd", False), ("fwd", True), ("fwd_bwd", False)):
                call = f"TransformerEncoder{', padded' if padded else ''}"
                yield cell("encoder", call, sizes, mode, padded=padded, dtype=dtype)
        for sizes in chosen(DENSE):
            for mode in ("fwd", "fwd_bwd"):
                for causal in (False, True):
                    call = f"attention(q, k, v{', is_causal=True' if causal else ''})"
                    yield cell("operator", call, sizes, mode, causal=causal, dtype=dtype)
        for kv_len in (128, 1024, 8192, 65536):
            for heads, kv_heads in ((12, 12), (32, 8)) if brief else ((4, 4), (12, 12), (32, 8)):
                for q_len in (1, 4):
                    call, more = f"attention of {q_len} on a cache", {"kv_heads": kv_heads, "q_len": q_len, "window": 0}
                    if not (options.quick and (q_len > 1 or kv_len > 8192)):
                        yield cell("decode", call, (1, kv_len, heads, 64), "decode", **more, dtype=dtype)
            more = {"kv_heads": 8, "q_len": 1, "window": 512}
            if kv_len >= 1024:
                yield cell("decode", "attention of 1, window 512", (1, kv_len, 8, 64), "decode", **more, dtype=dtype)
        for model, sizes in () if brief else MODELS.items():
            for mode in ("fwd", "fwd_bwd", *(("decode",) if model == "llama" else ())):
                more = {"model": model, "layers": 2, "compiled": not options.quick and mode == "fwd"}
                yield cell("transformers", f"{model} of transformers", sizes, mode, **more, dtype=dtype)


def claims(rows: Sequence[Row]) -> list[Claim]:
    slower = [row for row in rows if row["figure"] < 1]
    text = (
        f"{len(rows) - len(slower)} of {len(rows)} calls are as fast as the fastest other way to make them, or faster."
    )
    found = [Claim(text, tuple(row["id"] for row in rows))] if rows else []
    for row in sorted(slower, key=lambda row: row["figure"]):
        kind = ", ".join(row[key] for key in ("call", "mode", "dtype", "set") if key in row)
        where = f"{kind}, batch {row['batch']}, N = {row['seqlen']}"
        text = f"{row['figure']:.2f}x of {row['peer']}: {where}, {row['heads']} heads of {row['head_dim']}."
        found.append(Claim(text, (row["id"],)))
    return found


SUITE = Suite(
    name="calls",
    about="Calls as users make them, beside every other way to make them in one alternation. faster: the time of the "
    "best other way over ours.",
    configs=configs,
    run_cell=run_cell,
    key=(
        Column("call", "call", "text"),
        Column("mode", "mode", "text"),
        Column("dtype", "dtype", "text"),
        Column("set", "set", "text"),
        Column("B", "batch", "integer"),
        Column("N", "seqlen", "integer"),
        Column("heads", "heads", "integer"),
        Column("D", "head_dim", "integer"),
    ),
    columns=(
        Column("ours ms", "ms", "ms"),
        Column("±", "spread", "percent"),
        Column("best other", "peer", "text"),
        Column("its ms", "peer_ms", "ms"),
        Column("faster", "figure", "times"),
        Column("MiB", "peak_bytes", "mib"),
    ),
    series="call",
    claims=claims,
    default=False,
)
