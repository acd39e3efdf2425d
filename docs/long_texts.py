"""Writes long texts whose class is told by their end: python docs/long_texts.py FOLDER

A text is 3,000 characters of source files that tell nothing, for all texts from one folder of Python's library, then
1,500 characters of a file of its class, which is the folder that it is from. A model that reads 512 tokens sees none of
these. The files of the training, validation and test part differ. FOLDER gets train.csv, valid.csv and test.csv, for
`efficient-attn train text`.
"""

from __future__ import annotations

import csv
import random
import sys
import sysconfig
from pathlib import Path

CLASSES = ("asyncio", "email", "xml")
NOTHING = "idlelib"  # the editor
BEFORE, END = 3_000, 1_500
COUNTS = {"train": 60, "valid": 15, "test": 60}


def pieces(folder: Path, size: int) -> dict[str, list[str]]:
    """Pieces of so many characters of the folder's source files, a split's from files of its own."""
    found: dict[str, list[str]] = {split: [] for split in COUNTS}
    for number, file in enumerate(sorted(folder.rglob("*.py"))):
        text = file.read_text(encoding="utf-8", errors="replace")
        split = ("train", "test", "train", "test", "valid")[number % 5]
        found[split] += [text[start : start + size] for start in range(0, len(text) - size + 1, size)]
    return found


def main(out: Path) -> None:
    library, rng = Path(sysconfig.get_paths()["stdlib"]), random.Random(0)
    nothing = pieces(library / NOTHING, BEFORE)
    ends = {name: pieces(library / name, END) for name in CLASSES}
    out.mkdir(parents=True, exist_ok=True)
    for split, count in COUNTS.items():
        rows = []
        for name in CLASSES:
            chosen = rng.sample(ends[name][split], count // len(CLASSES))
            rows += [(rng.choice(nothing[split]) + end, name) for end in chosen]
        with (out / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
