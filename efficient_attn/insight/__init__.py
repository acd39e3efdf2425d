"""What attention does, at O(n) memory.

statistics.py    `attention_statistics`: entropy, largest weights, attention received, distances, maps
methods.py       the same for the weights of any method
observe.py       `observe`: the statistics of every attention of a model, while it runs
attribution.py   `rollout` and `relevance`: which tokens an output comes from
certificates.py  `certificate`: what a sparse mask loses, exactly or from a sample
"""

from .attribution import attention_times_gradient, relevance, rollout
from .certificates import Certificate, Growth, Interval, certificate, growth, sampled_certificate
from .methods import method_statistics
from .observe import Observation, observe
from .statistics import AttentionStatistics, attention_statistics

__all__ = [
    "AttentionStatistics",
    "Certificate",
    "Growth",
    "Interval",
    "Observation",
    "attention_statistics",
    "attention_times_gradient",
    "certificate",
    "growth",
    "method_statistics",
    "observe",
    "relevance",
    "rollout",
    "sampled_certificate",
]
