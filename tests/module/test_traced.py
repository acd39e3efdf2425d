"""torch.jit.trace: a traced program is right for other lengths and paddings than its sample's, or tracing raises."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficient_attn import SlidingWindow, attention
from efficient_attn.errors import UnsupportedError
from efficient_attn.functional import padded_attention
from efficient_attn.methods import METHODS, parse
from efficient_attn.models import TextClassifier, TextClassifierConfig, TransformerConfig

TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


def trace(function: Callable[..., Any], *sample: Any) -> Callable[..., Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(function, sample, check_trace=False)


def inputs(B: int, Nq: int, Nk: int) -> list[Tensor]:
    return [torch.randn(B, heads, n, 8) for heads, n in ((4, Nq), (2, Nk), (2, Nk))]


def padding(B: int, N: int, *, whole: bool) -> Tensor:
    """The first row whole, one padded at the end, one in the middle, one everywhere; or no padding at all."""
    mask = torch.ones(B, N, dtype=torch.bool)
    if not whole:
        mask[1, N - 2 :], mask[2, 1:3], mask[3] = False, False, False
    return mask


CALLS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda q, k, v, pad: attention(q, k, v),
    "key_mask": lambda q, k, v, pad: padded_attention(q, k, v, pad),
    "key_mask_causal": lambda q, k, v, pad: padded_attention(
        q, k, v, pad, is_causal=True, causal_alignment="bottom_right"
    ),
    "top_left": lambda q, k, v, pad: attention(q, k, v, is_causal=True, causal_alignment="top_left"),
    "bool_mask": lambda q, k, v, pad: attention(q, k, v, mask=pad[:, None, None]),
    "mask_and_causal": lambda q, k, v, pad: attention(
        q, k, v, mask=pad[:, None, None], is_causal=True, causal_alignment="bottom_right"
    ),
    "bias": lambda q, k, v, pad: attention(q, k, v, bias=torch.where(pad, 0.5, -torch.inf)[:, None, None]),
    "method": lambda q, k, v, pad: parse("dense").attend(q, k, v, key_mask=pad)[0],
}


@pytest.mark.parametrize("whole", [True, False], ids=["unpadded_sample", "padded_sample"])
@pytest.mark.parametrize("name", CALLS)
def test_dense_attention_is_traced_for_every_length(name: str, whole: bool) -> None:
    traced = trace(CALLS[name], *inputs(4, 5, 6), padding(4, 6, whole=whole))
    for Nq, Nk in ((5, 6), (3, 9), (1, 7)):
        for pad in (padding(4, Nk, whole=True), padding(4, Nk, whole=False)):
            given = inputs(4, Nq, Nk)
            torch.testing.assert_close(traced(*given, pad), CALLS[name](*given, pad), rtol=1e-5, atol=1e-6)


def test_padding_is_kept_out_whatever_it_holds() -> None:
    traced = trace(CALLS["key_mask"], *inputs(4, 5, 6), padding(4, 6, whole=True))
    q, k, v = inputs(4, 5, 6)
    pad = padding(4, 6, whole=False)
    k[1, :, 4:], v[1, :, 4:] = torch.nan, torch.inf
    torch.testing.assert_close(traced(q, k, v, pad), CALLS["key_mask"](q, k, v, pad), rtol=1e-5, atol=1e-6)


def test_a_large_negative_bias_beside_halves() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q, k, v, bias=bias)

    q, k, v = (t.half() for t in inputs(1, 3, 4))
    bias = torch.full((1, 1, 3, 4), -1e9)
    torch.testing.assert_close(trace(call, q, k, v, bias)(q, k, v, bias), call(q, k, v, bias), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [{"mask": SlidingWindow(left=2, right=2)}, {"dropout_p": 0.1}, {"return_lse": True}],
    ids=["pattern", "dropout", "lse"],
)
def test_what_would_be_frozen_raises(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"torch\.jit\.trace"):
        trace(lambda q, k, v: attention(q, k, v, **options), *inputs(1, 4, 4))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_other_methods_raise(name: str) -> None:
    method = parse(name)
    state = method.build(32, 4, 8)
    x = torch.randn(1, 4, 64, 8)
    if method.is_dense:
        return
    with pytest.raises(UnsupportedError, match=r"torch\.jit\.trace"):
        trace(lambda q: method.attend(q, q, q, state=state)[0], x)


class Hidden(nn.Module):
    """A model called with (ids, mask), its first output alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        result = self.model(ids, attention_mask=mask)
        return result if isinstance(result, Tensor) else result[0]


def text_classifier() -> nn.Module:
    encoder = TransformerConfig(hidden_dim=32, num_layers=2, num_heads=4)
    return TextClassifier(TextClassifierConfig(vocab_size=50, max_len=32, encoder=encoder, num_labels=3))


def transformers_model(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    from efficient_attn.integrations import huggingface

    huggingface.register()
    config = getattr(transformers, f"{name}Config")(**TEXT, attn_implementation="efficient_attn")
    return getattr(transformers, f"{name}Model")(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "TextClassifier": text_classifier,
    "BERT": lambda: transformers_model("Bert"),
    "Llama": lambda: transformers_model("Llama"),
}


@pytest.mark.parametrize("whole", [True, False], ids=["unpadded_sample", "padded_sample"])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_traced_for_other_paddings_and_lengths(name: str, whole: bool) -> None:
    torch.manual_seed(0)
    model = Hidden(MODELS[name]()).eval()
    ids = torch.randint(3, 49, (2, 10))
    mask = torch.ones_like(ids)
    padded = mask.clone()
    padded[1, 6:] = 0
    with torch.no_grad():
        traced = trace(model, ids, mask if whole else padded)
        for used in (mask, padded):
            assert_same_tokens(traced(ids, used), model(ids, used), used)
        longer = torch.randint(3, 49, (2, 13))
        used = torch.ones_like(longer)
        used[0, 9:] = 0
        assert_same_tokens(traced(longer, used), model(longer, used), used)


def assert_same_tokens(found: Tensor, right: Tensor, mask: Tensor) -> None:
    """Equal where there are tokens; padding's own outputs are nobody's."""
    if found.dim() == 3:
        found, right = found[mask.bool()], right[mask.bool()]
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
