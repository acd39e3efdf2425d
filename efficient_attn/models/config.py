"""Configs of models: frozen dataclasses, nested, as JSON and back."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from .. import options
from ..errors import InputError

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as a dictionary that JSON can hold."""
    return dataclasses.asdict(config)


def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
    """The config that `to_dict` wrote; fields that are left out have their default.

    Raises:
        InputError: a field that the config does not have, or a value that it refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(typing.cast(Any, cls))}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise InputError(
                f"{cls.__name__} has no field {name!r}{options.hint(name, dict.fromkeys(fields))}; its fields: "
                f"{', '.join(sorted(fields))}"
            )
        nested = dataclasses.is_dataclass(hints[name]) and isinstance(value, Mapping)
        given[name] = from_dict(hints[name], value) if nested else _tuples(value)
    return cls(**given)


def merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes`, where a mapping changes a mapping field by field."""
    merged = dict(values)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def nested(cls: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes in which a field that only one part of the config has may stand for itself: image_size=32 is
    backbone={"image_size": 32}."""
    own = {field.name for field in dataclasses.fields(cls)}
    parts = {
        name: {field.name for field in dataclasses.fields(hint)}
        for name, hint in typing.get_type_hints(cls).items()
        if dataclasses.is_dataclass(hint)
    }
    found: dict[str, Any] = {}
    for name, value in changes.items():
        homes = [part for part, fields in parts.items() if name in fields]
        if name not in own and len(homes) == 1:
            found = merge(found, {homes[0]: {name: value}})
        else:
            found = merge(found, {name: value})
    return found


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def replace_at(config: C, path: str, value: Any) -> C:
    """The config with another value at a path such as "vision.encoder"."""
    name, _, rest = path.partition(".")
    inner = replace_at(getattr(config, name), rest, value) if rest else value
    return typing.cast(C, dataclasses.replace(typing.cast(Any, config), **{name: inner}))
