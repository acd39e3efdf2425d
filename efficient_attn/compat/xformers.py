"""xformers' memory_efficient_attention and its masks (Lefaudeux et al. 2022, version 0.0.32) on any backend of ours.

    from efficient_attn.compat.xformers import BlockDiagonalMask, LowerTriangularMask, memory_efficient_attention

The masks have their names and constructors there; those of an installed xformers are understood too. M queries, Mk
keys, H heads, K head_dim: tensors are (B, M, H, K), (B, M, K) for one head, or (B, M, G, H, K) for G groups of H heads,
whose keys and values may be expanded from one. A query that sees no key returns 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..functional import attention
from ..masks import BlockMask
from ..masks.packed import packed_mask

__all__ = [
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalLocalAttentionMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalMask",
    "LocalAttentionFromBottomRightMask",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularMask",
    "LowerTriangularMaskWithTensorBias",
    "memory_efficient_attention",
]


class LowerTriangularMask:
    """Query i sees keys up to i."""

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        """This mask, with a bias (B, H, M, Mk)."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularFromBottomRightMask:
    """The last query sees every key, the one before all but the last, ..."""


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Query i sees keys up to i, and a bias (B, H, M, Mk) is added to scores; it gets a gradient."""

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias


@dataclass(frozen=True)
class LocalAttentionFromBottomRightMask:
    """Query i sees keys i + Mk - M - window_left to i + Mk - M + window_right."""

    window_left: int
    window_right: int


@dataclass(frozen=True)
class Sequences:
    """Where packed sequences begin, and the end of the last."""

    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, lengths: Sequence[int]) -> Sequences:
        """Of sequences of these lengths, one behind the other."""
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + int(length))
        return cls(starts)


@dataclass(frozen=True)
class BlockDiagonalMask:
    """Packed sequences, as a batch of one: a query sees the keys of its own sequence."""

    q_seqinfo: Sequences
    k_seqinfo: Sequences
    _batch_sizes: tuple[int, ...] | None = field(default=None)

    @classmethod
    def from_seqlens(cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None) -> BlockDiagonalMask:
        """Of sequences with these numbers of queries and keys; the same by default."""
        if kv_seqlen is not None and len(kv_seqlen) != len(q_seqlen):
            raise InputError(f"there are {len(q_seqlen)} sequences of queries and {len(kv_seqlen)} of keys")
        queries = Sequences.from_seqlens(q_seqlen)
        return cls(queries, queries if kv_seqlen is None else Sequences.from_seqlens(kv_seqlen))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """The mask of tensors (B_i, M_i, ...), whose rows are put one behind the other: (1, sum of B_i M_i, ...)."""
        sizes = tuple(x.shape[0] for x in tensors)
        lengths = [x.shape[1] for x in tensors for _ in range(x.shape[0])]
        queries = Sequences.from_seqlens(lengths)
        packed = torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], 1)
        return cls(queries, queries, sizes), packed

    def split(self, tensor: Tensor) -> list[Tensor]:
        """What `from_tensor_list` put together, taken apart: (B_i, M_i, ...) each."""
        starts = self.q_seqinfo.seqstart_py
        rows = [tensor[:, a:b] for a, b in itertools.pairwise(starts)]
        found, at = [], 0
        for size in self._batch_sizes or (1,) * len(rows):
            found.append(torch.cat(rows[at : at + size]))
            at += size
        return found

    def make_causal(self) -> BlockDiagonalCausalMask:
        """Each sequence causal, from its top left."""
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        """Each sequence causal, its last query at its last key."""
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        """Each sequence causal, from its top left, with the last `window_size` keys."""
        return BlockDiagonalCausalLocalAttentionMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Packed sequences; a sequence's query i sees its keys up to i."""


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Packed sequences; a sequence's last query sees all its keys."""


@dataclass(frozen=True)
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Packed sequences; a sequence's query i sees its keys i - window_size + 1 to i."""

    _window_size: int = 1


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of (B, M, H, K) tensors under one of the masks, a bias, or None.

    Args:
        query: (B, M, H, K), (B, M, K) or (B, M, G, H, K); key and value likewise, with Mk for M.
        attn_bias: a mask of this module or of xformers, or a bias that broadcasts to (B, H, M, Mk), for groups
            (B, G, H, M, Mk); -inf hides a pair.
        p: probability of dropping a weight.
        scale: default 1 / sqrt(K).
        op: of xformers' kernels; any is taken for "the one that is right", and ours are always.
        output_dtype: of the result; default the query's.

    Returns:
        In the query's shape, with value's last dimension.

    Raises:
        UnsupportedError: a mask of xformers that is not listed here.
    """
    shape = query.shape
    if query.dim() not in (3, 4, 5) or key.dim() != query.dim() or value.dim() != query.dim():
        raise InputError(
            f"query, key and value must be (B, M, K), (B, M, H, K) or (B, M, G, H, K), all alike; got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if query.dim() == 5 and key.stride(3) == value.stride(3) == 0:  # one head for all of a group: grouped queries
        key, value = key[:, :, :, 0], value[:, :, :, 0]
    q, k, v = (_heads_first(x) for x in (query, key, value))
    mask, bias = _as_mask(attn_bias, q.shape[2], k.shape[2], query)
    if bias is not None and bias.dim() == 5:
        bias = bias.flatten(1, 2)
    elif bias is not None and bias.dim() == 3:  # (B * H, M, Mk), as (B, M, K) tensors have it
        bias = bias[:, None]
    out = attention(q, k, v, mask=mask, bias=bias, scale=scale, dropout_p=p, backend=backend).transpose(1, 2)
    out = out.reshape(*shape[:-1], value.shape[-1])
    return out if output_dtype is None else out.to(output_dtype)


def _heads_first(x: Tensor) -> Tensor:
    """(B, H, M, K) of any of the three layouts."""
    if x.dim() == 3:
        return x[:, None]
    if x.dim() == 5:
        x = x.flatten(2, 3)
    return x.transpose(1, 2)


def _as_mask(given: Any, M: int, Mk: int, query: Tensor) -> tuple[BlockMask | None, Tensor | None]:
    """Mask and bias. By the name of the class, so that an installed xformers' own objects serve as well."""
    if given is None or isinstance(given, Tensor):
        return None, given
    names = [cls.__name__ for cls in type(given).__mro__]
    name, offset = names[0], Mk - M
    if name == "LowerTriangularMask":
        return BlockMask(M, Mk, window=(-1, 0)), None
    if name == "LowerTriangularMaskWithTensorBias":
        return BlockMask(M, Mk, window=(-1, 0)), given._bias
    if name == "LowerTriangularFromBottomRightMask":
        return BlockMask(M, Mk, window=(-1, 0), window_offset=offset), None
    if name == "LocalAttentionFromBottomRightMask":
        return BlockMask(M, Mk, window=(given.window_left, given.window_right), window_offset=offset), None
    windows = {
        "BlockDiagonalMask": ((-1, -1), False),
        "BlockDiagonalCausalMask": ((-1, 0), False),
        "BlockDiagonalCausalFromBottomRightMask": ((-1, 0), True),
        "BlockDiagonalCausalLocalAttentionMask": ((getattr(given, "_window_size", 1) - 1, 0), False),
    }
    if name not in windows:
        raise UnsupportedError(
            f"attn_bias is a {name}, which is not served; there are {', '.join(__all__[:-1])} and tensors"
        )
    if query.shape[0] != 1:
        raise InputError(f"packed sequences are a batch of one, got a batch of {query.shape[0]}")
    starts = tuple(given.q_seqinfo.seqstart_py), tuple(given.k_seqinfo.seqstart_py)
    if starts[0][-1] > M or starts[1][-1] > Mk:
        raise InputError(f"the mask is of {starts[0][-1]} queries and {starts[1][-1]} keys; there are {M} and {Mk}")
    window, bottom_right = windows[name]
    return packed_mask(*starts, M, Mk, window=window, bottom_right=bottom_right, device=query.device), None
