"""Compiled FlexAttention under our masks."""

from __future__ import annotations

import shutil
from functools import partial

import torch

from efficient_attn import BigBird, SlidingWindow, attention
from efficient_attn.patterns import Pattern

from . import Pair, Peer, Shape
from .formulas import flex


def _build(pattern: Pattern, shape: Shape) -> Pair:
    mask = pattern.block_mask(shape.seqlen, shape.seqlen, num_heads=shape.heads, device=shape.device)
    return Pair(shape.qkv(), partial(attention, mask=mask), flex(mask), shape.tolerance)


def _absent() -> str | None:
    if not torch.cuda.is_available() and not (shutil.which("g++") or shutil.which("clang++")):
        return "compiled FlexAttention on CPU needs a C++ compiler (g++ or clang++)"
    return None


_COMMON = {"absent": _absent, "compiles": True, "trains": torch.cuda.is_available()}  # no backward on CPU
PEERS = (
    Peer("flex_window", "sliding window, 128 keys to each side", partial(_build, SlidingWindow(128, 128)), **_COMMON),
    Peer("flex_bigbird", "BigBird, blocks of 64", partial(_build, BigBird()), **_COMMON),
)
