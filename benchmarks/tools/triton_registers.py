"""Registers and spills of every Triton kernel under each version of Triton that is tested: `make triton-registers`.

    python -m efficient_attn.benchmarks.tools.triton_registers --only sm_90/bfloat16/128    with the Triton at hand
    python -m efficient_attn.benchmarks.tools.triton_registers --only none --page docs/gpu.md    the table alone

What is compiled is what a call launches by default, as in triton_table.py; the second launch of a masked call, which
computes nothing unless a NaN was met, is left out, and so is float16, which takes what bfloat16 takes. A row is a
launch: case, kernel, tile, warps, stages, what it takes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from efficient_attn.benchmarks.tools import triton_table
from efficient_attn.benchmarks.tools.call_table import write
from efficient_attn.benchmarks.tools.table_rows import replace_rows
from efficient_attn.kernels import configs

RESULTS = triton_table.RESULTS.with_name("registers.jsonl")
MARKS = ("<!-- registers: made by benchmarks/tools/triton_registers.py -->", "<!-- end of registers -->")
MASKS = ("dense", "causal", "window", "lists")
FEATURES = {
    torch.bfloat16: (
        *MASKS, "extras", "modifiers", "orders", "decode", "linear", "statistics", "statistics-lists-modifiers",
    ),
    torch.float32: (*MASKS, "modifiers", "orders", "linear", "statistics"),
}  # fmt: skip
KEYS = ("kernel", "block_q", "block_k", "chunk", "block_r", "warps", "stages", "registers", "spilled")
# Families of kernels, as the table names them, by the first that a kernel's name contains.
FAMILIES = {
    "plan": "forward", "attention_forward": "forward", "merge": "forward", "delta": "backward", "gradient": "backward",
    "statistics": "statistics", "received": "statistics", "mass_map": "statistics", "": "linear",
}  # fmt: skip


def cases() -> list[tuple[int, torch.dtype, int, str]]:
    return [
        (capability, dtype, head_dim, feature)
        for capability in triton_table.CAPABILITIES
        for dtype in FEATURES
        for head_dim in configs.HEAD_DIMS
        for feature in FEATURES[dtype]
    ]


def version(full: str) -> str:
    """3.9 of 3.9.0."""
    return ".".join(full.split(".")[:2])


def family(kernel: str) -> str:
    return next(name for part, name in FAMILIES.items() if part in kernel)


def compiled(case: tuple[int, torch.dtype, int, str]) -> list[dict[str, Any]]:
    """The rows of a case, each launch that takes as much as another once."""
    found = triton_table.compile_case(*case, careful=False)
    name = triton_table.name_of(*case)
    rows = [
        {"case": name} | {k: row[k] for k in KEYS if k in row} | {"triton": version(row["triton"])} for row in found
    ]
    return [row for k, row in enumerate(rows) if row not in rows[:k]]


def replace(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put the rows of some cases and a version in the place of those that were there."""
    order = {triton_table.name_of(*case): k for k, case in enumerate(cases())}

    def place(row: dict[str, Any]) -> tuple[float, int] | None:
        return (float(row["triton"]), order[row["case"]]) if row["case"] in order else None

    replace_rows(path, rows, lambda row: (row["case"], row["triton"]), place)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Most registers, and bytes spilled, by family, capability, dtype, head dimension and version, in Markdown."""
    versions = sorted({row["triton"] for row in rows}, key=float)
    found: dict[tuple[str, ...], dict[str, tuple[int, int]]] = {}
    for row in rows:
        arch, dtype, head_dim, _ = row["case"].split("/")
        of = found.setdefault((family(row["kernel"]), arch, dtype, head_dim), {})
        registers, spilled = of.get(row["triton"], (0, 0))
        of[row["triton"]] = max(registers, row["registers"]), max(spilled, row["spilled"])
    lines = [
        "| kernels | | dtype | D | " + " | ".join(f"Triton {v}" for v in versions) + " |",
        "| --- | --- | --- | ---: " + "| ---: " * len(versions) + "|",
    ]
    for key, of in found.items():
        told = [f"{of[v][0]}{f' (**{of[v][1]} B**)' if of[v][1] else ''}" if v in of else "" for v in versions]
        lines.append(f"| {' | '.join(key)} | {' | '.join(told)} |")
    return "\n".join(lines)


def page(rows: Sequence[dict[str, Any]]) -> str:
    """What stands between the marks of docs/gpu.md."""
    versions = sorted({row["triton"] for row in rows}, key=float)
    counts = [
        f"{sum(row['spilled'] > 0 and row['triton'] == v for row in rows)} of "
        f"{sum(row['triton'] == v for row in rows)} with {v}"
        for v in versions
    ]
    worst: dict[tuple[str, ...], int] = {}
    for row in rows:
        if row["spilled"]:
            key = (row["case"], row["kernel"], row["triton"])
            worst[key] = max(worst.get(key, 0), row["spilled"])
    named = [
        f"* {case}, Triton {version}: `{kernel}` {spilled} B" for (case, kernel, version), spilled in worst.items()
    ]
    said = "The most registers of a thread among the launches of a family, and bytes spilled where there are any. They "
    return "\n\n".join(part for part in (f"{said}spill in {', '.join(counts)}.", table(rows), "\n".join(named)) if part)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSONL file; rows of the same cases are replaced")
    parser.add_argument("--only", default="", help="regular expression for the cases, sm_90/bfloat16/128/lists")
    parser.add_argument("--page", type=Path, help="the page with the marks of the table")
    options = parser.parse_args(arguments)
    for case in cases():
        if re.search(options.only, triton_table.name_of(*case)):
            rows = compiled(case)
            replace(options.out, rows)
            spilled = sum(row["spilled"] > 0 for row in rows)
            print(f"{triton_table.name_of(*case)}: {len(rows)} launches, {spilled} spill", flush=True)
    if options.page is not None:
        write(options.page, page([json.loads(line) for line in options.out.read_text().splitlines()]), MARKS)


if __name__ == "__main__":
    main()
