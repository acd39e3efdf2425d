"""The fidelity report of `convert`: errors of layers, time, memory, table and picture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import efficient_attn
from efficient_attn import InputError, Method, SlidingWindow, UnsupportedError, attention, convert
from efficient_attn.integrations import fidelity
from efficient_attn.integrations.fidelity import Cost, LayerFidelity

WINDOW = "sliding_window:left=2,right=2"
X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))


class Attend(nn.Module):
    """A layer with a method and nothing else; called twice in a forward by Twice."""

    def __init__(self):
        super().__init__()
        self.set_attention("dense")

    def set_attention(self, spec):
        self.attention = efficient_attn.parse(spec)

    def forward(self, x):
        heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
        return self.attention.attend(heads, heads, heads)[0].transpose(1, 2).flatten(2)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Attend(), Attend()

    def forward(self, x):
        x = self.first(x)
        return self.second(self.second(x) + x)


def by_hand(x, mask=None):
    heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
    return attention(heads, heads, heads, mask=mask).transpose(1, 2).flatten(2)


def relative(old, new):
    return ((old - new).abs().max() / old.abs().max()).item()


def test_errors_of_layers_are_those_of_their_attention_and_of_what_comes_out():
    window = SlidingWindow(left=2, right=2)
    report = convert(Twice(), window, sample=X)
    dense, sparse = [by_hand(X)], [by_hand(X, window)]
    alone = [relative(dense[0], sparse[0])]
    for _ in range(2):
        for outputs, mask in ((dense, None), (sparse, window)):
            outputs.append(by_hand(outputs[-1] + (outputs[0] if len(outputs) == 2 else 0), mask))
        given = sparse[-2] + (sparse[0] if len(sparse) == 3 else 0)
        alone.append(relative(by_hand(given), sparse[-1]))
    first, second = report.layers["first"], report.layers["second"]
    assert first.attention == pytest.approx(alone[0], rel=1e-4)
    assert first.output == pytest.approx(relative(dense[0], sparse[0]), rel=1e-4)
    assert second.attention == pytest.approx(max(alone[1:]), rel=1e-4)
    assert second.output == pytest.approx(
        max(relative(d, s) for d, s in zip(dense[1:], sparse[1:], strict=True)), rel=1e-4
    )
    assert report.error == pytest.approx(relative(dense[2], sparse[2]), rel=1e-4)
    assert list(report.layers) == ["first", "second"]


def test_layers_of_every_kind_are_found():
    layer = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 2)
    report = convert(model, "longformer:window=2,global_tokens=1", sample=(X, X))
    assert set(report.layers) == set(report.converted) and len(report.layers) == 4
    report = convert(nn.TransformerDecoder(layer, 1), sample=(X, X))
    assert all(found.attention is None and found.output == 0.0 for found in report.layers.values())  # dense itself
    second = convert(model, "causal", sample=(X, X))  # it had a method of ours: compared with that
    assert second.dense_error is None and all(found.output > 0 for found in second.layers.values())


def test_layers_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=37, initializer_range=0.3))
    report = convert(model, WINDOW, sample=torch.arange(3, 27).reshape(2, 12))
    assert list(report.layers) == [f"encoder.layer.{k}.attention.self" for k in (0, 1)]
    assert all(found.attention > 1e-3 and found.output > 1e-3 for found in report.layers.values())


def test_nothing_of_the_measuring_stays():
    attend = {cls: vars(cls)["attend"] for cls in subclasses(Method) if "attend" in vars(cls)}
    model = Twice()
    with fidelity.traced(model) as trace, pytest.raises(RuntimeError):
        model(X)
        model(torch.zeros(1))
    assert list(trace.outputs) == ["first", "second"] and len(trace.outputs["second"]) == 2
    assert all(vars(cls)["attend"] is function for cls, function in attend.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def subclasses(cls):
    return [cls, *(c for child in cls.__subclasses__() for c in subclasses(child))]


def test_nested_tensors_between_layers_are_compared():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    padding = torch.arange(12) >= torch.tensor([12, 7])[:, None]
    report = convert(model, WINDOW, sample={"src": X, "src_key_padding_mask": padding})
    assert report.dense_error < 1e-5 < min(found.output for found in report.layers.values())


# --- time and memory ---


class Costly(nn.Module):
    """Allocates 4 MiB at most, or 1 MiB with another attention than dense."""

    def __init__(self):
        super().__init__()
        self.attend = Attend()
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        size = 2**20 if self.attend.attention.is_dense else 2**18
        torch.zeros(size // 2)
        torch.zeros(size).sum()
        return self.attend(x)


def test_costs():
    report = convert(Costly(), WINDOW, sample=X, repeats=2)
    for cost, most in ((report.before, 4), (report.after, 1)):
        assert most * 2**20 <= cost.bytes < (most + 0.2) * 2**20
        assert 0 < cost.seconds < 60
    model = Costly()
    report = convert(model, WINDOW, sample=X, repeats=0)
    assert report.before is None and report.after is None and model.runs == 3 and report.layers


def test_the_time_is_the_median_of_the_repeats(monkeypatch):
    model = Costly()
    ticks = iter([0.0, 3.0, 10.0, 11.0, 20.0, 25.0])
    monkeypatch.setattr(fidelity.time, "perf_counter", lambda: next(ticks))
    assert fidelity.cost(model, X, 3).seconds == 3.0 and model.runs == 4


def test_nothing_is_written_to_the_standard_error(capfd):
    convert(Twice(), WINDOW, sample=X)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


# --- table and picture ---

LAYERS = {"a": LayerFidelity(0.25, 0.5), "cross": LayerFidelity(None, 0.125)}


def test_table():
    lines = fidelity.table(LAYERS, Cost(0.002, 2**21), Cost(0.001, 2**20))
    assert lines == [
        "  layer  attention   output",
        "  a        2.5e-01  5.0e-01",
        "  cross          -  1.2e-01",
        "forward: 2.00 ms -> 1.00 ms (2.00x as fast)",
        "memory: 2.00 MiB -> 1.00 MiB above model and sample",
    ]
    report = str(convert(Twice(), WINDOW, sample=X))
    assert "attention   output" in report and "second" in report and "x as fast)" in report and "MiB" in report
    assert fidelity.table({}, None, None) == []


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    report = convert(Twice(), WINDOW, sample=X)
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    errors, forward, memory = figure.axes
    assert [text.get_text() for text in errors.get_yticklabels()] == ["first", "second"]
    widths = [bar.get_width() for bar in errors.patches]
    layers = list(report.layers.values())
    assert widths == [f.attention for f in layers] + [f.output for f in layers]
    assert [bar.get_height() for bar in forward.patches] == [report.before.seconds * 1e3, report.after.seconds * 1e3]
    assert len(memory.patches) == 2 and WINDOW in figure.get_suptitle()
    alone = convert(Twice(), WINDOW, sample=X, repeats=0).plot()
    assert len(alone.axes) == 1
    with pytest.raises(InputError, match="sample="):
        convert(Twice(), WINDOW).plot()


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    report = convert(Twice(), WINDOW, sample=X, repeats=0)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r"efficient-attn\[bench\]"):
        report.plot()


def test_difference():
    one = torch.tensor([1.0, -4.0])
    assert fidelity.difference([one], [one + torch.tensor([0.0, 1.0])]) == 0.25
    assert fidelity.difference([one], [one[:1]]) == torch.inf
    assert fidelity.difference([one], [one * torch.tensor([1.0, torch.nan])]) == torch.inf
    assert fidelity.difference([torch.zeros(0)], [torch.zeros(0)]) == 0.0
