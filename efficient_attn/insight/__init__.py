"""What attention does, at O(n) memory.

statistics.py    `attention_statistics`: entropy, largest weights, attention received, distances, maps
methods.py       the same for the weights of any method
observe.py       `observe`: the statistics of every attention of a model, while it runs
attribution.py   `rollout` and `relevance`: which tokens an output comes from
"""

from .attribution import attention_times_gradient, relevance, rollout
from .methods import method_statistics
from .observe import Observation, observe
from .statistics import AttentionStatistics, attention_statistics

__all__ = [
    "AttentionStatistics",
    "Observation",
    "attention_statistics",
    "attention_times_gradient",
    "method_statistics",
    "observe",
    "relevance",
    "rollout",
]
