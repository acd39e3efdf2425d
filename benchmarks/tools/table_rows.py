"""The rows of a table in a JSONL file, of which a run makes some anew."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def replace_rows(
    path: Path, rows: Sequence[Row], of: Callable[[Row], Hashable], place: Callable[[Row], Any] | None = None
) -> list[Row]:
    """Put rows in the place of those of the same key, `of` a row, and return all. They lie in the order of `place`, of
    which None is for rows of what is no more; without it new ones are last. A crash loses nothing."""
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    new = set(map(of, rows))
    kept = [row for row in kept if of(row) not in new] + list(rows)
    if place is not None:
        kept = sorted((row for row in kept if place(row) is not None), key=place)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
    os.replace(partial, path)
    return kept
