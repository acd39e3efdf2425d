"""A model of a Hopper GPU: cycles of a multiprocessor from counted instructions, and the TFLOP/s that follow.

A step's instructions, times the warps that execute them, over what a multiprocessor does in a cycle (`RATES`), give
cycles for each unit. The largest of them is the least that the step can take (`at_most`); the products and then the
slowest of the rest one after the other is what it takes where nothing overlaps (`without_overlap`). `predicted` lies
between: of what could overlap, the share UNHIDDEN does not. That share is the one number that is no count; it makes
the step of D128 as fast as FlashAttention-3's (`PUBLISHED`), and the other published figures say how far to trust it.

A prediction, not a measurement: what it is for is the first measured time. Near `at_most` the unit that is named is
what to relieve, near `without_overlap` the schedule is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results" / "cuda" / "model.jsonl"


class Rate(NamedTuple):
    """What a multiprocessor of compute capability 9.0 does in a cycle."""

    amount: float
    of: str
    source: str


GUIDE = "CUDA C++ Programming Guide"
RATES: Mapping[str, Rate] = {
    "tensor": Rate(4096, "bf16 FLOP of wgmma", "989 TFLOP/s, 132 multiprocessors, 1.83 GHz: H100 data sheet"),
    "tensor_mma": Rate(2576, "bf16 FLOP of mma.sync", "62.9 % of wgmma's, Luo et al. 2024 (arXiv 2402.13499)"),
    "special": Rate(16, "MUFU results", f"{GUIDE}, throughput of native arithmetic instructions, 9.0"),
    "fp32": Rate(128, "float32 adds, products, FMAs; integer products count twice", "the same table"),
    "alu": Rate(64, "compares, min, max, logic, integer adds, conversions", "the same table"),
    "shared": Rate(128, "bytes of shared memory", f"{GUIDE}, 32 banks of 32 bits a cycle"),
    "issue": Rate(4, "warp instructions", f"{GUIDE}, four schedulers, compute capability 9.0"),
}  # fmt: skip
PROCESSORS = 132
GHZ = 1.755  # between the 1.83 of the data sheet's 989 TFLOP/s and the 1.6 that is seen under load
UNHIDDEN = 0.9
# FlashAttention-3 on an H100 at 16k tokens, float16, not causal (its repository and arXiv 2407.08608): kernel, head
# dimension -> TFLOP/s. UNHIDDEN comes from the first.
PUBLISHED: Mapping[tuple[str, int], int] = {
    ("sm90::attention_forward", 128): 648,
    ("sm90::attention_forward", 64): 497,
    ("sm90::attention_forward_wide", 256): 756,
    ("sm90::attention_backward", 128): 561,
}
# case of the suite `gpu`, mode, kernels -> TFLOP/s to be reached on an H200
TARGETS: Mapping[tuple[str, str, str], int] = {
    ("dense 16k D128", "fwd", "CUDA"): 650,
    ("causal 16k D128", "fwd", "CUDA"): 620,
    ("dense 16k D64", "fwd", "CUDA"): 470,
    ("dense 16k D256", "fwd", "CUDA"): 680,
    ("dense 16k D128", "bwd", "CUDA"): 480,
    ("dense 16k D128", "bwd", "CUDA, any order"): 560,
}
TILE = 128  # queries of the forward, keys of the backward, that a block of threads owns

Counts = Mapping[str, float]  # unit -> what it does in a step


def cycles(counts: Counts) -> dict[str, float]:
    """Cycles of a multiprocessor by unit, from the FLOP, results, bytes and instructions of a step of all warps."""
    spent = {unit: counts.get(unit, 0.0) / rate.amount for unit, rate in RATES.items()}
    spent["tensor"] += spent.pop("tensor_mma")
    return {unit: round(value, 1) for unit, value in spent.items()}


def limits(spent: Mapping[str, float], flop: float) -> dict[str, Any]:
    """The slowest unit of a step of so many FLOP, and the TFLOP/s that it allows (at_most), that remain where nothing
    overlaps, and that are predicted. Empty where nothing is multiplied."""
    if not spent["tensor"]:
        return {}
    slowest = max(spent, key=lambda unit: spent[unit])
    apart = max(spent["tensor"] + max(v for k, v in spent.items() if k not in ("tensor", "shared")), spent[slowest])
    by_cycles = {
        "at_most": spent[slowest], "without_overlap": apart,
        "predicted": spent[slowest] + UNHIDDEN * (apart - spent[slowest]),
    }  # fmt: skip
    return {"bound": slowest} | {k: round(PROCESSORS * GHZ * flop / v / 1e3) for k, v in by_cycles.items()}


def kept() -> dict[tuple[str, int], dict[str, Any]]:
    """What `make gpu-model` has counted of the kernels of bfloat16, by kernel and head dimension."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return {(row["kernel"], row["head_dim"]): row for row in rows if row["dtype"] == "bfloat16"}


def parts_of(mode: str, kernels: str, head_dim: int, visible: str) -> dict[str, float]:
    """The kernels of a dense or causal call on Hopper, as plan.h chooses them for long sequences, and the share of the
    counted FLOP that each multiplies: two kernels of a backward seven products, of which five count."""
    any_order = kernels == "CUDA, any order"
    if kernels != "CUDA" and not (any_order and mode == "bwd"):
        return {}
    if mode == "fwd":
        wide = head_dim == 256 or (head_dim == 128 and visible == "full")
        return {"sm90::attention_forward" + "_wide" * wide: 1.0}
    if head_dim == 128:
        return {"sm90::attention_backward": 1.0}
    queries = "sm90::attention_query_gradient" + "_wide" * (head_dim == 64)
    return {} if any_order else {"sm90::attention_key_gradient": 4 / 5, queries: 3 / 5}


def of_call(
    mode: str,
    kernels: str,
    head_dim: int,
    visible: str,
    rows: Mapping[tuple[str, int], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The limits of all kernels of a call together; empty where one of them was not counted."""
    rows = kept() if rows is None else rows
    parts = parts_of(mode, kernels, head_dim, visible)
    found = {name: rows.get((name, head_dim), {}) for name in parts}
    if not parts or not all("bound" in row for row in found.values()):
        return {}
    by_key = {
        key: round(1 / sum(share / found[name][key] for name, share in parts.items()))
        for key in ("at_most", "without_overlap", "predicted")
    }
    bounds = [row["bound"] for row in found.values()]
    return {"bound": ", ".join(dict.fromkeys(bounds))} | by_key


def used(visible: str, q_len: int, heads: int) -> float:
    """The share of the time in which a grid does what counts: whole rounds of all multiprocessors, and of a causal
    mask the halves of the tiles on the diagonal that are computed and hidden. Balanced otherwise."""
    tiles = -(-q_len // TILE)
    if visible == "causal":
        return (q_len + 1) / (TILE * (tiles + 1))
    programs = tiles * heads
    return programs / PROCESSORS / -(-programs // PROCESSORS)


def prediction(config: Mapping[str, Any], kernels: str) -> float | None:
    """TFLOP/s of a cell of the suite `gpu`; None of what is not bound by products or was not counted."""
    q_len = config["q_len"] or config["kv_len"]
    if config["visible"] not in ("full", "causal") or q_len == 1:
        return None
    found = of_call(config["mode"], kernels, config["head_dim"], config["visible"])
    heads = config["batch"] * config["heads"]
    return round(found["predicted"] * used(config["visible"], q_len, heads)) if found else None


def remark(mode: str, kernels: str, head_dim: int, visible: str, rows: Any = None) -> str:
    """What the machine code of a call allows, in words; '' where it was not counted."""
    found = of_call(mode, kernels, head_dim, visible, rows)
    if not found:
        return ""
    return (
        f" (its machine code: {found['without_overlap']} if nothing overlaps, {found['at_most']} by {found['bound']})"
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The counted kernels in Markdown, with what they were counted for."""
    lines = [
        "| kernel | D | tensor | MUFU | FP32 | ALU | shared | issue | registers | limit | TFLOP/s at most | apart "
        "| predicted |",
        "| --- " + "| ---: " * 8 + "| --- " + "| ---: " * 3 + "|",
    ]
    for row in rows:
        spent = row["cycles"]
        units = " | ".join(f"{spent[unit]:.0f}" for unit in ("tensor", "special", "fp32", "alu", "shared", "issue"))
        registers = f"{row['registers']} of {row['register_limit']}" if row.get("register_limit") else row["registers"]
        lines.append(
            f"| `{row['kernel']}` | {row['head_dim']} | {units} | {registers} | {row['bound']} | {row['at_most']} "
            f"| {row['without_overlap']} | **{row['predicted']}** |"
        )
    return "\n".join(lines)


def targets(configs: Sequence[Mapping[str, Any]]) -> str:
    """Predictions of whole calls beside their targets, in Markdown."""
    lines = ["| call | predicted, TFLOP/s | target | limit |", "| --- | ---: | ---: | --- |"]
    for config in configs:
        for (case, mode, kernels), target in TARGETS.items():
            if (case, mode) == (config["case"], config["mode"]):
                expected = prediction(config, kernels)
                bound = of_call(mode, kernels, config["head_dim"], config["visible"]).get("bound", "not counted")
                lines.append(f"| {case} {mode}, {kernels} | {expected or '-'} | {target} | {bound} |")
    return "\n".join(lines)
