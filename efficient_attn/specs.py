"""Options as text and JSON: the fields of a dataclass, read by their declared types and written back.

Nothing is evaluated. Understood are int, float, bool, str, None, unions of these, and tuples (`64x128` in text, a list
in JSON).
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from .errors import InputError, InputTypeError


def kinds(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The type of each field of a dataclass with a `name`; raise InputError if one of the given is not among them."""
    hints = typing.get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for option in given:
        if option not in known:
            allowed = ", ".join(known) if known else "none"
            raise InputError(f"{cls.name} has no option {option!r}{hint(option, known)}; its options: {allowed}")
    return known


def hint(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def options(spec: Any) -> dict[str, Any]:
    """The fields of a dataclass object by name."""
    return {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}


def default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def write(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "x".join(map(write, value))
    return str(value)


def read(text: str, kind: Any, name: str, option: str) -> Any:
    """The value of type `kind` that `text` writes."""
    for choice in _choices(kind):
        if choice is types.NoneType and text == "none":
            return None
        if choice is bool and text in ("true", "false"):
            return text == "true"
        if choice is int or choice is float:
            try:
                return choice(text)
            except ValueError:
                continue
        if typing.get_origin(choice) is tuple and text == "none":
            return ()
        if typing.get_origin(choice) is tuple:
            return convert(
                [read(part, _element(choice), name, option) for part in text.split("x")], choice, name, option
            )
        if choice is str:
            return text
    raise InputError(f"{name}: {option}={text!r} is not {_describe(kind)}")


def convert(value: Any, kind: Any, name: str, option: str) -> Any:
    """Check a decoded JSON value against `kind`, and make a list the tuple that it stands for."""
    for choice in _choices(kind):
        if typing.get_origin(choice) is tuple and isinstance(value, (list, tuple)):
            arguments = typing.get_args(choice)
            if Ellipsis in arguments or len(arguments) == len(value):
                return tuple(convert(item, _element(choice), name, option) for item in value)
        elif choice is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        elif isinstance(choice, type) and type(value) is choice:
            return value
    raise InputTypeError(f"{name}: {option}={value!r} is not {_describe(kind)}")


def _choices(kind: Any) -> tuple[Any, ...]:
    """The members of a union, str last, for it reads anything."""
    members = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return tuple(sorted(members, key=lambda member: member is str))


def _element(kind: Any) -> Any:
    return typing.get_args(kind)[0]


def _describe(kind: Any) -> str:
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a word", types.NoneType: "none"}
    named = [
        words.get(c, f"{_describe(_element(c))} x ..." if typing.get_origin(c) is tuple else str(c))
        for c in _choices(kind)
    ]
    return " or ".join(named)
