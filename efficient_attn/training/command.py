"""`efficient-attn train`: a command for each task, whose options are the task's fields and those of every run."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import signal
import sys
import typing
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import CheckpointError, CommunicationError, EfficientAttnError, InputError
from ..measuring import terminal
from ..measuring.terminal import Progress, note
from . import options, trainer
from .options import TrainOptions
from .task import Task
from .tasks import TASKS

RUNS = Path("runs")

# Options of every task: name, type, default (where a task has none of its own), and what it says.
COMMON: tuple[tuple[str, Any, Any, str], ...] = (
    ("steps", int | None, None, "Optimizer steps."),
    ("epochs", float | None, None, "Passes over the training data, instead of --steps."),
    ("batch", int, 64, "Examples at once in each process."),
    ("accumulate", int, 1, "Batches whose gradients make one step."),
    ("lr", float, 1e-3, "Highest learning rate."),
    ("warmup", float, 0.1, "Part of the steps in which the learning rate rises."),
    ("final_lr", float, 0.0, "Part of --lr that is left at the end of the cosine."),
    ("weight_decay", float, 0.05, "AdamW's, for matrices."),
    ("clip", float, 1.0, "Greatest norm of the gradient; 0: no limit."),
    ("precision", str, "float32", f"{' or '.join(options.PRECISIONS)} (mixed)."),
    ("seed", int, 0, "Of data, parameters and dropout."),
    ("threads", int | None, None, "CPU threads. Default: PyTorch's."),
    ("device", str, "auto", "auto, cpu or cuda."),
    ("parallel", str, "ddp", "Under torchrun: ddp or fsdp."),
    ("context_parallel", int, 1, "Under torchrun: processes that share each sequence."),
    ("timeout", float, 600.0, "Under torchrun: seconds to wait for another process before the run ends."),
    ("eval_every", int | None, None, "Steps between validations. Default: a tenth of the run."),
    ("save_every", int | None, None, "Steps between checkpoints. Default: a tenth of the run."),
    ("log_every", int, 1, "Steps between lines of metrics.jsonl."),
    ("tensorboard", bool | None, None, "Write TensorBoard's files. Default: if it is installed."),
)
UNITS = {"accuracy", "f1", "majority", "zero_shot", "exact", "neighbour_accuracy", "recall_at_5", "within_80%"}
MOST_CLASSES = 12  # whose confusions fit on a line

app = typer.Typer(
    name="train",
    help="Trains a model with any attention on real or generated data. Ctrl-C saves; --resume goes on.",
    invoke_without_command=True,
)


@app.callback()
def overview(
    context: typer.Context, list_tasks: Annotated[bool, typer.Option("--list", help="Show the tasks.")] = False
) -> None:
    """Trains a model with any attention on real or generated data. Ctrl-C saves; --resume goes on."""
    if list_tasks:
        table = Table("task", "what it learns", "--data", box=None, padding=(0, 2, 0, 0))
        for task in TASKS.values():
            table.add_row(task.name, task.help, task.data_help or "-")
        terminal.console(width=120).print(table)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def _add(task: type[Task]) -> None:
    """The command of a task. Typer reads the signature, which is made of the task's fields here."""

    def command(ctx: typer.Context, **given: Any) -> None:
        chosen = {name for name in given if str(ctx.get_parameter_source(name)).endswith("COMMANDLINE")}
        raise typer.Exit(run(task, given, chosen))

    types = typing.get_type_hints(task)
    parameters = [_parameter("ctx", typer.Context)]
    for field in dataclasses.fields(task):
        if field.name != "data":
            parameters.append(_option(field.name, types[field.name], field.default, field.metadata["help"]))
        elif task.data_help is not None:
            parameters.append(_option("data", str | None, None, task.data_help))
    defaults = dict(task.defaults)
    for name, kind, default, text in COMMON:
        parameters.append(_option(name, kind, defaults.get(name, default), text))
    parameters += [
        _option("out", Path | None, None, f"Folder of the run. Default: {RUNS}/{task.name}-<time>."),
        _option("resume", bool, False, "Go on with the run in --out (default: the latest of this task).", "--resume"),
        _option("start", Path | None, None, "Start from these parameters: another run, or a saved model.", "--from"),
        _option("freeze", list[str] | None, None, "Parameters that do not learn: body, or encoder.*. Repeatable."),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = task.help
    app.command(task.name)(command)


def _parameter(name: str, kind: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)


def _option(name: str, kind: Any, default: Any, text: str, *flags: str) -> inspect.Parameter:
    return _parameter(name, Annotated[kind, typer.Option(*flags, help=text)], default)


def run(task: type[Task], given: Mapping[str, Any], chosen: set[str]) -> int:
    """Train as the command line says, and return the exit code.

    Args:
        given: every option's value; chosen: those that were typed.
    """
    first = os.environ.get("RANK", "0") == "0"
    console = terminal.console(quiet=not first, width=120)
    try:
        made, train_options = resumed(task, given, chosen) if given["resume"] else fresh(task, given, chosen)
        console.print(f"{task.name}: {task.help} attention {made.attention}")
        result = trainer.train(made, train_options, resume=given["resume"], reporter=_Reporter(console))
    except trainer.Interrupted as interrupt:
        by = "Ctrl-C" if interrupt.signum == signal.SIGINT else "SIGTERM"
        note(console, "interrupted", f" by {by} after step {interrupt.step}, which is saved; to go on:")
        going_on = terminal.command_line(["train", task.name, "--out", str(train_options.out), "--resume"])
        console.print(f"  {going_on}", soft_wrap=True)
        return 128 + interrupt.signum
    except EfficientAttnError as error:
        if first or isinstance(error, CommunicationError):  # which the first process may not live to say
            terminal.say_error(error)
        return 2
    show(result, console)
    console.print(f"{train_options.out / trainer.RESULT}", soft_wrap=True)
    return 0


def fresh(task: type[Task], given: Mapping[str, Any], chosen: set[str]) -> tuple[Task, TrainOptions]:
    """Task and options of a new run.

    Raises:
        InputError: options that cannot be.
    """
    out = given["out"]
    if out is None:
        if "WORLD_SIZE" in os.environ:
            raise InputError("under torchrun give --out, so that all processes name the same folder")
        out = RUNS / f"{task.name}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    values = {name: given[name] for name, *_ in COMMON}
    if "steps" in chosen and "epochs" not in chosen:
        values["epochs"] = None
    if "epochs" in chosen and "steps" not in chosen:
        values["steps"] = None
    freeze = tuple(given["freeze"] or ())
    fields: dict[str, Any] = {field.name: given.get(field.name) for field in dataclasses.fields(task)}
    return task(**fields), TrainOptions(out=out, start=given["start"], freeze=freeze, **values)


def resumed(task: type[Task], given: Mapping[str, Any], chosen: set[str]) -> tuple[Task, TrainOptions]:
    """Task and options of a run that goes on: its own.

    Raises:
        InputError: no such run, one of another task, or typed options that would change what it computes.
        CheckpointError: a config.json that is damaged or no run's.
    """
    out = given["out"] or _latest(task.name)
    path = out / trainer.CONFIG
    if not path.exists():
        raise InputError(f"--resume: there is no run in {out}; name its folder with --out, or leave --resume out")
    saved = _read_config(path)
    if saved["task"] != task.name:
        raise InputError(f"the run in {out} is of the task {saved['task']}: efficient-attn train {saved['task']} ...")
    before = saved["options"] | saved["task_options"]
    for name in sorted(chosen - options.FREE_ON_RESUME - {"resume"}):
        value = given[name]
        now = str(value) if isinstance(value, Path) else value
        if now != before[name]:
            raise InputError(
                f"--{_flag(name)} {value} is not what the run in {out} began with ({before[name]}); leave it out, or "
                "start a new run"
            )
    try:
        task_now, train_options = task(**saved["task_options"]), options.restore(saved["options"] | {"out": str(out)})
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is of another version of efficient-attn ({error}); start a new run") from error
    changed = {name: given[name] for name in chosen & options.FREE_ON_RESUME if name != "out"}
    if "steps" in changed or "epochs" in changed:
        changed = {"steps": None, "epochs": None} | changed
    return task_now, dataclasses.replace(train_options, **changed)


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the metrics of a finished run."""
    best = "" if result["best_step"] is None else f", parameters of step {result['best_step']}"
    seconds, cpu = result["training_seconds"], result["training_cpu_seconds"]
    console.print(
        f"{result['steps']} steps in {seconds:.0f} s ({cpu:.0f} s of CPU), {result['parameters']:,} parameters{best}"
    )
    table = Table("", "validation", "test", box=None, padding=(0, 2, 0, 0))
    for name, value in result["test"].items():
        table.add_row(name, _shown(name, result["valid"][name]), _shown(name, value))
    for name, value in result["baselines"].items():
        table.add_row(f"{name} (baseline)", "", _shown(name, value), style="dim")
    console.print(table)
    details = result.get("details", {})
    if len(details.get("confusion", ())) in range(2, MOST_CLASSES + 1):
        table = Table("test, true \\ named", *details["classes"], "F1", box=None, padding=(0, 2, 0, 0))
        for name, row, f1 in zip(details["classes"], details["confusion"], details["f1"], strict=True):
            table.add_row(name, *map(str, row), f"{f1:.1%}")
        console.print(table)


def _read_config(path: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        CheckpointError: it is cut off, or no run's.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON that can be read ({error}); start a new run") from error
    if not isinstance(saved, dict) or not {"task", "options", "task_options"} <= set(saved):
        raise CheckpointError(f"{path} is no config of efficient-attn train; name the folder of a run by --out")
    return saved


def _latest(task: str) -> Path:
    found = [path for path in RUNS.glob(f"*/{trainer.CONFIG}") if _read_config(path)["task"] == task]
    if not found:
        raise InputError(f"--resume: there is no run of {task} under {RUNS}; name its folder with --out")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def _shown(name: str, value: float) -> str:
    return f"{value:.1%}" if name in UNITS else f"{value:.4f}"


def _flag(name: str) -> str:
    return {"start": "from"}.get(name, name).replace("_", "-")


class _Reporter:
    """Shows how far a run is, and a line for each validation."""

    def __init__(self, console: Console) -> None:
        self.console, self.total = console, 0
        self.bar = Progress(console, "steps")

    def begin(self, step: int, total: int, notes: list[str]) -> None:
        self.total = total
        for line in notes:
            self.console.print(f"  {line}")
        self.bar.__enter__()
        self.bar.update("", step, total)

    def trained(self, record: dict[str, Any]) -> None:
        self.bar.update(f"loss {record['loss']:.4f}", record["step"], self.total)

    def evaluated(self, record: dict[str, Any]) -> None:
        found = {name: value for name, value in record.items() if name not in ("type", "split", "step")}
        shown = "  ".join(f"{name} {_shown(name, value)}" for name, value in found.items())
        self.console.print(f"  step {record['step']:>6} of {self.total}  {shown}")
        sys.stdout.flush()

    def end(self) -> None:
        self.bar.__exit__()


for _task in TASKS.values():
    _add(_task)
