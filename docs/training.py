"""Writes the table and the picture of training.md from benchmarks/results/training: python docs/training.py"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from efficient_attn.training import command
from efficient_attn.training.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "training"
PAGE = ROOT / "docs" / "training.md"
MARKS = ("<!-- runs: made by docs/training.py -->", "<!-- end of runs -->")

# The metrics of a task that the table shows, and what they have to beat.
SHOWN = {
    "digits": ("accuracy",),
    "clip": ("zero_shot", "recall_at_5"),
    "simclr": ("neighbour_accuracy",),
    "mae": ("neighbour_accuracy",),
    "forecast": ("mase", "naive_mase"),
    "listops": ("accuracy",),
    "lm": ("bits_per_character",),
    "translate": ("exact",),
    "bytes": ("accuracy",),
}
# Where a run writes and how fast it goes is no part of what it computes.
UNTOLD = {"threads", "tensorboard", "device", "save_every"}
# The runs that are kept are all on the digits, and older than digits that are resized.
WITHOUT_EFFECT = {"image_size"}
SHARES = {"accuracy", "zero_shot", "recall_at_5", "neighbour_accuracy", "exact", "majority"}


def runs() -> list[tuple[str, dict[str, Any]]]:
    """The finished runs by name."""
    return [(path.parent.name, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*/result.json"))]


def table() -> str:
    """One row a run."""
    rows = ["| run | attention | steps | CPU seconds | test | to beat |", "| --- | --- | --- | --- | --- | --- |"]
    for name, result in runs():
        test = [f"{metric} {_number(metric, result['test'][metric])}" for metric in SHOWN[result["task"]]]
        beat = [f"{metric} {_number(metric, value)}" for metric, value in result["baselines"].items()]
        attention = result["task_options"]["attention"]
        cells = (f"`{name}`", f"`{attention}`", result["steps"], f"{result['training_cpu_seconds']:.0f}")
        rows.append("| " + " | ".join([*map(str, cells), ", ".join(test), ", ".join(beat) or "-"]) + " |")
    return "\n".join(rows)


def commands() -> str:
    """What repeats the runs: every option that is not the default, whatever the defaults were at the time."""
    found = runs()
    by_folder = {result["options"]["out"]: name for name, result in found}
    lines = []
    for name, result in found:
        task, given, options = TASKS[result["task"]], result["task_options"], result["options"]
        usual = {field.name: field.default for field in dataclasses.fields(task)}
        words = [
            _typed(key, value) for key, value in given.items() if value != usual[key] and key not in WITHOUT_EFFECT
        ]
        usual = {key: task.defaults.get(key, default) for key, _, default, _ in command.COMMON}
        if task.defaults.keys() & {"steps", "epochs"} and any(options[key] is not None for key in ("steps", "epochs")):
            usual |= {key: None for key in ("steps", "epochs") if options[key] is None}
        words += [
            _typed(key, options[key])
            for key in usual
            if key not in UNTOLD and options.get(key, usual[key]) != usual[key]
        ]
        if options["start"]:
            words.append(f"--from runs/{by_folder.get(options['start'], options['start'])}")
        words += [f"--freeze {pattern}" for pattern in options["freeze"]]
        lines.append(" ".join(["efficient-attn train", result["task"], *words, f"--out runs/{name}"]))
    return "\n".join(lines)


def _typed(key: str, value: Any) -> str:
    flag = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    text = str(value)
    return f"--{flag} " + (f'"{text}"' if re.search(r"[ &|;()]", text) else text)


def draw(path: Path) -> None:
    """A panel a task: its first metric in validation, run by run."""
    from matplotlib.figure import Figure

    by_task: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, result in runs():
        key = result["task"]
        if key == "forecast":
            key += f" {result['task_options']['series']}"
        if key == "digits" and result["task_options"]["labels_per_class"]:
            key += ", 10 labels a class"
        by_task.setdefault(key, []).append((name, result))
    columns = 3
    rows = -(-len(by_task) // columns)
    figure = Figure(figsize=(4 * columns, 2.8 * rows), layout="constrained")
    for place, (title, found) in enumerate(by_task.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        for name, result in found:
            metric = SHOWN[result["task"]][0]
            lines = [json.loads(line) for line in (RESULTS / name / "metrics.jsonl").read_text().splitlines()]
            points = [(line["step"], line[metric]) for line in lines if line["type"] == "eval"]
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel(f"{SHOWN[found[0][1]['task']][0]} (validation)", fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def page() -> str:
    """training.md with the part between the marks made anew."""
    text = PAGE.read_text(encoding="utf-8")
    made = f"{MARKS[0]}\n{table()}\n\n```\n{commands()}\n```\n{MARKS[1]}"
    return re.sub(f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}", lambda _: made, text, flags=re.DOTALL)


def _number(metric: str, value: float) -> str:
    return f"{value:.1%}" if metric in SHARES else f"{value:.2f}"


if __name__ == "__main__":
    draw(ROOT / "docs" / "training.png")
    PAGE.write_text(page(), encoding="utf-8")
