"""What is asked of the weights of an attention call, and what comes back; shared by the backends that find it out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Wanted(NamedTuple):
    """Which statistics, as kernels are told. Letters as in `functional`; S sets of keys, R weightings of rows."""

    top: int = 0  # so many of the largest weights of each row
    received: bool = False
    row_weights: Tensor | None = None  # (R, B, Hq, Nq), in the accumulation dtype
    key_sets: Tensor | None = None  # (1 | B, Nk) int32: bit s says whether the key is in set s
    set_count: int = 0
    map_block: int = 0  # queries, and keys, of one cell of the map; 0: no map
    position_offset: int | None = None  # query i stands at key i + position_offset; None: no distances
    nearby: float = 0.0  # how far away a key counts as near


class Found(NamedTuple):
    """The statistics, in the accumulation dtype; None where not wanted."""

    lse: Tensor  # (B, Hq, Nq)
    entropy: Tensor  # (B, Hq, Nq), in nats
    top_weights: Tensor | None  # (B, Hq, Nq, top), descending; 0 beyond the visible keys
    top_keys: Tensor | None  # (B, Hq, Nq, top) int32; -1 beyond the visible keys
    received: Tensor | None  # (1 + R, B, Hq, Nk): with every row counted once, and with each weighting
    distance: Tensor | None  # (B, Hq, Nq), in tokens
    nearby: Tensor | None  # (B, Hq, Nq)
    shares: Tensor | None  # (B, Hq, Nq, S)
    map: Tensor | None  # (B, Hq, ceil(Nq / map_block), ceil(Nk / map_block))
