"""`convert(model, budget=0.02, sample=...)`: which attention each layer may have, decided by the measured error.

layers.py        the layers of a model: what they are called with, and how one gets a method of its own
candidates.py    what they may become
calibration.py   one pass: error, sensitivity and time of each candidate in each layer
distillation.py  fitting what a method learns to dense attention, in one layer
choice.py        the knapsack
search.py        measuring the whole model on held-out samples, until it is within the budget
kept.py          the measurements of a search that is interrupted, for one that goes on
comparing.py     the error of outputs; plan.py: the result as JSON; page.py: as a page
"""

from .kept import Kept, fingerprint
from .plan import Plan, read
from .search import Budget, Found, Search

__all__ = ["Budget", "Found", "Kept", "Plan", "Search", "fingerprint", "read"]
