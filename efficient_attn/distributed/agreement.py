"""Before a call sends anything, its ranks compare what they were given: one small all-gather of numbers and digests.

A rank whose arguments are wrong takes part and says so, and the others end with it instead of waiting for it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CommunicationError, EfficientAttnError, InputError, MaskError
from ..inputs import resolve_seed
from ..masks import BlockMask
from .exchange import Exchange
from .needs import digest

FACTS = 12
PLAIN_FACTS = ("batch", "heads", "kv_heads", "head_dim", "value_dim")


def agree(
    exchange: Exchange,
    query: Tensor,
    key: Tensor,
    facts: Callable[[], dict[str, int]],
    dropout_seed: int | Tensor | None,
    bias_rows: int = 1,
) -> tuple[list[int], list[int], int, int]:
    """Make sure that every rank calls the same; returns the queries and keys of each rank, the first's seed, and
    the most rows that a rank's bias has.

    Raises:
        what `facts` raises, on this rank; CommunicationError on the others.
        InputError, MaskError: facts that differ, on all ranks.
    """
    error: EfficientAttnError | None = None
    names: list[str] = []
    numbers: list[int] = []
    try:
        found = facts()
        names, numbers = list(found), list(found.values())
        drawn = 0 if isinstance(dropout_seed, int) and dropout_seed == 0 else int(resolve_seed(dropout_seed))
        lengths = [query.shape[2], key.shape[2], drawn, bias_rows]
    except EfficientAttnError as raised:
        error, lengths = raised, [0, 0, 0, 0]
    numbers = (numbers + [0] * FACTS)[:FACTS]
    rows = exchange.gather_numbers([int(error is not None), *lengths, *numbers])
    if error is not None:
        raise error
    refused = [rank for rank, row in enumerate(rows) if row[0]]
    if refused:
        raise CommunicationError(f"rank {refused[0]} refused this call, so that no rank can make it; see its error")
    for place, name in enumerate(names):
        values = [row[5 + place] for row in rows]
        if len(set(values)) > 1:
            odd = [rank for rank, value in enumerate(values) if value != values[0]]
            kind = MaskError if name == "mask" else InputError
            shown = f": {values}" if name in PLAIN_FACTS else ""
            raise kind(
                f"ranks {odd} call attention with another {name.replace('_', ' ')} than rank 0{shown}; every rank "
                "must pass the same, a mask being that of the whole sequence"
            )
    return [row[1] for row in rows], [row[2] for row in rows], rows[0][3], max(row[4] for row in rows)


def shape_facts(tensors: Sequence[Tensor]) -> dict[str, int]:
    """What must be the same on all ranks of query, key and value."""
    query, key, value = tensors
    found = {"batch": query.shape[0], "heads": query.shape[1], "kv_heads": key.shape[1]}
    found |= {"head_dim": query.shape[3], "value_dim": value.shape[3]}
    return found | {"dtype": text_digest(str(query.dtype))}


def wanted(*tensors: Tensor | None) -> tuple[bool, ...]:
    """Of which tensors a gradient is wanted: a backward that one rank does not run leaves the others waiting."""
    return tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)


def as_number(value: float) -> int:
    """The bits of a float."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def text_digest(value: Any) -> int:
    """A number for what prints alike."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "little")


def mask_digest(mask: Any) -> int:
    """A number for equal masks: of a BlockMask, a bool tensor, or a pattern."""
    if isinstance(mask, BlockMask):
        return digest(mask)
    if isinstance(mask, Tensor):
        state = hashlib.sha256(repr((tuple(mask.shape), mask.dtype)).encode())
        state.update(mask.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return int.from_bytes(state.digest()[:7], "little")
    return text_digest(str(mask))


def combined(digests: Iterable[int]) -> int:
    """One number for several."""
    return text_digest(tuple(digests))
