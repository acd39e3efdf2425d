"""`recommend`: which attention to use at a size, for an error that one is ready to pay."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import methods
from ..errors import InputError, UnsupportedError
from ..measuring import records, runner
from ..measuring.calls import ERROR_ROWS
from ..measuring.clock import is_noisy
from ..measuring.options import MODES, check_choice, check_positive, check_shape
from . import activations as activation_sources
from .results import Candidate, Choice, Record
from .session import OPERATOR, Report, Session

CANDIDATES = (
    "dense",
    "sliding_window:left=64,right=64",
    "sliding_window:left=256,right=256",
    "longformer:window=256,global_tokens=16",
    "bigbird:block=64",
    "topk_blocks:block=64,fraction=0.1",
    "topk_blocks:block=64,fraction=0.25",
    "topk_blocks:block=64,fraction=0.5",
    "topp_blocks:block=64,mass=0.9",
    "sliding_window:left=128,right=128+centroid:block=64",
    "nystrom:landmarks=64",
    "linformer:rank=128",
    "performer:features=256",
    "linear",
)
BENCHMARKED = "ops"  # the suite of `efficient-attn bench` whose rows have times and errors too
SHAPE = ("batch", "heads", "kv_heads", "head_dim", "seqlen", "dtype", "mode", "causal")


class Recommendation(Choice):
    """What `recommend` returns; the fields are those of `Choice`."""

    def table(self) -> Any:
        """All candidates and the pick as a rich renderable; `str()` of a recommendation is the same as text."""
        from .tables import recommendation_table

        return recommendation_table(self)

    def __str__(self) -> str:
        from ..measuring.terminal import as_text

        return as_text(self.table())

    def plot(self, path: str | Path) -> Path:
        """Draw error against time into a PNG."""
        from .plots import recommendation_picture

        return recommendation_picture(self, Path(path))


def recommend(
    model: nn.Module | None = None,
    sample: Any = None,
    *,
    budget: float,
    length: int | None = None,
    batch: int = 1,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: str = "float32",
    causal: bool = False,
    mode: str = "fwd",
    candidates: Sequence[str | methods.Method] = CANDIDATES,
    activations: str = "random",
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    budget_s: float = 1.0,
    limits: runner.Limits | None = None,
    out: str | Path | None = None,
    report: Report | None = None,
) -> Recommendation:
    """Measure candidates against dense attention and pick the fastest one within an error budget.

    Times are taken beside dense attention, in alternation, and methods are compared by the ratio to it. Parameters that
    a method has (Linformer's projections, Performer's features) are as initialised: training may lower their error.

    Call it under `if __name__ == "__main__":` in a script, since every candidate is measured in a process of its own.

    Args:
        model, sample: measure on what the attention layers of this model attend to on this sample (at most four layers,
            spread evenly; shapes, causality and padding are theirs, and the largest error counts); else on a shape.
        budget: the error allowed, |out - dense| / |dense|.
        length, batch, heads, kv_heads, head_dim, dtype, causal: the shape, where there is no model.
        mode: "fwd" or "fwd_bwd", what is timed.
        candidates: specs; dense attention is always among them.
        activations: where there is no model: "random" (independent normal numbers, on which no method that selects or
            compresses does well), or "photographs" (patches of scikit-learn's photographs).
        seed: of activations.
        device: "cpu".
        threads: default PyTorch's.
        budget_s, limits: seconds of timing, and what one candidate may use.
        out: a folder for results.jsonl; what it holds of this very run already is not measured again.
        report: called with (name, done, total) before each candidate.

    Raises:
        InputError: arguments that do not belong together or are out of range. UnsupportedError: another device, or a
            model that adds a bias to its scores.
    """
    if device != "cpu":
        raise UnsupportedError(
            f"device {device!r}: candidates are measured on the CPU. For another device, recommend from rows that were "
            "measured there: from_rows(files, budget=...)"
        )
    _check_budget(budget)
    specs = _specs(candidates)
    threads = threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="efficient-attn-") as scratch:
        folder = Path(scratch if out is None else out)
        if model is None:
            config, on = _of_shape(length, batch, heads, kv_heads, head_dim, dtype, causal, mode, activations)
            on += f", seed {seed}"
        else:
            config, on = _of_model(model, sample, mode, folder)
        config |= {"seed": seed, "threads": threads, "budget_s": budget_s, "dense": True, "error": True}
        found: list[Record] = []
        with Session(folder / "results.jsonl", limits or runner.Limits(), report) as session:
            for done, spec in enumerate(specs):
                session.report(spec, done, len(specs))
                found.append(session.run(OPERATOR, {**config, "method": spec}))
            environment = session.environment
    return _decide(found, budget, on, environment)


def _of_shape(
    length: int | None,
    batch: int,
    heads: int,
    kv_heads: int | None,
    head_dim: int,
    dtype: str,
    causal: bool,
    mode: str,
    activations: str,
) -> tuple[dict[str, Any], str]:
    """The configuration of cells on a shape, and what they measure on."""
    if length is None:
        raise InputError("say what for: length=..., or a model and a sample")
    shape = check_shape(batch, heads, kv_heads, head_dim, dtype, mode)
    check_choice("activations", activations, activation_sources.KINDS)
    config = {**shape, "seqlen": check_positive("length", length), "causal": causal}
    return {**config, "mode": mode, "activations": activations}, f"{activations} activations"


def _of_model(model: nn.Module, sample: Any, mode: str, folder: Path) -> tuple[dict[str, Any], str]:
    """The configuration of cells on the activations of a model, which are written into the folder."""
    if sample is None:
        raise InputError("a model needs a sample to run on: a tensor, a tuple or a mapping of arguments")
    check_choice("mode", mode, MODES)
    layers = activation_sources.captured(model, sample)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "activations.pt"
    activation_sources.save(layers, path)
    query, key, _ = layers[0].qkv
    config: dict[str, Any] = dict(zip(("batch", "heads", "seqlen", "head_dim"), key.shape, strict=True))
    config |= {"heads": query.shape[1], "kv_heads": key.shape[1], "dtype": str(query.dtype).removeprefix("torch.")}
    config |= {"causal": layers[0].is_causal, "mode": mode, "activations": str(path)}
    return config, f"{len(layers)} layers of {type(model).__name__} on the sample"


def from_rows(files: Iterable[str | Path], *, budget: float, **shape: Any) -> Recommendation:
    """Recommend from rows that were measured before, by `recommend` or by the suite ops of `efficient-attn bench`.

    Args:
        files: runs, by their folders or results.jsonl.
        budget: the error allowed.
        shape: any of batch, heads, kv_heads, head_dim, seqlen, dtype, mode, causal, to choose rows by.

    Raises:
        InputError: no rows of that shape, or of several: the text lists them.
    """
    _check_budget(budget)
    wrong = [name for name in shape if name not in SHAPE]
    if wrong:
        raise InputError(f"rows are chosen by {', '.join(SHAPE)}; got {wrong[0]}")
    environment: Record = {}
    latest: dict[str, Record] = {}
    for file in files:
        try:
            for record in records.read(records.results_file(Path(file))):
                if record["type"] == "environment":
                    environment = record
                elif record.get("suite") in (OPERATOR, BENCHMARKED):
                    latest[f"{_shape(record)} {record['config']['method']}"] = record
        except (ValueError, OSError) as error:
            raise InputError(f"{file} cannot be read: {error}") from error
    usable = [r for r in latest.values() if r["status"] != "ok" or "error" in r]
    if not usable:
        raise InputError(
            "no rows with times and errors in these files; efficient-attn recommend --length N measures some"
        )
    given = {name: value for name, value in shape.items() if value is not None}
    chosen = [r for r in usable if all(r["config"].get(name, value) == value for name, value in given.items())]
    shapes = sorted({_shape(r) for r in (chosen or usable)})
    if not chosen or len(shapes) > 1:
        what = "rows of several shapes" if chosen else f"no rows for {given}"
        raise InputError(f"{what} in these files. There are: {'; '.join(shapes)}. Choose by {', '.join(SHAPE)}")
    on = f"rows measured before, {chosen[0]['config'].get('activations', 'photographs')} activations"
    return _decide(chosen, budget, on, environment)


def pareto(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that no other one beats: none is at least as good in time and error, and better in one. Fastest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.relative, c.error)):
        if not front or candidate.error < front[-1].error:
            front.append(candidate)
    return front


def _decide(found: Sequence[Record], budget: float, on: str, environment: Record) -> Recommendation:
    rows = [row for row in found if row["status"] == "ok"]
    failed = [(r["config"]["method"], r["status"], str(r.get("message", ""))) for r in found if r["status"] != "ok"]
    if not rows:
        raise InputError("no candidate could be measured: " + "; ".join(f"{m}: {why}" for m, _, why in failed))
    relative, how = _relative(rows)
    candidates = [
        Candidate(row["config"]["method"], row["ms"], part, row["error"], row.get("peak_bytes"), _is_noisy(row))
        for row, part in zip(rows, relative, strict=True)
    ]
    candidates.sort(key=lambda c: (c.relative, c.error))
    front = pareto(candidates)
    within = [c for c in front if c.error <= budget]
    pick = within[0] if within else None
    title = f"Attention at {_shape(rows[0])}"
    caption = (
        f"On {on}. error: |out - dense| / |dense| against float64, over {ERROR_ROWS} queries at "
        f"most. {how} *: no other is both faster and closer. Projections and random features are as initialised."
    )
    return Recommendation(
        pick, _reason(pick, front, budget), front, candidates, failed, budget, title, caption, environment
    )


def _relative(rows: Sequence[Record]) -> tuple[list[float], str]:
    """Each row's time relative to dense attention, from the same process where it has it, and what was done."""
    if all("dense_ms" in row or row["config"]["method"] == "dense" for row in rows):
        beside = [1.0 if row["config"]["method"] == "dense" else row["ms"] / row["dense_ms"] for row in rows]
        return beside, "vs dense: in alternation, in the same process."
    dense = [row["ms"] for row in rows if row["config"]["method"] == "dense"]
    unit = dense[0] if dense else max(row["ms"] for row in rows)
    how = "vs dense: from separate processes." if dense else "vs dense: dense could not run; relative to the slowest."
    return [row["ms"] / unit for row in rows], how


def _is_noisy(row: Record) -> bool:
    """Whether a row's time, or that of dense attention beside it, is too unsure for a statement."""
    return is_noisy(row) or is_noisy({"unsure": row.get("dense_unsure"), "spread": row.get("dense_spread", 0.0)})


def _reason(pick: Candidate | None, front: Sequence[Candidate], budget: float) -> str:
    if pick is None:
        closest = front[-1]
        return f"Nothing is within an error of {budget:g}: {closest.method}, the closest, has {closest.error:.1e}."
    if pick.method == "dense":
        faster = [c for c in front if c.relative < 1.0]
        why = (
            "nothing is faster"
            if not faster
            else f"all that is faster errs more: {faster[-1].method} by {faster[-1].error:.1e}"
        )
        return f"Use dense: within an error of {budget:g} {why}."
    better = [c for c in front if c.relative < pick.relative]
    beyond = f"; {better[-1].method} is faster, but errs by {better[-1].error:.1e}" if better else ""
    speed = 1 / pick.relative
    if pick.noisy:
        return (
            f"Use {pick.method}, whose error of {pick.error:.1e} is within {budget:g}: it seems {speed:.2f}x as fast "
            f"as dense, but that is too noisy to tell, for the machine is busy{beyond}."
        )
    return (
        f"Use {pick.method}: the fastest within an error of {budget:g}, {speed:.2f}x as fast as dense with an error of "
        f"{pick.error:.1e}{beyond}."
    )


def _shape(record: Mapping[str, Any]) -> str:
    config = record["config"]
    batch, heads, length, head_dim = (config[name] for name in ("batch", "heads", "seqlen", "head_dim"))
    grouped = "" if config.get("kv_heads") in (None, heads) else f"/{config['kv_heads']}"
    causal = " causal" if config.get("causal") else ""
    return f"B{batch} H{heads}{grouped} N{length} D{head_dim} {config['dtype']} {config['mode']}{causal}"


def _specs(candidates: Sequence[str | methods.Method]) -> list[str]:
    if isinstance(candidates, str) or not candidates:
        raise InputError(f"candidates is a list of specs, got {candidates!r}")
    found = [str(methods.parse(candidate)) for candidate in candidates]
    return list(dict.fromkeys(["dense", *found]))


def _check_budget(budget: float) -> None:
    if not math.isfinite(budget) or budget < 0:
        raise InputError(f"budget is an error of at least 0, such as 0.1; got {budget}")
