"""Every call that users make beside its best peer, on each instruction set that this machine runs, and the table of it.

    python -m efficient_attn.benchmarks.tools.call_table --out FOLDER [--sets avx2] [--dtypes float32,bfloat16]
        [--budget MINUTES] [--page docs/benchmarks.md] [more arguments of bench calls]

Runs `efficient-attn bench calls --quick` once for each set, in processes of their own: our kernels are held to it by
EFFICIENT_ATTN_ISA, PyTorch's by the variables of `HOLDS`. Rows of all go to one file; a run that was ended or had no
time left goes on where it stopped. With --page the table of all rows takes the place of the one there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_attn.backends.cpu import attention as cpu
from efficient_attn.measuring import records

from .. import view
from ..suites import calls

ROOT = Path(__file__).resolve().parents[2]
MARKS = ("<!-- calls: made by benchmarks/tools/call_table.py -->", "<!-- end of calls -->")

# What holds PyTorch's own kernels, oneDNN's and MKL's to an instruction set.
_NAMES = (calls.HELD, "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
HOLDS: Mapping[str, tuple[str, str, str]] = {
    "baseline": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
}

# What bounds the calls that are behind: the first that fits a row.
BOUNDS: Sequence[tuple[Mapping[str, Any], str]] = (
    (
        {"work": "operator", "mode": "fwd_bwd", "seqlen": 16},
        "autograd: a node of it that is written in Python costs some 38 µs, one in C++ (which would link PyTorch) 15",
    ),
    ({"work": "operator", "mode": "fwd", "seqlen": 4096}, "multiply-adds, of which both reach some 80 % of the peak"),
    ({"work": "operator", "mode": "fwd", "seqlen": 16}, "two microseconds of checks in Python"),
    (
        {"work": "decode"},
        "reading keys and values, which both do at the speed of the caches; the rest is the microseconds of a call",
    ),
    (
        {"work": "encoder"},
        "the projections and the feed-forward layers, the same products in both; PyTorch's fused layer saves passes "
        "over the activations between them, and with padding the products of the padding",
    ),
    ({"work": "transformers"}, "everything else in the model, the same code in both"),
)
BEHIND = 0.995  # a ratio that is written as 1.00 is not behind


def holds_nothing() -> bool:
    """On AMD's processors MKL takes no notice of MKL_ENABLE_INSTRUCTIONS: with SSE4_2 a product runs as with AVX2."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


def environment(name: str, own: str) -> dict[str, str]:
    """The environment of a run on an instruction set; as users have it on the one that kernels take by default."""
    found = {**os.environ, "EFFICIENT_ATTN_ISA": name}
    return found if name == own else found | dict(zip(_NAMES, HOLDS[name], strict=True))


def measure(out: Path, name: str, own: str, arguments: Sequence[str]) -> int:
    """Measure what is not done yet on one set; the exit code of the run."""
    resume = ["--resume"] if (out / "results.jsonl").exists() else []
    command = [str(Path(sys.executable).with_name("efficient-attn")), "bench", "calls", "--quick", "--out", str(out)]
    return subprocess.run([*command, *resume, *arguments], env=environment(name, own)).returncode


def rows_of(files: Iterable[Path]) -> list[Mapping[str, Any]]:
    """The rows of a suite's result files."""
    cells = view.latest(
        [
            record
            for file in files
            for record in records.read(file)
            if record["type"] != "cell" or record["suite"] == "calls"
        ]
    )
    return [row for row in view.rows(cells) if row.get("figure") is not None]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a call: its times in the first column of ratios, and the ratio to the best peer of every set and dtype."""
    most = Counter((row["set"], row["dtype"]) for row in rows)
    kinds = sorted(most, key=lambda kind: (-max(most[kind[0], d] for d in ("float32", "bfloat16")), -most[kind]))
    found: dict[tuple[Any, ...], dict[tuple[str, str], Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("call", "mode", "batch", "seqlen", "heads", "head_dim"))
        found.setdefault(key, {})[row["set"], row["dtype"]] = row
    lines = [
        "| call | | B, N, heads x D | ours, ms | best other, ms | " + " | ".join(f"{s} {d}" for s, d in kinds) + " |",
        "| --- " * (5 + len(kinds)) + "|",
    ]
    for (call, mode, *sizes), mine in found.items():
        first = mine.get(kinds[0]) or next(iter(mine.values()))
        ratios = [f"{mine[kind]['figure']:.2f}" if kind in mine else "" for kind in kinds]
        ratios = [f"**{ratio}**" if ratio and float(ratio) < 1 else ratio for ratio in ratios]
        shape = "{}, {}, {} x {}".format(*sizes)
        times = f"{first['ms']:.3g} | {first['peer']} {first['peer_ms']:.3g}"
        lines.append(f"| `{call}` | {mode} | {shape} | {times} | {' | '.join(ratios)} |")
    return "\n".join([*lines, "", *behind(rows)])


def behind(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each call that is behind on some set, with what bounds it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["figure"] >= BEHIND:
            continue
        why = next(
            (text for fits, text in BOUNDS if all(row.get(key) == value for key, value in fits.items())), "not known"
        )
        sizes = f"{row['batch']}, {row['seqlen']}, {row['heads']} x {row['head_dim']}"
        where = f"`{row['call']}` {row['mode']} {sizes} {row['set']} {row['dtype']} {row['figure']:.2f}"
        found.setdefault(why, []).append(where)
    level = sum(row["figure"] >= BEHIND for row in rows)
    total = f"{level} of {len(rows)} rows are level with the best other way to make the call, or ahead."
    return [total, *(f"* Bound by {why}: {'; '.join(where)}." for why, where in found.items())]


def write(page: Path, text: str, marks: tuple[str, str] = MARKS) -> None:
    """Put the table between its marks."""
    before = page.read_text(encoding="utf-8")
    begin, end = (before.index(mark) for mark in marks)
    page.write_text(f"{before[:begin]}{marks[0]}\n{text}\n{before[end:]}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the rows")
    parser.add_argument(
        "--sets", default="", help="instruction sets, e.g. avx2,baseline; default: all; none: only the table"
    )
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--budget", type=float, help="minutes a set; what does not fit is left for the next call")
    parser.add_argument("--page", type=Path, help="the page with the marks of the table")
    given, more = parser.parse_known_args(arguments)
    own = calls.instruction_set()
    every = () if own == "none" else tuple(cpu._cpu.instruction_sets())
    for name in reversed(every) if not given.sets else () if given.sets == "none" else given.sets.split(","):
        if name != own and holds_nothing():
            print(f"{name}: left out, for nothing holds PyTorch's products to it on this processor")
            continue
        budget = [] if given.budget is None else ["--budget", str(given.budget)]
        code = measure(given.out, name, own, ["--dtype", given.dtypes, *budget, *more])
        if code:
            return code
    text = table(rows_of([given.out / "results.jsonl"]))
    print(text)
    if given.page is not None:
        write(given.page, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
