"""Kernels of packages for NVIDIA GPUs, which take (B, N, H, D). Written from their documentation; not run yet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import elu

from efficient_attn import Neighborhood, attention, linear_attention

from . import Operator, Pair, Peer, Shape, needs_gpu

KERNEL = 255
CAUSAL = partial(attention, is_causal=True)


def _flash_attn(shape: Shape) -> Operator:
    from flash_attn import flash_attn_func

    return partial(flash_attn_func, causal=True)


def _xformers(shape: Shape) -> Operator:
    from xformers.ops import memory_efficient_attention

    call: Operator = memory_efficient_attention
    return call


def _flashinfer(shape: Shape) -> Operator:
    from flashinfer import single_prefill_with_kv_cache

    if shape.batch != 1:
        raise NotImplementedError(f"their call takes one sequence, got a batch of {shape.batch}")
    return lambda query, key, value: single_prefill_with_kv_cache(query[0], key[0], value[0], causal=True)[None]


def _fla(shape: Shape) -> Operator:
    from fla.ops.linear_attn import chunk_linear_attn

    options: dict[str, Any] = {"scale": 1.0, "normalize": True}
    return lambda query, key, value: chunk_linear_attn(elu(query) + 1, elu(key) + 1, value, **options)[0]


def _natten(shape: Shape) -> Operator:
    """A window that is shifted inside at the borders."""
    from natten import na1d

    return partial(na1d, kernel_size=KERNEL)


def _build(load: Callable[[Shape], Operator], ours: Operator, shape: Shape) -> Pair:
    call = load(shape)

    def theirs(*tensors: Tensor) -> Tensor:
        return call(*(x.transpose(1, 2) for x in tensors)).transpose(1, 2)

    return Pair(shape.qkv(), ours, theirs, 2e-2)


def _peer(
    name: str, computes: str, package: str, load: Callable[[Shape], Operator], ours: Operator, trains: bool = True
) -> Peer:
    return Peer(name, computes, partial(_build, load, ours), package, needs_gpu(name, package), trains)


PEERS = (
    _peer("flash_attn", "exact attention, causal", "flash-attn", _flash_attn, CAUSAL),
    _peer("xformers", "exact attention", "xformers", _xformers, attention),
    _peer("flashinfer", "exact attention, causal", "flashinfer-python", _flashinfer, CAUSAL, trains=False),
    _peer("fla", "linear attention, elu + 1, causal", "flash-linear-attention", _fla,
          partial(linear_attention, is_causal=True, feature_map="elu")),
    _peer("natten", f"neighborhood of {KERNEL} tokens", "natten", _natten,
          partial(attention, mask=Neighborhood(kernel=(KERNEL,), axes=1))),
)  # fmt: skip
