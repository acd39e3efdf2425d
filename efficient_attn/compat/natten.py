"""NATTEN's neighborhood attention (Hassani et al. 2023 to 2025, version 0.21) on any backend of ours.

    from efficient_attn.compat.natten import na1d, na2d, na3d

B batch, X, Y, Z sides of the grid, H query heads, Hkv key and value heads (H a multiple), D head_dim; tensors are
(B, X, Y, Z, H, D). `kernel_size`, `stride`, `dilation` and `is_causal` are `patterns.Neighborhood`'s, `additional_keys`
keys behind those of the grid: one mask, one softmax, and no merging of two results. Differences, all of them: float64
and any D that `attention` takes are served too; `scale=0` is 0; what chooses tiles and kernels (`TUNING`) is not looked
at, but `backend`, which takes our names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, InputTypeError
from ..functional import attention
from ..patterns import Neighborhood

__all__ = ["na1d", "na2d", "na3d"]

TUNING = frozenset(
    {"attention_kwargs", "q_tile_shape", "kv_tile_shape", "backward_q_tile_shape", "backward_kv_tile_shape",
     "backward_kv_splits", "backward_use_pt_reduction", "run_persistent_kernel", "kernel_schedule", "torch_compile"}
)  # fmt: skip


def na1d(query: Tensor, key: Tensor, value: Tensor, kernel_size: int | Sequence[int], *args: Any, **named: Any) -> Any:
    """Neighborhood attention along a line, of (B, X, H, D); arguments as in `na2d`."""
    return _attend(1, query, key, value, kernel_size, *args, **named)


def na2d(query: Tensor, key: Tensor, value: Tensor, kernel_size: int | Sequence[int], *args: Any, **named: Any) -> Any:
    """Neighborhood attention in an image.

    Args:
        query: (B, X, Y, H, D).
        key, value: (B, X, Y, Hkv, D), (B, X, Y, Hkv, Dv).
        kernel_size: how many positions a query sees along each axis, or one number for all; at most the axis.
        stride: 1, or how many neighbouring queries share a window; at most kernel_size.
        dilation: of the window; kernel_size * dilation is at most the axis.
        is_causal: False; True hides what lies ahead along each axis, or one bool an axis.
        scale: default 1 / sqrt(D).
        additional_keys, additional_values: (B, E, Hkv, D), (B, E, Hkv, Dv): E more tokens, which every query sees.
        backend: as `efficient_attn.attention` takes it.
        return_lse: return (out, lse (B, X, Y, H)).

    Returns:
        (B, X, Y, H, Dv).

    Raises:
        InputError: shapes and windows that do not fit. InputTypeError: an argument that is not known.
    """
    return _attend(2, query, key, value, kernel_size, *args, **named)


def na3d(query: Tensor, key: Tensor, value: Tensor, kernel_size: int | Sequence[int], *args: Any, **named: Any) -> Any:
    """Neighborhood attention in a video, of (B, X, Y, Z, H, D); arguments as in `na2d`."""
    return _attend(3, query, key, value, kernel_size, *args, **named)


def _attend(
    axes: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    backend: str | None = None,
    return_lse: bool = False,
    **tuning: Any,
) -> Any:
    unknown = [name for name in tuning if name not in TUNING]
    if unknown:
        raise InputTypeError(f"na{axes}d takes no {', '.join(unknown)}; besides NATTEN's tensors and windows it knows "
                             f"{', '.join(sorted(TUNING))}, which change no result")  # fmt: skip
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != axes + 3 or tensor.shape[: axes + 1] != query.shape[: axes + 1]:
            raise InputError(
                f"na{axes}d: {name} must be (batch, {'XYZ'[:axes]}, heads, head_dim), one axis for each letter and as "
                f"long as query's {tuple(query.shape)}; got {tuple(tensor.shape)}"
            )
    shape = tuple(map(int, query.shape[1 : axes + 1]))
    q, k, v = (x.flatten(1, axes) for x in (query, key, value))
    if (additional_keys is None) != (additional_values is None):
        raise InputError("additional_keys and additional_values come together; give both or none")
    if additional_keys is not None and additional_values is not None:
        k, v = _joined("additional_keys", k, additional_keys), _joined("additional_values", v, additional_values)
        if k.shape[1] != v.shape[1]:
            more = additional_keys.shape[1], additional_values.shape[1]
            raise InputError(f"additional_keys are {more[0]} tokens and additional_values {more[1]}")
    mask = None
    if math.prod(shape):
        windows = (_each(x) for x in (kernel_size, dilation, is_causal or False, stride))
        kernel, steps, causal, strides = windows
        mask = Neighborhood(
            shape, kernel, steps, causal, axes=min(axes, 2), stride=strides, additional_keys=k.shape[1] - q.shape[1]
        )
    out, lse = attention(
        *(x.transpose(1, 2) for x in (q, k, v)), mask=mask, scale=scale, backend=backend or "auto", return_lse=True
    )
    out = out.transpose(1, 2).reshape(*query.shape[:-1], value.shape[-1])
    return (out, lse.transpose(1, 2).reshape(query.shape[:-1])) if return_lse else out


def _joined(name: str, own: Tensor, additional: Tensor) -> Tensor:
    """The tokens of the grid and the additional ones behind them, (B, tokens + E, Hkv, D)."""
    fits = additional.dim() == 4 and additional.shape[0] == own.shape[0] and additional.shape[2:] == own.shape[2:]
    if not fits:
        B, _, heads, dim = own.shape
        raise InputError(f"{name} must be ({B}, tokens, {heads}, {dim}), got {tuple(additional.shape)}")
    return torch.cat([own, additional], 1)


def _each(option: Any) -> tuple[Any, ...]:
    return tuple(option) if isinstance(option, (tuple, list)) else (option,)
