"""flashinfer's single_prefill_with_kv_cache: one sequence. Written from its documentation; it needs an NVIDIA GPU."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from efficient_attn import attention

from . import Pair, Peer, Shape, needs_gpu


def _build(shape: Shape) -> Pair:
    from flashinfer import single_prefill_with_kv_cache

    if shape.batch != 1:
        raise NotImplementedError(f"their call takes one sequence, got a batch of {shape.batch}")

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (N, H, D) there
        out: Tensor = single_prefill_with_kv_cache(*(x[0].transpose(0, 1) for x in (query, key, value)), causal=True)
        return out.transpose(0, 1)[None]

    return Pair(shape.qkv(), partial(attention, is_causal=True), theirs, 2e-2)


PEERS = (
    Peer(
        "flashinfer",
        "exact attention, causal",
        _build,
        "flashinfer-python",
        needs_gpu("flashinfer", "flashinfer-python"),
        trains=False,
    ),
)
