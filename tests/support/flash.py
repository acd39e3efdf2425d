"""Calls as users of FlashAttention make them, drawn at random, and what they mean: one sequence, pair by pair.

Dense and packed tensors, caches in rows and on pages, windows, GQA, soft caps, ALiBi, sinks, rotary positions, dropout.
`definition` is plain PyTorch on one sequence; in float64 it is what a call should give, in the call's own dtype what
eager attention would.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from efficient_attn import ALiBi, KVCache, PagedKVCache, attention
from efficient_attn.backends.reference.attention import dropout_keep
from efficient_attn.compat import flash_attn as fa
from efficient_attn.inputs import resolve_seed
from efficient_attn.masks import BlockMask

LENGTHS = (0, 1, 2, 5, 16, 31, 64, 65, 100, 129, 200)
WIDTHS = (8, 8, 16, 33, 64, 100, 192)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def packed(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def definition(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, softmax_scale: float | None = None,
    sinks: Tensor | None = None, keep: Tensor | None = None, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Out (Nq, H, Dv) and lse (H, Nq) of one sequence: q (Nq, H, D), k and v (Nk, Hkv, .), slopes and sinks (H).

    keep: bool (H, Nq, Nk), the pairs that dropout leaves.
    """
    (Nq, H, D), (Nk, Hkv, _) = q.shape, k.shape
    k, v = (x.repeat_interleave(H // Hkv, 1) for x in (k, v))
    s = torch.einsum("ihd,jhd->hij", q, k) * (D**-0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    i, j = torch.arange(Nq)[:, None] + Nk - Nq, torch.arange(Nk)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype)[:, None, None] * (i - j).abs()
    left, right = window_size
    right = 0 if causal else right
    seen = torch.ones(Nq, Nk, dtype=torch.bool)
    seen = seen if left < 0 else seen & (j >= i - left)
    seen = seen if right < 0 else seen & (j <= i + right)
    s = s.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(H, Nq, 1)], -1)
    lse = torch.logsumexp(s, -1) if s.shape[-1] else torch.full((H, Nq), -torch.inf, dtype=s.dtype)
    weights = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])[..., :Nk]
    if keep is not None:
        weights = weights.masked_fill(~keep, 0.0) / (1.0 - dropout_p)
    return torch.einsum("hij,jhd->ihd", weights, v), lse


def rotated(x: Tensor, at: int, cos: Tensor, sin: Tensor, interleaved: bool, still: bool = False) -> Tensor:
    """x (N, H, D), feature by feature: row n stands at `at + n`, or all at `at`."""
    out, half = x.clone(), cos.shape[1]
    places = torch.full((x.shape[0],), at) if still else torch.arange(at, at + x.shape[0])
    for f in range(half):
        a, b = (2 * f, 2 * f + 1) if interleaved else (f, f + half)
        c, s = cos[places, f][:, None], sin[places, f][:, None]
        out[:, :, a] = x[:, :, a] * c - x[:, :, b] * s
        out[:, :, b] = x[:, :, a] * s + x[:, :, b] * c
    return out


def options(dice: random.Random, H: int, B: int, seed: int) -> dict[str, Any]:
    """Arguments that change what is computed, each now and then."""
    found: dict[str, Any] = {"causal": dice.random() < 0.4}
    if dice.random() < 0.5:
        found["window_size"] = (dice.choice([-1, 0, 3, 40]), dice.choice([-1, 0, 2, 40]))
    if dice.random() < 0.25:
        found["softcap"] = dice.choice([0.5, 3.0])
    if dice.random() < 0.3:
        found["alibi_slopes"] = draw(seed, *dice.choice([(H,), (B, H)])).abs()
    if dice.random() < 0.3:
        found["softmax_scale"] = 0.3
    return found


def of_sequence(named: dict[str, Any], b: int) -> dict[str, Any]:
    slopes = named.get("alibi_slopes")
    return named | ({"alibi_slopes": slopes[b]} if slopes is not None and slopes.dim() == 2 else {})


# --- random calls ---


class Draw:
    """What all kinds of calls have in common, from a seed alone."""

    def __init__(self, seed: int) -> None:
        self.seed, self.dice = seed, random.Random(seed)
        choice = self.dice.choice
        self.dtype = choice([torch.float64] * 4 + [torch.float32] * 2 + [torch.bfloat16, torch.float16])
        self.Hkv = choice([1, 1, 2, 3])
        self.H = self.Hkv * choice([1, 1, 2, 4])
        self.B, self.D = choice([1, 2, 3]), choice(WIDTHS)
        self.named = options(self.dice, self.H, self.B, seed)
        if "alibi_slopes" in self.named:  # flash-attn's are float32
            self.named["alibi_slopes"] = self.named["alibi_slopes"].float()

    def tensors(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        return [draw(self.seed + 10 * n, *shape, dtype=self.dtype) for n, shape in enumerate(shapes)]

    def __str__(self) -> str:
        called = {k: v for k, v in self.named.items() if not isinstance(v, Tensor)}
        said = {k: tuple(v.shape) for k, v in self.named.items() if isinstance(v, Tensor)}
        return f"seed {self.seed}: {self.dtype} B={self.B} H={self.H}/{self.Hkv} D={self.D} {called} {said}"

    def close(
        self, name: str, found: Tensor, gold: Tensor, eager: Tensor, slack: float = 1e-11, size: float = 1.0
    ) -> None:
        """FlashAttention's own rule: at most twice the error of eager attention in the same dtype, and four roundings.

        In float64 `slack` of the largest value is all: 1e-5 where a call has tables of float32. `size`: of the terms
        that were added up, where what is left of them may be small.
        """
        assert found.shape == gold.shape, f"{self}: {name} is {tuple(found.shape)}, not {tuple(gold.shape)}"
        if not gold.numel():
            return
        hidden = gold == -torch.inf
        assert torch.equal(found == -torch.inf, hidden), f"{self}: {name} is -inf elsewhere"
        found, gold, eager = (x.detach().double().masked_fill(hidden, 0.0) for x in (found, gold, eager))
        size = max(float(gold.abs().max()), size)
        allowed = slack * size
        if self.dtype != torch.float64:
            allowed = 2.0 * float((eager - gold).abs().max()) + 4.0 * torch.finfo(self.dtype).eps * size
        worst = float((found - gold).abs().max())
        assert worst <= allowed, f"{self}: {name} is off by {worst:.3g}, {allowed:.3g} allowed, largest {size:.3g}"


def exact_and_eager(parts: list[tuple[list[Tensor], dict[str, Any]]]) -> tuple[list[Any], list[Any]]:
    """The definition of each sequence in float64 and in its own dtype: (out, lse) of each."""
    gold = [definition(*(x.double() for x in tensors), **named) for tensors, named in parts]
    return gold, [definition(*tensors, **named) for tensors, named in parts]


def check_trained(
    case: Draw, found: list[Tensor], leaves: list[Tensor], expected: list[Any], inputs: list[Tensor]
) -> None:
    """out, lse and gradients; `expected` has gold and eager (out, lse) of `inputs`, alike in place."""
    (gold, gold_lse), (eager, eager_lse) = expected
    case.close("out", found[0], gold, eager)
    case.close("lse", found[1], gold_lse, eager_lse)
    grad = draw(case.seed + 99, *gold.shape, dtype=case.dtype)
    ours = torch.autograd.grad(found[0], leaves, grad)
    exact = torch.autograd.grad(gold, inputs, grad.double(), allow_unused=True, retain_graph=True)
    plain = torch.autograd.grad(eager, inputs, grad, allow_unused=True)
    sizes = sizes_of_terms(inputs, grad, gold_lse, case.named.get("softmax_scale"))
    for name, a, b, c, size in zip(("dq", "dk", "dv"), ours, exact, plain, sizes, strict=True):
        b, c = (torch.zeros_like(a) if x is None else x.nan_to_num() for x in (b, c))
        case.close(name, a, b, c, size=size)


def sizes_of_terms(inputs: list[Tensor], grad: Tensor, lse: Tensor, scale: float | None) -> tuple[float, float, float]:
    """How large the terms of dq, dk and dv are: dS = P (dP - delta) is a difference, and P stands on a rounded lse."""
    if not all(x.numel() for x in (*inputs[:3], grad)):
        return (1.0, 1.0, 1.0)
    q, k, v = (x.detach().abs().double() for x in inputs[:3])
    lse_size = 1.0 + float(lse.detach().masked_fill(lse == -torch.inf, 0.0).abs().max())
    products = float(grad.double().norm(dim=-1).max() * v.norm(dim=-1).max()) * (scale or q.shape[-1] ** -0.5)
    return products * float(k.max()), products * float(q.max()), float(grad.abs().max()) * lse_size


def check_dense(case: Draw) -> str:
    Nq, Nk = case.dice.choice(LENGTHS[1:]), case.dice.choice(LENGTHS)
    Nk = Nq if case.dice.random() < 0.4 else Nk
    given = case.tensors((case.B, Nq, case.H, case.D), (case.B, Nk, case.Hkv, case.D), (case.B, Nk, case.Hkv, case.D))
    leaves, inputs = ([x.clone().requires_grad_() for x in given] for _ in range(2))
    dropout_p = case.dice.choice([0.0, 0.0, 0.2])
    torch.manual_seed(case.seed)
    out, lse, _ = fa.flash_attn_func(*leaves, dropout_p, **case.named, return_attn_probs=True)
    keep = None
    if dropout_p:
        torch.manual_seed(case.seed)
        keep = dropout_keep((case.B, case.H, Nq, Nk), dropout_p, resolve_seed(None), torch.device("cpu"))
    parts = [
        ([x[b] for x in inputs], of_sequence(case.named, b) | ({} if keep is None else {"keep": keep[b]}))
        for b in range(case.B)
    ]
    parts = [(tensors, named | {"dropout_p": dropout_p}) for tensors, named in parts]
    expected = [tuple(torch.stack(x) for x in zip(*some, strict=True)) for some in exact_and_eager(parts)]
    check_trained(case, [out, lse], leaves, expected, inputs)
    return "dense with dropout" if dropout_p else "dense"


def check_packed(case: Draw) -> str:
    B = case.dice.choice([1, 2, 5])
    q_lens = [case.dice.choice(LENGTHS) for _ in range(B)]
    k_lens = q_lens if case.dice.random() < 0.3 else [case.dice.choice(LENGTHS) for _ in range(B)]
    slopes = case.named.get("alibi_slopes")
    if slopes is not None and slopes.dim() == 2:
        case.named["alibi_slopes"] = draw(case.seed, B, case.H).abs().float()
    given = case.tensors(
        (sum(q_lens), case.H, case.D), (sum(k_lens), case.Hkv, case.D), (sum(k_lens), case.Hkv, case.D)
    )
    leaves, inputs = ([x.clone().requires_grad_() for x in given] for _ in range(2))
    cu_q, cu_k = packed(q_lens), packed(k_lens)
    dropped = slopes is None and "softcap" not in case.named and case.dice.random() < 0.3
    dropout_p = 0.2 if dropped else 0.0
    torch.manual_seed(case.seed)
    out, lse, _ = fa.flash_attn_varlen_func(
        *leaves, cu_q, cu_k, max(q_lens), max(k_lens), dropout_p, **case.named, return_attn_probs=True
    )
    keep = None
    if dropped:  # by a pair's rows in the pack
        torch.manual_seed(case.seed)
        shape = (1, case.H, sum(q_lens), sum(k_lens))
        keep = dropout_keep(shape, dropout_p, resolve_seed(None), torch.device("cpu"))[0]
    parts = []
    for b in range(B):
        rows, columns = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        named = of_sequence(case.named, b)
        named |= {} if keep is None else {"keep": keep[:, rows, columns], "dropout_p": dropout_p}
        parts.append(([inputs[0][rows], inputs[1][columns], inputs[2][columns]], named))
    expected = [
        (torch.cat([o for o, _ in some]), torch.cat([x for _, x in some], 1)) for some in exact_and_eager(parts)
    ]
    check_trained(case, [out, lse], leaves, expected, inputs)
    return "packed with dropout" if dropped else "packed"


def tables(case: Draw, positions: int) -> tuple[Tensor, Tensor, bool]:
    """cos and sin of rotary positions, and whether pairs are neighbours."""
    speeds = torch.tensor([1.0, 0.1, 0.01])[: case.dice.choice([2, 3])]
    angles = torch.arange(positions)[:, None] * speeds
    return angles.cos(), angles.sin(), case.dice.random() < 0.5


def check_with_kvcache(case: Draw) -> str:
    """flash_attn_with_kvcache: rows or pages, appended in place, turned by rotary positions."""
    dice, B = case.dice, case.B
    Nq, new = dice.choice([1, 1, 4, 17]), dice.choice([0, 1, 4])
    page, pages = dice.choice([(8, 9), (16, 6), (64, 3)])
    room = page * pages - new
    lengths = [dice.randint(1, room)] * B if dice.random() < 0.3 else [dice.randint(0, room) for _ in range(B)]
    on_pages, places = dice.random() < 0.5, {}
    rows = B * pages + 2 if on_pages else B + 2
    cache = (rows, page, case.Hkv, case.D) if on_pages else (rows, page * pages, case.Hkv, case.D)
    grown = (B, new, case.Hkv, case.D)
    q, k, v, k_cache, v_cache = case.tensors((B, Nq, case.H, case.D), grown, grown, cache, cache)
    if on_pages:
        table = torch.randperm(rows, generator=torch.Generator().manual_seed(case.seed))[: B * pages].view(B, pages)
        places["block_table"] = table.int()
        view = lambda x: x[table].flatten(1, 2)  # noqa: E731
    else:
        chosen = torch.tensor(dice.sample(range(B + 2), B))
        places["cache_batch_idx"] = chosen.int()
        if dice.random() < 0.3:
            places["cache_leftpad"] = torch.tensor([dice.randint(0, n) for n in lengths]).int()
        view = lambda x: x[chosen]  # noqa: E731
    turned: dict[str, Any] = {}
    if new and dice.random() < 0.5:
        cos, sin, interleaved = tables(case, page * pages + Nq)
        turned = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    before = [view(x).clone() for x in (k_cache, v_cache)]
    out, lse = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, *((k, v) if new else (None, None)), cache_seqlens=torch.tensor(lengths).int(), **places,
        **case.named, **turned, return_softmax_lse=True,
    )  # fmt: skip
    still = not case.named["causal"] and case.named.get("window_size", (-1, -1)) == (-1, -1)
    slack = 1e-5 if turned else 1e-11  # the tables are float32, and so is what they turn
    for b, n in enumerate(lengths):
        key, value, query = k[b], v[b], q[b]
        if turned:
            key = rotated(key, n, cos.to(key.dtype), sin.to(key.dtype), interleaved)
            query = rotated(query, n, cos.to(key.dtype), sin.to(key.dtype), interleaved, still)
        held = [torch.cat([old[b, :n], x, old[b, n + new :]]) for old, x in zip(before, (key, value), strict=True)]
        for name, cache_now, should in zip(("k_cache", "v_cache"), (k_cache, v_cache), held, strict=True):
            case.close(name, view(cache_now)[b], should, should, slack)
        begin = int(places["cache_leftpad"][b]) if "cache_leftpad" in places else 0
        # What stands in the cache now is what the queries saw.
        seen = [view(x)[b, begin : n + new] for x in (k_cache, v_cache)]
        (gold, eager) = (some[0] for some in exact_and_eager([([query, *seen], of_sequence(case.named, b))]))
        turning = float(query.abs().max()) * float(seen[0].abs().max()) if turned and query.numel() else 0.0
        if turned and case.dtype in (torch.bfloat16, torch.float16):  # a query is rounded once more here
            eager = tuple(x + torch.finfo(case.dtype).eps * turning for x in eager)
        case.close("out", out[b], gold[0], eager[0], slack)
        case.close("lse", lse[b], gold[1], eager[1], slack * max(turning, 1.0))
    return f"cache {'on pages' if on_pages else 'in rows'}{' with rotary' if turned else ''}"


def check_cache(case: Draw) -> str:
    """Our caches: chunks of different lengths, soft cap, sinks, window, rotary positions, a fork and a rewind."""
    dice, B, H = case.dice, case.B, case.H
    chunks = [dice.choice([1, 5, 33]), *[dice.choice([1, 1, 2, 7]) for _ in range(4)]]
    N, Dv = sum(chunks), dice.choice([case.D, 8])
    q, k, v = case.tensors((B, N, H, case.D), (B, N, case.Hkv, case.D), (B, N, case.Hkv, Dv))
    named: dict[str, Any] = {"softcap": dice.choice([None, None, 1.5])}
    named["sinks"] = draw(case.seed + 7, H, dtype=case.dtype) if dice.random() < 0.3 else None
    named["scale"] = dice.choice([None, 0.3])
    turned: dict[str, Any] = {}
    if dice.random() < 0.5 and case.D >= 6:
        cos, sin, interleaved = tables(case, N)
        turned = {"rotary": (cos, sin), "interleaved": interleaved}
    window, kind = None, dice.choice(["growing", "static", "window", "pages"])
    if kind == "pages":
        page = dice.choice([16, 24])
        sizes = {"num_kv_heads": case.Hkv, "head_dim": case.D, "value_dim": Dv, "dtype": case.dtype}
        pool = PagedKVCache(8 * B * -(-N // page), page, **sizes, **turned)
        names = [pool.add() for _ in range(B)]
        attend = lambda *given, **more: pool.attend(names, *given, **more)  # noqa: E731
    else:
        window = dice.choice([1, 5, 40]) if kind == "window" else None
        sizes = {"growing": {}, "static": {"capacity": N, "growing": False}, "window": {"window": window}}[kind]
        cache = KVCache(**sizes, **turned)
        attend = cache.attend
    done, found = [0] * B, [([], []) for _ in range(B)]
    for n in chunks:
        counts = [n if n == 1 or dice.random() < 0.5 else dice.randint(1, n) for _ in range(B)]
        rows = [torch.arange(d, d + n).clamp(max=N - 1) for d in done]
        chunk = [torch.stack([x[b, r] for b, r in enumerate(rows)]).transpose(1, 2) for x in (q, k, v)]
        if kind == "pages" and dice.random() < 0.3:  # goes on as a copy that shares every page
            names[:] = [pool.fork(name) for name in names]
        if kind in ("growing", "static", "pages") and dice.random() < 0.2:  # written once, forgotten, written again
            attend(*chunk, counts=counts, **named)
            if kind == "pages":
                for name, d in zip(names, done, strict=True):
                    pool.rewind(name, d)
            else:
                cache.rewind(done)
        out, lse = attend(*chunk, counts=counts, return_lse=True, **named)
        for b, count in enumerate(counts):
            found[b][0].append(out[b, :, :count].transpose(0, 1))
            found[b][1].append(lse[b, :, :count])
            done[b] += count
    slack = 1e-4 if turned else 1e-11
    for b, n in enumerate(done):
        tensors = [x[b, :n] for x in (q, k, v)]
        if turned:
            dtype = torch.float32 if case.dtype == torch.float64 else case.dtype
            tensors[:2] = [rotated(x.float(), 0, cos, sin, interleaved).to(dtype).to(case.dtype) for x in tensors[:2]]
        whole = {
            "causal": True, "window_size": (-1, 0) if window is None else (window - 1, 0), "sinks": named["sinks"],
            "softcap": named["softcap"] or 0.0, "softmax_scale": named["scale"],
        }  # fmt: skip
        (gold, eager) = (some[0] for some in exact_and_eager([(tensors, whole)]))
        case.close("out", torch.cat(found[b][0]), gold[0], eager[0], slack)
        case.close("lse", torch.cat(found[b][1], 1), gold[1], eager[1], slack)
    return f"our cache, {kind}{' with rotary' if turned else ''}"


def check_attention(case: Draw) -> str:
    """`attention` itself with everything at once, and gradients of sinks and slopes."""
    B, H, D = case.B, case.H, case.D
    Nq, Nk = case.dice.choice(LENGTHS[1:]), case.dice.choice(LENGTHS[1:])
    named = case.named
    q, k, v = case.tensors((B, H, Nq, D), (B, case.Hkv, Nk, D), (B, case.Hkv, Nk, D))
    sinks = draw(case.seed + 7, H, dtype=case.dtype)
    slopes = (
        draw(case.seed + 8, *case.dice.choice([(H,), (B, H)])).abs().to(torch.promote_types(case.dtype, torch.float32))
    )
    leaves, inputs = ([x.clone().requires_grad_() for x in (q, k, v, sinks, slopes)] for _ in range(2))
    left, right = named.get("window_size", (-1, -1))
    right = 0 if named["causal"] else right
    out, lse = attention(
        *leaves[:3], mask=BlockMask(Nq, Nk, window=(left, right), window_offset=Nk - Nq), sinks=leaves[3],
        bias=ALiBi(leaves[4], "bottom_right"), softcap=named.get("softcap"), scale=named.get("softmax_scale"),
        return_lse=True,
    )  # fmt: skip
    parts = [
        ([x[b].transpose(0, 1) for x in inputs[:3]],
         named | {"sinks": inputs[3], "alibi_slopes": inputs[4] if inputs[4].dim() == 1 else inputs[4][b]})
        for b in range(B)
    ]  # fmt: skip
    gold, eager = (
        (torch.stack([o.transpose(0, 1) for o, _ in some]), torch.stack([x for _, x in some]))
        for some in exact_and_eager(parts)
    )
    case.close("out", out, gold[0], eager[0])
    case.close("lse", lse, gold[1], eager[1])
    grad, grad_lse = (
        draw(case.seed + 98, *out.shape, dtype=case.dtype),
        draw(case.seed + 99, *lse.shape, dtype=lse.dtype),
    )
    ours = torch.autograd.grad((out, lse), leaves, (grad, grad_lse))
    exact = torch.autograd.grad(gold, inputs, (grad.double(), grad_lse.double()), retain_graph=True)
    plain = torch.autograd.grad(eager, inputs, (grad, grad_lse.to(eager[1].dtype)))
    terms = sizes_of_terms(inputs, grad, gold[1], named.get("softmax_scale"))
    sizes = (*terms, 1.0, 4.0 * float(exact[4].abs().max()))  # distances times what cancels
    for name, a, b, c, size in zip(("dq", "dk", "dv", "dsinks", "dslopes"), ours, exact, plain, sizes, strict=True):
        case.close(name, a, b.nan_to_num(), c.nan_to_num(), size=size)
    return "attention with sinks and slopes learned"


KINDS = (check_dense, check_dense, check_packed, check_packed, check_with_kvcache, check_with_kvcache, check_cache,
         check_cache, check_attention)  # fmt: skip


def check(seed: int) -> str:
    """One random call; what kind it was."""
    case = Draw(seed)
    return KINDS[seed % len(KINDS)](case)
