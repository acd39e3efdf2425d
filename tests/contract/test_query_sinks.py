"""Sinks with a score for each query, against a softmax that has them as a column, in every backend and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_attn import SlidingWindow, attention, attention_weights
from efficient_attn.functional import attention_with_weights

B, Hq, Hkv, Nq, Nk, D = 2, 4, 2, 37, 53, 16


def drawn(dtype: torch.dtype, every: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, D), (B, Hq, Nq) if every else (Hq, Nq))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def definition(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, v = (x.repeat_interleave(Hq // Hkv, 1) for x in (k, v))
    scores = (q @ k.mT / D**0.5).masked_fill(~seen, -torch.inf)
    scores = torch.cat([scores, sinks.expand(B, Hq, Nq)[..., None]], -1)
    weights = scores.softmax(-1)[..., :-1]
    return weights @ v, scores.logsumexp(-1), weights


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equal_to_a_column_of_sinks(dtype: torch.dtype, every: bool, backend: str, device: torch.device) -> None:
    if (backend == "triton" and dtype == torch.float64) or (backend == "cuda" and dtype.itemsize > 2):
        pytest.skip("a dtype that it does not know")
    leaves = drawn(dtype, every)
    window = SlidingWindow(left=9, right=3, alignment="top_left")
    seen = window.block_mask(Nq, Nk).to_dense()
    given = [x.detach().to(device).requires_grad_() for x in leaves]
    found = attention(*given[:3], sinks=given[3], mask=window, return_lse=True, backend=backend)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = definition(*exact, seen)[:2]
    cotangents = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for x in expected]
    grads = torch.autograd.grad(found, given, [c.to(device, f.dtype) for c, f in zip(cotangents, found, strict=True)])
    wanted = torch.autograd.grad(expected, exact, [c.double() for c in cotangents])
    ours = [x.detach().cpu() for x in (*found, *grads)]
    assert ours[0].dtype == dtype and ours[-1].dtype == dtype and ours[-1].shape == leaves[3].shape
    limit = {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 4 * torch.finfo(dtype).eps)
    for a, b in zip(ours, (*expected, *wanted), strict=True):
        assert (a.double() - b).abs().max() <= limit * b.abs().max()


def test_no_keys_no_sink_and_nothing_but_the_sink() -> None:
    q, k, v, sinks = drawn(torch.float64, True)
    seen = torch.ones(Nq, Nk, dtype=torch.bool)
    seen[3] = seen[5] = False
    with torch.no_grad():
        sinks[:, :, 5] = sinks[:, :, 6] = -torch.inf  # neither key nor sink; no sink
        sinks[:, :, 7] = 1e4  # all of the weight
    out, lse = attention(q, k, v, sinks=sinks, mask=seen, return_lse=True)
    assert not out[:, :, [3, 5]].any() and torch.equal(lse[:, :, 3], sinks[:, :, 3]) and (lse[:, :, 5] < -1e300).all()
    torch.testing.assert_close(out[:, :, 6], attention(q, k, v)[:, :, 6])
    assert not out[:, :, 7].any() and (lse[:, :, 7] == 1e4).all()
    grads = torch.autograd.grad(out.sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum(), (q, k, v, sinks))
    assert all(torch.isfinite(g).all() for g in grads) and not grads[0][:, :, [3, 5]].any()


def test_weights_dropout_second_derivatives_and_compiled() -> None:
    q, k, v, sinks = (x.detach()[:, :, :7].clone() for x in drawn(torch.float64, True))
    named: dict[str, Any] = {"sinks": sinks, "dropout_p": 0.4, "dropout_seed": 3}
    out, lse, weights = attention_with_weights(q, k, v, **named)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), out)
    torch.testing.assert_close(attention(q, k, v, return_lse=True, **named), (out, lse))
    torch.testing.assert_close(attention_weights(q, k, average=True, **named), weights.mean(1))
    leaves = [x[:1, :, :3, :4].clone().requires_grad_() for x in (q, k, v)] + [
        sinks[:1, :, :3].clone().requires_grad_()
    ]
    call = lambda q, k, v, s: attention(q, k, v, sinks=s, return_lse=True)  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, call(*leaves))
    mapped = torch.vmap(lambda s: attention(q, k, v, sinks=s))(torch.stack([sinks, -sinks]))
    torch.testing.assert_close(mapped[1], attention(q, k, v, sinks=-sinks))
    alike = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)  # what the kernels know themselves
    torch.testing.assert_close(attention(q, k, v, sinks=alike[:, None].expand(4, 7)), attention(q, k, v, sinks=alike))


def test_inkling_2_attends_as_eager_does() -> None:
    modeling = pytest.importorskip("transformers.models.inkling2.modeling_inkling2")
    from efficient_attn.integrations.huggingface import attend
    from efficient_attn.methods import parse

    module = torch.nn.Module()
    module.num_key_value_groups, module.training = Hq // Hkv, False
    q, k, v, sinks = (x.detach() for x in drawn(torch.float64, True))
    bias = torch.randn(B, Hq, Nq, Nk, dtype=torch.float64)
    named = {"scaling": 0.3, "position_bias": bias, "sinks": sinks[..., None]}
    expected = modeling.eager_attention_forward(module, q, k, v, None, **named)[0]
    torch.testing.assert_close(
        attend(parse("dense"), module, q, k, v, None, **named)[0], expected, rtol=1e-5, atol=1e-6
    )
