"""What bounds the CUDA kernels on Hopper, counted from their machine code, without a GPU: `make gpu-model`.

    python -m efficient_attn.benchmarks.tools.gpu_model [--page docs/gpu.md]    the kernels of make cuda-carry
    python -m efficient_attn.benchmarks.tools.gpu_model --dtype bfloat16 --head-dim 128 --part forward    with nvcc

In the loop that multiplies, the shortest way around is a step whose pairs are all visible. What its instructions do,
times the warps that execute them, becomes cycles and TFLOP/s in benchmarks/machine.py. Counted too: the bytes for which
the producer's barriers wait (TMA), and the registers that producer and consumers use behind their setmaxnreg.
"""

from __future__ import annotations

import argparse
import heapq
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from efficient_attn.benchmarks import machine
from efficient_attn.benchmarks.tools import cuda_table
from efficient_attn.benchmarks.tools.call_table import write
from efficient_attn.benchmarks.tools.table_rows import replace_rows

RESULTS = machine.RESULTS
CARRIED = cuda_table.ROOT / "build" / "carry-objects"
MARKS = ("<!-- model: made by benchmarks/tools/gpu_model.py -->", "<!-- end of model -->")
CONSUMERS, GROUP_WARPS, WARP = 2, 4, 32
PRODUCTS = ("HGMMA", "HMMA")
FP32 = ("FFMA", "FADD", "FMUL")
ALU = (
    "FMNMX", "FSETP", "FSEL", "FCHK", "ISETP", "IADD3", "VIADD", "IMNMX", "VIMNMX", "LOP3", "SHF", "LEA", "SEL", "PRMT",
    "F2FP", "PLOP3", "IABS", "I2FP", "MOV",
)  # fmt: skip
# An instruction that is in none of these lists costs its issue alone.


class Instruction(NamedTuple):
    """One line of SASS: its name with what follows the dots, its operands, and where it may jump."""

    name: str
    operands: str
    target: str
    always: bool


def tool(name: str) -> Path:
    """nvdisasm or cuobjdump, which Triton brings."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


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
    products = [k for k, (_, code) in enumerate(blocks) if any(i.name.startswith(PRODUCTS) for i in code)]
    seen: set[frozenset[int]] = set()
    rounds = []
    for k in products:
        way = shortest_round(blocks, k)
        if way and frozenset(way) not in seen:
            seen.add(frozenset(way))
            rounds.append([i for k in way for i in blocks[k][1]])
    yield from sorted(rounds, key=lambda code: (-sum(i.name.startswith(PRODUCTS) for i in code), len(code)))


def counts(code: list[Instruction], warps: int, tma: int = 0) -> dict[str, float]:
    """What a step does that so many warps execute, by the units of machine.RATES; `tma`: bytes that are copied in."""
    found: Counter[str] = Counter()
    for i in code:
        name = i.name.split(".")
        if name[0] in ("HGMMA", "HMMA"):
            shape = name[1] if name[0] == "HGMMA" else {"16816": "16x8x16", "1688": "16x8x8"}[name[1]]
            m, n, k = map(int, shape.split("x"))
            if name[0] == "HGMMA":  # of a warpgroup, which reads B, and A unless it is in registers
                found["tensor"] += 2 * m * n * k / GROUP_WARPS
                of_a = 0 if re.match(r"R\d+, R\d", i.operands) else m * k * 2
                found["shared"] += (n * k * 2 + of_a) / GROUP_WARPS
            else:
                found["tensor_mma"] += 2 * m * n * k
        elif name[0] == "MUFU":
            found["special"] += WARP
        elif name[0] in FP32:
            found["fp32"] += WARP
        elif name[0] == "IMAD":
            found["fp32"] += 2 * WARP
        elif name[0] in ALU:
            found["alu"] += WARP
        elif name[0] in ("LDS", "STS"):
            found["shared"] += WARP * next((int(part) // 8 for part in name if part in ("64", "128")), 4)
        elif name[0] in ("LDSM", "STSM"):
            found["shared"] += WARP * 4 * int(name[-1]) if name[-1] in ("2", "4") else WARP * 4
    found["issue"] = len(code)
    return {unit: amount * warps for unit, amount in found.items()} | {"shared": found["shared"] * warps + tma}


def copied_bytes(blocks: list[tuple[str, list[Instruction]]]) -> int:
    """Bytes that the producer has copied to shared memory in a step: what its barriers are told to wait for, a number
    in the machine code, in the innermost of its loops that do so (keys and values: one each, about as long)."""
    rounds: list[tuple[int, int]] = []
    values: dict[str, int | None] = {}
    for k, (_, code) in enumerate(blocks):
        for i in code:
            if i.name.startswith("SYNCS.ARRIVE.TRANS64"):
                told = values.get(i.operands.split(",")[-1].strip())
                if told and (way := shortest_round(blocks, k)):
                    rounds.append((sum(len(blocks[n][1]) for n in way), told))
            elif written := re.match(r"(U?R\d+),(.*)", i.operands):
                moved = i.name.startswith(("IMAD.MOV", "MOV", "UMOV"))
                number = re.search(r"(0x[0-9a-f]+)\s*$", written[2]) if moved else None
                values[written[1]] = int(number[1], 16) if number else None
    shortest = min(rounds, default=(0, 0))[0]
    return sum(told for length, told in rounds if length <= 1.2 * shortest)


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
    """A row for each kernel of a disassembly that multiplies by tensor cores, Hopper's and others compiled for it."""
    found = []
    for symbol, blocks in blocks_of(text).items():
        name = re.search(r"(sm\d0).*?\d+((?:attention|linear_attention)_[a-z_]+)I", symbol)
        shape = re.search(rf"{cuda_table.SPELT[dtype]}Li(\d+)E", symbol)
        code = next(steps(blocks), [])
        if name is None or shape is None or not code or name[2].endswith("_safe"):
            continue
        row: dict[str, Any] = {"kernel": f"{name[1]}::{name[2]}", "head_dim": int(shape[1]), "dtype": dtype}
        row["instructions"] = dict(Counter(i.name.split(".")[0] for i in code).most_common(12))
        warps, tma = 1, 0  # only shares count where no warp is special
        if name[1] == "sm90":
            warps, tma = CONSUMERS * GROUP_WARPS, copied_bytes(blocks)
            give, take = "USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC"
            row["producer_registers"] = 1 + registers_behind(blocks, give, take)
            row["registers"] = 1 + registers_behind(blocks, take, give)
            row["register_limit"] = max(register_limits(blocks, take), default=0)
        else:
            used = (int(r) for _, block in blocks for i in block for r in re.findall(r"(?<![A-Z])R(\d+)", i.operands))
            row["registers"] = 1 + max(used)
        done = counts(code, warps, tma)
        row |= {"copied_bytes": tma, "cycles": machine.cycles(done)}
        flop = done.get("tensor", 0.0) + done.get("tensor_mma", 0.0)
        found.append(row | machine.limits(row["cycles"], flop))
    return found


def register_limits(blocks: list[tuple[str, list[Instruction]]], name: str) -> list[int]:
    """What the setmaxnreg of this name ask for."""
    every = (i.operands for _, code in blocks for i in code if i.name.startswith(name))
    return [int(number, 16) for operands in every for number in re.findall(r"0x[0-9a-f]+", operands)]


def read(cubin: Path, dtype: str) -> list[dict[str, Any]]:
    """The rows of the kernels in a cubin for sm_90a."""
    said = subprocess.run([tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True)
    return rows_of(said.stdout, dtype)


def read_object(path: Path) -> list[dict[str, Any]]:
    """The rows of what `make cuda-carry` has compiled, an object file whose name says its dtype."""
    dtype = next((name for name in cuda_table.DTYPES if name in path.name), "")
    if not dtype:
        return []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [tool("cuobjdump"), "-xelf", "sm_90a", str(path.resolve())], cwd=folder, capture_output=True, check=True
        )
        return [row for cubin in sorted(Path(folder).glob("*.cubin")) for row in read(cubin, dtype)]


def compile_and_read(dtype: str, head_dim: int, part: str) -> list[dict[str, Any]]:
    """Compile the kernels of a call for sm_90a and read their machine code."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        source.write_text(cuda_table.source(dtype, (head_dim,), (part,), (0,)))
        command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_90a", f"-I{cuda_table.ROOT / 'csrc'}", "-cubin", "-o"]
        subprocess.run([*command, str(cubin), str(source)], check=True)
        return read(cubin, dtype)


def page(rows: list[dict[str, Any]]) -> str:
    """What stands between the marks of docs/gpu.md."""
    from efficient_attn.benchmarks.suites import Options, gpu

    hopper = [row for row in rows if row["dtype"] == "bfloat16" and row["kernel"].startswith("sm90::")]
    expected = machine.kept()
    known = [
        f"{name.removeprefix('sm90::attention_')} D{d} {expected[name, d]['predicted']}, published {told}"
        for (name, d), told in machine.PUBLISHED.items() if (name, d) in expected
    ]  # fmt: skip
    about = (
        "*Prediction, not measured*: `make gpu-model` counts a step of each CUDA kernel in machine code for Hopper.\n"
        "Cycles of a multiprocessor a step by unit, and TFLOP/s of bfloat16 products at "
        f"{machine.GHZ} GHz if the slowest unit alone\ncounts, if nothing overlaps, and if "
        f"{machine.UNHIDDEN:.0%} of what could overlap does not."
    )
    told = (
        "Of a call: whole rounds of all multiprocessors, and of a causal mask the visible half of the tiles on the\n"
        "diagonal; balanced otherwise. Decoding and linear attention are bound by memory and have no row. A first time "
        "near\n*at most* says to relieve the unit that is the limit, one near *apart* to mend the schedule."
    )
    checked = (
        "Beside FlashAttention-3's published figures, the first of which sets that share: " + "; ".join(known) + "."
    )
    sources = [f"| {unit} | {rate.amount:g} | {rate.of} | {rate.source} |" for unit, rate in machine.RATES.items()]
    calls = machine.targets(list(gpu.configs(Options())))
    heading = "| unit | in a cycle | | source |\n| --- | ---: | --- | --- |"
    return "\n\n".join([about, machine.table(hopper), told, calls, checked, "\n".join([heading, *sources])])


def replace(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put rows in the place of those of the same kernels; returns all."""

    def kernel(row: dict[str, Any]) -> tuple[str, int, str]:
        return (row["kernel"], row["head_dim"], row["dtype"])

    return replace_rows(path, rows, kernel, kernel)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSONL file; rows of the same kernels are replaced")
    parser.add_argument("--objects", type=Path, default=CARRIED, help="where make cuda-carry has compiled")
    parser.add_argument("--page", type=Path, help="the page with the marks of the table")
    parser.add_argument("--dtype", action="append", choices=cuda_table.DTYPES)
    parser.add_argument("--head-dim", action="append", type=int, choices=cuda_table.HEAD_DIMS)
    parser.add_argument("--part", action="append", choices=("forward", "backward"))
    options = parser.parse_args(arguments)
    if options.dtype or options.head_dim or options.part:
        rows = [
            row
            for dtype in options.dtype or ["bfloat16"]
            for head_dim in options.head_dim or cuda_table.HEAD_DIMS
            for part in options.part or ("forward", "backward")
            for row in compile_and_read(dtype, head_dim, part)
        ]
    else:
        objects = sorted(options.objects.glob("*.o"))
        if not objects:
            parser.error(f"no object files in {options.objects}; run make cuda-carry first, or name a --head-dim")
        rows = [row for path in objects for row in read_object(path)]
    kept = replace(options.out, rows)
    print(machine.table(rows))
    if options.page is not None:
        write(options.page, page(kept), MARKS)


if __name__ == "__main__":
    main()
