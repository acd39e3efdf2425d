"""Random calls against definitions, by family: `make fuzz CASES=100000`; a small sample of each is a default test.

    operator    `attention`, every option at once, on the native kernels
    method      `Method.attend`, of every method and hybrid, by every route of hiding, in every dtype
    mask        `BlockMask`: builders, operators and views against bool tensors
    module      `MultiheadAttention`: projections, layouts, its masks, its weights
    flash       calls as users of FlashAttention make them: packed, cached, on pages, with all that is done to scores

A case is a seed and nothing else. What fails prints the command that repeats it:

    cd tests && python -m support.fuzz method --first 4711 --cases 1
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from efficient_attn import BlockMask, MultiheadAttention, attention
from efficient_attn.errors import UnsupportedError
from efficient_attn.masks import MaskArrays
from efficient_attn.methods import Hybrid, LowRankMethod
from efficient_attn.multihead.projections import project

from . import flash
from .cases import LAYOUTS, Case, blocks_window_lengths, draw, lengths, random_bits, random_blocks, window
from .definitions import Pairs, definition
from .method_cases import (
    MethodCase,
    aligned,
    pairs_of,
    random_method_case,
    random_spec,
    state_of,
    tensors_of,
    what_is_said,
)

SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 47, 48, 49, 63, 64, 65, 95, 97, 127, 128, 129, 130, 200, 257)


# --- the operator ---


def random_case(seed: int) -> Case:
    """A case that `seed` decides completely."""
    choose = random.Random(seed)
    Hkv = choose.choice((1, 1, 2, 3))
    block = (choose.randrange(1, 17) * 16, choose.randrange(1, 17) * 16)
    masks = [
        None,
        window(choose.choice((-1, 0, 5, 60)), choose.choice((-1, 0, 9, 70))),
        lengths,
        random_bits(choose.random(), batch=choose.random() < 0.5, heads=choose.random() < 0.5),
        random_blocks(block, choose.random()),
        blocks_window_lengths,
    ]
    Nq, Nk = choose.choice(SIZES), choose.choice(SIZES)
    return Case(
        f"seed_{seed}",
        B=choose.choice((1, 2, 3)),
        Hq=Hkv * choose.choice((1, 1, 2, 3)),
        Hkv=Hkv,
        Nq=Nq,
        Nk=choose.choice((Nq, Nk)),
        D=choose.choice((1, 2, 5, 8, 16, 33, 64, 100)),
        Dv=choose.choice((1, 3, 8, 17, 64, 72)),
        mask=choose.choice(masks),
        bias=choose.choice((None, None, tuple(choose.choice((0, 1)) for _ in range(4)))),
        causal=choose.choice((None, None, "top_left", "bottom_right")),
        scale=choose.choice((None, None, -0.7, 0.0, 1.3)),
        dropout_p=choose.choice((0.0, 0.0, 0.1, 0.9)),
        layout=choose.choice([name for name in LAYOUTS if name != "expanded"]),
        grad_out=choose.choice(("random", "random", "sum")),
        grad_lse=choose.random() < 0.3,
    )


def run_operator(case: Case, drawn: dict, seed: int, backend: str) -> list[Tensor]:
    """out, lse and every gradient."""
    leaves = {k: drawn[k].detach().requires_grad_() for k in ("query", "key", "value", "bias") if drawn[k] is not None}
    out, lse = attention(
        **leaves, mask=drawn["mask"], is_causal=case.causal is not None, causal_alignment=case.causal, scale=case.scale,
        dropout_p=case.dropout_p, dropout_seed=seed, return_lse=True, backend=backend,
    )  # fmt: skip
    outputs, cotangents = (out,), (drawn["grad_out"],)
    if case.grad_lse:
        outputs, cotangents = (out, lse), (*cotangents, drawn["grad_lse"].masked_fill(lse == -torch.inf, 0.0))
    return [out, lse, *torch.autograd.grad(outputs, list(leaves.values()), cotangents)]


def check_operator(seed: int) -> str:
    case = random_case(seed)
    drawn = draw(case, torch.float64, seed)
    for ours, expected in zip(*(run_operator(case, drawn, seed, b) for b in ("cpu", "reference")), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10, msg=lambda m: f"{case!r}\n{m}")
    return "operator"


# --- methods ---


def close(
    name: str, ours: Tensor, exact: Tensor, dtype: torch.dtype, case: object, slack: float,
    rounded: Callable[[], Tensor | None] = lambda: None,
) -> None:  # fmt: skip
    """Within a few roundings of the largest value; how many is rule 8's and the conformance suite's matter.

    Where that is not enough: within four times of what the definition itself loses in float32 (``rounded()``).
    """
    assert ours.dtype == dtype and ours.shape == exact.shape, f"{case}: {name} is {ours.dtype} {tuple(ours.shape)}"
    size = float(exact.abs().max()) if exact.numel() else 0.0
    eps = 1e-11 if dtype == torch.float64 else torch.finfo(dtype).eps
    worst = float((ours.double() - exact).abs().max()) if exact.numel() else 0.0
    if worst <= slack * eps * max(size, 1.0):
        return
    again = rounded()
    lost = 0.0 if again is None else float((again.double() - exact).abs().max())
    said = f"{worst:.3g}, its largest value {size:.3g}, the definition in float32 by {lost:.3g}"
    assert worst <= 4.0 * lost, f"{case}: {name} is off by {said}"


def check_method(seed: int) -> str:
    case = random_method_case(seed)
    inputs, state, pairs = tensors_of(case), state_of(case), pairs_of(case)
    leaves = [t.clone().requires_grad_() for t in inputs]
    try:
        out = case.method.attend(*leaves, state=state, **case.call)[0]
    except UnsupportedError:
        assert case.method.exact is False, f"{case}: a sparse method refuses it"
        return "refused"
    exact = [t.double().requires_grad_() for t in inputs]
    rows = what_is_said(case, pairs)
    expected = definition(aligned(case).method, *exact, None if state is None else state, pairs)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    grad_out = (grad_out * rows).to(case.dtype)
    approximate = isinstance(case.method, LowRankMethod | Hybrid)
    slack = 16.0 if not approximate else 200.0 if case.dtype == torch.float64 else 100.0

    @functools.cache
    def in_float32() -> list[Tensor | None]:
        """The definition's output and gradients in float32: where signed estimates cancel, few digits are left."""
        single = [t.float().requires_grad_() for t in inputs]
        again = definition(aligned(case).method, *single, state, pairs)
        return [again.detach() * rows, *torch.autograd.grad(again, single, grad_out.to(again.dtype), allow_unused=True)]

    def rounded(n: int) -> Tensor | None:
        return in_float32()[n] if approximate and case.dtype == torch.float32 else None

    close("out", out.detach() * rows, (expected * rows).detach(), case.dtype, case, slack, lambda: rounded(0))
    found = torch.autograd.grad(out, leaves, grad_out, allow_unused=True)
    wanted = torch.autograd.grad(expected, exact, grad_out.double(), allow_unused=True)
    for n, (name, ours, theirs) in enumerate(zip(("dq", "dk", "dv"), found, wanted, strict=True), 1):
        if ours is None or theirs is None:
            assert all(t is None or not t.any() for t in (ours, theirs)), f"{case}: {name} is missing"
        else:
            close(name, ours, theirs.nan_to_num(0.0), case.dtype, case, 4 * slack, lambda n=n: rounded(n))
    return case.method.name


# --- masks ---


def random_mask(choose: random.Random, generator: torch.Generator, q_len: int, kv_len: int) -> tuple[BlockMask, Tensor]:
    """A mask of any kind, and what it shows: bool, broadcastable to (2, 3, q_len, kv_len)."""
    block = (16 * choose.randint(1, 4), 16 * choose.randint(1, 4))
    batch, heads = choose.choice((1, 2)), choose.choice((1, 3))
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    kind = choose.choice(("bits", "blocks", "predicate", "window", "lengths", "csr"))
    if kind == "window":
        left, right = choose.randint(-1, 40), choose.randint(-1, 40)
        seen = ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))
        mask, seen = BlockMask(q_len, kv_len, block).with_window((left, right), alignment="top_left"), seen[None, None]
    elif kind == "lengths":
        length = torch.randint(0, kv_len + 1, (2,), generator=generator)
        mask = BlockMask.from_lengths(length, q_len=q_len, kv_len=kv_len, block_size=block)
        seen = (j < length[:, None, None, None]).expand(2, 1, q_len, kv_len)
    elif kind == "predicate":
        step, shift = choose.randint(1, 9), choose.randint(0, 5)
        rule = lambda b, h, i, j: (i + j * (h + 1) + b + shift) % step == 0  # noqa: E731
        mask = BlockMask.from_predicate(rule, q_len=q_len, kv_len=kv_len, batch=batch, heads=heads, block_size=block)
        b, h = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None]
        seen = rule(b, h, i, j)
    elif kind == "csr":
        n_q, n_k = -(-q_len // block[0]), -(-kv_len // block[1])
        listed = torch.rand(batch * heads * n_q, n_k, generator=generator) < 0.5
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
        mask = BlockMask.from_csr(
            indptr, listed.nonzero()[:, 1], q_len=q_len, kv_len=kv_len, block_size=block, batch=batch, heads=heads
        )
        blocks = listed.view(batch, heads, n_q, n_k)
        seen = blocks.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[:, :, :q_len, :kv_len]
    else:
        seen = torch.rand(batch, heads, q_len, kv_len, generator=generator) < choose.choice((0.02, 0.5, 0.98))
        if kind == "blocks":
            seen = seen | ((i // 16 + j // 16) % 2 == 0)
        mask = BlockMask.from_dense(seen, block_size=block)
    if choose.random() < 0.3:
        left, right, alignment = (
            choose.randint(-1, 30),
            choose.randint(-1, 30),
            choose.choice(("top_left", "bottom_right")),
        )
        if mask.window is None:
            away = j - i - (kv_len - q_len if alignment == "bottom_right" else 0)
            seen = seen & ((away >= -left) | (left < 0)) & ((away <= right) | (right < 0))
            mask = mask.with_window((left, right), alignment=alignment)
    if choose.random() < 0.2 and mask.kv_lengths is None and mask.batch in (1, 2):
        length = torch.randint(0, kv_len + 1, (2,), generator=generator)
        mask, seen = mask.with_lengths(length), seen & (j < length[:, None, None, None])
    return mask, seen


def check_mask(seed: int) -> str:
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    q_len, kv_len = choose.choice(SIZES[:18]), choose.choice(SIZES[:18])
    (a, x), (b, y) = (random_mask(choose, generator, q_len, kv_len) for _ in range(2))

    def same(mask: BlockMask, seen: Tensor, what: str) -> None:
        drawn, seen = torch.broadcast_tensors(mask.to_dense(), seen)
        assert torch.equal(drawn, seen), f"seed {seed}: {what} of {a!r} and {b!r}"

    same(a, x, "a")
    same(a & b, x & y, "a & b")
    same(a | b, x | y, "a | b")
    same(~a, ~x, "~a")
    size = (16 * choose.randint(1, 8), 16 * choose.randint(1, 8))
    same(a.reblock(size), x, f"reblock({size})")
    same(a.explicit(), x, "explicit")
    assert a.equivalent(a.explicit()) and (~(~a)).equivalent(a), f"seed {seed}: equivalent {a!r}"
    if a.kv_lengths is None and a.window is None and a.indptr is not None:
        same(a.swapped(), x.mT, "swapped")
    total = x.expand(a.shape).sum().item() if a.shape[2] * a.shape[3] else 0
    assert abs(a.density - total / max(a.shape[0] * a.shape[1] * q_len * kv_len, 1)) < 1e-12, f"seed {seed}: density"
    arrays: MaskArrays = a.explicit().arrays(transposed=True)
    assert arrays.t_indices is not None and arrays.indices is not None
    assert arrays.t_indices.numel() == arrays.indices.numel(), f"seed {seed}: transposed lists"
    if a.shape[0] > 1 and a.batch in (1, a.shape[0]):
        same(a[1], x.expand(a.shape)[1:2], "a[1]")
    return "mask"


# --- the module ---


def check_module(seed: int) -> str:
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    H, D = choose.choice((1, 2, 4)), choose.choice((2, 4))
    N = choose.choice((1, 2, 15, 16, 17, 33, 48, 63, 64, 65))
    M = N if choose.random() < 0.7 else choose.choice((1, 2, 15, 16, 17, 33, 48))
    B, E = choose.choice((1, 2)), H * D
    spec = random_spec(choose, N, M)
    H = 2 * H if "per_head" in spec else H
    E = H * D
    batch_first, wanted = choose.random() < 0.5, choose.random() < 0.3
    torch.manual_seed(seed)
    module = MultiheadAttention(
        E, H, batch_first=batch_first, attention=spec, bias=choose.random() < 0.7, dtype=torch.float64,
        kdim=None if choose.random() < 0.7 else 5,
    )  # fmt: skip
    x = torch.randn(B, N, E, generator=generator, dtype=torch.float64)
    y = x if N == M and module.kdim == E else torch.randn(B, M, module.kdim, generator=generator, dtype=torch.float64)
    z = y if module.vdim == module.kdim else torch.randn(B, M, module.vdim, generator=generator, dtype=torch.float64)
    call, keys, pairs = {}, torch.ones(B, M, dtype=torch.bool), torch.ones(B, H, N, M, dtype=torch.bool)
    if choose.random() < 0.5:
        hidden = torch.rand(B, M, generator=generator) < 0.4
        if choose.random() < 0.5:
            hidden = torch.arange(M) < torch.randint(0, M, (B, 1), generator=generator)
        keys = ~hidden
        call["key_padding_mask"] = (
            hidden
            if choose.random() < 0.7
            else torch.zeros_like(hidden, dtype=torch.float64).masked_fill(hidden, -torch.inf)
        )
    method = module.attention
    if method.accepts_mask and choose.random() < 0.4:
        shape = (N, M) if choose.random() < 0.5 else (B * H, N, M)
        out = torch.rand(shape, generator=generator) < 0.3
        pairs = ~(out.view(B, H, N, M) if out.dim() == 3 else out.expand(B, H, N, M))
        call["attn_mask"] = out
        if method.accepts_bias and call.get("key_padding_mask", out).dtype == torch.float64:
            call["attn_mask"] = torch.zeros(shape, dtype=torch.float64).masked_fill(out, -torch.inf)
        elif call.get("key_padding_mask", out).dtype == torch.float64:
            call["key_padding_mask"] = ~keys
    seat = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    what = f"seed {seed}: {module} {(B, N, M)} {sorted(call)}"
    try:
        out, weights = module(seat(x), seat(y), seat(z), need_weights=wanted, **call)
    except (UnsupportedError, ValueError) as error:
        assert isinstance(error, UnsupportedError) or N != M, f"{what}: {error}"
        return "refused"
    q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in project(module, x, y, z))
    allowed = pairs & keys[:, None, None]
    turn = torch.arange(N).expand(B, N)  # positions count from the first real token
    pads = keys.int().argmax(1) * ((keys[:, 1:] & ~keys[:, :-1]).sum(1) == 1)
    pads = pads[:, None] if N == M and method.counts_positions else torch.zeros(B, 1, dtype=torch.int64)
    if pads.any():
        turn = (turn + pads) % N
        q, k, v = (t.gather(2, turn[:, None, :, None].expand_as(t)) for t in (q, k, v))
        allowed, pairs = (
            t.gather(2, turn[:, None, :, None].expand_as(t)).gather(3, turn[:, None, None].expand_as(t))
            for t in (allowed, pairs)
        )
        behind = (torch.arange(N) >= N - pads)[:, None, :, None]  # what padding sees is of no consequence
        pairs, allowed = (pairs | behind), (pairs | behind) & keys.gather(1, turn)[:, None, None]
    shown = Pairs(allowed, allowed.any(2).any(1), None, D**-0.5, None, pairs)
    case = MethodCase(seed, spec, method, (B, H, H, N, M, D, D), torch.float64, {"causal_alignment": None})
    expected = definition(method, q, k, v, module.method_state, shown).transpose(1, 2).flatten(2)
    expected = torch.nn.functional.linear(expected, module.out_proj.weight, module.out_proj.bias)
    rows = what_is_said(case, shown)[:, 0].expand(B, N, 1)
    back = turn.argsort(1)[..., None]
    expected, rows = expected.gather(1, back.expand_as(expected)), rows.gather(1, back)
    rows = rows & (torch.arange(N) >= pads)[..., None]
    close("out", (seat(out) * rows).detach(), (expected * rows).detach(), torch.float64, what, 1000.0)
    assert (weights is None) == (not wanted), what
    if weights is not None:
        assert weights.shape == (B, N, M), what
    return method.name


FAMILIES: dict[str, Callable[[int], str]] = {
    "operator": check_operator,
    "method": check_method,
    "mask": check_mask,
    "module": check_module,
    "flash": flash.check,
}


class Interrupted(Exception):
    """Ctrl-C ended a family: what it counted, what was wrong, and the first seed that was not run."""


def run(family: str, first: int, cases: int, *, at_most: int = 20) -> tuple[Counter, list[str]]:
    """How many of what were run, and what was wrong; prints how far it is.

    Raises:
        Interrupted: by Ctrl-C.
    """
    counts, wrong, start, shown = Counter(), [], time.monotonic(), 0.0
    bar = sys.stderr.isatty()
    for n in range(cases):
        try:
            counts[FAMILIES[family](first + n)] += 1
        except KeyboardInterrupt:
            raise Interrupted(counts, wrong, first + n) from None
        except Exception as error:
            text = str(error) or type(error).__name__
            wrong.append(f"{family} {first + n}: {type(error).__name__}: {text}")
            print(
                f"\n{wrong[-1]}\n  repeat: python -m support.fuzz {family} --first {first + n} --cases 1",
                flush=True,
            )
            if len(wrong) >= at_most:
                break
        now = time.monotonic()
        if now - shown > (0.2 if bar else 5.0) or n + 1 == cases:
            shown, done = now, (n + 1) / cases
            times = f"{now - start:.0f} s, about {(now - start) * (1 / done - 1):.0f} s left"
            line = f"{family:9} {'#' * int(30 * done):30} {n + 1:,} of {cases:,}, {len(wrong)} wrong, {times}"
            print(f"\r{line}" if bar else line, end="" if bar and n + 1 < cases else "\n", file=sys.stderr, flush=True)
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--cases", type=int, default=2000, help="of each family")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    unknown = set(options.families) - set(FAMILIES)
    if unknown:
        parser.error(f"no family {', '.join(unknown)}")
    failed, families = False, list(options.families or FAMILIES)
    while families:
        family, stopped = families.pop(0), None
        try:
            counts, wrong = run(family, options.first, options.cases)
        except Interrupted as interrupt:
            counts, wrong, stopped = interrupt.args
        kinds = ", ".join(f"{name} {count:,}" for name, count in counts.most_common())
        print(f"{family}: {sum(counts.values()):,} random cases agree, {len(wrong)} do not ({kinds})", flush=True)
        failed |= bool(wrong)
        if stopped is not None:
            commands = [command([family], stopped, options.first + options.cases - stopped)]
            commands += [command(families, options.first, options.cases)] if families else []
            print(f"interrupted by Ctrl-C; to go on:\n  {' && '.join(commands)}", flush=True)
            return 130
    return int(failed)


def command(families: list[str], first: int, cases: int) -> str:
    return f"{sys.executable} -m support.fuzz {' '.join(families)} --first {first} --cases {cases}"


if __name__ == "__main__":
    sys.exit(main())
