"""The command line: `efficient-attn info | bench | report | compare | profile | recommend | convert | inspect |
train | forecast | backtest`."""

from __future__ import annotations

import importlib
import io
import json
import sys
from typing import Annotated, Any

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as error:
    raise SystemExit(
        f"efficient-attn: the command line needs {error.name}; pip install 'efficient-attn[bench]'"
    ) from error

import torch

from . import explain
from .backends.cpu import attention as cpu
from .benchmarks import commands as benchmarks
from .benchmarks import compare
from .inspecting.convert import convert_command
from .inspecting.inspect import inspect_command
from .measuring import records, terminal
from .profiling import commands as profiling
from .training import command as training
from .training import forecasting

app = typer.Typer(
    name="efficient-attn",
    no_args_is_help=True,
    add_completion=False,
    help="Attention: exact, block-sparse and low-rank.",
)


def main() -> None:
    """Entry point of the `efficient-attn` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal in ASCII or cp1252 shows what it can
    try:
        raise SystemExit(app(sys.argv[1:] or ["--help"], prog_name="efficient-attn", standalone_mode=False))
    except terminal.usage_error() as error:
        context = error.ctx
        own = type(error) is typer.BadParameter and error.param is None  # said by us, with what to do
        see = "" if own or context is None else f"; see {context.command_path} --help"
        terminal.say_error(f"{error.message if own else error.format_message().rstrip('.')}{see}")
        raise SystemExit(2) from None
    except OSError as error:  # a full disk, a folder that may not be written to
        raise SystemExit(f"efficient-attn: {error}") from error


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Versions, processor, instruction set in use, backends with the reasons of those that cannot serve, and
    threads."""
    found = collect_info()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    out = terminal.console()
    for section, values in found.items():
        out.print(section, style="bold")
        for name, value in values.items():
            shown = value if not isinstance(value, list) else "; ".join(map(str, value)) or "serves"
            out.print(f"  {name:<16}{shown}", soft_wrap=True)


app.command("bench")(benchmarks.bench)
app.command("report")(benchmarks.report)
app.command("compare")(compare.command)
app.command("profile")(profiling.profile)
app.command("recommend")(profiling.recommend_command)
app.command("convert")(convert_command)
app.command("inspect")(inspect_command)
app.add_typer(training.app)
app.command("forecast")(forecasting.forecast_command)
app.command("backtest")(forecasting.backtest_command)


def collect_info() -> dict[str, dict[str, Any]]:
    """What `info` prints, as JSON values."""
    environment = records.environment()
    sample = torch.zeros(1, 1, 16, 16)
    return {
        "versions": {"python": environment["python"], "code": environment["code"], **environment["versions"]},
        "machine": environment["machine"],
        "threads": {"torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads()},
        "cpu kernels": {"instruction set": _instruction_set()},
        "backends": explain(sample, sample, sample).reasons,
    }


def _instruction_set() -> str:
    if cpu.MISSING:
        return f"none: {cpu.MISSING}"
    return str(importlib.import_module("efficient_attn._cpu").instruction_set())


if __name__ == "__main__":
    main()
