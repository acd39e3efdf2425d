"""Triton's interpreter, quicker: it spends a third of its time on patching triton.language anew at every call."""

from __future__ import annotations

import inspect
from typing import Any

from triton.runtime import interpreter


class _Lasting:
    """What a patch returns; nothing is undone, for such a process interprets to its end."""

    def restore(self) -> None: ...


def patch_once() -> None:
    """Let the interpreter patch the modules that a function sees at the first call that sees them, and never again."""
    patch, patched = interpreter._patch_lang, set()

    def once(function: Any) -> _Lasting:
        seen = frozenset(id(value) for value in function.__globals__.values() if inspect.ismodule(value))
        if seen not in patched:
            patched.add(seen)
            patch(function)
        return _Lasting()

    interpreter._patch_lang = once
