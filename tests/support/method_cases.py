"""Random calls of methods: any spec, lengths around the ends of blocks, every route of hiding, every dtype."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from efficient_attn.masks import BlockMask
from efficient_attn.methods import Hybrid, LowRankMethod, Method, Nystrom, Sparse, parse

from .definitions import Pairs

EDGES = tuple(sorted({n * 16 + d for n in (1, 2, 3, 4, 6) for d in (-1, 0, 1)} | {1, 2, 7, 33, 127, 128, 129}))


@dataclass
class MethodCase:
    """One call: what it attends to, and the keywords of `Method.attend`."""

    seed: int
    spec: str
    method: Method
    shape: tuple[int, int, int, int, int, int, int]  # B, Hq, Hkv, Nq, Nk, D, Dv
    dtype: torch.dtype
    call: dict[str, Any] = field(default_factory=dict)
    routes: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = {k: v for k, v in self.call.items() if not isinstance(v, Tensor | BlockMask) and v is not None}
        return f"seed {self.seed}: {self.spec} {self.shape} {self.dtype} {' '.join(self.routes)} {how}"


def random_spec(choose: random.Random, Nq: int, Nk: int) -> str:
    """A spec that is defined for these lengths."""
    c, n = choose.choice, Nq
    several = lambda low, high: choose.randint(low, high)  # noqa: E731
    square = Nq == Nk
    content = [
        f"topk_blocks:block={c((16, 32))},blocks={several(1, 3)},sink={several(0, 1)},local={several(1, 2)},"
        f"summary={c(('mean', 'minmax'))},queries={c(('mean', 'first'))}",
        f"topk_blocks:block=16,fraction={c((0.2, 0.5, 1.0))}",
        f"topp_blocks:block={c((16, 32))},mass={c((0.3, 0.6, 0.9))},sink={several(0, 1)},"
        f"summary={c(('mean', 'minmax'))},queries={c(('mean', 'first'))}",
        f"lsh:n_buckets={c((2, 4, 8))},rounds={several(1, 3)},seed={several(0, 3)}",
        f"sorted_buckets:size={c((1, 5, 16, 40, 200))},rounds={several(1, 2)}",
        "topk_blocks:block=16,blocks=2 & sliding_window:left=20,right=20",
        "topk_blocks:block=16,blocks=1 | strided:stride=7",
        "per_head(topk_blocks:block=16,blocks=1; strided:stride=7)",
    ]
    places = [
        "dense", "causal",
        f"sliding_window:left={several(-1, 20)},right={several(-1, 20)}",
        f"dilated:left={several(0, 9)},right={several(0, 9)},dilation={several(1, 5)}",
        f"strided:stride={several(1, 20)},causal={c(('true', 'false'))},part={c(('both', 'local', 'summary'))}",
        f"fixed:stride={several(6, 20)},summary={several(1, 3)},shift={several(0, 1)},causal={c(('true', 'false'))}",
        f"longformer:window={2 * several(0, 9)},global_tokens={several(0, 2)},global_indices={several(0, 70)}",
        f"prefix_lm:prefix={several(0, 40)}",
        f"strided:stride={several(2, 9)} & sliding_window:left=30,right=3",
        f"per_head(strided:stride={several(2, 9)}; sliding_window:left=3,right=3)",
    ]  # fmt: skip
    if square:
        content.append(f"lsh:n_buckets=4,rounds={several(1, 2)},shared_qk=true,chunk={c((0, 0, 8, 16))}")
        places += [
            f"bigbird:block={c((16, 32))},window={c((1, 3))},global_blocks={several(0, 2)},"
            f"random_blocks={several(0, 2)}",
            f"documents:lengths={several(1, 40)},causal={c(('true', 'false'))}",
            f"deepspeed_fixed:block=16,num_local_blocks={several(1, 3)}",
            f"deepspeed_bigbird:block=16,num_random_blocks={several(0, 1)},num_sliding_window_blocks=1",
        ]
        if n >= 5:
            kernel = c((1, 3, 5))
            places.append(f"neighborhood:axes=1,kernel={kernel},stride={several(1, kernel)}")
        divisors = [d for d in range(1, n + 1) if n % d == 0]
        height = c(divisors)
        places.append(f"axial:size={height}x{n // height},part={c(('both', 'rows', 'columns'))}")
    # Lengths for which a pattern is not defined are refused, and are others' test.
    low = [
        f"linformer:rank={several(1, 8)},max_len={max(Nk, 8) + several(0, 9)},share={c(('headwise', 'kv', 'none'))},"
        f"init={c(('pool', 'normal'))}",
        f"nystrom:landmarks={several(1, 12)}",
        f"performer:features={several(1, 20)},feature={c(('softmax', 'relu'))},orthogonal={c(('true', 'false'))}",
        "linear",
    ]
    if square:
        low.append(f"nystrom:landmarks={several(1, 9)},conv={c((1, 3, 7))}")
    kind = choose.random()
    if kind < 0.35:
        return c(places)
    if kind < 0.6:
        return c(content)
    if kind < 0.8:
        return c(low)
    sparse = c(
        [
            f"sliding_window:left={several(0, 20)},right={several(0, 20)}",
            "longformer:window=4",
            "topk_blocks:block=16,blocks=1",
            *(["bigbird:block=16,window=1,global_blocks=1,random_blocks=1"] if square else []),
        ]
    )
    tail = c(
        [
            f"centroid:block={c((16, 32))},second_order={c(('none', 'diagonal', 'full'))}",
            f"performer:features={several(1, 20)},block=16",
            f"nystrom:landmarks={several(1, 6)},block=16",
        ]
    )
    return f"{sparse}+{tail}"


def random_method_case(seed: int) -> MethodCase:
    """The case that a seed decides completely."""
    choose = random.Random(seed)
    c = choose.choice
    Nq = c(EDGES)
    Nk = Nq if choose.random() < 0.6 else c(EDGES)
    spec = random_spec(choose, Nq, Nk)
    method = parse(spec)
    Hkv = 2 if "per_head" in spec else c((1, 2))
    Hq = Hkv if "shared_qk=true" in spec else Hkv * c((1, 2))
    D = c((2, 4, 8))
    shape = (c((1, 2)), Hq, Hkv, Nq, Nk, D, c((D, 3)))
    dtype = c((torch.float64, torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16))
    case = MethodCase(seed, spec, method, shape, dtype)
    _add_hiding(case, choose)
    return case


def _add_hiding(case: MethodCase, choose: random.Random) -> None:
    B, Hq, _, Nq, Nk, _, _ = case.shape
    method, generator = case.method, torch.Generator().manual_seed(case.seed)
    rand = lambda *size: torch.rand(*size, generator=generator)  # noqa: E731
    routes = []
    causal = method.accepts_causal and not (isinstance(method, Hybrid) and not method.tail.accepts_causal)
    if isinstance(method, Hybrid) and not method.sparse.accepts_causal:
        causal = False
    case.call["is_causal"] = causal and choose.random() < 0.4
    goes_by_places = isinstance(method, Sparse | Hybrid)
    if (Nq != Nk and (case.call["is_causal"] or goes_by_places)) or choose.random() < 0.1:
        case.call["causal_alignment"] = choose.choice(("top_left", "bottom_right"))
    if choose.random() < 0.45:
        kind = choose.choice(("holes", "end", "start", "nothing left"))
        length = torch.randint(1, Nk + 1, (B, 1), generator=generator)
        place = torch.arange(Nk)
        key_mask = {
            "holes": rand(B, Nk) < 0.6,
            "end": place < length,
            "start": place >= Nk - length,
            "nothing left": (place < length) & (torch.arange(B)[:, None] > 0),
        }[kind]
        case.call["key_mask"] = key_mask
        routes.append(f"key_mask {kind}")
    if method.accepts_mask and choose.random() < 0.4:
        kind = choose.choice(("bool", "bool", "BlockMask", "lengths", "blocks"))
        lengths = torch.randint(0, Nk + 1, (B,), generator=generator)
        size = [choose.choice((1, full)) for full in (B, Hq, Nq)] + [Nk]
        bits = rand(*size) < choose.choice((0.3, 0.9))
        if choose.random() < 0.5:  # whole blocks
            bits = bits | (torch.arange(Nk) // 16 == choose.randint(0, Nk // 16))
        wide = bits.expand(*size[:2], Nq, Nk)
        block = choose.choice((16, 32, 128, (16, 64)))
        case.call["mask"] = {
            "bool": lambda: bits if choose.random() < 0.7 else bits[0, 0],
            "BlockMask": lambda: BlockMask.from_dense(wide, block_size=block),
            "lengths": lambda: BlockMask.from_lengths(lengths, q_len=Nq, kv_len=Nk),
            "blocks": lambda: BlockMask.from_dense(wide, block_size=block).with_lengths(lengths),
        }[kind]()
        routes.append(f"mask {kind} {tuple(size)}")
    if method.accepts_bias and choose.random() < 0.25:
        size = [choose.choice((1, full)) for full in (B, Hq, Nq, Nk)]
        bias = torch.randn(*size, generator=generator, dtype=torch.float64)
        if choose.random() < 0.5:
            bias = bias.masked_fill(rand(*size) < 0.3, -math.inf)
        wide_dtype = torch.float32 if case.dtype != torch.float64 and choose.random() < 0.5 else case.dtype
        case.call["bias"] = bias.to(wide_dtype)
        routes.append(f"bias {tuple(size)}")
    if not isinstance(method, LowRankMethod) and choose.random() < 0.3:
        case.call["scale"] = choose.choice((0.7, 0.1))
    case.routes = tuple(routes)


def tensors_of(case: MethodCase) -> list[Tensor]:
    """query, key, value."""
    B, Hq, Hkv, Nq, Nk, D, Dv = case.shape
    generator = torch.Generator().manual_seed(case.seed + 1)
    shapes = ((B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(case.dtype) for s in shapes]


def state_of(case: MethodCase) -> Any:
    """The method's state, in float64 values that the case's dtype holds."""
    _, Hq, Hkv, *_, D, _ = case.shape
    state = case.method.build(Hq * D, Hkv, D, dtype=case.dtype)
    if isinstance(case.method, Nystrom) and state is not None:
        torch.nn.init.normal_(state.conv_weight, generator=torch.Generator().manual_seed(1))
    return state


def pairs_of(case: MethodCase) -> Pairs:
    """What the call shows, by the definitions of its routes."""
    B, Hq, _, Nq, Nk, D, _ = case.shape
    call = case.call
    within = torch.ones(B, Hq, Nq, Nk, dtype=torch.bool)
    alignment = call.get("causal_alignment")
    offset = None if alignment is None and not call["is_causal"] else Nk - Nq if alignment == "bottom_right" else 0
    if call["is_causal"]:
        within = within & (torch.arange(Nk) <= torch.arange(Nq)[:, None] + (offset or 0))
    mask, bias, key_mask = (call.get(name) for name in ("mask", "bias", "key_mask"))
    if mask is not None:
        mask = mask.to_dense() if isinstance(mask, BlockMask) else mask
        within = within & mask[(None,) * (4 - mask.dim())]
    allowed = within
    if bias is not None:
        allowed = allowed & (bias > -math.inf)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
    return Pairs(allowed, allowed.any(2).any(1), offset, call.get("scale") or D**-0.5,
                 None if bias is None else bias.double(), within)  # fmt: skip


def what_is_said(case: MethodCase, pairs: Pairs) -> Tensor:
    """The rows whose output is defined, bool (B, 1, Nq, 1): not those of padding, where that is left out of choices."""
    pattern = case.method.pattern if isinstance(case.method, Sparse) else None
    pattern = case.method.sparse.pattern if isinstance(case.method, Hybrid) else pattern
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    if pattern is None or not pattern.by_content or pairs.queries is None:
        return everything
    return pairs.queries[:, None, :, None]


def aligned(case: MethodCase) -> MethodCase:
    """The case with the alignment of the call in its pattern, for the definition."""
    method, alignment = case.method, case.call.get("causal_alignment")
    if isinstance(method, Sparse):
        method = Sparse(method.pattern.aligned(alignment))
    elif isinstance(method, Hybrid):
        method = Hybrid(Sparse(method.sparse.pattern.aligned(alignment)), method.tail)
    return replace(case, method=method)
