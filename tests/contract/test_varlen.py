"""`attention_varlen` on every backend against its definition, sequence by sequence in float64."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from efficient_attn import InputError, InputTypeError, attention_varlen

LENGTHS = [  # of queries, of keys (None: the same), rows behind the last sequence
    ([1], None, 0),
    ([1, 1, 1], [3, 1, 5], 0),
    ([5, 0, 9], None, 0),
    ([7, 30, 0, 130], [20, 0, 4, 150], 3),
    ([140, 2], [2, 140], 0),
    ([0, 0], [4, 0], 0),
]
WINDOWS = [(-1, -1), (0, 0), (3, -1), (-1, 2), (40, 7)]


def starts(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]


def definition(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, window: tuple[int, int], from_end: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Out (Nq, H, Dv) and lse (H, Nq) of one sequence."""
    (Nq, H, D), (Nk, Hkv, _) = q.shape, k.shape
    k, v = (x.repeat_interleave(H // Hkv, 1) for x in (k, v))
    shift = torch.arange(Nk) - torch.arange(Nq)[:, None] - (Nk - Nq if from_end else 0)
    left, right = window
    right = 0 if is_causal else right
    hidden = (shift < -left) & (left >= 0) | (shift > right) & (right >= 0)
    scores = torch.einsum("ihd,jhd->hij", q, k) * (D**-0.5 if scale is None else scale)
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, -1) if Nk else torch.full((H, Nq), -torch.inf, dtype=scores.dtype)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("hij,jhd->ihd", weights, v), lse


@pytest.mark.parametrize("alignment", ["bottom_right", "top_left"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", LENGTHS, ids=str)
def test_agrees_with_its_definition(
    case: tuple[list[int], list[int] | None, int], is_causal: bool, alignment: str, backend: str, device: torch.device
) -> None:
    """Out, lse and gradients; windows, grouped heads, value dimensions and scales in turn."""
    q_lens, k_lens, behind = case
    dice = random.Random(f"{case} {is_causal} {alignment}")
    half = backend == "cuda"
    dtype = torch.bfloat16 if half else torch.float32 if backend == "triton" else torch.float64
    tolerance = 3e-2 if half else 1e-4 if backend == "triton" else 1e-9
    generator = torch.Generator().manual_seed(0)
    for window in dice.sample(WINDOWS, 3):
        H, Hkv = dice.choice([(1, 1), (4, 2), (4, 4)])
        D, Dv, scale = (*dice.choice([(8, 8), (16, 5), (3, 16)]), dice.choice([None, 0.3]))
        total_k = sum(q_lens if k_lens is None else k_lens)
        shapes = (sum(q_lens), H, D), (total_k, Hkv, D), (total_k, Hkv, Dv)
        drawn = [torch.randn(n + behind, h, d, generator=generator).to(dtype) for n, h, d in shapes]
        leaves = [x.to(device).requires_grad_() for x in drawn]
        gold = [x.double().requires_grad_() for x in drawn]
        cu_q, cu_k = starts(q_lens), starts(q_lens if k_lens is None else k_lens)
        out, lse = attention_varlen(
            *leaves, torch.tensor(cu_q, device=device, dtype=torch.int32),
            None if k_lens is None else torch.tensor(cu_k, device=device), is_causal=is_causal, window=window,
            causal_alignment=alignment, scale=scale, return_lse=True, backend=backend,
        )  # fmt: skip
        pairs = [
            definition(
                gold[0][a:b], *(x[c:d] for x in gold[1:]), is_causal=is_causal, window=window,
                from_end=alignment == "bottom_right", scale=scale,
            )
            for (a, b), (c, d) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True)
        ]  # fmt: skip
        expected = torch.cat([*(x for x, _ in pairs), torch.zeros(behind, H, Dv)])
        expected_lse = torch.cat([*(x for _, x in pairs), torch.full((H, behind), -torch.inf)], 1)
        assert out.is_contiguous() and out.shape == expected.shape and out.dtype == dtype
        torch.testing.assert_close(out.cpu().double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=tolerance, atol=tolerance)
        cotangent = torch.randn(out.shape, generator=generator)
        torch.autograd.backward(out, cotangent.to(out))
        torch.autograd.backward(expected, cotangent.to(dtype).double())
        for found, leaf in zip(leaves, gold, strict=True):
            right = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.nan_to_num()
            torch.testing.assert_close(found.grad.cpu().double(), right, rtol=tolerance, atol=3 * tolerance)


def test_what_is_hidden_may_hold_anything() -> None:
    """Another sequence's NaN changes nothing."""
    q, k = torch.randn(6, 2, 8), torch.randn(8, 2, 8)
    right = attention_varlen(q, k, k, (0, 2, 6), (0, 3, 8), is_causal=True)
    spoilt = k.clone()
    spoilt[3:] = torch.nan
    assert torch.equal(attention_varlen(q, spoilt, spoilt, (0, 2, 6), (0, 3, 8), is_causal=True)[:2], right[:2])


@pytest.mark.parametrize("kind", ["tuple", "tensor"])
def test_compiled(kind: str) -> None:
    """One graph where lengths are numbers; a tensor of them is read, which ends one."""
    torch._dynamo.reset()
    q, k = torch.randn(20, 4, 8, requires_grad=True), torch.randn(25, 2, 8)
    places = ((0, 4, 20), (0, 15, 25))
    given = places if kind == "tuple" else tuple(map(torch.tensor, places))

    def call(x: Tensor, y: Tensor, *cu: tuple[int, ...] | Tensor) -> Tensor:
        return attention_varlen(x, y, y, *cu, is_causal=True, window=(6, -1))

    compiled = torch.compile(call, fullgraph=kind == "tuple", backend="aot_eager")
    expected = call(q, k, *places)
    found = compiled(q, k, *given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), q)[0], torch.autograd.grad(expected.square().sum(), q)[0]
    )


def test_halves_and_autocast() -> None:
    q, k = torch.randn(9, 4, 8), torch.randn(9, 4, 8)
    exact = attention_varlen(q, k, k, (0, 4, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attention_varlen(q, k, k, (0, 4, 9))
    half = attention_varlen(*(x.bfloat16() for x in (q, k, k)), (0, 4, 9))
    assert cast.dtype == half.dtype == torch.bfloat16 and torch.equal(cast, half)
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)


def test_dropout_is_that_of_the_pack() -> None:
    q = torch.randn(50, 2, 8)
    first, again = (attention_varlen(q, q, q, (0, 20, 50), dropout_p=0.4, dropout_seed=3) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, attention_varlen(q, q, q, (0, 20, 50)))


def test_wrong_input_is_named() -> None:
    q = torch.randn(6, 2, 8)
    for places in ((1, 6), (0, 4, 2), (0, 7), ()):
        with pytest.raises(InputError, match="cu_seqlens_q must begin with 0"):
            attention_varlen(q, q, q, places)
    with pytest.raises(InputTypeError, match="must be integers"):
        attention_varlen(q, q, q, torch.tensor([0.0, 6.0]))
    with pytest.raises(InputError, match="2 sequences of queries and 1"):
        attention_varlen(q, q, q, (0, 2, 6), (0, 6))
    with pytest.raises(InputError, match="give cu_seqlens_k"):
        attention_varlen(q, q[:4], q[:4], (0, 2, 6))
    with pytest.raises(InputError, match="tokens of all sequences"):
        attention_varlen(q[None], q, q, (0, 6))
    with pytest.raises(InputError, match="window must be"):
        attention_varlen(q, q, q, (0, 6), window=(-2, 0))
    with pytest.raises(InputError, match="causal_alignment must be"):
        attention_varlen(q, q, q, (0, 6), causal_alignment="left")
    with pytest.raises(InputTypeError, match="key must be a tensor"):
        attention_varlen(q, None, q, (0, 6))  # type: ignore[arg-type]
