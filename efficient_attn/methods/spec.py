"""From what a user writes to a method and back: `parse("bigbird:block=64")`, `from_json(...)`, and the table of all.

A spec is `name` or `name:key=value,key=value`. Tuples are written with x (`64x128`), nothing as `none`. Patterns join
as `a & b` and `a | b`, in parentheses where needed, and `per_head(a; b)` gives each head its own. A hybrid is `a + b`,
a pattern and a tail. `options.py` reads and writes a single name with its options, and JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import backends
from ..errors import InputError, InputTypeError
from ..options import MAX_DEPTH, Named, read_spec, write
from ..patterns import Combined, Pattern, PerHead
from .base import METHODS, TAILS, Method
from .sparse import Sparse

BACKENDS = [name for name in backends.BACKENDS if name not in backends.EXPERIMENTAL]  # of every method


def parse(spec: str | Method | Pattern) -> Method:
    """The method that a spec names; a `Method` is returned as it is, a `Pattern` as `Sparse(pattern)`.

    Raises:
        InputError: unknown names or options, values out of range.
        InputTypeError: not a spec.
        UnsupportedError: &, | or per_head around what is no pattern.
    """
    if isinstance(spec, str):
        spec = _read(spec.strip(), 0)
    if isinstance(spec, Pattern):
        return Sparse(spec)
    if not isinstance(spec, Method):
        raise InputTypeError(
            f"a method is a spec such as 'bigbird:block=64', a Method or a Pattern; got {type(spec).__name__}"
        )
    return spec


def from_json(given: str | Mapping[str, Any]) -> Method:
    """The method that a JSON object (its text, or the decoded mapping) describes; options left out have their default.

    Raises:
        InputError: not such an object, unknown names or options, values out of range.
        InputTypeError: values of a wrong type.
    """
    return parse(Method.from_json(given))


def methods_table() -> list[dict[str, str]]:
    """One row a method and a tail, for documentation: what the class attributes say, parameters and backends."""
    rows = [_row(cls.name, cls(), parse(cls())) for cls in METHODS.values()]
    return rows + [_row(f"...+{cls.name}", cls(), cls()) for cls in TAILS.values()]


def _row(name: str, spec: Named, method: Any) -> dict[str, str]:
    return {
        "name": name,
        "formula": spec.formula,
        "paper": spec.paper,
        "complexity": spec.complexity,
        "exact": "yes" if method.exact else "no",
        "causal": "yes" if method.accepts_causal else "no",
        "mask": "yes" if method.accepts_mask else "padding only",
        "parameters": ", ".join(f"{option}={write(getattr(spec, option))}" for option in spec.kinds) or "-",
        "backends": ", ".join(BACKENDS),
    }


def _read(text: str, depth: int) -> Any:
    """One spec, or several with operators: | binds less than &, parentheses and per_head(a; b) hold further ones."""
    if depth > MAX_DEPTH:
        raise InputError(f"methods are combined more than {MAX_DEPTH} deep in {text!r}")
    joined = _split(text, "+")
    if len(joined) > 2:
        raise InputError(f"{text!r} joins {len(joined)} parts; a hybrid is one sparse method + one tail")
    if len(joined) == 2:
        hybrid = Method.compounds["hybrid"]
        tail = hybrid.kinds["tail"].types[0]
        return hybrid(_read(joined[0], depth + 1), read_spec(joined[1], tail))
    for symbol, operator in (("|", "or"), ("&", "and")):
        parts = _split(text, symbol)
        if len(parts) > 1:
            return Combined(operator, tuple(_read(part, depth + 1) for part in parts))
    name, bracket, inside = text.partition("(")
    if bracket and name.strip() in ("", "per_head") and text.endswith(")"):
        if not name:
            return _read(inside[:-1].strip(), depth + 1)
        return PerHead(tuple(_read(part, depth + 1) for part in _split(inside[:-1], ";")))
    name = text.partition(":")[0].strip()
    if name in TAILS and name not in METHODS:
        raise InputError(f"{name} stands behind an exact sparse method; write sliding_window+{name}")
    return read_spec(text, Method)


def _split(text: str, symbol: str) -> list[str]:
    """The parts of a text between symbols that stand outside of parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
        if letter == symbol and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if depth != 0:
        raise InputError(f"the parentheses of {text!r} do not match")
    return [part.strip() for part in parts]
