"""efficient-attn: exact, block-sparse and low-rank attention with one operator, one mask and one drop-in module."""

import gc

# A full collection in the midst of this would walk all that PyTorch has made, for 0.1 s.
_collects = gc.isenabled()
gc.disable()
try:
    from .backends import BACKENDS
    from .biases import ALiBi, DecomposedBias2D, LowRankBias, PositionBias, RelativeBias, RelativeBias2D, T5Bias
    from .cache import KVCache, PagedKVCache, cached_attention, paged_attention
    from .errors import (
        CheckpointError,
        ConversionError,
        CudaError,
        EfficientAttnError,
        InputError,
        InputTypeError,
        MaskError,
        UnsupportedError,
    )
    from .explanation import Explanation, explain
    from .functional import attention, attention_weights, merge_attention
    from .integrations import Conversion, convert
    from .masks import BlockMask
    from .methods import (
        METHODS,
        CentroidTail,
        Hybrid,
        Linear,
        Linformer,
        Method,
        Nystrom,
        NystromTail,
        Performer,
        PerformerTail,
        branch_share,
        linear_attention,
        linformer_attention,
        nystrom_attention,
        parse,
        performer_attention,
        truncated_svd_attention,
    )
    from .multihead import MultiheadAttention, replace_attention
    from .patterns import (
        LSH,
        Axial,
        BigBird,
        Causal,
        Dense,
        Dilated,
        Documents,
        Fixed,
        Longformer,
        Neighborhood,
        Pattern,
        PrefixLM,
        SlidingWindow,
        SortedBuckets,
        Strided,
        TopKBlocks,
        TopPBlocks,
        per_head,
    )
    from .varlen import attention_varlen
finally:
    if _collects:
        gc.enable()

__version__ = "0.1.0"

__all__ = [
    "BACKENDS",
    "LSH",
    "METHODS",
    "ALiBi",
    "Axial",
    "BigBird",
    "BlockMask",
    "Causal",
    "CentroidTail",
    "CheckpointError",
    "Conversion",
    "ConversionError",
    "CudaError",
    "DecomposedBias2D",
    "Dense",
    "Dilated",
    "Documents",
    "EfficientAttnError",
    "Explanation",
    "Fixed",
    "Hybrid",
    "InputError",
    "InputTypeError",
    "KVCache",
    "Linear",
    "Linformer",
    "Longformer",
    "LowRankBias",
    "MaskError",
    "Method",
    "MultiheadAttention",
    "Neighborhood",
    "Nystrom",
    "NystromTail",
    "PagedKVCache",
    "Pattern",
    "Performer",
    "PerformerTail",
    "PositionBias",
    "PrefixLM",
    "RelativeBias",
    "RelativeBias2D",
    "SlidingWindow",
    "SortedBuckets",
    "Strided",
    "T5Bias",
    "TopKBlocks",
    "TopPBlocks",
    "UnsupportedError",
    "attention",
    "attention_varlen",
    "attention_weights",
    "branch_share",
    "cached_attention",
    "convert",
    "explain",
    "linear_attention",
    "linformer_attention",
    "merge_attention",
    "nystrom_attention",
    "paged_attention",
    "parse",
    "per_head",
    "performer_attention",
    "replace_attention",
    "truncated_svd_attention",
]
