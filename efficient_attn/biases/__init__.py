"""Biases that are known by a few numbers: added to scores tile by tile, never written out as queries x keys.

`bias=` of `attention` takes a tensor, one of these, or a list of both, which add up. Those of sequence.py go by the
relative position alone. They become one line of Nq + Nk - 1 numbers a head, differentiable, which kernels read along
the diagonals of a tile. Letters as in `functional`; d = j - i - offset is how far key j stands behind query i, with
offset 0 or, under the alignment "bottom_right", Nk - Nq.


sequence.py: ALiBi, tables, T5's buckets; low_rank.py and grid.py: those that are dot products, appended to queries and
keys, and tables of images; module.py: one as a module; sums.py: lists of them.
"""

from .base import Appended, Bias, Pairwise, RelativePosition
from .grid import DecomposedBias2D, RelativeBias2D
from .low_rank import LowRankBias
from .module import PositionBias
from .sequence import ALiBi, RelativeBias, T5Bias
from .sums import BiasLike, aligned, join, split

__all__ = [
    "ALiBi",
    "Appended",
    "Bias",
    "BiasLike",
    "DecomposedBias2D",
    "LowRankBias",
    "Pairwise",
    "PositionBias",
    "RelativeBias",
    "RelativeBias2D",
    "RelativePosition",
    "T5Bias",
    "aligned",
    "join",
    "split",
]
