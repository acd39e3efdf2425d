"""flash-attn's interface against its definition (support/flash.py), in float64 and pair by pair of sequences."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support.flash import definition, draw, of_sequence, options, packed, rotated
from torch import Tensor

from efficient_attn import InputError, InputTypeError, UnsupportedError
from efficient_attn.compat import flash_attn as fa
from efficient_attn.compat import scores


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def backend_for(backend: str, named: dict[str, Any]) -> str:
    """Where no kernel knows a cap, it is the reference's alone."""
    return "auto" if named.get("softcap") and not scores.BY_KERNELS else backend


@pytest.fixture(params=["kernels", "rows"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cap and ALiBi by kernels, as on a CPU, or some rows at a time, as on a GPU."""
    if request.param == "rows":
        monkeypatch.setattr(scores, "BY_KERNELS", ())


@pytest.mark.parametrize("seed", range(40))
def test_dense(seed: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, lse, and the gradients of both; with a cap or ALiBi some rows at a time, or all at once."""
    dice = random.Random(seed)
    monkeypatch.setattr(scores, "PAIRS", dice.choice([1, 2**24]))
    monkeypatch.setattr(scores, "BY_KERNELS", dice.choice([("cpu",), ()]))
    B, Nq, Nk = dice.choice([1, 2]), dice.choice([1, 5, 70]), dice.choice([1, 5, 90])
    H, Hkv = dice.choice([(1, 1), (4, 4), (4, 2)])
    named = options(dice, H, B, seed)
    tensors = [draw(seed, B, Nq, H, 8), draw(seed + 1, B, Nk, Hkv, 8), draw(seed + 2, B, Nk, Hkv, 8)]
    leaves, gold = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))
    out, lse, _ = fa.flash_attn_func(
        *leaves, **named, return_attn_probs=True, deterministic=True, backend=backend_for(backend, named)
    )
    assert out.is_contiguous()
    pairs = [definition(*(x[b] for x in gold), **of_sequence(named, b)) for b in range(B)]
    expected, expected_lse = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    same(out, expected)
    same(lse, expected_lse)
    grad, grad_lse = draw(seed + 3, *out.shape), draw(seed + 4, *lse.shape).masked_fill(lse == -torch.inf, 0.0)
    finite = lambda x: x.masked_fill(x == -torch.inf, 0.0)  # noqa: E731
    torch.autograd.backward([out, finite(lse)], [grad, grad_lse])
    torch.autograd.backward([expected, finite(expected_lse)], [grad, grad_lse])
    for a, b in zip(leaves, gold, strict=True):
        same(a.grad, b.grad.nan_to_num())


@pytest.mark.parametrize("seed", range(30))
def test_packed_sequences(seed: int, backend: str) -> None:
    """Lengths of 0 and 1 among them, queries and keys of different lengths, rows behind the last sequence."""
    dice = random.Random(1000 + seed)
    B = dice.choice([1, 3, 6])
    q_lens = [dice.choice([0, 1, 7, 60, 150]) for _ in range(B)]
    k_lens = q_lens if dice.random() < 0.4 else [dice.choice([0, 1, 9, 70, 140]) for _ in range(B)]
    H, Hkv = dice.choice([(2, 2), (4, 2)])
    behind = dice.choice([0, 0, 3])
    named = options(dice, H, B, seed)
    q, k, v = (
        draw(seed + s, n + behind, heads, 8)
        for s, (n, heads) in enumerate([(sum(q_lens), H), (sum(k_lens), Hkv), (sum(k_lens), Hkv)])
    )
    leaves, gold = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    cu_q, cu_k = packed(q_lens), packed(k_lens)
    out, lse, _ = fa.flash_attn_varlen_func(
        *leaves, cu_q, cu_k, max(q_lens), max(k_lens), **named, return_attn_probs=True,
        backend=backend_for(backend, named),
    )  # fmt: skip
    parts = [
        definition(
            gold[0][cu_q[b] : cu_q[b + 1]], *(x[cu_k[b] : cu_k[b + 1]] for x in gold[1:]), **of_sequence(named, b)
        )
        for b in range(B)
    ]
    rest = gold[0][cu_q[-1] :]
    expected = torch.cat([*(o for o, _ in parts), rest * 0.0])
    same(out, expected)
    same(lse, torch.cat([*(x for _, x in parts), torch.full((H, behind), -torch.inf, dtype=lse.dtype)], 1))
    grad = draw(seed + 3, *out.shape)
    torch.autograd.backward(out, grad)
    torch.autograd.backward(expected, grad)
    for a, b in zip(leaves, gold, strict=True):
        same(a.grad, torch.zeros_like(a) if b.grad is None else b.grad.nan_to_num())


def test_long_packed_sequences_share_their_tiles() -> None:
    """Full blocks are no tiles, and those along the diagonal are alike within a sequence: memory is that of a list."""
    from efficient_attn.masks.packed import packed_mask

    starts = (0, 5000, 5000, 5001, 20000)
    mask = packed_mask(starts, starts, 20000, 20000, window=(-1, 0))
    assert mask.tiles is not None and mask.tiles.shape[0] < 700 and mask.nbytes < 4e6
    i = torch.arange(20000)
    own = torch.bucketize(i, torch.tensor(starts[1:]), right=True)
    rows = torch.tensor([0, 4999, 5000, 5001, 5100, 12345, 19999])
    expected = (own[rows, None] == own) & (i <= rows[:, None])
    counted = mask.to_dense()[0, 0][rows]
    assert torch.equal(counted, expected)


def test_tensors_packed_in_one() -> None:
    qkv, kv, q = draw(0, 2, 9, 3, 4, 8), draw(1, 2, 11, 2, 2, 8), draw(2, 2, 9, 4, 8)
    same(fa.flash_attn_qkvpacked_func(qkv, 0.0, None, True), fa.flash_attn_func(*qkv.unbind(2), causal=True))
    same(fa.flash_attn_kvpacked_func(q, kv, causal=True), fa.flash_attn_func(q, *kv.unbind(2), causal=True))
    cu_q, cu_k = packed([4, 14]), packed([21, 1])
    rows, pairs, queries = qkv.flatten(0, 1), kv.flatten(0, 1), q.flatten(0, 1)
    same(
        fa.flash_attn_varlen_qkvpacked_func(rows, cu_q, 14, 0.0, None, True),
        fa.flash_attn_varlen_func(*rows.unbind(1), cu_q, cu_q, 14, 14, causal=True),
    )
    same(
        fa.flash_attn_varlen_kvpacked_func(queries, pairs, cu_q, cu_k, 14, 21, window_size=(3, 3)),
        fa.flash_attn_varlen_func(queries, *pairs.unbind(1), cu_q, cu_k, 14, 21, window_size=(3, 3)),
    )


# --- a cache ---


@pytest.mark.parametrize("seed", range(40))
def test_with_a_cache(seed: int, backend: str) -> None:
    """Appended in place, turned by rotary positions, in pages or rows of a larger cache; lengths differ by element."""
    dice = random.Random(2000 + seed)
    B, Nq, new = dice.choice([1, 3]), dice.choice([1, 1, 4]), dice.choice([0, 1, 4])
    H, Hkv, D, page, pages = 4, dice.choice([4, 2]), 8, 8, 5
    named = options(dice, H, B, seed)
    room = page * pages - new
    lengths = [dice.randint(1, room)] * B if dice.random() < 0.3 else [dice.randint(0, room) for _ in range(B)]
    q, grown = draw(seed, B, Nq, H, D), [draw(seed + s, B, new, Hkv, D) for s in (1, 2)]
    places: dict[str, Any] = {}
    kind = dice.choice(["rows", "some rows", "pages"])
    if kind == "pages":
        caches = [draw(seed + s, B * pages + 2, page, Hkv, D) for s in (3, 4)]
        table = torch.randperm(B * pages + 2, generator=torch.Generator().manual_seed(seed))[: B * pages].view(B, pages)
        places["block_table"] = table.int()
        view = lambda cache: cache[table].flatten(1, 2)  # noqa: E731
    else:
        rows = list(range(B)) if kind == "rows" else dice.sample(range(B + 2), B)
        caches = [draw(seed + s, B if kind == "rows" else B + 2, page * pages, Hkv, D) for s in (3, 4)]
        if kind != "rows":
            places["cache_batch_idx"] = torch.tensor(rows).int()
        if dice.random() < 0.3:
            places["cache_leftpad"] = torch.tensor([dice.randint(0, n) for n in lengths]).int()
        view = lambda cache: cache[rows]  # noqa: E731
    rotary = new and dice.random() < 0.5
    angles = torch.arange(page * pages + Nq)[:, None] * torch.tensor([1.0, 0.1, 0.01][: dice.choice([2, 3])])
    cos, sin, interleaved = angles.cos().double(), angles.sin().double(), dice.random() < 0.5
    if rotary:
        named |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}

    before = [view(cache).clone() for cache in caches]
    out, lse = fa.flash_attn_with_kvcache(
        q, *caches, *(grown if new else (None, None)), cache_seqlens=torch.tensor(lengths).int(), **places, **named,
        return_softmax_lse=True, backend=backend_for(backend, named),
    )  # fmt: skip
    named = {name: given for name, given in named.items() if not name.startswith("rotary")}
    still = not named["causal"] and named.get("window_size", (-1, -1)) == (-1, -1)
    for b, n in enumerate(lengths):
        key, value, query = grown[0][b], grown[1][b], q[b]
        if rotary:
            key = rotated(key, n, cos, sin, interleaved, False)
            query = rotated(query, n, cos, sin, interleaved, still)
        expected = [torch.cat([old[b, :n], x, old[b, n + new :]]) for old, x in zip(before, (key, value), strict=True)]
        for cache, should in zip(caches, expected, strict=True):
            torch.testing.assert_close(view(cache)[b], should, rtol=1e-6, atol=1e-6)
        begin = int(places["cache_leftpad"][b]) if "cache_leftpad" in places else 0
        gold, gold_lse = definition(query, *(x[begin : n + new] for x in expected), **of_sequence(named, b))
        torch.testing.assert_close(out[b], gold, rtol=1e-6, atol=1e-6)  # rotary positions are float32
        torch.testing.assert_close(lse[b], gold_lse, rtol=1e-6, atol=1e-6)


# --- precision, dropout, refusals ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [(-1, 0), (100, 0), (-1, -1)])
@pytest.mark.usefixtures("by")
def test_alibi_of_halves_is_as_exact_as_a_bias(dtype: torch.dtype, window: tuple[int, int]) -> None:
    """One number a key stands for the distances; next to a query it must not be rounded away."""
    n, slopes = 1200, torch.tensor([2.0, 0.004])
    q, k, v = (draw(s, 1, n, 2, 16, dtype=dtype) for s in range(3))
    gold, gold_lse = definition(*(x[0].double() for x in (q, k, v)), window_size=window, alibi_slopes=slopes)
    out, lse, _ = fa.flash_attn_func(q, k, v, window_size=window, alibi_slopes=slopes, return_attn_probs=True)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    bias = -slopes[:, None, None] * (i - j).abs()
    eager = (torch.einsum("ihd,jhd->hij", *(x[0].float() for x in (q, k))) * 0.25 + bias).to(dtype)
    eager = eager.masked_fill((j > i) if window[1] == 0 else (j > n), -torch.inf)
    eager = eager.masked_fill((j < i - 100) if window[0] == 100 else (j > n), -torch.inf)
    plain = torch.einsum("hij,jhd->ihd", torch.softmax(eager.float(), -1).to(dtype), v[0])
    assert (out[0] - gold).abs().max() <= (plain - gold).abs().max()
    assert (lse[0] - gold_lse).abs().max() < 1e-3


def test_alibi_in_memory_of_one_number_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "BY_KERNELS", ())
    seen = []
    real = scores.attention
    monkeypatch.setattr(scores, "attention", lambda *a, **b: (seen.append(b["bias"].numel()), real(*a, **b))[1])
    q = draw(0, 1, 1000, 2, 16, dtype=torch.bfloat16)
    fa.flash_attn_func(q, q, q, causal=True, alibi_slopes=torch.tensor([0.5, 0.01]))
    assert seen and sum(seen) <= 4 * 2 * 1000


@pytest.mark.parametrize("named", [{}, {"softcap": 2.0}, {"alibi_slopes": torch.tensor([0.1, 0.2])}])
@pytest.mark.usefixtures("by")
def test_dropout_is_honoured(named: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """About that many weights are dropped, others in every part of the rows; the mean stays."""
    monkeypatch.setattr(scores, "PAIRS", 64 * 128)
    q, k, v = (torch.zeros(1, 128, 2, 8) for _ in range(3))
    v[:, torch.arange(128), :, torch.arange(128) % 8] = 1.0
    torch.manual_seed(0)
    first = fa.flash_attn_func(q, k, v, dropout_p=0.25, **named)
    assert not torch.equal(first, fa.flash_attn_func(q, k, v, dropout_p=0.25, **named))
    assert not torch.equal(first[:, :64], first[:, 64:])
    mean = fa.flash_attn_func(q, k, v, **named)
    assert abs(float((first - mean).mean())) < 0.01 and float((first - mean).abs().max()) > 0.005


def test_a_model_of_flash_attn_trains() -> None:
    """Linear maps around packed causal attention learn to copy the first token of each sequence."""
    torch.manual_seed(0)
    cu = packed([5, 9, 2])
    project, head = torch.nn.Linear(8, 3 * 16), torch.nn.Linear(16, 8)
    x = torch.randn(16, 8)
    target = x[[0] * 5 + [5] * 9 + [14] * 2]
    optimizer = torch.optim.Adam([*project.parameters(), *head.parameters()], lr=0.02)
    losses = []
    for _ in range(60):
        qkv = project(x).view(-1, 3, 2, 8)
        loss = (head(fa.flash_attn_varlen_qkvpacked_func(qkv, cu, 9, causal=True).flatten(1)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


def test_compiled() -> None:
    torch._dynamo.reset()
    q = draw(0, 2, 20, 4, 8, dtype=torch.float32)
    call = torch.compile(lambda x: fa.flash_attn_func(x, x, x, causal=True, window_size=(7, 7)), fullgraph=True)
    torch.testing.assert_close(call(q), fa.flash_attn_func(q, q, q, causal=True, window_size=(7, 7)))


def test_wrong_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    q, cache = draw(0, 2, 3, 4, 8), draw(1, 2, 10, 4, 8)
    packed_q = q.flatten(0, 1)
    for window in (3, (3,), (3.0, 3), None):
        with pytest.raises(InputTypeError, match="window_size must be"):
            fa.flash_attn_func(q, q, q, window_size=window)
    with pytest.raises(InputError, match="alibi_slopes must be"):
        fa.flash_attn_func(q, q, q, alibi_slopes=torch.ones(3))
    with pytest.raises(InputError, match="softcap must be"):
        fa.flash_attn_func(q, q, q, softcap=-1.0)
    monkeypatch.setattr(scores, "BY_KERNELS", ())
    with pytest.raises(InputError, match="reference alone"):
        fa.flash_attn_func(q, q, q, softcap=1.0, backend="cpu")
    with pytest.raises(InputError, match="4 dimensions, lengths before heads"):
        fa.flash_attn_func(packed_q, packed_q, packed_q)
    with pytest.raises(InputError, match="3 in dimension 2"):
        fa.flash_attn_qkvpacked_func(draw(0, 2, 3, 2, 4, 8))
    for starts in ([1, 6], [0, 4, 2], [0, 7]):
        with pytest.raises(InputError, match="must begin with 0"):
            fa.flash_attn_varlen_func(packed_q, packed_q, packed_q, torch.tensor(starts), torch.tensor([0, 6]))
    with pytest.raises(InputError, match="2 sequences of queries and 1"):
        fa.flash_attn_varlen_func(packed_q, packed_q, packed_q, torch.tensor([0, 2, 6]), torch.tensor([0, 6]))
    with pytest.raises(InputError, match="do not fit a cache of 10"):
        fa.flash_attn_with_kvcache(q, cache, cache, q, q, cache_seqlens=8)
    with pytest.raises(InputError, match=r"must lie in 0\.\.10"):
        fa.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=11)
    with pytest.raises(InputError, match=r"block_table must lie in 0\.\.1"):
        fa.flash_attn_with_kvcache(q, cache, cache, block_table=torch.tensor([[0], [2]]))
    with pytest.raises(InputError, match="come together"):
        fa.flash_attn_with_kvcache(q, cache, cache, rotary_cos=torch.ones(20, 2), rotary_sin=torch.ones(20, 2))
    with pytest.raises(UnsupportedError, match="cache_leftpad do not go with it"):
        table = torch.tensor([[0], [1]])
        fa.flash_attn_with_kvcache(q, cache, cache, block_table=table, cache_leftpad=torch.tensor([0, 1]))
