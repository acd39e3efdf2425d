"""Dense self-attention with its projections in one step (efficient_attn/self_attention.py) is that of the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from efficient_attn import MultiheadAttention
from efficient_attn.backends.cpu.attention import MISSING
from efficient_attn.self_attention import LONG, Kind, Plan, by_steps, plan_of

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the CPU kernels are what is tested: {MISSING}")
E, H, L, N = 24, 3, 7, 2


def module(dtype: torch.dtype = torch.float32, **options: Any) -> MultiheadAttention:
    torch.manual_seed(0)
    made = MultiheadAttention(E, H, batch_first=True, dtype=dtype, **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (N, L, E)), generator=torch.Generator().manual_seed(3)).to(dtype)


def tensors_of(m: MultiheadAttention, x: Tensor) -> tuple[Tensor | None, ...]:
    return x, m.in_proj_weight, m.in_proj_bias, m.out_proj.weight, m.out_proj.bias


def steps(
    m: MultiheadAttention, x: Tensor, weights: Any = None, is_causal: bool = False
) -> tuple[Tensor, Tensor | None]:
    sizes = (x.shape[0], x.shape[1])
    kind = Kind(sizes, H, E // H, m.batch_first, x.dtype, weights, is_causal)
    return by_steps(*tensors_of(m, x), kind)  # type: ignore[arg-type]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Kind]:
    """The kinds of the steps that were made as one."""
    found: list[Kind] = []
    run = Plan._run

    def counted(self: Plan, *arguments: Any, **options: Any) -> Any:
        found.append(self.kind)
        return run(self, *arguments, **options)

    monkeypatch.setattr(Plan, "_run", counted)
    return found


@pytest.mark.parametrize("weights", [None, "mean", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 7, 150, LONG + 3])
def test_values_are_those_of_the_steps(
    weights: Any, dtype: torch.dtype, batch_first: bool, bias: bool, length: int, taken: list[Kind]
) -> None:
    m = module(dtype, bias=bias)
    m.batch_first = batch_first
    x = drawn(N, length, E, dtype=dtype)
    with torch.no_grad():
        out, found = m(x, x, x, need_weights=weights is not None, average_attn_weights=weights != "each")
        expected, expected_weights = steps(m, x, weights)
    assert len(taken) == 1 and torch.equal(out, expected)
    assert (found is None) == (expected_weights is None)
    assert found is None or expected_weights is None or torch.equal(found, expected_weights)


@pytest.mark.parametrize("weights", [None, "mean"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "frozen", ["", "x", "in_proj_weight", "in_proj", "out_proj", "all but x", "all but out_proj.bias"]
)
def test_gradients_are_those_of_the_steps(
    weights: Any, batch_first: bool, bias: bool, frozen: str, taken: list[Kind]
) -> None:
    m = module(torch.float64, bias=bias)
    m.batch_first = batch_first
    x = drawn(dtype=torch.float64).requires_grad_(frozen not in ("x", "all but out_proj.bias"))
    for name, parameter in m.named_parameters():
        left = frozen.removeprefix("all but ")
        parameter.requires_grad_(left != name if "all" in frozen and left == name else not name.startswith(left or "-"))
        if frozen.startswith("all but"):
            parameter.requires_grad_(name == left)
    leaves = [t for t in tensors_of(m, x) if t is not None and t.requires_grad]
    if not leaves:
        pytest.skip("nothing has a gradient")

    def gradients(made: tuple[Tensor, Tensor | None]) -> tuple[Tensor, ...]:
        total = (made[0] * drawn(dtype=torch.float64)).sum()
        if made[1] is not None:
            total = total + (made[1] * torch.arange(made[1].shape[-1], dtype=torch.float64)).square().sum()
        return torch.autograd.grad(total, leaves)

    found = gradients(m(x, x, x, need_weights=weights is not None))
    assert len(taken) == 1
    for a, b in zip(found, gradients(steps(m, x, weights)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_promised_causal_mask(taken: list[Kind]) -> None:
    m, x = module(), drawn().requires_grad_()
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    out, _ = m(x, x, x, need_weights=False, attn_mask=mask, is_causal=True)
    assert len(taken) == 1 and taken[0].is_causal
    expected, _ = m(x, x, x, need_weights=False, attn_mask=mask)
    torch.testing.assert_close(out, expected)
    (found,), (wanted,) = (torch.autograd.grad(o.square().sum(), x) for o in (out, expected))
    torch.testing.assert_close(found, wanted)


def test_second_derivatives() -> None:
    m, x = module(torch.float64), drawn(1, 4, E, dtype=torch.float64).requires_grad_()

    def call(x: Tensor, weight: Tensor) -> Any:
        m.in_proj_weight = torch.nn.Parameter(weight, requires_grad=False)  # the parameter of the module stays a leaf
        return torch.func.functional_call(m, {"in_proj_weight": weight}, (x, x, x))

    assert torch.autograd.gradgradcheck(call, (x, m.in_proj_weight.detach()[:].requires_grad_()), fast_mode=True)


def test_a_gradient_of_the_weights_alone() -> None:
    m, x = module(torch.float64), drawn(dtype=torch.float64).requires_grad_()
    (found,) = torch.autograd.grad(m(x, x, x)[1].square().sum(), x)
    (expected,) = torch.autograd.grad(steps(m, x, "mean")[1].square().sum(), x)  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected)


def test_many_gradients_at_once() -> None:
    m, x = module(torch.float64), drawn(1, 3, E, dtype=torch.float64).requires_grad_()
    out = m(x, x, x, need_weights=False)[0].flatten()
    seeds = torch.eye(out.numel(), dtype=torch.float64)
    (batched,) = torch.autograd.grad(out, x, seeds, is_grads_batched=True, retain_graph=True)
    single = torch.stack([torch.autograd.grad(out, x, seed, retain_graph=True)[0] for seed in seeds])
    torch.testing.assert_close(batched, single)


def test_saved_tensors_that_come_back_laid_out_anew() -> None:
    m, x = module(), drawn().requires_grad_()

    def anew(t: Tensor) -> Tensor:
        return t.flip(0).contiguous().flip(0) if t.dim() == 0 else t.mT.contiguous().mT if t.dim() > 1 else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, anew):
        out = m(x, x, x, need_weights=False)[0]
    (found,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(steps(m, x)[0].square().sum(), x)
    torch.testing.assert_close(found, expected)


STATES: dict[str, Callable[[MultiheadAttention, Tensor], Any]] = {
    "autocast": lambda m, x: _under(torch.autocast("cpu", dtype=torch.bfloat16), m, x),
    "profiler": lambda m, x: _under(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), m, x),
    "vmap": lambda m, x: torch.func.vmap(lambda y: m(y, y, y, need_weights=False)[0])(x[:, None]).squeeze(1),
    "compiled": lambda m, x: torch.compile(m, backend="eager")(x, x, x, need_weights=False)[0],
    "checkpointed": lambda m, x: checkpoint(lambda y: m(y, y, y, need_weights=False)[0], x, use_reentrant=False),
    "inference": lambda m, x: _under(torch.inference_mode(), m, x),
    "strides": lambda m, x: m(*[x.mT.contiguous().mT] * 3, need_weights=False)[0],
}


def _under(context: Any, m: MultiheadAttention, x: Tensor) -> Tensor:
    with context:
        return m(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("state", STATES)
def test_whatever_looks_on(state: str) -> None:
    m, x = module(), drawn()
    found = STATES[state](m, x)
    theirs = m.to_torch()
    expected = _under(torch.autocast("cpu", dtype=torch.bfloat16, enabled=state == "autocast"), theirs, x)
    tolerance = {"rtol": 5e-2, "atol": 1e-1} if state == "autocast" else {"rtol": 1e-4, "atol": 1e-5}
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, **tolerance)
    if state in ("checkpointed", "vmap", "strides", "compiled"):
        found.square().sum().backward()
        got = m.in_proj_weight.grad
        m.in_proj_weight.grad = None
        expected.square().sum().backward()
        torch.testing.assert_close(got, m.in_proj_weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        "hook",
        "adapter",
        "dropout",
        "kdim",
        "bias_kv",
        "zero",
        "padding",
        "mask",
        "cross",
        "unbatched",
        "sliding_window:left=1,right=1",
    ],
)
def test_what_is_more_goes_step_by_step(case: str, taken: list[Kind]) -> None:
    options: dict[str, dict[str, Any]] = {
        "dropout": {"dropout": 0.5}, "kdim": {"kdim": E, "vdim": E + 1}, "bias_kv": {"add_bias_kv": True},
        "zero": {"add_zero_attn": True}, "sliding_window:left=1,right=1": {"attention": case},
    }  # fmt: skip
    m, x = module(**options.get(case, {})), drawn()
    if case == "hook":
        m.out_proj.register_forward_hook(lambda module, inputs, out: 2 * out)
    if case == "adapter":
        m.out_proj = type("Adapter", (torch.nn.Linear,), {})(E, E)
    if case == "kdim":
        m(x, x, drawn(N, L, E + 1))
    elif case == "padding":
        m(x, x, x, key_padding_mask=torch.zeros(N, L, dtype=torch.bool))
    elif case == "mask":
        m(x, x, x, attn_mask=torch.zeros(L, L))
    elif case == "cross":
        m(x, x + 1, x + 1)
    elif case == "unbatched":
        m(x[0], x[0], x[0])
    else:
        m(x, x, x)
    assert not taken


def test_wrong_shapes_are_the_parents_errors() -> None:
    m = module()
    for x in (drawn(N, L, E + 1), drawn(1, N, L, E)):
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            m(x, x, x)
    with pytest.raises(RuntimeError, match="dtype"):
        m(*[drawn().double()] * 3)
    for empty in (drawn(0, L, E), drawn(N, 0, E)):
        assert m(empty, empty, empty)[0].shape == empty.shape


def test_other_backends_have_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from efficient_attn.backends import cpu

    plan_of.cache_clear()
    monkeypatch.setattr(cpu.attention, "MISSING", "not there")
    try:
        assert plan_of(Kind((2, 3), 2, 4, True, torch.float32, None, False)) is None
    finally:
        plan_of.cache_clear()
