"""Returned weights stand on the way of the output's gradient, as in plain PyTorch, for every method and every model.
Their average over the heads stands beside it: it costs no memory of all heads, and nothing in a backward without it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_attn import MultiheadAttention, attention, attention_weights
from efficient_attn.functional import attention_with_weights
from efficient_attn.methods import METHODS, parse
from efficient_attn.models import TextClassifier, TextClassifierConfig, TransformerConfig

SPECS = [
    *sorted(METHODS),
    "nystrom:landmarks=8,conv=5",
    "linformer:rank=8,share=none",
    "sliding_window:left=8,right=8+nystrom:landmarks=8",
    "sliding_window:left=8,right=8+performer:features=16",
    "sliding_window:left=8,right=8+centroid",
]


@pytest.mark.parametrize("spec", SPECS)
def test_values_and_gradients_are_those_without_weights(spec: str) -> None:
    torch.manual_seed(0)
    method = parse(spec)
    state = method.build(32, 2, 8, dtype=torch.float64)
    if state is not None:
        with torch.no_grad():
            for parameter in state.parameters():
                parameter.normal_()
    inputs = [torch.randn(2, h, 64, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    key_mask = torch.ones(2, 64, dtype=torch.bool)
    key_mask[1, 50:] = False
    leaves = [*inputs, *(() if state is None else state.parameters())]
    plain, _ = method.attend(*inputs, state=state, key_mask=key_mask)
    out, weights = method.attend(*inputs, state=state, key_mask=key_mask, need_weights=True)
    assert weights is not None
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(out)
    (of_weights,) = torch.autograd.grad(out, weights, grad, retain_graph=True)
    torch.testing.assert_close(of_weights, grad @ inputs[2].repeat_interleave(2, 1).mT)
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    right = torch.autograd.grad(plain, leaves, grad, allow_unused=True)
    for ours, expected in zip(found, right, strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("spec", SPECS)
def test_the_average_is_that_of_the_heads(spec: str) -> None:
    torch.manual_seed(0)
    method = parse(spec)
    state = method.build(32, 2, 8, dtype=torch.float64)
    q, k, v = (torch.randn(2, h, 64, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    key_mask = torch.ones(2, 64, dtype=torch.bool)
    key_mask[1, 50:] = False
    call = {"state": state, "key_mask": key_mask, "dropout_p": 0.2, "dropout_seed": 5}
    (out, mean), (right, weights) = (method.attend(q, k, v, **call, need_weights=n) for n in ("mean", True))
    assert mean is not None and weights is not None and mean.shape == (2, 64, 64)
    torch.testing.assert_close(out, right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, weights.mean(1), rtol=1e-12, atol=1e-12)
    assert torch.autograd.grad(out.sum(), mean, retain_graph=True, allow_unused=True) == (None,)
    cotangents = torch.randn_like(out), torch.randn_like(mean)
    found = torch.autograd.grad((out, mean), (q, k, v), cotangents, allow_unused=True)
    expected = torch.autograd.grad((right, weights.mean(1)), (q, k, v), cotangents, allow_unused=True)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


class Backward(TorchDispatchMode):
    """Whether each backward of ours got a gradient of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.of_weights: list[bool] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is torch.ops.efficient_attn.attention_backward.default:
            self.of_weights.append(arguments[2] is not None)
        return function(*arguments, **(keywords or {}))


def test_a_loss_that_leaves_the_weights_alone_pays_nothing_for_them() -> None:
    module, x = MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 6, 16)
    out, weights = module(x, x, x)
    with Backward() as seen:
        out.sum().backward(retain_graph=True)
        (out.sum() + weights.square().sum()).backward()
    assert seen.of_weights == [False, True]


def test_the_bits_do_not_depend_on_the_threads() -> None:
    """Which decide on the queries of a tile."""
    q, k, v = (torch.randn(1, 3, n, 24) for n in (130, 300, 300))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 40):
            torch.set_num_threads(threads)
            results.append((*attention_with_weights(q, k, v, average=True), attention_weights(q, k)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(results[0][0], attention(q, k, v))


def test_scores_beside_a_large_number(backend: str) -> None:
    """Where lse has no digit left for the number of keys."""
    if backend not in ("cpu", "reference"):
        pytest.skip("it rebuilds weights from lse")
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 40, 8)
    weights = attention_weights(q, k, bias=torch.full((1, 1, 5, 40), -1e30), backend=backend)
    torch.testing.assert_close(weights, torch.full((1, 2, 5, 40), 1 / 40))


MEMORY = """
import resource, torch
from efficient_attn import attention_weights
q = torch.randn(1, 12, 4096, 16)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
attention_weights(q[:, :, :256], q, average=True)
before = peak()
weights = attention_weights(q, q, average=True)
print((peak() - before) / weights.nbytes)
"""


def test_an_average_takes_no_memory_of_all_heads() -> None:
    """The largest resident memory of a process, over that of the result: twelve heads would be twelve."""
    pytest.importorskip("efficient_attn._cpu")
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert float(run.stdout) < 1.3, run.stdout + run.stderr


@pytest.mark.parametrize("hidden", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "spec", ["dense", "sliding_window:left=3,right=3", "linear", "linformer:rank=4", "nystrom:landmarks=4"]
)
def test_what_padding_holds_reaches_no_gradient(spec: str, hidden: float) -> None:
    method = parse(spec)
    state = method.build(16, 2, 8)
    key_mask = torch.ones(1, 12, dtype=torch.bool)
    key_mask[:, 9:] = False
    q, k, v = (torch.randn(1, 2, 12, 8) for _ in range(3))
    k[:, :, 9:], v[:, :, 9:] = hidden, hidden
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out, _ = method.attend(q, k, v, state=state, key_mask=key_mask, need_weights=True)
    found = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(gradient.isfinite().all() for gradient in (out, *found))
    assert not found[1][:, :, 9:].any() and not found[2][:, :, 9:].any()


@pytest.mark.parametrize("causal", [True, False])
def test_what_a_mask_hides_reaches_no_gradient(causal: bool) -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (12, 13 if causal else 12, 13 if causal else 12))
    if causal:  # no query sees the last key
        k[:, :, 12], v[:, :, 12] = torch.nan, torch.nan
        options = {"is_causal": True, "causal_alignment": "top_left"}
    else:
        q[:, :, 3], k[:, :, 5], v[:, :, 5] = torch.nan, torch.inf, torch.nan
        mask = torch.ones(12, 12, dtype=torch.bool)
        mask[3], mask[:, 5] = False, False
        options = {"mask": mask[None, None]}
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out, _ = parse("dense").attend(q, k, v, need_weights=True, **options)
    found = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(tensor.isfinite().all() for tensor in (out, *found))


def test_the_module_returns_weights_that_the_output_depends_on() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 16, requires_grad=True)
    module = MultiheadAttention(16, 4, batch_first=True)
    out, weights = module(x, x, x, average_attn_weights=False)
    weights.retain_grad()
    out.square().sum().backward()
    plain = nn.MultiheadAttention(16, 4, batch_first=True)
    plain.load_state_dict(module.state_dict())
    (expected,) = torch.autograd.grad(plain(x, x, x)[0].square().sum(), x)
    assert weights.grad is not None and weights.grad.abs().max() > 0
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


def test_an_own_model() -> None:
    encoder = TransformerConfig(hidden_dim=32, num_layers=2, num_heads=4)
    model = TextClassifier(TextClassifierConfig(vocab_size=50, max_len=32, encoder=encoder, num_labels=3)).eval()
    outputs = model.inspect(torch.randint(3, 49, (2, 10)), need_weights=True)
    assert_relevance(outputs.weights, outputs.last.square().sum())


@pytest.mark.parametrize("spec", ["", ":sliding_window:left=2,right=2", ":linear"])
def test_a_transformers_model(spec: str) -> None:
    transformers = pytest.importorskip("transformers")
    from efficient_attn.integrations import huggingface

    huggingface.register()
    gradients = {}
    for implementation in ("eager", f"efficient_attn{spec}"):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            attn_implementation=implementation,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config).eval().double()
        outputs = model(torch.arange(3, 13)[None], output_attentions=True)
        gradients[implementation] = assert_relevance(outputs.attentions, outputs.logits[0, 1])
    if not spec:
        torch.testing.assert_close(gradients["efficient_attn"], gradients["eager"])


def assert_relevance(weights: list[Tensor] | tuple[Tensor, ...], score: Tensor) -> list[Tensor]:
    for layer in weights:
        layer.retain_grad()
    score.backward()
    found = [layer.grad for layer in weights]
    assert len(found) == 2 and all(gradient is not None and gradient.abs().max() > 0 for gradient in found)
    return found
