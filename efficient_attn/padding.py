"""How a padding mask over keys, (B, Nk) bool with True = attend, reaches the operators without n x n memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import InputError, InputTypeError
from .functional import MaskLike, as_block_mask, attention
from .masks import BlockMask


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    *,
    mask: MaskLike = None,
    bias: Tensor | None = None,
    **arguments: Any,
) -> Any:
    """`attention`, in which keys where `key_mask` is False have no influence, whatever they hold.

    The other arguments, and what is returned, are those of `attention`.

    Padding at the end becomes lengths, and whole blocks are skipped. Holes become a bias of 0 and -inf, one number a
    key, on keys and values that are set to zero there; or block lists, where that bias would have to grow to n x n.
    Under torch.compile, torch.func and on a GPU the data is not looked at, and every padding becomes a bias.
    """
    check_key_mask(key_mask, key)
    if key_mask is not None and _may_read(key_mask):
        mask, key_mask = _absorb(mask, key_mask, query, key, bias)
    if key_mask is not None:
        key, value = select_keys(key_mask, key, value)
        bias = add_to_bias(bias, key_mask, query)
    return attention(query, key, value, mask=mask, bias=bias, **arguments)


def check_key_mask(key_mask: Tensor | None, key: Tensor) -> None:
    """Raise unless `key_mask` is None or bool (B, Nk) on the device of key (B, Hkv, Nk, D)."""
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        kind = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise InputTypeError(f"key_mask must be a bool tensor (B, Nk) with True = attend, got {kind}")
    if key_mask.shape != (key.shape[0], key.shape[2]):
        raise InputError(f"key_mask must be (B, Nk) = {(key.shape[0], key.shape[2])}, got {tuple(key_mask.shape)}")
    if key_mask.device != key.device:
        raise InputError(f"key_mask is on {key_mask.device}, key on {key.device}; move it")


def select_keys(key_mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Set masked rows of (B, H, Nk, ...) tensors to zero; neither their content nor a gradient passes."""
    if key_mask is None:
        return tensors
    return tuple(t.masked_fill(~key_mask[:, None, :, None], 0.0) for t in tensors)


def add_to_bias(bias: Tensor | None, key_mask: Tensor, query: Tensor) -> Tensor:
    """Set the bias to -inf where a key is masked; without a bias the result is (B, 1, 1, Nk)."""
    visible = key_mask[:, None, None, :]
    if bias is None:
        bias = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(visible, bias, -torch.inf)


def _may_read(key_mask: Tensor) -> bool:
    """Whether values may steer Python: not while tracing or mapping, and not where reading would stall a stream."""
    return (
        key_mask.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and type(key_mask) is Tensor
    )


def _absorb(
    mask: MaskLike, key_mask: Tensor, query: Tensor, key: Tensor, bias: Tensor | None
) -> tuple[MaskLike, Tensor | None]:
    """Move key_mask into the mask where that is cheaper; returns the mask and what remains of key_mask."""
    lengths = key_mask.sum(-1)
    if bool((key_mask == (torch.arange(key_mask.shape[1]) < lengths[:, None])).all()):
        if bool((lengths == key_mask.shape[1]).all()):
            return mask, None
        padding = BlockMask.from_lengths(lengths, q_len=query.shape[2], kv_len=key.shape[2])
    elif bias is not None and bias.dim() > 1 and bias.shape[-2] > 1 and (bias.dim() < 4 or bias.shape[0] == 1):
        padding = BlockMask.from_dense(key_mask[:, None, None, :].expand(-1, 1, query.shape[2], -1))
    else:
        return mask, key_mask
    return padding if mask is None else as_block_mask(mask, query, key) & padding, None
