"""What a user can name: patterns, methods and the tails of hybrids, and their options as text and JSON.

Each is a small frozen dataclass with a `name`, whose fields are its options. The declared type of a field says what it
may hold, and constructors, text and JSON go by it alike: int, float, bool, str, None, unions of these, tuples (`64x128`
in text, a list in JSON; one item alone stands for a tuple of one), and further such objects. Nothing is evaluated.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

from .errors import InputError, InputTypeError

MAX_OPTION = 2**31 - 1
MAX_DEPTH = 16  # of objects in one another
WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a word", types.NoneType: "none"}

C = TypeVar("C", bound="type[Named]")
N = TypeVar("N", bound="Named")


class Kind(NamedTuple):
    """What an option may hold: a value of one of `types`, or a tuple of `element`s, of a `length` if that is given."""

    types: tuple[type, ...]
    element: Kind | None = None
    length: int | None = None

    def __str__(self) -> str:
        words = [WORDS.get(one, f"a {getattr(one, 'family', one)}") for one in self.types]
        return " or ".join(words if self.element is None else [f"{self.element} x ...", *words])


class Named:
    """Base of what a user can name. Subclasses are frozen dataclasses, made known by `register`.

    Class attributes describe it: `name` in text and JSON, `formula`, `paper` and `complexity` (time) in the tables. The
    base of each family says what it is called (`family`) and where its classes are kept: those that text names
    (`registry`), and those made of other such objects, which text writes with operators (`compounds`).
    """

    family: ClassVar[str]
    registry: ClassVar[MutableMapping[str, Any]]
    compounds: ClassVar[MutableMapping[str, Any]]
    kinds: ClassVar[Mapping[str, Kind]] = {}

    name: ClassVar[str]
    formula: ClassVar[str] = "-"
    paper: ClassVar[str] = "-"
    complexity: ClassVar[str] = "-"

    def __post_init__(self) -> None:
        # torch.compile traces this where a program makes a pattern.
        for option, kind in self.kinds.items():
            object.__setattr__(self, option, convert(getattr(self, option), kind, self.name, option))
        self.check()

    def check(self) -> None:
        """Raise InputError where the options, of the right types by now, do not make sense."""

    def to_json(self) -> str:
        """This with all its options as a JSON object, which `from_json` reads."""
        # Written by hand because torch.compile traces it.
        options = "".join([f', "{option}": {_json(getattr(self, option))}' for option in self.kinds])
        return f'{{"method": "{self.name}"{options}}}'

    @classmethod
    def from_json(cls: type[N], given: str | Mapping[str, Any]) -> N:
        """What a JSON object (its text, or the decoded mapping) describes; options left out have their default.

        Raises:
            InputError: not such an object, unknown names or options, values out of range.
            InputTypeError: values of a wrong type.
        """
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"this is not JSON ({error}); a {cls.family} is {_example(cls)}") from None
        found: N = _from_mapping(given, cls, 0)
        return found

    def __str__(self) -> str:
        """The shortest text that `parse` reads as this: options at their default are left out."""
        changed = [
            f"{field.name}={write(getattr(self, field.name))}"
            for field in dataclasses.fields(typing.cast(Any, self))
            if getattr(self, field.name) != _default(field)
        ]
        return self.name + (":" + ",".join(changed) if changed else "")


def register(cls: C) -> C:
    """Class decorator: make a frozen dataclass known by its name in text, JSON and the tables."""
    hints = typing.get_type_hints(cls)
    cls.kinds = {field.name: kind_of(hints[field.name]) for field in dataclasses.fields(typing.cast(Any, cls))}
    (cls.compounds if any(_holds_named(kind) for kind in cls.kinds.values()) else cls.registry)[cls.name] = cls
    return cls


# --- checks of options ---


def check_range(spec: Any, option: str, least: float, most: float = MAX_OPTION) -> None:
    """Raise InputError unless an option, or each item of a tuple, lies in least..most; None passes."""
    value = getattr(spec, option)
    for item in value if isinstance(value, tuple) else (value,):
        if item is not None and not least <= item <= most:
            limit = f">= {least}" if most >= MAX_OPTION and item < least else f"from {least} to {most}"
            note = " (-1: unlimited)" if least == -1 else ""
            raise InputError(f"{spec.name}: {option} must be {limit}{note}, got {value!r}")


def check_choice(spec: Any, option: str, allowed: Sequence[str]) -> None:
    """Raise InputError unless an option is one of the allowed words."""
    value = getattr(spec, option)
    if value not in allowed:
        raise InputError(f"{spec.name}: {option} must be one of {', '.join(allowed)}; got {value!r}")


# --- values by declared types ---


def kind_of(hint: Any) -> Kind:
    """The `Kind` of a declared type.

    Raises:
        TypeError: a type that text cannot write.
    """
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    tuples = [member for member in members if typing.get_origin(member) is tuple]
    plain = tuple(member for member in members if member not in tuples)
    for member in plain:
        if not (isinstance(member, type) and (member in WORDS or issubclass(member, Named))):
            raise TypeError(f"an option cannot be declared as {member}; use int, float, bool, str, None and tuples")
    if len(tuples) > 1:
        raise TypeError(f"an option can be one kind of tuple, not {hint}")
    if not tuples:
        return Kind(plain)
    items = typing.get_args(tuples[0])
    return Kind(plain, kind_of(items[0]), None if Ellipsis in items else len(items))


def convert(value: Any, kind: Kind, name: str, option: str, depth: int = 0) -> Any:
    """A value as its kind has it: a list or one item as a tuple, an int as a float, an object from its JSON.

    Raises:
        InputTypeError: a value of another kind.
    """
    if isinstance(value, kind.types) and (not isinstance(value, bool) or bool in kind.types):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and float in kind.types:
        return float(value)
    if kind.element is not None:
        items = value if isinstance(value, (list, tuple)) else (value,)
        if kind.length is None or kind.length == len(items):
            return tuple([convert(item, kind.element, name, option, depth) for item in items])
    elif len(kind.types) == 1 and issubclass(kind.types[0], Named):
        # What is no JSON is for the class itself to refuse.
        return _from_mapping(value, kind.types[0], depth + 1) if isinstance(value, Mapping) else value
    raise InputTypeError(f"{name}: {option}={value!r} is not {kind}")


def read(text: str, kind: Kind, name: str, option: str) -> Any:
    """The value of a kind that a text writes.

    Raises:
        InputError: the text writes no such value.
    """
    if text == "none" and (types.NoneType in kind.types or kind.element is not None):
        return None if types.NoneType in kind.types else ()
    if bool in kind.types and text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        if number in kind.types:
            try:
                return number(text)
            except ValueError:
                continue
    if kind.element is not None:
        items = text.split("x")
        if kind.length in (None, len(items)):
            return tuple(read(item, kind.element, name, option) for item in items)
    if str in kind.types:
        return text
    raise InputError(f"{name}: {option}={text!r} is not {kind}")


def write(value: Any) -> str:
    """The text that `read` reads as this value."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "x".join(map(write, value)) if isinstance(value, (tuple, list)) else str(value)


def _json(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join([_json(item) for item in value]) + "]"
    if isinstance(value, Named):
        return value.to_json()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _holds_named(kind: Kind) -> bool:
    while kind.element is not None:
        kind = kind.element
    return any(issubclass(one, Named) for one in kind.types)


# --- one object from text or JSON ---


def read_spec(text: str, family: type[Named]) -> Any:
    """What `name:key=value,key=value` names, of a family.

    Raises:
        InputError: unknown names or options, values that cannot be read or are out of range.
    """
    name, colon, rest = text.partition(":")
    cls = _lookup(name.strip(), family, family.registry)
    given: dict[str, str] = {}
    for part in rest.split(",") if colon else []:
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not option or not value:
            raise InputError(f"cannot read {part.strip()!r} in {text!r}; write options as {name}:key=value,key=value")
        if option in given:
            raise InputError(f"{text!r} gives {option} twice; give it once")
        given[option] = value
    _check_options(cls, given)
    return cls(**{option: read(value, cls.kinds[option], cls.name, option) for option, value in given.items()})


def _from_mapping(given: Any, family: type[Named], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise InputError(f"{family.family}s are combined more than {MAX_DEPTH} deep")
    # Patterns have been written with "pattern" in the place of "method".
    name = given.get("method", given.get("pattern")) if isinstance(given, Mapping) else None
    if not isinstance(name, str):
        example = _example(family)
        raise InputError(f"a {family.family} in JSON is an object with a 'method' name, {example}; got {given!r}")
    cls = family.compounds.get(name) or _lookup(name, family, family.registry)
    options = {str(option): value for option, value in given.items() if option not in ("method", "pattern")}
    _check_options(cls, options)
    return cls(**{o: convert(value, cls.kinds[o], cls.name, o, depth) for o, value in options.items()})


def _lookup(name: str, family: type[Named], known: Mapping[str, Any]) -> Any:
    if name not in known:
        raise InputError(
            f"there is no {family.family} {name!r}{hint(name, known)}; choose from {', '.join(sorted(known))}"
        )
    return known[name]


def _check_options(cls: type[Named], given: Mapping[str, Any]) -> None:
    for option in given:
        if option not in cls.kinds:
            allowed = ", ".join(cls.kinds) if cls.kinds else "none"
            raise InputError(f"{cls.name} has no option {option!r}{hint(option, cls.kinds)}; its options: {allowed}")
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if field.name not in given and _default(field) is dataclasses.MISSING:
            raise InputError(f"{cls.name} needs {field.name}, {cls.kinds[field.name]}")


def _example(family: type[Named]) -> str:
    return f"like {json.dumps({'method': next(iter(family.registry), 'name')})}"


def hint(word: str, known: Mapping[str, Any]) -> str:
    """The known words that a mistyped one is like, as part of a message."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
