"""The parts that patterns propose: their union is the pattern, in blocks of any size, and is taken where it pays."""

from __future__ import annotations

import pickle
import re
import time

import pytest
import torch

from efficient_attn import attention, explain
from efficient_attn.backends.cpu import attention as cpu
from efficient_attn.masks import PartedMask
from efficient_attn.masks.parts import cost, visited
from efficient_attn.methods.spec import parse
from efficient_attn.ops import union
from efficient_attn.patterns import Pattern
from efficient_attn.patterns.orders import SIZES, Line

LINES = (
    "dilated:left=5,right=7,dilation=3",
    "dilated:left=20,right=0,dilation=4",
    "strided:stride=16",
    "strided:stride=16,causal=false",
    "strided:stride=7,part=summary",
    "strided:stride=33,causal=false,part=summary",
    "fixed:stride=16,summary=3",
    "fixed:stride=16,summary=3,shift=1,causal=false",
    "fixed:stride=20,summary=4,part=local",
    "fixed:stride=20,summary=4,part=summary",
    "fixed:stride=20,summary=4,part=summary,causal=false",
    "longformer:window=20,global_tokens=3",
    "longformer:window=20,global_tokens=2,global_indices=40x41x50",
    "longformer:window=0",
)
IMAGES = (
    ("axial:size=9x13", 117),
    ("axial:size=16x16,causal=true", 256),
    ("axial:size=8x20,part=columns,causal=true", 160),
    ("axial:size=8x20,part=rows,prefix=3", 163),
    ("axial:size=16x16,prefix=2", 258),
    ("neighborhood:size=16x16,kernel=7", 256),
    ("neighborhood:size=20x17,kernel=5x3,dilation=1x2,causal=falsextrue,prefix=3", 343),
    ("neighborhood:size=100,kernel=7,dilation=3", 100),
    ("neighborhood:size=6x7x9,kernel=3x3x5", 378),
    ("neighborhood:size=6x8x9,kernel=3,dilation=2,causal=truexfalsexfalse,prefix=1", 433),
    ("neighborhood:size=16x16,kernel=8,stride=4,additional_keys=20", 256),
    ("neighborhood:size=20x17,kernel=5x3,stride=4x3,dilation=1x2,causal=falsextrue,prefix=3,additional_keys=1", 343),
    ("neighborhood:size=7x7x9,kernel=3x5x4,stride=2x4x4,causal=truexfalsexfalse", 441),
)


def check(pattern: Pattern, q_len: int, kv_len: int, sizes: tuple[tuple[int, int], ...]) -> None:
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    expected = pattern.visible(i, j, q_len, kv_len).expand(q_len, kv_len)
    proposals = pattern._proposals(q_len, kv_len)
    if proposals is None and kv_len == 1:
        return  # no key that a segment of `fixed` is summarised by
    assert proposals, f"{pattern} has no parts"
    for size in sizes:
        made = [each.part(size, q_len, kv_len) for each in proposals]
        mask = PartedMask.of(made, q_len=q_len, kv_len=kv_len)  # raises where a pair is in two parts
        assert torch.equal(mask.to_dense()[0, 0], expected), f"{pattern} {q_len} x {kv_len} in {size}"


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("spec", LINES)
def test_parts_of_patterns_of_a_line(spec: str, alignment: str) -> None:
    pattern = parse(spec).pattern.aligned(alignment)
    check(pattern, 130, 90, SIZES)
    for n, (q_len, kv_len) in enumerate(((64, 64), (90, 130), (201, 201), (1, 70), (70, 1))):
        check(pattern, q_len, kv_len, SIZES[n % len(SIZES) :][:2])


@pytest.mark.parametrize("spec, tokens", IMAGES)
def test_parts_of_patterns_of_images(spec: str, tokens: int) -> None:
    pattern = parse(spec).pattern
    check(pattern, tokens, tokens + getattr(pattern, "additional_keys", 0), SIZES)


@pytest.mark.parametrize("spec", ["axial", "strided:stride=64", "fixed", "dilated:dilation=4", "neighborhood"])
def test_an_order_is_taken_where_it_pays(spec: str) -> None:
    pattern = parse(spec).pattern
    mask = pattern.block_mask(4096, 4096)
    assert mask.union is not None and pattern.block_mask(4096, 4096) is mask
    assert cost(mask) < cost(mask._whole) and visited(mask) < visited(mask._whole) / 2
    assert pattern.block_mask(256, 256).union is None
    assert parse("documents:lengths=512").pattern.block_mask(4096, 4096).union is None


@pytest.mark.parametrize(
    "spec, tokens",
    [
        ("axial", 362**2),
        ("strided", 2**17),
        ("dilated:left=64,right=64,dilation=4", 2**17),
        ("longformer:window=256,global_tokens=16", 2**17),
        ("neighborhood:kernel=7", 362**2),
    ],
)
def test_a_plan_of_many_tokens_is_short_and_soon_made(spec: str, tokens: int) -> None:
    pattern = parse(spec).pattern
    started = time.process_time()
    made = [each.part(min(SIZES, key=each.cost), tokens, tokens) for each in pattern._proposals(tokens, tokens)]
    assert time.process_time() - started < 5  # 0.1 to 0.8 s of an idle core
    assert visited(PartedMask.trusted(made, q_len=tokens, kv_len=tokens)) < 1000 * tokens
    assert sum(t.numel() * t.element_size() for part in made for t in part.tensors) < 400 * tokens


@pytest.mark.parametrize(
    "spec",
    ["axial", "strided:stride=32", "longformer:window=64,global_tokens=3", "neighborhood",
     "neighborhood:kernel=8,stride=4", "neighborhood:kernel=9x6,stride=5x6,prefix=0,additional_keys=77"],
)  # fmt: skip
def test_patterns_in_orders_are_exact(spec: str) -> None:
    pattern, tokens = parse(spec).pattern, 1024
    keys = tokens + getattr(pattern, "additional_keys", 0)
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, tokens), (1, keys), (1, keys))
    leaves = [torch.randn(1, *shape, 16, generator=generator).requires_grad_() for shape in shapes]
    assert pattern.block_mask(tokens, keys).union is not None
    found = []
    for backend in ("cpu", "reference"):
        out, lse = attention(*leaves, mask=pattern, return_lse=True, backend=backend)
        found.append((out, lse, *torch.autograd.grad((out.square().sum(), lse.sum()), leaves)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("spec", ["axial:size=32x32", "strided:stride=32", "fixed:stride=32,summary=3"])
def test_parts_are_kept_under_padding_and_causality(spec: str, holes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pairs before a query, of which a sequence in a batch is shorter than others."""
    method, tokens, taken = parse(spec), 1024, []
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, heads, tokens, 8, generator=generator).requires_grad_() for heads in (2, 1, 1)]
    padding = torch.arange(tokens) < torch.tensor([[tokens], [700]])
    if holes:
        padding[0, 100:130] = False
    forward = union.union_forward
    monkeypatch.setattr(union, "union_forward", lambda *a: taken.append(len(a[4].arrays)) or forward(*a))
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    pairs = method.pattern.visible(i, j, tokens, tokens) & (j <= i) & padding[:, None, None]
    out = method.attend(*leaves, key_mask=padding, is_causal=True)[0]
    assert taken == [2]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = attention(*exact, mask=pairs, backend="reference")
    found = (out, *torch.autograd.grad(out.square().sum(), leaves))
    wanted = (expected, *torch.autograd.grad(expected.square().sum(), exact))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["axial", "strided:stride=64", "longformer:window=64,global_tokens=3"])
def test_a_pattern_keeps_its_parts_as_json_and_in_another_process(spec: str) -> None:
    pattern = parse(spec).pattern
    mask = pattern.block_mask(4096, 4096)
    assert mask.union is not None
    again = Pattern.from_json(pattern.to_json()).block_mask(4096, 4096)
    sent = pickle.loads(pickle.dumps(mask))
    for other in (again, sent):
        assert len(other.union) == len(mask.union)
        for ours, expected in zip(other.union, mask.union, strict=True):
            assert ours.mask == expected.mask
            for order, wanted in zip(ours[1:], expected[1:], strict=True):
                assert order is wanted is None or torch.equal(order, wanted)


def test_explain_shows_parts_and_orders() -> None:
    query = torch.randn(1, 2, 4096, 16)
    text = str(explain(query, query, query, mask=parse("axial").pattern))
    assert "2 parts" in text and "visited" in text
    found = explain(query, query, query, mask=parse("axial").pattern, backend="reference")
    assert found.parts == () and found.visited > 10 * found.density
    assert "backend reference takes tokens in the order of the sequence" in str(found)
    found = explain(query, query, query, mask=parse("axial").pattern, softcap=20.0)
    assert found.parts == () and "joined by lse, which softcap" in found.whole_because
    assert explain(query, query, query, is_causal=True).whole_because == ""


@pytest.mark.skipif(bool(cpu.MISSING), reason="the native module is not built")
def test_explain_says_where_keys_are_copied_once() -> None:
    query = torch.randn(1, 2, 4096, 16)
    image, columns = (
        str(explain(query, query, query, mask=parse(spec).pattern, backend="cpu"))
        for spec in ("neighborhood:kernel=7", "axial")
    )
    assert re.search(r"keys copied once for \d+ tiles of queries", image)
    assert "copied" not in columns  # one tile sees them


def test_lines_are_ascending() -> None:
    line = Line.of(torch.arange(10), torch.arange(10) % 3, torch.arange(10) // 3)
    assert line.token.tolist() == [0, 3, 6, 9, 1, 4, 7, 2, 5, 8]


def test_explain_says_where_a_mask_pays() -> None:
    long, short = torch.zeros(1, 1, 4096, 8), torch.zeros(1, 1, 256, 8)
    few = explain(long, long, long, mask=parse("axial").pattern)
    assert few.density < few.work < 0.1 and "work: about 4.2" in str(few) and "not pay" not in str(few)
    scattered = explain(short, short, short, mask=parse("axial").pattern)
    assert scattered.work >= 1.0 and "does not pay here: it starts to with more tokens" in str(scattered)
    dense = explain(short, short, short)
    assert dense.work == pytest.approx(1.0, abs=0.01) and "work" not in str(dense)
