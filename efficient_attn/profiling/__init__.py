"""Where time and memory go, and which attention to use: `profile_op`, `profile_model`, `recommend`.

api.py          the calls; commands.py: the same on the command line
session.py      cells in worker processes, shortest lengths first; operator.py, model.py, roofline.py: what a cell runs
counts.py       operations and bytes by operator; phases.py: time by phase, from torch.profiler
results.py      what was measured and what that predicts, as data; profile.py, recommendation.py: with table and picture
activations.py, sources.py                  what is measured on; tables.py, plots.py: how it is shown
"""

from .api import profile_model, profile_op, profile_source
from .model import find_attention
from .profile import Profile, from_records
from .recommendation import Recommendation, from_rows, pareto, recommend
from .results import Candidate, Growth
from .roofline import Ceilings, Roofline

__all__ = [
    "Candidate",
    "Ceilings",
    "Growth",
    "Profile",
    "Recommendation",
    "Roofline",
    "find_attention",
    "from_records",
    "from_rows",
    "pareto",
    "profile_model",
    "profile_op",
    "profile_source",
    "recommend",
]
