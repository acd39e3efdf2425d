"""What the conformance cases do not ask of the CUDA kernels, run by test_cuda_emulator.py in the emulator."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.kernel_checks import POISONED, KernelChecks, masked, results
from support.kernel_checks import draw as draw_float32

from efficient_attn import BlockMask, SlidingWindow, UnsupportedError, attention
from efficient_attn.backends.cuda import attention as cuda
from efficient_attn.backends.cuda import schedule

pytestmark = pytest.mark.interpreter
N = 140
CAPABILITY = int(os.environ.get("EFFICIENT_ATTN_CUDA_EMULATOR_CAPABILITY", "80"))


class TestKernels(KernelChecks):
    backend, n, dtype = "cuda", N, torch.bfloat16
    rtol, atol = 3e-2, 3e-2


CHECKS = TestKernels()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return draw_float32(*shape, seed=seed).bfloat16()


def results_in_place(name: str, tensors: list[torch.Tensor], grad_out: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = attention(*leaves, is_causal=True, backend=name)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def assert_the_same_bits(
    tensors: list[torch.Tensor], grad_out: torch.Tensor, schedules: int = 4, **arguments: Any
) -> None:
    """Under every schedule of the threads."""
    found = []
    for number in range(schedules):
        cuda.kernels().set_schedule(number)
        found.append(results("cuda", tensors, grad_out, **arguments))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_the_same_bits_under_every_schedule() -> None:
    tensors, grad_out = [draw(1, h, N, 40, seed=h) for h in (4, 2, 2)], draw(1, 4, N, 40, seed=3)
    arguments = {
        "mask": masked("blocks", N)["mask"],
        "bias": draw(1, 1, 1, N, seed=5),
        "dropout_p": 0.3,
        "dropout_seed": 7,
    }
    assert_the_same_bits(tensors, grad_out, **arguments)


# --- few queries: their keys are shared by several blocks of threads ---

FEW = {"causal": {"is_causal": True, "causal_alignment": "bottom_right"}, "bits": {}, "bias": {}}


def few(kind: str) -> tuple[list[torch.Tensor], torch.Tensor, dict]:
    """6 queries of 4 heads over 600 keys of 2 heads, hidden in some way."""
    tensors = [draw(1, 4, 6, 24), draw(1, 2, 600, 24, seed=1), draw(1, 2, 600, 40, seed=2)]
    hidden = torch.rand(6, 600, generator=torch.Generator().manual_seed(3)) < 0.5
    hidden[:, 598] = True
    arguments = {"bits": {"mask": ~hidden}, "bias": {"bias": torch.zeros(6, 600).masked_fill(hidden, -torch.inf)}}
    return tensors, draw(1, 4, 6, 40, seed=3), FEW[kind] | arguments.get(kind, {})


@pytest.mark.parametrize("kind", FEW)
def test_few_queries_and_nan_stays_with_those_who_see_it(kind: str) -> None:
    tensors, grad_out, arguments = few(kind)
    for key in (20, 300, 597):
        tensors[2][:, :, key, key % 40] = torch.nan
    if kind != "causal":
        tensors[1][:, 1, 598] = torch.nan
    CHECKS.against_the_reference(tensors, grad_out, **arguments)


def test_few_queries_give_the_same_bits_under_every_schedule() -> None:
    tensors, grad_out, arguments = few("bits")
    assert_the_same_bits(tensors, grad_out, **arguments)


@pytest.mark.parametrize(("heads", "queries"), [(8, 1), (4, 9)])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_few_queries_read_each_key_once_and_without_a_bank_conflict(D: int, heads: int, queries: int) -> None:
    q, k, v = draw(2, heads, queries, D), draw(2, 1, 1024, D, seed=1), draw(2, 1, 1024, D, seed=2)
    cuda.kernels().reset_counters()
    attention(q, k, v, backend="cuda")
    counted = cuda.kernels().counters()
    assert counted["launches"] == 2  # the parts, and what joins them
    chunks = counted["cp.async"]["calls"] * 32
    tiles = counted["blocks"] - 2 * heads * queries  # one block joins a row
    assert chunks == (2 * 2 * 1024 + tiles * (16 if heads * queries <= 16 else 64)) * D // 8
    assert not any(c["conflicts"] for c in counted.values() if isinstance(c, dict)), counted


def test_no_bank_conflict() -> None:
    cuda.kernels().reset_counters()
    for D, Dv in ((64, 64), (128, 100), (200, 256)):
        tensors = [draw(1, 1, 70, D), draw(1, 1, 70, D, seed=1), draw(1, 1, 70, Dv, seed=2)]
        results("cuda", tensors, draw(1, 1, 70, Dv, seed=3), bias=draw(1, 70, seed=4))
    counted = {name: c for name, c in cuda.kernels().counters().items() if isinstance(c, dict)}
    assert not any(c["conflicts"] for c in counted.values()), counted
    for name in ("ldmatrix", "ldmatrix.trans", "cp.async", "cp.async.32", "mma.bf16", "st.shared.32", "ld.shared.128"):
        assert counted[name]["calls"] > 0, name


# --- what goes to Hopper's kernels ---

HOPPER_BLOCKS = ((64, 80), (144, 112), (128, 256))


@pytest.fixture
def hopper() -> Iterator[None]:
    cuda.kernels().set_capability(90)
    cuda.kernels().reset_counters()
    yield
    cuda.kernels().set_capability(CAPABILITY)


def multiplies() -> int:
    return cuda.kernels().counters()["wgmma"]["calls"]


def listed(block_size: tuple[int, int], q_len: int, kv_len: int, density: float = 0.5) -> BlockMask:
    """Blocks with bits, full ones and none."""
    bq, bk = block_size
    kinds = torch.rand(q_len // bq + 1, kv_len // bk + 1, generator=torch.Generator().manual_seed(6))
    bits = torch.rand(q_len, kv_len, generator=torch.Generator().manual_seed(5)) < density
    kind = kinds.repeat_interleave(bq, 0).repeat_interleave(bk, 1)[:q_len, :kv_len]
    return BlockMask.from_dense(torch.where(kind < 0.3, bits, kind < 0.7), block_size=block_size)


def close_to_the_reference(tensors: list[torch.Tensor], grad_out: torch.Tensor, **arguments: Any) -> None:
    before = multiplies()
    ours, expected = (results(name, tensors, grad_out, **arguments) for name in ("cuda", "reference"))
    assert multiplies() > before
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=3e-2, atol=3e-2, equal_nan=True)


@pytest.mark.parametrize("block_size", HOPPER_BLOCKS, ids=str)
def test_hopper_walks_blocks_that_are_no_tiles(hopper: None, block_size: tuple[int, int]) -> None:
    tensors = [draw(1, 2, 300, 64), draw(1, 1, 420, 64, seed=1), draw(1, 1, 420, 40, seed=2)]
    close_to_the_reference(tensors, draw(1, 2, 300, 40, seed=3), mask=listed(block_size, 300, 420))


# D, keys, mask -> products of the forward: 2 consumers, steps, those of the scores and of the values
WIDE_STEPS = {
    (128, 350, "dense"): 2 * 2 * (8 + 11), (128, 350, "lengths"): 2 * 2 * (8 + 11), (104, 176, "dense"): 2 * (8 + 11),
    (128, 350, "causal"): 2 * 3 * (8 + 8), (128, 130, "dense"): 2 * (8 + 11), (128, 120, "dense"): 2 * (8 + 8),
    (256, 150, "dense"): 2 * 2 * (16 + 5), (256, 230, "causal"): 2 * 3 * (16 + 5),
    (200, 310, "window"): 2 * 4 * (16 + 5), (256, 190, "list"): 2 * 2 * 3 * (16 + 4),
}  # fmt: skip


@pytest.mark.parametrize(("D", "keys", "mask"), WIDE_STEPS)
def test_hopper_takes_wide_steps_where_nothing_cuts_them_short(hopper: None, D: int, keys: int, mask: str) -> None:
    q, k, v = draw(1, 1, 100, D), draw(1, 1, keys, D, seed=1), draw(1, 1, keys, D, seed=2)
    arguments: dict[str, Any] = {
        "causal": {"is_causal": True, "causal_alignment": "bottom_right"},
        "lengths": {"mask": BlockMask.from_lengths(torch.tensor([keys - 7]), q_len=100, kv_len=keys)},
        "window": {"mask": SlidingWindow(left=220, right=9, alignment="bottom_right").block_mask(100, keys)},
        "list": {"mask": BlockMask.from_dense(torch.ones(100, keys, dtype=torch.bool), block_size=(64, 64))},
    }.get(mask, {})
    ours = attention(q, k, v, backend="cuda", **arguments)
    assert multiplies() == WIDE_STEPS[D, keys, mask]
    expected = attention(q, k, v, backend="reference", **arguments)
    torch.testing.assert_close(ours, expected, rtol=3e-2, atol=3e-2)


def test_hopper_keeps_a_hidden_nan_away(hopper: None) -> None:
    q, k, v = (draw(2, 1, 200, 64, seed=s) for s in range(3))
    cases = {
        "lengths": BlockMask.from_lengths(torch.tensor([POISONED, 200]), q_len=200, kv_len=200),
        "list": listed((64, 64), 200, 200),
    }
    v[:, :, POISONED] = torch.nan
    k[:, :, POISONED + 1] = torch.inf
    grad_out = draw(2, 1, 200, 64, seed=3)
    grad_out[:, :, POISONED + 2] = torch.nan
    for mask in cases.values():
        close_to_the_reference([q, k, v], grad_out, mask=mask)


def test_hopper_gives_the_same_bits_under_every_schedule(hopper: None) -> None:
    tensors, grad_out = [draw(1, h, 300, 128, seed=h) for h in (4, 2, 2)], draw(1, 4, 300, 128, seed=3)
    assert_the_same_bits(tensors, grad_out, schedules=6, is_causal=True)
    assert multiplies() > 0


def test_hopper_has_no_bank_conflict(hopper: None) -> None:
    for D, Dv in ((64, 64), (128, 104), (200, 256)):
        tensors = [draw(1, 1, 70, D), draw(1, 1, 70, D, seed=1), draw(1, 1, 70, Dv, seed=2)]
        results("cuda", tensors, draw(1, 1, 70, Dv, seed=3))
    counted = {name: c for name, c in cuda.kernels().counters().items() if isinstance(c, dict)}
    assert not any(c["conflicts"] for c in counted.values()), counted
    for name in ("wgmma", "tensor_load", "st.shared.32", "st.shared.128", "ld.shared.64", "ld.shared.128"):
        assert counted[name]["calls"] > 0, name


@pytest.fixture
def any_order(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFICIENT_ATTN_CUDA_ANY_ORDER", "1")


def sums() -> int:
    return cuda.kernels().counters()["bulk_add"]["calls"]


@pytest.mark.parametrize(
    "mask", ["list", *(pytest.param(mask, marks=pytest.mark.slow) for mask in ("causal", "lengths"))]
)
def test_one_pass_is_close_to_the_reference(any_order: None, mask: str) -> None:
    tensors = [draw(2, 4, 200, 80), draw(2, 2, 300, 80, seed=1), draw(2, 2, 300, 128, seed=2)]
    grad_out = draw(2, 4, 200, 128, seed=3)
    tensors[1][:, :, 290], grad_out[:, :, 150] = torch.inf, torch.nan
    arguments = {
        "causal": {"is_causal": True, "causal_alignment": "bottom_right"},
        "list": {"mask": listed((64, 128), 200, 300)},
        "lengths": {"mask": BlockMask.from_lengths(torch.tensor([100, 257]), q_len=200, kv_len=300)},
    }[mask]
    close_to_the_reference(tensors, grad_out, **arguments)
    assert sums() > 0


def test_one_pass_only_where_it_serves(any_order: None, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, grad_out = [draw(1, 1, 70, 128, seed=s) for s in range(3)], draw(1, 1, 70, 128, seed=3)
    for narrow in (True, False):
        part = slice(64 if narrow else 128)
        results("cuda", [t[..., part].contiguous() for t in tensors], grad_out[..., part].contiguous())
        assert (sums() == 0) == narrow
    listing = listed((64, 64), 70, 70)
    choices = ((1, 0, listing, True), (0, 0, listing, False), (0, 0, None, True), (0, 1, None, False))
    for any_order, two_passes, mask, serves in choices:
        monkeypatch.setenv("EFFICIENT_ATTN_CUDA_ANY_ORDER", str(any_order))
        monkeypatch.setenv("EFFICIENT_ATTN_CUDA_TWO_PASSES", str(two_passes))
        before = sums()
        results("cuda", tensors, grad_out, mask=mask)
        assert (sums() > before) == serves


ORDERED = {
    "dense": (130, 300, {}),
    "causal": (300, 300, {"is_causal": True}),
    "lengths": (200, 300, {"mask": BlockMask.from_lengths(torch.tensor([257]), q_len=200, kv_len=300)}),
    "window": (300, 420, {"mask": SlidingWindow(left=150, right=33, alignment="bottom_right").block_mask(300, 420)}),
    "few keys": (330, 130, {"mask": SlidingWindow(left=50, right=3, alignment="top_left").block_mask(330, 130)}),
}
# Processors, blocks of threads that run at once, and which of them goes on where one waits: any, the next, the one with
# the latest ticket (which waits for all others), the one with the earliest.
EXECUTIONS = (
    (3, 3, 0), (3, 3, 1), (3, 3, 2), (3, 3, 3), (5, 2, 2), (5, 5, 2), (9, 4, 2), (9, 9, 0), (1, 1, 0), (3, 1, 0),
)  # fmt: skip
ALWAYS = (("causal", 4), ("few keys", 1))  # what is not slow


@functools.cache
def in_order(mask: str, number: int) -> list[torch.Tensor]:
    """Results of one pass, in an execution."""
    queries, keys, arguments = ORDERED[mask]
    tensors = [draw(1, 4, queries, 72), draw(1, 2, keys, 72, seed=1), draw(1, 2, keys, 88, seed=2)]
    processors, together, policy = EXECUTIONS[number]
    before = sums()
    try:
        cuda.kernels().set_multiprocessors(processors)
        cuda.kernels().set_together(together, policy)
        cuda.kernels().set_schedule(number)
        found = results("cuda", tensors, draw(1, 4, queries, 88, seed=3), **arguments)
    finally:
        cuda.kernels().set_multiprocessors(3)
        cuda.kernels().set_together(3, 0)
    assert sums() > before
    return found


@pytest.mark.parametrize(
    ("mask", "number"),
    [
        pytest.param(mask, number, marks=() if (mask, number) in ALWAYS else pytest.mark.slow)
        for mask in ORDERED for number in range(1, len(EXECUTIONS))
    ],
)  # fmt: skip
def test_one_pass_in_a_fixed_order_never_stops_and_gives_the_same_bits(hopper: None, mask: str, number: int) -> None:
    """Whoever goes on, and however many run at once; also where fewer run than there are blocks of threads."""
    first, found = in_order(mask, 0), in_order(mask, number)
    assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@pytest.mark.parametrize("mask", ORDERED)
def test_one_pass_in_a_fixed_order_is_close_to_the_reference(hopper: None, mask: str) -> None:
    queries, keys, arguments = ORDERED[mask]
    tensors = [draw(1, 4, queries, 72), draw(1, 2, keys, 72, seed=1), draw(1, 2, keys, 88, seed=2)]
    expected = results("reference", tensors, draw(1, 4, queries, 88, seed=3), **arguments)
    for mine, theirs in zip(in_order(mask, 0), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=3e-2, atol=3e-2)


# --- who does which tile ---


@pytest.mark.parametrize("D", [64, pytest.param(256, marks=pytest.mark.slow)])
def test_who_does_a_tile_changes_no_bit(hopper: None, D: int) -> None:
    """A block of threads for each tile, or a few that draw from the counter."""
    tensors, grad_out = [draw(1, h, 300, D, seed=h) for h in (2, 1, 1)], draw(1, 2, 300, D, seed=3)
    found, draws = [], []
    try:
        for processors in (1000, 3, 1):
            cuda.kernels().set_multiprocessors(processors)
            cuda.kernels().reset_counters()
            found.append(results("cuda", tensors, grad_out, is_causal=True))
            draws.append(cuda.kernels().counters()["draw_ticket"]["calls"])
    finally:
        cuda.kernels().set_multiprocessors(3)
    assert draws[0] == 0 and min(draws[1:]) > 0
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.parametrize("heads", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_blocks_of_a_list_in_order_give_the_same_bits(
    hopper: None, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists of one head for all or of each, two batch elements, blocks of two tiles; also with every block reversed."""
    generator = torch.Generator().manual_seed(8)
    visible = torch.rand(2, heads, 530, 300, generator=generator) < 0.2
    visible &= (torch.rand(2, heads, 3, 1, generator=generator) < 0.8).repeat_interleave(256, 2)[:, :, :530]
    mask = BlockMask.from_dense(visible, block_size=(256, 128))
    lengths = {4: 530, 2: 300}
    tensors, grad_out = [draw(2, h, lengths[h], 64, seed=h) for h in (4, 2, 2)], draw(2, 4, 530, 64, seed=3)
    first = results("cuda", tensors, grad_out, mask=mask)
    assert cuda.kernels().counters()["draw_ticket"]["calls"] > 0
    order = schedule._order
    monkeypatch.setattr(schedule, "_order", lambda *given: order(*given).view(2, -1, 3).flip(2).flatten()
                        if given[0] is given[1].indptr else order(*given))  # fmt: skip
    second = results("cuda", tensors, grad_out, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for ours, expected in zip(first, results("reference", tensors, grad_out, mask=mask), strict=True):
        torch.testing.assert_close(ours, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("why", ["bias", "dropout", "scale", "rows", "expanded", "small blocks"])
def test_hopper_leaves_to_the_others(hopper: None, why: str) -> None:
    q, k, v = (draw(2, 2, 70, 16, seed=s) for s in range(3))
    arguments = {
        "bias": {"bias": draw(1, 70, seed=4)},
        "dropout": {"dropout_p": 0.3, "dropout_seed": 7},
        "scale": {"scale": -0.3},
        "small blocks": {"mask": listed((32, 64), 70, 70)},
    }.get(why, {})
    if why == "rows":
        k = draw(2, 2, 70, 20, seed=1)[..., :16]  # rows begin on 8 bytes
    if why == "expanded":
        v = v[:1].expand(2, -1, -1, -1)
    ours, expected = (attention(q, k, v, backend=name, **arguments) for name in ("cuda", "reference"))
    torch.testing.assert_close(ours, expected, rtol=3e-2, atol=3e-2)
    assert multiplies() == 0


def test_aligned_rows_whose_last_chunk_is_ragged() -> None:
    wide = [draw(1, 2, N, 24, seed=s) for s in range(3)]
    for tensor in wide:
        tensor[..., 20:] = torch.nan
    tensors, grad_out = [t[..., :20] for t in wide], draw(1, 2, N, 20, seed=3)
    ours = results_in_place("cuda", tensors, grad_out)
    for mine, expected in zip(ours, results_in_place("reference", tensors, grad_out), strict=True):
        torch.testing.assert_close(mine, expected, rtol=3e-2, atol=3e-2)


def test_float32_is_refused_with_a_reason() -> None:
    q = torch.zeros(1, 1, 8, 8)
    with pytest.raises(UnsupportedError, match="these tensors are float32"):
        attention(q, q, q, backend="cuda")
