"""Suite `fields`: text, images, series and CLIP at lengths where exact attention hurts, over several seeds.

* text: of which part of Python's library are 2,048 bytes of source?
* image: scikit-learn's digits enlarged to 32 x 32, a token a pixel: 1,025 tokens.
* series: 50,000 steps that repeat a random season of 1,000 steps, with noise and a level that wanders: a forecast that
  looks back less than a season knows nothing but the level. 2,048 steps are read, 1,024 tokens.
* clip: those digits and their names.

Each cell trains one model with one method and one seed; `docs/fields.py` makes the table of means and spreads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from efficient_attn.training.data import captions, images, series
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
STEPS, SEASON = 50_000, 1_000
METHODS = (
    "dense",
    "sliding_window:left=64,right=64",
    "bigbird:block=32,window=3,global_blocks=1,random_blocks=2",
    "nystrom:landmarks=32",
    "linformer:rank=64",
)
SEEDS, QUICK_SEEDS = 5, 2
QUICK_BATCH = 4  # with few steps: what a step costs, and no more than a first look at what is learned


class Larger:
    """Batches whose images are enlarged to SIDE x SIDE."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Tensor) -> Batch:
        batch = self.data.batch(indices)
        return batch | {"image": F.interpolate(batch["image"], (SIDE, SIDE), mode="bilinear")}


def larger(splits: Splits) -> Splits:
    """The splits with enlarged images."""
    parts = (Larger(part) for part in (splits.train, splits.valid, splits.test))
    return Splits(*parts, {**splits.about, "image_size": SIDE})


@dataclass(frozen=True)
class LargeDigits(Digits):
    name: ClassVar[str] = "image"

    def splits(self, seed: int) -> Splits:
        return larger(images.load(seed))


@dataclass(frozen=True)
class LargeClip(Clip):
    name: ClassVar[str] = "clip"

    def splits(self, seed: int) -> Splits:
        return larger(captions.load(seed, max_length=self.max_length))


@dataclass(frozen=True)
class LongSeries(Forecast):
    name: ClassVar[str] = "series"

    def splits(self, seed: int) -> Splits:
        return series.divide([long_series(seed)], SeriesReader(), self.context, self.horizon, SEASON)


def long_series(seed: int) -> Series:
    """The series of the suite: season + wandering level + noise, standard deviations 1, 0.01 a step, and 0.3."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    profile = normal(SEASON)
    values = profile.repeat(STEPS // SEASON) + 0.01 * normal(STEPS).cumsum(0) + 0.3 * normal(STEPS)
    nothing = torch.zeros(STEPS, 0, dtype=torch.float64)
    return Series("", ("y",), values[:, None], None, nothing, nothing, nothing[0], None)


SMALL = {"dim": 32, "layers": 2, "heads": 2}
# The task, its options, then batch and learning rate, and steps (quick and full).
FIELDS: Mapping[str, tuple[type[Task], Mapping[str, Any], Mapping[str, Any], int, int]] = {
    "text": (Bytes, {**SMALL, "max_length": 2048}, {"batch": 8, "lr": 2e-3}, 24, 400),
    "image": (LargeDigits, {**SMALL, "patch_size": 1, "overlap": 1}, {"batch": 16, "lr": 3e-3}, 24, 300),
    "series": (
        LongSeries,
        {**SMALL, "season": SEASON, "context": 2048, "horizon": 16, "patch": 4, "stride": 2, "dropout": 0.0},
        {"batch": 8, "lr": 2e-3},
        24,
        400,
    ),
    "clip": (
        LargeClip,
        {**SMALL, "patch_size": 1},
        {"batch": 16, "lr": 2e-3, "metric": "zero_shot"},
        24,
        300,
    ),
}


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """See `learning.learn`. `config`: field, method, steps, batch, lr, held_out, budget_s, threads, seed."""
    task, options, *_ = FIELDS[config["field"]]

    def make(attention: str) -> Task:
        return task(attention=attention, **options)

    return learning.learn(make, make("dense").splits(config["seed"]), config)


def configs(options: Options) -> Iterable[dict[str, Any]]:
    first = options.seed
    for seed in range(first, first + (QUICK_SEEDS if options.quick else SEEDS)):
        for field, (_, _, work, quick, full) in FIELDS.items():
            common = {**options.common(), **work, "seed": seed, "held_out": 64 if options.quick else 500}
            common |= {"batch": QUICK_BATCH} if options.quick else {}
            yield from grid(
                field=field, method=options.specs(METHODS), steps=quick if options.quick else full, **common
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
        Column("tokens", "tokens", "integer"),
        Column("step ms", "ms", "ms"),
        Column("vs dense", "speedup_dense", "times"),
        Column("MiB", "peak_bytes", "mib"),
    ),
    default=False,
)
