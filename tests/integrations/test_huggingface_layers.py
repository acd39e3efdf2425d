"""What transformers' layers and mask functions hand over: masks, arguments and names, and what of them raises."""

from __future__ import annotations

import pytest
import torch
from support.huggingface_models import IDS, PADDING, B, N, assert_close, make, native_backend  # noqa: F401

import efficient_attn
from efficient_attn import InputError, UnsupportedError, attention
from efficient_attn.integrations import huggingface
from efficient_attn.integrations.huggingface_masks import PairMask, pair_mask

transformers = pytest.importorskip("transformers")
from transformers import masking_utils  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

huggingface.register()

# --- masks ---

BLOCKS = torch.tensor([[-1] * 4 + [0] * 5 + [-1] * 3 + [1] * 8] * B)
PACKED_CAUSAL = masking_utils.causal_mask_function
if hasattr(masking_utils, "remap_positions_for_packed_sequence"):  # not before transformers 5.23
    POSITIONS = torch.cat([torch.arange(7), torch.arange(13)])[None].expand(B, -1)
    PACKED_CAUSAL = masking_utils.remap_positions_for_packed_sequence(PACKED_CAUSAL, POSITIONS)
FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(6),
    "sliding both": masking_utils.sliding_window_bidirectional_mask_function(3),
    "chunked": masking_utils.chunked_causal_mask_function(8, torch.tensor([0, 3, 5])),
    "blocks": masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.blockwise_overlay(BLOCKS)),
    "packed": masking_utils.and_masks(
        masking_utils.packed_sequence_mask_function(torch.tensor([[0] * 7 + [1] * 13] * B)), PACKED_CAUSAL
    ),
    "unknown": lambda b, h, i, j: (i - j) % 3 == 0,
}


@pytest.mark.parametrize("place", [(N, N, 0, 0), (1, N, N - 1, 0), (4, 12, 14, 6), (4, N, 3, 0)], ids=str)
@pytest.mark.parametrize("padding", list(PADDING))
@pytest.mark.parametrize("use_vmap", [False, True], ids=["indices", "vmap"])
@pytest.mark.parametrize("function", list(FUNCTIONS))
def test_masks_are_those_of_sdpa(function, padding, place, use_vmap):
    q_length, kv_length, q_offset, kv_offset = place
    mask = None if PADDING[padding] is None else PADDING[padding].bool()
    common = {"mask_function": FUNCTIONS[function], "attention_mask": mask, "use_vmap": use_vmap}
    common |= {"q_offset": q_offset, "kv_offset": kv_offset}
    expected = masking_utils.sdpa_mask(B, q_length, kv_length, allow_is_causal_skip=False, **common)
    found = pair_mask(B, q_length, kv_length, **common)
    assert found.shape == (B, 1, q_length, kv_length)
    seen = torch.ones(found.shape, dtype=torch.bool)
    if found.pairs is not None:
        seen &= found.pairs.to_dense()
    if found.key_mask is not None:
        seen &= found.key_mask[:, None, None]
    assert torch.equal(seen, expected)
    if function in ("causal", "sliding", "sliding both", "bidirectional") and q_length > 1:
        assert found.pairs is None or found.pairs.indptr is None  # known as an interval, without lists


def test_a_mask_that_hides_nothing_may_be_none():
    whole = {"mask_function": masking_utils.bidirectional_mask_function, "attention_mask": torch.ones(B, N).bool()}
    assert pair_mask(B, N, N, **whole, allow_is_bidirectional_skip=True) is None
    assert pair_mask(B, N, N, **whole).key_mask is None


def test_a_mask_moves_as_a_tensor_does_and_checks_its_padding():
    mask = pair_mask(B, N, N)
    assert mask.to("cpu").pairs == mask.pairs and mask.to(torch.float32) is mask and mask.contiguous() is mask
    with pytest.raises(InputError, match="batch, keys"):
        pair_mask(B, N, N, attention_mask=torch.ones(B + 1, N).bool())


# --- what raises ---


def layer_call(name="efficient_attn", mask=None, length=N, **kwargs):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, length, 8), torch.randn(2, 2, N, 8), torch.randn(2, 2, N, 8)
    return ALL_ATTENTION_FUNCTIONS[name](torch.nn.Identity(), query, key, value, mask, **kwargs), (query, key, value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"cache": object()},
        {"something_new": 1},
    ],
    ids=lambda a: next(iter(a)),
)
def test_arguments_with_a_meaning_raise(arguments):
    with pytest.raises(UnsupportedError, match=next(iter(arguments))):
        layer_call(**arguments)
    layer_call(**dict.fromkeys(arguments))  # not given


def test_softcap_and_sinks():
    named = {"softcap": 0.5, "s_aux": torch.linspace(-1, 1, 4)}
    (out, _), (query, key, value) = layer_call(**named, is_causal=False)
    expected = attention(query, key, value, softcap=0.5, sinks=named["s_aux"])
    torch.testing.assert_close(out.transpose(1, 2), expected)
    huggingface._add("efficient_attn:nystrom")
    for name, value in named.items():
        with pytest.raises(UnsupportedError, match=r"(softcap|sinks) cannot be served by nystrom"):
            layer_call("efficient_attn:nystrom", is_causal=False, **{name: value})


@pytest.mark.parametrize("method", ["efficient_attn", "efficient_attn:sliding_window:left=3"])
def test_the_keys_that_an_indexer_has_chosen(method):
    """DeepSeek sparse attention: besides what mask and method say."""
    huggingface._add(method)
    chosen = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i))[:7] for i in range(2 * N)])
    chosen = chosen.view(2, N, 7)
    chosen[:, :, 0] = torch.arange(N)  # a query sees one key at least
    shown = torch.zeros(2, 1, N, N, dtype=torch.bool).scatter(-1, chosen[:, None], True)
    (out, _), _ = layer_call(method, mask=pair_mask(2, N, N), indices=chosen)
    (expected, _), _ = layer_call(method, mask=PairMask((2, 1, N, N), None, shown & torch.ones(N, N).tril().bool(), 0))
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, layer_call(method, mask=pair_mask(2, N, N))[0][0])
    with pytest.raises(InputError, match=f"indices must be .* for {N} queries"):
        layer_call(indices=chosen[:, 1:])


@pytest.mark.parametrize("name", ["splinter", "bridgetower"])
def test_layers_without_a_mask_see_everything_where_eager_does(name):
    """Splinter's layers do not say whether they are causal; BridgeTower's say so of encoders."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    parts = {"text_config": {**sizes, "vocab_size": 50}, "vision_config": {**sizes, "image_size": 32, "patch_size": 8}}
    more = {"vocab_size": 50} if name == "splinter" else parts
    config = transformers.AutoConfig.for_model(name, **sizes, **more)
    given = {"input_ids": torch.arange(3, 14)[None]}
    if name == "bridgetower":
        given["pixel_values"] = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for implementation in ("eager", "efficient_attn"):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config, attn_implementation=implementation).eval()
        found.append(model(**given)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_parts_with_attention_of_their_own_stay_eager_and_say_so():
    sizes = {"hidden_size": 32, "conf_num_attention_heads": 4, "conf_num_hidden_layers": 1, "input_feat_size": 16}
    config = transformers.AutoConfig.for_model("gemma3n_audio", **sizes)
    with pytest.warns(UserWarning, match="Gemma3nAudioEncoder .* stays eager"):
        model = transformers.AutoModel.from_config(config, attn_implementation="efficient_attn")
    assert model.config._attn_implementation == "eager"


SCORED = {
    "gemma2": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "head_dim": 8, "sliding_window": 4},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "sliding_window": 4},
}


@pytest.mark.parametrize("name", SCORED)
def test_models_with_a_softcap_or_sinks_are_equal_to_eager(name):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 1}
    config = transformers.AutoConfig.for_model(name, **sizes, **heads, **SCORED[name])
    ids = torch.randint(3, 50, (2, 11), generator=torch.Generator().manual_seed(0))
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    found = {}
    for implementation in ("eager", "efficient_attn"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
        if name == "gpt_oss":
            for layer in model.model.layers:
                torch.nn.init.normal_(layer.self_attn.sinks)
        logits = model(ids, attention_mask=padding).logits[padding.bool()]
        grads = torch.autograd.grad(logits.square().mean(), [p for p in model.parameters() if p.requires_grad])
        with torch.no_grad():
            tokens = model.generate(ids, attention_mask=padding, max_new_tokens=6, do_sample=False)
        found[implementation] = (logits.detach(), grads, tokens)
    ours, theirs = found["efficient_attn"], found["eager"]
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-3, atol=2e-5)
    assert torch.equal(ours[2], theirs[2])


def test_a_window_without_a_mask_raises():
    with pytest.raises(UnsupportedError, match="sliding_window=6"):
        layer_call(sliding_window=6)
    layer_call(sliding_window=N)


def test_masks_that_do_not_fit_raise():
    with pytest.raises(InputError, match="5 queries"):
        layer_call(mask=PairMask((2, 1, 5, N)))
    with pytest.raises(InputError, match="bool or float"):
        layer_call(mask=torch.ones(2, 1, N, N, dtype=torch.long))
    with pytest.raises(InputError, match="must be"):
        layer_call(mask=torch.ones(2, N, dtype=torch.bool))


@pytest.mark.parametrize("model", ["Longformer", "BigBird"])  # GPT-J has had one since transformers 5.24
def test_models_that_would_ignore_the_name_raise(model):
    config = getattr(transformers, f"{model}Config")()
    with pytest.raises(UnsupportedError, match="attention interface"), torch.device("meta"):
        getattr(transformers, f"{model}Model")._from_config(config, attn_implementation="efficient_attn")


def test_names():
    model = make("bert")
    with pytest.raises(InputError, match="no method 'bigbrid'"):
        model.set_attn_implementation("efficient_attn:bigbrid")
    assert model.config._attn_implementation == "efficient_attn"
    expected = model(IDS)[0]
    for spec in ("bigbird:block=64", "sliding_window:left=64,right=64 | causal", "dense"):
        model.set_attn_implementation(f"efficient_attn:{spec}")
        assert_close(model(IDS)[0], expected)  # all of them see everything at this length
        assert f"efficient_attn:{spec}" in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    with pytest.raises(ValueError, match="not supported"):
        model.set_attn_implementation("efficient_attention")
    assert huggingface.implementation_name("dense") == "efficient_attn"
    assert huggingface.implementation_name(efficient_attn.BigBird(block=32)) == "efficient_attn:bigbird:block=32"


def test_without_transformers_registering_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"efficient-attn\[models\]"):
        huggingface.register()


def test_registering_twice_is_registering_once():
    before = transformers.PreTrainedModel.get_correct_attn_implementation
    huggingface.register()
    assert transformers.PreTrainedModel.get_correct_attn_implementation is before


# --- layers ---


def test_without_a_mask_a_causal_layer_is_causal():
    (out, weights), (query, key, value) = layer_call()  # nobody says that it is: as in eager
    assert weights is None and out.shape == (2, N, 4, 8) and out.is_contiguous()
    assert torch.equal(out.transpose(1, 2), attention(query, key, value))
    layer = torch.nn.Identity()
    layer.is_causal = True
    out, _ = ALL_ATTENTION_FUNCTIONS["efficient_attn"](layer, query, key, value, None)
    assert torch.equal(out.transpose(1, 2), attention(query, key, value, is_causal=True))
    (out, _), _ = layer_call(is_causal=False, scaling=0.3)
    assert torch.equal(out.transpose(1, 2), attention(query, key, value, scale=0.3))
    (out, _), (query, key, value) = layer_call(length=1)
    assert torch.equal(out.transpose(1, 2), attention(query, key, value))


def test_dropout_is_that_of_attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, N, 8), torch.randn(2, 2, N, 8), torch.randn(2, 2, N, 8)
    function = ALL_ATTENTION_FUNCTIONS["efficient_attn"]
    torch.manual_seed(5)
    dropped, _ = function(torch.nn.Identity(), query, key, value, None, dropout=0.3, is_causal=False)
    torch.manual_seed(5)
    assert torch.equal(dropped.transpose(1, 2), attention(query, key, value, dropout_p=0.3))
    assert not torch.allclose(dropped.transpose(1, 2), attention(query, key, value))


def test_dropout_in_training_only():
    model = make("bert", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    expected = model(IDS)[0]
    model.train()
    assert not torch.allclose(model(IDS)[0], expected, atol=1e-2)
    torch.manual_seed(3)
    first = model(IDS)[0]
    torch.manual_seed(3)
    assert torch.equal(model(IDS)[0], first)


def test_queries_of_batch_one_broadcast():
    key = torch.randn(B, 4, N, 8)
    query = torch.randn(1, 4, 6, 8)
    out, _ = ALL_ATTENTION_FUNCTIONS["efficient_attn"](torch.nn.Identity(), query, key, key, None, is_causal=False)
    assert torch.equal(out.transpose(1, 2), attention(query.expand(B, -1, -1, -1), key, key))
