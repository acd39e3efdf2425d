"""A few calls of the CUDA kernels in the emulator: exit status 0 if all is well, 3 if something complains.

test_cuda_emulator.py runs it on kernels with a fault in them. Small: bfloat16, heads of up to 64. Where
`EFFICIENT_ATTN_CUDA_EMULATOR_CAPABILITY` is 90 it tests Hopper's kernels, with `EFFICIENT_ATTN_CUDA_ANY_ORDER` the
backward in one pass, in a fixed order too.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tests/: run as a script, not by pytest
from emulated_linear import TestLinearAttention
from support.accuracy import Problem, assert_conforms, gradients
from support.cases import CASES, Case, draw

from efficient_attn import attention
from efficient_attn.backends.cuda import attention as cuda

HOPPER = os.environ.get("EFFICIENT_ATTN_CUDA_EMULATOR_CAPABILITY") == "90"
ONE_PASS = os.environ.pop("EFFICIENT_ATTN_CUDA_ANY_ORDER", "") == "1"
NAMES_80 = (
    "window", "bits", "causal_top_left", "blocks_64_32", "bias_per_key", "bias_pairs", "unaligned",
    "few_queries_window", "few_queries_blocks", "few_queries_bits",
    "few_queries_of_many_heads",
)  # fmt: skip
NAMES_90 = ("dense_long", "window", "bits", "causal_top_left", "lengths", "blocks_128")
PROBES = [
    Case("ragged", B=1, Nq=70, Nk=150, D=20, Dv=36),
    *(case for case in CASES if case.name in (NAMES_90 if HOPPER else NAMES_80)),
]


LINEAR = (2, 4, 2, 150, 150, 16, 24, True, 0, False)  # B, Hq, Hkv, Nq, Nk, F, Dv, causal, offset, masked


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with rows that begin on 16 bytes and end before the next one does."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] // 8 * 8 + 16), torch.nan)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def probe(case: Case, schedule: int, any_order: bool = False) -> None:
    cuda.kernels().set_schedule(schedule)
    os.environ["EFFICIENT_ATTN_CUDA_ANY_ORDER"] = str(int(any_order))
    if ONE_PASS:
        case = replace(case, D=72, Dv=88)
    drawn = draw(case, torch.bfloat16)
    names = [n for n in ("query", "key", "value", "bias") if drawn[n] is not None]
    if case.name == "ragged":
        drawn |= {n: padded(drawn[n]) for n in (*names, "grad_out")}
    given = {n: drawn[n] for n in names}
    if case.name == "few_queries_bits":  # whatever no query sees
        given["value"] = drawn["value"].masked_fill(~drawn["visible"].any(2).view(1, 1, -1, 1), torch.nan)
    leaves = {n: t.detach().requires_grad_() for n, t in given.items()}
    causal = {"is_causal": case.causal is not None, "causal_alignment": case.causal}
    out, lse = attention(**leaves, mask=drawn["mask"], **causal, return_lse=True, backend="cuda")
    found = gradients((out,), list(leaves.values()), (drawn["grad_out"],))
    inputs = (drawn[n] for n in ("query", "key", "value", "bias", "visible"))
    problem = Problem(*inputs, case.D**-0.5, drawn["grad_out"])
    assert_conforms(problem, {"out": out.detach(), "lse": lse, **dict(zip(names, found, strict=True))})


def poisoned(**places: int) -> None:
    """NaN in the rows of those tensors: it stays with those who see it."""
    D = 72 if ONE_PASS else 16
    drawn = [torch.randn(1, 1, 140, D, generator=torch.Generator().manual_seed(s)).bfloat16() for s in range(4)]
    for name, place in places.items():
        drawn[("query", "key", "value", "grad_out").index(name)][:, :, place] = torch.nan
    found = []
    for backend in ("cuda", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in drawn[:3]]
        out = attention(*leaves, is_causal=True, backend=backend)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, drawn[3])])
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours.isnan(), expected.isnan()), f"a NaN in {places} does not stay with those who see it"


def main() -> int:
    try:
        for schedule, case in enumerate(PROBES):
            case = replace(case, B=2 if case.name == "lengths" else 1)  # the first length is 0
            if ONE_PASS:
                if case.name == "window":  # of three tiles of keys, the first of which some steps do not see
                    case = replace(case, B=1, Hq=1, Hkv=1, Nq=260, Nk=260)
                probe(case, schedule, any_order=True)
                cuda.kernels().set_multiprocessors(5)
                cuda.kernels().set_together(2, schedule % 4)  # of the five; the policies in turns
            probe(case, schedule)
        if HOPPER:
            poisoned(key=130, value=130)  # of their tile, two queries do not see them
            poisoned(grad_out=20)
            assert cuda.kernels().counters()["wgmma"]["calls"], "Hopper's kernels did not run"
        else:
            checks = TestLinearAttention()
            checks.test_nan_is_not_met_before_its_time()
            cuda.processors = lambda device: 1  # few blocks of threads: several chunks of a segment each
            checks.check_against_the_definition(LINEAR, torch.bfloat16)
        conflicts = {name: c["conflicts"] for name, c in cuda.kernels().counters().items() if isinstance(c, dict)}
        assert not any(conflicts.values()), f"bank conflicts: {conflicts}"
    except (RuntimeError, AssertionError) as error:
        print(f"found: {error}")
        return 3
    print("nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
