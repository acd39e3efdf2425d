"""Inside nn.Transformer and its layers: called in every mode, never bypassed, equal where it must be equal."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from efficient_attn import multihead
from efficient_attn.multihead import MultiheadAttention, replace_attention

SPARSE = "sliding_window:left=2,right=2"
E, H = 16, 4
N, L, S = 3, 10, 8
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True"
)


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, **options)


def calls_of(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count the runs of our forward, from inside (hooks would themselves switch the fast path off)."""
    calls: list[str] = []
    inner = MultiheadAttention.forward

    def counting(self: MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
        calls.append(str(self.attention))
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(MultiheadAttention, "forward", counting)
    return calls


def same(layer: nn.Module) -> nn.Module:
    return layer


def pickled(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("through", [same, copy.deepcopy, pickled])
@pytest.mark.parametrize("built", ["replaced", "constructed"])
def test_the_encoder_layer_calls_us_in_every_mode(
    training: bool, grad: bool, through: Callable[[nn.Module], nn.Module], built: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = encoder_layer()
    plain = copy.deepcopy(layer)
    if built == "replaced":
        replace_attention(layer, SPARSE)
    else:
        layer.self_attn = MultiheadAttention(E, H, batch_first=True, attention=SPARSE)
        layer.self_attn.load_state_dict(plain.self_attn.state_dict())
    layer = through(layer).train(training)
    calls = calls_of(layer, monkeypatch)
    x = torch.randn(N, L, E)
    with torch.set_grad_enabled(grad):
        found = layer(x)
    assert len(calls) == 1
    far = (torch.arange(L)[:, None] - torch.arange(L)).abs() > 2
    assert_close(found, plain.train()(x, src_mask=far), **CLOSE)


def test_the_parent_would_have_been_bypassed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap itself: without our hook the layer computes dense attention. If this fails, PyTorch has changed."""
    layer = encoder_layer().eval()
    replace_attention(layer, SPARSE)
    layer.self_attn._forward_pre_hooks.clear()
    calls = calls_of(layer, monkeypatch)
    with torch.no_grad():
        layer(torch.randn(N, L, E))
    assert calls == []


@pytest.mark.parametrize("attention", ["dense", SPARSE, "nystrom:landmarks=4", "performer:features=64"])
@pytest.mark.parametrize("lengths", [(10, 10, 10), (10, 4, 7), (3, 2, 1)], ids=str)
def test_encoder_with_padding_turns_it_into_nested_tensors(
    attention: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = nn.TransformerEncoder(encoder_layer(), 2)
    encoder = copy.deepcopy(plain)
    replace_attention(encoder, attention)
    padding = torch.arange(L) >= torch.tensor(lengths)[:, None]
    x = torch.randn(N, L, E)
    expected = encoder.train()(x, src_key_padding_mask=padding)
    nested: list[bool] = []
    inner = multihead.module.forward_nested
    monkeypatch.setattr(multihead.module, "forward_nested", lambda *args: nested.append(True) or inner(*args))
    with torch.no_grad():
        found = encoder.eval()(x, src_key_padding_mask=padding)
    assert len(nested) == 2
    assert found.shape == x.shape and (found[padding] == 0).all()
    if attention == "nystrom:landmarks=4":
        # Padding to another length moves Nystrom's landmarks: an approximation of the same thing, not the same number.
        assert torch.isfinite(found).all()
    else:
        assert_close(found[~padding], expected[~padding], **CLOSE)
    if attention == "dense":
        with torch.no_grad():
            assert_close(found, plain.eval()(x, src_key_padding_mask=padding), **CLOSE)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_swapped_transformer_has_the_same_outputs_and_gradients(
    batch_first: bool, training: bool, norm_first: bool
) -> None:
    torch.manual_seed(0)
    plain = nn.Transformer(E, H, 2, 2, 32, dropout=0.0, batch_first=batch_first, norm_first=norm_first).train(training)
    swapped = copy.deepcopy(plain)
    assert len(replace_attention(swapped, "dense")) == 6
    source, target = (torch.randn((N, n, E) if batch_first else (n, N, E)) for n in (S, L))
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(L),
        "src_key_padding_mask": torch.arange(S) >= torch.tensor([8, 5, 3])[:, None],
        "memory_key_padding_mask": torch.arange(S) >= torch.tensor([8, 5, 3])[:, None],
        "tgt_is_causal": True,
    }
    results = []
    for model in (plain, swapped):
        leaves = [source.clone().requires_grad_(), target.clone().requires_grad_()]
        output = model(*leaves, **masks)
        torch.manual_seed(1)
        loss = (output * torch.randn(output.shape)).sum()
        results.append([output, *torch.autograd.grad(loss, [*leaves, *model.parameters()])])
    for found, expected in zip(results[1], results[0], strict=True):
        assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("attention", ["dense", SPARSE, "performer:features=64"])
@pytest.mark.parametrize("padded", [True, False])
def test_decoder_is_causal(attention: str, padded: bool) -> None:
    """What comes later has no influence, with the mask taken as a mask or as a promise, and the modes agree."""
    torch.manual_seed(0)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 32, dropout=0.0, batch_first=True), 2)
    replace_attention(decoder, attention)
    target, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    padding = torch.zeros(N, L, dtype=torch.bool) if padded else None

    def run(target: Tensor) -> Tensor:
        return decoder(target, memory, tgt_mask=mask, tgt_key_padding_mask=padding, tgt_is_causal=True)

    changed = target.clone()
    changed[:, 6:] += 1.0
    before, after = run(target), run(changed)
    assert_close(before[:, :6], after[:, :6], **CLOSE)
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-2)
    with torch.no_grad():
        assert_close(decoder.eval()(target, memory, tgt_mask=mask, tgt_key_padding_mask=padding), before, **CLOSE)


@pytest.mark.parametrize("attention", ["dense", SPARSE, "performer:features=64"])
def test_compiled_encoder(attention: str) -> None:
    torch._dynamo.reset()
    encoder = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False).eval()
    replace_attention(encoder, attention)
    x = torch.randn(N, L, E)
    padding = torch.arange(L) >= torch.tensor([10, 4, 7])[:, None]
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, expected = (module(x, src_key_padding_mask=padding) for module in (compiled, encoder))
    assert_close(found, expected, **CLOSE)


def test_patched_constructors_build_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.modules.transformer, "MultiheadAttention", MultiheadAttention)
    layer = encoder_layer()
    assert type(layer.self_attn) is MultiheadAttention and MultiheadAttention.__mro__[1] is nn.MultiheadAttention


def test_training_through_a_checkpointed_layer() -> None:
    layer = encoder_layer()
    replace_attention(layer, SPARSE)
    x = torch.randn(N, L, E, requires_grad=True)
    direct = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    output = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    again = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])
    for found, expected in zip(again, direct, strict=True):
        assert torch.equal(found, expected)
