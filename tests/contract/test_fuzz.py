"""Random calls of the native kernel in float64 against the definition: every option at once, odd sizes and layouts.

`EFFICIENT_ATTN_FUZZ=100000 pytest tests/test_fuzz.py` runs more; a failure prints the seed that repeats it.
"""

from __future__ import annotations

import contextlib
import os
import random

import pytest
import torch
from support.cases import LAYOUTS, Case, blocks_window_lengths, draw, lengths, random_bits, random_blocks, window

from efficient_attn import attention

START = int(os.environ.get("EFFICIENT_ATTN_FUZZ_SEED", "0"))
COUNT = int(os.environ.get("EFFICIENT_ATTN_FUZZ", "200"))
GROUPS = 8
SIZES = (1, 2, 3, 7, 15, 16, 17, 31, 47, 48, 49, 63, 64, 65, 95, 97, 127, 128, 129, 130, 200, 257)


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


def run(case: Case, drawn: dict, seed: int, backend: str) -> list[torch.Tensor]:
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


@pytest.mark.parametrize("part", range(GROUPS))
def test_random_calls_equal_the_definition(part: int) -> None:
    seeds = range(START + part, START + COUNT, GROUPS)
    with progress(part) as update:
        for done, seed in enumerate(seeds):
            update(f"seed {seed}", part * len(seeds) + done, COUNT)
            compare(seed)


@contextlib.contextmanager
def progress(part: int):
    """How far `make fuzz` is, and after Ctrl-C how to go on; nothing in a test run."""
    if "EFFICIENT_ATTN_FUZZ" not in os.environ:
        yield lambda *_: None
        return
    from efficient_attn.measuring.terminal import Progress, console

    out = console(stderr=True)
    try:
        with Progress(out, "random calls", transient=True) as bar:
            yield bar.update
    except KeyboardInterrupt:
        # Every group has its share of the seeds: the next ones are those of a run that starts after all of these.
        out.print(f"{bar.done:.0f} random calls were equal; others: make fuzz CASES={COUNT} SEED={START + COUNT}")
        raise


def compare(seed: int) -> None:
    case = random_case(seed)
    drawn = draw(case, torch.float64, seed)
    for ours, expected in zip(*(run(case, drawn, seed, b) for b in ("cpu", "reference")), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10, msg=lambda m, c=case: f"{c!r}\n{m}")
