"""Observed models: what is seen is what was computed, and the outputs stay what they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from efficient_attn import InputError, MultiheadAttention, UnsupportedError, parse, replace_attention
from efficient_attn.insight import attention_times_gradient, method_statistics, observe, relevance, rollout

B, H, N, E = 2, 4, 24, 32


def own_encoder(attention: str = "dense", layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 48, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
    replace_attention(model, attention)
    return model


def torch_encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 48, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("make", [torch_encoder, own_encoder])
@pytest.mark.parametrize("grad", [True, False])
def test_an_encoder_with_padding(make, grad: bool) -> None:
    model, x = make(), torch.randn(B, N, E)
    padding = torch.arange(N) >= torch.tensor([[N], [N - 5]])
    with torch.set_grad_enabled(grad):
        plain = model(x, src_key_padding_mask=padding)
        with observe(model) as seen:
            watched = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(plain, watched)
    assert [layer.name for layer in seen.layers] == ["layers.0.self_attn", "layers.1.self_attn"] and not seen.left
    first = seen.layers[0].statistics
    _, weights = nn.MultiheadAttention.forward(
        torch_encoder().layers[0].self_attn, x, x, x, key_padding_mask=padding, average_attn_weights=False
    )
    torch.testing.assert_close(first.received, weights.sum(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.entropy, -torch.xlogy(weights, weights).sum(-1), rtol=1e-4, atol=1e-5)


def test_torch_multihead_attention_with_weights() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(E, H, batch_first=True)
    query, key = torch.randn(B, 7, E), torch.randn(B, N, E)
    with observe(model) as seen:
        out, weights = model(query, key, key, average_attn_weights=False)
    assert torch.equal(out, model(query, key, key)[0])
    (layer,) = seen.layers
    torch.testing.assert_close(layer.statistics.received, weights.sum(2), rtol=1e-4, atol=1e-5)
    assert layer.statistics.distance is None  # where the queries stand is not known


@pytest.mark.parametrize("spec", ["sliding_window:left=4,right=4", "bigbird", "topk_blocks", "sorted_buckets", "lsh"])
def test_a_sparse_method_is_seen_in_the_order_of_the_tokens(spec: str) -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(E, H, batch_first=True, attention=spec).eval()
    x = torch.randn(1, 150, E)
    _, weights = module(x, x, x, average_attn_weights=False)
    with observe(module) as seen:
        module(x, x, x, need_weights=False)
    torch.testing.assert_close(seen.layers[0].statistics.received, weights.sum(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "spec", ["linformer:rank=8", "nystrom:landmarks=8", "performer", "linear", "sliding_window+nystrom"]
)
def test_a_low_rank_method_is_known_by_its_products(spec: str) -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(E, H, batch_first=True, attention=spec).eval()
    x = torch.randn(1, 96, E)
    _, weights = module(x, x, x, average_attn_weights=False)
    with observe(module) as seen:
        module(x, x, x, need_weights=False)
    (layer,) = seen.layers
    torch.testing.assert_close(layer.statistics.received, weights.sum(2), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.statistics.shares["sinks"], weights[..., :4].sum(-1), rtol=1e-3, atol=1e-4)
    assert layer.statistics.entropy is None


def test_statistics_of_single_weights_are_refused_for_low_rank_methods() -> None:
    q = torch.randn(1, 2, 16, 8)
    with pytest.raises(UnsupportedError, match="entropy"):
        method_statistics(parse("linear"), q, q, want=("entropy",))


def test_grouped_queries_of_a_low_rank_method() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8)
    method = parse("nystrom:landmarks=8")
    state = method.build(16, 2, 8)
    _, weights = method.attend(query, key, key, state=state, need_weights=True)
    found = method_statistics(method, query, key, state=state)
    torch.testing.assert_close(found.received, weights.sum(2), rtol=1e-3, atol=1e-4)


def test_what_is_written_can_be_read_back(tmp_path) -> None:
    model, x = own_encoder(), torch.randn(B, N, E)
    with observe(model) as seen:
        model(x)
    with observe(model, to=tmp_path / "run") as written:
        model(x)
    assert all(layer.statistics is None for layer in written.layers)
    for a, b in zip(seen.layers, observe.load(tmp_path / "run"), strict=True):
        assert a.name == b.name and torch.equal(a.statistics.received, b.statistics.received)
        assert torch.equal(a.statistics.shares["sinks"], b.statistics.shares["sinks"])
    with pytest.raises(InputError, match="not empty"), observe(model, to=tmp_path / "run"):
        pass


def test_nothing_stays_behind_also_after_an_error() -> None:
    model = own_encoder()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(AssertionError), observe(model):
        model(torch.randn(B, N, E + 1))
    with observe(model) as seen:
        pass
    model(torch.randn(B, N, E))
    assert seen.layers == []
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


class Explicit(nn.Module):
    """Two layers of attention with their weights in the graph, for the n x n definitions."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        self.weights = []
        for layer in self.encoder.layers:
            attention = layer.self_attn
            q, k, v = (
                (x @ attention.in_proj_weight.mT + attention.in_proj_bias)
                .unflatten(-1, (3, H, E // H))
                .movedim(-3, 0)
                .transpose(2, 3)
            )
            P = torch.softmax(q @ k.mT * (E // H) ** -0.5, -1)
            P.retain_grad()
            self.weights.append(P)
            y = attention.out_proj((P @ v).transpose(1, 2).flatten(2))
            x = layer.norm1(x + y)
            x = layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))
        return x


@pytest.mark.parametrize("make", [torch_encoder, own_encoder])
def test_rollout_and_relevance_equal_their_formulas(make) -> None:
    model, x = make(), torch.randn(B, N, E)
    with observe(model, keep=True, want=()) as seen:
        model(x)[:, 0, 3].sum().backward()
    explicit = Explicit(torch_encoder())
    explicit(x)[:, 0, 3].sum().backward()
    rows = torch.zeros(B, N)
    rows[:, 0] = 1
    eye = torch.eye(N)
    flow = transport = eye
    for P in explicit.weights:
        flow = (0.5 * P.mean(1) + 0.5 * eye) @ flow
        transport = transport + (P * P.grad).clamp(min=0).mean(1) @ transport
    torch.testing.assert_close(rollout(seen.layers, rows), flow[:, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(relevance(seen.layers, rows), transport[:, 0], rtol=1e-4, atol=1e-6)
    P = explicit.weights[1]
    torch.testing.assert_close(attention_times_gradient(seen.layers[1]), (P * P.grad).sum(2), rtol=1e-4, atol=1e-6)


def test_relevance_says_what_is_missing() -> None:
    model, x = own_encoder(), torch.randn(B, N, E)
    rows = torch.zeros(B, N)
    with observe(model) as seen:
        model(x)
    with pytest.raises(InputError, match="not kept"):
        rollout(seen.layers, rows)
    with observe(model, keep=True) as seen:
        model(x)
    with pytest.raises(InputError, match="no gradient"):
        relevance(seen.layers, rows)
    with pytest.raises(InputError, match="rows must be"):
        rollout(seen.layers, rows[:, 1:])
    with pytest.raises(InputError, match="no layers"):
        rollout([], rows)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "efficient_attn"])
def test_models_of_transformers(implementation: str) -> None:
    transformers = pytest.importorskip("transformers")
    from efficient_attn.integrations import huggingface

    huggingface.register()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=E, num_attention_heads=H, num_hidden_layers=2, intermediate_size=48, vocab_size=50
    )
    model = transformers.BertModel(config).eval()
    tokens = torch.randint(0, 50, (B, N))
    padding = (torch.arange(N) < torch.tensor([[N], [15]])).long()
    model.set_attn_implementation("eager")
    weights = model(tokens, attention_mask=padding, output_attentions=True).attentions
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        plain = model(tokens, attention_mask=padding)
        with observe(model) as seen:
            watched = model(tokens, attention_mask=padding)
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(plain.last_hidden_state, watched.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert len(seen.layers) == 2 and seen.layers[0].name == "encoder.layer.0.attention.self"
    for layer, P in zip(seen.layers, weights, strict=True):
        torch.testing.assert_close(layer.statistics.received, P.sum(2), rtol=1e-4, atol=1e-5)
