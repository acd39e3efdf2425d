"""Writes the tables of fields.md from rows of its suites: python docs/fields.py RESULTS...

A table without a row among the results stays as it is.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from efficient_attn.benchmarks.suites.fields import FIRST_SEED
from efficient_attn.measuring import records

FEWEST = 3  # seeds of a verdict
PAGE = Path(__file__).resolve().parent / "fields.md"
Row = Mapping[str, Any]
Cells = Mapping[tuple[Any, ...], list[Row]]


def cells(found: Iterable[Row], suite: str, *keys: str) -> Cells:
    """The latest row of each seed of a suite, by other keys of its configuration."""
    rows: dict[tuple[Any, ...], dict[int, Row]] = {}
    for record in found:
        if record.get("suite") == suite and record["status"] == "ok":
            config = record["config"]
            rows.setdefault(tuple(config[key] for key in keys), {})[config["seed"]] = {**config, **record}
    return {key: list(of_seeds.values()) for key, of_seeds in rows.items()}


def over_seeds(rows: Sequence[Row], key: str = "score", digits: int = 3) -> str:
    """Mean and standard deviation."""
    values = [row[key] for row in rows]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def of_fields(found: Sequence[Row]) -> list[tuple[Any, ...]]:
    """What is learned by seeds that no setting was chosen on, and what a step takes."""
    scores, costs = (cells(found, suite, "field", "method") for suite in ("fields", "fields_cost"))
    scores = {cell: [row for row in rows if row["seed"] >= FIRST_SEED] for cell, rows in scores.items()}
    names = list(dict.fromkeys(field for field, _ in costs))
    rows: list[tuple[Any, ...]] = [
        ("field", "tokens", "method", "score", "seeds", "less dense", "step, ms", "beside dense", "MiB"),
    ]
    for field, method in sorted(costs, key=lambda cell: names.index(cell[0])):
        cost, mine = costs[field, method][-1], scores.get((field, method), [])
        score = f"{mine[0]['score_is']} {over_seeds(mine)}" if mine else "-"
        speed = (f"{cost['ms']:.0f}", f"{cost['speedup_dense']:.1f}x", f"{cost['peak_bytes'] / 2**20:.0f}")
        less = signed(differences(mine, scores.get((field, "dense"), []))) if method != "dense" else "-"
        rows.append((field, f"{cost['tokens']:,}", f"`{method}`", score, len(mine), less, *speed))
    return rows


def differences(mine: Sequence[Row], dense: Sequence[Row]) -> list[float]:
    """Each seed's score less that of exact attention with this seed, whose data are the same."""
    exact = {row["seed"]: row["score"] for row in dense}
    return [row["score"] - exact[row["seed"]] for row in mine if row["seed"] in exact]


def signed(found: Sequence[float]) -> str:
    """Mean and standard deviation, with its sign."""
    if not found:
        return "-"
    return f"{statistics.mean(found):+.3f}" + (f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else "")


def verdicts(found: Sequence[Row]) -> list[str]:
    """A line a field: which methods gain or lose beside exact attention, by Student's t test at 5 %."""
    scores, costs = (cells(found, suite, "field", "method") for suite in ("fields", "fields_cost"))
    lines = []
    for field in dict.fromkeys(field for field, _ in costs):
        said = []
        for method in (method for name, method in costs if name == field and method != "dense"):
            mine = [row for row in scores.get((field, method), []) if row["seed"] >= FIRST_SEED]
            each = differences(mine, scores.get((field, "dense"), []))
            speed = f"`{method.partition(':')[0]}` ({costs[field, method][-1]['speedup_dense']:.1f}x)"
            if len(each) < FEWEST:
                said.append(f"{speed} open, {len(each)} seeds")
                continue
            better = statistics.mean(each) * (1 if mine[0]["score_is"] != "mase" else -1)
            error = float(student.ppf(0.975, len(each) - 1)) * statistics.stdev(each) / len(each) ** 0.5
            found_out = "gains" if better > error else "loses" if better < -error else f"even ± {error:.2f}"
            said.append(f"{speed} {found_out}")
        if said:
            lines.append(f"* {field}: {', '.join(said)}.")
    return lines


def of_longer(found: Sequence[Row]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = [("what learns", "what is read", "tokens", "accuracy", "seeds", "CPU s")]
    for (learns, reads), mine in sorted(cells(found, "longer", "learns", "reads").items()):
        tokens = f"{statistics.mean(row['tokens'] for row in mine):,.0f}"
        rows.append((learns, reads, tokens, over_seeds(mine), len(mine), over_seeds(mine, "cpu_seconds", 0)))
    return rows


def of_few_labels(found: Sequence[Row]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = [("before", "patches", "accuracy", "seeds", "CPU s")]
    for (before, overlap), mine in sorted(
        cells(found, "few_labels", "before", "overlap").items(), key=lambda c: c[0][1]
    ):
        patches = "overlap" if overlap else "apart"
        rows.append((before, patches, over_seeds(mine), len(mine), over_seeds(mine, "cpu_seconds", 0)))
    return rows


def of_forecasts(found: Sequence[Row]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = [("series", "method", "MASE", "sMAPE %", "CRPS", "seeds", "windows")]
    made = cells(found, "forecasts", "data", "method")
    names = list(dict.fromkeys(name for name, _ in made))
    for name, method in sorted(made, key=lambda cell: names.index(cell[0])):
        mine = made[name, method]
        errors = (over_seeds(mine, "score"), over_seeds(mine, "smape", 2), over_seeds(mine, "crps"))
        seeds = len(mine) if mine[0]["steps"] else "-"  # the baselines depend on none
        rows.append((name, f"`{method}`", *errors, seeds, mine[0]["windows"]))
    return rows


TABLES: Mapping[str, Callable[[Sequence[Row]], list[tuple[Any, ...]]]] = {
    "fields": of_fields,
    "longer": of_longer,
    "few_labels": of_few_labels,
    "forecasts": of_forecasts,
}


def table(rows: Sequence[Sequence[Any]]) -> str:
    """In Markdown; the first row is the heading."""
    heading, *body = rows
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (heading, ["---"] * len(heading), *body))


def between(text: str, name: str, made: str) -> str:
    """The page with what was made between the marks of a name."""
    begin, end = f"<!-- {name}: made by docs/fields.py -->\n", f"\n<!-- end of {name} -->"
    before, mark, rest = text.partition(begin)
    if not mark or end not in rest:
        raise ValueError(f"{PAGE} has no marks of {name}")
    return f"{before}{begin}{made}{end}{rest.partition(end)[2]}"


def main(paths: Iterable[Path]) -> None:
    found = [record for path in paths for record in records.read(path)]
    made = {name: table(rows) for name, make in TABLES.items() if len(rows := make(found)) > 1}
    if lines := verdicts(found):
        made["verdicts"] = "\n".join(lines)
    text = PAGE.read_text(encoding="utf-8")
    for name, part in made.items():
        text = between(text, name, part)
        print(part, end="\n\n")
    PAGE.write_text(text, encoding="utf-8")
    seconds = sum(record.get("cpu_seconds", 0) for record in found if record.get("suite") == "fields")
    if seconds:
        print(f"the cells of the suite fields took {seconds / 60:.0f} minutes of CPU")


if __name__ == "__main__":
    main(map(Path, sys.argv[1:]))
