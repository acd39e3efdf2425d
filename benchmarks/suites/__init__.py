"""The suites by name. A module in this folder with a ``SUITE`` is one; so is what a file given to ``load`` registers.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficient_attn.methods import METHODS

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
        """The methods that were asked for; else the suite's, and those that a loaded file has registered."""
        return self.methods or (*default, *_added_methods)


@dataclass(frozen=True)
class Column:
    """One figure of a table: its heading, the key in a row, and how it is written (see ``view.text``)."""

    label: str
    key: str
    form: str = "number"


@dataclass(frozen=True)
class Chart:
    """One picture for each combination of ``split``'s values: y over x, a line for each value of the suite's series.

    ``references`` are other keys of the same rows, drawn dashed (a peer's time, an ideal line); ``where`` keeps rows;
    ``order`` is the key in whose order points are joined, x by default.
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
        claims: sentences that the rows support.
        published: figures of others, labelled as such, shown beside ours: title -> rows of a table.
        key: the columns of the configuration that tell rows apart in a table.
        default: whether ``bench all`` has it.
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
    default: bool = True


_added: dict[str, Suite] = {}
_added_methods: list[str] = []
_loaded: list[str] = []


def names() -> tuple[str, ...]:
    """Every suite that ``get`` knows, those of this folder first."""
    here = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return (*here, *_added)


def get(name: str) -> Suite:
    """The suite of a name; ``KeyError`` for one that does not exist."""
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


def register(suite: Suite) -> Suite:
    """Makes a suite known; for files that are given to ``load``."""
    _added[suite.name] = suite
    return suite


def load(path: str | os.PathLike[str]) -> None:
    """Runs a Python file that registers a suite, a peer or a method; workers load what their run has loaded."""
    place = str(Path(path).resolve())
    if place in _loaded:
        return
    before = set(METHODS)
    name = f"efficient_attn_loaded_{len(_loaded)}_{Path(place).stem}"
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    _loaded.append(place)
    _added_methods.extend(sorted(set(METHODS) - before))


def loaded() -> tuple[str, ...]:
    """The files that ``load`` has run."""
    return tuple(_loaded)


def grid(**axes: Any) -> list[dict[str, Any]]:
    """Every combination: a tuple is an axis, anything else a constant. The last axis runs fastest.

    >>> grid(seqlen=(1, 2), mode=("fwd",), heads=4)
    [{'seqlen': 1, 'mode': 'fwd', 'heads': 4}, {'seqlen': 2, 'mode': 'fwd', 'heads': 4}]
    """
    values = [value if isinstance(value, tuple) else (value,) for value in axes.values()]
    return [dict(zip(axes, combination, strict=True)) for combination in itertools.product(*values)]
