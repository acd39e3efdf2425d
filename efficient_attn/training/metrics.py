"""What a run measures: `metrics.jsonl`, one line a logged step or validation, and TensorBoard's files."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from .checkpoint import write_whole

Record = dict[str, Any]

FILE = "metrics.jsonl"
# Numbers that are no curves.
NOT_PLOTTED = frozenset({"type", "split", "step", "seconds"})


def read(folder: Path) -> list[Record]:
    """The lines of a run's metrics; a last line that was torn by a power cut is left out."""
    found = []
    for line in (folder / FILE).read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


class Metrics:
    """Writes the metrics of a run.

    Args:
        folder: of the run.
        step, evaluated: of the checkpoint that it goes on from: lines of later steps and validations are dropped.
        tensorboard: whether to write TensorBoard's files; None if it is installed.

    Raises:
        UnsupportedError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, *, step: int, evaluated: int, tensorboard: bool | None) -> None:
        installed = importlib.util.find_spec("tensorboard") is not None
        if tensorboard and not installed:
            raise UnsupportedError("--tensorboard: it is not installed; pip install tensorboard, or leave it out")
        path = folder / FILE
        if path.exists():
            last = {"train": step, "eval": evaluated}
            kept = [line for line in read(folder) if line["step"] <= last.get(line["type"], step)]
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._board: Any = None
        if installed and tensorboard is not False:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, record: Record) -> None:
        """Append a line; `type` and `step` say where it belongs."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            place = record.get("split", record["type"])
            for name, value in record.items():
                if name not in NOT_PLOTTED:
                    self._board.add_scalar(f"{place}/{name}", value, record["step"])

    def sync(self) -> None:
        """Until all lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
