"""Suite `fields`: text, images, series and CLIP at lengths where exact attention hurts, over several seeds.

* text: of which part of Python's library are 2,048 bytes of source?
* image: scikit-learn's digits enlarged to 32 x 32, a token a pixel: 1,025 tokens.
* series: 50,000 steps that repeat a random season of 1,000 steps (white noise, each step the sum of 8 neighbours), with
  noise and a level that wanders: a forecast that looks back less than a season knows little but the level. 2,048 steps
  are read, 1,024 tokens. `short series`: of these all but the last 512 are missing, for exact attention alone.
* clip: those digits and their names.

Each cell trains one model with one method and one seed. On seed 0 learning rates and data were chosen: the seeds that
count come after it. What a step takes is the suite `fields_cost`, so that it can be measured while nothing else runs;
`docs/fields.py` makes the table of both.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from efficient_attn.training.data import series
from efficient_attn.training.data.base import Batch, Dataset, Splits
from efficient_attn.training.data.series_reader import Series, SeriesReader
from efficient_attn.training.task import Task
from efficient_attn.training.tasks.pairs import Clip
from efficient_attn.training.tasks.series import Forecast
from efficient_attn.training.tasks.text import Bytes
from efficient_attn.training.tasks.vision import Digits

from .. import learning
from . import Column, Options, Suite, grid

SIDE = 32
STEPS, SEASON, SMOOTH = 50_000, 1_000, 8
SHORT = 512
METHODS = (
    "dense",
    "sliding_window:left=64,right=64",
    "bigbird:block=32,window=3,global_blocks=1,random_blocks=2",
    "nystrom:landmarks=32",
    "linformer:rank=64",
)
SEEDS, QUICK_SEEDS = 5, 2
FIRST_SEED = 1
QUICK_STEPS, QUICK_BATCH = 24, 4  # no more than a first look at what is learned


@dataclass(frozen=True)
class LongSeries(Forecast):
    name: ClassVar[str] = "series"

    recent: int | None = None  # steps of the past that are known; the others are missing

    def splits(self, seed: int) -> Splits:
        found = series.divide([long_series(seed)], SeriesReader(), self.context, self.horizon, SEASON)
        if self.recent is None:
            return found
        train, valid, test = (Recent(part, self.recent) for part in (found.train, found.valid, found.test))
        return Splits(train, valid, test, found.about)


@dataclass(frozen=True)
class Recent:
    """Windows of whose past only the last steps are known."""

    windows: Dataset
    steps: int

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, indices: Tensor) -> Batch:
        found = self.windows.batch(indices)
        past = found["past"].clone()
        past[:, : -self.steps] = torch.nan
        return found | {"past": past}


def long_series(seed: int) -> Series:
    """The series of the suite: season + wandering level + noise, standard deviations 1, 0.01 a step, and 0.3."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    white = normal(SEASON)
    profile = torch.stack([white.roll(step) for step in range(SMOOTH)]).sum(0) / SMOOTH**0.5
    values = profile.repeat(STEPS // SEASON) + 0.01 * normal(STEPS).cumsum(0) + 0.3 * normal(STEPS)
    nothing = torch.zeros(STEPS, 0, dtype=torch.float64)
    return Series("", ("y",), values[:, None], None, nothing, nothing, nothing[0], None)


@dataclass(frozen=True)
class Field:
    """The task and its options, batch, peak learning rate and steps, and by which methods it is trained."""

    task: type[Task]
    options: Mapping[str, Any]
    batch: int
    lr: float
    steps: int
    metric: str | None = None
    methods: tuple[str, ...] | None = None  # these alone, whatever is asked for

    def trained(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """Its methods, where those were asked for (none: all)."""
        return self.methods or asked or METHODS

    def make(self, attention: str) -> Task:
        return self.task(attention=attention, **self.options)

    def splits(self, seed: int) -> Splits:
        return self.make("dense").splits(seed)


SMALL = {"dim": 32, "layers": 2, "heads": 2}
# A token is a pixel, of which it reads the 7 x 7 around it: 2 x 2 of the digits'.
PIXELS = {**SMALL, "image_size": SIDE, "patch_size": 1, "overlap": 3, "augment": False}
SERIES = {**SMALL, "season": SEASON, "horizon": 16, "patch": 4, "stride": 2, "dropout": 0.0}
FIELDS: Mapping[str, Field] = {
    "text": Field(Bytes, {**SMALL, "max_length": 2048}, batch=8, lr=2e-3, steps=200),
    "image": Field(Digits, PIXELS, batch=16, lr=5e-3, steps=200),
    # The head reads all tokens at once, which makes the learning rate small.
    "series": Field(LongSeries, {**SERIES, "context": 2048}, batch=8, lr=1e-4, steps=200),
    "short series": Field(
        LongSeries, {**SERIES, "context": 2048, "recent": SHORT}, batch=8, lr=1e-4, steps=200, methods=("dense",)
    ),
    "clip": Field(Clip, PIXELS, batch=16, lr=5e-3, steps=200, metric="zero_shot"),
}


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """See `learning.reached`. `config`: field, method, steps, batch, lr, held_out, metric, threads, seed."""
    started = time.process_time()  # of all threads, data and test included: what else runs adds little
    field = FIELDS[config["field"]]
    found = learning.reached(field.make, field.splits(config["seed"]), config)
    return {**found, "cpu_seconds": round(time.process_time() - started, 2)}


def configs(options: Options) -> Iterable[dict[str, Any]]:
    """Whole sets of fields and methods, seed after seed."""
    seeds = QUICK_SEEDS if options.quick else SEEDS
    for seed in range(FIRST_SEED + options.seed, FIRST_SEED + options.seed + seeds):
        for name, field in FIELDS.items():
            yield from grid(
                field=name,
                method=field.trained(options.methods),
                steps=QUICK_STEPS if options.quick else field.steps,
                batch=QUICK_BATCH if options.quick else field.batch,
                lr=field.lr,
                held_out=64 if options.quick else 500,
                **({"metric": field.metric} if field.metric else {}),
                threads=options.threads,
                seed=seed,
            )


SUITE = Suite(
    name="fields",
    about="Text, images, series and CLIP at 1,000 to 2,000 tokens over several seeds. score: the task's metric on "
    "held-out examples (accuracy, of zero_shot too: higher is better; mase: lower is better).",
    configs=configs,
    run_cell=run_cell,
    key=(
        Column("field", "field", "text"),
        Column("method", "method", "text"),
        Column("seed", "seed", "integer"),
        Column("steps", "steps", "integer"),
    ),
    columns=(
        Column("score", "score"),
        Column("score is", "score_is", "text"),
        Column("loss", "loss"),
        Column("trained s", "trained_s"),
        Column("CPU s", "cpu_seconds"),
    ),
    default=False,
)
