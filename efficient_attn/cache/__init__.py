"""Keys and values of tokens seen before, for decoding token by token or by chunks of a prompt.

contiguous.py  `KVCache`: a row of memory for each sequence, which grows, is fixed, or keeps a window
paged.py       `PagedKVCache`: sequences on pages of one pool, which may share them
reading.py     attention of queries at the end of sequences of different lengths; pages and their tables
steps.py       steps like one before, which are started at once
rotary.py      rotary positions, applied while writing
"""

from .contiguous import KVCache
from .paged import PagedKVCache
from .reading import cached_attention, paged_attention

__all__ = ["KVCache", "PagedKVCache", "cached_attention", "paged_attention"]
