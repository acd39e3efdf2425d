"""The attention methods that a user names: a spec like "bigbird:block=64", an object like `BigBird(block=64)`, or JSON.

base.py: what a method is, and text to method and back; sparse.py: patterns; lowrank.py: those with fewer columns;
hybrid.py: a sparse method + a tail.
"""

from .base import METHODS, Method, from_json, methods_table, parse, register
from .sparse import BigBird, Causal, Dense, Dilated, Longformer, SlidingWindow, SparseMethod, Strided

# Sparse before low-rank: the table of methods has the order in which they register.
# isort: split
from .lowrank import Linear, Linformer, LowRankMethod, Nystrom, Performer

# isort: split
from .hybrid import CentroidTail, Hybrid, NystromTail, PerformerTail, Tail, branch_share

__all__ = [
    "METHODS",
    "BigBird",
    "Causal",
    "CentroidTail",
    "Dense",
    "Dilated",
    "Hybrid",
    "Linear",
    "Linformer",
    "Longformer",
    "LowRankMethod",
    "Method",
    "Nystrom",
    "NystromTail",
    "Performer",
    "PerformerTail",
    "SlidingWindow",
    "SparseMethod",
    "Strided",
    "Tail",
    "branch_share",
    "from_json",
    "methods_table",
    "parse",
    "register",
]
