"""What bounds Hopper's kernels, counted from their machine code, without a GPU: `make cuda-limits` (needs nvcc).

    python -m efficient_attn.benchmarks.tools.cuda_limits [--dtype bfloat16] [--head-dim 128] [--part forward]

In the loop of the consumers that multiplies, the shortest way around is a step whose pairs are all visible. Its
instructions, times the warps that execute them, over what a multiprocessor does in a cycle, give cycles for each unit;
the largest of them is the least that a step can take, and all of them in a row what it takes where nothing overlaps.
The first measured time lies between the two: near the first, the unit that it names is what to relieve; near the
second, the schedule is. Also printed: the registers that the producer uses behind the setmaxnreg that leaves it few.

Rates of a cycle and multiprocessor of an H100 or H200 (NVIDIA H100 white paper; CUDA C++ programming guide, arithmetic
instructions): 4096 FLOP of bf16 by the tensor cores, 16 of the special functions, 128 bytes of shared memory, 4 warp
instructions issued.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from efficient_attn.benchmarks.tools import cuda_table

RESULTS = cuda_table.RESULTS.with_name("limits.jsonl")
PROCESSORS, GHZ = 132, 1.755  # an H200's, at the clock that its dense peak of 989 TFLOP/s is stated for, about
TENSOR_FLOP, SPECIAL, SHARED_BYTES, ISSUED = 4096, 16, 128, 4
CONSUMERS, GROUP_WARPS = 2, 4
# kernel -> head dimension -> TFLOP/s to be reached; see suites/gpu.py
TARGETS = {
    "sm90::attention_forward": {64: 470, 128: 650, 256: 680},
    "sm90::attention_backward": {128: 560},
}


class Instruction(NamedTuple):
    """One line of SASS: its name with what follows the dots, its operands, and where it may jump."""

    name: str
    operands: str
    target: str
    always: bool


def disassembler() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


def blocks_of(text: str) -> dict[str, list[tuple[str, list[Instruction]]]]:
    """Kernel symbol -> its basic blocks (label and instructions) in the order of their addresses."""
    found: dict[str, list[tuple[str, list[Instruction]]]] = {}
    blocks: list[tuple[str, list[Instruction]]] = []
    fresh = 0
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\S+?),", line):
            blocks = found.setdefault(section[1], [("", [])])
        elif label := re.match(r"(\.L_x?_?\w+):", line):
            blocks.append((label[1], []))
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", line):
            guard, name, operands = code.groups()
            jumps = re.search(r"\(?(\.L_x?_?\w+)", operands) if name.split(".")[0] in ("BRA", "BSSY", "CALL") else None
            target = jumps[1] if jumps and name.startswith("BRA") else ""
            blocks[-1][1].append(Instruction(name, operands, target, guard is None))
            if name.split(".")[0] in ("BRA", "EXIT", "RET", "BRX"):
                fresh += 1
                blocks.append((f"after {fresh}", []))
    return found


def edges(blocks: list[tuple[str, list[Instruction]]]) -> dict[int, list[int]]:
    """Block -> those that may follow it."""
    places = {label: k for k, (label, _) in enumerate(blocks)}
    found: dict[int, list[int]] = {}
    for k, (_, code) in enumerate(blocks):
        last = code[-1] if code else None
        following = [places[last.target]] if last and last.target else []
        ends = last is not None and last.always and last.name.split(".")[0] in ("BRA", "EXIT", "RET")
        if last is not None and last.always and re.search(r"\bU?P\d", last.operands.split("`")[0]):
            ends = False  # BRA.U UP0 and its like branch on an operand
        if last is not None and last.name.startswith("BRA.DIV"):
            ends = False  # where lanes have parted
        if k + 1 < len(blocks) and not ends:
            following.append(k + 1)
        found[k] = following
    return found


def shortest_round(blocks: list[tuple[str, list[Instruction]]], start: int) -> list[int]:
    """The fewest instructions from the beginning of a block back to it, as blocks; empty: it is in no loop."""
    after = edges(blocks)
    heap, before, done = [(0, start, -1)], {}, set()
    while heap:
        spent, k, came = heapq.heappop(heap)
        if k == start and came >= 0:
            path = [came]
            while path[-1] != start:
                path.append(before[path[-1]])
            return path[::-1]
        if k in done:
            continue
        if came >= 0:
            before[k] = came
        done.add(k)
        for other in after[k]:
            if other not in done or other == start:
                heapq.heappush(heap, (spent + len(blocks[k][1]), other, k))
    return []


def steps(blocks: list[tuple[str, list[Instruction]]]) -> Iterator[list[Instruction]]:
    """The rounds of loops that multiply, what a step executes: those with most products first, then the shortest."""
    products = [k for k, (_, code) in enumerate(blocks) if any(i.name.startswith("HGMMA") for i in code)]
    seen: set[frozenset[int]] = set()
    rounds = []
    for k in products:
        way = shortest_round(blocks, k)
        if way and frozenset(way) not in seen:
            seen.add(frozenset(way))
            rounds.append([i for k in way for i in blocks[k][1]])
    yield from sorted(rounds, key=lambda code: (-sum(i.name.startswith("HGMMA") for i in code), len(code)))


def cycles(code: list[Instruction], warps: int) -> dict[str, float]:
    """Cycles of a multiprocessor for a step that so many warps execute, by unit."""
    flop, special, shared = 0.0, 0, 0.0
    for i in code:
        name = i.name.split(".")
        if name[0] == "HGMMA":
            m, n, k = map(int, name[1].split("x"))
            flop += 2 * m * n * k / GROUP_WARPS  # of a warpgroup
            shared += (n * k * 2 + (0 if re.match(r"R\d+, R\d", i.operands) else m * k * 2)) / GROUP_WARPS
        elif name[0] == "MUFU":
            special += 32
        elif name[0] in ("LDS", "STS", "LDSM", "STSM"):
            width = next((int(part) // 8 for part in name if part in ("64", "128")), 4)
            shared += 32 * width
    issued = len(code)
    return {
        "tensor": round(flop * warps / TENSOR_FLOP, 1), "special": round(special * warps / SPECIAL, 1),
        "shared": round(shared * warps / SHARED_BYTES, 1), "issue": round(issued * warps / ISSUED, 1),
    }  # fmt: skip


def registers_behind(blocks: list[tuple[str, list[Instruction]]], name: str, stop: str) -> int:
    """The largest number of a register that is used where `name` (a setmaxnreg) leads, but not behind `stop`."""
    after = edges(blocks)
    starts = [k for k, (_, code) in enumerate(blocks) if any(i.name.startswith(name) for i in code)]
    most, seen, left = -1, set(starts), list(starts)
    while left:
        k = left.pop()
        code = blocks[k][1]
        if k in starts:
            code = code[next(n for n, i in enumerate(code) if i.name.startswith(name)) :]
        for i in code:
            if i.name.startswith(stop):
                break
            most = max([most, *(int(r) for r in re.findall(r"(?<![A-Z])R(\d+)", i.operands))])
        else:
            fresh = [n for n in after[k] if n not in seen]
            seen.update(fresh)
            left += fresh
    return most


def rows_of(text: str, dtype: str) -> list[dict[str, Any]]:
    """A row for each of Hopper's kernels in a disassembly."""
    found = []
    for symbol, blocks in blocks_of(text).items():
        name = re.search(r"\d+(attention_(?:forward|backward|key_gradient|query_gradient))I", symbol)
        shape = re.search(r"(?:__nv_bfloat16|6__half)Li(\d+)E", symbol)
        if name is None or shape is None or "4sm90" not in symbol:
            continue
        row: dict[str, Any] = {"kernel": f"sm90::{name[1]}", "head_dim": int(shape[1]), "dtype": dtype}
        row["producer_registers"] = 1 + registers_behind(blocks, "USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC")
        code = next(steps(blocks), [])
        row["instructions"] = dict(Counter(i.name.split(".")[0] for i in code).most_common(12))
        row |= {"cycles": cycles(code, CONSUMERS * GROUP_WARPS)}
        found.append(row | limits(row))
    return found


def limits(row: dict[str, Any]) -> dict[str, Any]:
    """TFLOP/s of the tensor cores at the clock of `GHZ` if the slowest unit alone counts, and if nothing overlaps."""
    spent = row["cycles"]
    if not spent["tensor"]:
        return {}
    peak = PROCESSORS * GHZ * TENSOR_FLOP / 1e3
    slowest = max(spent, key=lambda unit: spent[unit])
    apart = spent["tensor"] + max(spent["special"], spent["issue"])
    return {
        "bound": slowest, "at_most": round(peak * spent["tensor"] / spent[slowest]),
        "without_overlap": round(peak * spent["tensor"] / apart),
        "target": TARGETS.get(row["kernel"], {}).get(row["head_dim"]),
    }  # fmt: skip


def compile_and_read(dtype: str, head_dim: int, part: str) -> list[dict[str, Any]]:
    """Compile the kernels of a call for sm_90a and read their machine code."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        source.write_text(cuda_table.source(dtype, (head_dim,), (part,), (0,)))
        command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90a", f"-I{cuda_table.ROOT / 'csrc'}", "-cubin", "-o"]
        subprocess.run([*command, str(cubin), str(source)], check=True)
        said = subprocess.run([disassembler(), "-c", str(cubin)], capture_output=True, text=True, check=True)
    return rows_of(said.stdout, dtype)


def text(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'kernel':28s} {'dtype':9s} {'head':>4s}  {'cycles a step: tensor special shared issue':42s} {'bound':>7s} "
        f"{'at most':>7s} {'apart':>6s} {'target':>6s} {'producer regs':>13s}"
    ]
    for row in rows:
        c = row["cycles"]
        lines.append(
            f"{row['kernel']:28s} {row['dtype']:9s} {row['head_dim']:4d}  {c['tensor']:21.0f} {c['special']:7.0f} "
            f"{c['shared']:6.0f} {c['issue']:5.0f} {row.get('bound', '-'):>7s} {row.get('at_most', 0):7d} "
            f"{row.get('without_overlap', 0):6d} {row.get('target') or '-':>6} {row['producer_registers']:13d}"
        )
    return "\n".join([*lines, f"TFLOP/s of the tensor cores, {PROCESSORS} multiprocessors at {GHZ} GHz"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSONL file; rows of the same kernels are replaced")
    parser.add_argument("--dtype", action="append", choices=cuda_table.DTYPES)
    parser.add_argument("--head-dim", action="append", type=int, choices=cuda_table.HEAD_DIMS)
    parser.add_argument("--part", action="append", choices=("forward", "backward"))
    options = parser.parse_args(arguments)
    key = lambda row: (row["kernel"], row["head_dim"], row["dtype"])  # noqa: E731
    kept = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    for dtype in options.dtype or ["bfloat16"]:
        for head_dim in options.head_dim or cuda_table.HEAD_DIMS:
            for part in options.part or ("forward", "backward"):
                rows = compile_and_read(dtype, head_dim, part)
                print(text(rows), flush=True)
                kept = [row for row in kept if key(row) not in set(map(key, rows))] + rows
                partial = options.out.with_suffix(f".{os.getpid()}.tmp")
                partial.write_text("".join(json.dumps(row) + "\n" for row in sorted(kept, key=key)))
                os.replace(partial, options.out)


if __name__ == "__main__":
    main()
