"""What is hidden is nothing: not a bit of any visible row or gradient moves. All methods, all routes.

Hidden tokens hold an ordinary number, NaN or 1e3, and what is visible must be the same bits. Three kinds of hiding:

    from everybody    padding by every route: outputs and all gradients, and what hidden queries hold
    from some         masks of pairs, windows and causality: the rows that do not see a token
    in a module       padding, masks and nested tensors of `MultiheadAttention` and of the models' own layer
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from efficient_attn import MultiheadAttention
from efficient_attn.errors import InputError, UnsupportedError
from efficient_attn.masks import BlockMask
from efficient_attn.methods import METHODS, TAILS, Hybrid, Sparse, parse
from efficient_attn.models.attention import Attention
from efficient_attn.patterns import LSH, PATTERNS, SortedBuckets

B, HQ, HKV, N, D = 2, 4, 2, 72, 8
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
MORE = [
    "topk_blocks:block=16,blocks=2,summary=minmax,queries=first",
    "topk_blocks:block=16,fraction=0.5,sink=0,local=2",
    "topp_blocks:block=16,mass=0.7,summary=minmax,queries=first,sink=0",
    "topk_blocks:block=16,blocks=2 & sliding_window:left=40,right=40",
    "topk_blocks:block=16,blocks=1 | longformer:window=4",
    "per_head(topk_blocks:block=16,blocks=2; strided:stride=9)",
    "lsh:n_buckets=4,rounds=3",
    "lsh:n_buckets=4,shared_qk=true",
    "lsh:n_buckets=4,shared_qk=true,chunk=16",
    "sorted_buckets:size=20,rounds=2",
    "linformer:rank=8,max_len=100,share=kv,init=normal",
    "nystrom:landmarks=8,conv=5",
    "performer:features=16,feature=relu",
]
HYBRIDS = [f"sliding_window:left=5,right=3+{name}:block=16" for name in TAILS]
HYBRIDS += [
    "sliding_window:left=5,right=3+centroid:block=16,second_order=diagonal",
    "sliding_window:left=5,right=3+centroid:block=16,second_order=full",
    "topk_blocks:block=16,blocks=1+centroid:block=16",
    "topp_blocks:block=16,mass=0.3+performer:block=16",
]
ALL = [SPECS.get(name, name) for name in NAMES] + MORE + HYBRIDS
FILLS = (0.5, math.nan, 1e3)


# --- calls ---


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs_of(method, n: int = N, m: int = N, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query, key and value; keys that are queries have as many heads."""
    heads = HQ if getattr(method, "shared_qk", False) else HKV
    shapes = ((B, HQ, n, D), (B, heads, m, D), (B, heads, m, D))
    g = generator()
    return [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]


def state_of(method, inputs: list[Tensor]):
    state = method.build(HQ * D, inputs[1].shape[1], D, dtype=inputs[0].dtype)
    for name, parameter in [] if state is None else state.named_parameters():
        if "conv" in name:
            torch.nn.init.normal_(parameter, generator=generator(1))
    return state


def attend(method, inputs: list[Tensor], grad_out: Tensor, **call) -> list[Tensor | None]:
    """The output and the gradients of the inputs."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = method.attend(*leaves, **call)[0]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out, allow_unused=True)]


def served(method, inputs: list[Tensor], **call) -> bool:
    """Whether the method takes the call; what it does not take it must say by name."""
    try:
        method.attend(*inputs, **call)
    except (UnsupportedError, InputError):
        return False
    return True


def same(ours: Tensor | None, theirs: Tensor | None, what: object) -> None:
    if ours is None or theirs is None:
        assert ours is theirs, what
    else:
        assert torch.equal(ours, theirs), what


def close(ours: Tensor, theirs: Tensor, what: object) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda text: f"{what}: {text}")


# --- routes ---

TAIL = torch.arange(N) < torch.tensor([[45], [N]])
NONE_LEFT = torch.arange(N) < torch.tensor([[0], [N]])
HOLES = torch.rand(B, N, generator=generator(2)) < 0.6
HOLES[0, 16:32] = False  # a whole block
LEFT = torch.arange(N) >= torch.tensor([[21], [0]])


def minus(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, -math.inf)


def pairs(there: Tensor, n: int, heads: int = 1) -> Tensor:
    """A mask of pairs that differs from query to query, and shows to some what is there and to none what is not."""
    some = torch.rand(B, heads, n, there.shape[1], generator=generator(3)) < 0.8
    some[:, :, :32] = True  # whole blocks too
    return some & there[:, None, None]


def routes(n: int = N) -> dict[str, tuple[Tensor, dict]]:
    """Name: (the keys that are shown, bool (B, N), and the keywords that hide the others from n queries)."""
    wide = BlockMask(n, N)
    return {
        "key_mask": (HOLES, {"key_mask": HOLES}),
        "key_mask at the end": (TAIL, {"key_mask": TAIL}),
        "key_mask at the start": (LEFT, {"key_mask": LEFT}),
        "key_mask of no key": (NONE_LEFT, {"key_mask": NONE_LEFT}),
        "bool": (HOLES, {"mask": HOLES[:, None, None]}),
        "bool for all": (HOLES[:1].expand(B, N), {"mask": HOLES[0]}),
        "bool pairs": (HOLES, {"mask": pairs(HOLES, n)}),
        "bool pairs of heads": (HOLES, {"mask": pairs(HOLES, n, HQ)}),
        "BlockMask": (HOLES, {"mask": BlockMask.from_dense(pairs(HOLES, n), block_size=32)}),
        "BlockMask of heads": (HOLES, {"mask": BlockMask.from_dense(pairs(HOLES, n, HQ))}),
        "lengths": (TAIL, {"mask": BlockMask.from_lengths(TAIL.sum(-1), q_len=n, kv_len=N)}),
        "lengths and blocks": (
            HOLES & TAIL,
            {"mask": BlockMask.from_dense(pairs(HOLES, n), block_size=16).with_lengths(TAIL.sum(-1))},
        ),
        "two together": (HOLES & TAIL, {"mask": HOLES[:, None, None], "key_mask": TAIL}),
        "lengths and key_mask": (HOLES & TAIL, {"mask": wide.with_lengths(TAIL.sum(-1)), "key_mask": HOLES}),
        "bias": (HOLES, {"bias": minus(HOLES[:, None, None])}),
        "bias pairs": (HOLES, {"bias": minus(pairs(HOLES, n))}),
        "bias pairs of heads": (HOLES, {"bias": minus(pairs(HOLES, n, HQ))}),
        "bias and key_mask": (HOLES & TAIL, {"bias": minus(HOLES[:, None, None]), "key_mask": TAIL}),
        "bias and bool": (HOLES & TAIL, {"bias": minus(pairs(HOLES, n)), "mask": TAIL[:, None, None]}),
    }


PADDING = ("key_mask", "key_mask at the end", "key_mask at the start", "key_mask of no key")


def test_every_method_is_here():
    assert {parse(spec).name for spec in ALL} >= set(NAMES)
    assert {parse(spec).tail.name for spec in HYBRIDS} == set(TAILS)
    assert set(PATTERNS) <= set(METHODS)


# --- hidden from everybody ---


FEW = ("key_mask", "bool pairs of heads", "lengths and blocks", "bias pairs of heads")


def calls(method, n: int) -> Iterator[tuple[tuple, Tensor, dict]]:
    for (route, (there, call)), causal in itertools.product(routes(n).items(), (None, "top_left", "bottom_right")):
        if n != N and route not in FEW:
            continue
        if causal is None or (n != N or causal == "top_left"):
            yield (route, causal), there, call | {"is_causal": causal is not None, "causal_alignment": causal}


@pytest.mark.parametrize("n", [N, 40])
@pytest.mark.parametrize("spec", ALL)
def test_what_nobody_sees_is_nothing(spec, n):
    """Hidden keys and values: the outputs and all gradients keep their bits, and their own gradient is zero."""
    method = parse(spec)
    inputs = inputs_of(method, n)
    q, k, v = inputs
    state = state_of(method, inputs)
    grad_out = torch.randn(q.shape, generator=generator(9))
    count = 0
    for what, there, call in calls(method, n):
        if not served(method, inputs, state=state, **call):
            assert what[0] not in PADDING or what[1] or n != N, f"{what}: padding is for every method"
            continue
        count += 1
        if what[1] is not None and n < N:  # causality hides the keys behind the last query too
            last = n if what[1] == "top_left" else N
            there = there & (torch.arange(N) < last)
        hidden = ~there[:, None, :, None]
        filled = ([q, k.masked_fill(hidden, x), v.masked_fill(hidden, x)] for x in FILLS)
        first, *others = (attend(method, each, grad_out, state=state, **call) for each in filled)
        assert first[0].isfinite().all(), what
        for other in others:
            for name, ours, theirs in zip(("out", "dq", "dk", "dv"), first, other, strict=True):
                same(ours, theirs, (*what, name))
        for name, gradient in zip(("dk", "dv"), first[2:], strict=True):
            assert gradient is None or not gradient.masked_select(hidden).any(), (*what, name)
    assert count or n != N


@pytest.mark.parametrize("spec", ALL)
def test_padded_queries_are_nothing_to_the_others(spec):
    """In self-attention hidden tokens are queries, too, that shape landmarks, blocks and buckets: not these ones."""
    method = parse(spec)
    inputs = inputs_of(method)
    state = state_of(method, inputs)
    grad_out = torch.randn(inputs[0].shape, generator=generator(9))
    for what, there, call in calls(method, N):
        if "pairs" in what[0] or "Block" in what[0] or not served(method, inputs, state=state, **call):
            continue
        hidden = ~there[:, None, :, None]
        rows = there[:, None, :, None].expand_as(grad_out)
        filled = [[t.masked_fill(hidden, x) for t in inputs] for x in FILLS]
        out = [method.attend(*each, state=state, **call)[0].masked_select(rows) for each in filled]
        same(out[0], out[1], what)  # NaN, whose own row is NaN, and so are gradients that pass by it
        first, other = (attend(method, filled[n], grad_out * rows, state=state, **call) for n in (0, 2))
        for name, ours, theirs in zip(("out", "dq", "dk", "dv"), first, other, strict=True):
            shown = rows if name in ("out", "dq") else torch.ones((), dtype=torch.bool)
            if ours is not None and theirs is not None:
                same(ours.masked_select(shown), theirs.masked_select(shown), (*what, name))


# --- hidden from some ---


def seen_by(there: Tensor, call: dict, n: int) -> Tensor:
    """Which pairs a call's keywords show, bool (B, 1 | HQ, n, N): the definition."""
    shown = there[:, None, None].expand(B, 1, n, N)
    for what in ("mask", "bias"):
        given = call.get(what)
        if given is not None:
            given = given.to_dense() if isinstance(given, BlockMask) else given
            given = given if given.dtype == torch.bool else given > -math.inf
            shown = shown & given[(None,) * (4 - given.dim())]
    if call["is_causal"]:
        offset = N - n if call["causal_alignment"] == "bottom_right" else 0
        shown = shown & (torch.arange(N) <= torch.arange(n)[:, None] + offset)
    return shown


def knows_the_whole(method) -> bool:
    """Methods whose documentation says that a row depends on tokens that it does not see: where a token is put depends
    on all that anybody sees, or is a mixture of them."""
    pattern = (
        method.pattern if isinstance(method, Sparse) else method.sparse.pattern if isinstance(method, Hybrid) else None
    )
    tail = method.tail.name if isinstance(method, Hybrid) else None
    chunks = isinstance(pattern, LSH) and pattern.chunk > 0
    return isinstance(pattern, SortedBuckets) or chunks or tail == "nystrom"


@pytest.mark.parametrize("n", [N, 40])
@pytest.mark.parametrize("spec", [spec for spec in ALL if not knows_the_whole(parse(spec))])
def test_what_a_row_does_not_see_is_nothing_to_it(spec, n):
    """Tokens that other rows see: their keys and values are nothing to the rows that do not."""
    method = parse(spec)
    agree = close if "lsh" in spec else same  # a token in another bucket moves the others, which are summed in order
    inputs = inputs_of(method, n)
    q, k, v = inputs
    state = state_of(method, inputs)
    normal = torch.randn(q.shape, generator=generator(9))
    moved = torch.zeros(N, dtype=torch.bool)
    moved[[3, 38, 39, 66]] = True
    hidden = moved[None, None, :, None]
    for what, there, call in calls(method, n):
        if not ("pairs" in what[0] or "Block" in what[0] or what[1]):
            continue
        if not served(method, inputs, state=state, **call):
            continue
        blind = ~(seen_by(there, call, n) & moved).any(-1, keepdim=True)
        rows = blind.expand_as(normal)
        filled = [[q, k.masked_fill(hidden, x), v.masked_fill(hidden, x)] for x in FILLS]
        if getattr(method, "shared_qk", False):  # the keys are the queries
            rows = rows & ~moved[:n, None]
            filled = [
                [q.masked_fill(hidden[:, :, :n], x), *others] for x, (_, *others) in zip(FILLS, filled, strict=True)
            ]
        first, poisoned, large = (method.attend(*each, state=state, **call)[0].masked_select(rows) for each in filled)
        agree(first, poisoned, (*what, "out, NaN"))
        agree(first, large, (*what, "out, 1e3"))
        # A NaN that a row does see makes its own gradients NaN: a large number will do.
        first, large = (attend(method, filled[x], normal * rows, state=state, **call) for x in (0, 2))
        agree(first[1].masked_select(rows), large[1].masked_select(rows), (*what, "dq"))
        for name, ours, theirs in zip(("dk", "dv"), first[2:], large[2:], strict=True):
            if ours is not None and theirs is not None:
                agree(ours, theirs, (*what, name))


# --- in a module ---


def padded_module_calls() -> dict[str, dict]:
    return {
        "bool padding": {"key_padding_mask": ~HOLES},
        "float padding": {"key_padding_mask": minus(HOLES)},
        "bool mask": {"attn_mask": ~HOLES.repeat_interleave(HQ, 0)[:, None].expand(-1, N, -1)},
        "float mask": {"attn_mask": minus(HOLES.repeat_interleave(HQ, 0)[:, None].expand(-1, N, -1))},
        "both": {"key_padding_mask": ~HOLES, "attn_mask": ~torch.ones(N, N, dtype=torch.bool).tril()},
    }


@pytest.mark.parametrize("spec", ALL)
def test_modules_hide_what_is_padded(spec):
    torch.manual_seed(0)
    module = MultiheadAttention(HQ * D, HQ, batch_first=True, attention=spec)
    layer = Attention(HQ * D, HQ, HQ, attention=parse(spec))
    x = torch.randn(B, N, HQ * D, generator=generator())
    rows = HOLES[..., None]

    def ways():
        for name, call in padded_module_calls().items():
            yield name, lambda y, call=call: module(y, y, y, need_weights=False, **call)[0]
        yield "layer", lambda y: layer(y, key_mask=HOLES)[0]

    count, agree = 0, close if "lsh" in spec else same
    for name, way in ways():
        found = []
        try:
            way(x)
        except UnsupportedError:
            assert name not in ("bool padding", "float padding", "layer")
            continue
        count += 1
        for fill in FILLS:
            leaf = x.masked_fill(~rows, fill).requires_grad_()
            out = way(leaf)
            parameters = list(module.parameters())
            found.append([out.masked_select(rows)])
            if not math.isnan(fill):  # 0 * NaN is NaN in the gradient of a projection
                found[-1] += torch.autograd.grad(out.masked_select(rows).square().sum(), [leaf, *parameters],
                                                 allow_unused=True)  # fmt: skip
        agree(found[0][0], found[1][0], (name, "NaN"))
        agree(found[0][0], found[2][0], (name, "1e3"))
        agree(found[0][1].masked_select(rows), found[2][1].masked_select(rows), (name, "gradient"))
    assert count >= 3


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("spec", ALL)
def test_a_nested_sequence_knows_nothing_of_the_others(spec, layout):
    torch.manual_seed(0)
    module = MultiheadAttention(HQ * D, HQ, batch_first=True, attention=spec)
    g = generator()
    lengths = (N, 45)
    first = torch.randn(lengths[0], HQ * D, generator=g)
    second = torch.randn(lengths[1], HQ * D, generator=g)
    outs = []
    for fill in (None, *FILLS):
        try:
            other = first if fill is None else torch.full_like(first, fill)
            x = torch.nested.as_nested_tensor([other, second], layout=layout)
            outs.append(module(x, x, x, need_weights=False)[0].unbind()[1])
        except UnsupportedError:
            pytest.skip("not for nested tensors")
    for out in outs[1:]:
        assert torch.equal(out, outs[0])
