"""flash-attn's functions (Dao 2023, version 2.8) on any backend of ours: change the import, and its code runs on a CPU.

    from efficient_attn.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

B batch, N length, H query heads, Hkv key and value heads (H a multiple), D head_dim; tensors are (B, N, H, D), packed
ones (total, H, D) with the places `cu_seqlens` where sequences begin. `causal` and `window_size` align the last query
with the last key. Differences, all of them: float32 and float64 are served too; D up to 256 of any number; what is
returned as S_dmask is None, for nothing n x n is ever made; `deterministic` is always so; a query that sees no key
returns 0; `max_seqlen_q` and `max_seqlen_k` are not needed, `num_splits` is ours to choose. Each function takes
`backend=` as `efficient_attn.attention` does, and raises what that raises.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..biases import ALiBi
from ..cache import cached_attention, paged_attention
from ..cache.rotary import rotate
from ..errors import InputError, InputTypeError, UnsupportedError
from ..functional import attention
from ..masks.packed import offset_of, starts_of
from ..varlen import attention_varlen
from .kv_cache import append, read_cache, rows_of
from .scores import BY_KERNELS, alibi, attend, checked_cap

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    backend: str = "auto",
) -> Any:
    """Attention of (B, N, H, D) tensors.

    Args:
        q: (B, Nq, H, D).
        k, v: (B, Nk, Hkv, D).
        softmax_scale: default 1 / sqrt(D).
        causal: query i sees keys up to i + Nk - Nq.
        window_size: (left, right): query i sees keys from i + Nk - Nq - left to i + Nk - Nq + right; -1: no limit.
        softcap: 0, or c: scores become c tanh(score / c). On a GPU plain PyTorch does: exact, O(n) memory, slow.
        alibi_slopes: (H) or (B, H); -slope |i + Nk - Nq - j| is added to scores. Without gradient.
        return_attn_probs: return (out, softmax_lse (B, H, Nq), None).

    Returns:
        (B, Nq, H, D), contiguous.
    """
    _check_dims(4, q=q, k=k, v=v)
    out, lse = attend(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window=_window(window_size, causal),
        offset=k.shape[1] - q.shape[1], scale=softmax_scale, softcap=softcap, slopes=alibi_slopes, dropout_p=dropout_p,
        backend=backend,
    )  # fmt: skip
    out = out.transpose(1, 2).contiguous()
    return (out, lse, None) if return_attn_probs else out


def flash_attn_qkvpacked_func(qkv: Tensor, *arguments: Any, **named: Any) -> Any:
    """`flash_attn_func` of qkv (B, N, 3, H, D); the other arguments are its own, from dropout_p on."""
    _check_dims(5, qkv=qkv)
    q, k, v = _split("qkv", qkv, 2, 3)
    return flash_attn_func(q, k, v, *arguments, **named)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *arguments: Any, **named: Any) -> Any:
    """`flash_attn_func` of q (B, Nq, H, D) and kv (B, Nk, 2, Hkv, D); the other arguments are its own."""
    _check_dims(5, kv=kv)
    k, v = _split("kv", kv, 2, 2)
    return flash_attn_func(q, k, v, *arguments, **named)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Any:
    """Attention within packed sequences: one call under one block mask, which is kept for the next layer.

    With a soft cap on a GPU, or ALiBi on a GPU or with other lengths of queries than of keys, it is a call a sequence.

    Args:
        q: (total_q, H, D).
        k, v: (total_k, Hkv, D), or (blocks, block length, Hkv, D) with `block_table`.
        cu_seqlens_q, cu_seqlens_k: integers (B + 1): sequence b has rows cu_seqlens[b] to cu_seqlens[b + 1] - 1. They
            are read, which waits for a GPU and breaks a graph of torch.compile.
        block_table: integers (B, blocks of the longest sequence): where in k and v the blocks of a sequence lie.

    Returns:
        (total_q, H, D), or (out, softmax_lse (H, total_q), None); rows behind the last sequence are 0.
    """
    _check_dims(3, q=q)
    cu_q = starts_of("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    if block_table is not None:
        _check_dims(4, k=k, v=v)
        cu_k = starts_of("cu_seqlens_k", cu_seqlens_k, block_table.numel() * k.shape[1])
        lengths = [b - a for a, b in itertools.pairwise(cu_k)]
        k, v = (
            torch.cat([read_cache(x, block_table[b : b + 1])[0, :n] for b, n in enumerate(lengths)]) for x in (k, v)
        )
    _check_dims(3, k=k, v=v)
    cu_k = starts_of("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    window = _window(window_size, causal)
    plain = softcap == 0.0 and alibi_slopes is None
    if plain or (q.device.type in BY_KERNELS and _goes_by_pack(alibi_slopes, q, cu_q, cu_k)):
        out, lse = attention_varlen(
            q, k, v, cu_q, cu_k, window=window, scale=softmax_scale, softcap=softcap or None,
            bias=None if alibi_slopes is None else ALiBi(alibi_slopes.detach()), dropout_p=dropout_p, return_lse=True,
            backend=backend,
        )  # fmt: skip
        return (out, lse, None) if return_attn_probs else out
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, lse = _one_by_one(
        query, key, value, cu_q, cu_k, alibi_slopes, window=window, scale=softmax_scale, softcap=softcap,
        dropout_p=dropout_p, backend=backend,
    )  # fmt: skip
    out = out[0].transpose(0, 1).contiguous()
    return (out, lse[0], None) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None, *arguments: Any, **named: Any
) -> Any:
    """`flash_attn_varlen_func` of qkv (total, 3, H, D); the other arguments are its own, from dropout_p on."""
    _check_dims(4, qkv=qkv)
    q, k, v = _split("qkv", qkv, 1, 3)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *arguments, **named)


def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *arguments: Any, **named: Any
) -> Any:
    """`flash_attn_varlen_func` of q (total_q, H, D) and kv (total_k, 2, Hkv, D); the other arguments are its own."""
    _check_dims(4, kv=kv)
    k, v = _split("kv", kv, 1, 2)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *arguments, **named)


@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    backend: str = "auto",
) -> Any:
    """Attention of new queries to a cache, to which k and v are appended in place. Without gradients, as there.

    Args:
        q: (B, Nq, H, D).
        k_cache, v_cache: (B of the cache, length, Hkv, D), or (blocks, block length, Hkv, D) with `block_table`.
        k, v: (B, new, Hkv, D) or None: written behind the first `cache_seqlens` rows, and seen by this call.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2); k is turned by its place in the cache, q by
            cache_seqlens, cache_seqlens + 1, .. if causal or local, else by cache_seqlens.
        cache_seqlens: the rows of the cache that are filled, one number or integers (B); None: all.
        cache_batch_idx: integers (B): the row of the cache for each batch element.
        cache_leftpad: integers (B): the place in the cache at which an element begins.
        block_table: integers (B, blocks): where in the cache the blocks of an element lie.
        rotary_interleaved: features 2i and 2i + 1 are a pair, else i and i + rotary_dim / 2.

    Returns:
        (B, Nq, H, D), or (out, softmax_lse (B, H, Nq)).
    """
    _check_dims(4, q=q, k_cache=k_cache, v_cache=v_cache)
    if (k is None) != (v is None):
        raise InputError("k and v are appended together; give both or none")
    if (rotary_cos is None) != (rotary_sin is None) or (rotary_cos is not None and k is None):
        raise InputError("rotary_cos and rotary_sin come together, and with a k and v to be appended")
    if block_table is not None and (cache_batch_idx is not None or cache_leftpad is not None):
        raise UnsupportedError(
            "block_table says where an element lies; cache_batch_idx and cache_leftpad do not go with it"
        )
    B, Nq = q.shape[:2]
    window = _window(window_size, causal)
    rows = rows_of(B, k_cache, v_cache, cache_seqlens, cache_batch_idx, block_table)
    if rotary_cos is not None and rotary_sin is not None:
        ahead = torch.arange(Nq, device=q.device) * (causal or window != (-1, -1))
        q = rotate(q, rows.lengths[:, None] + ahead, rotary_cos, rotary_sin, interleaved=rotary_interleaved)
        if k is not None:
            places = rows.lengths[:, None] + torch.arange(k.shape[1], device=q.device)
            k = rotate(k, places, rotary_cos, rotary_sin, interleaved=rotary_interleaved)
    if k is not None and v is not None:
        _check_dims(4, k=k, v=v)
        append(k_cache, k, rows)
        append(v_cache, v, rows)
        rows = rows._replace(lengths=rows.lengths + k.shape[1])
    ends = rows.lengths.tolist()
    begins = [0] * B if cache_leftpad is None else cache_leftpad.tolist()
    options: dict[str, Any] = {"scale": softmax_scale, "backend": backend}
    query, longest = q.transpose(1, 2), max(ends, default=0)
    plain = softcap == 0.0 and alibi_slopes is None and not any(begins)
    if block_table is not None and (plain or q.device.type in BY_KERNELS):
        out, lse = paged_attention(
            query, k_cache, v_cache, block_table, ends, is_causal=False, window=window, softcap=checked_cap(softcap),
            bias=alibi(alibi_slopes, query), return_lse=True, **options,
        )  # fmt: skip
    else:
        key, value = (_cached(x, rows.where, block_table, longest) for x in (k_cache, v_cache))
        if plain:
            out, lse = cached_attention(
                query, key, value, ends, is_causal=False, window=window, return_lse=True, **options
            )
        else:
            parts = [
                attend(
                    query[b : b + 1], key[b : b + 1, :, begin:end], value[b : b + 1, :, begin:end], window=window,
                    offset=end - begin - Nq, softcap=softcap, slopes=_slopes_of(alibi_slopes, b), **options,
                )
                for b, (begin, end) in enumerate(zip(begins, ends, strict=True))
            ]  # fmt: skip
            out, lse = torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
    out = out.transpose(1, 2).contiguous()
    return (out, lse) if return_softmax_lse else out


# --- what they share ---


def _check_dims(dims: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() != dims:
            raise InputError(f"{name} must have {dims} dimensions, lengths before heads; got {tuple(tensor.shape)}")


def _split(name: str, packed: Tensor, dim: int, parts: int) -> tuple[Tensor, ...]:
    if packed.shape[dim] != parts:
        raise InputError(f"{name} must have {parts} in dimension {dim}, got {tuple(packed.shape)}")
    return packed.unbind(dim)


def _window(window_size: tuple[int, int], causal: bool) -> tuple[int, int]:
    sides = tuple(window_size) if isinstance(window_size, (tuple, list)) else ()
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise InputTypeError(
            f"window_size must be (left, right), whole numbers and -1 for no limit; got {window_size!r}"
        )
    return (sides[0], 0) if causal else (sides[0], sides[1])


def _slopes_of(slopes: Tensor | None, b: int) -> Tensor | None:
    """The slopes of one batch element, (H)."""
    return slopes if slopes is None or slopes.dim() < 2 else slopes[b]


def _goes_by_pack(slopes: Tensor | None, q: Tensor, cu_q: tuple[int, ...], cu_k: tuple[int, ...]) -> bool:
    """Whether distances in each sequence are those of rows of the pack."""
    if slopes is None:
        return True
    return slopes.shape == (q.shape[1],) and slopes.is_floating_point() and cu_q == cu_k


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, cu_q: tuple[int, ...], cu_k: tuple[int, ...], slopes: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A call a sequence, (1, H, total, D) each; rows behind the last are 0 and -inf."""
    if len(cu_q) != len(cu_k):
        raise InputError(f"there are {len(cu_q) - 1} sequences of queries and {len(cu_k) - 1} of keys")
    outs, lses = [], []
    for b, (q0, q1, k0, k1) in enumerate(zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)):
        out, lse = attend(
            query[:, :, q0:q1], key[:, :, k0:k1], value[:, :, k0:k1], offset=offset_of(q1 - q0, k1 - k0, True),
            slopes=_slopes_of(slopes, b), **options,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    behind = query.shape[2] - cu_q[-1]
    out, lse = attention(query[:, :, :behind], key[:, :, :0], value[:, :, :0], return_lse=True)
    return torch.cat([*outs, out], 2), torch.cat([*lses, lse], 2)


def _cached(cache: Tensor, places: Tensor | None, block_table: Tensor | None, length: int) -> Tensor:
    """The first `length` rows of each batch element, (B, Hkv, length, D)."""
    if block_table is not None:
        cache = read_cache(cache, block_table)
    elif places is not None:
        cache = cache[places]
    return cache[:, :length].transpose(1, 2)
