"""Profiles of models of several kinds, in this process and in workers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("sklearn")

from typer.testing import CliRunner

from efficient_attn import (
    InputError,
    InputTypeError,
    MultiheadAttention,
    UnsupportedError,
    cli,
)
from efficient_attn.errors import CheckpointError
from efficient_attn.measuring import fit, runner
from efficient_attn.models import (
    CausalLM,
    CausalLMConfig,
    ImageConfig,
    TextClassifier,
    TextClassifierConfig,
    TransformerConfig,
    ViT,
    ViTConfig,
)
from efficient_attn.profiling import (
    api,
    find_attention,
    from_records,
    model,
    profile_model,
    profile_op,
    profile_source,
    session,
    sources,
)

LENGTHS = (256, 512, 1024, 2048, 4096)


# --- models ---


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = MultiheadAttention(32, 2, batch_first=True, attention="sliding_window:left=8,right=8")
        self.head = nn.Linear(32, 3)

    def forward(self, x, scale=1.0):
        return {"logits": self.head(self.attention(x, x, x)[0]) * scale}


def bert():
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **settings))


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64), 2, enable_nested_tensor=False)


MODELS = {
    "torch": (encoder, lambda n: torch.randn(n, 3, 32), ["layers.0.self_attn", "layers.1.self_attn"]),
    "ours": (Wrapped, lambda n: {"x": torch.randn(3, n, 32), "scale": 2.0}, ["attention"]),  # a window: fewer pairs
    "transformers": (
        bert,
        lambda n: {"input_ids": torch.randint(50, (3, n))},
        ["encoder.layer.0.attention", "encoder.layer.1.attention"],
    ),
    "module": (lambda: nn.MultiheadAttention(32, 2, batch_first=True), lambda n: (torch.randn(3, n, 32),) * 3, [""]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_ones_own(name: str, tmp_path) -> None:
    make, sample, modules = MODELS[name]
    network = make().train()
    found = profile_model(
        network, sample, lengths=(64,), mode=("fwd", "fwd_bwd"), budget_s=0.01, ceilings=False, out=tmp_path
    )
    assert [(r["seqlen"], r["mode"], r["batch"], r["status"]) for r in found.rows] == [
        (64, mode, 3, "ok") for mode in ("fwd", "fwd_bwd")
    ]
    assert network.training and all(p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks for m in network.modules())
    for row in found.rows:
        assert list(row["modules"]) == modules
        assert sum(row["phases"].values()) == pytest.approx(1, abs=1e-3) and row["phases"]["kernel"] > 0
        assert row["attention_flops"] > 0 and row["flops"] > row["attention_flops"]
        assert row["fast_path"] == (name == "torch" and row["mode"] == "fwd")
    assert [m["kind"] for m in found.rows[0]["modules"].values()] == [type(m).__name__ for m in find_attention(
        network).values()]  # fmt: skip
    attends = 4 * 3 * 64 * 64 * 32 * (2 if len(modules) == 2 else 1)
    if name != "ours":
        assert found.rows[0]["attention_flops"] == attends
    again = from_records(runner_rows(tmp_path), "model")
    assert again.rows == found.rows
    assert "Growth" in str(found) and modules[0] in str(found)


def runner_rows(folder):
    from efficient_attn.measuring import records

    return list(records.read(folder / "results.jsonl"))


def test_a_sample_as_it_is_makes_one_row_with_the_length_that_attention_saw(tmp_path) -> None:
    found = profile_model(encoder(), torch.randn(40, 3, 32), budget_s=0.01, trace=tmp_path / "t.json")
    (row,) = found.rows
    assert (row["seqlen"], row["batch"]) == (40, 3) and found.ceilings is not None
    assert found.roofline(row) is not None
    assert "attention module: layers.0.self_attn" in (tmp_path / "t.json").read_text()


def test_a_row_that_runs_out_of_memory_is_kept_and_longer_ones_are_not_tried() -> None:
    class Greedy(Wrapped):
        def forward(self, x, scale=1.0):
            if x.shape[1] > 32 and self.attention.training is False and torch.is_grad_enabled():
                raise MemoryError("not enough memory: you tried to allocate 10 bytes")
            return super().forward(x, scale)

    found = profile_model(
        Greedy(), lambda n: torch.randn(1, n, 32), lengths=(32, 64, 128), mode="fwd_bwd", budget_s=0.01, ceilings=False
    )
    assert [(row["seqlen"], row["status"]) for row in found.rows] == [(32, "ok"), (64, "oom")]
    assert "oom: as it is, N = 64" in str(found)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: profile_model(nn.Linear(3, 3), torch.randn(2, 3)), InputError, "looks like attention"),
        (lambda: profile_model(3, torch.randn(2, 3)), InputTypeError, "Module"),
        (lambda: profile_model(Wrapped(), torch.randn(1, 4, 32), mode="bwd"), InputError, "fwd, fwd_bwd"),
        (lambda: profile_model(Wrapped(), torch.randn(1, 4, 32), lengths=(4,)), InputError, "function"),
        (lambda: profile_model(Wrapped(), torch.randn(1, 4, 32), attention=["x"]), InputError, "no module 'x'"),
        (lambda: profile_model(Wrapped().to("meta"), torch.randn(1, 4, 32)), UnsupportedError, "CPU"),
        (lambda: profile_op("bigbirt"), InputError, "did you mean"),
        (lambda: profile_op("dense", lengths=()), InputError, "at least one length"),
        (lambda: profile_op("dense", lengths=(0,)), InputError, "positive"),
        (lambda: profile_op("dense", heads=3, kv_heads=2), InputError, "multiple"),
        (lambda: profile_op("dense", head_dim=300), InputError, "256"),
        (lambda: profile_op("dense", dtype="int8"), InputError, "float32"),
        (lambda: profile_op("dense", mode="bwd"), InputError, "fwd"),
        (lambda: profile_op([]), InputError, "at least one"),
        (lambda: profile_source("nonsense"), InputError, "encoder, decoder, bert"),
        (lambda: profile_source("missing.py:f", lengths=(8,)), InputError, "does not exist"),
    ],
)
def test_wrong_input_is_named_before_anything_runs(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


# --- cells in workers ---


def toy(exponent):
    """A suite of the runner whose times are a known power of the length; `run` of a session that measures nothing."""

    def run(self, suite, config):
        n = config["seqlen"]
        row = {"status": "ok", "ms": 1e-3 * n**exponent, "spread": 0.0}
        row["dense_ms" if config.get("dense") else "unused"] = 1e-6 * n**2
        return {"config": config, "suite": suite, **row}

    return run


def grown(monkeypatch, tmp_path, exponent, lengths=LENGTHS, **limits):
    monkeypatch.setattr(session.Session, "run", toy(exponent))
    series = [{"method": "toy", "mode": "fwd"}]
    with session.Session(tmp_path / "results.jsonl", runner.Limits(**limits)) as running:
        return running.grow("toy", series, lengths, dense=True)


@pytest.mark.parametrize("exponent", [1, 2])
def test_lengths_beyond_the_limit_are_rows_that_were_not_run(monkeypatch, tmp_path, exponent) -> None:
    # 4 calls of 1e-6 n^exponent seconds in twice the limit: n up to sqrt or all.
    rows = grown(monkeypatch, tmp_path, exponent, lengths=(1024, 2048, 4096, 8192, 16384), seconds=40)
    done = [row["config"]["seqlen"] for row in rows if row["status"] == "ok"]
    assert done == ([1024, 2048, 4096] if exponent == 2 else [1024, 2048, 4096, 8192, 16384])
    assert all(row["status"] == "timeout" and "not run" in row["message"] for row in rows[len(done) :])
    assert fit.fit(done, [row["ms"] for row in rows[: len(done)]]).exponent == pytest.approx(exponent)


def test_dense_attention_stays_away_once_it_is_not_affordable(monkeypatch, tmp_path) -> None:
    rows = grown(monkeypatch, tmp_path, 1, lengths=(1024, 4096, 16384, 65536), seconds=10)
    assert [row["config"]["dense"] for row in rows] == [True, True, True, False]  # 1e-9 * 65536^2 s > 10 % of 10 s


def test_methods_are_measured_in_workers_and_kept(tmp_path) -> None:
    seen = []
    call = {"lengths": (64, 128), "heads": 2, "head_dim": 16, "threads": 1, "budget_s": 0.01, "out": tmp_path}
    spec = "sliding_window:left=8,right=8"
    found = profile_op(spec, **call, report=lambda *x: seen.append(x), trace=tmp_path / "t.json")
    assert [(r["label"], r["seqlen"], r["status"]) for r in found.rows] == [(spec, n, "ok") for n in (64, 128)]
    row = found.rows[1]
    assert row["flops"] == 4 * 2 * 128 * 128 * 16 and row["density"] < 0.2 and row["dense_ms"] > 0  # one block a head
    assert row["bytes"] == 4 * (4 * 2 * 128 * 16 + 2 * 128) and row["input_bytes"] == 3 * 4 * 2 * 128 * 16
    assert found.roofline(row).bound in ("compute", "memory")
    assert seen == [("ceilings of this machine", 0, 0), (f"{spec} N=64 fwd", 0, 2), (f"{spec} N=128 fwd", 1, 2)]
    assert "efficient_attn::attention_forward" in (tmp_path / "t.json").read_text()
    assert from_records(runner_rows(tmp_path)).rows == found.rows  # the cell of the trace is none
    lines = len((tmp_path / "results.jsonl").read_text().splitlines())
    again = profile_op(spec, **call, trace=tmp_path / "t.json")
    assert again.rows == found.rows and len((tmp_path / "results.jsonl").read_text().splitlines()) == lines + 1
    assert found.plot(tmp_path / "p.png").stat().st_size > 10_000
    assert json.loads(found.to_json())["rows"][0]["phases"]["kernel"] > 0


def test_out_of_memory_is_a_row_and_longer_lengths_are_not_run() -> None:
    limits = runner.Limits(3600, 400 * 2**20)
    found = profile_op("dense", lengths=(256, 65536, 131072), heads=8, threads=1, budget_s=0.01, limits=limits)
    assert [row["status"] for row in found.rows] == ["ok", "oom", "oom"], str(found)
    assert "not run" in found.rows[2]["message"] and "oom: dense, N = 64k" in str(found)
    assert found.ceilings is None and found.roofline(found.rows[0]) is None  # a copy of 256 MiB had no room either


def test_a_model_of_a_file_is_measured_with_an_attention(tmp_path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom efficient_attn import MultiheadAttention\n"
        "class Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.a = MultiheadAttention(16, 2, batch_first=True)\n"
        "    def forward(self, x):\n        return self.a(x, x, x)[0]\n"
        "def build(n):\n    return Net(), torch.randn(1, n, 16)\nnothing = 3\ndef wrong(n):\n    return 4\n"
    )
    config = {"seqlen": 256, "mode": "fwd", "batch": 1, "dtype": "float32", "seed": 0, "budget_s": 0.01, "threads": 1}
    config["model"] = f"{tmp_path}/mine.py:build"
    flops = [model.run_cell({**config, "attention": a})["attention_flops"] for a in (None, "sliding_window:left=4")]
    assert flops[1] == flops[0]  # 4 + 128 keys to either side still touch all 2 x 2 blocks of 128
    found = model.run_cell({**config, "attention": "bigbird:block=16"})
    assert found["attention_flops"] < flops[0] and found["fixed_bytes"] == 4 * (4 * 16 * 16 + 4 * 16)
    for name, message in (("nothing", "no function"), ("missing", "no function"), ("wrong", "must return")):
        with pytest.raises(InputError, match=message):
            sources.load({**config, "model": f"{tmp_path}/mine.py:{name}", "attention": None})
    with pytest.raises(InputError, match="cannot be imported"):
        sources.find("no_such_package_at_all:build")


def test_a_checkpoint_of_transformers_is_measured(tmp_path) -> None:
    bert().save_pretrained(tmp_path)
    config = {"model": str(tmp_path), "seqlen": 32, "batch": 2, "dtype": "float32", "seed": 0}
    network, sample = sources.load({**config, "attention": "sliding_window:left=4,right=4"})
    assert sample["input_ids"].shape == (2, 32) and api.run(network, sample)[0].shape == (2, 32, 32)
    with pytest.raises(UnsupportedError, match="512 tokens, not 600"):
        sources.load({**config, "seqlen": 600, "attention": None})


def test_a_model_of_this_package_that_was_saved_is_measured(tmp_path) -> None:
    pytest.importorskip("safetensors")
    layers = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2}
    made = [
        TextClassifier(TextClassifierConfig(50, 64, TransformerConfig(**layers), num_labels=2)),
        CausalLM(CausalLMConfig(50, 64, TransformerConfig(**layers, causal=True))),
        ViT(ViTConfig(ImageConfig(16, 4, 1, encoder=TransformerConfig(**layers)), num_labels=2)),
    ]
    config = {"seqlen": 32, "batch": 2, "dtype": "float32", "seed": 0}
    for net in made:
        net.save_pretrained(tmp_path / type(net).__name__)
    for net in made[:2]:
        chosen = {**config, "model": str(tmp_path / type(net).__name__)}
        network, sample = sources.load({**chosen, "attention": None})
        assert torch.equal(api.run(network, sample), net.eval()(sample)) and sample.shape == (2, 32)
        changed, _ = sources.load({**chosen, "attention": "sliding_window:left=4,right=0"})
        assert not torch.equal(api.run(changed, sample), api.run(network, sample))
        with pytest.raises(UnsupportedError, match="positions for 64 tokens, not 65"):
            sources.load({**chosen, "attention": None, "seqlen": 65})
    with pytest.raises(InputError, match="holds a 'ViT', whose input has no free length"):
        sources.find(str(tmp_path / "ViT"))
    (tmp_path / "ViT" / "config.json").write_text('{"efficient_attn": 1, "mod')
    with pytest.raises(CheckpointError, match="is not JSON"):
        sources.find(str(tmp_path / "ViT"))


def test_a_profile_of_which_nothing_could_be_measured_fails(tmp_path) -> None:
    (tmp_path / "mine.py").write_text("def build(n):\n    raise ValueError('no data today')\n")
    (tmp_path / "good.py").write_text(
        "import torch\nfrom efficient_attn import MultiheadAttention\ndef build(n):\n"
        "    if n > 64:\n        raise ValueError('too long')\n"
        "    x = torch.randn(1, n, 16)\n    return MultiheadAttention(16, 2, batch_first=True), (x, x, x)\n"
    )
    for name, code in (("mine.py", 1), ("good.py", 0)):
        out = ["--lengths", "64,128", "--budget", "0.05", "--threads", "1", "--out", str(tmp_path / name[:4])]
        command = ["profile", "--model", f"{tmp_path}/{name}:build", *out]
        done = CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, command)
        assert done.exit_code == code and ("no cell could be measured" in done.output) == (code == 1), done.output
