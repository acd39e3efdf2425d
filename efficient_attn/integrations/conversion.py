"""`Conversion`: what `convert` did, as text, as a figure and as a page, and how it is undone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..methods import Method
from . import fidelity
from .fidelity import Cost, LayerFidelity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .budget import Found, Plan


@dataclass
class Conversion:
    """What `convert` did.

    Attributes:
        attention: the method that the model has now; with a plan, that of the layers it does not name.
        plan: with `budget` or `plan`, which layer has which method; plan.save("plan.json").
        found: with `budget`, what the search found: figures of calibration, trials, speed-up, shares of hybrids.
        converted: name of a module ("" is the model) -> what it is and how it was converted.
        skipped: name of a module that looks like attention and was left alone -> why.
        dense_error: with a sample, the largest difference between the original's outputs and those of the converted
            model with dense attention, relative to the largest output; None without a sample.
        error: the same for the chosen attention: what the method changes.
        layers: with a sample, name of a layer that attends -> its errors, in the order in which they ran.
        unreached: with a sample, name of a converted module, or of an attention layer in one, that ran (or did not)
            without calling this package's attention -> its class. Nothing has changed there.
        before, after: with a sample, time and memory of a forward of the original and of the converted model.
    """

    attention: Method
    converted: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    dense_error: float | None = None
    error: float | None = None
    layers: dict[str, LayerFidelity] = field(default_factory=dict)
    unreached: dict[str, str] = field(default_factory=dict)
    before: Cost | None = None
    after: Cost | None = None
    plan: Plan | None = None
    found: Found | None = None
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def is_dense(self) -> bool:
        """Whether the model attends densely now."""
        return self.attention.is_dense and (self.plan is None or self.plan.is_dense)

    def undo(self) -> None:
        """Give the model its old attention back; parameters that were trained meanwhile stay as they are."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        named = "by a plan" if self.plan is not None else str(self.attention)
        lines = [f"attention: {named}", f"converted: {len(self.converted)}"]
        lines += [f"  {name or '(the model)'}: {how}" for name, how in self.converted.items()]
        lines += [f"left alone: {len(self.skipped)}"] if self.skipped else []
        lines += [f"  {name}: {why}" for name, why in self.skipped.items()]
        lines += [f"never reached on the sample: {len(self.unreached)}"] if self.unreached else []
        lines += [f"  {name}: {kind}" for name, kind in self.unreached.items()]
        if self.dense_error is not None:
            lines.append(f"with dense attention: equal to the original within {self.dense_error:.1e}")
        if self.error is not None:
            lines.append(f"with attention {named}: differs from the original by {self.error:.1e}")
        if self.plan is not None:
            lines += [f"  {name}: {spec}" for name, spec in self.plan.layers.items()]
        lines += [str(self.found)] if self.found is not None else []
        return "\n".join(lines + fidelity.table(self.layers, self.before, self.after))

    def save_page(self, path: str | PathLike[str]) -> None:
        """Write what the search found as one HTML page that needs no network.

        Raises:
            InputError: there was no search, which `budget=` starts.
        """
        if self.found is None:
            raise InputError("there was no search; give convert a budget=")
        from .budget.page import page

        Path(path).write_text(page(self.found, self.layers, self.before, self.after), encoding="utf-8")

    def plot(self, path: str | PathLike[str] | None = None) -> Figure:
        """Draw the errors of the layers, time and memory; also written to `path` (its ending says as what) if given.

        Raises:
            InputError: the conversion had no sample. UnsupportedError: matplotlib is not installed.
        """
        if not self.layers:
            raise InputError("nothing was measured; give convert a sample=")
        error = self.dense_error if self.error is None else self.error
        title = f"{self.attention}: outputs differ from the original by {error:.1e}"
        return fidelity.plot(title, self.layers, self.before, self.after, path)
