"""Modules that are imported when another is, so that importing this package does not import the other."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _Follow(MetaPathFinder):
    """Finds one module as it would be found anyway, and has another imported behind it."""

    def __init__(self, first: str, second: str) -> None:
        self.first, self.second = first, second

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.first:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def both(module: ModuleType) -> None:
                run(module)
                importlib.import_module(self.second)

            spec.loader.exec_module = both  # type: ignore[method-assign]
        return spec


def when_imported(first: str, second: str) -> None:
    """Import the module `second` as soon as `first` is imported: now, if it has been."""
    if first in sys.modules:
        importlib.import_module(second)
    else:
        sys.meta_path.insert(0, _Follow(first, second))
