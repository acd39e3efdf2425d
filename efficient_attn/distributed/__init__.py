"""Sequences longer than one machine: context parallelism on torch.distributed.

shards.py      which tokens each rank holds, balanced
needs.py       what a mask says of a part of the sequence
plan.py        who computes what, which keys travel, what that costs; `explain`
links.py       the model of links
exchange.py    what ranks say to each other, with a time limit; differentiable exchanges
attention.py   exact attention by gather and ring, forward and backward
heads.py       heads apart
tokens.py      where tokens stand in what is held and what is fetched
states.py      the low-rank methods
agreement.py   what ranks compare before each call
context.py     `context_parallel`
"""

from .context import ContextParallel, context_parallel
from .links import H200, Link
from .plan import TRANSPORTS, Explanation, Plan, Shape, make_plan
from .shards import Shards

__all__ = [
    "H200", "TRANSPORTS", "ContextParallel", "Explanation", "Link", "Plan", "Shape", "Shards", "context_parallel",
    "make_plan",
]  # fmt: skip
