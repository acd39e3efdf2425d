"""Suite `peers`: our call and each other implementation's on the same inputs, and whether their outputs are equal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efficient_attn.measuring import clock, records
from efficient_attn.measuring.calls import Call, binder

from .. import engines, peers
from . import Chart, Claim, Column, Options, Row, Suite, beside, grid

SHAPE = {"batch": 1, "heads": 4, "head_dim": 64}


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our time and the peer's in one alternation, both peaks of memory, and the difference of their outputs.

    `config`: peer, seqlen, mode ("fwd", "fwd_bwd"), dtype, batch, heads, head_dim, budget_s, threads. An absent peer
    raises `NotImplementedError` with the reason, which makes an "unsupported" row.
    """
    peer = peers.get(config["peer"])
    reason = peer.absent()
    if reason is None and config["mode"] == "fwd_bwd" and not peer.trains:
        reason = f"{peer.name} has no backward here"
    if reason is not None:
        raise NotImplementedError(reason)
    torch.manual_seed(config["seed"])
    shape = peers.Shape(
        config["seqlen"],
        batch=config["batch"],
        heads=config["heads"],
        head_dim=config["head_dim"],
        dtype=getattr(torch, config["dtype"]),
        device="cuda" if torch.cuda.is_available() else "cpu",
        training=config["mode"] == "fwd_bwd",
    )
    pair = peer.build(shape)
    bound = binder(config["mode"], pair.inputs)
    ours, theirs = bound(pair.ours), engines.Engine(peer.name, shape) if peer.apart else bound(pair.theirs)
    try:
        found = _compared(pair, ours, theirs, config["budget_s"])
    finally:
        engines.close([theirs])
    return {
        **found,
        "tolerance": pair.tolerance,
        "equal": None if pair.tolerance is None else found["difference"] <= pair.tolerance,
        "computes": peer.computes,
        "note": pair.note,
        "package": f"{peer.package} {records.version(peer.package)}",
    }


def _compared(pair: peers.Pair, ours: Call, theirs: Call, budget_s: float) -> dict[str, Any]:
    first_ms = clock.timed(theirs, 1).wall * 1e3
    ours()
    with torch.no_grad():
        out = theirs() if isinstance(theirs, engines.Engine) else pair.theirs(*pair.inputs)
        difference = _difference(pair.ours(*pair.inputs), out)
    peaks = {"peak_bytes": engines.peak_bytes(ours), "peer_peak_bytes": engines.peak_bytes(theirs)}
    times = clock.interleaved({"ours": ours, "peer": theirs}, budget_s)
    return {
        **beside(times, "ours", ("peer",)),
        "peer_spread": times["peer"]["spread"],
        "peer_first_ms": round(first_ms, 2),
        **peaks,
        "difference": difference,
    }


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float(f"{((theirs.double() - ours.double()).norm() / ours.double().norm()).item():.3g}")


def configs(options: Options) -> Iterable[dict[str, Any]]:
    lengths = options.seqlens or ((2048,) if options.quick else (1024, 4096))
    modes = tuple(mode for mode in options.modes or ("fwd", "fwd_bwd") if mode != "decode")
    found = (peers.get(name) for name in options.peers or peers.names())
    chosen = [peer for peer in found if options.peers or not (peer.compiles and options.quick)]
    present = tuple(peer.name for peer in chosen if peer.absent() is None)
    absent = tuple(peer.name for peer in chosen if peer.absent() is not None)
    common = {"dtype": options.dtypes, **SHAPE, **options.common()}
    for seqlen in lengths:
        for mode in modes:
            kept = tuple(name for name in present if mode == "fwd" or peers.get(name).trains)
            yield from grid(seqlen=seqlen, mode=mode, peer=kept, **common)
    yield from grid(seqlen=lengths[0], mode=modes[0], peer=absent, **common)  # one row each: the reason


def claims(rows: Sequence[Row]) -> list[Claim]:
    compared = [row for row in rows if row["equal"] is not None]
    differing = [row for row in compared if not row["equal"]]
    text = f"Outputs of ours and of the peer agree within its tolerance in {len(compared) - len(differing)} of "
    found = [Claim(f"{text}{len(compared)} comparisons.", tuple(row["id"] for row in compared))] if compared else []
    for row in sorted(rows, key=lambda row: -row["speedup_peer"])[:3]:
        text = f"{row['computes']} at N = {row['seqlen']}, {row['mode']}: {row['speedup_peer']:.2f}x the speed of "
        found.append(Claim(f"{text}{row['package']} ({row['peer']}).", (row["id"],)))
    for row in sorted(rows, key=lambda row: row["speedup_peer"])[:2]:
        if row["speedup_peer"] < 1:
            text = f"{row['peer']} is {1 / row['speedup_peer']:.2f}x faster than ours: {row['computes']}, "
            found.append(Claim(f"{text}N = {row['seqlen']}, {row['mode']}.", (row["id"],)))
    return found


SUITE = Suite(
    name="peers",
    about="Our call and another implementation's on the same inputs, with the same weights, in one alternation; "
    "difference is |theirs - ours| / |ours|, equal whether that is within the peer's tolerance.",
    configs=configs,
    run_cell=run_cell,
    key=(
        Column("peer", "peer", "text"),
        Column("N", "seqlen", "integer"),
        Column("mode", "mode", "text"),
    ),
    columns=(
        Column("computes", "computes", "text"),
        Column("ours ms", "ms", "ms"),
        Column("peer ms", "peer_ms", "ms"),
        Column("ours faster", "speedup_peer", "times"),
        Column("ours MiB", "peak_bytes", "mib"),
        Column("peer MiB", "peer_peak_bytes", "mib"),
        Column("difference", "difference", "error"),
        Column("equal", "equal"),
    ),
    series="peer",
    charts=(
        Chart("Our time and the peer's", "peer_ms", "ms", "the peer's ms", "our ms", split=("mode",),
              lines=False, references=(("peer_ms", "equal speed"),)),
    ),
    claims=claims,
)  # fmt: skip
