"""Observed models: what is seen is what was computed, and the outputs stay what they are."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from efficient_attn import InputError, InputTypeError, MultiheadAttention, UnsupportedError, parse, replace_attention
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
    with observe(model, want=(), to=tmp_path / "names"):
        model(x)
    assert [call.name for call in observe.load(tmp_path / "names")] == [layer.name for layer in seen.layers]
    with pytest.raises(InputError, match="no folder"):
        observe.load(tmp_path / "none")


KILLED = """
import sys, torch
from torch import nn
from efficient_attn.insight import observe
model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
x = torch.randn(1, 64, 32)
with observe(model, to=sys.argv[1]) as seen:
    for step in range(10**6):
        model(x, x, x)
        if step == 5:
            print("five", flush=True)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_another_process_reads_what_a_running_and_an_ended_one_wrote(tmp_path, end) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "five\n"
        while_it_runs = list(observe.load(folder))
        process.send_signal(end)
        try:
            process.wait(60)
        finally:
            process.kill()  # or leaving this block waits for what never ends
    assert process.returncode != 0 and len(while_it_runs) >= 5
    afterwards = list(observe.load(folder))
    assert len(afterwards) >= len(while_it_runs) and len(list(folder.glob("*.part"))) <= 1
    for call in afterwards:
        torch.testing.assert_close(call.statistics.received.sum(-1), torch.full((1, 4), 64.0))


@pytest.mark.parametrize("compiled_before", [True, False])
@pytest.mark.parametrize("make", [torch_encoder, own_encoder])
def test_a_compiled_model_is_seen_and_stays_compiled(make, compiled_before: bool) -> None:
    torch._dynamo.reset()
    runs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            runs.append(1)
            return graph(*inputs)

        return run

    model, x = make(), torch.randn(B, N, E)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        plain = compiled(x) if compiled_before else model(x)
        with observe(model) as seen:
            watched = compiled(x)
        assert len(seen.layers) == 2 and not seen.left
        torch.testing.assert_close(plain, watched, rtol=1e-5, atol=1e-5)
        before = len(runs)
        compiled(x)
    assert len(runs) > before and (before > 0) == compiled_before


@pytest.mark.parametrize("make", [torch_encoder, own_encoder])
def test_tensors_without_values_are_counted_and_left(make) -> None:
    model, x = make(), torch.randn(B, N, E)
    with observe(model) as seen:
        torch.func.vmap(lambda one: model(one[None])[0])(x)
    assert not seen.layers and sum(seen.left.values()) == 2
    model.to("meta")
    with observe(model) as seen:
        model(x.to("meta"))
    assert not seen.layers and sum(seen.left.values()) == 2


def test_two_observers_see_the_same() -> None:
    model = nn.Sequential(torch_encoder(), own_encoder())
    with torch.no_grad(), observe(model) as outer, observe(model, want=("entropy",)) as inner:
        model(torch.randn(B, N, E))
    assert [call.name for call in outer.layers] == [call.name for call in inner.layers] and len(inner.layers) == 4
    for one, other in zip(outer.layers, inner.layers, strict=True):
        assert torch.equal(one.statistics.entropy, other.statistics.entropy) and other.statistics.map is None
    module, x = nn.MultiheadAttention(E, H, batch_first=True), torch.randn(B, N, E)
    with observe(module) as outer, observe(module) as inner:
        module(x, x, x, need_weights=True)
    assert len(outer.layers) == len(inner.layers) == 1


@pytest.mark.parametrize("length", [1, 2, 65])
@pytest.mark.parametrize("make", [torch_encoder, own_encoder])
def test_short_inputs_and_more_top_keys_than_keys(make, length: int) -> None:
    with torch.no_grad(), observe(make(), options={"top_k": 32}) as seen:
        seen.model(torch.randn(B, length, E))
    for call in seen.layers:
        weights, keys = call.statistics.top_weights, call.statistics.top_keys
        assert weights.shape == (B, H, length, 32) and (keys[..., min(length, 32) :] == -1).all()
        assert (keys[..., : min(length, 32)] >= 0).all() and (weights[..., min(length, 32) :] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"want": ("entropie",)}, InputError, "want must be"),
        ({"want": "entropy"}, InputError, "want must be"),
        ({"options": {"topk": 3}}, InputError, "topk"),
        ({"keep": True, "to": "somewhere"}, InputError, "choose one"),
        ({"model": torch.relu}, InputTypeError, "the torch.nn.Module to watch"),
    ],
)
def test_errors_of_observe_are_named(arguments, error, says) -> None:
    with pytest.raises(error, match=says):
        observe(**{"model": own_encoder(), **arguments})


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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_with_a_cache(family: str) -> None:
    """Each step has the statistics of the last row of the n x n weights so far."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    same = {
        "vocab_size": 50,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": 1,
        "attn_implementation": "eager",
    }
    if family == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=E, n_head=H, n_layer=2, **same))
    else:
        config = transformers.LlamaConfig(
            hidden_size=E,
            num_attention_heads=H,
            num_key_value_heads=2,
            num_hidden_layers=2,
            intermediate_size=48,
            **same,
        )
        model = transformers.LlamaForCausalLM(config)
    model.eval()
    tokens, steps = torch.randint(2, 50, (B, 7)), 4
    options = {"max_new_tokens": steps, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    plain = model.generate(tokens, **options)
    with observe(model) as seen:
        watched = model.generate(tokens, **options)
    assert torch.equal(plain, watched) and not seen.left
    assert [(call.queries, call.keys) for call in seen.layers[::2]] == [(7, 7)] + [(1, 7 + n) for n in range(1, steps)]
    with torch.no_grad():
        weights = model(plain[:, :-1], output_attentions=True).attentions
    for number, call in enumerate(seen.layers):
        P = weights[number % 2][:, :, call.keys - call.queries : call.keys, : call.keys]
        torch.testing.assert_close(call.statistics.received, P.sum(2), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(call.statistics.largest, P.amax(-1), rtol=1e-4, atol=1e-5)


class WrittenOut(nn.Module):
    """Attention of matrix products, in the ways that people write it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.fused_attn = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused_attn:
            return nn.functional.scaled_dot_product_attention(x, x, x)
        scores = x @ x.transpose(-2, -1) * x.shape[-1] ** -0.5
        if self.how == "method":
            return scores.softmax(-1) @ x
        if self.how == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores, dim=3), x)
        if self.how == "einsum, values first":
            return torch.einsum("bhkd,bhqk->bhqd", x, torch.softmax(scores, dim=3))
        if self.how == "bmm":
            return torch.bmm(scores.softmax(dim=-1).flatten(0, 1), x.flatten(0, 1)).unflatten(0, x.shape[:2])
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float64).to(x.dtype)
        return torch.matmul(nn.functional.dropout(weights, 0.1, self.training), x)


@pytest.mark.parametrize("how", ["method", "einsum", "einsum, values first", "bmm", "as transformers"])
def test_an_attention_that_is_written_out_is_not_passed_over_in_silence(how: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(WrittenOut(how), nn.LayerNorm(8), WrittenOut(how)).eval(), torch.randn(B, H, N, 8)
    plain = model(x)
    with observe(model) as seen:
        assert torch.equal(model(x), plain)
    assert not seen.layers and seen.left == {"attention written out by WrittenOut": 2}


def test_a_softmax_that_weighs_nothing_is_no_attention() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(dim=-1))
    with observe(model) as seen:
        model(torch.randn(B, N, 8)) @ torch.ones(8, 1)  # a product that is given the softmax is one
        assert sum(seen.left.values()) == 1
        model(torch.randn(B, N, 8)).argmax(-1)
        torch.softmax(torch.randn(N, 8), -1) @ torch.randn(8, 3)  # rows without heads: a router
    assert sum(seen.left.values()) == 1


@pytest.mark.parametrize("spec", ["dense", "bigbird", "nystrom:landmarks=8", "linformer:rank=8", "performer", "lsh"])
def test_what_a_method_is_made_of_is_not_taken_for_another_attention(spec: str) -> None:
    model = own_encoder(spec)
    with observe(model) as seen:
        model(torch.randn(B, 150 if spec == "lsh" else N, E))
    assert len(seen.layers) == 2 and not seen.left


def test_attention_of_timm_that_is_not_fused_is_seen() -> None:
    torch.manual_seed(0)
    model = type("WindowAttention", (WrittenOut,), {"__module__": "timm.models.swin_transformer"})("method")
    x = torch.randn(B, H, N, 8)
    plain = model(x)
    with observe(model) as seen:
        torch.testing.assert_close(model(x), plain)
    assert len(seen.layers) == 1 and not seen.left and model.fused_attn is False
