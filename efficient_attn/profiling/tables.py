"""Profiles and recommendations as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from ..measuring.clock import UNSURE, is_noisy
from ..measuring.terminal import MIB, make_table
from .phases import PHASES
from .results import Choice, Growth, Measurements

TOO_NOISY = "too noisy to tell"
FAR = 1024  # how many times the longest measured length a prediction is printed


def profile_table(profile: Measurements) -> Any:
    """The measurements of a profile, its growth, attention modules, and the rows without figures."""
    parts: list[Any] = [_measurements(profile), _growth(profile)]
    if profile.kind == "model":
        parts.append(_modules(profile))
    for row in profile.rows:
        if row["status"] != "ok":
            message = str(row.get("message", ""))[:300]
            parts.append(f"{row['status']}: {row['label']}, N = {size(row['seqlen'])}, {row['mode']}: {message}")
    return Group(*parts)


def _measurements(profile: Measurements) -> Any:
    model = profile.kind == "model"
    done = [row for rows in profile.series().values() for row in rows]
    shown = [name for name in (PHASES if model else PHASES[:-1]) if any(row["phases"][name] >= 0.005 for row in done)]
    columns = ["N", "ms", "slope", "MiB", *([] if model else ["vs dense", "plan ms", "density"])]
    columns += [f"{name} %" for name in shown] + ["GFLOP", "GFLOP/s", "of limit", "bound"]
    parts: list[Any] = [_title(profile)]
    series = list(profile.series().items())
    for number, ((label, mode), rows) in enumerate(series):
        last = number == len(series) - 1
        table = make_table(f"{label}, {mode}", columns, (), _caption(profile) if last else "")
        before: Mapping[str, Any] | None = None
        for row in rows:
            figures = [size(row["seqlen"]), _ms(row), _slope(before, row), f"{max(row['peak_bytes'], 0) / MIB:.1f}"]
            if not model:
                figures += [_ratio(row), _number(row.get("plan_ms"), ".2f"), _number(row.get("density"), ".3f")]
            figures += [f"{100 * row['phases'][name]:.0f}" for name in shown]
            table.add_row(*figures, *_roof(profile, row))
            before = row
        parts.append(table)
    return Group(*parts)


def _roof(profile: Measurements, row: Mapping[str, Any]) -> list[str]:
    found = profile.roofline(row)
    flops = f"{row['flops'] / 1e9:.3g}"
    if found is None or profile.ceilings is None:
        return [flops, "", "", ""]
    # No call is faster than the machine: what seems so is as unsure as its time and the ceiling.
    doubt = profile.ceilings.unsure + (row.get("unsure") or 0.0)
    told = not is_noisy(row) and profile.ceilings.unsure <= UNSURE and found.share <= 1.05 + doubt
    return [flops, f"{found.attained:.3g}", *([f"{min(found.share, 1.0):.0%}", found.bound] if told else ["noisy", ""])]


def _growth(profile: Measurements) -> Any:
    table = make_table("Growth", ["", "mode", "time", "memory", "memory ends at N", "overtakes dense at N"], {0}, "")
    for found in profile.growth():
        law = [("" if x is None else str(x)) for x in (found.time, found.memory)]
        law[0] = TOO_NOISY if "time" in found.noisy else law[0]
        table.add_row(found.label, found.mode, *law, _end(found), _overtakes(found))
    return table


def _end(found: Growth) -> str:
    if found.memory_end is None or found.memory is None:
        return ""
    if found.memory_end > FAR * found.memory.longest:
        return f"beyond {size(FAR * found.memory.longest)}"
    return f"{size(found.memory_end)} (predicted)" if found.memory_end > found.memory.longest else "reached"


def _overtakes(found: Growth) -> str:
    if "overtakes" in found.noisy:
        return TOO_NOISY
    if found.overtakes is None:
        return "" if found.label == "dense" else "-"
    if not found.overtakes.measured:
        return f"{size(found.overtakes.length)} (predicted)"
    return ("up to " if found.overtakes.length == found.shortest else "") + size(found.overtakes.length)


def _modules(profile: Measurements) -> Any:
    """The attention modules of the longest row of each series."""
    table = make_table("Attention modules at the longest length", ["", "kind", "ms", "share %"], {0}, "")
    for (label, mode), rows in profile.series().items():
        table.add_section()
        table.add_row(Text(f"{label}, {mode}, N = {size(rows[-1]['seqlen'])}", style="bold"))
        for name, module in rows[-1]["modules"].items():
            share = module["share"]
            table.add_row(name or "(the model)", module["kind"], f"{share * rows[-1]['ms']:.3g}", f"{100 * share:.1f}")
    return table


def recommendation_table(found: Choice) -> Any:
    """Every candidate, fastest first, those of the front marked, and the pick with its reason."""
    labels = ["", "ms", "vs dense", "error", "MiB", "front", "within budget"]
    table = make_table(found.title, labels, {0}, found.caption)
    for candidate in found.candidates:
        table.add_row(
            Text(candidate.method, style="bold" if candidate is found.pick else ""),
            f"{candidate.ms:.3g}" + ("~" if candidate.noisy else ""),
            f"{1 / candidate.relative:.2f}x",
            f"{candidate.error:.1e}",
            "" if candidate.peak_bytes is None else f"{candidate.peak_bytes / MIB:.1f}",
            "*" if candidate in found.front else "",
            "yes" if candidate.error <= found.budget else "",
        )
    lines = [f"{status}: {method}: {message[:200]}" for method, status, message in found.failed]
    return Group(table, found.reason, *lines)


def size(length: float) -> str:
    """1536 -> "1536", 4096 -> "4k", 300000.5 -> "293k", 5e7 -> "48M"."""
    if length >= 1024**2 * 10:
        return f"{length / 1024**2:.0f}M"
    whole = round(length)
    if whole == length and whole % 1024:
        return str(whole)
    return f"{length / 1024:.0f}k" if length >= 10 * 1024 or (whole == length and whole) else f"{length:.0f}"


def _title(profile: Measurements) -> str:
    row = profile.rows[0]
    if profile.kind == "model":
        return f"{row.get('model', 'model')}, batch {row['batch']}, {row['dtype']}, {row['threads']} threads"
    heads = f"H{row['heads']}" + (f"/{row['kv_heads']}" if row["kv_heads"] != row["heads"] else "")
    causal = ", causal" if row["causal"] else ""
    return f"B{row['batch']} {heads} D{row['head_dim']}{causal}, {row['dtype']}, {row['threads']} threads"


def _caption(profile: Measurements) -> str:
    ceilings = profile.ceilings
    text = "slope: exponent since the row before. MiB: peak of a call above what was resident. "
    if profile.kind == "op":
        text += "vs dense: in alternation, in the same process. plan ms: making the mask, once. "
    text += "%: shares of the time under torch.profiler. "
    if ceilings is not None:
        what = "attention's operations over kernel time" if profile.kind == "model" else "matrix operations"
        text += (
            f"GFLOP/s: {what}, counted by visited blocks; of limit: of the lower ceiling, {ceilings.gflops:.4g} "
            f"GFLOP/s ({ceilings.kind}) or {ceilings.gbytes:.3g} GB/s (copy), {ceilings.threads} threads; bound "
            "by cache: faster than memory, so that the limit is the other one. "
        )
    text += f"~ unsure by more than {UNSURE:.0%}. "
    if any(row.get("fast_path") for rows in profile.series().values() for row in rows):
        text += "While it is looked into, torch.nn cannot take its fast path: shares are those of the other one."
    return text


def _ms(row: Mapping[str, Any]) -> str:
    return f"{row['ms']:.3g}" + ("~" if is_noisy(row) else "")


def _slope(before: Mapping[str, Any] | None, row: Mapping[str, Any]) -> str:
    if before is None:
        return ""
    if is_noisy(before) or is_noisy(row):
        return "~"
    return f"{math.log(row['ms'] / before['ms']) / math.log(row['seqlen'] / before['seqlen']):.2f}"


def _ratio(row: Mapping[str, Any]) -> str:
    return f"{row['dense_ms'] / row['ms']:.2f}x" if "dense_ms" in row else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
