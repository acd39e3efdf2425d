"""What Triton makes of every shipped kernel for sm_80 and sm_90, without a GPU: registers, spills, shared memory,
instructions.

    python -m efficient_attn.benchmarks.tools.triton_table [--out FILE] [--only sm_90/bfloat16/128]

The backend runs as it would on a GPU, on CPU tensors and with a driver that only knows a compute capability; instead
of being launched, each kernel is compiled with the very arguments of the launch. Rows go to a JSONL file, one a kernel.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from efficient_attn import BlockMask
from efficient_attn.backends.statistics import Wanted
from efficient_attn.backends.triton import attention as backend
from efficient_attn.backends.triton import linear_attention as triton_linear
from efficient_attn.backends.triton import shared, statistics
from efficient_attn.benchmarks.tools.table_rows import replace_rows
from efficient_attn.kernels import configs
from efficient_attn.masks import MaskArrays

RESULTS = Path(__file__).resolve().parents[1] / "results" / "triton" / "compile.jsonl"
CAPABILITIES = (80, 90)
# float16 takes the configurations of bfloat16. A call without a mask compiles less than one with a window.
FEATURES = {
    torch.bfloat16: (
        "window",
        "lists",
        "extras",
        "modifiers",
        "orders",
        "decode",
        "linear",
        "tma",
        "statistics",
        "statistics-lists-modifiers",
    ),
    torch.float32: ("window", "modifiers", "orders", "linear", "statistics"),
}
LENGTH = 256


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


class _Compiled:
    """Stands for a kernel: a launch compiles it and notes a row."""

    def __init__(self, kernel: Any, rows: list[dict[str, Any]], careful: bool) -> None:
        self.kernel, self.rows, self.careful = kernel, rows, careful

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, num_warps: int, num_stages: int, **options: Any) -> None:
            names = [p.name for p in self.kernel.params]
            given = dict(zip(names, arguments, strict=True))
            options |= {"num_warps": num_warps, "num_stages": num_stages}
            given |= given["C"]._asdict() if "C" in given else {}
            if given.get("SAFE", False) and not self.careful:
                return
            compiled = self.kernel.warmup(*arguments, grid=(1,), **options)
            row = {"kernel": self.kernel.fn.__name__, "safe": bool(given.get("SAFE", False))}
            tiles = {n.lower(): given[n] for n in ("BLOCK_Q", "BLOCK_K", "CHUNK", "BLOCK_R") if n in given}
            self.rows.append(row | tiles | {"warps": num_warps, "stages": num_stages} | measure(compiled))

        return launch


def measure(compiled: Any) -> dict[str, Any]:
    """Registers and bytes of a thread's stack (what is spilled lies there), from the machine code; instructions from
    PTX."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    ptx = compiled.asm["ptx"]
    return {
        "registers": int(found["REG"]),
        "spilled": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "fma": ptx.count("fma.rn"),
        "cp_async": ptx.count("cp.async.cg") + ptx.count("cp.async.ca"),
        "tma": ptx.count("cp.async.bulk.tensor"),
    }


@contextmanager
def _compiling(capability: int, rows: list[dict[str, Any]], careful: bool = True) -> Iterator[None]:
    """The backend believes in a GPU of this capability with few processors, and its kernels are only compiled;
    `careful`: also for the second launch of a masked call."""
    from triton.runtime import driver

    if shared.interpreted():
        raise RuntimeError("TRITON_INTERPRET=1 is set, under which Triton compiles nothing; unset it")
    kernels = vars(shared.kernels())
    fakes = {
        k: _Compiled(v, rows, careful) if k.endswith("_kernel") else v for k, v in kernels.items() if k[:2] != "__"
    }
    space = type("Kernels", (), fakes)
    with (
        mock.patch.object(driver, "_active", _Driver(capability)),
        mock.patch.object(shared, "kernels", lambda: space),
        mock.patch.object(shared, "capability", lambda device: capability),
        mock.patch.object(shared, "processors", lambda device: 4),
    ):
        yield


def compile_case(
    capability: int, dtype: torch.dtype, head_dim: int, feature: str, careful: bool = True
) -> list[dict[str, Any]]:
    """Compile every kernel that a forward and backward of this kind, or its statistics, launches; one row each."""
    import triton

    rows: list[dict[str, Any]] = []
    q_len = 1 if feature == "decode" else LENGTH
    q = torch.zeros(1, 4, q_len, head_dim, dtype=dtype)
    k = torch.zeros(1, 2 if feature == "decode" else 4, LENGTH * 4, head_dim, dtype=dtype)
    v = k.clone()
    with _compiling(capability, rows, careful):
        if feature == "linear":  # long enough for segments of many chunks
            q = torch.zeros(1, 4, 16 * LENGTH, head_dim, dtype=dtype)
            how = (True, 0, "identity", 1.0)
            out, n, shift = triton_linear.linear_attention_forward(q, q, q, None, None, *how)
            triton_linear.linear_attention_backward(out, None, q, q, q, None, None, out, n, shift, *how)
        else:
            bias, dropout_p, seed = None, 0.0, None
            softcap, sinks, diagonals = 0.0, None, None
            arrays = MaskArrays()
            if feature in ("window", "extras", "modifiers", "tma", "statistics"):
                arrays = MaskArrays(window_left=100, window_right=0, window_offset=3 * LENGTH)
            if feature == "causal":
                arrays = MaskArrays(window_right=0, window_offset=3 * LENGTH)
            if "lists" in feature:
                visible = torch.rand(q_len, 4 * LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
                mask = BlockMask.from_dense(visible).with_causal("bottom_right")
                arrays = mask.arrays(transposed=True)
            if "orders" in feature:  # of tokens, with lists in the blocks that parts of a mask have
                visible = torch.rand(q_len, 4 * LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
                arrays = BlockMask.from_dense(visible, block_size=(64, 64)).arrays(transposed=True)
                places = (torch.arange(n, dtype=torch.int32).flip(0).repeat(4, 1) for n in visible.shape)
                arrays = arrays._replace(**dict(zip(("query_order", "key_order"), places, strict=True)))
            if "extras" in feature:
                bias = torch.zeros(1, 4, q_len, 4 * LENGTH, dtype=dtype)
                dropout_p, seed = 0.1, torch.zeros((), dtype=torch.int64)
            if "modifiers" in feature:
                softcap, sinks, diagonals = 20.0, torch.zeros(4), torch.zeros(1, 4, q_len + 4 * LENGTH - 1)
            call = (arrays, head_dim**-0.5, dropout_p, seed)
            modifiers = (softcap, sinks, diagonals)
            if "statistics" in feature:
                # Cells as large as a tile, and smaller ones.
                wanted = Wanted(8, True, None, torch.zeros(1, 4 * LENGTH, dtype=torch.int32), 1, 64, 0, 64.0)
                wanted = wanted if feature == "statistics" else wanted._replace(map_block=24, top=32)
                statistics.attention_statistics(q, k, bias, arrays, head_dim**-0.5, wanted, *modifiers)
            else:
                with mock.patch.object(configs, "DESCRIPTORS", feature == "tma"):
                    out, lse = backend.attention_forward(q, k, v, bias, *call, *modifiers)
            if feature not in ("decode", "tma") and "statistics" not in feature:
                gradients = (bias is not None, *modifiers, diagonals is not None)
                backend.attention_backward(out, None, None, q, k, v, bias, out, lse, *call, *gradients)
    shared = {"sm": capability, "dtype": str(dtype).removeprefix("torch."), "head_dim": head_dim, "feature": feature}
    return [shared | row | {"triton": triton.__version__} for row in rows]


def cases() -> list[tuple[int, torch.dtype, int, str]]:
    """Every case of the table."""
    every = [(c, t, d, f) for c in CAPABILITIES for t in FEATURES for d in configs.HEAD_DIMS for f in FEATURES[t]]
    return [case for case in every if case[3] != "tma" or (case[0] >= 90 and case[2] <= 128)]


def text(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        f"{'case':34s} {'kernel':26s} {'tile':>9s} {'warps':>5s} {'stages':>6s} {'regs':>4s} {'spilled':>7s} "
        f"{'shared':>8s} {'tensor cores':>14s}"
    ]
    for row in rows:
        case = f"sm_{row['sm']} {row['dtype']} D{row['head_dim']} {row['feature']}"
        tile = "x".join(str(row[n]) for n in ("block_q", "block_k", "chunk", "block_r") if n in row)
        cores = "wgmma" if row["wgmma"] else "mma.sync" if row["mma"] else "-"
        kernel = row["kernel"].removesuffix("_kernel") + (" (safe)" if row["safe"] else "")
        lines.append(
            f"{case:34s} {kernel:26s} {tile:>9s} {row['warps']:5d} {row['stages']:6d} {row['registers']:4d} "
            f"{row['spilled']:7d} {row['shared'] / 1024:7.1f}K {cores:>14s}"
        )
    return "\n".join(lines)


def replace(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows in the place of those of the same cases, in the order of `cases`."""
    order = {name_of(*case): k for k, case in enumerate(cases())}

    def name(row: dict[str, Any]) -> str:
        return name_of(row["sm"], row["dtype"], row["head_dim"], row["feature"])

    replace_rows(path, rows, name, lambda row: order.get(name(row)))


def name_of(capability: int, dtype: object, head_dim: int, feature: str) -> str:
    return f"sm_{capability}/{str(dtype).removeprefix('torch.')}/{head_dim}/{feature}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSONL file; rows of the same cases are replaced")
    parser.add_argument("--only", default="", help="regular expression for the cases, sm_90/bfloat16/128/lists")
    options = parser.parse_args(arguments)
    import triton

    rows: list[dict[str, Any]] = []
    for case in cases():
        if re.search(options.only, name_of(*case)):
            found = compile_case(*case)
            print(text(found).split("\n", 1)[1] if rows else text(found), flush=True)
            rows += found
            replace(options.out, found)
    spilling = sum(row["spilled"] > 0 for row in rows)
    print(f"{len(rows)} kernels, {spilling} of them spill; Triton {triton.__version__}")


if __name__ == "__main__":
    main()
