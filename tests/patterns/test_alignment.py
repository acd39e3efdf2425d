"""Where queries stand when they are not as many as the keys: said, or not needed, never guessed. Every pattern."""

from __future__ import annotations

import pytest
import torch

from efficient_attn import InputError, attention
from efficient_attn.masks import BlockMask
from efficient_attn.methods import parse
from efficient_attn.patterns import PATTERNS, Causal, Dense, Pattern, SlidingWindow, TopKBlocks, per_head

FEW, MANY = 37, 90
# Options with which a pattern shows something, and not everything, at these lengths.
OPTIONS = {
    "sliding_window": {"left": 3, "right": 4},
    "dilated": {"left": 3, "right": 4},
    "strided": {"stride": 8},
    "fixed": {"stride": 20, "summary": 3},
    "longformer": {"window": 6, "global_indices": (60,)},
    "prefix_lm": {"prefix": 7},
}
SQUARE = {
    "bigbird", "documents", "neighborhood", "axial", "deepspeed_fixed", "deepspeed_variable", "deepspeed_bigbird",
    "deepspeed_bslongformer", "deepspeed_local",
}  # fmt: skip
BY_CONTENT = {"topk_blocks", "topp_blocks", "lsh", "sorted_buckets"}
FREE = {"dense"}
PLACED = [PATTERNS[name](**options) for name, options in OPTIONS.items()] + [Causal()]
PLACED += [Causal() & SlidingWindow(5, 0), per_head([Causal(), SlidingWindow(2, 2)])]


def qkv(n: int, m: int):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, length, 8, generator=g, dtype=torch.float64) for length in (n, m, m)]


def test_every_pattern_is_of_one_kind():
    known = SQUARE | BY_CONTENT | FREE | {*OPTIONS, "causal"}
    own = {name for name, cls in PATTERNS.items() if cls.__module__.startswith("efficient_attn.")}
    assert own == known, "say what a new pattern does with fewer queries than keys"


@pytest.mark.parametrize(("n", "m"), [(FEW, MANY), (1, MANY), (MANY, FEW)])
@pytest.mark.parametrize("pattern", PLACED, ids=str)
def test_positions_need_an_alignment(pattern, n, m):
    inputs, method = qkv(n, m), parse(pattern)
    for call in (
        lambda: pattern.block_mask(n, m, num_heads=2),
        lambda: attention(*inputs, mask=pattern),
        lambda: method.attend(*inputs),
        lambda: (
            parse(f"({pattern})+centroid:block=16").attend(*inputs)
            if " " not in str(pattern)
            else method.attend(*inputs)
        ),
    ):
        with pytest.raises(InputError, match=r"goes by positions.*top_left.*bottom_right"):
            call()
    i, j, longest = torch.arange(n)[:, None], torch.arange(m), max(n, m)
    for alignment, offset in (("top_left", 0), ("bottom_right", m - n)):
        # The definition: the rows and columns of the pattern over a whole sequence, wherever its length ends.
        heads = [pattern.visible(i + offset, j, longest, longest, head).expand(n, m) for head in range(2)]
        expected = torch.stack(heads)[None]
        aligned = pattern.aligned(alignment)
        assert aligned.aligned("top_left") == aligned and pattern.aligned(None) is pattern
        assert torch.equal(aligned.block_mask(n, m, num_heads=2).to_dense().expand(1, 2, n, m), expected)
        wanted = attention(*inputs, mask=expected)
        for mask, options in ((aligned, {}), (pattern, {"causal_alignment": alignment})):
            torch.testing.assert_close(attention(*inputs, mask=mask, **options), wanted)
            torch.testing.assert_close(parse(mask).attend(*inputs, **options)[0], wanted)
        past = attention(*inputs, mask=expected & (j <= i + offset))
        options = {"is_causal": True, "causal_alignment": alignment}
        torch.testing.assert_close(attention(*inputs, mask=pattern, **options), past)
        torch.testing.assert_close(method.attend(*inputs, **options)[0], past)


def test_what_the_pattern_says_is_its_own():
    q, k, v = qkv(FEW, MANY)
    window = SlidingWindow(2, 2, "top_left")
    out = attention(q, k, v, mask=window, is_causal=True, causal_alignment="bottom_right")
    i, j = torch.arange(FEW)[:, None], torch.arange(MANY)
    torch.testing.assert_close(out, attention(q, k, v, mask=(j - i).abs() <= 2))


@pytest.mark.parametrize("name", sorted(SQUARE))
def test_others_are_defined_for_self_attention(name):
    inputs, pattern = qkv(48, 64), PATTERNS[name]()
    for alignment in (None, "top_left", "bottom_right"):
        with pytest.raises(InputError, match="defined for self-attention"):
            attention(*inputs, mask=pattern, causal_alignment=alignment)


@pytest.mark.parametrize("name", sorted(BY_CONTENT | FREE))
def test_others_know_no_positions(name):
    """Without a diagonal a choice by content goes by content alone: queries in another order choose the same."""
    options = {"block": 16, "blocks": 2, "mass": 0.2}
    kinds = PATTERNS[name].kinds
    pattern: Pattern = PATTERNS[name](**{option: value for option, value in options.items() if option in kinds})
    q, k, v = qkv(32, 128)
    out = parse(pattern).attend(q, k, v)[0]
    turned = torch.cat([q[:, :, 16:], q[:, :, :16]], 2)
    torch.testing.assert_close(parse(pattern).attend(turned, k, v)[0], torch.cat([out[:, :, 16:], out[:, :, :16]], 2))


def test_blocks_chosen_at_the_diagonal_that_is_said():
    query, key, _ = qkv(16, 128)
    value = torch.eye(128, dtype=key.dtype).expand(2, 2, -1, -1)
    pattern = TopKBlocks(16, 1, sink=0)
    for alignment, block in (("top_left", 0), ("bottom_right", 7)):
        weights = attention(query, key, value, mask=pattern, causal_alignment=alignment)
        torch.testing.assert_close(weights[..., 16 * block : 16 * (block + 1)].sum(-1), torch.ones_like(query[..., 0]))


def test_blocks_that_a_mask_cuts_off_the_diagonal_keep_the_past_blind():
    """Causality of a lone chunk as a bool mask: the window is not known, what is cut is not chosen by its score."""
    n, m = 37, 128
    past = torch.arange(m) <= torch.arange(n)[:, None] + m - n
    for spec in ("topk_blocks:block=16,blocks=3,queries=first", "topp_blocks:block=16,mass=0.3,queries=first"):
        q, k, v = qkv(n, m)
        method = parse(spec)
        before = method.attend(q, k, v, mask=past)[0]
        # The latest keys are there: every query sees itself.
        assert method.attend(q, k, v, mask=past, need_weights=True)[1].diagonal(m - n, -2, -1).gt(0).all()
        for cut in range(m - n + 1, m, 3):
            for x in (3.0, -50.0, 50.0):
                later = [t.clone() for t in (q, k, v)]
                for t, start in zip(later, (cut - (m - n), cut, cut), strict=True):
                    t[:, :, start:] = x * t[:, :, start:] + x
                for mask in (past, BlockMask.from_dense(past)):
                    after = method.attend(*later, mask=mask)[0]
                    rows = cut - (m - n)
                    torch.testing.assert_close(after[:, :, :rows], before[:, :, :rows])


def test_empty_lengths_need_none():
    for n, m in ((0, 5), (5, 0)):
        for pattern in (Dense(), Causal(), SlidingWindow(2, 2)):
            assert not attention(*qkv(n, m), mask=pattern).any()


@pytest.mark.parametrize(
    "pattern", [SlidingWindow(3, 2), per_head([Causal(), SlidingWindow(2, 2)]), TopKBlocks(16, 2)], ids=str
)
def test_a_call_says_it_in_a_compiled_program_too(pattern):
    def program(q, k, v):
        return attention(q, k, v, mask=pattern, is_causal=True, causal_alignment="bottom_right")

    torch._dynamo.reset()
    inputs = qkv(FEW, MANY)
    compiled = torch.compile(program, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), program(*inputs))


def test_hidden_keys_choose_nothing_in_a_compiled_program():
    method, keep = parse("topk_blocks:block=16,blocks=2"), torch.arange(128) < 100
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: method.attend(q, k, v, mask=keep)[0], backend="eager", fullgraph=True)
    q, k, v = qkv(128, 128)
    hidden = ~keep[:, None]
    same = compiled(q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan))
    assert torch.equal(compiled(q, k, v), same)
