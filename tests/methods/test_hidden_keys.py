"""What is hidden from every query, by whatever route, is nothing: not a bit of any output or gradient. All methods.

The hidden keys and values hold an ordinary number, NaN or 1e3, and outputs and gradients must be the same bits.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from efficient_attn.errors import UnsupportedError
from efficient_attn.masks import BlockMask
from efficient_attn.methods import METHODS, TAILS, parse
from efficient_attn.patterns import PATTERNS

B, H, N, D = 2, 2, 72, 8
# Options for these lengths; every method and every tail behind a window is here, see the test of that.
SPECS = {
    "sliding_window": "sliding_window:left=9,right=9",
    "dilated": "dilated:left=4,right=4",
    "strided": "strided:stride=9",
    "fixed": "fixed:stride=20,summary=3",
    "longformer": "longformer:window=8",
    "prefix_lm": "prefix_lm:prefix=7",
    "bigbird": "bigbird:block=16,random_blocks=1",
    "documents": "documents:lengths=30",
    "neighborhood": "neighborhood:size=8x9,kernel=3",
    "axial": "axial:size=8x9",
    "topk_blocks": "topk_blocks:block=16,blocks=2",
    "topp_blocks": "topp_blocks:block=16,mass=0.4",
    "lsh": "lsh:n_buckets=4",
    "sorted_buckets": "sorted_buckets:size=20",
    "linformer": "linformer:rank=8,max_len=100",
    "nystrom": "nystrom:landmarks=8",
    "performer": "performer:features=16",
}
NAMES = [name for name, cls in METHODS.items() if cls.__module__.startswith("efficient_attn.")]
MORE = ["topk_blocks:block=16,blocks=2,summary=minmax,queries=first", "lsh:n_buckets=4,shared_qk=true,chunk=16"]
HYBRIDS = [f"sliding_window:left=5,right=3+{name}:block=16" for name in TAILS]
HYBRIDS += [
    "sliding_window:left=5,right=3+centroid:block=16,second_order=diagonal",
    "topk_blocks:block=16,blocks=1+centroid:block=16",
]
ALL = [SPECS.get(name, name) for name in NAMES] + MORE + HYBRIDS

TAIL = torch.arange(N) < torch.tensor([[45], [N]])
HOLES = torch.rand(B, N, generator=torch.Generator().manual_seed(2)) < 0.6
HOLES[0, 16:32] = False  # a whole block


CAUSAL_TOO = ("key_mask", "bool pairs", "BlockMask", "bias pairs")


def pairs(there: Tensor) -> Tensor:
    """A mask of pairs that differs from query to query, and shows to some what is there and to none what is not."""
    some = torch.rand(B, 1, N, N, generator=torch.Generator().manual_seed(3)) < 0.8
    some[:, :, :32] = True  # whole blocks too
    return some & there[:, None, None]


def routes() -> dict[str, tuple[Tensor, dict]]:
    """Name: (the keys that are shown, bool (B, N), and the keywords that hide the others)."""
    minus = lambda seen: torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)  # noqa: E731
    lengths = BlockMask.from_lengths(TAIL.sum(-1), q_len=N, kv_len=N)
    return {
        "key_mask": (HOLES, {"key_mask": HOLES}),
        "key_mask at the end": (TAIL, {"key_mask": TAIL}),
        "bool": (HOLES, {"mask": HOLES[:, None, None]}),
        "bool pairs": (HOLES, {"mask": pairs(HOLES)}),
        "BlockMask": (HOLES, {"mask": BlockMask.from_dense(pairs(HOLES), block_size=32)}),
        "lengths": (TAIL, {"mask": lengths}),
        "two together": (HOLES & TAIL, {"mask": HOLES[:, None, None], "key_mask": TAIL}),
        "bias": (HOLES, {"bias": minus(HOLES[:, None, None])}),
        "bias pairs": (HOLES, {"bias": minus(pairs(HOLES))}),
    }


def bits(method, inputs: list[Tensor], state, grad_out: Tensor, **call) -> list[Tensor]:
    inputs = [t.clone().requires_grad_() for t in inputs]
    out = method.attend(*inputs, state=state, **call)[0]
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out, allow_unused=True)]


def check(method, inputs: list[Tensor], there: Tensor, what: object, **call) -> None:
    state = method.build(H * D, H, D, dtype=torch.float64)
    grad_out = torch.randn(
        inputs[0].shape[:3] + inputs[2].shape[3:], generator=torch.Generator().manual_seed(9), dtype=torch.float64
    )
    hidden = ~there[:, None, :, None]
    found = []
    for x in (0.5, math.nan, 1e3):
        q, k, v = inputs
        found.append(bits(method, [q, k.masked_fill(hidden, x), v.masked_fill(hidden, x)], state, grad_out, **call))
    for other in found[1:]:
        for name, one, same in zip(("out", "dq", "dk", "dv"), found[0], other, strict=True):
            if one is None or same is None:
                assert one is same
                continue
            assert torch.equal(one, same), (what, name)
            assert name not in ("dk", "dv") or not one.masked_select(hidden).any(), (what, name)
    assert found[0][0].isfinite().all(), what


def make(n: int = N, m: int = N) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, length, D, generator=g, dtype=torch.float64) for length in (n, m, m)]


def test_every_method_is_here():
    assert {parse(spec).name for spec in ALL} >= set(NAMES)
    assert {parse(spec).tail.name for spec in HYBRIDS} == set(TAILS)
    assert set(PATTERNS) <= set(METHODS)


@pytest.mark.parametrize("spec", ALL)
def test_hidden_keys_are_nothing(spec):
    method = parse(spec)
    inputs, served = make(), 0
    for (route, (there, call)), causal in itertools.product(routes().items(), (False, True)):
        if causal and route not in CAUSAL_TOO:
            continue
        try:
            method.attend(*inputs, state=method.build(H * D, H, D, dtype=torch.float64), is_causal=causal, **call)
        except UnsupportedError:
            assert route not in ("key_mask", "key_mask at the end") or causal, "padding is for every method"
            continue
        served += 1
        check(method, inputs, there, (route, causal), is_causal=causal, **call)
    assert served >= 2


@pytest.mark.parametrize("spec", ALL)
def test_keys_beyond_the_last_query_are_nothing(spec):
    """Causality with fewer queries than keys hides keys from everybody, and so does a window."""
    n, method = 40, parse(spec)
    for alignment in ("top_left", "bottom_right"):
        call = {"is_causal": True, "causal_alignment": alignment}
        there = (torch.arange(N) < (n if alignment == "top_left" else N)).expand(B, N)
        try:
            method.attend(*make(n), state=method.build(H * D, H, D, dtype=torch.float64), **call)
        except (UnsupportedError, ValueError):
            continue
        check(method, make(n), there, alignment, **call)
        if method.accepts_mask:
            hole = there & HOLES
            window = BlockMask(n, N).with_window((20, -1), alignment=alignment)
            offset = N - n if alignment == "bottom_right" else 0
            hole = hole & (torch.arange(N) >= offset - 20)
            mask = BlockMask.from_dense(HOLES[:, None, None].expand(B, 1, n, N)) & window
            check(method, make(n), hole, (alignment, "window"), mask=mask, **call)
