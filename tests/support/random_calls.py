"""Random calls that are spread over ranks: every kind of mask, grouped heads, bias, dropout, padding, uneven shards."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch

from efficient_attn import BlockMask, Longformer, SlidingWindow
from efficient_attn.distributed import Shards
from efficient_attn.methods import parse
from support.rank_calls import Call

KINDS = ("none", "causal", "window", "bits", "blocks", "documents", "lengths", "pattern", "low_rank")
LOW_RANK = ("linear", "performer:features=16", "performer:features=16,feature=relu", "linformer:rank=8,max_len=400",
            "linformer:rank=8,max_len=400,share=none", "nystrom:landmarks=8")  # fmt: skip
PATTERNS = ("sliding_window:left=40,right=9", "dilated", "prefix_lm:prefix=20", "bigbird:block=16",
            "longformer:window=16", "longformer:window=16,global_tokens=40", "strided", "fixed",
            "deepspeed_variable")  # fmt: skip


def random_call(seed: int, ranks: int, kind: str | None = None) -> Call:
    """A call that is spread over so many ranks."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    dtype = draw.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64))
    kind = KINDS[seed % len(KINDS)] if kind is None else kind
    B, Hkv, group = draw.randint(1, 2), draw.choice((1, 2, 3)), draw.choice((1, 2, 3))
    Nq = Nk = draw.choice((1, 5, 17, 64, 100, 190, 257, 330))
    if kind in ("none", "bits", "blocks", "window", "causal") and draw.random() < 0.3:
        Nk = draw.choice((1, 30, 129, 200))
    Hq, D, Dv = Hkv * group, draw.choice((4, 8, 20)), draw.choice((4, 8, 20))
    arguments: dict[str, Any] = {}
    method = None
    if Nq != Nk and kind in ("window", "causal"):
        arguments["causal_alignment"] = draw.choice(("top_left", "bottom_right"))
    if kind == "causal" or (kind in ("blocks", "documents") and Nq == Nk and draw.random() < 0.5):
        arguments["is_causal"] = True
    if kind == "window":
        arguments["mask"] = SlidingWindow(left=draw.choice((-1, 3, 40)), right=draw.choice((-1, 0, 20)))
    elif kind == "bits":
        shape = (draw.choice((1, B)), draw.choice((1, Hq)), Nq, Nk)
        arguments["mask"] = torch.rand(shape, generator=generator) < draw.choice((0.02, 0.5))
    elif kind == "blocks":
        size = draw.choice(((16, 16), (32, 16), (64, 128), (128, 128)))
        bits = torch.rand(draw.choice((1, B)), draw.choice((1, Hq)), Nq, Nk, generator=generator) < 0.3
        arguments["mask"] = BlockMask.from_dense(bits, block_size=size)
    elif kind == "documents":
        ids = torch.randint(0, 4, (draw.choice((1, B)), Nq), generator=generator).sort(-1).values
        arguments["mask"] = BlockMask.from_documents(ids, block_size=draw.choice((16, 128)))
    elif kind == "lengths":
        lengths = torch.randint(0, Nk + 1, (B,), generator=generator)
        arguments["mask"] = BlockMask.from_lengths(lengths, q_len=Nq, kv_len=Nk)
    elif kind == "pattern":
        squares = ("axial", "neighborhood:kernel=5", "neighborhood:kernel=5,stride=3") if Nq in (64, 100) else ()
        method = (parse(draw.choice((*PATTERNS, *squares))), None)
        if method[0].accepts_causal and draw.random() < 0.5:
            arguments["is_causal"] = True
    elif kind == "low_rank":
        chosen = parse(draw.choice(LOW_RANK))
        state = chosen.build(Hkv * D, Hkv, D)
        method = (chosen, None if state is None else state.to(dtype))
        if chosen.accepts_causal and draw.random() < 0.5:
            arguments["is_causal"] = True
    alignment = draw.choice(("top_left", "bottom_right"))
    tensors = {} if kind == "low_rank" else joining(draw, normal, B, Hq, Hkv, Nq, Nk, D, dtype)
    if kind != "low_rank" and "u" not in tensors and draw.random() < 0.25:
        arguments["softcap"] = draw.choice((0.7, 2.0, 30.0))
    key_mask = None
    if draw.random() < 0.4 and Nq == Nk:
        key_mask = torch.rand(B, Nk, generator=generator) < 0.8
        if draw.random() < 0.5:
            key_mask = torch.arange(Nk) < torch.randint(0, Nk + 1, (B, 1), generator=generator)
    if draw.random() < 0.3:
        arguments |= {"dropout_p": 0.3, "dropout_seed": seed}
    transport = draw.choice(("auto", "gather", "ring", "all_to_all"))
    layout = draw.choice(("zigzag", "contiguous", "uneven"))
    if layout == "uneven":
        layout = [uneven(length, ranks, draw) for length in {Nq, Nk}]
    if kind == "documents" and draw.random() < 0.5:
        arguments["mask"] = arguments["mask"] & Longformer(window=16).block_mask(Nq, Nk)
    shapes = {"query": (B, Hq, Nq, D), "key": (B, Hkv, Nk, D), "value": (B, Hkv, Nk, Dv)}
    tensors = {name: normal(*shape).to(dtype) for name, shape in shapes.items()} | tensors
    grad = normal(B, Hq, Nq, Dv).to(dtype)
    return Call(tensors, arguments, alignment, key_mask, grad, layout, transport, method, draw.choice((64, 2**22)))


def joining(
    draw: random.Random, normal: Any, B: int, Hq: int, Hkv: int, Nq: int, Nk: int, D: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What joins the scores: often nothing, often several."""
    found, wide = {}, torch.float64 if dtype == torch.float64 else torch.float32
    if draw.random() < 0.4:
        shape = (draw.choice((1, B)), draw.choice((1, Hq)), draw.choice((1, Nq)), draw.choice((1, Nk)))
        found["bias"] = normal(*shape[draw.choice((0, 0, 1)) if shape[0] == 1 else 0 :]).to(draw.choice((dtype, wide)))
    if draw.random() < 0.25:
        found["sinks"] = normal(Hq).to(draw.choice((dtype, wide)))
    kind = draw.choice(("slopes", "table", "buckets", "low rank", "none", "none", "none", "none"))
    if kind == "slopes":
        found["slopes"] = (normal(*draw.choice(((Hq,), (B, Hq)))).abs() / 8).to(wide)
    elif kind == "table":
        found["table"] = normal(*draw.choice(((2 * 40 + 1,), (Hq, 2 * 40 + 1)))).to(wide)
    elif kind == "buckets":
        found["buckets"] = normal(32, Hq).to(wide)
    elif kind == "low rank":
        found["u"], found["w"] = (
            normal(*draw.choice(((n, 3), (1, h, n, 3)))).to(dtype) / 2 for h, n in ((Hq, Nq), (Hkv, Nk))
        )
    return found


def uneven(length: int, ranks: int, draw: random.Random) -> Shards:
    """Runs of random lengths, dealt out at random."""
    edges = [
        0,
        *sorted(draw.sample(range(16, length, 16), min(draw.randint(0, 9), len(range(16, length, 16))))),
        length,
    ]
    held: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for run in itertools.pairwise(edges):
        held[draw.randrange(ranks)].append(run)
    return Shards(length, tuple(tuple(runs) for runs in held))
