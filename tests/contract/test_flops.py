"""What torch.utils.flop_counter and torch.profiler see of our operators: every call, by name, counted by its blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from efficient_attn import BlockMask, MultiheadAttention, attention, linear_attention, parse, performer_attention
from efficient_attn.backends.reference import linear_attention as reference_linear
from efficient_attn.ops.flops import visited_pairs
from efficient_attn.tracing import PLAN, named

B, H, N, D, DV = 2, 4, 300, 32, 16
ATTENTION = torch.ops.efficient_attn.attention_forward
BACKWARD = torch.ops.efficient_attn.attention_backward


def counted(call) -> dict:
    with FlopCounterMode(display=False) as counter:
        call()
    return dict(counter.get_flop_counts().get("Global", {}))


def drawn(n_q: int = N, n_k: int = N, kv_heads: int = H, grad: bool = False):
    torch.manual_seed(0)
    shapes = ((B, H, n_q, D), (B, kv_heads, n_k, D), (B, kv_heads, n_k, DV))
    return tuple(torch.randn(shape, requires_grad=grad) for shape in shapes)


def by_drawing(mask: BlockMask, heads: int, batch: int) -> int:
    """Pairs of the blocks that hold a listed pair inside window and lengths, counted on a drawing of the whole mask."""
    (block_q, block_k), total = mask.block_size, 0
    bare = BlockMask(mask.q_len, mask.kv_len, mask.block_size, window=mask.window, window_offset=mask.window_offset)
    bare = bare if mask.kv_lengths is None else bare.with_lengths(mask.kv_lengths)
    seen = bare.to_dense().expand(batch, heads, -1, -1)
    for b in range(batch):
        for h in range(heads):
            for i in range(0, mask.q_len, block_q):
                for j in range(0, mask.kv_len, block_k):
                    block = seen[b, h, i : i + block_q, j : j + block_k]
                    if not block.any():
                        continue
                    if mask.indptr is not None:
                        n_q = -(-mask.q_len // block_q)
                        row = ((b % mask.batch) * mask.heads + h % mask.heads) * n_q + i // block_q
                        start, stop = mask.indptr[row], mask.indptr[row + 1]
                        if j // block_k not in mask.indices[start:stop].tolist():
                            continue
                    total += block.numel()
    return total


MASKS = {
    "dense": BlockMask(N, N),
    "causal": BlockMask(N, N).with_causal(),
    "window": BlockMask(N, N, (64, 32)).with_window((40, 7)),
    "window_outside": BlockMask(N, N, window=(-1, 0), window_offset=-1000),
    "lengths": BlockMask.from_lengths([300, 130], q_len=N, kv_len=N),
    "no_keys": BlockMask.from_lengths([0, 1], q_len=N, kv_len=N),
    "blocks": parse("bigbird:block=16").pattern.block_mask(N, N),
    "blocks_window_lengths": parse("bigbird:block=32")
    .pattern.block_mask(N, N)
    .with_window((90, 0))
    .with_lengths([290, 33]),
    "bits": BlockMask.from_dense(torch.rand(B, H, N, N, generator=torch.Generator().manual_seed(0)) > 0.99995),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_blocks_that_a_mask_lets_a_kernel_visit_are_counted(name: str) -> None:
    mask = MASKS[name]
    pairs = by_drawing(mask, H, B)
    assert visited_pairs(mask.arrays(), B, H, N, N) == pairs
    assert counted(lambda: attention(*drawn(), mask=mask)) == {ATTENTION: 2 * pairs * (D + DV)}


def plain(query, key, value):
    """The formula as one writes it in PyTorch, n x n."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    return (query @ key.mT).softmax(-1) @ value


@pytest.mark.parametrize("kv_heads", [H, 2])
def test_a_dense_call_counts_what_the_formula_in_pytorch_counts(kv_heads: int) -> None:
    tensors = drawn(kv_heads=kv_heads)
    ours, theirs = counted(lambda: attention(*tensors)), counted(lambda: plain(*tensors))
    assert sum(ours.values()) == sum(theirs.values()) == 2 * B * H * N * N * (D + DV)


def test_forward_and_backward_through_autograd() -> None:
    tensors = drawn(grad=True)
    mask = parse("bigbird:block=16").pattern.block_mask(N, N)
    pairs = by_drawing(mask, H, B)
    found = counted(lambda: attention(*tensors, mask=mask).sum().backward())
    assert found == {ATTENTION: 2 * pairs * (D + DV), BACKWARD: 2 * pairs * (3 * D + 2 * DV)}
    found = counted(lambda: attention(*tensors).sum().backward())
    theirs = counted(lambda: plain(*tensors).sum().backward())
    made_again = 2 * B * H * N * N * D  # the scores, which the plain formula keeps, n x n
    assert sum(found.values()) == sum(theirs.values()) + made_again


@pytest.mark.parametrize("projected", [False, True])
def test_linear_attention_counts_what_its_definition_in_pytorch_counts(projected: bool) -> None:
    query, key, value = drawn(kv_heads=2, n_k=N + 40)
    projection = torch.randn(24, D) if projected else None
    call = (None, projection, False, 0, "performer_relu" if projected else "identity", 1.0)
    operators = torch.ops.efficient_attn
    theirs = counted(lambda: reference_linear.linear_attention_forward(query, key, value, *call))
    ours = counted(lambda: operators.linear_attention_forward(query, key, value, *call, "reference"))
    assert sum(ours.values()) == sum(theirs.values()) > 0

    results = operators.linear_attention_forward(query, key, value, *call, "reference")
    gradient = (torch.ones_like(results[0]), None, query, key, value, *call[:2], *results, *call[2:])
    theirs = counted(lambda: reference_linear.linear_attention_backward(*gradient))
    ours = counted(lambda: operators.linear_attention_backward(*gradient, "reference"))
    features = 24 if projected else D
    twice = 2 * features * (DV + 1) * B * H * N  # the definition sums over the queries for dk and again for dv
    assert sum(ours.values()) == sum(theirs.values()) - twice


def test_methods_on_linear_attention_are_counted() -> None:
    query, key, value = drawn(grad=True)
    assert len(counted(lambda: linear_attention(query.abs(), key.abs(), value).sum().backward())) == 2
    found = counted(lambda: performer_attention(query.detach(), key, value, projection=torch.randn(8, D)))
    assert found[torch.ops.efficient_attn.linear_attention_forward] == 2 * 8 * B * H * 2 * N * (DV + 1 + D)


@pytest.mark.parametrize("spec", ["dense", "sliding_window:left=20,right=20", "bigbird:block=16"])
def test_a_module_and_a_model_count_projections_and_attention(spec: str) -> None:
    module = MultiheadAttention(H * D, H, batch_first=True, attention=spec)
    x = torch.randn(B, N, H * D)
    pairs = visited_pairs(parse(spec).pattern.block_mask(N, N, num_heads=H).arrays(), B, H, N, N)
    found = counted(lambda: module(x, x, x, need_weights=False))
    assert found[ATTENTION] == 4 * pairs * D
    assert sum(found.values()) == 4 * pairs * D + 2 * B * N * (H * D) * (4 * H * D)

    layer = nn.TransformerEncoderLayer(H * D, H, 64, batch_first=True)
    layer.self_attn = module
    model = nn.Sequential(layer, nn.Linear(H * D, 5)).eval()
    found = counted(lambda: model(x))
    assert found[ATTENTION] == 4 * pairs * D
    dense = 2 * B * N * H * D * (4 * H * D + 2 * 64 + 5)
    assert sum(found.values()) == 4 * pairs * D + dense


def test_fake_tensors_count_every_listed_block_in_full() -> None:
    mask = parse("bigbird:block=32").pattern.block_mask(N, N).with_window((90, 0))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        tensors = [fake.from_tensor(t) for t in drawn()]
        arrays = mask.arrays()._replace(
            **{f: fake.from_tensor(getattr(mask.arrays(), f)) for f in ("indptr", "indices", "tile_ids", "tiles")}
        )
        assert visited_pairs(arrays, B, H, N, N) == mask.indices.numel() * 32 * 32 * B * H
        found = counted(lambda: attention(*tensors, is_causal=True))
    assert found[ATTENTION] == 2 * by_drawing(MASKS["causal"], H, B) * (D + DV)


# --- torch.profiler ---


def test_the_profiler_sees_plain_calls_backwards_and_plans_by_name() -> None:
    query, key, value = drawn()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        attention(query, key, value)
        parse("topk_blocks:block=16,blocks=4").attend(query, key, value)
        parse("lsh").attend(query, key, value)
        parse("sliding_window:left=20,right=20+centroid:block=16").attend(query, key, value)
        attention(*drawn(grad=True), mask=torch.ones(N, N, dtype=torch.bool).tril()).sum().backward()
    names = [event.name for event in found.events()]
    assert names.count("efficient_attn::attention_forward") == 1 + 1 + 2 + 1
    assert names.count("efficient_attn::union_attention") == 1  # lsh, in the order of its buckets
    assert names.count("efficient_attn::attention_backward") == 1
    assert names.count(PLAN) >= 5


def test_nothing_is_named_while_no_profiler_runs(monkeypatch) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(torch.profiler, "record_function", refuse)
    query, key, value = drawn()
    parse("topk_blocks:block=16,blocks=4").attend(query, key, value)
    parse("lsh").attend(query, key, value)
    assert named("x")(lambda: 3)() == 3
