"""Suite `targets`: the CPU kernels against their peers and against the machine, one row of `cases.TARGETS` a
cell."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from efficient_attn import BigBird, BlockMask, MultiheadAttention, SlidingWindow, attention, linear_attention
from efficient_attn.measuring import clock, inputs
from efficient_attn.measuring.calls import Call, Operator, binder, sized

from .. import cases, peers
from . import Claim, Column, Options, Row, Suite


@dataclass(frozen=True)
class Visible:
    """Which pairs a row computes, in our terms (`mask`, `bias`) and in SDPA's (`theirs`)."""

    mask: BlockMask | None = None
    bias: Tensor | None = None
    is_causal: bool = False
    density: float = 1.0

    def theirs(self) -> Tensor | None:
        return self.bias if self.mask is None else self.mask.to_dense()


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our time, the peer's and the machine's ceiling in the same alternation, and the figure that the target is about.

    `config`: the fields of `cases.Target`, budget_s, patience_s, threads. What is done once (our mask, the peer's
    compilation) is timed apart: `plan_ms`, `peer_plan_ms`.
    """
    started = time.perf_counter()
    visible = _visible(config)
    plan_ms = _since(started) if visible.mask is not None else None
    special = {"module": _module_calls, "linear_attention": _linear_calls, "method": _method_calls}
    calls = special[config["work"]](config) if config["work"] in special else _attention_calls(config, visible)
    with clock.PeakMemory() as peak:
        calls["ours"]()
    peer_plan_ms = peer_bytes = None
    if config["peer"] == "formula":
        with clock.PeakMemory() as theirs:
            calls["peer"]()
        peer_bytes = theirs.bytes
    if config["peer"] == "flex":  # compiles at its first call
        started = time.perf_counter()
        calls["peer"]()
        peer_plan_ms = _since(started)
    ceilings = _ceilings(config)
    timed = calls | {name: ceiling.call for name, ceiling in ceilings.items()}
    times = clock.interleaved(timed, config["budget_s"], patience_s=config["patience_s"])
    ours, peer = times["ours"], times.get("peer")
    if peer is None:  # a row about our call alone: its overhead in microseconds
        figure = ours["ms"] * 1e3
    elif config["work"] == "sparse_efficiency":
        figure = ours["ms"] / (visible.density * peer["ms"])
    else:
        figure = peer["ms"] / ours["ms"]
    return {
        **ours,
        "peer_ms": None if peer is None else peer["ms"],
        "peer_spread": None if peer is None else peer["spread"],
        "figure": round(figure, 4),
        "plan_ms": plan_ms,
        "peer_plan_ms": peer_plan_ms,
        "density": round(visible.density, 6),
        "peak_bytes": peak.bytes,
        "peer_peak_bytes": peer_bytes,
        **_shares(config, visible.density, ceilings, times),
    }


def _since(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 3)


def _ceilings(config: Mapping[str, Any]) -> dict[str, clock.Ceiling]:
    """What bounds a row: arithmetic, and memory where a row has a target for it. A copy also empties the caches, so no
    other row runs beside one."""
    ceilings = {}
    if config["work"] in ("attention", "sparse_efficiency"):
        ceilings["peak"] = clock.fma_ceiling()
    if config["bandwidth"] is not None:
        ceilings["bandwidth"] = clock.copy_ceiling()
    return ceilings


def _shares(
    config: Mapping[str, Any], density: float, ceilings: Mapping[str, clock.Ceiling], times: Mapping[str, Any]
) -> dict[str, Any]:
    """GFLOP/s and GB/s reached, and their shares of the ceilings. Operations are those of the visible pairs: two
    products forward, five backward (scores again, and four gradients), whatever a kernel really does."""
    batch, heads, q_len, kv_len, dim = (config[k] for k in ("batch", "heads", "q_len", "kv_len", "head_dim"))
    products = {"fwd": 2, "bwd": 5, "fwd_bwd": 7}[config["mode"]]
    work = {
        "peak": ("gflops", products * 2 * batch * heads * q_len * kv_len * density * dim),
        "bandwidth": ("gbs", 2 * batch * config["kv_heads"] * kv_len * dim * getattr(torch, config["dtype"]).itemsize),
    }
    result: dict[str, Any] = {}
    for name, ceiling in ceilings.items():
        unit, amount = work[name]
        reached, most = amount / times["ours"]["ms"] / 1e6, ceiling.giga_per_second(times[name]["ms"])
        result |= {
            unit: round(reached, 2),
            f"{name}_{unit}": most,
            f"{name}_of": ceiling.name,
            f"{name}_spread": times[name]["spread"],
            f"{name}_share": round(reached / most, 4),
        }
    return result


def _visible(config: Mapping[str, Any]) -> Visible:
    kind, _, percent = config["visible"].partition(":")
    q_len, kv_len, heads = config["q_len"], config["kv_len"], config["heads"]
    generator = torch.Generator().manual_seed(0)
    if kind == "full" or config["work"] == "method":
        return Visible()
    if kind == "causal":
        return Visible(is_causal=True, density=(kv_len + 1) / (2 * kv_len))
    if kind == "bias":
        bias = torch.randn(1, heads, q_len, kv_len, generator=generator)
        return Visible(bias=bias.requires_grad_(config["mode"] != "fwd"))
    if kind == "bool":
        mask = BlockMask.from_dense(torch.rand(q_len, kv_len, generator=generator) < 0.7)
    elif kind == "window":
        window = SlidingWindow(left=128, right=128, alignment="bottom_right")
        mask = window.block_mask(q_len, kv_len, num_heads=heads)
    elif kind == "bigbird":
        mask = BigBird().block_mask(q_len, kv_len, num_heads=heads)
    else:
        mask = inputs.random_blocks(q_len, kv_len, int(percent) / 100)
    return Visible(mask=mask, density=mask.density)


def _attention_calls(config: Mapping[str, Any], visible: Visible) -> dict[str, Call]:
    qkv = inputs.photograph_qkv(
        max(config["q_len"], config["kv_len"]),
        batch=config["batch"],
        heads=config["heads"],
        kv_heads=config["kv_heads"],
        head_dim=config["head_dim"],
        dtype=getattr(torch, config["dtype"]),
    )
    query = qkv[0][:, :, -config["q_len"] :].contiguous()
    tensors = (query, qkv[1], qkv[2])

    ours = partial(attention, mask=visible.mask, bias=visible.bias, is_causal=visible.is_causal)
    bound = binder(config["mode"], tensors, more=() if visible.bias is None else (visible.bias,))
    calls = {"ours": bound(ours)}
    peer: Operator | None = None
    match config["peer"]:
        case "sdpa":
            peer = partial(peers.sdpa, is_causal=visible.is_causal)
        case "sdpa_mask":
            peer = partial(peers.sdpa, mask=visible.theirs())
        case "flex":
            assert visible.mask is not None, "rows against FlexAttention are masked"
            peer = peers.flex(visible.mask)
        case "dense":
            peer = attention
    if peer is not None:
        calls["peer"] = bound(peer)
    return calls


def _linear_calls(config: Mapping[str, Any]) -> dict[str, Call]:
    causal = config["visible"] == "causal"
    qkv = inputs.photograph_qkv(config["kv_len"], heads=config["heads"], head_dim=config["head_dim"])

    ours = partial(linear_attention, is_causal=causal, feature_map="elu")

    def features(x: Tensor) -> Tensor:
        return torch.nn.functional.elu(x) + 1

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = features(q), features(k)
        if causal:  # the running sums of k v^T and of k, one state a position
            states = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(dim=2)
            return torch.einsum("bhnf,bhnfd->bhnd", q, states) / (q * k.cumsum(dim=2)).sum(dim=-1, keepdim=True)
        return (q @ (k.transpose(-1, -2) @ v)) / (q * k.sum(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)

    bound = binder(config["mode"], qkv)
    return {"ours": bound(ours), "peer": bound(formula)}


def _method_calls(config: Mapping[str, Any]) -> dict[str, Call]:
    """A method with its parameters, and exact attention or the paper's formula in plain PyTorch."""
    method: Any = sized(config["visible"], config["kv_len"])
    heads, head_dim = config["heads"], config["head_dim"]
    state: Any = method.build(heads * head_dim, heads, head_dim)
    qkv = inputs.photograph_qkv(config["kv_len"], heads=heads, head_dim=head_dim)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = method.attend(q, k, v, state=state)[0]
        return out

    bound = binder(config["mode"], qkv, state)
    if config["peer"] != "formula":
        return {"ours": bound(ours), "peer": binder(config["mode"], qkv)(attention)}
    formula: Mapping[str, Callable[[], Operator]] = {
        "linformer": lambda: partial(peers.linformer, E=state.key_projection, F=state.value()),
        "nystrom": lambda: partial(peers.nystrom, landmarks=method.landmarks),
        "performer": lambda: partial(peers.performer, projection=state.projection),
    }
    return {"ours": bound(ours), "peer": bound(formula[method.name]())}


def _module_calls(config: Mapping[str, Any]) -> dict[str, Call]:
    """One forward, or one training step without the optimizer, of the whole module."""
    dim, heads, dtype = config["heads"] * config["head_dim"], config["heads"], getattr(torch, config["dtype"])
    q, _, _ = inputs.photograph_qkv(config["q_len"], batch=config["batch"], heads=heads, head_dim=config["head_dim"])
    x = q.transpose(1, 2).flatten(2).to(dtype)  # [B, N, heads * head_dim]
    modules = {
        "ours": MultiheadAttention(dim, heads, batch_first=True, dtype=dtype),
        "peer": peers.torch_module(dim, heads, dtype=dtype),
    }

    def call(module: torch.nn.MultiheadAttention) -> Call:
        if config["mode"] == "fwd":
            return torch.no_grad()(lambda: module.eval()(x, x, x, need_weights=False)[0])
        parameters = list(module.parameters())
        return lambda: torch.autograd.grad(module(x, x, x, need_weights=False)[0].sum(), parameters)

    return {name: call(module) for name, module in modules.items()}


def configs(options: Options) -> Iterable[dict[str, Any]]:
    """`patience_s`: how long a row may go on while the machine is noisy, or for three rounds of slow calls."""
    patience = {"patience_s": cases.TARGET_PATIENCE * options.budget_s}
    return [{**asdict(target), **options.common(), **patience} for target in cases.TARGETS]


def expand(row: dict[str, Any]) -> list[dict[str, Any]]:
    """With the target and the share of a ceiling in words, and whether both are met."""
    if row["status"] != "ok":
        return [row]
    wanted = "" if row["target"] is None else f"{'<=' if row['most'] else '>='} {row['target']:g}"
    share = "" if row.get("peak_share") is None else f"{row['peak_share']:.0%}"
    for ceiling in ("peak", "bandwidth"):
        if row[ceiling] is not None:
            share = f"{row[f'{ceiling}_share']:.0%} (>= {row[ceiling]:.0%})"
    result = {None: "", True: "pass", False: "miss"}[reached(row)]
    return [{**row, "wanted": wanted, "ceiling_share": share, "result": result}]


def reached(row: Row) -> bool | None:
    """Whether a row met its target and its share of the machine's ceiling; None where the row has no target."""
    if row["target"] is None:
        return None
    met: bool = row["figure"] <= row["target"] if row["most"] else row["figure"] >= row["target"]
    return met and all(
        row[ceiling] is None or row[f"{ceiling}_share"] >= row[ceiling] for ceiling in ("peak", "bandwidth")
    )


def claims(rows: Sequence[Row]) -> list[Claim]:
    """How many targets are met and which are not, the ceilings that were measured, and what rows leave to say."""
    wanted = [row for row in rows if row["target"] is not None]
    met = tuple(row["id"] for row in wanted if reached(row))
    found = [Claim(f"{len(met)} of {len(wanted)} targets that were measured are met.", met)] if wanted else []
    for row in wanted:
        if row["id"] not in met:
            figures = f"{row['figure']:.2f} ({row['wanted']}) {row['ceiling_share']}".rstrip()
            found.append(Claim(f"Missed: {_name(row)} against {row['peer']}: {figures}.", (row["id"],)))
    for ceiling, key, unit in (("peak", "peak_gflops", "GFLOP/s"), ("bandwidth", "bandwidth_gbs", "GB/s")):
        having = [row for row in rows if key in row]
        if having:
            values = sorted(row[key] for row in having)
            middle = f"{values[len(values) // 2]:.4g} {unit}, {values[0]:.4g} to {values[-1]:.4g} over the rows."
            found.append(
                Claim(f"{ceiling} ({having[0][f'{ceiling}_of']}): {middle}", tuple(row["id"] for row in having))
            )
    for row in rows:
        if row["peer_plan_ms"] is not None:
            found.append(Claim(f"{_name(row)}: {row['peer']} compiled in {row['peer_plan_ms']:.0f} ms.", (row["id"],)))
        if row["note"]:
            found.append(Claim(f"{_name(row)}: {row['note']}.", (row["id"],)))
    return found


def _name(row: Row) -> str:
    return " ".join(str(row[column.key]) for column in KEY[:-1])


KEY = (
    Column("work", "work", "text"),
    Column("dtype", "dtype", "text"),
    Column("mode", "mode", "text"),
    Column("visible", "visible", "text"),
    Column("shape", "shape", "text"),
    Column("peer", "peer", "text"),
)
SUITE = Suite(
    name="targets",
    about="The CPU kernels against their peers in one alternation. reached: the peer's time over ours; for "
    "sparse_efficiency our time over (density x our dense time), for overhead microseconds. ±: interquartile "
    "range over median. MiB: peak memory of our first call. of peak: operations of the visible pairs (two products "
    "forward, five backward) as a share of the FMA peak, or bytes of keys and values as a share of a copy, in the same "
    "alternation.",
    configs=configs,
    run_cell=run_cell,
    key=KEY,
    columns=(
        Column("ours ms", "ms", "ms"),
        Column("±", "spread", "percent"),
        Column("peer ms", "peer_ms", "ms"),
        Column("±", "peer_spread", "percent"),
        Column("MiB", "peak_bytes", "mib"),
        Column("target", "wanted"),
        Column("reached", "figure"),
        Column("of peak", "ceiling_share"),
        Column("result", "result"),
    ),
    expand=expand,
    claims=claims,
    default=False,
)
