"""Exact sparse attention plus a compressed tail under one softmax denominator.

    out_i = (sum_{j in E_i} e^{s_ij} v_j + N_i) / (sum_{j in E_i} e^{s_ij} + Z_i),      s_ij = scale q_i . k_j

E_i are the keys that query i sees exactly, N_i and Z_i the tail's estimates of the two sums over all other keys.
split.py settles which keys those are, in whole blocks; tails.py has the estimates: centroids, Nystrom, and random
features (Scatterbrain). Each branch is a pair (out, lse), joined by `merge_attention`.
"""

from .split import Split, plan, split
from .tails import (
    SECOND_ORDER,
    Branch,
    centroid_branch,
    centroid_weights,
    nystrom_branch,
    nystrom_tail_weights,
    performer_branch,
    performer_tail_weights,
)

__all__ = [
    "SECOND_ORDER",
    "Branch",
    "Split",
    "centroid_branch",
    "centroid_weights",
    "nystrom_branch",
    "nystrom_tail_weights",
    "performer_branch",
    "performer_tail_weights",
    "plan",
    "split",
]
