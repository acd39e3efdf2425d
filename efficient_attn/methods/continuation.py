"""A method for queries that continue a sequence, as in cached generation: the rows of its pattern where they stand.

A pattern is defined over a whole sequence. Of a pass over its last Nq tokens, with the keys of all of them kept, its
last Nq rows are the mask; a method that is no pattern of positions goes by causality alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..masks import BlockMask
from ..patterns import Pattern
from .base import Method
from .hybrid import Hybrid
from .sparse import DENSE, Sparse


def continuation(
    method: Method,
    q_len: int,
    kv_len: int,
    *,
    num_heads: int,
    first: int,
    offset: int = 0,
    left: Tensor | None = None,
    device: torch.device,
) -> tuple[Method, BlockMask | None]:
    """The method, and the mask beside it, for queries that are not the whole sequence.

    Args:
        q_len, kv_len: how many queries and keys the call has.
        num_heads: of the queries.
        first: the position of query 0 in the sequence; offset: that of key 0.
        left: int (B,), how many positions of each row are padding before its first token, from which a pattern counts.

    Raises:
        UnsupportedError: a hybrid, whose blocks would be cut elsewhere; blocks of queries that choose by content, of
            which the call has only a part; a pattern under torch.compile.
    """
    if isinstance(method, Sparse) and method.pattern.by_content:
        # What is padding, or no longer kept, shifts the blocks too.
        begun = offset != 0 or (left is not None and (torch.compiler.is_compiling() or bool(left.any())))
        if not method.pattern._alike_in_part(first) or (begun and not method.pattern._alike_in_part(1)):
            raise UnsupportedError(
                f"{method} chooses keys for whole blocks of queries, of which these {q_len} queries from position "
                f"{first} of a cached sequence ({kv_len} keys) are a part, so that they would choose others; generate "
                "with use_cache=False"
            )
        return method, None
    if isinstance(method, Hybrid):
        raise UnsupportedError(
            f"{method} cannot continue a cached sequence ({q_len} queries, {kv_len} keys); call "
            "generate(use_cache=False)"
        )
    if not isinstance(method, Sparse) or not goes_by_positions(method):
        return method, None
    if torch.compiler.is_compiling():
        raise UnsupportedError(f"torch.compile cannot place {method} in a cached sequence; compile dense, or no cache")
    heads = num_heads if method.pattern._heads_differ else 1
    pads = (0,) if left is None else tuple(left.tolist())
    return DENSE, _rows(method.pattern, q_len, kv_len, first, offset, pads, heads, str(device))


def goes_by_positions(method: Method) -> bool:
    """Whether the method is or holds a pattern of positions in one sequence, which queries of another do not have."""
    sparse = method.sparse if isinstance(method, Hybrid) else method
    return isinstance(sparse, Sparse) and not sparse.is_dense and not sparse.pattern.by_content


@functools.lru_cache(maxsize=16)  # the layers of a model ask for the same few in turn
def _rows(
    pattern: Pattern, q_len: int, kv_len: int, first: int, offset: int, pads: tuple[int, ...], heads: int, device: str
) -> BlockMask:
    """A pattern over a whole sequence: its rows from `first` on, and its columns from `offset` on.

    pads: of each row of a batch, where its sequence begins; what comes before is padding, hidden by others.
    """
    begin = torch.tensor(pads, device=device)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = torch.zeros((), dtype=torch.bool, device=i.device)
        for pad in sorted(set(pads)):
            length = max(offset + kv_len - pad, 0)
            places = (i + first - pad).clamp(min=0), (j + offset - pad).clamp(min=0)
            for head in range(heads):
                asked = (begin[b] == pad) & (h == head if heads > 1 else True)
                seen = torch.where(asked, pattern.visible(*places, length, length, head), seen)
        return seen

    with torch.inference_mode(False):
        return BlockMask.from_predicate(
            visible,
            q_len=q_len,
            kv_len=kv_len,
            batch=len(pads),
            heads=heads,
            block_size=(16, 128) if q_len <= 16 else 128,
            device=device,
        )
