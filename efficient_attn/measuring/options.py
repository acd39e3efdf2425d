"""Shapes, lengths and lists of specs that a user gives, checked before anything is measured."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..errors import InputError
from ..inputs import MAX_HEAD_DIM

DTYPES = ("float32", "float64", "bfloat16", "float16")
MODES = ("fwd", "fwd_bwd")


def check_shape(batch: int, heads: int, kv_heads: int | None, head_dim: int, dtype: str, mode: str) -> dict[str, Any]:
    """The configuration of a shape; raises InputError for what is not one."""
    kv_heads = heads if kv_heads is None else kv_heads
    for what, value in (("batch", batch), ("heads", heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        check_positive(what, value)
    if heads % kv_heads:
        raise InputError(f"heads must be a multiple of kv_heads; got {heads} and {kv_heads}")
    if head_dim > MAX_HEAD_DIM:
        raise InputError(f"head_dim must be from 1 to {MAX_HEAD_DIM}, got {head_dim}")
    check_choice("dtype", dtype, DTYPES)
    check_choice("mode", mode, MODES)
    return {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}


def check_positive(what: str, value: Any) -> int:
    """Raise InputError unless a value is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{what} must be a positive integer, got {value!r}")
    return value


def check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise InputError unless a value is among the allowed ones."""
    if value not in allowed:
        raise InputError(f"{what} {value!r} does not exist; choose from {', '.join(allowed)}")


def check_lengths(lengths: Iterable[int]) -> tuple[int, ...]:
    """Ascending, distinct lengths; raises InputError for none, or for what is no length."""
    found = tuple(sorted({check_positive("a length", n) for n in lengths}))
    if not found:
        raise InputError("give at least one length")
    return found


def read_lengths(text: str) -> tuple[int, ...]:
    """`"512,2k,16k"`, `"1k..256k"` (doubling), `"512:4k:x2"` (from:to:factor), or several of them: ascending lengths.

    Raises:
        InputError: a text that is none.
    """
    found: set[int] = set()
    for part in text.split(","):
        span = re.fullmatch(r"([^.:]+)(?:\.\.([^.:]+)|:([^.:]+):x(\d+))", part)
        if span is None:
            found.add(_length(part, text))
            continue
        length, last, factor = _length(span[1], text), _length(span[2] or span[3], text), int(span[4] or 2)
        if length > last:
            raise InputError(f"lengths {text!r}: in {part.strip()} the first length is beyond the last")
        if factor < 2:
            raise InputError(f"lengths {text!r}: the factor of {part.strip()} must be at least 2")
        while length <= last:
            found.add(length)
            length *= factor
    return tuple(sorted(found))


def _length(part: str, text: str) -> int:
    match = re.fullmatch(r"\s*(\d+)([kKmM]?)\s*", part)
    value = int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()] if match else 0
    if value < 1:
        raise InputError(
            f"lengths {text!r}: {part.strip()!r} is not a length; write 4096, 512,2k,16k, 1k..256k or 512:64k:x2"
        )
    return value


def split_specs(text: str) -> list[str]:
    """`"dense,bigbird:block=64,window=3"` -> `["dense", "bigbird:block=64,window=3"]`: a part whose `=` comes before
    any `:` belongs to the spec before it."""
    specs: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if specs and "=" in part.partition(":")[0]:
            specs[-1] += "," + part
        else:
            specs.append(part)
    return specs
