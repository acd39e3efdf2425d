"""Steps that are started at once: the same bits as a call that is checked anew, whatever changes between them."""

from __future__ import annotations

import copy
import pickle
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_attn import ALiBi, InputError, InputTypeError, KVCache, PagedKVCache, attention
from efficient_attn.backends.cpu import attention as cpu
from efficient_attn.cache import steps

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=cpu.MISSING)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def alone(q: Tensor, k: Tensor, v: Tensor, window: int | None, **named: Any) -> Tensor:
    """One sequence of k and v, of which q are the last, as `attention` says it."""
    n, N = q.shape[1], k.shape[1]
    i, j = torch.arange(N - n, N)[:, None], torch.arange(N)
    seen = (j <= i) & (j > i - (window or N))
    found: Tensor = attention(q[None], k[None], v[None], mask=seen, backend="reference", **named)[0]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["rows", "pages"])
def test_whatever_happens_between_steps(kind: str, dtype: torch.dtype) -> None:
    """Sequences of a random life each: chunks and tokens, of different counts, rewinds, forks, frees, modifiers."""
    for seed in range(4):
        dice = random.Random(f"{kind} {dtype} {seed}")
        Hkv, group, D, Dv = dice.choice([1, 2]), dice.choice([1, 4]), *dice.choice([(16, 16), (20, 12), (64, 32)])
        Hq, page, window = Hkv * group, dice.choice([1, 16, 24]), dice.choice([None, None, 7])
        pool = PagedKVCache(900, page, num_kv_heads=Hkv, head_dim=D, value_dim=Dv, dtype=dtype)
        B = dice.choice([1, 3, 11])
        rows = KVCache(dice.choice([0, 8]), window=window)
        names = [pool.add() for _ in range(B)]
        held: list[tuple[Tensor, Tensor]] = [(draw(0, Hkv, 0, D, dtype=dtype), draw(0, Hkv, 0, Dv, dtype=dtype))] * B
        for turn in range(8):
            n = dice.choice([1, 1, 1, 2, 5])
            q, k, v = (
                draw(100 * turn + s, B, h, n, d, dtype=dtype) for s, (h, d) in enumerate([(Hq, D), (Hkv, D), (Hkv, Dv)])
            )
            counts = dice.choice([None, None, [dice.randint(0, n) for _ in range(B)]])
            named: dict[str, Any] = {"softcap": dice.choice([None, 3.0]), "scale": dice.choice([None, 0.25])}
            named["sinks"] = dice.choice([None, draw(7, Hq), draw(7, Hq, dtype=dtype)])
            named["bias"] = dice.choice([None, None, ALiBi(ALiBi.usual_slopes(Hq))])
            if kind == "rows":
                out = rows.attend(q, k, v, counts=counts, **named)
            else:
                seen = (-1 if window is None else window - 1, -1)
                out = pool.attend(names, q, k, v, counts=counts, window=seen, **named)
            bias = named.pop("bias")
            bias = None if bias is None else ALiBi(bias.slopes, alignment="bottom_right")
            for b, count in enumerate([n] * B if counts is None else counts):
                held[b] = torch.cat([held[b][0], k[b, :, :count]], 1), torch.cat([held[b][1], v[b, :, :count]], 1)
                right = alone(q[b, :, :count], *held[b], window, bias=bias, **named)
                tolerance = 2e-5 if dtype == torch.float32 else 2e-2
                torch.testing.assert_close(out[b, :, :count], right, rtol=tolerance, atol=tolerance)
                assert not out[b, :, count:].any()
            event = dice.choice(["", "", "rewind", "reorder"])
            if event == "rewind" and window is None:
                keep = [dice.randint(0, x[0].shape[1]) for x in held]
                if kind == "rows":
                    rows.rewind(keep)
                for name, length in zip(names, keep, strict=True):
                    if kind == "pages":
                        pool.rewind(name, length)
                held = [(x[:, :m], y[:, :m]) for (x, y), m in zip(held, keep, strict=True)]
            elif event == "reorder":
                order = [dice.randrange(B) for _ in range(B)]
                held = [held[b] for b in order]
                if kind == "rows":
                    rows.reorder(torch.tensor(order))
                else:
                    before, names = names, [pool.fork(names[b]) for b in order]
                    for name in before:
                        pool.free(name)


def test_a_step_is_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token nothing is prepared again, in rows or on pages."""
    rows, pool = KVCache(64, growing=False), PagedKVCache(64, 16, num_kv_heads=2, head_dim=8)
    names = [pool.add(), pool.add()]
    prompt = [draw(s, 2, 2, 5, 8) for s in range(3)]
    rows.attend(*prompt), pool.attend(names, *prompt)
    token = [draw(s, 2, 2, 1, 8) for s in range(3)]
    outs = [(rows.attend(*token), pool.attend(names, *token))]
    monkeypatch.setattr(steps, "settled", None)
    outs += [(rows.attend(*token), pool.attend(names, *token)) for _ in range(40)]
    assert all(torch.equal(*pair) for pair in outs)
    assert not any(torch.equal(x[0], y[0]) for x, y in pairwise(outs))


def test_what_does_not_fit_is_refused_by_name() -> None:
    pool = PagedKVCache(4, 16, num_kv_heads=2, head_dim=8)
    name = pool.add()
    pool.append([name], *(draw(s, 1, 2, 5, 8) for s in range(2)))
    rows = KVCache()
    rows.append(*(draw(s, 1, 2, 5, 8) for s in range(2)))
    for attend in (lambda q: pool.attend([name], q), rows.attend):
        with pytest.raises(InputError, match="multiple of the key/value heads"):
            attend(torch.ones(1, 3, 1, 8))
        with pytest.raises(InputTypeError, match="share one dtype"):
            attend(torch.ones(1, 2, 1, 8, dtype=torch.float64))
        with pytest.raises(InputError, match="expected query"):
            attend(torch.ones(1, 2, 1, 9))
        with pytest.raises(InputError, match="4 dimensions"):
            attend(torch.ones(2, 1, 8)[None, None])
        assert attend(torch.ones(1, 2, 1, 8)).isfinite().all()
    with pytest.raises(InputError, match="there is no sequence 7"):
        pool.attend([7], torch.ones(1, 2, 1, 8))
    with pytest.raises(InputError, match="free a sequence"):
        pool.append([name], *(draw(s, 1, 2, 60, 8) for s in range(2)))
    with pytest.raises(ValueError, match="a table names page"):
        words = cpu.cached_of_pointers(*[torch.ones(1, 2, 1, 8)] * 4, steps.MaskArrays(), 1.0, 0.0, True)
        x, bad = torch.ones(1, 2, 1, 8), torch.tensor([[3]], dtype=torch.int32)
        words(*[x.data_ptr()] * 4, 0, 0, bad.data_ptr(), 1, 0, 1, 1)


def test_gradients_autocast_and_transforms_are_no_steps() -> None:
    rows = KVCache()
    rows.append(*(draw(s, 1, 2, 5, 8) for s in range(2)))
    q = draw(3, 1, 2, 1, 8)
    right = rows.attend(q)
    leaf = q.clone().requires_grad_()
    rows.attend(leaf).sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.any())
    with torch.autocast("cpu", torch.bfloat16):
        assert rows.attend(q).dtype == torch.bfloat16
    mapped = torch.func.vmap(lambda x: rows.attend(x[None])[0])(torch.cat([q, q]))
    torch.testing.assert_close(mapped, torch.cat([right, right]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_of_a_paged_cache_goes_on_by_itself(copied) -> None:
    torch.manual_seed(0)

    def new(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(2, 2, count, 16), torch.randn(2, 2, count, 16)

    cache = PagedKVCache(64, 16, num_kv_heads=2, head_dim=16)
    sequences = [cache.add(), cache.add()]
    (key, value), more, query = new(40), new(60), torch.randn(2, 4, 1, 16)
    cache.append(sequences, key, value)
    other = copied(cache)
    other.append(sequences, *more)
    keys, values = (torch.cat(pair, 2) for pair in zip((key, value), more, strict=True))
    wanted = attention(query, keys, values)
    torch.testing.assert_close(other.attend(sequences, query), wanted)
    torch.testing.assert_close(cache.attend(sequences, query), attention(query, key, value))
    assert other.key_pages.data_ptr() == other._pools[0].data_ptr()
