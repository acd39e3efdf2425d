"""The attention methods that a user names: a spec like "bigbird:block=64", an object like `BigBird(block=64)`, or JSON.

base.py: what a method is; spec.py: text and JSON to method and back; sparse.py: the method of a pattern, and buckets.py
how it sorts tokens; lowrank.py: those with fewer columns; hybrid.py: a pattern + a tail.
"""

from ..options import register
from .base import METHODS, TAILS, Method
from .hybrid import CentroidTail, Hybrid, NystromTail, PerformerTail, Tail, branch_share
from .lowrank import Linear, Linformer, LowRankMethod, Nystrom, Performer
from .sparse import DENSE, Sparse
from .spec import from_json, methods_table, parse

__all__ = [
    "DENSE",
    "METHODS",
    "TAILS",
    "CentroidTail",
    "Hybrid",
    "Linear",
    "Linformer",
    "LowRankMethod",
    "Method",
    "Nystrom",
    "NystromTail",
    "Performer",
    "PerformerTail",
    "Sparse",
    "Tail",
    "branch_share",
    "from_json",
    "methods_table",
    "parse",
    "register",
]
