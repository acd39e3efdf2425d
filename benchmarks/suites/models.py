"""Suite `models`: whole models end to end: a text classifier, a vision transformer, a forecaster, and CLIP.

The tasks and data are those of `efficient-attn train`; each is trained for some steps with the same seed and data
order for every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from efficient_attn.training.task import Task
from efficient_attn.training.tasks import TASKS

from .. import learning
from . import Chart, Claim, Column, Options, Row, Suite, grid, groups

# Options of the task; then batch, learning rate, and steps (quick and full).
MODELS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], int, int]] = {
    "bytes": ({"max_length": 512}, {"batch": 16, "lr": 2e-3}, 100, 300),
    "digits": ({"layers": 2, "patch_size": 1}, {"batch": 64, "lr": 3e-3}, 120, 300),
    "forecast": ({"patch": 4, "stride": 1}, {"batch": 32, "lr": 2e-3}, 100, 300),
    "clip": ({"patch_size": 1}, {"batch": 32, "lr": 2e-3, "metric": "zero_shot"}, 100, 300),
}
ABOUT = {
    "bytes": "TextClassifier on bytes of Python's library",
    "digits": "ViT on digits, a token a pixel",
    "forecast": "PatchForecaster on sunspots",
    "clip": "CLIP on digits and their names, the image tower's attention",
}
METHODS = (
    "dense",
    "sliding_window:left=16,right=16",
    "bigbird:block=16,window=1,global_blocks=1,random_blocks=1",
    "linformer:rank=32",
    "nystrom:landmarks=16",
    "performer:features=64",
    "linear",
)
QUICK_METHODS = ("dense", "sliding_window:left=16,right=16", "nystrom:landmarks=16", "linear")


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """See `learning.learn`. `config`: model, options (of its task), method, steps, batch, lr, held_out, budget_s,
    threads, seed."""

    def make(attention: str) -> Task:
        return TASKS[config["model"]](attention=attention, **config["options"])

    found = learning.learn(make, make("dense").splits(config["seed"]), config)
    return {**found, "about": ABOUT[config["model"]]}


def configs(options: Options) -> Iterable[dict[str, Any]]:
    methods = options.specs(QUICK_METHODS if options.quick else METHODS)
    for model, (task, work, quick_steps, steps) in MODELS.items():
        count = quick_steps if options.quick else steps
        common: dict[str, Any] = {**work, "steps": count, "held_out": 500, **options.common()}
        yield from grid(model=model, method=methods, options=dict(task), **common)


def claims(rows: Sequence[Row]) -> list[Claim]:
    found = []
    for (model,), mine in groups(rows, "model").items():
        exact = next((row for row in mine if row["method"] == "dense"), None)
        fastest = max(mine, key=lambda row: row["speedup_dense"])
        if exact and fastest["speedup_dense"] > 1:
            text = f"{ABOUT[model]}: a training step with {fastest['method']} has {fastest['speedup_dense']:.2f}x the "
            text += (
                f"speed of exact attention's; {fastest['score_is']} {fastest['score']:.3f} beside {exact['score']:.3f}."
            )
            found.append(Claim(text, (fastest["id"], exact["id"])))
    return found


SUITE = Suite(
    name="models",
    about="Models end to end, trained for some steps with the same seed and data order for every method. score: the "
    "task's metric on held-out examples (accuracy, of zero_shot too: higher is better; mase: lower is better).",
    configs=configs,
    run_cell=run_cell,
    key=(
        Column("model", "model", "text"),
        Column("method", "method", "text"),
        Column("steps", "steps", "integer"),
    ),
    columns=(
        Column("score", "score"),
        Column("score is", "score_is", "text"),
        Column("step ms", "ms", "ms"),
        Column("vs dense", "speedup_dense", "times"),
        Column("train/s", "examples_per_s", "integer"),
        Column("infer/s", "inference_per_s", "integer"),
        Column("infer vs dense", "forward_speedup", "times"),
        Column("MiB", "peak_bytes", "mib"),
    ),
    charts=(
        Chart("Score against speed", "examples_per_s", "score", "training examples a second", "score",
              split=("model",), log_y=False, lines=False),
    ),
    claims=claims,
)  # fmt: skip
