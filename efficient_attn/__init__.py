"""efficient-attn: exact, block-sparse and low-rank attention with one operator, one mask and one drop-in module."""

from .backends import BACKENDS
from .errors import EfficientAttnError, InputError, InputTypeError, MaskError, UnsupportedError
from .explanation import Explanation, explain
from .functional import attention, attention_weights, merge_attention
from .lowrank import (
    linear_attention,
    linformer_attention,
    nystrom_attention,
    performer_attention,
    truncated_svd_attention,
)
from .masks import BlockMask
from .methods import (
    METHODS,
    BigBird,
    Causal,
    CentroidTail,
    Dense,
    Dilated,
    Hybrid,
    Linear,
    Linformer,
    Longformer,
    Method,
    Nystrom,
    NystromTail,
    Performer,
    PerformerTail,
    SlidingWindow,
    Strided,
    branch_share,
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
    "CentroidTail",
    "Dense",
    "Dilated",
    "EfficientAttnError",
    "Explanation",
    "Hybrid",
    "InputError",
    "InputTypeError",
    "Linear",
    "Linformer",
    "Longformer",
    "MaskError",
    "Method",
    "MultiheadAttention",
    "Nystrom",
    "NystromTail",
    "Pattern",
    "Performer",
    "PerformerTail",
    "SlidingWindow",
    "Strided",
    "UnsupportedError",
    "attention",
    "attention_weights",
    "branch_share",
    "explain",
    "linear_attention",
    "linformer_attention",
    "merge_attention",
    "nystrom_attention",
    "parse",
    "performer_attention",
    "replace_attention",
    "truncated_svd_attention",
]
