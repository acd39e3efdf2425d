"""efficient-attn: exact, block-sparse and low-rank attention with one operator, one mask and one drop-in module."""

from .backends import BACKENDS
from .errors import EfficientAttnError, InputError, InputTypeError, MaskError, UnsupportedError
from .explanation import Explanation, explain
from .functional import attention, attention_weights, merge_attention
from .lowrank import linear_attention, linformer_attention, nystrom_attention, performer_attention
from .masks import BlockMask
from .methods import (
    METHODS,
    BigBird,
    Causal,
    Dense,
    Dilated,
    Linear,
    Linformer,
    Longformer,
    Method,
    Nystrom,
    Performer,
    SlidingWindow,
    Strided,
    parse,
)
from .multihead import MultiheadAttention, replace_attention
from .patterns import Pattern

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "METHODS",
    "BigBird",
    "BlockMask",
    "Causal",
    "Dense",
    "Dilated",
    "EfficientAttnError",
    "Explanation",
    "InputError",
    "InputTypeError",
    "Linear",
    "Linformer",
    "Longformer",
    "MaskError",
    "Method",
    "MultiheadAttention",
    "Nystrom",
    "Pattern",
    "Performer",
    "SlidingWindow",
    "Strided",
    "UnsupportedError",
    "attention",
    "attention_weights",
    "explain",
    "linear_attention",
    "linformer_attention",
    "merge_attention",
    "nystrom_attention",
    "parse",
    "performer_attention",
    "replace_attention",
]
