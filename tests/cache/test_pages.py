"""Pages read where they lie: the bits of the same rows put together, whatever the layout of the pool and the table."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_attn import ALiBi, InputError, InputTypeError, attention
from efficient_attn.backends.cpu import attention as cpu
from efficient_attn.cache import cached_attention, paged_attention, reading
from efficient_attn.compat import flash_attn as fa

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def draw(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pool(seed: int, dice: random.Random, count: int, page: int, H: int, D: int, dtype: torch.dtype) -> Tensor:
    """(count, page, H, D), a page's rows or its heads outermost, whole or a part of a wider one."""
    if dice.random() < 0.5:
        return draw(seed, count, H, page, D, dtype=dtype).transpose(1, 2)
    return draw(seed, count, page, H + 1, D, dtype=dtype)[:, :, :H]


@pytest.fixture
def _no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def put_together(*_: Any) -> Tensor:
        raise AssertionError("pages were put together")

    monkeypatch.setattr(reading, "read_pages", put_together)


@pytest.mark.usefixtures("_no_copy")
@pytest.mark.parametrize("Nq", [1, 3, 16, 17, 150])
@pytest.mark.parametrize("page", [1, 16, 24, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_rows(dtype: torch.dtype, page: int, Nq: int) -> None:
    """Decode and prefill, with all that a call may have; pages stand in several rows of the table, others hold NaN."""
    for seed in range(3):
        dice = random.Random(f"{dtype} {page} {Nq} {seed}")
        B, Hkv, group = dice.choice([1, 3]), dice.choice([1, 2]), dice.choice([1, 2, 8, 12])
        D, Dv = dice.choice([(64, 64), (20, 33), (8, 128), (80, 80)])
        most = dice.choice([200, 420, 1100])
        lengths = [most] * B if dice.random() < 0.5 else [dice.randint(Nq, most) for _ in range(B)]
        needed = [-(-n // page) for n in lengths]
        count = max(needed) + sum(needed) + 2
        order = torch.randperm(count - 2, generator=torch.Generator().manual_seed(seed)) + 1  # 0 and the last: nobody's
        if dice.random() < 0.3:
            order = order.sort().values  # neighbours, which lie one behind another
        table, taken = torch.full((B, max(needed) + 1), dice.choice([-1, 10**6, 0]), dtype=torch.int32), 0
        for b, n in enumerate(needed):
            table[b, :n] = order[taken : taken + n]
            taken += n
            shared = min(needed[0], n) // 2  # a common beginning
            table[b, :shared] = table[0, :shared]
        keys, values = (pool(seed + s, dice, count, page, Hkv, width, dtype) for s, width in ((1, D), (2, Dv)))
        rows = [torch.zeros(B, Hkv, most, width, dtype=dtype) for width in (D, Dv)]
        used = torch.zeros(count, page, dtype=torch.bool)
        for b, n in enumerate(lengths):
            i = torch.arange(n)
            at = table[b].long()[i // page], i % page
            used[at] = True
            for whole, pages in zip(rows, (keys, values), strict=True):
                whole[b, :, :n] = pages[at].transpose(0, 1)
        keys[~used], values[~used] = torch.nan, torch.nan
        named: dict[str, Any] = {"is_causal": dice.random() < 0.5, "scale": dice.choice([None, 0.3])}
        named["window"] = dice.choice([(-1, -1), (-1, -1), (40, -1), (7, 3)])
        named["softcap"] = dice.choice([None, 2.0])
        named["sinks"] = dice.choice([None, draw(9, Hkv * group, dtype=torch.float32).to(dtype)])
        named["bias"] = dice.choice([None, ALiBi(ALiBi.usual_slopes(Hkv * group))])
        named["counts"] = dice.choice([None, [dice.randint(0, Nq) for _ in range(B)]])
        query = draw(seed, B, Hkv * group, Nq, D, dtype=dtype)
        found = paged_attention(query, keys, values, table, lengths, return_lse=True, backend="cpu", **named)
        right = cached_attention(query, *rows, lengths, return_lse=True, backend="cpu", **named)
        for ours, theirs in zip(found, right, strict=True):
            assert torch.equal(ours, theirs) and not ours.isnan().any()


@pytest.mark.usefixtures("_no_copy")
@pytest.mark.parametrize("named", [{}, {"softcap": 3.0}, {"alibi_slopes": torch.tensor([0.5, 0.1])}], ids=str)
def test_flash_attention_reads_them_too(named: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    q, pages = draw(0, 2, 5, 2, 16, dtype=torch.float32), [draw(s, 9, 16, 1, 16, dtype=torch.float32) for s in (1, 2)]
    table, lengths = torch.tensor([[3, 1, 8], [2, 6, 4]]).int(), torch.tensor([18, 40]).int()
    rows = [x[table.long()].flatten(1, 2) for x in pages]
    out = fa.flash_attn_with_kvcache(q, *pages, cache_seqlens=lengths, block_table=table, causal=True, **named)
    monkeypatch.setattr(cpu, "paged_forward", None)
    right = fa.flash_attn_with_kvcache(q, *rows, cache_seqlens=lengths, causal=True, **named)
    torch.testing.assert_close(out, right)


def test_whoever_cannot_read_them_in_place_copies() -> None:
    """Gradients, autocast, another backend, pages whose last dimension is not dense."""
    q, pages = draw(0, 1, 2, 3, 8, dtype=torch.float32), [draw(s, 4, 16, 2, 8, dtype=torch.float32) for s in (1, 2)]
    table, rows = torch.tensor([[2, 0]]).int(), [x[[2, 0]].flatten(0, 1)[None, :20].transpose(1, 2) for x in pages]
    right = cached_attention(q, *rows, [20])
    assert torch.equal(paged_attention(q, *pages, table, [20]), right)
    torch.testing.assert_close(paged_attention(q, *pages, table, [20], backend="reference"), right)
    turned = [x.mT.contiguous().mT for x in pages]
    assert torch.equal(paged_attention(q, *turned, table, [20]), right)
    leaves = [x.clone().requires_grad_() for x in (q, *pages)]
    paged_attention(*leaves, table, [20]).sum().backward()
    assert all(x.grad is not None and bool(x.grad.any()) for x in leaves)
    assert not leaves[1].grad[[1, 3]].any() and not leaves[1].grad[0, 4:].any()
    with torch.autocast("cpu", torch.bfloat16):
        half = paged_attention(q, *pages, table, [20])
        assert half.dtype == torch.bfloat16 and torch.equal(half, cached_attention(q, *rows, [20]))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: paged_attention(*x, [20]), backend="eager")
    torch.testing.assert_close(compiled(q, *pages, table), right)
    mapped = torch.func.vmap(lambda x: paged_attention(x[None], *pages, table, [20])[0])(torch.cat([q, q]))
    torch.testing.assert_close(mapped, torch.cat([right, right]))


def test_nothing_to_read() -> None:
    pages = draw(1, 3, 16, 2, 8, dtype=torch.float32)
    empty = torch.zeros(2, 0, dtype=torch.int32)
    out, lse = paged_attention(torch.ones(2, 4, 1, 8), pages, pages, empty, [0, 0], return_lse=True)
    assert not out.any() and bool((lse == -torch.inf).all())
    sinks = torch.ones(4)
    out, lse = paged_attention(torch.ones(2, 4, 1, 8), pages, pages, empty, [0, 0], sinks=sinks, return_lse=True)
    assert not out.any() and torch.equal(lse, sinks[None, :, None].expand(2, 4, 1))
    none = paged_attention(torch.ones(0, 4, 1, 8), pages, pages, empty[:0], [])
    assert none.shape == (0, 4, 1, 8)
    assert paged_attention(torch.ones(2, 4, 0, 8), pages, pages, empty.new_zeros(2, 1), [3, 4]).shape == (2, 4, 0, 8)


def test_a_bad_table_is_refused_before_the_kernel() -> None:
    """By name from Python, and once more where the kernel is called."""
    q, pages = torch.ones(2, 4, 1, 8), draw(1, 5, 16, 2, 8, dtype=torch.float32)
    good = torch.tensor([[0, 1], [2, 4]], dtype=torch.int32)
    for bad, lengths in ((5, [20, 20]), (-1, [20, 20]), (2**31 - 1, [20, 32])):
        table = good.clone()
        table[1, 1] = bad
        with pytest.raises(InputError, match=r"block_table must lie in 0\.\.4"):
            paged_attention(q, pages, pages, table, lengths)
        paged_attention(q, pages, pages, table, [20, 16])  # nobody looks there
        native = cpu.Pages(table, 20)
        with pytest.raises(ValueError, match="a table names page"):
            pools = pages.transpose(1, 2), pages.transpose(1, 2)
            cpu.paged_forward(q, *pools, native, reading.BlockMask(1, 20).arrays(), 1.0)
    with pytest.raises(InputTypeError, match="int32 or int64"):
        paged_attention(q, pages, pages, good.to(torch.int16), [20, 20])
    with pytest.raises(InputError, match="2 integers from 0 to 32"):
        paged_attention(q, pages, pages, good, [20, 33])
    with pytest.raises(InputError, match="of different rows"):
        paged_attention(q, pages, pages[:4], good, [20, 20])
    with pytest.raises(InputTypeError, match="share one dtype"):
        paged_attention(q, pages, pages.double(), good, [20, 20])


def test_a_long_table_is_int64_too() -> None:
    q, pages = draw(0, 1, 2, 1, 16, dtype=torch.float32), draw(1, 300, 16, 1, 16, dtype=torch.float32)
    table = torch.randperm(300, generator=torch.Generator().manual_seed(0))[None]
    rows = pages[table[0]].flatten(0, 1).transpose(0, 1)[None]
    found = paged_attention(q, pages, pages, table, [4790], backend="cpu")
    assert torch.equal(found, attention(q, rows[:, :, :4790], rows[:, :, :4790], backend="cpu"))
