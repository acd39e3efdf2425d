"""Tables for the terminal and one PNG, made from the records of a result file; a file of an unfinished run is fine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from efficient_attn.measuring.clock import NOISY
from efficient_attn.measuring.records import Record

from . import suites, view
from .suites import targets
from .suites.memory import fitted_exponent

MIB = 2**20


def latest(found: Iterable[Record]) -> list[Record]:
    """The cell records, of a cell that was measured more than once only the last, in order of first appearance."""
    cells: dict[str, Record] = {}
    for record in found:
        if record["type"] == "cell":
            cells[f"{record['suite']} {sorted(record['config'].items())}"] = record
    return list(cells.values())


def print_report(cells: Sequence[Record], console: Console) -> None:
    """One table for each suite that has records, and a line for each cell that failed."""
    tables = {"ops": _operators, "vit": _vit, "memory": _memory, "targets": _targets}
    for suite in dict.fromkeys([*tables, *(cell["suite"] for cell in cells)]):
        rows = [cell for cell in cells if cell["suite"] == suite]
        if rows:
            console.print(tables[suite](rows) if suite in tables else _declared(rows))
        if rows and suite == "targets":
            console.print("\n".join(target_summary(rows)), highlight=False)
    failed = [cell for cell in cells if cell["status"] != "ok"]
    for cell in failed:
        console.print(f"[yellow]{cell['status']}[/]: {cell_name(cell)}: {cell['message'][:300]}", highlight=False)


def _declared(cells: Sequence[Record]) -> Table:
    """The table that a suite declares."""
    rows = view.rows(cells)
    known = view.shown(rows)
    if not known:  # of a file that is not loaded now
        table = make_table(
            f"{cells[0]['suite']}, which is not loaded: --load its file", "configuration", ("status",), ""
        )
        for cell in cells:
            table.add_row(str(dict(cell["config"])), cell["status"])
        return table
    (suite,) = known
    table = make_table(suite.name, suite.key[0].label, (), f"{suite.about} ~ noisy.")
    for column in (*suite.key[1:], *suite.columns):
        text = column.form == "text"
        table.add_column(column.label, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for row in rows:
        figures = [view.text(row.get(column.key), column.form) for column in suite.columns]
        if row["status"] != "ok":
            figures = [f"[yellow]{row['status']}[/]"]
        elif row["noisy"]:
            place = next((i for i, column in enumerate(suite.columns) if column.key == "ms"), 0)
            figures[place] += "~"
        table.add_row(*(view.text(row.get(column.key), column.form) for column in suite.key), *figures)
    return table


def _operators(rows: Sequence[Record]) -> Table:
    names = short_names(rows)
    table = make_table(
        f"Operator on photograph patches, {_shared(rows)}",
        "method",
        ("ms", "vs dense", "vs SDPA", "plan ms", "MiB", "density", "error"),
        caption="vs: speed-up over exact attention, ours and torch SDPA, interleaved in the same process. plan: making "
        "the mask, once. MiB: peak memory of one call above its inputs. error: relative to exact attention in float64 "
        f"(projections untrained). ~ noisy: spread above {NOISY:.0%}.{_legend(names)}",
    )
    groups = sorted({(row["config"]["seqlen"], row["config"]["mode"]) for row in rows})
    for length, mode in groups:
        table.add_section()
        table.add_row(f"[bold]N = {length}, {mode}[/]")
        for row in rows:
            if (row["config"]["seqlen"], row["config"]["mode"]) == (length, mode):
                table.add_row(names[row["config"]["method"]], *_metrics(row, _operator_figures))
    return table


def _operator_figures(row: Record) -> tuple[str, ...]:
    return (
        _ms(row),
        _times(row["speedup_dense"]),
        _times(row["speedup_sdpa"]),
        _number(row.get("plan_ms"), "{:.2f}"),
        _mib(row),
        _number(row.get("density"), "{:.3f}"),
        f"{row['error']:.1e}",
    )


def _vit(rows: Sequence[Record]) -> Table:
    names = short_names(rows)
    table = make_table(
        f"Vision transformer on scikit-learn's digits, {rows[0]['config']['steps']} steps, {_shared(rows)}",
        "method",
        ("accuracy", "loss", "step ms", "vs dense", "vs torch.nn", "MiB"),
        caption="step: forward and backward of a batch of 64 images. vs torch.nn: the same model with "
        f"torch.nn.MultiheadAttention.{_legend(names)}",
    )
    for row in rows:
        table.add_row(names[row["config"]["method"]], *_metrics(row, _vit_figures))
    return table


def _vit_figures(row: Record) -> tuple[str, ...]:
    return (
        f"{row['accuracy']:.1%}",
        f"{row['loss']:.3f}",
        _ms(row),
        _times(row["speedup_dense"]),
        _times(row["speedup_torch_module"]),
        _mib(row),
    )


def _memory(rows: Sequence[Record]) -> Table:
    table = make_table(
        f"Peak extra memory against length, {_shared(rows)}",
        "method",
        ("length", "peak MiB", "bytes a token"),
        caption="exponent: slope of log(peak) over log(length); 1 is linear.",
    )
    for method in dict.fromkeys(row["config"]["method"] for row in rows):
        group = [row for row in rows if row["config"]["method"] == method]
        table.add_section()
        table.add_row(f"[bold]{method}[/]")
        for row in group:
            metrics = _metrics(row, lambda r: (_mib(r), f"{r['bytes_per_token']:.0f}"))
            table.add_row("", str(row["config"]["seqlen"]), *metrics)
        done = [row for row in group if row["status"] == "ok"]
        if len(done) > 1:
            exponent = fitted_exponent([r["config"]["seqlen"] for r in done], [r["peak_bytes"] for r in done])
            table.add_row("", "exponent", f"{exponent:.2f}")
    return table


def _targets(rows: Sequence[Record]) -> Table:
    table = make_table(
        f"CPU targets, {_shared(rows)}",
        "work",
        ("peer", "ours ms", "±", "peer ms", "±", "MiB", "target", "reached", "of peak", "result"),
        caption="reached: peer time / our time in one alternation; for sparse_efficiency our time / (density x our "
        f"dense time), for overhead microseconds. ±: interquartile range over median; ~ above {NOISY:.0%}. MiB: peak "
        "memory of our first call. of peak: operations of the visible pairs (two products forward, five backward) as a "
        "share of the FMA peak, or bytes of keys and values as a share of a copy, in the same alternation; its target.",
    )
    for row in rows:
        config = row["config"]
        table.add_row(target_name(config), config["peer"], *_metrics(row, _target_figures))
    return table


def _target_figures(row: Record) -> tuple[str, ...]:
    return (
        _ms(row),
        f"{row['spread']:.0%}",
        _number(row["peer_ms"], "{:.3g}"),
        _number(row["peer_spread"], "{:.0%}"),
        _mib(row),
        _target(row["config"]),
        f"{row['figure']:.2f}",
        _share(row),
        _verdict(row),
    )


def _target(config: Mapping[str, Any]) -> str:
    return "" if config["target"] is None else f"{'<=' if config['most'] else '>='} {config['target']:g}"


def target_name(config: dict[str, Any]) -> str:
    """A row of the target table in words."""
    q_len, kv_len = config["q_len"], config["kv_len"]
    lengths = f"N{q_len}" if q_len == kv_len else f"Nq{q_len} Nk{kv_len}"
    heads = f"H{config['heads']}" + ("" if config["heads"] == config["kv_heads"] else f" Hkv{config['kv_heads']}")
    shape = f"B{config['batch']} {heads} {lengths} D{config['head_dim']}"
    work = "" if config["work"] == "attention" else config["work"] + " "
    return f"{work}{config['dtype']} {config['mode']} {config['visible']} {shape}"


def reached(record: Record) -> bool | None:
    """Whether a target row met its target and its share of the machine's ceiling; None where the row has no target."""
    return targets.reached(record["config"], record)


def _verdict(record: Record) -> str:
    return {None: "", True: "[green]pass[/]", False: "[red]miss[/]"}[reached(record)]


def _share(record: Record) -> str:
    """Of the ceiling that the row has a target for, else of the FMA peak."""
    for ceiling in ("peak", "bandwidth"):
        if record["config"][ceiling] is not None:
            return f"{record[f'{ceiling}_share']:.0%} (>= {record['config'][ceiling]:.0%})"
    return _number(record.get("peak_share"), "{:.0%}")


def target_summary(rows: Sequence[Record]) -> list[str]:
    """Lines below the table: how many targets are met and which are not, the ceilings, what the rows leave to say."""
    wanted = [row for row in rows if row["config"]["target"] is not None]
    met = [row for row in wanted if row["status"] == "ok" and reached(row)]
    lines = [f"[bold]{len(met)} of {len(wanted)} targets met[/]"]
    lines += [f"  [red]missed[/] {_missed(row)}" for row in wanted if row not in met]
    for ceiling, unit in (("peak", "gflops"), ("bandwidth", "gbs")):
        found = [row for row in rows if row["status"] == "ok" and f"{ceiling}_{unit}" in row]
        if found:
            values = sorted(row[f"{ceiling}_{unit}"] for row in found)
            name = {"gflops": "GFLOP/s", "gbs": "GB/s"}[unit]
            middle = f"{values[len(values) // 2]:.4g} {name}, {values[0]:.4g} to {values[-1]:.4g} over the rows"
            lines.append(f"{ceiling} ({found[0][f'{ceiling}_of']}): {middle}")
    for row in rows:
        if row["status"] == "ok" and row["peer_plan_ms"] is not None:
            peer = row["config"]["peer"]
            lines.append(f"{target_name(row['config'])}: {peer} compiled in {row['peer_plan_ms']:.0f} ms")
        if row["config"]["note"]:
            lines.append(f"{target_name(row['config'])}: {row['config']['note']}")
    return lines


def _missed(row: Record) -> str:
    config = row["config"]
    name = f"{target_name(config)} against {config['peer']}"
    if row["status"] != "ok":
        return f"{name}: {row['status']}"
    return f"{name}: {row['figure']:.2f} ({_target(config)}) {_share(row)}".rstrip()


def _metrics(record: Record, render: Any) -> tuple[str, ...]:
    return render(record) if record["status"] == "ok" else (f"[yellow]{record['status']}[/]",)


def make_table(title: str, label: str, figures: Sequence[str], caption: str) -> Table:
    table = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", header_style="bold", box=SIMPLE_HEAD
    )
    table.add_column(label, overflow="fold")
    for figure in figures:
        table.add_column(figure, justify="right", no_wrap=True)
    return table


def short_names(rows: Sequence[Record]) -> dict[str, str]:
    """For each spec the method's name alone, or the whole spec where a suite has several variants of a method."""

    def name(spec: str) -> str:
        return "+".join(part.partition(":")[0] for part in spec.split("+"))

    specs = {(row["suite"], row["config"]["method"]) for row in rows}
    variants = Counter((suite, name(spec)) for suite, spec in specs)
    ambiguous = {method for (_, method), count in variants.items() if count > 1}
    return {spec: spec if name(spec) in ambiguous else name(spec) for _, spec in specs}


def _legend(names: Mapping[str, str]) -> str:
    """What short names stand for."""
    meant = [spec for spec, name in names.items() if spec != name]
    return f" Here {', '.join(sorted(meant))}." if meant else ""


def _shared(rows: Sequence[Record]) -> str:
    """What all rows have in common and a figure depends on."""
    config = rows[0]["config"]
    parts = [config.get("dtype", "float32") if rows[0]["suite"] != "targets" else ""]
    if rows[0]["suite"] in ("ops", "memory"):
        parts.append(f"B{config['batch']} H{config['heads']} D{config['head_dim']}")
    if config.get("causal"):
        parts.append("causal")
    parts.append(f"{config['threads']} threads")
    return ", ".join(part for part in parts if part)


def cell_name(cell: Mapping[str, Any]) -> str:
    """A cell in a few words."""
    config = cell["config"]
    if cell["suite"] == "targets":
        return f"targets {target_name(config)}"
    try:
        parts = [view.text(config.get(column.key), column.form) for column in suites.get(cell["suite"]).key]
    except KeyError:
        parts = [str(config.get("method", ""))]
    return " ".join(part for part in (cell["suite"], *parts) if part)


def _ms(record: Record) -> str:
    return f"{record['ms']:.3g}" + ("~" if record["spread"] > NOISY else "")


def _mib(record: Record) -> str:
    return f"{record['peak_bytes'] / MIB:.1f}"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
