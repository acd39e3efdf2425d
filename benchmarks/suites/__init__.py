"""The suites by name. A module in this folder with a `SUITE` is one; so is what a file given to `load` registers.

A suite is a grid of cells and the function that measures one of them, with the table and the charts that show it. It is
looked up by name, so that a worker imports the one that it runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from efficient_attn.methods import METHODS

from .. import cases

Config = Mapping[str, Any]
Row = Mapping[str, Any]
ALIASES = {"cpu": "targets"}  # what a suite is also called on the command line


@dataclass(frozen=True)
class Options:
    """What a run asks of its suites. None: the suite's own choice; a suite ignores what it has no use for."""

    quick: bool = False
    methods: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    seqlens: tuple[int, ...] | None = None
    modes: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] = ("float32",)
    backend: str = "auto"
    causal: bool = False
    threads: int = 1
    budget_s: float = 1.5
    seed: int = 0

    def common(self) -> dict[str, Any]:
        """The fields that every cell has."""
        return {"threads": self.threads, "budget_s": self.budget_s, "seed": self.seed}

    def specs(self, default: Sequence[str]) -> tuple[str, ...]:
        """The methods that were asked for; else the suite's, and those that somebody else has registered."""
        ours = {"causal", *(spec.partition(":")[0] for spec in cases.OPERATOR_METHODS)}
        return self.methods or (*default, *(name for name in METHODS if name not in ours))


@dataclass(frozen=True)
class Column:
    """One figure of a table: its heading, the key in a row, and how it is written (see `view.text`)."""

    label: str
    key: str
    form: str = "number"


@dataclass(frozen=True)
class Chart:
    """One picture for each combination of `split`'s values: y over x, a line for each value of the suite's series.

    `references` are other keys of the same rows, drawn dashed (a peer's time, an ideal line); `where` keeps rows;
    `order` is the key in whose order points are joined, x by default.
    """

    title: str
    x: str
    y: str
    x_label: str
    y_label: str
    split: tuple[str, ...] = ()
    references: tuple[tuple[str, str], ...] = ()
    where: tuple[tuple[str, Any], ...] = ()
    log_x: bool = True
    log_y: bool = True
    lines: bool = True
    order: str | None = None


@dataclass(frozen=True)
class Claim:
    """A sentence about the rows with these ids."""

    text: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """A grid and its measurement.

    Args:
        name: also what is written in records.
        about: how it is measured, one or two sentences, printed with the results.
        configs: the grid: configurations (JSON values) for the options of a run, the cheapest first.
        run_cell: measures one configuration, in a worker process, and returns JSON values.
        series: the key whose values are the lines of the charts.
        columns, charts: what tables and charts show of a row (its configuration and metrics in one mapping).
        claims: sentences that the rows support, printed below the table and first on the page.
        published: figures of others, labelled as such, shown beside ours: title -> rows of a table.
        key: the columns of the configuration that tell rows apart in a table.
        sections: keys of columns of `key` whose values stand above groups of rows, in a terminal, not in columns.
        expand: the rows that tables and charts show of one record's row: with figures that follow from others added,
            or several where a record has figures of several implementations; ids must differ.
        retry: a configuration to measure where a cell of this one did not end well, or None.
        run_together: measures several configurations that differ in their series only, in one alternation (see
            `runner.run_together`); None: each is measured alone.
        default: whether `bench all` has it.
    """

    name: str
    about: str
    configs: Callable[[Options], Iterable[Config]]
    run_cell: Callable[[Config], dict[str, Any]]
    columns: tuple[Column, ...]
    key: tuple[Column, ...]
    series: str = "method"
    charts: tuple[Chart, ...] = ()
    claims: Callable[[Sequence[Row]], Sequence[Claim]] = lambda rows: ()
    published: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    expand: Callable[[dict[str, Any]], Iterable[dict[str, Any]]] = lambda row: (row,)
    retry: Callable[[Config], Config | None] = lambda config: None
    run_together: Callable[[Sequence[Config]], list[dict[str, Any] | BaseException]] | None = None
    default: bool = True


_added: dict[str, Suite] = {}
_loaded: list[str] = []


def names() -> tuple[str, ...]:
    """Every suite that `get` knows, those of this folder first."""
    here = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return (*here, *_added)


def get(name: str) -> Suite:
    """The suite of a name; `KeyError` for one that does not exist."""
    name = ALIASES.get(name, name)
    if name in _added:
        return _added[name]
    if name not in names():
        raise KeyError(name)
    suite: Suite = importlib.import_module(f"{__name__}.{name}").SUITE
    return suite


def measurement(name: str, files: Sequence[str] = ()) -> Callable[[Config], dict[str, Any]]:
    """What measures a cell of the suite of a name, once these files are loaded: how a worker finds it."""
    for file in files:
        load(file)
    return get(name).run_cell


def measurement_together(name: str, files: Sequence[str] = ()) -> Any:
    """What measures several cells of a suite in one alternation; a worker's too."""
    for file in files:
        load(file)
    return get(name).run_together


def register(suite: Suite) -> Suite:
    """Makes a suite known; for files that are given to `load`."""
    _added[suite.name] = suite
    return suite


def load(path: str | os.PathLike[str]) -> None:
    """Runs a Python file that registers a suite, a peer or a method; workers load what their run has loaded."""
    place = str(Path(path).resolve())
    if place in _loaded:
        return
    name = f"efficient_attn_loaded_{len(_loaded)}_{Path(place).stem}"
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    _loaded.append(place)


def measured(cell: Any, measure: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The record of a cell; where it failed, of what its suite measures instead."""
    record = measure(cell)
    if record["status"] in ("ok", "unsupported"):
        return record
    other = get(cell.suite).retry(cell.config)
    return record if other is None else measure(replace(cell, config=other))


def loaded() -> tuple[str, ...]:
    """The files that `load` has run."""
    return tuple(_loaded)


def beside(times: Mapping[str, Mapping[str, Any]], ours: str, peers: Sequence[str]) -> dict[str, Any]:
    """What a row says of calls that were timed in one alternation: the times of ours; of each peer its time, how unsure
    that is, and our speed-up over it (1 for the same call, which is timed once); and the samples of the first."""
    mine, found = times[ours], {name: times.get(name, times[ours]) for name in peers}
    return {
        **mine,
        **{f"{name}_ms": peer["ms"] for name, peer in found.items()},
        **{f"{name}_unsure": peer["unsure"] for name, peer in found.items()},
        **{f"speedup_{name}": round(peer["ms"] / mine["ms"], 4) for name, peer in found.items()},
        "reference_times": found[peers[0]]["times"],
    }


def groups(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some keys, in the order of their first."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return found


def grid(**axes: Any) -> list[dict[str, Any]]:
    """Every combination: a tuple is an axis, anything else a constant. The last axis runs fastest.

    >>> grid(seqlen=(1, 2), mode=("fwd",), heads=4)
    [{'seqlen': 1, 'mode': 'fwd', 'heads': 4}, {'seqlen': 2, 'mode': 'fwd', 'heads': 4}]
    """
    values = [value if isinstance(value, tuple) else (value,) for value in axes.values()]
    return [dict(zip(axes, combination, strict=True)) for combination in itertools.product(*values)]
