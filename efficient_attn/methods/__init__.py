"""The attention methods that a user names: a spec like "bigbird:block=64", an object like `BigBird(block=64)`, or JSON.

base.py: what a method is, and text to method and back; sparse.py: patterns; buckets.py: those that sort tokens;
linear.py, linformer.py, nystrom.py, performer.py: a low-rank method each, with its maths and its parameters;
lowrank.py: what they share; oracle.py: what a rank can do at best; hybrid/: a sparse method + a tail.
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
from .linear import Linear, elu_attention, elu_weights, linear_attention, linear_attention_weights
from .linformer import Linformer, LinformerState, linformer_attention, linformer_weights
from .lowrank import LowRankMethod
from .nystrom import Nystrom, NystromState, iterative_pinv, nystrom_attention, nystrom_weights, segment_means
from .oracle import LowRankOracle, truncated_svd_attention
from .performer import (
    Performer,
    PerformerState,
    performer_attention,
    performer_features,
    performer_weights,
    random_projection,
)

# isort: split
from .hybrid import CentroidTail, Hybrid, NystromTail, PerformerTail, Tail, branch_share, register_tail

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
    "LinformerState",
    "Longformer",
    "LowRankMethod",
    "LowRankOracle",
    "Method",
    "Neighborhood",
    "Nystrom",
    "NystromState",
    "NystromTail",
    "PerHead",
    "Performer",
    "PerformerState",
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
    "elu_attention",
    "elu_weights",
    "from_json",
    "iterative_pinv",
    "linear_attention",
    "linear_attention_weights",
    "linformer_attention",
    "linformer_weights",
    "methods_table",
    "nystrom_attention",
    "nystrom_weights",
    "parse",
    "performer_attention",
    "performer_features",
    "performer_weights",
    "random_projection",
    "register",
    "register_tail",
    "segment_means",
    "truncated_svd_attention",
]
