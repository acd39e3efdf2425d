"""The attention methods that a user names: a spec like "bigbird:block=64", an object like `BigBird(block=64)`, or JSON.

base.py: what a method is, and text to method and back; sparse.py: patterns; lowrank.py: those with fewer columns.
"""

from .base import METHODS, Method, from_json, methods_table, parse, register
from .sparse import BigBird, Causal, Dense, Dilated, Longformer, SlidingWindow, SparseMethod, Strided

# Sparse before low-rank: the table of methods has the order in which they register.
# isort: split
from .lowrank import Linear, Linformer, LowRankMethod, Nystrom, Performer

__all__ = [
    "METHODS",
    "BigBird",
    "Causal",
    "Dense",
    "Dilated",
    "Linear",
    "Linformer",
    "Longformer",
    "LowRankMethod",
    "Method",
    "Nystrom",
    "Performer",
    "SlidingWindow",
    "SparseMethod",
    "Strided",
    "from_json",
    "methods_table",
    "parse",
    "register",
]
