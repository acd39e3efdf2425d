"""Where a sequence is spread over processes: what `attention`, methods and models ask, and who answers.

`distributed/` is above the rooms that ask, so it does not get imported here: `context_parallel` enters itself. One
context holds for the whole process and not for a thread, for autograd runs the backward in threads of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from .errors import UnsupportedError


class Sharded(Protocol):
    """What a context answers; query, key and value are this process's part of the sequence."""

    def attention(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Any:
        """`functional.padded_attention` over the whole sequence; arguments as there, and `key_mask`."""

    def attend(
        self, method: Any, query: Tensor, key: Tensor, value: Tensor, **arguments: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`Method.attend` over the whole sequence."""

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This process's part of a whole sequence."""

    def join(self, x: Tensor, dim: int, length: int) -> Tensor:
        """The whole sequence of length `length` of every process's parts."""


active: Sharded | None = None


@contextmanager
def entered(context: Sharded | None) -> Iterator[None]:
    """A block in which `context` answers, or with None nobody does: what is called there is this process's alone."""
    global active
    before, active = active, context
    try:
        yield
    finally:
        active = before


def refuse(what: str) -> None:
    """Raise UnsupportedError inside a context: `what` would see this process's part and take it for the whole."""
    if active is not None:
        raise UnsupportedError(
            f"{what} is not defined inside context_parallel, where it would take this process's part of the sequence "
            "for the whole; call attention(), or a method that docs/distributed.md names"
        )
