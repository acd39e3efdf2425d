"""PyTorch's flex_attention (Dong et al. 2024) on any backend of ours, for block masks.

    from efficient_attn.compat.flex_attention import flex_attention
    from torch.nn.attention.flex_attention import create_block_mask

A mask is read once, exactly, and kept as long as it lives; no torch.compile is needed.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..functional import attention
from ..masks import BlockMask

__all__ = ["flex_attention"]

_READ: weakref.WeakKeyDictionary[Any, BlockMask] = weakref.WeakKeyDictionary()


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Any = None,
    *,
    return_aux: Any = None,
    backend: str = "auto",
) -> Any:
    """Attention under a block mask.

    Args:
        query: (B, Hq, Nq, D).
        key: (B or 1, Hkv, Nk, D), Hkv = Hq unless `enable_gqa`.
        value: (B or 1, Hkv, Nk, Dv).
        score_mod: None; a function of scores is refused.
        block_mask: of torch.nn.attention.flex_attention.create_block_mask, or ours.
        scale: default 1 / sqrt(D).
        return_lse: also return lse (B, Hq, Nq), the natural log-sum-exp.
        return_aux: PyTorch's AuxRequest(lse=True), for (out, AuxOutput(lse)).
        kernel_options: of PyTorch's kernel; not looked at.

    Raises:
        UnsupportedError: a score_mod, or an auxiliary output other than lse.
    """
    if score_mod is not None:
        name = getattr(score_mod, "__name__", type(score_mod).__name__)
        raise UnsupportedError(
            f"score_mod={name} changes scores, and only masks are served here; hide pairs by a mask_mod "
            "(create_block_mask), add numbers by efficient_attn.attention(bias=...), take its softcap, or write any "
            "other as docs/compat.md does"
        )
    if query.dim() == 4 and key.dim() == 4 and value.dim() == 4:
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise InputError(
                f"query has {query.shape[1]} heads and key {key.shape[1]}; say enable_gqa=True if heads share keys"
            )
        if key.shape[0] == 1 != query.shape[0]:
            key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    if return_aux is not None and getattr(return_aux, "max_scores", False):
        raise UnsupportedError("return_aux asks for max_scores, which no kernel here keeps; ask for lse alone")
    mask = None if block_mask is None else _read(block_mask)
    out, lse = attention(query, key, value, mask=mask, scale=scale, return_lse=True, backend=backend)
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        return out, AuxOutput(lse=lse if return_aux.lse else None)
    return (out, lse) if return_lse else out


def _read(block_mask: Any) -> BlockMask:
    """The mask as ours."""
    if isinstance(block_mask, BlockMask):
        return block_mask
    if not hasattr(block_mask, "kv_num_blocks"):
        return BlockMask.from_flex(block_mask)  # which says what it takes
    found = _READ.get(block_mask)
    if found is None:
        found = BlockMask.from_flex(block_mask)
        _READ[block_mask] = found
    return found
