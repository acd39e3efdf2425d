"""Caches against attention of the whole sequence: whatever chunks it comes in, each token's output is the same."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from efficient_attn import InputError, InputTypeError, KVCache, PagedKVCache, UnsupportedError, attention
from efficient_attn.cache import cached_attention, paged_attention
from efficient_attn.cache.rotary import turned
from efficient_attn.masks import BlockMask

KINDS = ["growing", "static", "window", "pages of 16", "pages of 24"]
WINDOW = 5


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(kind: str, B: int, Hkv: int, D: int, Dv: int, dtype: torch.dtype, device: torch.device, **options):
    """A function (query, key, value, counts) -> out, and the cache behind it."""
    if kind.startswith("pages"):
        page = int(kind.split()[-1])
        pages = B * -(-130 // page)
        cache = PagedKVCache(
            pages, page, num_kv_heads=Hkv, head_dim=D, value_dim=Dv, dtype=dtype, device=device, **options
        )
        names = [cache.add() for _ in range(B)]
        return (lambda *tensors, **named: cache.attend(names, *tensors, **named)), cache
    arguments = {"growing": {}, "static": {"capacity": 130, "growing": False}, "window": {"window": WINDOW}}[kind]
    cache = KVCache(**arguments, **options)
    return cache.attend, cache


def whole(q: Tensor, k: Tensor, v: Tensor, kind: str) -> Tensor:
    """Attention of whole sequences in float64."""
    window = (WINDOW - 1, 0) if kind == "window" else (-1, 0)
    q, k, v = (x.double() for x in (q, k, v))
    return attention(q, k, v, mask=BlockMask(q.shape[2], k.shape[2], window=window), backend="reference")


@pytest.mark.parametrize("chunks", [[1] * 9, [12, 1, 1, 5, 1], [40, 1, 20, 1, 1, 60]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_give_what_the_whole_gives(
    dtype: torch.dtype, kind: str, chunks: list[int], backend: str, device: torch.device
) -> None:
    if backend == "cuda" and dtype == torch.float32:
        pytest.skip("tensor cores multiply halves")
    B, Hq, Hkv, D, Dv, N = 2, 4, 2, 16, 8, sum(chunks)
    q, k, v = (draw(s, B, h, N, d, dtype=dtype) for s, (h, d) in enumerate([(Hq, D), (Hkv, D), (Hkv, Dv)]))
    attend, cache = make(kind, B, Hkv, D, Dv, dtype, device)
    outs, lses, first = [], [], 0
    for n in chunks:
        given = (x[:, :, first : first + n].to(device) for x in (q, k, v))
        out, lse = attend(*given, return_lse=True, backend=backend)
        outs.append(out.cpu())
        lses.append(lse.cpu())
        first += n
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(torch.cat(outs, 2).double(), whole(q, k, v, kind), rtol=tolerance, atol=tolerance)
    assert torch.cat(lses, 2).shape == (B, Hq, N) and torch.cat(lses, 2).isfinite().all()
    if isinstance(cache, KVCache):
        assert cache.lengths == [N] * B
        if kind == "window":
            assert cache.nbytes == 2 * WINDOW * B * Hkv * (D + Dv) * q.element_size()


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_softcap_and_sinks(kind: str, counted: bool) -> None:
    """Prefill and decode of sequences that are equally long, or not."""
    N, named = 30, {"softcap": 1.5, "sinks": draw(9, 4)}
    q, k, v = (draw(s, 2, h, N, 8) for s, h in enumerate((4, 2, 2)))
    attend, _ = make(kind, 2, 2, 8, 8, torch.float64, torch.device("cpu"))
    mask = BlockMask(N, N, window=(WINDOW - 1, 0) if kind == "window" else (-1, 0))
    expected = attention(q, k, v, mask=mask, return_lse=True, backend="reference", **named)
    done = [0, 0]
    for n in (20, 1, 3, 1, 1):
        counts = [n, n - 1] if counted and n > 1 else [n, n]
        rows = [torch.arange(x, x + n) for x in done]
        chunk = [torch.stack([x[b, :, r] for b, r in enumerate(rows)]) for x in (q, k, v)]
        out, lse = attend(*chunk, counts=counts, return_lse=True, **named)
        for b, count in enumerate(counts):
            for found, right in zip((out, lse), expected, strict=True):
                torch.testing.assert_close(found[b, :, :count], right[b, :, rows[b][:count]])
            done[b] += count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_sequences_of_different_lengths(kind: str, seed: int, backend: str, device: torch.device) -> None:
    """Each sequence comes out as alone, with counts, rotary positions while writing, rewinding and grouped heads."""
    dice = random.Random(seed)
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    tolerance = 4e-2 if backend == "cuda" else 3e-5
    B, Hq, Hkv, D, N = dice.choice([1, 3]), 4, dice.choice([1, 2, 4]), 16, 60
    q, k, v = (draw(seed + s, B, h, N, D, dtype=dtype) for s, h in enumerate((Hq, Hkv, Hkv)))
    rotary, options = None, {}
    if dice.random() < 0.5:
        angles = torch.arange(N)[:, None] * torch.tensor([1.0, 0.1, 0.01])
        rotary = angles.cos(), angles.sin()
        options = {"rotary": tuple(x.to(device) for x in rotary), "interleaved": dice.random() < 0.5}
    attend, cache = make(kind, B, Hkv, D, D, dtype, device, **options)
    done = [0] * B
    found = torch.zeros(B, Hq, N, D)
    for turn in range(6):
        n = dice.choice([1, 1, 7])
        counts = [dice.randint(0, n) for _ in range(B)]
        if turn == 3:
            counts = [n] * B
        if turn == 4 and kind != "window":  # some tokens are taken back, and come again
            done = [dice.randint(max(0, x - 3), x) for x in done]
            for b, length in enumerate(done):
                if isinstance(cache, PagedKVCache):
                    cache.rewind(b, length)
            if isinstance(cache, KVCache):
                cache.rewind(done)
        rows = [torch.arange(x, x + n).clamp(max=N - 1) for x in done]
        chunk = [torch.stack([x[b, :, r] for b, r in enumerate(rows)]).to(device) for x in (q, k, v)]
        out = attend(*chunk, counts=counts, backend=backend).cpu().float()
        for b, count in enumerate(counts):
            found[b, :, done[b] : done[b] + count] = out[b, :, :count]
            assert not out[b, :, count:].any()
            done[b] += count
    for b, length in enumerate(done):
        one = [x[b : b + 1, :, :length] for x in (q, k, v)]
        if rotary is not None:
            one[:2] = (turned(x, [0], [length], *rotary, interleaved=options["interleaved"]) for x in one[:2])
        if length:
            expected = whole(*one, kind)[0]
            torch.testing.assert_close(found[b, :, :length].double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["growing", "static", "window"])
def test_beams_change_places(kind: str) -> None:
    """After reorder, sequence b goes on as the one that it was chosen from; their number may change."""
    q, k, v = (draw(s, 3, h, 20, 8) for s, h in enumerate((4, 2, 2)))
    attend, cache = make(kind, 3, 2, 8, 8, torch.float64, torch.device("cpu"))
    attend(*(x[:, :, :15] for x in (q, k, v)))
    rows = torch.tensor([2, 2, 0, 1])
    cache.reorder(rows)
    out = attend(*(x[rows, :, 15:] for x in (q, k, v)))
    torch.testing.assert_close(out, whole(q, k, v, kind)[rows, :, 15:])


def test_a_prefix_is_shared_by_pages() -> None:
    """Forks take no pages until they write, then one for the page that they go on with; the first stays as it was."""
    q, k, v = (draw(s, 3, h, 50, 8) for s, h in enumerate((4, 2, 2)))
    q, k, v = (torch.cat([x[:1, :, :40].expand(3, -1, -1, -1), x[:, :, 40:]], 2) for x in (q, k, v))
    cache = PagedKVCache(8, 16, num_kv_heads=2, head_dim=8, dtype=torch.float64)
    first = cache.add()
    cache.append([first], k[:1, :, :40], v[:1, :, :40])
    names = [first, cache.fork(first), cache.fork(first)]
    assert cache.free_pages == 5 and len(cache.block_table(names).unique()) == 3
    out = cache.attend(names, *(x[:, :, 40:] for x in (q, k, v)))
    torch.testing.assert_close(out, whole(q, k, v, "")[:, :, 40:])
    assert cache.free_pages == 0 and len(cache.block_table(names)[:, :2].unique()) == 2
    short = cache.fork(first, 20)
    out = cache.attend([short], q[:1, :, 19:20])  # no token is written
    torch.testing.assert_close(out, whole(q, k, v, "")[:1, :, 19:20])
    with pytest.raises(InputError, match="1 more pages of 16 tokens are needed, and 0 are free"):
        cache.append([short], k[:1, :, 20:21], v[:1, :, 20:21])
    assert cache.lengths([short]) == [20]
    for name in names:
        cache.free(name)
    assert cache.free_pages == 6
    cache.append([short], k[:1, :, 20:21], v[:1, :, 20:21])
    cache.free(short)
    assert cache.free_pages == 8


def test_one_sequence_serves_a_batch_and_layers_share_keys() -> None:
    q, k, v = draw(0, 3, 4, 9, 8), draw(1, 1, 2, 9, 8), draw(2, 1, 2, 9, 8)
    cache = KVCache()
    cache.append(k, v)
    expected = attention(q, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), is_causal=True)
    torch.testing.assert_close(cache.attend(q), expected)
    torch.testing.assert_close(cache.attend(q[:, :, -1:]), expected[:, :, -1:])


def test_what_lies_beyond_a_length_may_be_anything(backend: str, device: torch.device) -> None:
    """NaN in rows and pages that no sequence has, and entries of a table behind the last page, change nothing."""
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    q = draw(0, 2, 4, 1, 16, dtype=dtype)
    pages = [draw(s, 7, 16, 2, 16, dtype=dtype) for s in (1, 2)]
    table, lengths = torch.tensor([[3, 1, -5], [2, 6, 4]], dtype=torch.int32), [18, 40]
    right = paged_attention(q.to(device), *(x.to(device) for x in pages), table.to(device), lengths, backend=backend)
    for x in pages:
        x[[0, 5]] = torch.nan
        x[1, 2:] = torch.nan
        x[4, 8:] = torch.nan
    found = paged_attention(q.to(device), *(x.to(device) for x in pages), table.to(device), lengths, backend=backend)
    assert torch.equal(found, right)


@pytest.mark.parametrize("window", [(-1, -1), (7, -1), (7, 2), (0, 0)])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("Nq", [1, 3, 30])
def test_windows_at_the_end_of_sequences(
    Nq: int, is_causal: bool, window: tuple[int, int], backend: str, device: torch.device
) -> None:
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    tolerance = 3e-2 if backend == "cuda" else 3e-5
    lengths = [0, 1, 44, 64]
    q, k, v = draw(0, 4, 4, Nq, 16, dtype=dtype), draw(1, 4, 2, 64, 16, dtype=dtype), draw(2, 4, 2, 64, 16, dtype=dtype)
    out = cached_attention(
        *(x.to(device) for x in (q, k, v)), lengths, is_causal=is_causal, window=window, backend=backend
    ).cpu()
    for b, n in enumerate(lengths):
        mask = BlockMask(Nq, n, window=(window[0], 0 if is_causal else window[1]), window_offset=n - Nq)
        one = (x[b : b + 1].double() for x in (q, k[:, :, :n], v[:, :, :n]))
        expected = attention(*one, mask=mask, backend="reference")[0]
        torch.testing.assert_close(out[b].double(), expected, rtol=tolerance, atol=tolerance)


def test_compiled() -> None:
    torch._dynamo.reset()
    q, k, v = (draw(s, 2, h, 12, 8, dtype=torch.float32) for s, h in enumerate((4, 2, 2)))
    cache, other = KVCache(capacity=16), KVCache(capacity=16)
    step = torch.compile(lambda *x: cache.attend(*x), backend="eager")
    for a, b in [(0, 6), (6, 7), (7, 8), (8, 9), (9, 12)]:
        chunk = [x[:, :, a:b] for x in (q, k, v)]
        torch.testing.assert_close(step(*chunk), other.attend(*chunk))


def test_wrong_input_is_named() -> None:
    q, k = draw(0, 2, 4, 3, 8), draw(1, 2, 2, 3, 8)
    with pytest.raises(InputError, match="growing=False"):
        KVCache(growing=False)
    with pytest.raises(InputError, match="empty"):
        KVCache().attend(q)
    with pytest.raises(InputError, match="both or none"):
        KVCache().attend(q, k)
    cache = KVCache(4, growing=False)
    cache.append(k, k)
    with pytest.raises(InputError, match="do not fit a cache of 4"):
        cache.append(k, k)
    with pytest.raises(InputError, match="the cache holds a key"):
        cache.append(k[:1], k[:1])
    with pytest.raises(InputError, match="of which the cache holds"):
        cache.attend(torch.cat([q, q], 2))
    with pytest.raises(InputError, match="integers from 0 to 3"):
        cache.rewind([4, 1])
    with pytest.raises(UnsupportedError, match="for generation"):
        KVCache().append(k.clone().requires_grad_(), k)
    window = KVCache(window=2)
    for _ in range(4):
        window.append(k, k)
    with pytest.raises(InputError, match="are not there"):
        window.rewind(2)
    with pytest.raises(InputError, match="one row or more"):
        PagedKVCache(4, 0, num_kv_heads=2, head_dim=8)
    pages = draw(2, 5, 16, 2, 8)
    table = torch.tensor([[0, 1], [2, 5]], dtype=torch.int32)
    with pytest.raises(InputError, match=r"must lie in 0\.\.4"):
        paged_attention(q, pages, pages, table, [20, 20])
    with pytest.raises(InputError, match=r"must lie in 0\.\.4"):
        paged_attention(q, pages, pages, -table, [20, 20])
    with pytest.raises(InputError, match="2 integers from 0 to 32"):
        paged_attention(q, pages, pages, table % 5, [20, 33])
    with pytest.raises(InputTypeError, match="int32 or int64"):
        paged_attention(q, pages, pages, table.float(), [20, 20])
    with pytest.raises(InputError, match="with B = 2"):
        paged_attention(q, pages, pages, table[:1], [20, 20])
    with pytest.raises(InputError, match="one row or more"):
        paged_attention(q, pages[:, :0], pages[:, :0], table % 5, [0, 0])
    paged = PagedKVCache(4, 16, num_kv_heads=2, head_dim=8, dtype=torch.float64)
    a = paged.add()
    with pytest.raises(InputError, match="different sequences"):
        paged.append([a, a], k, k)
    with pytest.raises(InputError, match="there is no sequence 7"):
        paged.append([a, 7], k, k)
