"""Suite ``gpu``: the GPU kernels against PyTorch's and FlexAttention's in one alternation, timed with CUDA events.

"ours" are the Triton kernels; the CUDA kernels, where they are built, are in the same alternation as "cuda".

``python -m efficient_attn.benchmarks.gpu --out DIR`` runs the table ``CASES`` and writes ``results.jsonl``,
``results.png`` (where matplotlib is there) and a summary. `make gpu-check` calls it; it needs PyTorch and Triton,
nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from efficient_attn import BlockMask, SlidingWindow, attention, linear_attention
from efficient_attn.measuring import records, runner
from efficient_attn.measuring.records import Record

Call = Callable[[], object]

# name: batch, query heads, key heads, queries, keys, head_dim, what is visible, modes, and what is promised of it
CASES: dict[str, dict[str, Any]] = {
    "dense 16k D128": {"kv_len": 16384, "head_dim": 128, "heads": 16, "visible": "full", "modes": ("fwd", "bwd")},
    "causal 16k D128": {"kv_len": 16384, "head_dim": 128, "heads": 16, "visible": "causal", "modes": ("fwd", "bwd")},
    "dense 16k D64": {"kv_len": 16384, "head_dim": 64, "heads": 16, "visible": "full", "modes": ("fwd", "bwd")},
    "blocks 10% 16k D128": {"kv_len": 16384, "head_dim": 128, "heads": 16, "visible": "blocks:10", "modes": ("fwd",
    "bwd")},
    "blocks 25% 16k D128": {"kv_len": 16384, "head_dim": 128, "heads": 16, "visible": "blocks:25", "modes": ("fwd",
    "bwd")},
    "window 1024 16k D128": {"kv_len": 16384, "head_dim": 128, "heads": 16, "visible": "window", "modes": ("fwd",
    "bwd")},
    "dense 1k D128 B8": {"batch": 8, "kv_len": 1024, "head_dim": 128, "heads": 16, "visible": "full",
    "modes": ("fwd",)},
    "dense 16k D256": {"kv_len": 16384, "head_dim": 256, "heads": 8, "visible": "full", "modes": ("fwd", "bwd")},
    "decode 16k GQA 32/8": {"batch": 16, "heads": 32, "kv_heads": 8, "q_len": 1, "kv_len": 16384, "head_dim": 128,
                            "visible": "full", "modes": ("fwd",)},
    "linear 64k D64": {"kv_len": 65536, "head_dim": 64, "heads": 16, "visible": "linear", "modes": ("fwd",)},
    "linear causal 64k D64": {"kv_len": 65536, "head_dim": 64, "heads": 16, "visible": "linear_causal",
    "modes": ("fwd",)},
    "decode 8k GQA 32/8": {"batch": 16, "heads": 32, "kv_heads": 8, "q_len": 1, "kv_len": 8192, "head_dim": 128,
                           "visible": "full", "modes": ("fwd",)},
    "blocks 50% 16k D128": {"kv_len": 16384, "head_dim": 128, "heads": 16, "visible": "blocks:50", "modes": ("fwd",
    "bwd")},
    "blocks 5% 16k D128": {"kv_len": 16384, "head_dim": 128, "heads": 16, "visible": "blocks:5", "modes": ("fwd",
    "bwd")},
}  # fmt: skip
DEFAULTS = {
    "batch": 1,
    "kv_heads": None,
    "q_len": None,
    "dtype": "bfloat16",
    "threads": 4,
    "budget_s": 1.5,
    "cuda": True,
}
BLOCK = 128
# (case, mode, figure, least value): what issue 4 asks of an H200
TARGETS = (
    ("dense 16k D128", "fwd", "tflops", 480.0),
    ("dense 16k D128", "bwd", "tflops", 350.0),
    ("dense 16k D128", "fwd", "vs flex", 1.3),
    ("dense 16k D128", "bwd", "vs flex", 1.3),
    ("blocks 10% 16k D128", "fwd", "density efficiency", 1 / 1.15),
    ("blocks 10% 16k D128", "bwd", "density efficiency", 1 / 1.15),
    ("linear 64k D64", "fwd", "share of copy", 1 / 1.5),
    ("linear causal 64k D64", "fwd", "share of copy", 1 / 1.5),
)
# ... and what issue 5 asks of the CUDA kernels there
CUDA_TARGETS = (
    ("dense 16k D128", "fwd", "cuda vs cudnn", 1.0),
    ("dense 16k D128", "fwd", "cuda tflops", 650.0),
    ("causal 16k D128", "fwd", "cuda vs cudnn", 1.0),
    ("causal 16k D128", "fwd", "cuda tflops", 620.0),
    ("dense 16k D128", "bwd", "cuda vs cudnn", 0.95),
    ("dense 16k D128", "bwd", "cuda tflops", 480.0),
    ("dense 16k D128", "bwd", "cuda any order vs cudnn", 0.95),
    ("dense 16k D128", "bwd", "cuda any order tflops", 560.0),
    ("dense 16k D64", "fwd", "cuda tflops", 470.0),
    ("dense 16k D256", "fwd", "cuda tflops", 680.0),
    *((f"blocks {d}% 16k D128", "fwd", "cuda density efficiency", 1 / 1.10) for d in (50, 25, 10, 5)),
    *((f"blocks {d}% 16k D128", "bwd", "cuda density efficiency", 1 / 1.15) for d in (50, 25, 10, 5)),
    ("decode 8k GQA 32/8", "fwd", "cuda share of copy", 0.8),
)
# what is measured -> its dense call under the same name
OURS = {"ours": "dense", "cuda": "cuda dense", "cuda any order": "cuda dense"}


def measurement(suite: str) -> runner.Measure:
    """What measures a cell; a worker looks it up."""
    return run_cell


def cells() -> list[runner.Cell]:
    """One cell for each case and mode."""
    return [
        runner.Cell("gpu", {**DEFAULTS, **{k: v for k, v in case.items() if k != "modes"}, "case": name, "mode": mode})
        for name, case in CASES.items()
        for mode in case["modes"]
    ]


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds of ours and of each peer that serves, why others do not, and the figures that follow."""
    torch.manual_seed(0)
    q_len = config["q_len"] or config["kv_len"]
    kv_heads = config["kv_heads"] or config["heads"]
    shape = (config["batch"], config["heads"], q_len, config["head_dim"])
    dtype = getattr(torch, config["dtype"])
    query = torch.randn(shape, device="cuda", dtype=dtype)
    key, value = (
        torch.randn(shape[0], kv_heads, config["kv_len"], shape[3], device="cuda", dtype=dtype) for _ in range(2)
    )
    kind, _, percent = config["visible"].partition(":")
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    density, mask = 1.0, None
    if kind.startswith("linear"):
        query, key = query.abs(), key.abs()
        causal = kind == "linear_causal"
        candidates = {
            "ours": lambda q, k, v: linear_attention(q, k, v, is_causal=causal),
            "cuda": lambda q, k, v: linear_attention(q, k, v, is_causal=causal, backend="cuda"),
        }
    else:
        if kind == "blocks":
            mask = random_blocks(q_len, config["kv_len"], int(percent) / 100)
        elif kind == "window":
            mask = SlidingWindow(left=1023, right=0).block_mask(q_len, config["kv_len"])
        causal = kind == "causal"
        density = mask.density if mask is not None else 0.5 + 0.5 / q_len if causal else 1.0
        mask = None if mask is None else mask.to("cuda")
        candidates = _attention_candidates(mask, causal, query, key)
        if kind in ("full", "blocks") and config["mode"] == "fwd" and q_len > 1:
            candidates["tma"] = by_tma(candidates["ours"])
        if kind == "blocks":
            candidates["dense"] = lambda q, k, v: attention(q, k, v, backend="triton")
            candidates["cuda dense"] = lambda q, k, v: attention(q, k, v, backend="cuda")
    for name, operator in candidates.items():
        if name.startswith("cuda") and not config["cuda"]:
            absent[name] = "left out: the cell did not end well with it"
            continue
        try:
            calls[name] = _bound(config["mode"], operator, (query, key, value))
            calls[name]()
            torch.cuda.synchronize()
        except Exception as error:
            if name == "ours":
                raise
            calls.pop(name, None)
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    if config["mode"] == "bwd" and "cuda" in calls:
        calls["cuda any order"] = in_any_order(calls["cuda"])
    times = interleaved(calls, config["budget_s"])
    result: dict[str, Any] = {"ms": times["ours"], "times_ms": times, "absent": absent, "density": round(density, 6)}
    return result | _figures(config, times, density, (query, key, value))


def _attention_candidates(
    mask: BlockMask | None, causal: bool, query: Tensor, key: Tensor
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Ours and the peers that take the same mask."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    grouped = query.shape[1] != key.shape[1]
    found: dict[str, Any] = {
        "ours": lambda q, k, v: attention(q, k, v, mask=mask, is_causal=causal, backend="triton"),
        "cuda": lambda q, k, v: attention(q, k, v, mask=mask, is_causal=causal, backend="cuda"),
    }

    def sdpa(backend: Any) -> Any:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

        return call

    if mask is None:
        found["flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
        found["cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION)
        found["efficient"] = sdpa(SDPBackend.EFFICIENT_ATTENTION)
    if query.shape[2] > 1:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        theirs = None
        if mask is not None:
            theirs = mask.to_flex()
        elif causal:
            theirs = create_block_mask(
                lambda b, h, i, j: i >= j, None, None, query.shape[2], key.shape[2], device="cuda"
            )
        compiled = torch.compile(flex_attention, dynamic=False)
        found["flex"] = lambda q, k, v: compiled(q, k, v, block_mask=theirs)
    return found


def by_tma(ours: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Our forward with the option that is off by default; see kernels/configs.py."""
    from efficient_attn.kernels import configs

    def call(*tensors: Tensor) -> Tensor:
        configs.DESCRIPTORS = True
        try:
            return ours(*tensors)
        finally:
            configs.DESCRIPTORS = False

    return call


def in_any_order(backward: Call) -> Call:
    """The call with the option of the CUDA kernels that gives up repeatable bits; see backends/cuda.py."""

    def call() -> object:
        os.environ["EFFICIENT_ATTN_CUDA_ANY_ORDER"] = "1"
        try:
            return backward()
        finally:
            del os.environ["EFFICIENT_ATTN_CUDA_ANY_ORDER"]

    return call


def random_blocks(q_len: int, kv_len: int, density: float) -> BlockMask:
    """Whole blocks of 128 x 128: in every block row the same number, drawn at random."""
    rows, columns = -(-q_len // BLOCK), -(-kv_len // BLOCK)
    count = max(1, round(density * columns))
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))
    chosen = scores.argsort(dim=1)[:, :count].sort(dim=1).values
    indptr = torch.arange(0, rows * count + 1, count)
    return BlockMask.from_csr(indptr, chosen.flatten().int(), q_len=q_len, kv_len=kv_len, block_size=(BLOCK, BLOCK))


def _bound(mode: str, operator: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Call:
    """A call of no arguments: the forward, or the backward alone on a graph that is kept."""
    if mode == "fwd":
        return torch.no_grad()(lambda: operator(*tensors))
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = operator(*leaves)
    grad_out = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)


def interleaved(calls: Mapping[str, Call], budget_s: float) -> dict[str, float]:
    """Median milliseconds of each call by CUDA events, in alternation, after three unmeasured runs of each."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    while len(samples["ours"]) < 100 and (time.perf_counter() - started < budget_s or len(samples["ours"]) < 5):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end))
    return {name: round(statistics.median(values), 5) for name, values in samples.items()}


def _figures(
    config: Mapping[str, Any], times: Mapping[str, float], density: float, tensors: tuple[Tensor, ...]
) -> dict[str, Any]:
    """TFLOP/s (4 B Hq Nq Nk D forward, 2.5 times that backward, on visible pairs), or the share of the copy bound.

    Those of the CUDA kernels begin with "cuda".
    """
    query, key, value = tensors
    figures: dict[str, Any] = {}
    bound_by_memory = config["visible"].startswith("linear") or query.shape[2] == 1
    if bound_by_memory:
        written = query.numel() // query.shape[3] * value.shape[3] * value.element_size()
        moved = sum(t.numel() * t.element_size() for t in tensors) + written
        figures["copy_gbs"] = copy_gbs = round(measured_copy(), 1)
    for ours, dense in OURS.items():
        if ours not in times:
            continue
        prefix = "" if ours == "ours" else f"{ours} "
        figures |= {f"{prefix}vs {name}": round(ms / times[ours], 4) for name, ms in times.items() if name != ours}
        if bound_by_memory:
            figures[f"{prefix}gbs"] = round(moved / times[ours] / 1e6, 1)
            figures[f"{prefix}share of copy"] = round(figures[f"{prefix}gbs"] / copy_gbs, 4)
        else:
            flops = 4 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * query.shape[3] * density
            flops *= 2.5 if config["mode"] == "bwd" else 1.0
            figures[f"{prefix}tflops"] = round(flops / times[ours] / 1e9, 1)
        if dense in times:
            figures[f"{prefix}density efficiency"] = round(density * times[dense] / times[ours], 4)
    return figures


def measured_copy() -> float:
    """GB/s of a copy of 1 GiB, read and written."""
    block = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(block)
    return 2 * block.numel() * 2 / interleaved({"ours": lambda: target.copy_(block)}, 0.3)["ours"] / 1e6


def device_facts() -> dict[str, Any]:
    """The GPU, its clocks now and the versions, for the environment line; asked of a process that is not this one."""
    import subprocess

    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    found = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True
    )
    return {"gpu": found.stdout.strip(), "cuda": torch.version.cuda, "torch": torch.__version__}


def latest(found: list[Record]) -> list[Record]:
    """The records of the last run: a directory may hold several."""
    starts = [k for k, record in enumerate(found) if record["type"] == "environment"]
    return found[starts[-1] :] if starts else found


def summary(found: list[Record]) -> str:
    """The tables of a run, and which targets it reached."""
    cells = [record for record in found if record["type"] == "cell"]
    lines = _table(cells, "")
    if any("cuda" in cell.get("times_ms", {}) for cell in cells):
        lines += ["", "The CUDA kernels (experimental)", *_table(cells, "cuda ")]
    by_name = {(c["config"]["case"], c["config"]["mode"]): c for c in cells}
    for title, targets in (("issue 4", TARGETS), ("the CUDA kernels, issue 5", CUDA_TARGETS)):
        lines.append(f"\nTargets (an H200, {title})")
        for case, mode, figure, least in targets:
            value = by_name.get((case, mode), {}).get(figure)
            verdict = "not measured" if value is None else "reached" if value >= least else "MISSED"
            lines.append(f"  {case} {mode}: {figure} >= {least:.3g}: {'-' if value is None else value} {verdict}")
    return "\n".join(lines)


def _table(cells: list[Record], prefix: str) -> list[str]:
    """A line a cell: ours ("") or those of the CUDA kernels beside the peers."""
    peers = ("flash", "cudnn", "efficient", "flex") if not prefix else ("flash", "cudnn", "efficient", "flex", "ours")
    heads = " ".join(f"{name[:7]:>7s}" for name in (p.replace("ours", "triton") for p in peers))
    lines = [f"{'case':24s} {'mode':4s} {'ms':>9s} {'TFLOP/s':>8s} {heads}  more"]
    for cell in cells:
        name, mode = cell["config"]["case"], cell["config"]["mode"]
        if cell["status"] != "ok":
            lines.append(f"{name:24s} {mode:4s} {cell['status']}: {cell.get('message', '')[:100]}")
            continue
        ms = cell["ms"] if not prefix else cell["times_ms"].get("cuda")
        if ms is None:
            lines.append(f"{name:24s} {mode:4s} {cell['absent'].get('cuda', 'no CUDA kernel')[:100]}")
            continue
        beside = [f"{cell[k]:6.2f}x" if (k := f"{prefix}vs {p}") in cell else "      -" for p in peers]
        kinds = (
            ("density efficiency", "share of copy", "vs tma") if not prefix else ("density efficiency", "share of copy")
        )
        more = [f"{k} {cell[prefix + k]:.2f}" for k in kinds if prefix + k in cell]
        if prefix and "cuda any order tflops" in cell:
            more.append(f"in any order {cell['cuda any order tflops']}")
        tflops = cell.get(f"{prefix}tflops", "-")
        lines.append(f"{name:24s} {mode:4s} {ms:9.3f} {tflops:>8} {' '.join(beside)}  {', '.join(more)}")
    return lines


def draw(found: list[Record], path: Path) -> bool:
    """Bars of every case, ours beside the peers, in TFLOP/s; False where matplotlib is missing or nothing was
    measured."""
    cells = [r for r in found if r["type"] == "cell" and r["status"] == "ok" and "tflops" in r]
    try:
        import matplotlib
    except ImportError:
        return False
    if not cells:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ("ours", "cuda", "flex", "flash", "cudnn", "efficient")
    figure, axis = pyplot.subplots(figsize=(1.2 + 1.1 * len(cells), 4.2), layout="constrained")
    for k, name in enumerate(names):
        heights = [
            c["tflops"] * c["times_ms"]["ours"] / c["times_ms"][name] if name in c["times_ms"] else 0 for c in cells
        ]
        axis.bar([x + (k - 2.5) * 0.14 for x in range(len(cells))], heights, width=0.14, label=name)
    labels = [f"{c['config']['case']}\n{c['config']['mode']}" for c in cells]
    axis.set_xticks(range(len(cells)), labels, fontsize=7, rotation=30)
    axis.set(ylabel="TFLOP/s on visible pairs")
    axis.legend(frameon=False, ncols=6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300.0, help="start no cell after this many")
    parser.add_argument("--note", action="append", default=[], help="a line to print above the summary")
    options = parser.parse_args(arguments)
    started, path, code = time.monotonic(), options.out / "results.jsonl", records.code_version()
    with records.ResultFile(path) as out:
        out.append(records.environment(**device_facts()))
        for cell in cells():
            left = options.seconds - (time.monotonic() - started)
            if left < 10:
                print(f"{cell.config['case']} {cell.config['mode']}: not started, {options.seconds:.0f} s are over")
                continue
            record = runner.run_cell(cell, out, runner.Limits(seconds=min(left, 90.0)), code, measurement)
            left = options.seconds - (time.monotonic() - started)
            if record["status"] != "ok" and left > 10:  # the experimental kernels may have taken the others with them
                cell = runner.Cell("gpu", {**cell.config, "cuda": False})
                record = runner.run_cell(cell, out, runner.Limits(seconds=min(left, 90.0)), code, measurement)
            print(f"{cell.config['case']} {cell.config['mode']}: {record['status']} {record.get('ms', '')}", flush=True)
    found = latest(list(records.read(path)))
    draw(found, options.out / "results.png")
    table = "\n".join([*options.note, "", summary(found)])
    (options.out / "summary.txt").write_text(table + "\n")
    print("\n" + table)


if __name__ == "__main__":
    main()
