"""efficient-attn: exact, block-sparse and low-rank attention with one operator, one mask and one drop-in module."""

from .backends import BACKENDS
from .errors import EfficientAttnError, InputError, InputTypeError, MaskError, UnsupportedError
from .explanation import Explanation, explain
from .functional import attention, attention_weights, merge_attention
from .lowrank import linear_attention, linformer_attention, nystrom_attention, performer_attention
from .masks import BlockMask
from .methods import (
    LSH,
    METHODS,
    Axial,
    BigBird,
    Causal,
    Dense,
    Dilated,
    Documents,
    Fixed,
    Linear,
    Linformer,
    Longformer,
    Method,
    Neighborhood,
    Nystrom,
    Performer,
    PrefixLM,
    SlidingWindow,
    SortedBuckets,
    Strided,
    TopKBlocks,
    TopPBlocks,
    parse,
)
from .multihead import MultiheadAttention, replace_attention
from .patterns import Pattern, per_head

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "LSH",
    "METHODS",
    "Axial",
    "BigBird",
    "BlockMask",
    "Causal",
    "Dense",
    "Dilated",
    "Documents",
    "EfficientAttnError",
    "Explanation",
    "Fixed",
    "InputError",
    "InputTypeError",
    "Linear",
    "Linformer",
    "Longformer",
    "MaskError",
    "Method",
    "MultiheadAttention",
    "Neighborhood",
    "Nystrom",
    "Pattern",
    "Performer",
    "PrefixLM",
    "SlidingWindow",
    "SortedBuckets",
    "Strided",
    "TopKBlocks",
    "TopPBlocks",
    "UnsupportedError",
    "attention",
    "attention_weights",
    "explain",
    "linear_attention",
    "linformer_attention",
    "merge_attention",
    "nystrom_attention",
    "parse",
    "per_head",
    "performer_attention",
    "replace_attention",
]
