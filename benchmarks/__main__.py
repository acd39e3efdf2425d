"""Runs one suite where there is PyTorch and little else, neither typer nor rich: `make gpu-check` measures by it.

python -m efficient_attn.benchmarks gpu --out DIR

It writes `results.jsonl`, `summary.txt` and, where matplotlib is, `results.png`; a second run into the same folder is
added. `efficient-attn bench` does more.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from efficient_attn.measuring import records, runner

from . import figures, report, suites, view

CELL_S = 90.0  # the most that one cell may take
SHORTEST_S = 10.0  # with less than this left no cell is started


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=suites.names())
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300.0, help="start no cell after this many")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--cell", action="append", default=[], help="CASE/MODE: measure these alone")
    parser.add_argument("--only", nargs="+", default=[], help="of the suite gpu: what to time, as in cuda cudnn")
    parser.add_argument("--cell-seconds", type=float, default=CELL_S, help="the most that one cell may take")
    parser.add_argument("--note", action="append", default=[], help="a line to print above the summary")
    options = parser.parse_args(arguments)
    started, path, code = time.monotonic(), options.out / "results.jsonl", records.code_version()

    def left() -> float:
        return options.seconds - (time.monotonic() - started)

    with records.ResultFile(path) as out:
        out.append(records.environment(**gpu_facts()))

        def measure(cell: runner.Cell) -> records.Record:
            limits = runner.Limits(seconds=min(max(left(), SHORTEST_S), options.cell_seconds))
            return runner.run_cell(cell, out, limits, code, suites.measurement)

        for config in suites.get(options.suite).configs(suites.Options(threads=options.threads)):
            if options.cell and f"{config.get('case')}/{config.get('mode')}" not in options.cell:
                continue
            config = {**config, "only": options.only} if options.only else config
            cell = runner.Cell(options.suite, config)
            name = view.cell_name(vars(cell))
            if left() < SHORTEST_S:
                print(f"{name}: not started, {options.seconds:.0f} s are over")
                continue
            record = suites.measured(cell, measure)
            print(f"{name}: {record['status']} {record.get('ms', '')}", flush=True)
    cells = view.latest(last_run(list(records.read(path))))
    if importlib.util.find_spec("matplotlib") is not None:
        figures.overview(view.rows(cells), options.out / "results.png")
    summary = "\n".join([*options.note, "", report.plain(cells)])
    (options.out / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    print("\n" + summary)


def gpu_facts() -> Mapping[str, Any]:
    """The GPU, its clocks now and the versions, for the environment line; asked of a process that is not this one."""
    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return {}
    return {"gpu": found.stdout.strip(), "cuda": torch.version.cuda, "torch": torch.__version__}


def last_run(found: list[records.Record]) -> list[records.Record]:
    """The records of the last run in a file that may hold several."""
    starts = [number for number, record in enumerate(found) if record["type"] == "environment"]
    return found[starts[-1] :]


if __name__ == "__main__":
    main()
