"""The attention methods that a user names: a spec like "bigbird:block=64", an object like `BigBird(block=64)`, or JSON.

base.py: what a method is, and text to method and back; sparse.py: patterns; buckets.py: those that sort tokens;
lowrank.py: those with fewer columns; hybrid.py: a sparse method + a tail.
"""

from .base import METHODS, Method, from_json, methods_table, parse, register
from .sparse import (
    Axial,
    BigBird,
    Causal,
    Combined,
    DeepSpeedBigBird,
    DeepSpeedBSLongformer,
    DeepSpeedFixed,
    DeepSpeedLocalSlidingWindow,
    DeepSpeedVariable,
    Dense,
    Dilated,
    Documents,
    Fixed,
    Longformer,
    Neighborhood,
    PerHead,
    PrefixLM,
    SlidingWindow,
    SparseMethod,
    Strided,
    TopKBlocks,
    TopPBlocks,
)

# Sparse before low-rank: the table of methods has the order in which they register.
# isort: split
from .buckets import LSH, BucketMethod, SortedBuckets

# isort: split
from .lowrank import Linear, Linformer, LowRankMethod, Nystrom, Performer

# isort: split
from .hybrid import CentroidTail, Hybrid, NystromTail, PerformerTail, Tail, branch_share

__all__ = [
    "LSH",
    "METHODS",
    "Axial",
    "BigBird",
    "BucketMethod",
    "Causal",
    "CentroidTail",
    "Combined",
    "DeepSpeedBSLongformer",
    "DeepSpeedBigBird",
    "DeepSpeedFixed",
    "DeepSpeedLocalSlidingWindow",
    "DeepSpeedVariable",
    "Dense",
    "Dilated",
    "Documents",
    "Fixed",
    "Hybrid",
    "Linear",
    "Linformer",
    "Longformer",
    "LowRankMethod",
    "Method",
    "Neighborhood",
    "Nystrom",
    "NystromTail",
    "PerHead",
    "Performer",
    "PerformerTail",
    "PrefixLM",
    "SlidingWindow",
    "SortedBuckets",
    "SparseMethod",
    "Strided",
    "Tail",
    "TopKBlocks",
    "TopPBlocks",
    "branch_share",
    "from_json",
    "methods_table",
    "parse",
    "register",
]
