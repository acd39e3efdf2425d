"""What nvcc makes of every CUDA kernel for sm_80 and sm_90a, without a GPU: registers, spills, stack, shared memory.

    python -m efficient_attn.benchmarks.tools.cuda_table [--out FILE] [--arch sm_80] [--dtype bfloat16]

Each kernel is instantiated as the launchers of csrc/cuda start it. Rows go to a JSONL file, one a kernel. Any warning
of nvcc is an error, and so is a wgmma that ptxas does not leave asynchronous. Hopper's kernels are called sm90::... and
are part of sm_90a alone.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efficient_attn.benchmarks.tools.table_rows import replace_rows

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cuda" / "compile.jsonl"
ARCHS = ("sm_80", "sm_90a")
DTYPES = {"bfloat16": "BFloat16", "float16": "Float16"}
SPELT = {"bfloat16": "13__nv_bfloat16", "float16": "6__half"}  # in a symbol
HEAD_DIMS = (64, 128, 256)
PARTS = ("forward", "backward", "decode", "linear")
SOURCE = """
#include <cstdio>
#include "cuda/attention_backward.h"
#include "cuda/attention_decode.h"
#include "cuda/attention_forward.h"
#include "cuda/linear_attention_backward.h"
#include "cuda/linear_attention_forward.h"
using namespace efficient_attn;
struct Launch {{
    template <class... P, class... A>
    void operator()(void (*kernel)(P...), int64_t, int threads, uint32_t shared, A&&... arguments) {{
        kernel<<<1, threads, shared>>>(arguments...);
    }}
    int capability() const {{ return 90; }}
    int multiprocessors() const {{ return 1; }}
    TensorMap tensor_map(const TensorView&, int64_t, int64_t, int64_t, int64_t, int) const {{ return {{}}; }}
}};
void instantiate(const KernelParams& k, const DecodeParams& d, const LinearAttentionParams& p) {{
    Launch launch;
{calls}
}}
"""


def source(dtype: str, head_dims: Sequence[int], parts: Sequence[str], extras: Sequence[int]) -> str:
    """A translation unit that instantiates the kernels and launches them with their shared memory."""
    calls = "".join(
        f"    launch_attention_{part}<{DTYPES[dtype]}, {head_dim}, {str(bool(extra)).lower()}>(k, launch);\n"
        for part in parts
        if part in ("forward", "backward")
        for head_dim in head_dims
        for extra in extras
    )
    if "decode" in parts:
        calls += "".join(f"    launch_decode_head<{DTYPES[dtype]}, {head_dim}>(d, launch);\n" for head_dim in head_dims)
    if "linear" in parts and dtype == "bfloat16":  # they read every dtype
        calls += "    launch_linear_attention_forward(p, 1, nullptr, launch);\n"
        calls += "    launch_linear_attention_backward(p, 1, nullptr, launch);\n"
    return SOURCE.format(calls=calls)


def shared_bytes(head_dim: int, kernel: str, extra: bool) -> int:
    """Shared memory of a kernel, as the shapes in csrc/cuda/sm80 and sm90 add it up."""
    line = 2 * head_dim
    if kernel.startswith("sm90::attention_forward"):
        narrow, wide = {64: (128, 4), 128: (128, 3), 256: (64, 2)}, {128: (176, 2), 256: (80, 2)}
        keys, stages = (wide if kernel.endswith("_wide") else narrow)[head_dim]
        rows = 128 * (2 if head_dim == 64 else 1)  # of 64 the output has its own
        return (rows + 2 * stages * keys) * line + stages * 128 + (4 + 4 * stages) * 8
    if kernel == "sm90::attention_key_gradient":
        rows, stages, weights = (64, 2, 64 * 64 * 4) if head_dim == 256 else (128, 3, 0)
        return (2 * rows + 2 * stages * 64) * line + weights + stages * (2 * 64 * 4 + 128) + (4 + 2 * stages) * 8
    if kernel == "sm90::attention_query_gradient_wide":
        stages = 3 if head_dim == 64 else 2
        return (2 * 128 + 2 * stages * 128) * line + stages * 128 + (2 + 2 * stages) * 8
    if kernel == "sm90::attention_query_gradient":
        return (2 * 128 + 2 * 3 * (32 if head_dim == 256 else 64)) * line + 3 * 128 + (2 + 2 * 3) * 8
    if kernel == "sm90::attention_backward":
        lines = 2 * 2 * 128  # of two rounds
        return (2 * 128 + 2 * 2 * 64) * line + 2 * 128 * 64 * 2 + 2 * 64 * 64 * 4 + 2 * 2 * 64 * 4 + lines + 8 * 8
    if kernel in (
        "attention_delta",
        "sm90::attention_round_queries",
        "linear_attention_terms",
        "linear_attention_scan",
    ):
        return 0
    if kernel == "attention_decode_join":
        return 4 * 256 * 4
    if kernel.startswith("attention_decode"):
        return (int(kernel.rsplit("_", 1)[1]) + (8 if head_dim == 64 else 4) * 64) * line
    if kernel.startswith("linear"):
        chunk, copies = (32 if head_dim == 256 else 64), (2 if extra else 1)
        return chunk * (2 * copies * line + 128 * (copies + 2) + 3 * 4)
    if kernel.startswith("attention_forward"):
        keys = 64 if head_dim == 64 and not extra else 32
        return (128 + 4 * keys) * line
    if kernel.startswith("attention_key"):
        return (2 * (128 if head_dim == 64 else 64) + 4 * 32) * line + 4 * 32 * 4
    return (2 * 64 + 4 * 32) * line


def compile_rows(
    arch: str,
    dtype: str,
    *,
    head_dims: Sequence[int] = HEAD_DIMS,
    parts: Sequence[str] = PARTS,
    extras: Sequence[int] = (0, 1),
) -> list[dict[str, Any]]:
    """Compile the kernels of these calls; one row each. RuntimeError with what nvcc said where it complains."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cu"
        file.write_text(source(dtype, head_dims, parts, extras))
        command = ["nvcc", "-std=c++17", "-O3", f"-arch={arch}", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-Werror",
                   "all-warnings", "-cubin", "-o", str(Path(folder) / "kernels.cubin"), str(file)]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0 or re.search(r"\(C75\d\d\)", result.stderr):
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    shared = {"arch": arch, "dtype": dtype, "nvcc": nvcc_version()}
    rows = read_report(result.stderr)
    return [
        shared | row | {"dtype": dtype} for row in rows if arch == "sm_90a" or not row["kernel"].startswith("sm90::")
    ]


def nvcc_version() -> str:
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", version)
    return found[1] if found else "?"


def read_report(text: str) -> list[dict[str, Any]]:
    """The rows in what ptxas -v printed, with the dtype of a kernel that has one."""
    rows = []
    for part in text.split("Compiling entry function '")[1:]:
        symbol = part.split("'", 1)[0]
        name = re.search(
            r"\d+(attention_(?:forward|backward|key_gradient|query_gradient|bias_gradient|delta|round_queries)(?:_safe|_wide)?"
            r"|attention_decode(?:_join)?|linear_attention_(?:states|scan|sums|terms))(?:[IE]|NS)", symbol
        )  # fmt: skip
        shape = re.search(r"(?:__nv_bfloat16|6__half|4SumsI)Li(\d+)E(?:Lb([01])E)?", symbol)
        decode = re.search(r"6DecodeI.*?Li(\d+)ELi(\d+)E", symbol)
        usage = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
            part,
            re.S,
        )
        if name is None or usage is None:
            raise RuntimeError(f"what ptxas said of {symbol} is not understood:\n{part}")
        kernel = f"sm90::{name[1]}" if "4sm90" in symbol else name[1]
        head_dim = int(shape[1]) if shape else 0
        extra = shape is not None and shape[2] == "1" and not kernel.startswith("sm90::")
        if decode:
            head_dim, kernel = int(decode[1]), f"{kernel}_{decode[2]}"
        dtype = next((name for name, spelt in SPELT.items() if spelt in symbol), None)
        rows.append(
            {
                "dtype": dtype,
                "kernel": kernel, "safe": name[1].endswith("_safe"), "head_dim": head_dim, "extras": extra,
                "registers": int(usage[4]), "stack": int(usage[1]), "spill_stores": int(usage[2]),
                "spill_loads": int(usage[3]), "shared": shared_bytes(head_dim, kernel, extra),
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: (row["kernel"], row["head_dim"], row["extras"]))


def complaint(row: dict[str, Any]) -> str:
    """What is wrong with a row, or an empty string: more shared memory than an A100 has (Hopper's kernels: an H100),
    or spilled registers, with two exceptions.

    The `safe` kernels run only on tiles where a NaN was met; of linear attention over more than 128 columns, the state
    that is summed fills the registers.
    """
    limit = (227 if row["kernel"].startswith("sm90::") else 163) * 1024
    if row["shared"] > limit:
        return f"{row['kernel']} of {row['head_dim']} asks for {row['shared']} bytes of shared memory, over {limit}"
    wide = row["kernel"] == "linear_attention_sums" and row["head_dim"] == 256 and row["spill_stores"] <= 64
    if row["safe"] or wide or row["spill_stores"] == row["spill_loads"] == 0:
        return ""
    return f"{row['kernel']} of {row['head_dim']} spills {row['spill_stores']} bytes, and reads {row['spill_loads']}"


def text(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        f"{'arch':7s} {'dtype':9s} {'kernel':30s} {'head':>4s} {'extras':>6s} {'regs':>4s} {'spill st/ld':>11s} "
        f"{'shared':>8s}"
    ]
    for row in rows:
        spill = f"{row['spill_stores']}/{row['spill_loads']}"
        lines.append(
            f"{row['arch']:7s} {row['dtype']:9s} {row['kernel']:30s} {row['head_dim']:4d} {row['extras']!s:>6s} "
            f"{row['registers']:4d} {spill:>11s} {row['shared'] / 1024:7.1f}K"
        )
    return "\n".join(lines)


def replace(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put rows in the place of those of the same architecture and dtype; returns all."""
    return replace_rows(path, rows, lambda row: (row["arch"], row["dtype"]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSONL file; rows of the same cases are replaced")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: all")
    options = parser.parse_args(arguments)
    for arch in options.arch or ARCHS:
        for dtype in options.dtype or DTYPES:
            rows = compile_rows(arch, dtype)
            print(text(rows), flush=True)
            kept = replace(options.out, rows)
    spilling = sum(row["spill_stores"] > 0 for row in kept)
    print(f"{len(kept)} kernels, {spilling} of them spill")


if __name__ == "__main__":
    main()
