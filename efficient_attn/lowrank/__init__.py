"""Low-rank attention in O(N): Linformer, Nystrom, Performer and linear attention, each exact to its paper.

They are built from the two primitives, exact attention and linear attention, so every backend, dtype and gradient of
these serves them. Letters: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D and Dv head dims,
G = Hq / Hkv. Each function has a companion `*_weights` that writes the implied weights out: n x n, on request only.

`key_mask` is bool (B, Nk), True = attend; what a masked key holds, NaN included, has no influence. Where weights are
never formed, dropout drops whole keys: w_ij becomes w_ij keep_j / (1 - p), with one keep_j for every query of a head.
Each weight is then dropped with probability p as usual, and the expectation is the same.
"""

from ..backends.features import elu_features
from .linear import elu_attention, elu_weights, linear_attention, linear_attention_weights
from .linformer import linformer_attention, linformer_weights
from .nystrom import iterative_pinv, nystrom_attention, nystrom_weights, segment_means
from .performer import FEATURES, performer_attention, performer_features, performer_weights, random_projection
from .svd import LowRankOracle, truncated_svd_attention

__all__ = [
    "FEATURES",
    "LowRankOracle",
    "elu_attention",
    "elu_features",
    "elu_weights",
    "iterative_pinv",
    "linear_attention",
    "linear_attention_weights",
    "linformer_attention",
    "linformer_weights",
    "nystrom_attention",
    "nystrom_weights",
    "performer_attention",
    "performer_features",
    "performer_weights",
    "random_projection",
    "segment_means",
    "truncated_svd_attention",
]
