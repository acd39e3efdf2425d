"""`convert`: what it converts, what it leaves and says so, what it checks, and that it can be undone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from efficient_attn import (
    BigBird,
    ConversionError,
    InputError,
    InputTypeError,
    MultiheadAttention,
    SlidingWindow,
    UnsupportedError,
    convert,
    parse,
)

WINDOW = "sliding_window:left=2,right=2"


class Homemade(nn.Module):
    """A module that is converted by its own set_attention."""

    def __init__(self, width=16):
        super().__init__()
        self.set_attention("dense")
        self.width = width

    def set_attention(self, spec):
        self.attention = parse(spec)

    def forward(self, x):
        heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
        return self.attention.attend(heads, heads, heads)[0].transpose(1, 2).flatten(2)


class ForeignAttention(nn.Module):
    def forward(self, x):
        return x


class TalkingHeadAttn(ForeignAttention):
    pass


class Special(nn.MultiheadAttention):
    """A subclass whose own doing would be lost."""


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))


def test_torch_nn_is_converted_checked_and_undone():
    model = encoder().train()
    modules = list(model.modules())
    expected = model(X)
    report = convert(model, WINDOW, sample=X)
    assert list(report.converted) == ["layers.0.self_attn", "layers.1.self_attn"] and not report.skipped
    assert report.dense_error < 1e-5 and report.error > 1e-2 and model.training
    assert all(layer.self_attn.attention.pattern == SlidingWindow(left=2, right=2) for layer in model.layers)
    assert not torch.allclose(model(X), expected, atol=1e-2)
    assert "sliding_window:left=2,right=2" in str(report) and "layers.1.self_attn" in str(report)
    report.undo()
    assert list(model.modules()) == modules and torch.equal(model(X), expected)
    report.undo()  # nothing more to do


def test_dense_is_the_default_and_compared_itself():
    model = encoder()
    report = convert(model, sample=X)
    assert report.attention.is_dense and report.dense_error < 1e-5 and report.error is None
    assert all(isinstance(layer.self_attn, MultiheadAttention) for layer in model.layers)


def test_a_model_that_has_a_method_already_is_not_compared_with_dense():
    model = encoder()
    convert(model, WINDOW)
    report = convert(model, "bigbird:block=16", sample=X)
    assert report.dense_error is None and report.error > 1e-2
    assert model.layers[0].self_attn.attention.pattern == BigBird(block=16)
    report.undo()
    assert model.layers[0].self_attn.attention == parse(WINDOW)


def test_modules_with_a_setter():
    model = nn.Sequential(nn.Linear(16, 16), Homemade())
    report = convert(model, WINDOW, sample=X)
    assert report.converted == {"1": "Homemade, by set_attention"} and report.error > 1e-3
    assert model[1].attention == parse(WINDOW)
    report.undo()
    assert model[1].attention.is_dense
    alone = Homemade()
    assert list(convert(alone, WINDOW).converted) == [""]


class Stateful(Homemade):
    """As the layers of this package's models: parameters of its method, and attention to a memory on request."""

    def __init__(self, cross=False):
        super().__init__()
        self.cross = cross

    def set_attention(self, spec):
        super().set_attention(spec)
        self.method_state = self.attention.build(16, 4, 4)


def test_setters_get_their_parameters_back_and_keep_to_themselves():
    model = nn.ModuleList([Stateful(), Stateful(cross=True)])
    model[0].set_attention("linformer:rank=2,max_len=16")
    state = model[0].method_state
    report = convert(model, WINDOW)
    assert list(report.converted) == ["0"] and "memory" in report.skipped["1"]
    assert model[0].method_state is None and model[1].attention.is_dense
    report.undo()
    assert model[0].method_state is state and str(model[0].attention) == "linformer:rank=2,max_len=16"


def test_what_is_left_alone_is_named():
    model = nn.ModuleDict({"a": encoder(), "b": ForeignAttention(), "c": Special(16, 4), "d": TalkingHeadAttn()})
    report = convert(model, WINDOW, predicate=lambda name, module: name != "a.layers.1.self_attn")
    assert list(report.converted) == ["a.layers.0.self_attn"]
    assert report.skipped.keys() == {"a.layers.1.self_attn", "b", "c", "d"}
    assert report.skipped["a.layers.1.self_attn"] == "left out by predicate"
    assert "ForeignAttention is of no kind" in report.skipped["b"] and "would be lost" in report.skipped["c"]
    assert type(model["c"]) is Special and "left alone: 4" in str(report)


class DependsOnType(nn.Module):
    """A model that computes something else when its attention is not PyTorch's own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        out, _ = self.inner(x, x, x, need_weights=False)
        return out if type(self.inner) is nn.MultiheadAttention else out + 0.01


class PartlyUsed(nn.Module):
    """One attention is called, one is not, and of one the weights are read by other code."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.idle, self.read = (nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read.out_proj(self.called(x, x, x)[0])


def test_modules_that_are_never_reached_are_named():
    report = convert(PartlyUsed(), "sliding_window:left=2,right=2", sample=torch.randn(2, 9, 16), repeats=0)
    assert list(report.layers) == ["called"] and sorted(report.converted) == ["called", "idle", "read"]
    assert report.unreached == {"idle": "MultiheadAttention", "read": "MultiheadAttention"}
    assert "never reached on the sample: 2\n  idle: MultiheadAttention" in str(report)


def test_a_conversion_that_reaches_nothing_raises_and_leaves_the_model():
    model = PartlyUsed()
    old = model.idle
    with pytest.raises(ConversionError, match=r"none of the converted modules \(idle\) called"):
        convert(model, "linear", sample=torch.randn(2, 9, 16), predicate=lambda name, _: name == "idle")
    assert model.idle is old


@pytest.mark.parametrize("spec", ["dense", WINDOW])
def test_a_model_that_differs_with_dense_attention_raises_and_is_as_before(spec):
    model = DependsOnType()
    inner = model.inner
    with pytest.raises(ConversionError, match="differs from the original"):
        convert(model, spec, sample=X)
    assert model.inner is inner
    assert convert(model, spec, sample=X, tolerance=1.0).dense_error > 1e-3


def test_a_method_that_fails_on_the_sample_leaves_the_model_as_before():
    model = encoder()
    before = [layer.self_attn for layer in model.layers]
    with pytest.raises(InputError, match="max_len"):
        convert(model, "linformer:rank=4,max_len=8", sample=X)
    assert [layer.self_attn for layer in model.layers] == before
    with pytest.raises(UnsupportedError, match="cannot be causal"):
        convert(model, "nystrom", sample=(X, torch.ones(12, 12).triu(1).bool()))
    assert [layer.self_attn for layer in model.layers] == before


def test_nan_in_the_output_is_a_difference():
    class Poisoned(DependsOnType):
        def forward(self, x):
            return super().forward(x) * (1.0 if type(self.inner) is nn.MultiheadAttention else float("nan"))

    with pytest.raises(ConversionError, match="inf"):
        convert(Poisoned(), sample=X)


def test_wrong_arguments():
    with pytest.raises(InputTypeError, match="Module"):
        convert("bert", WINDOW)
    with pytest.raises(InputError, match="no attention that can be converted"):
        convert(nn.Linear(2, 2), WINDOW)
    with pytest.raises(InputError, match="ForeignAttention is of no kind"):
        convert(nn.Sequential(ForeignAttention()), WINDOW)
    with pytest.raises(InputError, match="inside itself"):
        convert(nn.MultiheadAttention(16, 4), WINDOW)
    with pytest.raises(InputError, match="no method"):
        convert(encoder(), "bigbrid")
    for repeats in (-1, 1.5, True):
        with pytest.raises(InputError, match="repeats"):
            convert(encoder(), WINDOW, sample=X, repeats=repeats)

    class Silent(DependsOnType):
        def forward(self, x):
            return None

    with pytest.raises(ConversionError, match="NoneType"):
        convert(Silent(), sample=X)


# --- models of transformers ---


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def bert(transformers):
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=37, initializer_range=0.3)
    torch.manual_seed(0)
    return transformers.BertModel._from_config(config, attn_implementation="sdpa")


IDS = torch.arange(3, 27).reshape(2, 12)


def test_transformers_inside_another_model(transformers):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = bert(transformers)
            self.head = nn.TransformerEncoderLayer(32, 4, 32, batch_first=True)

        def forward(self, input_ids):
            return self.head(self.bert(input_ids).last_hidden_state)

    model = Both()
    expected = model.eval()(IDS)
    report = convert(model, WINDOW, sample={"input_ids": IDS})
    assert list(report.converted) == ["bert", "head.self_attn"] and not report.skipped
    assert model.bert.config._attn_implementation == f"efficient_attn:{WINDOW}"
    assert report.dense_error < 1e-5 and report.error > 1e-2
    report.undo()
    assert model.bert.config._attn_implementation == "sdpa" and torch.equal(model(IDS), expected)


def test_parameters_of_layers_come_and_go(transformers):
    model = bert(transformers).eval()
    names = set(model.state_dict())
    report = convert(model, "linformer:rank=4,max_len=16", sample=IDS)
    added = set(model.state_dict()) - names
    assert len(added) == 2 * 3 and all("method_state" in name for name in added)
    copied = copy.deepcopy(model)
    second = convert(model, "linformer:rank=2,max_len=16", sample=IDS)
    assert model.encoder.layer[0].attention.self.method_state.key_projection.shape == (2, 16)
    second.undo()
    assert torch.equal(model(IDS)[0], copied(IDS)[0])
    assert model.encoder.layer[0].attention.self.method_state.key_projection.shape == (4, 16)
    report.undo()
    assert set(model.state_dict()) == names and model.config._attn_implementation == "sdpa"


def test_layers_of_transformers_that_are_never_reached_are_named(transformers):
    """LongT5's encoder has attention of its own, and no call of the interface, whatever its config says."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "local_radius": 4}
    model = transformers.LongT5EncoderModel(transformers.LongT5Config(vocab_size=50, **sizes))
    before = model.config._attn_implementation
    with pytest.raises(ConversionError, match="changes nothing"):
        convert(model, "sliding_window", sample={"input_ids": torch.arange(3, 19)[None]}, repeats=0)
    assert model.config._attn_implementation == before


def test_transformers_without_the_interface_are_left(transformers):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_landmarks": 4}
    config = transformers.NystromformerConfig(vocab_size=50, segment_means_seq_len=16, **sizes)
    model = nn.ModuleDict({"own": transformers.NystromformerModel(config), "bert": bert(transformers)})
    report = convert(model, WINDOW)
    left = report.skipped["own.encoder.layer.0.attention.self"]
    assert list(report.converted) == ["bert"] and "approximates attention in a way of its own" in left
    with pytest.raises(InputError, match="approximates attention"):
        convert(model["own"], WINDOW)
