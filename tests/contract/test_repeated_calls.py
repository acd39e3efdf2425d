"""A call like one before skips its checks (efficient_attn/repeated.py): whatever else changes must still be seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from efficient_attn import (
    BigBird,
    BlockMask,
    InputError,
    MultiheadAttention,
    SlidingWindow,
    UnsupportedError,
    attention,
    repeated,
)
from efficient_attn.methods import parse
from efficient_attn.patterns import PATTERNS, Pattern

NQ, D = 7, 16


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*(shape or (2, 4, NQ, D)), generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    repeated._known.clear(), repeated._listed.clear()
    yield
    repeated._known.clear(), repeated._listed.clear()


def hits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was run from the table from now on."""
    found: list[Any] = []
    run = repeated.run

    def counted(*arguments: Any) -> Any:
        found.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(repeated, "run", counted)
    return found


def uncached(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(repeated, "find", lambda key: None)
        return call()


def parts(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def test_the_third_call_is_found_and_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = hits(monkeypatch)
    q, k, v = drawn(), drawn(2, 2, 9, D), drawn(2, 2, 9, 5)
    first = attention(q, k, v, return_lse=True)
    attention(q, k, v)
    again = attention(q, k, v, return_lse=True)
    alone = attention(q, k, v)
    assert len(found) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[0], alone) and alone.is_contiguous()


Q, K, V = drawn(), drawn(2, 4, 9, D), drawn(2, 4, 9, D)
LAST = SlidingWindow(left=3, right=0, alignment="bottom_right")

# One thing that differs from attention(Q, K, V, mask=LAST), which was made before: arguments, and a context.
CHANGES: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "same": lambda: ((Q, K, V), {"mask": LAST}),
    "other values": lambda: ((Q + 1, K, V), {"mask": LAST}),
    "dtype": lambda: ((Q.double(), K.double(), V.double()), {"mask": LAST}),
    "bfloat16": lambda: ((Q.bfloat16(), K.bfloat16(), V.bfloat16()), {"mask": LAST}),
    "float16": lambda: ((Q.half(), K.half(), V.half()), {"mask": LAST}),
    "gradient of the query": lambda: ((Q.clone().requires_grad_(), K, V), {"mask": LAST}),
    "gradient of the value": lambda: ((Q, K, V.clone().requires_grad_()), {"mask": LAST}),
    "strides": lambda: ((Q.transpose(1, 2).contiguous().transpose(1, 2), K, V), {"mask": LAST}),
    "last stride": lambda: ((Q.mT.contiguous().mT, K, V), {"mask": LAST}),
    "expanded": lambda: ((Q[:, :1].expand_as(Q), K, V), {"mask": LAST}),
    "offset": lambda: ((torch.cat([Q, Q + 1])[1:3], K, V), {"mask": LAST}),
    "negative view": lambda: ((torch._neg_view(Q), K, V), {"mask": LAST}),
    "grouped": lambda: ((Q, K[:, :2], V[:, :2]), {"mask": LAST}),
    "fewer keys": lambda: ((Q, K[:, :, :8], V[:, :, :8]), {"mask": LAST}),
    "no mask": lambda: ((Q, K, V), {}),
    "another mask": lambda: ((Q, K, V), {"mask": dataclasses.replace(LAST, left=2)}),
    "an equal mask": lambda: ((Q, K, V), {"mask": dataclasses.replace(LAST)}),
    "block mask": lambda: ((Q, K, V), {"mask": BlockMask(NQ, 9).with_causal("top_left")}),
    "bool mask": lambda: ((Q, K, V), {"mask": torch.ones(NQ, 9, dtype=torch.bool).tril()}),
    "causal": lambda: ((Q, K, V), {"mask": LAST, "is_causal": True, "causal_alignment": "top_left"}),
    "scale": lambda: ((Q, K, V), {"mask": LAST, "scale": 0.5}),
    "integer scale": lambda: ((Q, K, V), {"mask": LAST, "scale": 1}),
    "bias": lambda: ((Q, K, V), {"mask": LAST, "bias": drawn(NQ, 9)}),
    "dropout": lambda: ((Q, K, V), {"mask": LAST, "dropout_p": 0.4, "dropout_seed": 3}),
    "another dropout seed": lambda: ((Q, K, V), {"mask": LAST, "dropout_p": 0.4, "dropout_seed": 4}),
    "lse": lambda: ((Q, K, V), {"mask": LAST, "return_lse": True}),
    "backend": lambda: ((Q, K, V), {"mask": LAST, "backend": "reference"}),
    "parameter": lambda: ((torch.nn.Parameter(Q, requires_grad=False), K, V), {"mask": LAST}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_change_is_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        attention(Q, K, V, mask=LAST)
    arguments, options = CHANGES[change]()
    for _ in range(3):  # the last may be found itself
        got = attention(*arguments, **options)
        expected = uncached(lambda: attention(*arguments, **options), monkeypatch)
        for a, b in zip(parts(got), parts(expected), strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype and a.requires_grad == b.requires_grad


@pytest.mark.parametrize(
    "state",
    [
        "no_grad", "enable_grad", "inference_mode", "autocast", "autocast_off", "threads", "default_dtype",
        "default_device", "deterministic", "profiler", "vmap", "grad", "compiled", "fake", "dispatch_mode",
        "function_mode", "forward_mode",
    ],
)  # fmt: skip
def test_one_state_of_the_process_is_seen(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = Q.clone().requires_grad_()
    for _ in range(3):
        plain = attention(Q, K, V)

    def call() -> Any:
        if state in ("no_grad", "enable_grad", "inference_mode"):
            with getattr(torch, state)():
                return attention(q, K, V)
        if state.startswith("autocast"):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=state == "autocast"):
                return attention(Q, K, V)
        if state == "threads":
            before = torch.get_num_threads()
            try:
                torch.set_num_threads(1)
                return attention(Q, K, V)
            finally:
                torch.set_num_threads(before)
        if state == "default_dtype":
            try:
                torch.set_default_dtype(torch.float64)
                return attention(Q, K, V)
            finally:
                torch.set_default_dtype(torch.float32)
        if state == "default_device":
            with torch.device("meta"):
                return attention(Q, K, V)
        if state == "deterministic":
            torch.use_deterministic_algorithms(True)
            try:
                return attention(Q, K, V)
            finally:
                torch.use_deterministic_algorithms(False)
        if state == "profiler":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
                return attention(Q, K, V)
        if state == "vmap":
            return torch.func.vmap(attention)(Q[:, None], K[:, None], V[:, None]).squeeze(1)
        if state == "grad":
            return torch.func.grad(lambda x: attention(x, K, V).sum())(Q)
        if state == "compiled":
            return torch.compile(lambda x: attention(x, K, V), backend="eager")(Q)
        if state == "fake":
            from torch._subclasses.fake_tensor import FakeTensorMode

            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                return tuple(attention(*(mode.from_tensor(x) for x in (Q, K, V))).shape)
        if state == "dispatch_mode":
            from torch.utils.flop_counter import FlopCounterMode

            with FlopCounterMode(display=False) as counter:
                attention(Q, K, V)
            return counter.get_total_flops()
        if state == "function_mode":
            from torch.overrides import BaseTorchFunctionMode

            with BaseTorchFunctionMode():
                return attention(Q, K, V)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(Q, Q)
            with pytest.raises(UnsupportedError, match="forward-mode"):
                attention(dual, K, V)
        return plain

    got, expected = call(), uncached(call, monkeypatch)
    if not isinstance(got, torch.Tensor):
        assert got == expected and got != 0
        return
    assert got.dtype == expected.dtype and got.requires_grad == expected.requires_grad
    assert got.device == expected.device and got.is_inference() == expected.is_inference()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert (got.dtype == torch.bfloat16) == (state == "autocast")
    assert got.requires_grad == (state == "enable_grad")


def test_a_negative_view_is_read_with_its_sign() -> None:
    for _ in range(3):
        attention(Q, K, V)
    assert torch.equal(attention(torch._neg_view(Q), K, V), attention(-Q, K, V))


def test_a_subclass_is_served_by_its_own_rules() -> None:
    class Counted(torch.Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counted.calls += 1
            return super().__torch_function__(function, types, args, kwargs or {})

    for _ in range(3):
        attention(Q, K, V)
    attention(Q.as_subclass(Counted), K, V)
    assert Counted.calls > 0


def test_an_error_is_raised_every_time() -> None:
    for _ in range(3):
        attention(Q, K, V)
    for _ in range(2):
        with pytest.raises(InputError, match="ambiguous"):
            attention(Q, K, V, is_causal=True)
        with pytest.raises(InputError, match="does not exist"):
            attention(Q, K, V, backend="nothing")
        with pytest.raises(InputError, match="expected query"):
            attention(Q, K, V[:, :, 1:])


def test_what_a_mask_holds_is_read_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = hits(monkeypatch)
    lengths = torch.tensor([9, 4], dtype=torch.int32)
    mask = BlockMask(NQ, 9, kv_lengths=lengths)
    before = [attention(Q, K, V, mask=mask) for _ in range(3)][2]
    lengths[0] = 2
    assert not torch.equal(attention(Q, K, V, mask=mask), before) and not found


def test_every_pattern_can_stand_in_a_key() -> None:
    assert all(isinstance(hash(kind()), int) for kind in PATTERNS.values() if isinstance(kind, type))
    assert issubclass(SlidingWindow, Pattern)


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated, "LIMIT", 4)
    for n in range(1, 12):
        for _ in range(2):
            attention(Q[:, :, :1], K[:, :, :1].expand(-1, -1, n, -1), V[:, :, :1].expand(-1, -1, n, -1))
        assert len(repeated._known) <= 4


def test_a_module_in_eval_mode_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = hits(monkeypatch)
    module = MultiheadAttention(16, 4, batch_first=True).eval()
    x = drawn(2, 5, 16)
    with torch.no_grad():
        first, _, third = (module(x, x[:], x[:], need_weights=False)[0] for _ in range(3))
    assert torch.equal(first, third) and len(found) == 1


def leaves() -> list[torch.Tensor]:
    return [x.clone().requires_grad_() for x in (Q, K, V)]


GRADIENTS: dict[str, Callable[[torch.Tensor, torch.Tensor, list[torch.Tensor]], Any]] = {
    "out": lambda out, lse, x: torch.autograd.grad((out * V[:, :, :NQ]).sum(), x),
    "expanded": lambda out, lse, x: torch.autograd.grad(out.sum(), x),
    "transposed": lambda out, lse, x: torch.autograd.grad((out.mT @ drawn(NQ, 5)).square().sum(), x),
    "lse": lambda out, lse, x: torch.autograd.grad(lse.square().sum(), x[:2]),
    "both": lambda out, lse, x: torch.autograd.grad(lse.square().sum() + out.square().sum(), x),
    "many at once": lambda out, lse, x: torch.autograd.grad(
        out, x, torch.stack([Q, Q + 1]).clone(), is_grads_batched=True
    ),
    "second": lambda out, lse, x: torch.autograd.grad(
        sum(g.square().sum() for g in torch.autograd.grad(out.square().sum(), x, create_graph=True)), x
    ),
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("hooked", [False, True])
def test_gradients_of_a_call_that_is_found(kind: str, hooked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def anew(t: torch.Tensor) -> torch.Tensor:
        return t.mT.contiguous().mT

    def gradients() -> Any:
        x = leaves()
        if hooked:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, anew):
                out, lse = attention(*x, mask=LAST, return_lse=True)
        else:
            out, lse = attention(*x, mask=LAST, return_lse=True)
        return GRADIENTS[kind](out, lse, x)

    expected = uncached(gradients, monkeypatch)
    for _ in range(2):
        attention(*leaves(), mask=LAST)
    found = hits(monkeypatch)
    for _ in range(2):  # the second finds the way back too
        for a, b in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(a, b)
    assert len(found) == 2


def test_a_checkpoint_makes_the_same_call_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second forward may be the first that is found, and must save what the first one saved."""
    from torch.utils.checkpoint import checkpoint

    def gradients() -> Any:
        x = leaves()
        return torch.autograd.grad(checkpoint(attention, *x, use_reentrant=False).square().sum(), x)

    expected = uncached(gradients, monkeypatch)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


@pytest.mark.parametrize("retain", [False, True])
def test_the_short_way_of_the_gradient_is_the_operators(retain: bool) -> None:
    """Past the dispatcher and through it: the same bits, values and gradients."""
    from efficient_attn.ops import attention as ops

    inputs = [x.clone().requires_grad_() for x in (Q, K, V)]
    bias = drawn(NQ, 9).requires_grad_()
    leaves = [*inputs, bias]

    def grads(out: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(out.square().sum(), leaves, retain_graph=retain))

    short = attention(*inputs, bias=bias, dropout_p=0.3, dropout_seed=5)
    long, _ = ops.attention_forward(
        *inputs,
        bias[None, None],
        *ops.operands(repeated.MaskArrays()),
        D**-0.5,
        0.3,
        torch.tensor(5),
        0.0,
        None,
        None,
        "cpu",
    )
    assert torch.equal(short, long)
    assert all(torch.equal(a, b) for a, b in zip(grads(short), grads(long), strict=True))


LISTED = (
    "axial:size=16x32",
    "strided:stride=32",
    "dilated:left=16,right=16,dilation=4",
    "neighborhood:kernel=5,size=16x32",
    "bigbird:block=64",
    "longformer:window=64,global_tokens=16",
)


@pytest.mark.parametrize("size", [1.0, 1e4], ids=["fine", "coarse"])  # beyond COARSE_LSE rows are mended
@pytest.mark.parametrize("spec", LISTED)
def test_lists_and_unions_are_found_with_the_same_bits(spec: str, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = hits(monkeypatch)
    pattern: Any = parse(spec)
    q, k, v = drawn(1, 4, 512, 8) * size, drawn(1, 2, 512, 8), drawn(1, 2, 512, 5)
    first = attention(q, k, v, mask=pattern.pattern, return_lse=True)
    attention(q, k, v, mask=pattern.pattern)
    again = attention(q, k, v, mask=pattern.pattern, return_lse=True)
    alone = attention(q, k, v, mask=pattern.pattern)
    assert len(found) == (2 if spec.partition(":")[0] != "longformer" else 0)  # which names a few rows in a part
    assert all(torch.equal(a, b) for a, b in zip((*first, first[0]), (*again, alone), strict=True))
    other = attention(q.requires_grad_(), k, v, mask=pattern.pattern)
    assert other.requires_grad and torch.equal(other, alone)


def test_few_lists_are_kept() -> None:
    q, k, v = drawn(1, 1, 64, 8), drawn(1, 1, 64, 8), drawn(1, 1, 64, 8)
    for seed in range(repeated.LISTED_LIMIT + 3):
        for _ in range(2):
            attention(q, k, v, mask=BigBird(block=16, random_blocks=1, seed=seed))
    kept = [entry for entry in repeated._known.values() if entry is not None and entry.arrays.indptr is not None]
    assert len(kept) == repeated.LISTED_LIMIT
