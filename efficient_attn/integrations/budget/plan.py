"""The plan: which layer has which attention, as JSON that is applied again with `convert(model, plan=...)`.

Parameters that were distilled lie in a file beside it: plan.json and plan.pt.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import InputError, InputTypeError
from ...methods import Method, parse
from .layers import State

FORMAT = "efficient-attn plan"
VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Names of attention layers, as in `model.named_modules()`, and their methods; all others are dense.

    Fields:
        layers: name -> spec, those that stay dense too, so that another model is told from this one.
        about: what is known of it: budget, error, speed-up, length, machine. Says nothing about what is applied.
        fitted: name -> distilled parameters of its method.
    """

    layers: Mapping[str, str]
    about: Mapping[str, Any] = field(default_factory=dict)
    fitted: Mapping[str, State] = field(default_factory=dict)

    @property
    def methods(self) -> dict[str, Method]:
        """Name -> method."""
        return {name: parse(spec) for name, spec in self.layers.items()}

    @property
    def is_dense(self) -> bool:
        """Whether it changes nothing but the kernels."""
        return all(method.is_dense for method in self.methods.values())

    def check(self, model: nn.Module) -> None:
        """Raise InputError unless the model has all layers."""
        names = {name for name, _ in model.named_modules()}
        missing = [name for name in self.layers if name not in names]
        if missing:
            near = difflib.get_close_matches(missing[0], names, 1)
            hint = f"; did you mean the model that has {near[0]!r}?" if near else ""
            raise InputError(
                f"the plan is for another model: {type(model).__name__} has no module {missing[0]!r}"
                f"{f' and {len(missing) - 1} others of it' if missing[1:] else ''}{hint}"
            )

    def to_json(self) -> str:
        """As text, without distilled parameters, whose layers it names."""
        content = {"format": FORMAT, "version": VERSION, "layers": dict(self.layers), "about": dict(self.about)}
        content |= {"distilled": list(self.fitted)} if self.fitted else {}
        return json.dumps(content, indent=2) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` into a file, whole or not at all; distilled parameters into one that ends in .pt, first."""
        if self.fitted:
            file = _beside(path)
            part = Path(f"{file}.part")
            torch.save({name: [list(s.sizes), dict(s.tensors)] for name, s in self.fitted.items()}, part)
            part.replace(file)
        part = Path(f"{os.fspath(path)}.part")
        part.write_text(self.to_json(), encoding="utf-8")
        part.replace(path)


def _beside(path: str | os.PathLike[str]) -> Path:
    return Path(path).with_suffix(".pt")


def read(given: Plan | Mapping[str, Any] | str | os.PathLike[str]) -> Plan:
    """A plan: as it is, its JSON as a mapping, or the path of a file.

    Raises:
        InputError: no such file, no plan, specs that are none, or distilled parameters that are not beside the file.
        InputTypeError: something else.
    """
    file = _beside(given) if isinstance(given, (str, os.PathLike)) else None
    if isinstance(given, Plan):
        return _checked(given)
    if isinstance(given, (str, os.PathLike)):
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"the plan {os.fspath(given)} cannot be read: {error.strerror}") from None  # type: ignore[arg-type]
        except ValueError as error:
            raise InputError(f"the plan is not JSON: {error}") from None
    if not isinstance(given, Mapping):
        raise InputTypeError(f"a plan is a Plan, its JSON as a mapping or a path; got {type(given).__name__}")
    if given.get("format") != FORMAT or not isinstance(given.get("layers"), Mapping):
        raise InputError(f"no plan: 'format' must be {FORMAT!r} and 'layers' a mapping of names to specs")
    if given.get("version") != VERSION:
        raise InputError(f"the plan has version {given.get('version')!r}; this package reads version {VERSION}")
    about = given.get("about", {})
    fitted = _fitted(given["distilled"], file) if given.get("distilled") else {}
    return _checked(Plan(dict(given["layers"]), dict(about) if isinstance(about, Mapping) else {}, fitted))


def _fitted(names: Any, file: Path | None) -> dict[str, State]:
    """The distilled parameters that lie beside a plan."""
    if file is None or not file.is_file():
        where = "give convert the path of the plan's file" if file is None else f"there is no {file}"
        raise InputError(f"the plan has distilled parameters, which save() writes into a .pt beside it: {where}")
    found = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(names, list) or set(names) != set(found):
        raise InputError(f"{file} holds parameters of other layers than the plan names; save() writes both")
    return {name: State(tuple(sizes), tensors) for name, (sizes, tensors) in found.items()}


def _checked(plan: Plan) -> Plan:
    for name, spec in plan.layers.items():
        if not isinstance(name, str) or not isinstance(spec, str):
            raise InputError(f"the plan's layers must be names and specs, both text; got {name!r}: {spec!r}")
        parse(spec)
    return plan
