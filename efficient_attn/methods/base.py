"""The attention methods that a user names: `parse("bigbird:block=64")`, `BigBird(block=64)`, or JSON.

A spec is `name` or `name:key=value,key=value`. Tuples are written with x (`64x128`), nothing as `none`. Sparse methods
join as `a & b` and `a | b`, in parentheses where needed, and `per_head(a; b)` gives each head its own. A hybrid is
`a + b`, a sparse method and a tail.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import backends, patterns, specs
from ..errors import InputError, InputTypeError, UnsupportedError
from ..masks import BlockMask

METHODS: dict[str, type[Method]] = {}
TAILS: dict[str, Any] = {}  # what may stand behind a +, see hybrid.py
JOIN: dict[str, Callable[..., Method]] = {}  # "spec" and "json" of a hybrid, from hybrid.py

COMPOUNDS: dict[str, type[Method]] = {}  # made of other methods: known to JSON, without a spec of their own
BACKENDS = tuple(name for name in backends.BACKENDS if name not in backends.EXPERIMENTAL)  # of every method
EXAMPLE = '{"method": "bigbird", "block": 64}'


class Method:
    """A way to attend. Subclasses are frozen dataclasses: their fields are the options, with usable defaults.

    Class attributes say what it is: `name` (in specs), `formula`, `paper`, `complexity` (time), `exact` (softmax
    attention over the pairs it looks at, none of them approximated), and what calls may ask of it: `accepts_causal`,
    `accepts_mask` (any mask of pairs), `accepts_bias`. `primitive` is the operator that does the work, whose backends
    serve the method.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    paper: ClassVar[str]
    complexity: ClassVar[str]
    exact: ClassVar[bool] = False
    accepts_causal: ClassVar[bool] = False
    accepts_mask: ClassVar[bool] = False
    accepts_bias: ClassVar[bool] = False
    primitive: ClassVar[str] = "attention"

    @property
    def shares_state(self) -> bool:
        """Whether the paper gives all layers of a model one state, which `replace_attention` then shares among them."""
        return False

    def build(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module | None:
        """Make what `attend` needs as `state`: learned parameters and random features; None for methods without any.

        Draws nothing from PyTorch's global generator: a model's other parameters start the same with any method.
        """
        return None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        state: nn.Module | None = None,
        key_mask: Tensor | None = None,
        mask: BlockMask | Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        causal_alignment: str | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int | Tensor | None = None,
        backend: str = "auto",
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend by this method.

        Args:
            query, key, value: (B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv), as in `attention`.
            state: what `build` returned.
            key_mask: bool (B, Nk), True = attend: padding. What a masked key holds, NaN included, has no influence.
            mask, bias, is_causal, causal_alignment, scale, dropout_p, dropout_seed, backend: as in `attention`.
            need_weights: also return what this method multiplies the values with, dropout included: n x n memory.

        Returns:
            out (B, Hq, Nq, Dv) and weights (B, Hq, Nq, Nk) or None.

        Raises:
            UnsupportedError: what the class attributes say this method does not accept.
            InputError, InputTypeError: arguments that do not belong together, or a missing state.
        """
        raise NotImplementedError

    def to_json(self) -> str:
        """The method with all its options as a JSON object, which `from_json` reads."""
        return json.dumps({"method": self.name, **specs.options(self)})

    def __str__(self) -> str:
        """The shortest spec that `parse` turns into this method: options at their default are left out."""
        changed = [
            f"{field.name}={specs.write(getattr(self, field.name))}"
            for field in dataclasses.fields(typing.cast(Any, self))
            if getattr(self, field.name) != specs.default(field)
        ]
        return self.name + (":" + ",".join(changed) if changed else "")


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method known to `parse`, `from_json` and the table."""
    METHODS[cls.name] = cls
    return cls


def register_compound(cls: type[Method]) -> type[Method]:
    """Class decorator: make a method with a field `parts`, of other methods, known to `from_json` and patterns."""
    COMPOUNDS[cls.name] = cls
    return cls


# --- from text and back ----------------------------------------------------------------------------------------------


def parse(spec: str | Method | patterns.Pattern) -> Method:
    """The method that a spec names; a `Method` is returned as it is, a `Pattern` as the method of the same name.

    Raises:
        InputError: unknown names or options, values out of range. InputTypeError: not a spec.
    """
    if isinstance(spec, Method):
        return spec
    if isinstance(spec, patterns.Pattern):
        return _from_pattern(spec)
    if not isinstance(spec, str):
        raise InputTypeError(
            f"a method is a spec such as 'bigbird:block=64', a Method or a Pattern; got {type(spec).__name__}"
        )
    return _parse(spec.strip(), 0)


def from_json(text: str | Mapping[str, Any]) -> Method:
    """The method that a JSON object (its text, or the decoded mapping) describes; options left out have their default.

    Raises:
        InputError: not such an object, unknown names or options, values out of range. InputTypeError: wrong types.
    """
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"this is not JSON ({error}); a method is like {EXAMPLE}") from None
    if not isinstance(text, Mapping) or not isinstance(text.get("method"), str):
        raise InputError(f"a method in JSON is an object with a 'method' name, like {EXAMPLE}; got {text!r}")
    if text["method"] == "hybrid":
        return JOIN["json"](text)
    found: Method = read_json(text, METHODS)
    return found


def read_json(text: Mapping[str, Any], known: Mapping[str, Any]) -> Any:
    """The object that a decoded JSON object describes, of the class that `known` has for its "method"."""
    given = {str(option): value for option, value in text.items() if option != "method"}
    if text["method"] in COMPOUNDS:
        return _compound(text["method"], given)
    cls = _lookup(text["method"], known)
    kinds = specs.kinds(cls, given)
    return cls(**{option: specs.convert(value, kinds[option], cls.name, option) for option, value in given.items()})


def _compound(name: str, given: dict[str, Any]) -> Method:
    parts = given.get("parts")
    if not isinstance(parts, list | tuple) or not all(isinstance(part, Mapping) for part in parts):
        raise InputError(f"{name} in JSON has parts, a list of objects like {EXAMPLE}; got {parts!r}")
    specs.kinds(COMPOUNDS[name], given)
    return COMPOUNDS[name](**{**given, "parts": tuple(from_json(part) for part in parts)})


def methods_table() -> list[dict[str, str]]:
    """One row a method and a tail, for documentation: what the class attributes say, parameters and backends."""
    return [_row(cls.name, cls) for cls in METHODS.values()] + [_row(f"...+{cls.name}", cls) for cls in TAILS.values()]


def _row(name: str, cls: Any) -> dict[str, str]:
    return {
        "name": name,
        "formula": cls.formula,
        "paper": cls.paper,
        "complexity": cls.complexity,
        "exact": "yes" if cls.exact else "no",
        "causal": "yes" if cls.accepts_causal else "no",
        "mask": "yes" if cls.accepts_mask else "padding only",
        "parameters": ", ".join(f"{k}={specs.write(v)}" for k, v in specs.options(cls()).items()) or "-",
        "backends": ", ".join(BACKENDS),
    }


def _lookup(name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        if name in TAILS and known is METHODS:
            raise InputError(f"{name} stands behind an exact sparse method; write sliding_window+{name}")
        kind = "method" if known is METHODS else "tail"
        raise InputError(
            f"there is no {kind} {name!r}{specs.hint(name, known)}; choose from {', '.join(sorted(known))}"
        )
    return known[name]


def _parse(text: str, depth: int) -> Method:
    """One spec, or several with operators: | binds less than &, parentheses and per_head(a; b) hold further ones."""
    if depth > patterns.MAX_DEPTH:
        raise InputError(f"methods are combined more than {patterns.MAX_DEPTH} deep in {text!r}")
    joined = _split(text, "+")
    if len(joined) > 1:
        return JOIN["spec"](joined)
    for symbol, operator in (("|", "or"), ("&", "and")):
        parts = _split(text, symbol)
        if len(parts) > 1:
            return _from_pattern(patterns.Combined(operator, _patterns(parts, depth)))
    name, bracket, inside = text.partition("(")
    if bracket and name.strip() in ("", "per_head") and text.endswith(")"):
        if not name:
            return _parse(inside[:-1].strip(), depth + 1)
        return _from_pattern(patterns.PerHead(_patterns(_split(inside[:-1], ";"), depth)))
    found: Method = read_spec(text, METHODS)
    return found


def read_spec(spec: str, known: Mapping[str, Any]) -> Any:
    """The object that `name:key=value,key=value` describes, of the class that `known` has for the name."""
    name, colon, rest = spec.partition(":")
    cls = _lookup(name.strip(), known)
    given: dict[str, str] = {}
    for part in rest.split(",") if colon else []:
        option, equals, text = (piece.strip() for piece in part.partition("="))
        if not equals or not option or not text:
            raise InputError(f"cannot read {part.strip()!r} in {spec!r}; write options as {name}:key=value,key=value")
        if option in given:
            raise InputError(f"{spec!r} gives {option} twice; give it once")
        given[option] = text
    kinds = specs.kinds(cls, given)
    return cls(**{option: specs.read(text, kinds[option], cls.name, option) for option, text in given.items()})


def _patterns(texts: list[str], depth: int) -> tuple[patterns.Pattern, ...]:
    parts = tuple(_parse(text, depth + 1) for text in texts)
    for part in parts:
        if not isinstance(part, patterns.Pattern):
            raise UnsupportedError(f"{part} is no pattern of pairs; &, | and per_head join sparse methods only")
    return typing.cast("tuple[patterns.Pattern, ...]", parts)


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


def _from_pattern(pattern: patterns.Pattern) -> Method:
    for cls in (*METHODS.values(), *COMPOUNDS.values()):
        if type(pattern) in cls.__bases__:
            return cls(**specs.options(pattern))
    raise UnsupportedError(f"{type(pattern).__name__} is no registered method; pass it as mask= to attention()")


def keep_state(method_state: nn.Module | None, state_dict: dict[str, Any], prefix: str) -> None:
    """Let a checkpoint without parameters of the method load strictly: a module's own, `prefix`method_state, stay."""
    own = f"{prefix}method_state."
    if method_state is not None and not any(name.startswith(own) for name in state_dict):
        state_dict.update({own + name: value for name, value in method_state.state_dict(keep_vars=True).items()})


def check_range(method: Any, option: str, least: float, most: float = math.inf) -> None:
    value = getattr(method, option)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(f"{method.name}: {option} must be an integer, got {value!r}")
    if not least <= value <= most:
        limit = f">= {least}" if most == math.inf else f"from {least} to {most}"
        raise InputError(f"{method.name}: {option} must be {limit}, got {value}")


def check_choice(method: Any, option: str, allowed: tuple[str, ...]) -> None:
    value = getattr(method, option)
    if value not in allowed:
        raise InputError(f"{method.name}: {option} must be one of {', '.join(allowed)}; got {value!r}")
