"""Where queries stand among the keys: in a cache, in cross-attention, of learned queries. What is not known raises."""

from __future__ import annotations

import pytest
import torch
from support.huggingface_models import T5, make
from torch import nn
from torch.testing import assert_close

from efficient_attn import MultiheadAttention, UnsupportedError, convert, replace_attention
from efficient_attn.integrations import huggingface

transformers = pytest.importorskip("transformers")

huggingface.register()

POSITIONS = [
    "sliding_window:left=3,right=3",
    "longformer:window=6",
    "strided:stride=4,causal=false",
    "bigbird:block=16",
]
SPECS = ["dense", *POSITIONS, "topk_blocks:block=16,blocks=1", "linformer:rank=4", "nystrom:landmarks=4", "linear"]
E, H = 16, 4
SIDE = {"ffn_dim": 37, "layers": 2, "attention_heads": 4}
BART = {"d_model": 32, "vocab_size": 50, "max_position_embeddings": 64, "decoder_start_token_id": 2, "pad_token_id": 0}
BART |= {f"{side}_{what}": number for side in ("encoder", "decoder") for what, number in SIDE.items()}


def model_of(name: str, implementation: str, **options):
    torch.manual_seed(0)
    config = getattr(transformers, name.replace("ForConditionalGeneration", "Config"))(**options)
    return getattr(transformers, name)._from_config(config, attn_implementation=implementation).eval()


def tokens(length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 49, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("target", [7, 24], ids=["shorter", "as_long_as_the_source"])
@pytest.mark.parametrize("spec", [":" + spec for spec in POSITIONS[:3]])
@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_a_cached_step_is_the_last_of_a_pass_over_the_whole_target(name: str, spec: str, target: int) -> None:
    options = T5 if name.startswith("T5") else BART
    model = model_of(name, "efficient_attn" + spec, **options)
    source, written = tokens(24, 0), tokens(target, 1)
    with torch.no_grad():
        whole = model(input_ids=source, decoder_input_ids=written, use_cache=False).logits[:, -1]
        memory = model.get_encoder()(source)
        first = model(encoder_outputs=memory, decoder_input_ids=written[:, :-1], use_cache=True)
        step = model(
            encoder_outputs=memory, decoder_input_ids=written[:, -1:], past_key_values=first.past_key_values
        ).logits[:, -1]
    assert_close(step, whole)


def test_a_compiled_step_with_a_static_cache_has_no_place() -> None:
    """The graph does not know how many tokens the cache holds: the pattern's first row would be taken."""
    model = make("llama", "efficient_attn:sliding_window:left=3,right=0")
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    ids = tokens(12, 0)
    with torch.no_grad():
        model(ids[:, :11], past_key_values=cache)
        with pytest.raises(UnsupportedError, match="where 1 queries stand among 16 keys"):
            torch.compile(model, backend="eager")(ids[:, 11:], position_ids=torch.tensor([[11]]), past_key_values=cache)


@pytest.mark.parametrize("spec", SPECS)
def test_cross_attention_of_a_decoder_stays_dense_unless_named(spec: str) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 1, 1, 32, 0.0, batch_first=True).eval()
    x, memory = torch.randn(2, 9, E), torch.randn(2, 9, E)
    layer = model.decoder.layers[0]
    expected = layer.multihead_attn(x, memory, memory)[0]
    replaced = replace_attention(model, spec)
    assert ("decoder.layers.0.multihead_attn" in replaced) == (spec == "dense")
    assert_close(layer.multihead_attn(x, memory, memory)[0], expected)
    named = replace_attention(model, spec, predicate=lambda name, _: name.endswith("multihead_attn"))
    assert list(named) == ["decoder.layers.0.multihead_attn"] or spec == "dense"


@pytest.mark.parametrize("way", ["replace_attention", "convert"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 64), (9, 5), (64, 1)])
def test_learned_queries_stay_dense(spec: str, way: str, queries: int, keys: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.attn = nn.MultiheadAttention(E, H, batch_first=True).eval()
    query, memory = torch.randn(2, queries, E), torch.randn(2, keys, E)
    padding = torch.zeros(2, keys, dtype=torch.bool)
    padding[1, 1:] = True
    bias = torch.randn(queries, keys)
    calls = [{}, {"key_padding_mask": padding}, {"attn_mask": bias}, {"need_weights": False}]
    expected = [model.attn(query, memory, memory, **call) for call in calls]
    if way == "convert":
        convert(model, spec)
    else:
        replace_attention(model, spec)
    assert_close([model.attn(query, memory, memory, **call) for call in calls], expected)
    own = torch.randn(2, 16, E)
    as_named = MultiheadAttention.from_torch(model.attn.to_torch(), spec, method_state=model.attn.method_state)
    assert_close(model.attn(own, own, own)[0], as_named(own, own, own)[0])


def test_a_pooling_head_of_transformers_stays_dense() -> None:
    """SigLIP's head is an nn.MultiheadAttention that one learned query calls."""
    config = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=4
    )
    model = transformers.SiglipVisionModel(config).eval()
    head, hidden = model.head, torch.randn(2, 64, 16)
    expected = head(hidden)
    convert(model, "sliding_window:left=8,right=8", sample=torch.randn(1, 3, 32, 32), repeats=0)
    assert isinstance(head.attention, MultiheadAttention)
    assert_close(head(hidden), expected)
