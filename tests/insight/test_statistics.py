"""Statistics of attention weights against the n x n definition in float64, over the cases of the conformance suite."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from support.accuracy import Problem
from support.cases import CASES, Case, bias_of, draw
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_attn import (
    BlockMask,
    InputError,
    InputTypeError,
    LowRankBias,
    RelativeBias,
    SlidingWindow,
    UnsupportedError,
)
from efficient_attn.backends.reference import statistics as reference
from efficient_attn.insight import AttentionStatistics, attention_statistics

NEAR, BLOCK, TOP = 5, 24, 4


def left_out(backend: str, dtype: torch.dtype = torch.float32) -> str:
    """Why a backend has no part in a test; what it says then is tested in test_refusals_of_backends."""
    if backend == "cuda":
        return "it gathers no statistics"
    return "it computes in float32" if backend == "triton" and dtype == torch.float64 else ""


def weights_of(case: Case, drawn: dict, query, key) -> torch.Tensor:
    """P (B, Hq, Nq, Nk) in float64; rows without a visible key are 0."""
    groups = query.shape[1] // max(key.shape[1], 1)
    scale = case.D**-0.5 if case.scale is None else case.scale
    scores = query.double() @ key.double().repeat_interleave(groups, 1).mT * scale
    visible = drawn["visible"]
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    double = {n: t.double() for n, t in drawn.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    names = ("bias", "slopes", "table", "grid_table", "rel_h", "rel_w")
    problem = Problem(
        *(double[n] for n in ("query", "key", "value")), visible=visible, scale=scale, grad_out=double["grad_out"],
        offset=case.Nk - case.Nq if case.causal == "bottom_right" else 0, grid=case.grid,
        **{name: double.get(name) for name in names},
    )  # fmt: skip
    bias = problem.full_bias(problem.inputs)
    if bias is not None:
        scores, visible = scores + bias, visible & (bias != -torch.inf)
    scores = scores.masked_fill(~visible, -torch.inf)
    if case.sinks:
        column = drawn["sinks"].double()[:, None, None].expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_of_every_case(case: Case, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    if left_out(backend, dtype):
        pytest.skip(left_out(backend, dtype))
    drawn = draw(case, dtype)
    query, key, mask = (drawn[name] for name in ("query", "key", "mask"))
    alignment = case.causal or "top_left"
    sets = {"first": torch.arange(case.Nk) < 2, "odd": torch.arange(case.Nk) % 2 == 1}
    row_weights = torch.rand(2, case.B, case.Hq, case.Nq)
    on = lambda t: t.to(device) if isinstance(t, torch.Tensor | BlockMask) else t  # noqa: E731
    placed = {name: on(t) for name, t in drawn.items()}
    arguments = {
        "mask": on(mask), "bias": bias_of(case, placed) or None, "is_causal": case.causal is not None,
        "causal_alignment": alignment, "scale": case.scale, "softcap": case.softcap, "sinks": placed["sinks"],
        "top_k": TOP, "row_weights": on(row_weights), "key_sets": sets, "nearby": NEAR, "map_block": BLOCK,
        "backend": backend,
    }  # fmt: skip
    if backend == "triton" and case.D > 256:
        with pytest.raises(UnsupportedError, match="head dimensions up to 256"):
            attention_statistics(on(query), on(key), **arguments)
        return
    found = attention_statistics(on(query), on(key), **arguments)
    found = found._replace(**{name: t.cpu() for name, t in found._asdict().items() if isinstance(t, torch.Tensor)})
    P = weights_of(case, drawn, query, key)
    right = definition(P, case.Nk - case.Nq if alignment == "bottom_right" else 0, sets, row_weights)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    if case.spread > 4 and dtype != torch.float64:
        tolerance *= 10  # scores of some hundreds have that much less behind the point
    if "decomposed" in case.structured and dtype == torch.bfloat16:
        tolerance = 1e-2  # its bias is rounded as queries and keys are
    assert found.shares is not None
    for name, wanted in right.items():
        got = found.shares[name].cpu() if name in sets else getattr(found, name)
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


@pytest.mark.parametrize("modified", ["", "softcap", "sinks", "table", "softcap sinks table"])
@pytest.mark.parametrize("bias_shape", [None, (1, 4, 1, 37), (2, 4, 41, 37)])
def test_gradients_of_entropy_and_of_what_is_received(
    bias_shape, modified: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if left_out(backend, torch.float64):
        pytest.skip(left_out(backend, torch.float64))
    monkeypatch.setattr(reference, "ROWS", 16)
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 41, 8).double(), torch.randn(2, 2, 37, 8).double()
    bias = None if bias_shape is None else torch.randn(bias_shape).double()
    row_weights = torch.rand(2, 2, 4, 41).double()
    visible = torch.rand(2, 4, 41, 37) < 0.6
    visible[:, :, 5] = False
    sinks = torch.randn(4).double() if "sinks" in modified else None
    table = torch.randn(4, 21).double() if "table" in modified else None
    softcap = 1.5 if "softcap" in modified else None
    leaves = [t.requires_grad_() for t in (query, key, bias, row_weights, sinks, table) if t is not None]
    parts = [part for part in (bias, None if table is None else RelativeBias(table, "top_left")) if part is not None]
    found = attention_statistics(
        query, key, mask=visible, bias=parts or None, want=("entropy", "received"), row_weights=row_weights,
        softcap=softcap, sinks=sinks, backend=backend,
    )  # fmt: skip
    scores = query @ key.repeat_interleave(2, 1).mT * 8**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores + (0 if bias is None else bias)
    apart = torch.arange(37) - torch.arange(41)[:, None]
    scores = scores if table is None else scores + table[:, apart.clamp(-10, 10) + 10]
    scores = scores.masked_fill(~visible, -1e300)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(2, 4, 41, 1)], -1)
    P = torch.softmax(scores, -1)[..., :37] * visible
    entropy = -(P * torch.log(torch.where(P > 0, P, 1))).sum(-1)
    weighted = torch.einsum("bhqk,rbhq->rbhk", P, row_weights)
    cotangents = [torch.randn_like(t) for t in (entropy, P.sum(2), weighted)]
    right = torch.autograd.grad((entropy, P.sum(2), weighted), leaves, cotangents)
    got = torch.autograd.grad((found.entropy, found.received, found.received_weighted), leaves, cotangents)
    for number, (a, b) in enumerate(zip(got, right, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=number: f"leaf {n}: {m}")


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_memory_of_gradients_is_linear(name: str) -> None:
    """The largest tensor of forward and backward grows with the length, not with its square."""

    class Allocations(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                self.largest = max(self.largest, made.numel())
            return made

    def largest(length: int) -> int:
        query, key = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(2))
        want = ("entropy", "received", "map", "shares", "distance")
        with Allocations() as seen:
            found = attention_statistics(query, key, want=want, is_causal=True, backend=name, map_block=length // 16)
            (found.entropy.sum() + found.received.square().sum()).backward()
        return seen.largest

    assert largest(2048) <= 2.1 * largest(1024)


def test_what_is_hidden_has_no_influence(backend: str) -> None:
    if left_out(backend):
        pytest.skip(left_out(backend))
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 70, 8), torch.randn(2, 2, 70, 8)
    padding = torch.arange(70) < torch.tensor([[50], [70]])
    found = attention_statistics(
        query, key, key_mask=padding, row_weights=torch.ones(2, 1, 1), map_block=10, backend=backend
    )
    poisoned = key.masked_fill(~padding[:, None, :, None], torch.nan)
    again = attention_statistics(
        query, poisoned, key_mask=padding, row_weights=torch.ones(2, 1, 1), map_block=10, backend=backend
    )
    for a, b in zip(found[:9], again[:9], strict=True):
        if isinstance(a, torch.Tensor):
            # numpy, which interprets, may round a product by the place of its operands
            assert torch.equal(a, b) if backend != "triton" else torch.allclose(a, b, rtol=1e-6)
    assert found.received[0, :, 50:].eq(0).all()
    torch.testing.assert_close(found.received_weighted[0], found.received, rtol=1e-6, atol=1e-6)


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


def test_of_equal_weights_the_first_key_comes_first(backend: str) -> None:
    if left_out(backend):
        pytest.skip(left_out(backend))
    query, key = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 200, 4)
    found = attention_statistics(query, key, want=("top",), top_k=5, backend=backend)
    assert found.top_keys.tolist() == [[[[0, 1, 2, 3, 4]] * 3]]
    window = SlidingWindow(left=150, right=0, alignment="bottom_right")  # whole tiles come before those that it cuts
    found = attention_statistics(query, key, mask=window, want=("top",), top_k=2, backend=backend)
    assert found.top_keys.tolist() == [[[[47, 48], [48, 49], [49, 50]]]]


@pytest.mark.parametrize("map_block", [1, 3, 7, 16, 60, 64, 100, 128, 200, 1000])
def test_maps_of_every_block(map_block: int, backend: str) -> None:
    if left_out(backend):
        pytest.skip(left_out(backend))
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 150, 8), torch.randn(1, 1, 190, 8)
    listed = torch.rand(1, 2, 150, 190) < 0.3
    found = attention_statistics(query, key, mask=listed, want=("map",), map_block=map_block, backend=backend)
    P = torch.softmax((query @ key.mT / 8**0.5).masked_fill(~listed, -torch.inf), -1)
    P = torch.nn.functional.pad(P, (0, -190 % map_block, 0, -150 % map_block))
    right = P.unflatten(2, (-1, map_block)).unflatten(4, (-1, map_block)).sum((3, 5))
    torch.testing.assert_close(found.map, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 31, 32, 70])
def test_many_weightings_and_many_sets(count: int, backend: str) -> None:
    if left_out(backend):
        pytest.skip(left_out(backend))
    torch.manual_seed(0)
    query, key, rows = torch.randn(2, 2, 50, 8), torch.randn(2, 2, 70, 8), torch.rand(count, 2, 2, 50)
    sets = {str(n): torch.rand(2, 70) < 0.5 for n in range(min(count, 32))}
    found = attention_statistics(
        query, key, want=("received", "shares", "top"), row_weights=rows, key_sets=sets, top_k=min(count, 32),
        backend=backend,
    )  # fmt: skip
    P = torch.softmax(query @ key.mT / 8**0.5, -1)
    torch.testing.assert_close(found.received_weighted, torch.einsum("bhqk,rbhq->rbhk", P, rows), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.received, P.sum(2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.top_weights, P.topk(min(count, 32)).values, rtol=1e-5, atol=1e-6)
    for name, members in sets.items():
        torch.testing.assert_close(found.shares[name], (P * members[:, None, None]).sum(-1), rtol=1e-5, atol=1e-6)


def test_a_low_rank_bias_is_a_part_of_the_scores(backend: str) -> None:
    if left_out(backend):
        pytest.skip(left_out(backend))
    torch.manual_seed(0)
    query, key, u, w = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(20, 3), torch.randn(1, 2, 20, 3)
    found = attention_statistics(query, key, bias=LowRankBias(u, w), is_causal=True, backend=backend)
    dense = attention_statistics(query, key, bias=u @ w.mT, is_causal=True, backend="reference")
    torch.testing.assert_close(found.entropy, dense.entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.received, dense.received, rtol=1e-4, atol=1e-5)


def test_rows_whose_bias_is_one_large_number(backend: str) -> None:
    """Their lse has no digit left for the number of keys; the weights do."""
    if left_out(backend):
        pytest.skip(left_out(backend))
    query, key = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 70, 8)
    found = attention_statistics(
        query, key, bias=torch.full((1, 1, 3, 1), -1e20), want=("received", "map"), backend=backend
    )
    torch.testing.assert_close(found.received, torch.full((1, 1, 70), 3 / 70))
    torch.testing.assert_close(found.map.sum(), torch.tensor(3.0))


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"want": ("entropie",)}, InputError, "want must be"),
        ({"want": "top"}, InputError, "want must be"),
        ({"want": None}, InputError, "want must be"),
        ({"want": 3}, InputError, "want must be"),
        ({"top_k": 2.5}, InputError, "whole number"),
        ({"map_block": 2.5}, InputError, "whole number"),
        ({"nearby": float("nan")}, InputError, "nearby"),
        ({"top_k": 33}, InputError, "top_k"),
        ({"top_k": 0}, InputError, "top_k"),
        ({"map_block": 0}, InputError, "map_block"),
        ({"key_sets": {"a": torch.ones(5)}, "causal_alignment": "top_left"}, InputTypeError, "bool tensor"),
        ({"key_sets": {"a": torch.ones(5, dtype=torch.bool)}, "causal_alignment": "top_left"}, InputError, r"\(30,\)"),
        ({"row_weights": torch.ones(3), "causal_alignment": "top_left"}, InputError, "row_weights"),
        ({"backend": "cuda", "causal_alignment": "top_left"}, InputError, "gathers no statistics"),
        ({"softcap": 0.0, "causal_alignment": "top_left"}, InputError, "softcap"),
        ({"sinks": torch.zeros(3), "causal_alignment": "top_left"}, InputError, "sinks"),
        ({"is_causal": True}, InputError, "ambiguous"),
        ({}, InputError, "distances between 20 queries and 30 keys"),
        ({"mask": BlockMask(20, 31)}, InputError, "31 keys"),
    ],
)
def test_refusals(arguments, error, text) -> None:
    query, key = torch.randn(1, 2, 20, 4), torch.randn(1, 2, 30, 4)
    with pytest.raises(error, match=text):
        attention_statistics(query, key, **arguments)


def test_refusals_of_backends() -> None:
    query = torch.randn(1, 2, 20, 4)
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(UnsupportedError, match="TRITON_INTERPRET"):
            attention_statistics(query, query, backend="triton")
    else:
        with pytest.raises(UnsupportedError, match="float64"):
            attention_statistics(query.double(), query.double(), backend="triton")
    meta = query.to("meta")
    with pytest.raises(UnsupportedError, match="without values"):
        attention_statistics(meta, meta)
    with pytest.raises(UnsupportedError, match="batching rule"):
        torch.func.vmap(lambda one: attention_statistics(one, one).entropy)(query[None])


def test_under_torch_compile_autocast_and_in_another_process(tmp_path) -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 2, 20, 4, requires_grad=True)
    loss = lambda q: (q * 2, attention_statistics(q * 2, q, want=("entropy", "received")).entropy.sum())[1]  # noqa: E731
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo does not know")
        compiled = torch.compile(loss, backend="eager")(query)
    torch.testing.assert_close(compiled, loss(query))
    torch.testing.assert_close(torch.autograd.grad(compiled, query), torch.autograd.grad(loss(query), query))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attention_statistics(query.detach(), query.detach())
    rounded = query.detach().bfloat16()
    assert (
        torch.equal(cast.entropy, attention_statistics(rounded, rounded).entropy)
        and cast.entropy.dtype == torch.float32
    )
    torch.save(query.detach(), tmp_path / "query.pt")
    program = (
        "import sys, torch; from efficient_attn.insight import attention_statistics as s; "
        "q = torch.load(sys.argv[1] + '/query.pt'); torch.save(s(q, q)._asdict(), sys.argv[1] + '/found.pt')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    here, there = attention_statistics(query.detach(), query.detach()), torch.load(tmp_path / "found.pt")
    assert all(
        torch.equal(there[name], getattr(here, name)) for name in ("lse", "entropy", "received", "top_keys", "map")
    )


@pytest.mark.parametrize("lengths", [(1, 1), (1, 9), (9, 1), (3, 9)])
def test_few_queries_and_keys(lengths, backend: str) -> None:
    """Those of a cache: the last queries, fewer keys than top_k, and rows that see nothing."""
    if left_out(backend):
        pytest.skip(left_out(backend))
    Nq, Nk = lengths
    query, key = torch.randn(2, 2, Nq, 8), torch.randn(2, 2, Nk, 8)
    found = attention_statistics(query, key, is_causal=True, causal_alignment="bottom_right", top_k=32, backend=backend)
    i, j = torch.arange(Nq)[:, None] + Nk - Nq, torch.arange(Nk)
    P = torch.softmax((query @ key.mT / 8**0.5).masked_fill(j > i, -torch.inf), -1).nan_to_num(0.0)
    assert found.top_keys.shape == (2, 2, Nq, 32) and found.top_keys.max() < Nk
    assert torch.equal((found.top_keys >= 0).sum(-1), (j <= i).sum(-1).clamp(max=32).expand(2, 2, Nq))
    torch.testing.assert_close(found.top_weights.sum(-1), P.sum(-1))
    torch.testing.assert_close(found.distance, (P * (i - j).abs()).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.largest, P.amax(-1))


@pytest.mark.parametrize("where", ["query", "key", "hidden key"])
def test_nan_stays_in_the_rows_that_see_it(where: str, backend: str, device: torch.device) -> None:
    if left_out(backend):
        pytest.skip(left_out(backend))
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 40, 16), torch.randn(1, 1, 40, 16)
    broken = torch.zeros(40, dtype=torch.bool)
    if where == "query":
        query[:, :, 7] = torch.nan
        broken[7] = True
    else:
        key[:, :, 30] = torch.nan
        broken[30 if where == "hidden key" else 0 :] = True
    found = attention_statistics(query.to(device), key.to(device), is_causal=where == "hidden key", backend=backend)
    for name in ("lse", "entropy", "distance", "nearby", "top_weights"):
        values = getattr(found, name)[0, 0].cpu()
        values = values if name == "top_weights" else values[:, None]
        assert (values.isnan() == broken[:, None]).all(), name
    assert ((found.top_keys[0, 0].cpu() == -1).all(-1) == broken).all()


@pytest.mark.parametrize("top_k", [1, 5, 32])
@pytest.mark.parametrize("order", ["rising", "falling", "equal", "random"])
def test_the_largest_weights_in_any_order_of_the_keys(
    order: str, top_k: int, backend: str, device: torch.device
) -> None:
    """Of equal weights the first key comes first, whatever stood in its place before."""
    if left_out(backend):
        pytest.skip(left_out(backend))
    torch.manual_seed(0)
    Nq, Nk = 33, 300
    scores = {
        "rising": torch.arange(Nk) / Nk,
        "falling": -torch.arange(Nk) / Nk,
        "equal": torch.zeros(Nk),
        "random": torch.randint(0, 9, (Nk,)) / 8,  # many ties
    }[order]
    query, key = torch.zeros(1, 1, Nq, 16), torch.zeros(1, 1, Nk, 16)
    query[..., 0], key[..., 0] = 1, scores
    found = attention_statistics(
        query.to(device), key.to(device), scale=1.0, top_k=top_k, want=("top",), backend=backend
    )
    right = scores.softmax(0).sort(stable=True, descending=True)
    assert (found.top_keys.cpu() == right.indices[:top_k]).all()
    torch.testing.assert_close(found.top_weights[0, 0].cpu(), right.values[:top_k].expand(Nq, -1))
