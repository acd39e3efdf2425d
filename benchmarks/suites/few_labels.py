"""Suite `few_labels`: what pre-training without labels is worth when each class of the digits has ten labels.

A ViT begins from nothing, or from a SimCLR or a masked autoencoder of all training images; then it is tuned on ten
images a class. A masked autoencoder needs patches that do not overlap, and so has a beginning from nothing of its own.
Rates and epochs are those of docs/training.md, chosen on seed 0; seeds from 1 count. The best step is chosen on the
validation images (180, with labels), for all alike.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from efficient_attn.training import TrainOptions, train
from efficient_attn.training.tasks.vision import Digits, MaskedAutoencoding, Pretraining, SimClr

from . import Column, Options, Suite

LABELS = 10
SEEDS, FIRST_SEED = 5, 1
EPOCHS = 100  # of tuning: two steps each
# What comes before, by which task, in how many epochs, and whether patches overlap.
BEFORE: tuple[tuple[str, int], ...] = (("none", 1), ("simclr", 1), ("none", 0), ("mae", 0))
PRETRAINING: Mapping[str, tuple[type[Pretraining], int]] = {"simclr": (SimClr, 30), "mae": (MaskedAutoencoding, 60)}


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracy on the test. `config`: before, overlap, attention, pretraining_epochs, epochs, threads, seed."""
    started = time.process_time()
    shared: dict[str, Any] = {"attention": config["attention"], "overlap": config["overlap"]}
    usual: dict[str, Any] = {"seed": config["seed"], "threads": config["threads"], "tensorboard": False}
    with tempfile.TemporaryDirectory() as place:
        start = None
        if config["before"] != "none":
            kind, _ = PRETRAINING[config["before"]]
            start = Path(place, "before")
            work = {key: value for key, value in kind.defaults.items() if key != "epochs"}
            train(kind(**shared), TrainOptions(start, epochs=config["pretraining_epochs"], **work, **usual))
        result = train(
            Digits(labels_per_class=LABELS, augment=True, **shared),
            TrainOptions(
                Path(place, "tuned"), epochs=config["epochs"], batch=50, lr=2e-3 if start is None else 1e-3,
                eval_every=50, start=start, **usual,
            ),
        )  # fmt: skip
    return {
        "score": round(result["test"]["accuracy"], 4),
        "score_is": "accuracy",
        "baseline": round(result["baselines"]["majority"], 4),
        "cpu_seconds": round(time.process_time() - started, 2),
    }


def configs(options: Options) -> Iterable[dict[str, Any]]:
    first = FIRST_SEED + options.seed
    for seed in range(first, first + (1 if options.quick else SEEDS)):
        for before, overlap in BEFORE:
            yield {
                "before": before,
                "overlap": overlap,
                "attention": (options.methods or ("dense",))[0],
                "pretraining_epochs": 0 if before == "none" else 1 if options.quick else PRETRAINING[before][1],
                "epochs": 5 if options.quick else EPOCHS,
                "threads": options.threads,
                "seed": seed,
            }


SUITE = Suite(
    name="few_labels",
    about=f"A ViT on scikit-learn's digits with {LABELS} labels a class: from nothing, after SimCLR, and after masked "
    "autoencoding of all training images without labels. accuracy: on 359 test images.",
    configs=configs,
    run_cell=run_cell,
    key=(
        Column("before", "before", "text"),
        Column("overlap", "overlap", "integer"),
        Column("seed", "seed", "integer"),
    ),
    columns=(
        Column("accuracy", "score", "percent"),
        Column("one class", "baseline", "percent"),
        Column("CPU s", "cpu_seconds"),
    ),
    series="before",
    default=False,
)
