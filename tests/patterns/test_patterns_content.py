"""Patterns that look at queries and keys, against dense float64 transcriptions of their definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from efficient_attn import (
    BlockMask,
    InputError,
    MultiheadAttention,
    UnsupportedError,
    attention,
    explain,
    parse,
    patterns,
)
from efficient_attn.measuring.inputs import photograph_qkv
from efficient_attn.patterns import (
    LSH,
    Causal,
    Longformer,
    Pattern,
    SlidingWindow,
    SortedBuckets,
    TopKBlocks,
    TopPBlocks,
)
from efficient_attn.patterns.buckets import _rotations

B, HQ, HKV, D = 2, 4, 2, 8


def make(n: int, m: int | None = None, heads: int = HKV, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values whose neighbours are alike, so that blocks differ."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda h, k: torch.randn(B, h, k, D, generator=g, dtype=torch.float64)  # noqa: E731
    q, k, v = draw(HQ, n), draw(heads, m or n), draw(heads, m or n)
    drift = draw(1, max(n, m or n)).cumsum(2) * 0.3
    return [(q + drift[:, :, :n]).requires_grad_(), (k + drift[:, :, : m or n]).requires_grad_(), v.requires_grad_()]


def padding(kind: str, n: int) -> Tensor | None:
    tail = torch.arange(n) < torch.tensor([[n * 2 // 3], [n]])
    holes = torch.rand(B, n, generator=torch.Generator().manual_seed(2)) < 0.6
    holes[0, 32:64] = False  # a whole block
    return {"none": None, "tail": tail, "holes": holes}[kind]


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Masked dense attention; a row without keys is 0."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.mT / math.sqrt(D)).masked_fill(~visible, -math.inf)
    P = torch.where(visible.any(-1, keepdim=True), scores.softmax(-1), 0.0)
    return P @ v


def same_with_gradients(out: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out.square().sum(), inputs, allow_unused=True),
        torch.autograd.grad(expected.square().sum(), inputs, allow_unused=True),
        strict=True,
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs.nan_to_num(0.0))


# --- blocks ---


def chosen_blocks(pattern, q: Tensor, k: Tensor, allowed: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """The definition, block by block: bool (B, HQ, N, M) of the pairs in chosen blocks. allowed: bool (N, M)."""
    b, (N, M) = pattern.block, allowed.shape
    visible = torch.zeros(B, HQ, N, M, dtype=torch.bool)
    rows = [range(s, min(s + b, N)) for s in range(0, N, b)]
    cols = [range(s, min(s + b, M)) for s in range(0, M, b)]
    for batch, head in itertools.product(range(B), range(HQ)):
        there = torch.ones(M, dtype=torch.bool) if key_mask is None else key_mask[batch]
        there = there & allowed.any(0)
        mine = there if N == M else torch.ones(N, dtype=torch.bool)
        for r, row in enumerate(rows):
            own = q[batch, head, row][mine[row]]
            x = torch.zeros(D, dtype=q.dtype)
            if len(own):
                x = own[0] if pattern.queries == "first" else own.mean(0)
            estimate, seen = {}, []
            for c, col in enumerate(cols):
                keys = k[batch, head // (HQ // HKV), col][there[col]]
                if not len(keys) or not allowed[row][:, col].any():
                    continue
                seen.append(c)
                if pattern.summary == "mean":
                    estimate[c] = float(x @ keys.mean(0)) * scale
                else:
                    estimate[c] = sum(max(x[d] * keys[:, d].min(), x[d] * keys[:, d].max()) for d in range(D)) * scale
            forced = [c for c in seen if c < pattern.sink or abs(c - r) < pattern.local]
            whole = [c for c in seen if allowed[row][:, cols[c]][:, allowed.any(0)[cols[c]]].all()]
            # The estimate of a block that is cut knows what some of its queries must not: it decides nothing.
            free = sorted((c for c in seen if c not in forced and c in whole), key=lambda c: -estimate[c])
            cut = sorted((c for c in seen if c not in forced and c not in whole), reverse=True)
            last = max(whole, default=-1)
            free = [c for c in cut if c > last] + free + [c for c in cut if c < last]
            if isinstance(pattern, TopKBlocks):
                count = pattern.blocks if pattern.fraction is None else math.ceil(pattern.fraction * len(seen) - 1e-9)
                keep = forced + free[: max(count - len(forced), 0)]
            else:
                ended = [c for c in whole if len(cols[c]) == b and there[cols[c][-1]]]
                mass = {c: math.exp(estimate[c]) * int(there[cols[c]].sum()) if c in ended else 0.0 for c in seen}
                keep, total = list(forced), sum(mass.values())
                for c in free:
                    if total and sum(mass[x] for x in keep) / total >= pattern.mass:
                        break
                    keep.append(c)
            for c in keep:
                visible[batch, head, row[0] : row[-1] + 1, cols[c][0] : cols[c][-1] + 1] = True
    return visible


BLOCKS = [
    TopKBlocks(16, 3),
    TopKBlocks(16, 2, summary="minmax", sink=0, local=2),
    TopKBlocks(32, fraction=0.4, queries="first"),
    TopKBlocks(16, 1, sink=2),
    TopPBlocks(16, 0.6),
    TopPBlocks(32, 0.3, sink=0, summary="minmax", queries="first"),
]


@pytest.mark.parametrize("pad", ["none", "tail", "holes"])
@pytest.mark.parametrize("pattern", BLOCKS, ids=str)
def test_blocks_equal_the_definition(pattern, pad):
    n = 150
    q, k, v = inputs = make(n)
    key_mask, method = padding(pad, n), parse(pattern)
    past = torch.ones(n, n, dtype=torch.bool).tril()
    for is_causal in (False, True):
        allowed = past if is_causal else torch.ones_like(past)
        visible = chosen_blocks(pattern, q.detach(), k.detach(), allowed, key_mask, D**-0.5)
        within = Causal().block_mask(n, n) if is_causal else None
        mask = pattern.for_inputs(q, k, key_mask=key_mask, within=within)
        # Padding of self-attention: what a block of padded queries chooses is of no consequence.
        rows = torch.ones(1, dtype=torch.bool) if key_mask is None else key_mask[:, None, :, None]
        assert torch.equal(mask.to_dense() & allowed & rows, visible & allowed & rows)
        visible &= allowed
        visible &= True if key_mask is None else key_mask[:, None, None]
        out, weights = method.attend(q, k, v, key_mask=key_mask, is_causal=is_causal, need_weights=True)
        same_with_gradients(torch.where(rows, out, 0.0), torch.where(rows, attend(q, k, v, visible), 0.0), inputs)
        assert torch.equal((weights > 0) & rows, visible & rows)
        if key_mask is None:
            torch.testing.assert_close(attention(q, k, v, mask=pattern, is_causal=is_causal), out)


def test_choice_is_among_what_the_other_parts_show():
    n, pattern = 150, TopKBlocks(16, 2, sink=0)
    q, k, v = make(n)
    band = SlidingWindow(70, 0).block_mask(n, n).to_dense()[0, 0]
    expected = chosen_blocks(pattern, q.detach(), k.detach(), band, None, D**-0.5) & band
    for joined in (pattern & SlidingWindow(70, 0), SlidingWindow(70, -1) & Causal() & pattern):
        assert joined.by_content and torch.equal(joined.for_inputs(q, k).to_dense(), expected)
        torch.testing.assert_close(attention(q, k, v, mask=joined), attend(q, k, v, expected))
    either = pattern | Longformer(0, 3)
    cross = torch.zeros(n, n, dtype=torch.bool)
    cross[:3] = cross[:, :3] = True
    free = chosen_blocks(pattern, q.detach(), k.detach(), torch.ones_like(band), None, D**-0.5)
    assert torch.equal(either.for_inputs(q, k).to_dense(), free | cross | torch.eye(n, dtype=torch.bool))
    user = torch.rand(n, n, generator=torch.Generator().manual_seed(1)) < 0.02
    out, _ = parse(pattern).attend(q, k, v, mask=user)
    expected = chosen_blocks(pattern, q.detach(), k.detach(), user, None, D**-0.5) & user
    torch.testing.assert_close(out, attend(q, k, v, expected))


FIRST = [
    TopKBlocks(16, 2, queries="first", sink=0),
    TopKBlocks(16, fraction=0.3, queries="first", summary="minmax"),
    TopPBlocks(16, 0.5, queries="first"),
    TopPBlocks(16, 0.3, queries="first", sink=0, local=2, summary="minmax"),
]


@pytest.mark.parametrize(("n", "m"), [(128, 128), (150, 150), (70, 150), (37, 128)])
@pytest.mark.parametrize("pattern", FIRST, ids=str)
def test_the_past_of_first_rows_is_blind_to_the_future(pattern, n, m):
    q, k, v = (t.detach() for t in make(n, m))
    call = {"is_causal": True, "causal_alignment": "bottom_right"}
    before = parse(pattern).attend(q, k, v, **call)[0]
    past = torch.arange(m) <= torch.arange(n)[:, None] + m - n
    for cut in range(1, m, 5):
        rows = max(cut - (m - n), 0)
        later = [t.clone() for t in (q, k, v)]
        for t, start in zip(later, (rows, cut, cut), strict=True):
            t[:, :, start:] = 3 - 2 * t[:, :, start:]
        for options in (call, {"mask": past}) if n == m and cut % 3 == 1 else (call,):
            after = parse(pattern).attend(*later, **options)[0]
            torch.testing.assert_close(after[:, :, :rows], before[:, :, :rows])


@pytest.mark.parametrize("pattern", [*BLOCKS, *FIRST], ids=str)
def test_hidden_keys_choose_nothing_by_whatever_route(pattern):
    n, method = 150, parse(pattern)
    q, k, v = (t.detach() for t in make(n))
    holes = padding("holes", n)
    assert holes is not None
    lengths = torch.tensor([100, n])
    short = torch.arange(n) < lengths[:, None]
    routes = {
        "key_mask": (holes, {"key_mask": holes}),
        "mask": (holes, {"mask": holes[:, None, None]}),
        "rows of a mask": (holes, {"mask": holes[:, None, None] & holes[:, None, :, None]}),
        "BlockMask": (holes, {"mask": BlockMask.from_dense(holes[:, None, None].expand(B, 1, n, n), block_size=32)}),
        "lengths": (short, {"mask": BlockMask.from_lengths(lengths, q_len=n, kv_len=n)}),
    }
    for route, (there, options) in routes.items():
        hidden = ~there[:, None, :, None]
        found = [
            method.attend(q, k.masked_fill(hidden, x), v.masked_fill(hidden, x), **options, is_causal=causal)[0]
            for causal, x in itertools.product((False, True), (0.0, math.nan, 1e3))
        ]
        for one in range(6):
            assert torch.equal(found[one], found[one // 3 * 3]), (route, one)
        if route in ("mask", "BlockMask"):  # padding is padding, however it is said
            shown = holes[:, None, :, None].expand_as(found[0])
            torch.testing.assert_close(found[0][shown], method.attend(q, k, v, key_mask=holes)[0][shown])


def test_rectangles_and_alignment():
    pattern = TopKBlocks(16, 2, sink=0)
    q, k, v = make(20, 150)
    out = attention(q, k, v, mask=pattern, is_causal=True, causal_alignment="bottom_right")
    past = torch.arange(150) <= torch.arange(20)[:, None] + 130
    mask = pattern.for_inputs(q, k, within=BlockMask.from_dense(past)).to_dense() & past
    near = pattern.for_inputs(q, k, within=BlockMask(20, 150, window=(-1, 0), window_offset=130))
    assert near.to_dense()[..., 0, 128:144].all() and near.to_dense()[..., 19, 144:].all()
    assert mask.any(-1).all() and out.isfinite().all()
    for lengths in ((0, 5), (5, 0), (1, 1)):
        q, k, v = make(16)
        out = attention(q[:, :, : lengths[0]], k[:, :, : lengths[1]], v[:, :, : lengths[1]], mask=pattern)
        assert out.shape == (B, HQ, lengths[0], D) and (lengths[1] or not out.any())


def test_first_rows_make_the_choice_strictly_causal():
    q, k, v = (t.detach() for t in make(150))
    for pattern, blind in ((TopKBlocks(16, 3, queries="first"), True), (TopKBlocks(16, 3), False)):
        before = attention(q, k, v, mask=pattern, is_causal=True)
        same = True
        for cut in range(100, 112):
            later = [t.clone() for t in (q, k, v)]
            for t in later:
                t[:, :, cut:] = 9 * torch.randn(t[:, :, cut:].shape, generator=torch.Generator().manual_seed(cut))
            same &= torch.equal(attention(*later, mask=pattern, is_causal=True)[:, :, :cut], before[:, :, :cut])
        assert same == blind


def test_selection_takes_memory_for_blocks_only():
    """65536 x 65536 pairs of one head would be 4 GiB; blocks are 1024 x 1024."""
    q = torch.randn(1, 1, 65536, 16)
    mask = TopKBlocks(64, 16).for_inputs(q, q)
    assert mask.nbytes < 1024 * 16 * 8 + 1024 * 8 + 100 and mask.block_density == 16 / 1024


@pytest.mark.parametrize("pattern", [BLOCKS[2], pytest.param(BLOCKS[5], marks=pytest.mark.slow)], ids=str)
def test_blocks_compile(pattern):
    torch._dynamo.reset()
    q, k, v = inputs = make(100)

    def call(q, k, v):
        return attention(q, k, v, mask=pattern, is_causal=True) + attention(q, k, v, mask=pattern)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    same_with_gradients(compiled(q, k, v), call(q, k, v), inputs)


def test_what_a_mask_hides_chooses_nothing_when_compiled():
    """As in eager mode: a block that a mask or a bias cuts decides nothing."""
    torch._dynamo.reset()
    n, method = 100, parse("topp_blocks:block=16,mass=0.4")
    q, k, v = make(n)
    pairs = torch.rand(B, 1, n, n, generator=torch.Generator().manual_seed(3)) < 0.8
    pairs[..., :32] = True
    bias = torch.zeros(pairs.shape, dtype=q.dtype).masked_fill(~pairs, -torch.inf)
    tail = padding("tail", n)

    def call(q, k, v):
        routes = ({"mask": pairs}, {"bias": bias}, {"mask": pairs, "key_mask": tail, "is_causal": True})
        return torch.cat([method.attend(q, k, v, **route)[0] for route in routes])

    expected = call(q, k, v)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), expected)
    torch.testing.assert_close(expected[:B], expected[B : 2 * B])


# --- buckets ---


def bucketed(pattern, q: Tensor, k: Tensor, allowed: Tensor, key_mask: Tensor | None) -> Tensor:
    """The definition, round by round over dense tables: bool (B, HQ, N, M)."""
    (N, M), visible = allowed.shape, torch.zeros(B, HQ, *allowed.shape, dtype=torch.bool)
    there = torch.ones(B, M, dtype=torch.bool) if key_mask is None else key_mask
    for batch, head in itertools.product(range(B), range(HQ)):
        x, y = q[batch, head], k[batch, head // (HQ // k.shape[1])]
        for r in range(pattern.rounds):
            if isinstance(pattern, LSH):
                R = _rotations(D, pattern.rounds, pattern.n_buckets // 2, pattern.seed)[:, r].double()
                h = lambda z: torch.cat([z @ R, -z @ R], -1).argmax(-1)  # noqa: E731, B023
                own, other = h(x), h(x / x.norm(dim=-1, keepdim=True) if pattern.shared_qk else y)
                together = own[:, None] == other
                if pattern.chunk:
                    hidden = torch.where(there[batch], own, -1).tolist()
                    order = sorted(range(N), key=lambda i: (hidden[i], i))
                    place = torch.tensor([order.index(i) for i in range(N)]) // pattern.chunk
                    together &= (place[:, None] - 1 <= place) & (place <= place[:, None])
            else:
                u = _rotations(D, pattern.rounds, 1, pattern.seed)[:, r, 0].double()
                buckets = -(-M // pattern.size)
                places = []
                for z, mask in ((x, there[batch] if N == M else torch.ones(N, dtype=torch.bool)), (y, there[batch])):
                    place = torch.full((len(z),), -1)
                    kept = mask.nonzero().flatten()
                    for s, i in enumerate(kept[(z[kept] @ u).argsort()].tolist()):
                        place[i] = s * buckets // len(kept)
                    places.append(place)
                together = places[0][:, None] == places[1]
            visible[batch, head] |= together
    visible &= allowed & there[:, None, None]
    if getattr(pattern, "shared_qk", False):
        self = torch.eye(N, dtype=torch.bool)
        visible &= ~self
        visible |= self & allowed & ~visible.any(-1, keepdim=True) & there[:, None, :, None]
    return visible


BUCKETS = [
    LSH(4, 1),
    LSH(8, 3, seed=5),
    LSH(6, 2, shared_qk=True),
    LSH(30, 1, shared_qk=True),
    LSH(4, 2, shared_qk=True, chunk=20),
    SortedBuckets(40),
    SortedBuckets(17, 3, seed=1),
]


@pytest.mark.parametrize("pad", ["none", "tail", "holes"])
@pytest.mark.parametrize("pattern", BUCKETS, ids=str)
def test_buckets_equal_the_definition(pattern, pad):
    n = 150
    shared = getattr(pattern, "shared_qk", False)
    q, k, v = inputs = make(n, heads=HQ if shared else HKV)
    key_mask, method = padding(pad, n), parse(pattern)
    there = torch.ones(B, n, dtype=torch.bool) if key_mask is None else key_mask
    user = torch.rand(n, n, generator=torch.Generator().manual_seed(1)) < 0.5
    for is_causal, mask in itertools.product((False, True) if method.accepts_causal else (False,), (None, user)):
        allowed = torch.ones(n, n, dtype=torch.bool).tril() if is_causal else torch.ones(n, n, dtype=torch.bool)
        allowed = allowed if mask is None else allowed & mask
        counted = there & allowed.any(0)  # what no query sees is in no bucket
        visible = bucketed(pattern, q.detach(), k.detach(), allowed, None if counted.all() else counted)
        rows = there[:, None, :, None] if isinstance(pattern, SortedBuckets) else torch.ones(1, dtype=torch.bool)
        out, weights = method.attend(q, k, v, key_mask=key_mask, is_causal=is_causal, mask=mask, need_weights=True)
        expected = attend(q, q / q.norm(dim=-1, keepdim=True) if shared else k, v, visible)
        same_with_gradients(torch.where(rows, out, 0.0), torch.where(rows, expected, 0.0), inputs)
        assert torch.equal((weights > 0) & rows, visible & rows)
        within = BlockMask.from_dense(allowed)
        found = pattern.for_inputs(q, k, key_mask=key_mask, within=within).to_dense() & allowed & there[:, None, None]
        assert torch.equal(found & rows, visible & allowed & rows)


LENGTHS = (1, 63, 64, 65, 127, 128, 129, 257)  # around the blocks of 64 sorted tokens


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("pattern", [BUCKETS[1], BUCKETS[2], BUCKETS[4], BUCKETS[6]], ids=str)
def test_buckets_equal_the_definition_at_the_ends_of_blocks(pattern, n):
    shared = getattr(pattern, "shared_qk", False)
    for m in (n,) if shared else LENGTHS:
        q, k, v = (t.detach() for t in make(n, m, heads=HQ if shared else HKV))
        causal = pattern.accepts_causal and m % 2 == 1
        allowed = torch.ones(n, m, dtype=torch.bool).tril(m - n if causal else m)
        visible = bucketed(pattern, q, k, allowed, None)
        call = {"is_causal": causal, "causal_alignment": "bottom_right" if causal else None}
        out, weights = parse(pattern).attend(q, k, v, need_weights=True, **call)
        expected = attend(q, q / q.norm(dim=-1, keepdim=True) if shared else k, v, visible)
        torch.testing.assert_close(out, expected, msg=lambda text, m=m: f"{m} keys: {text}")
        assert torch.equal(weights > 0, visible), f"{m} keys"


def test_one_token_sees_itself():
    x = torch.ones(1, 1, 1, 4)
    for spec in ("lsh", "lsh:shared_qk=true", "sorted_buckets"):
        assert torch.equal(parse(spec).attend(x, x, x)[0], x)


def test_rounds_are_joined_under_one_softmax_with_dropout():
    q, k, v = make(150)
    for pattern in (LSH(4, 3), LSH(8, 2, shared_qk=True), SortedBuckets(40, 2)):
        shared = getattr(pattern, "shared_qk", False)
        k_, v_ = (t.repeat_interleave(2, 1) for t in (k, v)) if shared else (k, v)
        out, weights = parse(pattern).attend(q, k_, v_, dropout_p=0.4, dropout_seed=3, need_weights=True)
        torch.testing.assert_close(out, weights @ (v_ if shared else v.repeat_interleave(2, 1)))
        full = parse(pattern).attend(q, k_, v_, need_weights=True)[1]
        dropped = (weights == 0) & (full > 0)
        assert 0.3 < dropped.sum() / (full > 0).sum() < 0.5
        again = parse(pattern).attend(q, k_, v_, dropout_p=0.4, dropout_seed=3)[0]
        torch.testing.assert_close(out, again)


def test_lsh_past_is_blind_to_the_future():
    q, k, v = (t.detach() for t in make(150))
    later = [torch.cat([t[:, :, :100], 9 * t[:, :, 100:].flip(2)], 2) for t in (q, k, v)]
    method = parse("lsh:n_buckets=4,rounds=3")
    before, after = (method.attend(*inputs, is_causal=True)[0] for inputs in ((q, k, v), later))
    torch.testing.assert_close(before[:, :, :100], after[:, :, :100])


def test_rectangles_of_buckets():
    for pattern in (LSH(4, 2), SortedBuckets(30)):
        q, k, v = inputs = make(70, 150)
        visible = bucketed(pattern, q.detach(), k.detach(), torch.ones(70, 150, dtype=torch.bool), None)
        same_with_gradients(parse(pattern).attend(q, k, v)[0], attend(q, k, v, visible), inputs)
        empty = parse(pattern).attend(q, k[:, :, :0], v[:, :, :0])[0]
        assert empty.shape == q.shape and not empty.any()
        for none in (q[:, :, :0], q[:0]):
            few = k[: none.shape[0]], v[: none.shape[0]]
            out, weights = parse(pattern).attend(none, *few, need_weights=True)
            assert out.shape == none.shape and weights.shape == (*none.shape[:3], 150)


# --- in general ---


@pytest.mark.parametrize(
    ("call", "error", "why"),
    [
        (lambda q, k, v: TopKBlocks().block_mask(64, 64), UnsupportedError, r"for_inputs\(query, key\)"),
        (lambda q, k, v: (LSH() & Causal()).block_mask(64, 64), UnsupportedError, "chooses by what queries and keys"),
        (lambda q, k, v: LSH().visible(torch.arange(3), torch.arange(3), 3, 3), UnsupportedError, "chooses by"),
        (lambda q, k, v: parse("sorted_buckets").attend(q, k, v, is_causal=True), UnsupportedError, "cannot be causal"),
        (lambda q, k, v: parse("lsh:shared_qk=true").attend(q, k, v), InputError, "makes the queries the keys"),
        (lambda q, k, v: parse("lsh").attend(q[:, :, :50], k, v, is_causal=True), InputError, "ambiguous"),
        (lambda q, k, v: parse("topk_blocks").attend(q[:, :, :50], k, v, is_causal=True), InputError, "ambiguous"),
    ],
)
def test_what_is_not_defined_raises(call, error, why):
    with pytest.raises(error, match=why):
        call(*make(100))


def test_buckets_say_that_they_cannot_be_traced():
    method, inputs = parse("lsh:n_buckets=4"), make(40)
    with pytest.raises(RuntimeError, match="lsh makes lists whose number depends"):
        torch.compile(lambda *x: method.attend(*x)[0], backend="eager", fullgraph=True)(*inputs)


@pytest.mark.slow
def test_buckets_break_a_graph_that_may_break():
    torch._dynamo.reset()
    method, inputs = parse("lsh:n_buckets=4"), make(40)
    torch.testing.assert_close(
        torch.compile(lambda *x: method.attend(*x)[0], backend="eager")(*inputs), method.attend(*inputs)[0]
    )


def test_blocks_map_over_a_batch_and_buckets_say_that_they_do_not():
    q = torch.stack([make(64, heads=HQ, seed=seed)[0].detach() for seed in range(3)])
    pattern = TopKBlocks(16, 2)

    def call(x):
        return attention(x, x, x, mask=pattern, is_causal=True)

    torch.testing.assert_close(torch.vmap(call)(q), torch.stack([call(x) for x in q]))
    one = q[0].clone().requires_grad_()
    expected = torch.autograd.grad(call(one).square().sum(), one)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: call(x).square().sum())(q[0]), expected)
    with pytest.raises(UnsupportedError, match="vmap cannot trace"):
        torch.vmap(lambda x: parse("lsh").attend(x, x, x)[0])(q)


def test_explain_and_per_head_know_content():
    q, k, v = make(160)
    pattern = patterns.per_head([TopKBlocks(16, 2), SlidingWindow(16, 0), LSH(4), SlidingWindow(0, 0)])
    mask = pattern.for_inputs(q, k)
    assert mask.shape == (B, HQ, 160, 160)
    for head, part in enumerate(pattern.parts):
        own = part.for_inputs(q, k)
        assert torch.equal(mask.to_dense()[:, head], own.to_dense().expand(B, HQ, -1, -1)[:, head])
    assert explain(q, k, v, mask=pattern).density == pytest.approx(mask.density)
    assert explain(q, k, v, mask=TopKBlocks(16, 2), is_causal=True).density < 0.2
    assert Pattern.from_json(pattern.to_json()) == pattern


SPECS = [
    "topk_blocks:block=16,blocks=2", "topp_blocks:block=16,mass=0.5", "lsh:n_buckets=4", "lsh:shared_qk=true",
    "sorted_buckets:size=20", "topk_blocks:block=16,blocks=2 & sliding_window:left=40,right=40",
    "per_head(fixed:stride=16; strided:stride=16)", "neighborhood:kernel=3", "axial", "documents:lengths=24x40",
    "deepspeed_fixed", "prefix_lm:prefix=10", "longformer:window=8,global_indices=20x30",
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_the_module_attends_as_masked_dense_attention(spec):
    """In float64 through `MultiheadAttention`, padding included: outputs and gradients of inputs and parameters."""
    torch.manual_seed(0)
    ours = MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64, attention=spec)
    x = torch.randn(2, 64, 32, dtype=torch.float64, requires_grad=True)
    hidden = torch.arange(64) >= torch.tensor([[50], [64]])
    w, b = ours.in_proj_weight, ours.in_proj_bias
    q, k, v = (
        (x @ w_.mT + b_).unflatten(-1, (4, 8)).transpose(1, 2) for w_, b_ in zip(w.chunk(3), b.chunk(3), strict=True)
    )
    visible = ours.attention.pattern.for_inputs(q, k, key_mask=~hidden).to_dense() & ~hidden[:, None, None]
    if "shared" in spec:
        k = q / q.norm(dim=-1, keepdim=True)
    expected = attend(q, k, v, visible.expand(2, 4, 64, 64)).transpose(1, 2).flatten(2) @ ours.out_proj.weight.mT
    expected = (expected + ours.out_proj.bias)[~hidden]
    out = ours(x, x, x, key_padding_mask=hidden, need_weights=False)[0][~hidden]
    same_with_gradients(out, expected, [x, w, b, ours.out_proj.weight])


def test_the_error_falls_as_more_blocks_are_kept():
    """On queries and keys made from a photograph, whose neighbourhoods are alike as those of real activations are."""
    q, k, v = photograph_qkv(1024, batch=1, heads=4, head_dim=64, dtype=torch.float32)
    exact = attention(q, k, v)
    shares = (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)
    for make_pattern in (
        lambda share: TopKBlocks(16, fraction=share),
        lambda share: TopKBlocks(16, fraction=share, summary="minmax"),
        lambda share: TopPBlocks(16, mass=share),
    ):
        errors = [float((attention(q, k, v, mask=make_pattern(s)) - exact).norm() / exact.norm()) for s in shares]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 and errors[0] > 0.01, errors


@pytest.mark.parametrize("summary", ["mean", "minmax"])
@pytest.mark.parametrize(
    "spec", ["topk_blocks:block=16,blocks=2", "topk_blocks:block=16,fraction=0.4", "topp_blocks:block=16,mass=0.5"]
)
def test_the_past_does_not_know_how_many_tokens_come(spec: str, summary: str) -> None:
    """Rows of a beginning are those of the whole, at every length: a block that is not full yet has no say."""
    method = parse(f"{spec},queries=first,summary={summary}")
    torch.manual_seed(0)
    q, k, v = (2 * torch.randn(1, 2, 70, 8) for _ in range(3))
    whole = method.attend(q, k, v, is_causal=True)[0]
    for n in range(1, 70):
        part = method.attend(*(t[:, :, :n] for t in (q, k, v)), is_causal=True)[0]
        torch.testing.assert_close(part, whole[:, :, :n], rtol=1e-4, atol=1e-4)
