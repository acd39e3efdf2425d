"""The attention methods that a user names: a spec like "nystrom:landmarks=64", an object like `Nystrom(64)`, or JSON.

base.py: what a method is; spec.py: text and JSON to method and back; sparse.py: the method of a pattern, and buckets.py
how it sorts tokens; linear.py, linformer.py, nystrom.py, performer.py: a low-rank method each, with its maths and its
parameters; lowrank.py: what they share; oracle.py: what a rank can do at best; hybrid/: a pattern + a tail.
"""

from ..options import register
from .base import METHODS, TAILS, Method
from .sparse import DENSE, Sparse
from .spec import from_json, methods_table, parse

# The table of methods has the order in which they register.
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
from .hybrid import CentroidTail, Hybrid, NystromTail, PerformerTail, Tail, branch_share

__all__ = [
    "DENSE",
    "METHODS",
    "TAILS",
    "CentroidTail",
    "Hybrid",
    "Linear",
    "Linformer",
    "LinformerState",
    "LowRankMethod",
    "LowRankOracle",
    "Method",
    "Nystrom",
    "NystromState",
    "NystromTail",
    "Performer",
    "PerformerState",
    "PerformerTail",
    "Sparse",
    "Tail",
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
    "segment_means",
    "truncated_svd_attention",
]
