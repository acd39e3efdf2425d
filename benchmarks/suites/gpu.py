"""Suite `gpu`: the GPU kernels against PyTorch's and FlexAttention's in one alternation, timed with CUDA events.

In a record "ours" are the Triton kernels; the CUDA kernels, where they are built, are in the same alternation as
"cuda". It needs PyTorch and Triton, nothing else: `make gpu-check` runs `python -m efficient_attn.benchmarks gpu`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efficient_attn import BlockMask, SlidingWindow, attention, linear_attention
from efficient_attn.measuring.calls import Call, Operator, binder
from efficient_attn.measuring.inputs import random_blocks

from .. import machine
from . import Chart, Claim, Column, Config, Options, Row, Suite

DEFAULTS: Mapping[str, Any] = {
    "batch": 1, "heads": 16, "kv_heads": None, "q_len": None, "kv_len": 16384, "head_dim": 128, "dtype": "bfloat16",
    "cuda": True,
}  # fmt: skip
BOTH, FORWARD = ("fwd", "bwd"), ("fwd",)
DECODE = {"batch": 16, "heads": 32, "kv_heads": 8, "q_len": 1}
# name: what is visible, modes, and what differs from DEFAULTS; the most important first, for time may run out
CASES: Mapping[str, tuple[str, tuple[str, ...], Mapping[str, Any]]] = {
    "dense 16k D128": ("full", BOTH, {}),
    "causal 16k D128": ("causal", BOTH, {}),
    "dense 16k D64": ("full", BOTH, {"head_dim": 64}),
    "blocks 10% 16k D128": ("blocks:10", BOTH, {}),
    "blocks 25% 16k D128": ("blocks:25", BOTH, {}),
    "window 1024 16k D128": ("window", BOTH, {}),
    "dense 1k D128 B8": ("full", FORWARD, {"batch": 8, "kv_len": 1024}),
    "dense 16k D256": ("full", BOTH, {"head_dim": 256, "heads": 8}),
    "decode 16k GQA 32/8": ("full", FORWARD, DECODE),
    "linear 64k D64": ("linear", FORWARD, {"kv_len": 65536, "head_dim": 64}),
    "linear causal 64k D64": ("linear_causal", FORWARD, {"kv_len": 65536, "head_dim": 64}),
    "decode 8k GQA 32/8": ("full", FORWARD, {**DECODE, "kv_len": 8192}),
    "blocks 50% 16k D128": ("blocks:50", BOTH, {}),
    "blocks 5% 16k D128": ("blocks:5", BOTH, {}),
}
# What an H200 should reach: case, mode, kernels, figure, least value.
TARGETS: Sequence[tuple[str, str, str, str, float]] = (
    ("dense 16k D128", "fwd", "Triton", "tflops", 480.0),
    ("dense 16k D128", "bwd", "Triton", "tflops", 350.0),
    ("dense 16k D128", "fwd", "Triton", "vs flex", 1.3),
    ("dense 16k D128", "bwd", "Triton", "vs flex", 1.3),
    ("blocks 10% 16k D128", "fwd", "Triton", "density efficiency", 1 / 1.15),
    ("blocks 10% 16k D128", "bwd", "Triton", "density efficiency", 1 / 1.15),
    ("linear 64k D64", "fwd", "Triton", "share of copy", 1 / 1.5),
    ("linear causal 64k D64", "fwd", "Triton", "share of copy", 1 / 1.5),
    ("dense 16k D128", "fwd", "CUDA", "vs cudnn", 1.0),
    ("causal 16k D128", "fwd", "CUDA", "vs cudnn", 1.0),
    ("dense 16k D128", "bwd", "CUDA", "vs cudnn", 0.95),
    ("dense 16k D128", "bwd", "CUDA, any order", "vs cudnn", 0.95),
    *((*call, "tflops", float(least)) for call, least in machine.TARGETS.items()),
    *((f"blocks {d}% 16k D128", "fwd", "CUDA", "density efficiency", 1 / 1.10) for d in (50, 25, 10, 5)),
    *((f"blocks {d}% 16k D128", "bwd", "CUDA", "density efficiency", 1 / 1.15) for d in (50, 25, 10, 5)),
    ("decode 8k GQA 32/8", "fwd", "CUDA", "share of copy", 0.8),
)
# What is measured, in records -> its name in tables, and its dense call in records.
KERNELS = {
    "ours": ("Triton", "dense"),
    "cuda": ("CUDA", "cuda dense"),
    "cuda any order": ("CUDA, any order", "cuda dense"),
}
PEERS = ("flash", "cudnn", "efficient", "flex", "tma", "ours")


def configs(options: Options) -> Iterable[dict[str, Any]]:
    """One cell for each case and mode."""
    for name, (visible, modes, changes) in CASES.items():
        for mode in modes:
            yield {**DEFAULTS, **changes, "visible": visible, "case": name, "mode": mode, **options.common()}


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds of ours and of each peer that serves, why others do not, and the figures that follow.

    `config`: the keys of `DEFAULTS`, visible, case, mode ("fwd", "bwd"), budget_s, threads, seed; `only`: the names of
    what is timed, where it is not everything.
    """
    if not torch.cuda.is_available():
        raise NotImplementedError("needs an NVIDIA GPU, and PyTorch sees none")
    torch.manual_seed(config.get("seed", 0))
    tensors = _inputs(config)
    if config["visible"].startswith("linear"):
        density, operators = 1.0, _linear(config)
    else:
        density, operators = _attention(config, *tensors[:2])
    calls, absent = _calls(config, operators, tensors)
    times = interleaved(calls, config["budget_s"])
    first = times.get("ours", next(iter(times.values())))
    result: dict[str, Any] = {"ms": first, "times_ms": times, "absent": absent, "density": round(density, 6)}
    return result | figures(config, times, density, tensors)


def _inputs(config: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, Hq, Nq, D), key and value (B, Hkv, Nk, D)."""
    options: dict[str, Any] = {"device": "cuda", "dtype": getattr(torch, config["dtype"])}
    batch, heads, kv_len, dim = (config[key] for key in ("batch", "heads", "kv_len", "head_dim"))
    query = torch.randn(batch, heads, config["q_len"] or kv_len, dim, **options)
    key, value = (torch.randn(batch, config["kv_heads"] or heads, kv_len, dim, **options) for _ in range(2))
    return (query.abs(), key.abs(), value) if config["visible"].startswith("linear") else (query, key, value)


def _linear(config: Mapping[str, Any]) -> dict[str, Operator]:
    causal = config["visible"] == "linear_causal"
    return {
        "ours": lambda q, k, v: linear_attention(q, k, v, is_causal=causal),
        "cuda": lambda q, k, v: linear_attention(q, k, v, is_causal=causal, backend="cuda"),
    }


def _attention(config: Mapping[str, Any], query: Tensor, key: Tensor) -> tuple[float, dict[str, Operator]]:
    """The density of what is visible; ours and the peers that take the same mask."""
    kind, _, percent = config["visible"].partition(":")
    q_len, kv_len = query.shape[2], key.shape[2]
    mask, causal = None, kind == "causal"
    if kind == "blocks":
        mask = random_blocks(q_len, kv_len, int(percent) / 100, block=128)
    elif kind == "window":
        mask = SlidingWindow(left=1023, right=0, alignment="bottom_right").block_mask(q_len, kv_len)
    density = mask.density if mask is not None else 0.5 + 0.5 / q_len if causal else 1.0
    mask = None if mask is None else mask.to("cuda")
    found: dict[str, Operator] = {
        "ours": lambda q, k, v: attention(q, k, v, mask=mask, is_causal=causal, backend="triton"),
        "cuda": lambda q, k, v: attention(q, k, v, mask=mask, is_causal=causal, backend="cuda"),
    }
    if mask is None:
        found |= _sdpa(causal, grouped=query.shape[1] != key.shape[1])
    if q_len > 1:
        found["flex"] = _flex(mask, causal, q_len, kv_len)
    if kind in ("full", "blocks") and config["mode"] == "fwd" and q_len > 1:
        found["tma"] = by_tma(found["ours"])
    if kind == "blocks":
        found["dense"] = lambda q, k, v: attention(q, k, v, backend="triton")
        found["cuda dense"] = lambda q, k, v: attention(q, k, v, backend="cuda")
    return density, found


def _sdpa(causal: bool, grouped: bool) -> dict[str, Operator]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def by(backend: Any) -> Operator:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

        return call

    return {
        "flash": by(SDPBackend.FLASH_ATTENTION),
        "cudnn": by(SDPBackend.CUDNN_ATTENTION),
        "efficient": by(SDPBackend.EFFICIENT_ATTENTION),
    }


def _flex(mask: BlockMask | None, causal: bool, q_len: int, kv_len: int) -> Operator:
    """Compiled FlexAttention. Its mask is made by the first call, whose errors are those of this peer alone."""
    made: list[Any] = []

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not made:
            theirs: Any = None
            if mask is not None:
                theirs = mask.to_flex()
            elif causal:
                theirs = create_block_mask(lambda b, h, i, j: i >= j, None, None, q_len, kv_len, device="cuda")
            made.extend((torch.compile(flex_attention, dynamic=False), theirs))
        out: Tensor = made[0](q, k, v, block_mask=made[1])
        return out

    return call


def _calls(
    config: Mapping[str, Any], operators: Mapping[str, Operator], tensors: Sequence[Tensor]
) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that work, and why the others do not; without the first there is no cell."""
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    bound = binder(config["mode"], tensors)
    only = config.get("only") or [*operators, "cuda any order"]
    operators = {name: operator for name, operator in operators.items() if name in only}
    for name, operator in operators.items():
        if name.startswith("cuda") and not config["cuda"]:
            absent[name] = "left out: the cell did not end well with it"
            continue
        try:
            call = bound(operator)
            call()
            torch.cuda.synchronize()
        except Exception as error:
            if name == "ours" or len(operators) == 1:
                raise
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
        else:
            calls[name] = call
    if config["mode"] == "bwd" and "cuda" in calls and "cuda any order" in only:
        call = in_any_order(calls["cuda"])
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:
            absent["cuda any order"] = f"{type(error).__name__}: {str(error)[:160]}"
        else:
            calls["cuda any order"] = call
    if not calls:
        raise RuntimeError(f"nothing could be timed: {absent}")
    return calls, absent


def by_tma(ours: Operator) -> Operator:
    """Our forward with the option that is off by default; see kernels/configs.py."""
    from efficient_attn.kernels import configs

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        configs.DESCRIPTORS = True
        try:
            return ours(q, k, v)
        finally:
            configs.DESCRIPTORS = False

    return call


def in_any_order(backward: Call) -> Call:
    """The call with the option of the CUDA kernels that gives up repeatable bits; see backends/cuda."""

    def call() -> object:
        os.environ["EFFICIENT_ATTN_CUDA_ANY_ORDER"] = "1"
        try:
            return backward()
        finally:
            del os.environ["EFFICIENT_ATTN_CUDA_ANY_ORDER"]

    return call


def interleaved(calls: Mapping[str, Call], budget_s: float) -> dict[str, float]:
    """Median milliseconds of each call by CUDA events, in alternation, after three unmeasured runs of each."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    started, first = time.perf_counter(), next(iter(samples.values()))
    while len(first) < 100 and (time.perf_counter() - started < budget_s or len(first) < 5):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end))
    return {name: round(statistics.median(values), 5) for name, values in samples.items()}


def figures(
    config: Mapping[str, Any], times: Mapping[str, float], density: float, tensors: tuple[Tensor, ...]
) -> dict[str, Any]:
    """TFLOP/s (4 B Hq Nq Nk D forward, 2.5 times that backward, on visible pairs), or the share of the copy bound.

    Those of the CUDA kernels begin with "cuda".
    """
    query, key, value = tensors
    found: dict[str, Any] = {}
    bound_by_memory = config["visible"].startswith("linear") or query.shape[2] == 1
    if bound_by_memory:
        written = query.numel() // query.shape[3] * value.shape[3] * value.element_size()
        moved = sum(t.numel() * t.element_size() for t in tensors) + written
        found["copy_gbs"] = copy_gbs = round(measured_copy(), 1)
    for ours, (_, dense) in KERNELS.items():
        if ours not in times:
            continue
        prefix = _prefix(ours)
        found |= {f"{prefix}vs {name}": round(ms / times[ours], 4) for name, ms in times.items() if name != ours}
        if bound_by_memory:
            found[f"{prefix}gbs"] = round(moved / times[ours] / 1e6, 1)
            found[f"{prefix}share of copy"] = round(found[f"{prefix}gbs"] / copy_gbs, 4)
        else:
            flops = 4 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * query.shape[3] * density
            flops *= 2.5 if config["mode"] == "bwd" else 1.0
            found[f"{prefix}tflops"] = round(flops / times[ours] / 1e9, 1)
        if dense in times:
            found[f"{prefix}density efficiency"] = round(density * times[dense] / times[ours], 4)
    return found


def _prefix(ours: str) -> str:
    return "" if ours == "ours" else f"{ours} "


def measured_copy() -> float:
    """GB/s of a copy of 1 GiB, read and written."""
    block = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(block)
    return 2 * block.numel() * 2 / interleaved({"ours": lambda: target.copy_(block)}, 0.3)["ours"] / 1e6


def expand(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for the Triton kernels and one for the CUDA kernels, each with the figures of its own."""
    if row["status"] != "ok":
        return [row]
    times = {**({} if row.get("only") else {"ours": row["ms"]}), **row.get("times_ms", {})}
    peers = {f"{name}_ms": times.get(name) for name in PEERS}
    found = []
    for ours, (name, _) in KERNELS.items():
        expected = machine.prediction(row, name)
        named = {
            **row,
            "predicted": expected,
            "id": row["id"] + (f"-{ours}" if ours != "ours" else "").replace(" ", "-"),
            "kernels": name,
        }
        if ours in times:
            labels = ("tflops", "gbs", "share of copy", "density efficiency", *(f"vs {peer}" for peer in PEERS))
            found.append({**named, **peers, "ms": times[ours], **{k: row.get(_prefix(ours) + k) for k in labels}})
        elif ours in row.get("absent", {}):
            found.append({**named, "status": "unsupported", "message": row["absent"][ours]})
    return found


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Each target that was measured, and how many are reached."""
    by_name = {(row["case"], row["mode"], row["kernels"]): row for row in rows}
    found, met = [], 0
    for *name, figure, least in TARGETS:
        row = by_name.get(tuple(name), {})
        if row.get(figure) is not None:
            met += row[figure] >= least
            verdict = "reached" if row[figure] >= least else "MISSED"
            visible, _, changes = CASES[name[0]]
            width = {**DEFAULTS, **changes}["head_dim"]
            beside = machine.remark(*name[1:], width, visible) if figure == "tflops" else ""
            text = (
                f"{' '.join(name[:2])}, {name[2]}: {figure} {row[figure]:g}, at least {least:.3g}{beside}: {verdict}."
            )
            found.append(Claim(text, (row["id"],)))
    text = f"{met} of the {len(found)} targets for an H200 that were measured are reached, {len(TARGETS) - len(found)} "
    ids = tuple(row_id for claim in found for row_id in claim.rows)
    return [Claim(f"{text}were not measured.", ids), *found] if found else []


def retry(config: Config) -> Config | None:
    """Without the CUDA kernels, which are experimental: a fault of theirs takes the whole process with it."""
    return {**config, "cuda": False} if config["cuda"] else None


def _against(name: str, key: str) -> Chart:
    return Chart(f"Our time and {name}'s", key, "ms", f"{name}'s ms", "our ms", split=("mode",), lines=False,
                 references=((key, "equal speed"),))  # fmt: skip


SUITE = Suite(
    name="gpu",
    about="The Triton and the CUDA kernels beside PyTorch's backends and compiled FlexAttention in one alternation, by "
    "CUDA events; vs: their time over ours. TFLOP/s count visible pairs, 4 B Hq Nq Nk D forward and 2.5 times that "
    "backward; predicted: the same by docs/gpu.md; of copy: bytes that must move over what a copy moves; of dense: "
    "density x our dense time over ours.",
    configs=configs,
    run_cell=run_cell,
    key=(Column("case", "case", "text"), Column("mode", "mode", "text"), Column("kernels", "kernels", "text")),
    columns=(
        Column("ms", "ms", "ms"),
        Column("TFLOP/s", "tflops"),
        Column("predicted", "predicted"),
        Column("vs flash", "vs flash", "times"),
        Column("vs cuDNN", "vs cudnn", "times"),
        Column("vs efficient", "vs efficient", "times"),
        Column("vs Flex", "vs flex", "times"),
        Column("vs TMA", "vs tma", "times"),
        Column("vs Triton", "vs ours", "times"),
        Column("of dense", "density efficiency", "percent"),
        Column("of copy", "share of copy", "percent"),
    ),
    series="kernels",
    charts=(_against("cuDNN", "cudnn_ms"), _against("FlexAttention", "flex_ms")),
    expand=expand,
    claims=claims,
    retry=retry,
    default=False,
)
