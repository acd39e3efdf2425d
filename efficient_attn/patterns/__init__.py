"""Sparse patterns by name: small frozen objects that say which pairs are visible and build the `BlockMask`.

    tokens.py     windows, strides, global tokens, prefixes, documents
    bigbird.py    blocks: window, global, random
    images.py     neighbourhoods and axes of a grid
    deepspeed.py  the layouts of DeepSpeed's sparse attention
    content.py    blocks chosen by what queries and keys hold
    buckets.py    tokens bucketed by hashing and sorting
    combined.py   & and |, and a pattern for each head

`python -m efficient_attn.patterns bigbird` draws one, without a name all of them. Patterns combine with & and |,
compare, hash, and round-trip as text and as JSON (options.py).
"""

from ..options import register
from .base import PATTERNS, Pattern, pattern_lists

# The table of methods has the order in which they register: plain ones first.
# isort: split
from .tokens import Causal, Dense, Dilated, Documents, Fixed, Longformer, PrefixLM, SlidingWindow, Strided

# isort: split
from .bigbird import BigBird
from .images import Axial, Neighborhood

# isort: split
from .content import ContentPattern, TopKBlocks, TopPBlocks
from .deepspeed import (
    DeepSpeedBigBird,
    DeepSpeedBSLongformer,
    DeepSpeedFixed,
    DeepSpeedLocalSlidingWindow,
    DeepSpeedVariable,
)

# isort: split
from .buckets import LSH, BucketPattern, Buckets, SortedBuckets
from .combined import Combined, PerHead, past_of, per_head

__all__ = [
    "LSH",
    "PATTERNS",
    "Axial",
    "BigBird",
    "BucketPattern",
    "Buckets",
    "Causal",
    "Combined",
    "ContentPattern",
    "DeepSpeedBSLongformer",
    "DeepSpeedBigBird",
    "DeepSpeedFixed",
    "DeepSpeedLocalSlidingWindow",
    "DeepSpeedVariable",
    "Dense",
    "Dilated",
    "Documents",
    "Fixed",
    "Longformer",
    "Neighborhood",
    "Pattern",
    "PerHead",
    "PrefixLM",
    "SlidingWindow",
    "SortedBuckets",
    "Strided",
    "TopKBlocks",
    "TopPBlocks",
    "past_of",
    "pattern_lists",
    "per_head",
    "register",
]
