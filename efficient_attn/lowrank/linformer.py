"""Linformer: keys and values mixed along the sequence (Wang et al., 2020)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import InputError, InputTypeError
from ..functional import attention, attention_weights, check_key_mask, prepare_inputs, select_keys
from .common import refuse_causal


def linformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over r learned mixtures of the keys and values: softmax(scale Q (E K)^T) (F V), O(N r (D + Dv)).

    Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020, eq. 7. Masked keys and values count as zero.
    A mixture holds keys of every position, so there is no causal Linformer, no mask of pairs, and no bias.

    Args:
        query, key, value, scale, dropout_p, dropout_seed: as in `attention`; dropout acts on the (Nq, r) weights.
        key_projection: E, (r, max_len), or (Hkv, r, max_len) with own mixtures for each head; Nk <= max_len. Shorter
            sequences use the first Nk columns.
        value_projection: F, like E.
        key_mask: see `efficient_attn.lowrank`.

    Returns:
        out (B, Hq, Nq, Dv). Differentiable in every tensor.

    Raises:
        UnsupportedError: is_causal. InputError, InputTypeError: arguments that do not belong together.
    """
    query, key, value = prepare_inputs(query, key, value)
    check_key_mask(key_mask, key)
    refuse_causal("Linformer", "each of its r keys mixes all positions", is_causal)
    E = _sequence_projection("key_projection", key_projection, key)
    F_ = _sequence_projection("value_projection", value_projection, value)
    if E.shape[-2] != F_.shape[-2]:
        raise InputError(f"key_projection has rank {E.shape[-2]}, value_projection {F_.shape[-2]}; they must be equal")
    key, value = select_keys(key_mask, key, value)
    return attention(
        query,
        _mixed(E, key),
        _mixed(F_, value),
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        backend=backend,
    )


def linformer_weights(
    query: Tensor,
    key: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    *,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
) -> Tensor:
    """What multiplies the values in `linformer_attention`: softmax(scale Q (E K)^T) F, (B, Hq, Nq, Nk), any sign."""
    query, key, _ = prepare_inputs(query, key, key)
    check_key_mask(key_mask, key)
    refuse_causal("Linformer", "each of its r keys mixes all positions", is_causal)
    E = _sequence_projection("key_projection", key_projection, key)
    F_ = _sequence_projection("value_projection", value_projection, key)
    (key,) = select_keys(key_mask, key)
    weights = attention_weights(query, E @ key, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed)
    weights = weights @ (F_ if F_.dim() == 2 else F_.repeat_interleave(query.shape[1] // max(key.shape[1], 1), 0))
    return weights if key_mask is None else weights.masked_fill(~key_mask[:, None, None, :], 0.0)


def _mixed(projection: Tensor, x: Tensor) -> Tensor:
    """(r, N) or (H, r, N) times (B, H, N, D): contiguous (B, H, r, D)."""
    if projection.dim() == 3:
        return (projection @ x).contiguous()
    # One product for all heads, in the layout that a module's projections have: there nothing is copied.
    B, H, N, D = x.shape
    mixed = projection @ x.permute(2, 0, 1, 3).reshape(N, B * H * D)
    return mixed.view(projection.shape[0], B, H, D).permute(1, 2, 0, 3).contiguous()


def _sequence_projection(name: str, projection: Any, tensor: Tensor) -> Tensor:
    """The first Nk columns of E or F, in the dtype of the tensor that it mixes."""
    if not isinstance(projection, Tensor) or not projection.is_floating_point():
        raise InputTypeError(f"{name} must be a floating-point tensor, got {type(projection).__name__}")
    heads, length = tensor.shape[1:3]
    if projection.dim() not in (2, 3) or projection.shape[:-2] not in ((), (heads,)) or projection.shape[-2] < 1:
        raise InputError(
            f"{name} must be (rank, max_len) or (Hkv, rank, max_len) with Hkv={heads}, got {tuple(projection.shape)}"
        )
    if projection.shape[-1] < length:
        raise InputError(
            f"{length} keys do not fit {name} {tuple(projection.shape)}: Linformer is built for max_len="
            f"{projection.shape[-1]} keys. Build it with max_len >= {length}"
        )
    return projection[..., :length].to(tensor.dtype)
