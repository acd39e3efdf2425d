"""torch.func on every method: grad and per-sample gradients are those of autograd, forward mode is one named error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vmap

from efficient_attn import MultiheadAttention, replace_attention
from efficient_attn.errors import UnsupportedError
from efficient_attn.methods import METHODS, parse

SPECS = [
    "dense",
    "sliding_window:left=2,right=2",
    "nystrom:landmarks=3",
    "linformer:rank=4",
    "linear",
    "performer:features=8",
]


def loss_of(module: MultiheadAttention, need_weights: bool):
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y = x[None]
        out, weights = functional_call(module, parameters, (y, y, y), {"need_weights": need_weights})
        return out.square().sum() + (weights.square().sum() if need_weights else 0.0)

    return loss


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_gradients_of_each_sample(spec: str, need_weights: bool) -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(16, 4, batch_first=True, attention=spec).eval()
    x = torch.randn(3, 6, 16)
    loss, parameters = loss_of(module, need_weights), dict(module.named_parameters())
    found = vmap(grad(loss), in_dims=(None, 0))({n: p.detach() for n, p in parameters.items()}, x)
    for n in range(3):
        right = torch.autograd.grad(loss(parameters, x[n]), list(parameters.values()), allow_unused=True)
        for (name, _), expected in zip(parameters.items(), right, strict=True):
            if expected is not None:
                torch.testing.assert_close(found[name][n], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_padding_of_each_sample_in_an_encoder(spec: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    replace_attention(encoder, spec)
    x, padding = torch.randn(3, 6, 16), torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:], padding[2, 5:] = True, True
    found = vmap(lambda y, p: encoder(y[None], src_key_padding_mask=p[None])[0])(x, padding)
    right = torch.cat([encoder(y[None], src_key_padding_mask=p[None]) for y, p in zip(x, padding, strict=True)])
    torch.testing.assert_close(found[~padding], right[~padding], rtol=1e-4, atol=1e-5)


def test_a_float_padding_that_is_more_than_padding_raises_under_vmap() -> None:
    module = MultiheadAttention(16, 4, batch_first=True, attention="linear").eval()
    x, padding = torch.randn(3, 6, 16), torch.zeros(3, 6)
    padding[2, 1] = 0.5
    with pytest.raises(UnsupportedError, match="float key_padding_mask"):
        vmap(lambda y, p: module(y[None], y[None], y[None], key_padding_mask=p[None], need_weights=False)[0])(
            x, padding
        )


@pytest.mark.parametrize("name", sorted(METHODS))
def test_forward_mode_is_a_named_error(name: str) -> None:
    method = parse(name)
    state = method.build(16, 2, 8)
    x = torch.randn(1, 2, 64, 8)  # refused before a pattern asks for more

    def call(y: Tensor) -> Tensor:
        return method.attend(y, y, y, state=state)[0].sum()

    for forward in (lambda: jvp(call, (x,), (x,)), lambda: jacfwd(call)(x), lambda: hessian(call)(x)):
        with pytest.raises(UnsupportedError, match="forward-mode"):
            forward()
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode"):
        call(forward_ad.make_dual(x, x))
