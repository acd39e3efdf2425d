"""Reformer's attention as one writes it in PyTorch, on tokens sorted by hash and cut into chunks, and ours."""

from __future__ import annotations

import torch
from torch import Tensor

from efficient_attn.methods import parse

from . import Pair, Peer, Shape, formulas

BUCKETS, ROUNDS = 16, 2
NOTE = "rotations differ, and theirs counts a pair that two rounds see twice, ours once"


def _build(shape: Shape) -> Pair:
    chunk = 2 * shape.seqlen // BUCKETS
    if chunk * BUCKETS != 2 * shape.seqlen:
        raise NotImplementedError(f"it takes lengths that are multiples of {BUCKETS // 2}, got {shape.seqlen}")
    generator = torch.Generator().manual_seed(0)
    rotations = torch.randn(ROUNDS, shape.head_dim, BUCKETS // 2, generator=generator)
    rotations = rotations.to(shape.device, shape.dtype)
    method = parse(f"lsh:n_buckets={BUCKETS},rounds={ROUNDS},shared_qk=true,chunk={chunk}")

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return formulas.sorted_chunks(query, value, rotations, chunk)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = method.attend(query, key, value)[0]
        return out

    return Pair(shape.qkv(), ours, theirs, None, NOTE)


PEERS = (
    Peer(
        "reformer_formula",
        f"LSH, {BUCKETS} buckets, {ROUNDS} rounds, shared queries and keys, hashing included",
        _build,
    ),
)
