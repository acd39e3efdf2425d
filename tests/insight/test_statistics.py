"""Statistics of attention weights against the n x n definition in float64, over the cases of the conformance suite."""

from __future__ import annotations

import pytest
import torch
from support.cases import CASES, Case, draw

from efficient_attn import BlockMask, InputError, InputTypeError, SlidingWindow
from efficient_attn.insight import AttentionStatistics, attention_statistics

BACKENDS = ["cpu", "reference"]
NEAR, BLOCK, TOP = 5, 24, 4


def weights_of(query, key, bias, visible, scale) -> torch.Tensor:
    """P (B, Hq, Nq, Nk) in float64; rows without a visible key are 0."""
    groups = query.shape[1] // max(key.shape[1], 1)
    scores = query.double() @ key.double().repeat_interleave(groups, 1).mT * scale
    if bias is not None:
        scores = scores + bias.double()
        visible = visible & (bias != -torch.inf)
    scores = scores.masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) if scores.shape[-1] else scores


def definition(P: torch.Tensor, offset: int, sets: dict, row_weights: torch.Tensor) -> dict[str, torch.Tensor]:
    Nq, Nk = P.shape[2:]
    gap = (torch.arange(Nq)[:, None] + offset - torch.arange(Nk)).abs()
    cells = torch.nn.functional.pad(P, (0, -Nk % BLOCK, 0, -Nq % BLOCK))
    return {
        "entropy": -torch.xlogy(P, P).sum(-1),
        "top_weights": torch.nn.functional.pad(P.sort(-1, descending=True).values, (0, TOP))[..., :TOP],
        "received": P.sum(2),
        "received_weighted": torch.einsum("bhqk,rbhq->rbhk", P, row_weights.double()),
        "distance": (P * gap).sum(-1),
        "nearby": (P * (gap <= NEAR)).sum(-1),
        "map": cells.unflatten(2, (-1, BLOCK)).unflatten(4, (-1, BLOCK)).sum((3, 5)),
        **{name: (P * members).sum(-1) for name, members in sets.items()},
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.spread <= 4], ids=str)
def test_of_every_case(case: Case, dtype: torch.dtype, backend: str) -> None:
    drawn = draw(case, dtype)
    query, key, bias, mask = (drawn[name] for name in ("query", "key", "bias", "mask"))
    alignment = case.causal or "top_left"
    sets = {"first": torch.arange(case.Nk) < 2, "odd": torch.arange(case.Nk) % 2 == 1}
    row_weights = torch.rand(2, case.B, case.Hq, case.Nq)
    found = attention_statistics(
        query, key, mask=mask, bias=bias, is_causal=case.causal is not None, causal_alignment=alignment,
        scale=case.scale, top_k=TOP, row_weights=row_weights, key_sets=sets, nearby=NEAR, map_block=BLOCK,
        backend=backend,
    )  # fmt: skip
    scale = case.D**-0.5 if case.scale is None else case.scale
    P = weights_of(query, key, bias, drawn["visible"], scale)
    right = definition(P, case.Nk - case.Nq if alignment == "bottom_right" else 0, sets, row_weights)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert found.shares is not None
    for name, wanted in right.items():
        got = found.shares[name] if name in sets else getattr(found, name)
        assert got.shape == wanted.shape, name
        torch.testing.assert_close(
            got.double(), wanted, rtol=tolerance, atol=20 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert found.top_keys is not None and found.top_weights is not None
    there = found.top_keys >= 0
    assert torch.equal(there.sum(-1), (P > 0).sum(-1).clamp(max=TOP)) or dtype != torch.float64
    picked = torch.cat([P, P.new_zeros(*P.shape[:3], 1)], -1).gather(-1, found.top_keys.long() % (case.Nk + 1))
    torch.testing.assert_close(picked, found.top_weights.double(), rtol=tolerance, atol=20 * tolerance)


def test_what_is_not_wanted_is_none() -> None:
    query, key = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    found = attention_statistics(query, key, want=())
    assert [name for name in AttentionStatistics._fields if getattr(found, name) is not None] == ["lse"]
    assert attention_statistics(query, key, want=("top",)).largest.shape == (1, 2, 9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias_shape", [None, (1, 4, 1, 37), (2, 4, 41, 37)])
def test_gradients_of_entropy_and_of_what_is_received(bias_shape, backend: str) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 41, 8).double(), torch.randn(2, 2, 37, 8).double()
    bias = None if bias_shape is None else torch.randn(bias_shape).double()
    row_weights = torch.rand(2, 2, 4, 41).double()
    visible = torch.rand(2, 4, 41, 37) < 0.6
    visible[:, :, 5] = False
    leaves = [t.requires_grad_() for t in (query, key, bias, row_weights) if t is not None]
    found = attention_statistics(
        query, key, mask=visible, bias=bias, want=("entropy", "received"), row_weights=row_weights, backend=backend
    )
    scores = query @ key.repeat_interleave(2, 1).mT * 8**-0.5 + (0 if bias is None else bias)
    P = torch.softmax(scores.masked_fill(~visible, -1e300), -1) * visible
    entropy = -(P * torch.log(torch.where(P > 0, P, 1))).sum(-1)
    weighted = torch.einsum("bhqk,rbhq->rbhk", P, row_weights)
    cotangents = [torch.randn_like(t) for t in (entropy, P.sum(2), weighted)]
    right = torch.autograd.grad((entropy, P.sum(2), weighted), leaves, cotangents)
    got = torch.autograd.grad((found.entropy, found.received, found.received_weighted), leaves, cotangents)
    for name, a, b in zip(("query", "key", "bias", "row_weights"), got, right, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_what_is_hidden_has_no_influence() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 70, 8), torch.randn(2, 2, 70, 8)
    padding = torch.arange(70) < torch.tensor([[50], [70]])
    found = attention_statistics(query, key, key_mask=padding, row_weights=torch.ones(2, 1, 1), map_block=10)
    poisoned = key.masked_fill(~padding[:, None, :, None], torch.nan)
    again = attention_statistics(query, poisoned, key_mask=padding, row_weights=torch.ones(2, 1, 1), map_block=10)
    for a, b in zip(found[:9], again[:9], strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
    assert found.received[0, :, 50:].eq(0).all() and torch.equal(found.received_weighted[0], found.received)


def test_bits_do_not_depend_on_the_threads() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 900, 16), torch.randn(1, 2, 900, 16)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(attention_statistics(query, key, mask=SlidingWindow(left=300, right=20)))
    torch.set_num_threads(threads)
    for name in ("lse", "entropy", "received", "map", "distance", "top_keys"):
        assert all(torch.equal(getattr(found[0], name), getattr(other, name)) for other in found[1:]), name


def test_of_equal_weights_the_first_key_comes_first() -> None:
    query, key = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 200, 4)
    for backend in BACKENDS:
        found = attention_statistics(query, key, want=("top",), top_k=5, backend=backend)
        assert found.top_keys.tolist() == [[[[0, 1, 2, 3, 4]] * 3]]


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"want": ("entropie",)}, InputError, "want must be"),
        ({"want": "top"}, InputError, "want must be"),
        ({"top_k": 33}, InputError, "top_k"),
        ({"top_k": 0}, InputError, "top_k"),
        ({"map_block": 0}, InputError, "map_block"),
        ({"key_sets": {"a": torch.ones(5)}, "causal_alignment": "top_left"}, InputTypeError, "bool tensor"),
        ({"key_sets": {"a": torch.ones(5, dtype=torch.bool)}, "causal_alignment": "top_left"}, InputError, r"\(30,\)"),
        ({"row_weights": torch.ones(3), "causal_alignment": "top_left"}, InputError, "row_weights"),
        ({"backend": "triton", "causal_alignment": "top_left"}, InputError, "gathers no statistics"),
        ({"is_causal": True}, InputError, "ambiguous"),
        ({}, InputError, "distances between 20 queries and 30 keys"),
        ({"mask": BlockMask(20, 31)}, InputError, "31 keys"),
    ],
)
def test_refusals(arguments, error, text) -> None:
    query, key = torch.randn(1, 2, 20, 4), torch.randn(1, 2, 30, 4)
    with pytest.raises(error, match=text):
        attention_statistics(query, key, **arguments)
