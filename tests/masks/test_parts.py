"""`PartedMask`: the union of its parts is the mask, whoever asks and by whatever way."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.cases import Case, band_and_columns, parts
from torch.overrides import TorchFunctionMode

from efficient_attn import BlockMask, MaskError, attention, parse
from efficient_attn.backends.reference.attention import visible_pairs
from efficient_attn.inputs import causal_mask
from efficient_attn.masks import Part, PartedMask
from efficient_attn.patterns import past_of

CASE = Case("", B=2, Hq=4, Hkv=2, Nq=75, Nk=130)


def drawn(mask: PartedMask) -> torch.Tensor:
    """The definition of a union, part by part, from the arrays that backends get."""
    seen = torch.zeros(mask.shape, dtype=torch.int64)
    for part, arrays in zip(mask.union, mask.part_arrays(False), strict=True):
        own = visible_pairs(arrays, part.mask.q_len, part.mask.kv_len, torch.device("cpu"))
        for b in range(mask.batch):
            for h in range(mask.heads):
                i, j = torch.arange(part.mask.q_len), torch.arange(part.mask.kv_len)
                for order, name in ((part.query_order, "i"), (part.key_order, "j")):
                    if order is not None:
                        lines = order.view(part.mask.batch if order.shape[0] > 1 else 1, -1, order.shape[1])
                        line = lines[b % lines.shape[0], h // (mask.heads // lines.shape[1])].long()
                        i, j = (line, j) if name == "i" else (i, line)
                seen[b, h, i[:, None], j] += own[b % own.shape[0], h % own.shape[1]].long()
    assert int(seen.max()) <= 1
    return seen.bool()


@pytest.mark.parametrize("lines", ["one", "heads", "batch"])
@pytest.mark.parametrize("count", [1, 3])
def test_whole_density_and_copies(lines: str, count: int) -> None:
    made = parts(count, lines=lines)(CASE, torch.Generator().manual_seed(count))
    mask = PartedMask.trusted(made.union, q_len=made.q_len, kv_len=made.kv_len)
    seen = drawn(mask)
    assert mask.density == float(seen.double().mean()) and not mask._whole_kept
    assert torch.equal(mask.to_dense(), seen)
    for other in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask), mask.to("cpu")):
        assert len(other.union) == count and torch.equal(drawn(other), seen) and other == mask
    assert torch.equal((~mask).to_dense(), ~seen) and (~mask).union is None
    assert torch.equal((mask & BlockMask(75, 130).with_causal("bottom_right")).to_dense(), seen.tril(130 - 75))
    assert f"{count} parts" in repr(mask)


def test_lengths_keep_the_parts() -> None:
    mask, lengths = parts(2)(CASE, torch.Generator().manual_seed(0)), torch.tensor([20, 130])
    padding = BlockMask.from_lengths(lengths, q_len=75, kv_len=130)
    joined = mask & padding
    assert len(joined.union) == 2 and joined.shape == (2, 1, 75, 130)
    expected = mask.to_dense() & (torch.arange(130) < lengths[:, None, None, None])
    for other in (joined, padding & mask, pickle.loads(pickle.dumps(joined))):
        assert torch.equal(other.to_dense(), expected)
        assert other.density == float(expected.double().mean())
    assert all(arrays.kv_lengths is not None for arrays in joined.part_arrays(False))


def test_a_call_reads_the_parts_and_not_the_whole() -> None:
    mask = parts(2)(CASE, torch.Generator().manual_seed(0))
    mask = PartedMask.trusted(mask.union, q_len=75, kv_len=130)
    query, key = torch.randn(2, 4, 75, 16, requires_grad=True), torch.randn(2, 2, 130, 16)
    out = attention(query, key, key, mask=mask, backend="cpu")
    assert not mask._whole_kept
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    assert mask._whole_kept, "a second derivative is of the mask without parts"
    expected = attention(query, key, key, mask=mask.to_dense(), backend="reference")
    torch.testing.assert_close(out, expected)
    (other,) = torch.autograd.grad(expected.square().sum(), query, create_graph=True)
    torch.testing.assert_close(gradient, other)
    found, wanted = (torch.autograd.grad(g.square().sum(), query)[0] for g in (gradient, other))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("constant", [-1e4, 1e8, torch.finfo(torch.float32).min])
def test_a_large_number_on_every_score_is_nothing(constant: float) -> None:
    mask = parts(2)(CASE, torch.Generator().manual_seed(0))
    found = []
    for given in (mask, mask.to_dense()):
        generator = torch.Generator().manual_seed(1)
        leaves = [torch.randn(1, 1, n, 16, generator=generator).requires_grad_() for n in (75, 130, 130)]
        out = attention(*leaves, mask=given, bias=torch.full((75, 130), constant), backend="cpu")
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_compiled_and_mapped_calls_read_the_whole() -> None:
    mask = band_and_columns(Case("", Nq=90, Nk=90), torch.Generator())
    query = torch.randn(2, 2, 90, 16)
    expected = attention(query, query, query, mask=mask.to_dense())
    compiled = torch.compile(lambda q: attention(q, q, q, mask=mask), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query), expected)
    mapped = torch.func.vmap(lambda q: attention(q, q, q, mask=mask))(query[:, None])
    torch.testing.assert_close(mapped[:, 0], expected)


def test_what_is_no_union_is_refused() -> None:
    ones, few = torch.ones(4, 4, dtype=torch.bool), torch.tensor([[0, 2]], dtype=torch.int32)
    everything = BlockMask.from_dense(ones)
    with pytest.raises(MaskError, match="disjoint"):
        PartedMask.of([Part(everything), Part(everything)], q_len=4, kv_len=4)
    with pytest.raises(MaskError, match="at least one"):
        PartedMask.of([], q_len=4, kv_len=4)
    two = BlockMask.from_dense(ones[:2, :2])
    for wrong, text in (
        (Part(two), "without query_order"),
        (Part(two, few), "without key_order"),
        (Part(two, few, few + 2), "from 0 to 3"),
        (Part(two, few, few * 0), "twice"),
        (Part(two, few, few.long()), "int32"),
        (Part(two, few.repeat(3, 1), few), "3 lines"),
        (Part(BlockMask.from_lengths([1], q_len=4, kv_len=4)), "lengths"),
    ):
        with pytest.raises(MaskError, match=text):
            PartedMask.of([wrong], q_len=4, kv_len=4)
    assert PartedMask.of([Part(two, few, few)], q_len=4, kv_len=4).density == 4 / 16


def test_plot_shows_a_part_in_its_order() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    mask = band_and_columns(Case("", Nq=90, Nk=90), torch.Generator())
    assert "order" in mask.plot(part=1).get_xlabel() and mask.plot().get_xlabel() == "key"
    with pytest.raises(MaskError, match="2 parts"):
        mask.plot(part=2)
    pyplot.close("all")


class _Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


LOOKERS = {
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "default device": lambda: torch.device("cpu"),
    "a default device that is not that of the tensors": lambda: torch.device("meta"),
    "function mode": _Watching,
}


AXIAL = parse("axial").pattern


@pytest.mark.parametrize("looker", LOOKERS)
def test_who_looks_on_does_not_turn_parts_into_one_mask_of_all(looker: str, monkeypatch) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 1024, 16, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, 2, 1024, 16)
    assert isinstance(AXIAL.block_mask(1024, 1024), PartedMask)

    def run() -> list[torch.Tensor]:
        out = attention(query, key, value, mask=AXIAL)
        return [out.detach(), *torch.autograd.grad(out, (query, key, value), grad)]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the mask of all pairs was made")

    plain = run()
    monkeypatch.setattr(PartedMask, "arrays", refuse)
    with LOOKERS[looker]():
        seen = run()
        with torch.no_grad():
            still = attention(query, key, value, mask=AXIAL)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True)) and torch.equal(still, plain[0])


def test_a_profiler_names_a_union() -> None:
    query = torch.randn(1, 2, 1024, 16, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(query, query, query, mask=AXIAL).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"efficient_attn::union_attention", "efficient_attn::union_attention_backward"} <= names


@pytest.mark.parametrize(
    "spec",
    ["axial", "strided:stride=32", "fixed:stride=32,summary=4", "dilated:left=16,right=16,dilation=4",
     "neighborhood:kernel=5", "longformer:window=64,global_tokens=4"],
)  # fmt: skip
def test_a_compiled_call_takes_the_same_parts(spec: str, monkeypatch) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    pattern = parse(spec).pattern
    query, key, value = (torch.randn(1, 2, 1024, 16, requires_grad=True) for _ in range(3))
    grads = torch.randn(1, 2, 1024, 16), torch.randn(1, 2, 1024)

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, p: float = 0.0) -> tuple[torch.Tensor, ...]:
        return attention(query, key, value, mask=pattern, dropout_p=p, dropout_seed=3, return_lse=True)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the mask of all pairs was made")

    monkeypatch.setattr(PartedMask, "arrays", refuse)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for p in (0.0, 0.2):
        plain, seen = call(query, key, value, p), compiled(query, key, value, p)
        assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
        wanted, found = (torch.autograd.grad(pair, (query, key, value), grads) for pair in (plain, seen))
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize("lengths", [(1024, 1024, None), (700, 1000, "bottom_right"), (1000, 700, "top_left")])
@pytest.mark.parametrize(
    "spec",
    ["axial", "axial:size=31x33,prefix=1", "strided:stride=32", "fixed:stride=32,summary=4", "neighborhood:kernel=5",
     "fixed:stride=32,summary=4,causal=false", "dilated:left=16,right=16,dilation=4",
     "longformer:window=64,global_tokens=4"],
)  # fmt: skip
def test_the_past_of_a_union_has_parts_too(spec: str, lengths: tuple[int, int, str | None]) -> None:
    q_len, kv_len, alignment = lengths
    pattern = parse(spec).pattern
    if q_len != kv_len and pattern.name in ("axial", "neighborhood"):
        pytest.skip("images attend to themselves")
    mask = past_of(pattern, alignment).block_mask(q_len, kv_len)
    wanted = pattern.aligned(alignment).block_mask(q_len, kv_len) & causal_mask(q_len, kv_len, True, alignment)
    assert torch.equal(mask.to_dense(), wanted.to_dense())
    assert isinstance(mask, PartedMask) == (pattern.name != "neighborhood") or q_len != kv_len
    if isinstance(mask, PartedMask):
        assert torch.equal(drawn(mask)[0, 0], wanted.to_dense()[0, 0])
    query, key = torch.randn(1, 2, q_len, 16), torch.randn(1, 2, kv_len, 16)
    call = {"is_causal": True, "causal_alignment": alignment}
    torch.testing.assert_close(
        attention(query, key, key, mask=pattern, **call), attention(query, key, key, mask=wanted.to_dense())
    )
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: attention(q, k, k, mask=pattern, **call), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(query, key), attention(query, key, key, mask=pattern, **call))


def test_compiled_parts_at_other_lengths_and_under_vmap() -> None:
    torch._dynamo.reset()
    pattern = parse("strided:stride=16,alignment=bottom_right").pattern
    compiled = torch.compile(lambda q, k: attention(q, k, k, mask=pattern), backend="aot_eager", dynamic=True)
    for q_len, kv_len in ((700, 700), (1024, 1024), (1, 900), (300, 640), (17, 17)):
        query, key = torch.randn(2, 4, q_len, 16), torch.randn(2, 2, kv_len, 16)
        assert torch.equal(compiled(query, key), attention(query, key, key, mask=pattern))
    many = torch.randn(3, 1, 2, 640, 16)
    mapped = torch.compile(torch.vmap(lambda x: attention(x, x, x, mask=pattern)), backend="aot_eager")(many)
    torch.testing.assert_close(mapped, torch.stack([attention(x, x, x, mask=pattern) for x in many]))


def test_a_second_derivative_of_a_compiled_union_is_refused_by_name_or_right() -> None:
    torch._dynamo.reset()
    query = torch.randn(1, 1, 640, 8, requires_grad=True)
    pattern = parse("strided:stride=16").pattern
    out = torch.compile(lambda x: attention(x, x, x, mask=pattern), backend="aot_eager")(query)
    with pytest.raises(RuntimeError):
        (gradient,) = torch.autograd.grad(out.sum(), query, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), query)
