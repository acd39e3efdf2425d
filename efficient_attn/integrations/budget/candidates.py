"""What a layer may become: dense, windows, Longformer, BigBird, chosen blocks, hybrids, Nyström, Linformer.

Each kind in the sizes that are cheaper than dense attention at a length; what does not fit a layer, as Nyström a causal
one, is left out of that layer, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...errors import InputError, InputTypeError
from ...methods import DENSE, Method, parse
from ...patterns import Pattern

Specs = Sequence[str | Method | Pattern]


def default_candidates(length: int) -> list[Method]:
    """The methods that are tried at a length of N tokens, without dense."""
    specs: list[str] = []
    sizes = [size for size in (16, 32, 64, 128, 256, 512, 1024, 2048) if length / 32 <= size <= length / 4]
    for size in sizes:
        specs.append(f"sliding_window:left={size},right={size}")
        specs.append(f"longformer:window={2 * size},global_tokens=4")
    for block in (16, 32, 64, 128):
        if 8 <= length / block <= 64:
            specs.append(f"bigbird:block={block},window=3,global_blocks=1,random_blocks=2")
    for block in (32, 64):
        if length / block >= 8:
            specs += [f"topk_blocks:block={block},fraction={fraction}" for fraction in (0.125, 0.25, 0.5)]
            specs += [f"topp_blocks:block={block},mass={mass}" for mass in (0.9, 0.98)]
    for size in sizes[::2]:
        block = 32 if length < 1024 else 64
        specs.append(f"sliding_window:left={size},right={size}+centroid:block={block}")
        specs.append(f"sliding_window:left={size},right={size}+nystrom:landmarks=32,block={block}")
        specs.append(f"topk_blocks:block={block},fraction=0.125+centroid:block={block}")
    specs += [f"nystrom:landmarks={rank}" for rank in (32, 64, 128) if rank <= length // 4]
    specs += [f"linformer:rank={rank},max_len={length}" for rank in (64, 128, 256) if rank <= length // 2]
    specs += _of_images(length)
    return [parse(spec) for spec in dict.fromkeys(specs)]


def _of_images(length: int) -> list[str]:
    """Neighbourhoods, where the tokens may be a square of patches, with or without a token before them."""
    for before in (0, 1):
        side = math.isqrt(max(length - before, 0))
        if side * side == length - before and side >= 8:
            kernels = [kernel for kernel in (5, 7, 9, 13) if kernel <= side // 2 + 1]
            return [f"neighborhood:size={side}x{side},kernel={kernel},prefix={before}" for kernel in kernels]
    return []


def read(candidates: Specs | None, length: int) -> list[Method]:
    """The methods to choose from, without dense, which always is one.

    Raises:
        InputError: none, or of two layers' shared parameters. InputTypeError: no sequence of specs.
    """
    if isinstance(candidates, (str, Method, Pattern)):
        raise InputTypeError(f"candidates must be a sequence of specs, methods or patterns; got {candidates!r}")
    found = default_candidates(length) if candidates is None else [parse(given) for given in candidates]
    found = [method for method in dict.fromkeys(found) if method != DENSE]
    if candidates is not None and not found:
        raise InputError("candidates must name at least one method besides dense")
    for method in found:
        if candidates is not None and method.shares_state:
            raise InputError(f"{method} has parameters that layers share, so no layer can choose it alone")
    return found
