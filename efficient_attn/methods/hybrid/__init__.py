"""Hybrids `a+b`: a sparse method, exact, and a tail for the keys that it leaves out, under one softmax denominator.

    out_i = (sum_{j in E_i} e^{s_ij} v_j + N_i) / (sum_{j in E_i} e^{s_ij} + Z_i),      s_ij = scale q_i . k_j

E_i are the keys that query i sees exactly, N_i and Z_i the tail's estimates of the two sums over all other keys. Each
part is a `Branch` (out, lse), joined by `merge_attention`.

hybrid.py: the method; split.py: which keys are exact, in whole blocks of `block` tokens, an option of the tail;
tail.py: what a tail is. Each tail is one file: centroid.py, nystrom.py, and performer.py (Scatterbrain).
"""

from .hybrid import Hybrid, branch_share
from .split import Split, plan, split
from .tail import Branch, Tail, TailCall

# The table of methods has the order in which tails register.
# isort: split
from .centroid import CentroidTail
from .nystrom import NystromTail
from .performer import PerformerTail

__all__ = [
    "Branch",
    "CentroidTail",
    "Hybrid",
    "NystromTail",
    "PerformerTail",
    "Split",
    "Tail",
    "TailCall",
    "branch_share",
    "plan",
    "split",
]
