"""The shared Transformer against torch.nn's and against itself with a cache; what all models do with checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import json
import os

import pytest
import torch
from torch import nn

from efficient_attn import (
    CheckpointError,
    InputError,
    InputTypeError,
    Nystrom,
    SlidingWindow,
    UnsupportedError,
    convert,
    parse,
    patterns,
)
from efficient_attn.models import (
    CausalLM,
    CausalLMConfig,
    Model,
    Seq2Seq,
    Seq2SeqConfig,
    TextClassifier,
    TextClassifierConfig,
    Transformer,
    TransformerConfig,
    checkpoints,
    config,
)
from efficient_attn.models.positions import LearnedPositions, Rotary, SinusoidalPositions, make_positions, rotate

B, N, M, E = 3, 10, 7, 32
SIZES = {"hidden_dim": E, "num_layers": 2, "num_heads": 4, "mlp_dim": 48}
X = torch.randn(B, N, E, generator=torch.Generator().manual_seed(1))
MEMORY = torch.randn(B, M, E, generator=torch.Generator().manual_seed(2))
PADDING = torch.arange(N) >= torch.tensor([N, 6, 3])[:, None]
MEMORY_PADDING = torch.arange(M) >= torch.tensor([5, M, 2])[:, None]
WINDOW = "sliding_window:left=3,right=3"


def transformer(**changes):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**{**SIZES, **changes})).eval()


# --- against torch.nn ---


def give_weights(theirs, ours):
    """Copy the parameters of a layer of torch.nn into one of ours."""
    rows = {"linear1": "mlp.fc1", "linear2": "mlp.fc2", "norm1": "attention_norm", "norm2": "mlp_norm"}
    attentions = {"self_attn": "attention"}
    if isinstance(theirs, nn.TransformerDecoderLayer):
        rows |= {"norm2": "cross_norm", "norm3": "mlp_norm"}
        attentions |= {"multihead_attn": "cross_attention"}
    for source, target in rows.items():
        ours.get_submodule(target).load_state_dict(theirs.get_submodule(source).state_dict())
    for source, target in attentions.items():
        one, other = theirs.get_submodule(source), ours.get_submodule(target)
        for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
            linear = other.get_submodule(name)
            linear.weight.copy_(one.in_proj_weight.chunk(3)[number])
            linear.bias.copy_(one.in_proj_bias.chunk(3)[number])
        other.out_proj.load_state_dict(one.out_proj.state_dict())


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@torch.no_grad()
def test_encoder_equals_that_of_torch(norm_first, activation):
    layer = nn.TransformerEncoderLayer(E, 4, 48, 0.0, activation, batch_first=True, norm_first=norm_first)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(E) if norm_first else None, enable_nested_tensor=False).eval()
    ours = transformer(norm_first=norm_first, activation=activation)
    for number, one in enumerate(theirs.layers):
        for parameter in one.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        give_weights(one, ours.layers[number])
    for padding in (None, PADDING):
        mask = torch.ones(B, N, dtype=torch.bool) if padding is None else ~padding
        wanted = theirs(X, src_key_padding_mask=padding)
        torch.testing.assert_close(ours(X, key_padding_mask=padding)[mask], wanted[mask], rtol=1e-5, atol=1e-5)
    assert (ours.norm is not None) == norm_first


@pytest.mark.parametrize("norm_first", [True, False])
@torch.no_grad()
def test_decoder_equals_that_of_torch(norm_first):
    theirs = nn.TransformerDecoderLayer(E, 4, 48, 0.0, batch_first=True, norm_first=norm_first).eval()
    ours = transformer(
        num_layers=1, norm_first=norm_first, final_norm=False, activation="relu", causal=True, cross_attention=True
    )
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    give_weights(theirs, ours.layers[0])
    causal = nn.Transformer.generate_square_subsequent_mask(N)
    wanted = theirs(X, MEMORY, causal, memory_key_padding_mask=MEMORY_PADDING)
    found = ours(X, memory=MEMORY, memory_padding_mask=MEMORY_PADDING)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_grouped_heads_are_shared_heads():
    grouped, full = transformer(num_kv_heads=2), transformer()
    state = grouped.state_dict()
    for name in state:
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(X), full(X))


# --- positions ---


def test_positions():
    table = SinusoidalPositions(50, 8)(torch.arange(50))
    assert table[3, 0] == torch.sin(torch.tensor(3.0)) and table[3, 1] == torch.cos(torch.tensor(3.0))
    torch.testing.assert_close(table[7, 4], torch.sin(torch.tensor(7.0 / 10000 ** (4 / 8))))
    halves = make_positions("sinusoidal_halves", 50, 8)(torch.arange(50))
    assert torch.equal(halves, torch.cat([table[:, 0::2], table[:, 1::2]], -1))
    learned = LearnedPositions(5, 8, offset=2)
    assert torch.equal(learned(torch.tensor([[-1, 0, 4]])), learned.weight[None, [1, 2, 6]])
    assert make_positions("none", 5, 8) is None
    with pytest.raises(InputError, match="positions must be one of"):
        make_positions("rotary", 5, 8)
    with pytest.raises(InputError, match="must be even"):
        Rotary(7)


def test_rotary_turns_pairs_and_knows_only_distances():
    heads = torch.randn(B, 4, N, 8, dtype=torch.float64)
    positions = torch.arange(N) * 3
    turned = rotate(heads, Rotary(8)(positions, torch.float64))
    pairs = torch.complex(heads[..., :4], heads[..., 4:])
    angles = positions[:, None] * 10000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    wanted = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles))
    torch.testing.assert_close(turned, torch.cat([wanted[..., 0], wanted[..., 1]], -1), rtol=0, atol=1e-5)
    model = transformer(rotary=True, causal=True)
    here, there = model(X), model(X, positions=torch.arange(100, 100 + N).expand(B, N))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    assert (here - model(X, positions=torch.arange(N) * 2)).abs().max() > 1e-3


# --- the cache ---

CAUSAL = [
    "dense",
    "sliding_window:left=3,right=0",
    "per_head(causal; dense; sliding_window:left=1,right=0; strided:stride=3)",
    ["linear", "dense"],
    "performer:features=32",
]


@pytest.mark.parametrize("spec", CAUSAL, ids=str)
@torch.no_grad()
def test_a_cache_changes_nothing(spec):
    """In chunks of 4, 1, 1, 3, 1 tokens, padded on the left, with a memory."""
    model = transformer(causal=True, cross_attention=True, rotary=True, num_kv_heads=2, attention=spec)
    padding = PADDING.flip(1)
    wanted = model(X, memory=MEMORY, key_padding_mask=padding, memory_padding_mask=MEMORY_PADDING)
    cache = model.make_cache()
    found, start = [], 0
    for size in (4, 1, 1, 3, 1):
        found.append(
            model(
                X[:, start : start + size],
                memory=MEMORY if start == 0 else None,
                key_padding_mask=padding[:, : start + size],
                memory_padding_mask=MEMORY_PADDING,
                cache=cache,
            )
        )
        start += size
    assert cache.length == N
    torch.testing.assert_close(torch.cat(found, 1)[~padding], wanted[~padding], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_cache_grows_and_its_rows_change_places():
    model = transformer(causal=True, cross_attention=True)
    long = torch.randn(2, 150, E)
    cache = model.make_cache()
    steps = [model(long[:, t : t + 1], memory=MEMORY[:2], cache=cache) for t in range(150)]
    torch.testing.assert_close(torch.cat(steps, 1), model(long, memory=MEMORY[:2]), rtol=0, atol=1e-5)
    cache = model.make_cache(capacity=4)
    model(X, memory=MEMORY, cache=cache)
    rows = torch.tensor([2, 0, 0, 1])
    cache.select(rows)
    token = torch.randn(4, 1, E)
    wanted = model(torch.cat([X[rows], token], 1), memory=MEMORY[rows])[:, -1:]
    torch.testing.assert_close(model(token, cache=cache), wanted, rtol=0, atol=1e-5)


def test_what_a_cache_is_not_for():
    model = transformer(causal=True)
    with pytest.raises(UnsupportedError, match="no_grad"):
        model(X, cache=model.make_cache())
    with pytest.raises(InputError, match="not causal"):
        transformer()(X, cache=model.make_cache())
    with pytest.raises(InputError, match="of 1 layers"):
        model(X, cache=transformer(num_layers=1, causal=True).make_cache())
    with pytest.raises(UnsupportedError, match="needs memory="):
        transformer(causal=True, cross_attention=True)(X)


# --- attention of a model ---


def test_set_attention_by_layer_and_part():
    model = seq2seq()
    model.set_attention({"encoder": ["nystrom:landmarks=4", WINDOW], "decoder.cross": "linformer:rank=4"})
    assert model.config.encoder.attention == ("nystrom:landmarks=4", WINDOW)
    assert model.config.decoder.attention == "dense" and model.config.decoder.memory_attention == "linformer:rank=4"
    kept = model.decoder.layers[0].cross_attention.method_state
    model.set_attention(WINDOW)
    assert model.config.encoder.attention == model.config.decoder.attention == WINDOW
    assert model.config.decoder.memory_attention == "linformer:rank=4"
    model.set_attention({"decoder.cross": "linformer:rank=4"})
    assert model.decoder.layers[0].cross_attention.method_state is kept
    model.set_attention({"encoder": SlidingWindow(left=3, right=3), "decoder": patterns.SlidingWindow(left=2, right=0)})
    assert model.config.encoder.attention == WINDOW
    before = model.config
    for attention, error, message in (
        ({"encoder": "dense", "middle": "dense"}, InputError, "its parts: encoder, decoder"),
        ({"encoder": "dense", "encoder.cross": "dense"}, InputError, "no cross-attention"),
        (["dense"], InputError, "1 specs for 2 layers"),
        ({"encoder": "dense", "decoder": Nystrom()}, UnsupportedError, "cannot be causal"),
        ("sparse", InputError, "no method 'sparse'"),
        ({"encoder": 3}, InputTypeError, "a spec"),
    ):
        with pytest.raises(error, match=message):
            model.set_attention(attention)
        assert model.config == before


def test_layers_share_one_state_where_the_method_says_so():
    model = transformer()
    model.set_attention("linformer:share=layerwise,rank=8,max_len=16")
    first, second = (layer.attention.method_state for layer in model.layers)
    assert first is second and len(list(model.parameters())) == len(list(transformer().parameters())) + 1
    assert model(X).shape == X.shape
    again = copy.deepcopy(model)
    assert again.layers[0].attention.method_state is again.layers[1].attention.method_state


def test_convert_knows_the_models():
    model = classifier()
    ids = torch.randint(0, 50, (2, 8))
    report = convert(model, WINDOW, sample=ids)
    assert len(report.converted) == 2 and report.dense_error == 0 and report.error > 0
    assert model.config.encoder.attention == WINDOW
    report.undo()
    assert model.config.encoder.attention == "dense"


def test_wrong_configs_and_inputs_are_named():
    for changes, message in (
        ({"num_heads": 5}, "must divide hidden_dim"),
        ({"num_kv_heads": 3}, "must divide num_heads"),
        ({"num_layers": 0}, "num_layers must be"),
        ({"hidden_dim": 1024, "num_heads": 2}, "at most 256"),
        ({"activation": "swoosh"}, "activation must be"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"attention": ("dense",)}, "1 specs for 2 layers"),
    ):
        with pytest.raises(InputError, match=message):
            TransformerConfig(**{**SIZES, **changes})
    model = transformer()
    for error, x, arguments in (
        (InputError, X[0], {}),
        (InputError, X[..., :16], {}),
        (InputError, X, {"key_padding_mask": PADDING[:, 1:]}),
        (InputTypeError, X, {"key_padding_mask": PADDING.float()}),
        (InputError, X, {"memory": MEMORY}),
    ):
        with pytest.raises(error):
            model(x, **arguments)
    with pytest.raises(InputError, match="not causal"):
        TextClassifierConfig(encoder=TransformerConfig(causal=True))
    with pytest.raises(InputError, match="causal=True"):
        CausalLMConfig(decoder=TransformerConfig())
    with pytest.raises(InputError, match="cross_attention=True"):
        Seq2SeqConfig(decoder=TransformerConfig(causal=True))
    with pytest.raises(InputError, match="takes a CausalLMConfig"):
        CausalLM(TransformerConfig())
    with pytest.raises(InputError, match="did you mean 'max_len'"):
        config.from_dict(CausalLMConfig, {"max_length": 3})


# --- saving and loading ---


def classifier(**changes):
    torch.manual_seed(0)
    encoder = TransformerConfig(**SIZES)
    return TextClassifier(TextClassifierConfig(50, 64, encoder, **{"num_labels": 2, **changes})).eval()


def seq2seq():
    torch.manual_seed(0)
    decoder = TransformerConfig(**SIZES, causal=True, cross_attention=True)
    return Seq2Seq(Seq2SeqConfig(50, 64, TransformerConfig(**SIZES), decoder)).eval()


IDS = torch.randint(0, 50, (B, N), generator=torch.Generator().manual_seed(3))


def test_a_saved_model_comes_back(tmp_path):
    model = seq2seq()
    model.set_attention(
        {"encoder": "linformer:share=layerwise,rank=8,max_len=16", "decoder": ["linear", "performer:seed=3"]}
    )
    wanted = model(IDS, IDS)
    model.save_pretrained(tmp_path / "new" / "folder")
    for cls in (Model, Seq2Seq):
        found = cls.from_pretrained(tmp_path / "new" / "folder")
        assert type(found) is Seq2Seq and found.config == model.config and not found.training
        assert torch.equal(found(IDS, IDS), wanted)
    dense = Seq2Seq.from_pretrained(tmp_path / "new" / "folder", attention="dense", dtype=torch.float64)
    assert dense.config.encoder.attention == "dense" and dense(IDS, IDS).dtype == torch.float64
    with pytest.raises(CheckpointError, match="holds a Seq2Seq"):
        CausalLM.from_pretrained(tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors"]


def test_a_subclass_of_a_model(tmp_path):
    class OwnClassifier(TextClassifier):
        pass

    classifier().save_pretrained(tmp_path)
    found = OwnClassifier.from_pretrained(tmp_path)
    assert type(found) is OwnClassifier
    found.save_pretrained(tmp_path)
    assert type(Model.from_pretrained(tmp_path)) is OwnClassifier


def test_saving_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    model = classifier()
    model.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def full(fd):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with torch.no_grad():
        model.classifier.bias += 1
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path)
    assert before == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}


def test_fine_tuning_starts_a_fresh_head_when_asked(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    found = TextClassifier.from_pretrained(tmp_path, num_labels=5)
    assert found(IDS).shape == (B, 5) and torch.equal(found.encode(IDS), model.encode(IDS))
    assert torch.equal(found.pooler.weight, model.pooler.weight)
    bare = TextClassifier.from_pretrained(tmp_path, num_labels=None)
    assert bare.classifier is None and torch.equal(bare.encode(IDS), model.encode(IDS))
    dropped = TextClassifier.from_pretrained(tmp_path, encoder={"dropout": 0.5})
    assert dropped.config.encoder == dataclasses.replace(model.config.encoder, dropout=0.5)
    assert torch.equal(dropped(IDS), model(IDS))
    longer = TextClassifier.from_pretrained(tmp_path, max_len=65)
    assert longer.config.max_len == 65 and torch.equal(longer(IDS), model(IDS))
    with pytest.raises(InputError, match="num_label"):
        TextClassifier.from_pretrained(tmp_path, num_label=5)


def test_checkpoints_that_cannot_be_loaded_say_why(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    text, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good, tensors = text.read_text(), weights.read_bytes()

    def refused(message):
        with pytest.raises(CheckpointError, match=message):
            Model.from_pretrained(tmp_path)

    safetensors = checkpoints.safetensors()
    state = safetensors.load(tensors)
    missing = {name: tensor for name, tensor in state.items() if name != "pooler.bias"}
    weights.write_bytes(safetensors.save(missing))
    refused("missing: pooler.bias")
    weights.write_bytes(safetensors.save({**state, "extra.weight": torch.zeros(2)}))
    refused("not in the model: extra.weight")
    weights.write_bytes(tensors[: len(tensors) // 2])
    refused("cannot be read")
    weights.unlink()
    refused("has no model.safetensors; load it with transformers")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused("it has pytorch_model.bin, which can run code")
    weights.write_bytes(tensors)
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        ('{"model_type": "mamba"}', "architecture 'mamba'; known are"),
        ('{"model_type": "bert"}', "vocab_size"),
        (json.dumps({**json.loads(good), "efficient_attn": 99}), "format 99"),
        (json.dumps({**json.loads(good), "model": "Oracle"}), "holds a 'Oracle'"),
    ):
        text.write_text(content)
        refused(message)
    text.unlink()
    refused("has no config.json")
    for path in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        with pytest.raises(CheckpointError, match="there is no folder"):
            Model.from_pretrained(path)


def test_ids_of_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    classifier().save_pretrained(tmp_path)
    asked = {}

    def download(repo, **arguments):
        asked.update(arguments, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert isinstance(Model.from_pretrained("someone/model", revision="v1"), TextClassifier)
    assert asked["repo"] == "someone/model" and asked["revision"] == "v1"
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])

    def offline(repo, **arguments):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="ConnectionError: no network"):
        Model.from_pretrained("someone/model")


def test_checkpoints_in_several_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    theirs = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes)).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = TextClassifier.from_pretrained(tmp_path)
    torch.testing.assert_close(found.encode(IDS), theirs(IDS).last_hidden_state, rtol=0, atol=1e-5)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"pooler.dense.bias": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"elsewhere.safetensors cannot be read"):
        TextClassifier.from_pretrained(tmp_path)


def test_parse_reads_what_configs_write():
    spec = "per_head(causal; dense; sliding_window:left=1,right=0; strided:stride=3)"
    made = TransformerConfig(**SIZES, attention=[parse(spec), "dense"])
    again = config.from_dict(TransformerConfig, json.loads(json.dumps(config.to_dict(made))))
    assert again == made and parse(again.attention[0]) == parse(spec)
