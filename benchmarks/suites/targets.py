"""Suite ``targets``: the CPU kernels against their peers and against the machine, one row of ``cases.TARGETS`` a
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
from efficient_attn.measuring.calls import sized

from .. import cases, peers
from . import Claim, Column, Options, Row, Suite
from .sparsity import random_blocks

Call = Callable[[], object]


@dataclass(frozen=True)
class Visible:
    """Which pairs a row computes, in our terms (``mask``, ``bias``) and in SDPA's (``theirs``)."""

    mask: BlockMask | None = None
    bias: Tensor | None = None
    is_causal: bool = False
    density: float = 1.0

    def theirs(self) -> Tensor | None:
        return self.bias if self.mask is None else self.mask.to_dense()


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our time, the peer's and the machine's ceiling in the same alternation, and the figure that the target is about.

    ``config``: the fields of ``cases.Target``, budget_s, patience_s, threads. What is done once (our mask, the peer's
    compilation) is timed apart: ``plan_ms``, ``peer_plan_ms``.
    """
    started = time.perf_counter()
    visible = _visible(config)
    plan_ms = _since(started) if visible.mask is not None else None
    if config["work"] == "module":
        calls = _module_calls(config)
    elif config["work"] == "linear_attention":
        calls = _linear_calls(config)
    elif config["work"] == "method":
        calls = _method_calls(config)
    else:
        calls = _attention_calls(config, visible)
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
        **_shares(config, visible, ceilings, times),
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
    config: Mapping[str, Any],
    visible: Visible,
    ceilings: Mapping[str, clock.Ceiling],
    times: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """GFLOP/s and GB/s reached, and their shares of the ceilings. Operations are those of the visible pairs: two
    products forward, five backward (scores again, and four gradients), whatever a kernel really does."""
    result: dict[str, Any] = {}
    batch, heads, q_len, kv_len, dim = (config[k] for k in ("batch", "heads", "q_len", "kv_len", "head_dim"))
    if "peak" in ceilings:
        products = {"fwd": 2, "bwd": 5, "fwd_bwd": 7}[config["mode"]]
        operations = products * 2 * batch * heads * q_len * kv_len * visible.density * dim
        result |= _share("peak", "gflops", operations, ceilings, times)
    if "bandwidth" in ceilings:
        read = 2 * batch * config["kv_heads"] * kv_len * dim * getattr(torch, config["dtype"]).itemsize
        result |= _share("bandwidth", "gbs", read, ceilings, times)
    return result


def _share(
    ceiling: str,
    unit: str,
    work: float,
    ceilings: Mapping[str, clock.Ceiling],
    times: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    reached, most = work / times["ours"]["ms"] / 1e6, ceilings[ceiling].giga_per_second(times[ceiling]["ms"])
    return {
        unit: round(reached, 2),
        f"{ceiling}_{unit}": most,
        f"{ceiling}_of": ceilings[ceiling].name,
        f"{ceiling}_spread": times[ceiling]["spread"],
        f"{ceiling}_share": round(reached / most, 4),
    }


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
        mask = SlidingWindow(left=128, right=128).block_mask(q_len, kv_len, num_heads=heads)
    elif kind == "bigbird":
        mask = BigBird().block_mask(q_len, kv_len, num_heads=heads)
    else:
        mask = random_blocks(q_len, kv_len, int(percent) / 100, generator)
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
    calls = {"ours": _bound(config["mode"], ours, tensors, visible.bias)}
    peer: Callable[..., Tensor] | None = None
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
        calls["peer"] = _bound(config["mode"], peer, tensors, visible.bias)
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

    return {name: _bound(config["mode"], call, qkv) for name, call in (("ours", ours), ("peer", formula))}


def _method_calls(config: Mapping[str, Any]) -> dict[str, Call]:
    """A method with its parameters, and exact attention or the paper's formula in plain PyTorch."""
    method: Any = sized(config["visible"], config["kv_len"])
    heads, head_dim = config["heads"], config["head_dim"]
    state: Any = method.build(heads * head_dim, heads, head_dim)
    qkv = inputs.photograph_qkv(config["kv_len"], heads=heads, head_dim=head_dim)
    parameters = () if state is None else tuple(state.parameters())

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = method.attend(q, k, v, state=state)[0]
        return out

    peer: Callable[..., Tensor] = attention
    if config["peer"] == "formula":
        match method.name:
            case "linformer":
                peer = partial(peers.linformer, E=state.key_projection, F=state.value())
            case "nystrom":
                peer = partial(peers.nystrom, landmarks=method.landmarks)
            case "performer":
                peer = partial(peers.performer, projection=state.projection)
        wanted = parameters
    else:
        wanted = ()
    return {
        "ours": _bound(config["mode"], ours, qkv, parameters=parameters),
        "peer": _bound(config["mode"], peer, qkv, parameters=wanted),
    }


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


def _bound(
    mode: str,
    operator: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    bias: Tensor | None = None,
    parameters: tuple[Tensor, ...] = (),
) -> Call:
    """A call of no arguments: forward, both directions, or the backward alone on a graph that is kept."""
    if mode == "fwd":
        return torch.no_grad()(lambda: operator(*tensors))
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    wanted = [*leaves, *parameters] if bias is None else [*leaves, bias]
    grad_out = tensors[0].roll(1, dims=2)
    if mode == "fwd_bwd":
        return lambda: torch.autograd.grad(operator(*leaves), wanted, grad_out)
    out = operator(*leaves)
    return lambda: torch.autograd.grad(out, wanted, grad_out, retain_graph=True)


def configs(options: Options) -> Iterable[dict[str, Any]]:
    """``patience_s``: how long a row may go on while the machine is noisy, or for three rounds of slow calls."""
    patience = {"patience_s": cases.TARGET_PATIENCE * options.budget_s}
    return [{**asdict(target), **options.common(), **patience} for target in cases.TARGETS]


def claims(rows: Sequence[Row]) -> list[Claim]:
    wanted = [row for row in rows if row["target"] is not None]
    met = [row for row in wanted if reached(row, row)]
    text = f"{len(met)} of {len(wanted)} targets of the CPU kernels that were measured are met."
    return [Claim(text, tuple(row["id"] for row in met))] if wanted else []


def reached(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> bool | None:
    """Whether a row met its target and its share of the machine's ceiling; None where the row has no target."""
    if config["target"] is None:
        return None
    met: bool = metrics["figure"] <= config["target"] if config["most"] else metrics["figure"] >= config["target"]
    return met and all(
        config[ceiling] is None or metrics[f"{ceiling}_share"] >= config[ceiling] for ceiling in ("peak", "bandwidth")
    )


SUITE = Suite(
    name="targets",
    about="The CPU kernels against their peers in one alternation. reached: the peer's time over ours; for "
    "sparse_efficiency our time over (density x our dense time), for overhead microseconds.",
    configs=configs,
    run_cell=run_cell,
    key=(
        Column("work", "work", "text"),
        Column("visible", "visible", "text"),
        Column("peer", "peer", "text"),
        Column("mode", "mode", "text"),
        Column("dtype", "dtype", "text"),
        Column("Nq", "q_len", "integer"),
        Column("Nk", "kv_len", "integer"),
        Column("D", "head_dim", "integer"),
    ),
    columns=(
        Column("ours ms", "ms", "ms"),
        Column("peer ms", "peer_ms", "ms"),
        Column("target", "target"),
        Column("reached", "figure"),
        Column("of peak", "peak_share", "percent"),
    ),
    claims=claims,
    default=False,
)
