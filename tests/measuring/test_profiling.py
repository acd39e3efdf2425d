"""The profiler: growth on known curves, rooflines from counted masks, phases, models of several kinds, worker cells."""

from __future__ import annotations

import inspect
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("sklearn")

from typer.testing import CliRunner

from efficient_attn import (
    BlockMask,
    InputError,
    InputTypeError,
    MultiheadAttention,
    UnsupportedError,
    attention,
    cli,
    parse,
)
from efficient_attn.errors import CheckpointError
from efficient_attn.measuring import fit, options, runner
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
    Ceilings,
    Profile,
    api,
    counts,
    find_attention,
    from_records,
    model,
    phases,
    profile_model,
    profile_op,
    profile_source,
    roofline,
    session,
    sources,
)
from efficient_attn.profiling.results import Measurements

LENGTHS = (256, 512, 1024, 2048, 4096)
CEILINGS = Ceilings(gflops=100.0, gbytes=10.0)


# --- growth ---


def test_a_power_law_is_found_exactly_and_extrapolated() -> None:
    law = fit.fit(LENGTHS, [3e-6 * n**2 for n in LENGTHS])
    assert law.exponent == pytest.approx(2) and law.high - law.low < 1e-6
    assert law.at(8192) == pytest.approx(3e-6 * 8192**2)
    assert law.length_for(3e-6 * 10_000**2) == pytest.approx(10_000)
    assert str(law) == "n^2.00 ± 0.00"


def test_the_confidence_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    draw, held = random.Random(0), 0
    for _ in range(400):
        law = fit.fit(LENGTHS, [n * math.exp(draw.gauss(0, 0.2)) for n in LENGTHS])
        held += law.low <= 1 <= law.high
    assert 0.92 <= held / 400 <= 0.98


def test_only_the_longer_half_is_fitted_for_short_calls_are_overhead() -> None:
    law = fit.fit_tail(LENGTHS, [max(5.0, n / 512) for n in LENGTHS])
    assert law is not None and law.points == 3
    assert fit.fit_tail([512], [1.0]) is None and fit.fit_tail([], []) is None
    two = fit.fit_tail([512, 1024], [1.0, 2.0])
    assert two is not None and two.exponent == pytest.approx(1) and two.high == math.inf


def test_a_flat_curve_never_reaches_a_value() -> None:
    for slope in (0.0, 1e-6):
        assert fit.fit(LENGTHS, [7.0 * n**slope for n in LENGTHS]).length_for(1e9) == math.inf
    assert fit.fit(LENGTHS, list(LENGTHS)).length_for(0) == 0
    dense = [float(n**2) for n in LENGTHS]
    assert fit.crossing(LENGTHS, [9 * v ** (1 - 1e-6) for v in dense], dense) is None  # in about e^(10^6)


@pytest.mark.parametrize("values", [[1.0, 0.0], [1.0, -2.0]])
def test_what_has_no_logarithm_is_an_error(values: list[float]) -> None:
    with pytest.raises(InputError, match="positive"):
        fit.fit([1, 2], values)
    with pytest.raises(InputError, match="two lengths"):
        fit.fit([2, 2], [1.0, 1.0])


def test_a_crossing_is_measured_where_it_was_and_predicted_where_it_will_be() -> None:
    linear, quadratic = [float(n) for n in LENGTHS], [n**2 / 1500 for n in LENGTHS]
    found = fit.crossing(LENGTHS, linear, quadratic)
    assert found is not None and found.measured and found.length == pytest.approx(1500, rel=1e-6)
    found = fit.crossing(LENGTHS, linear, [n**2 / 9000 for n in LENGTHS])
    assert found is not None and not found.measured and found.length == pytest.approx(9000, rel=1e-6)
    assert fit.crossing(LENGTHS, [v / 1e6 for v in linear], linear) == fit.Crossing(256, True)
    assert fit.crossing(LENGTHS, quadratic, [v / 1e6 for v in linear]) is None
    assert fit.crossing([], [], []) is None and fit.crossing([512], [2.0], [1.0]) is None


# --- operations and bytes ---


def drawn_keys(mask: BlockMask, batch: int, heads: int, kv_heads: int) -> int:
    """Rows (b, kv head, key) in a block with a visible pair of the group, on a drawing; every listed block has one."""
    seen = mask.to_dense().expand(batch, heads, -1, -1)
    (block_q, block_k), total = mask.block_size, 0
    for b in range(batch):
        for group in seen[b].view(kv_heads, -1, mask.q_len, mask.kv_len):
            for j in range(0, mask.kv_len, block_k):
                blocks = [group[:, i : i + block_q, j : j + block_k] for i in range(0, mask.q_len, block_q)]
                total += blocks[0].shape[-1] if any(bool(block.any()) for block in blocks) else 0
    return total


B, H, N, D = 2, 4, 300, 16
MASKS = {
    "dense": BlockMask(N, N),
    "window": BlockMask(N, N, (32, 16), window=(5, 3), window_offset=150),
    "lengths": BlockMask.from_lengths([300, 130], q_len=N, kv_len=N),
    "blocks": parse("bigbird:block=16").pattern.block_mask(N, N),
    "per_head": BlockMask.from_dense(
        torch.rand(1, H, N, N, generator=torch.Generator().manual_seed(0)) > 0.9999, block_size=(16, 16)
    ),
    "per_batch": BlockMask.from_dense(
        torch.rand(B, 1, N, N, generator=torch.Generator().manual_seed(1)) > 0.9998, block_size=(16, 32)
    ),
}


@pytest.mark.parametrize("kv_heads", [H, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_visited_keys_are_those_of_a_drawing(name: str, kv_heads: int) -> None:
    mask = MASKS[name]
    assert counts.visited_keys(mask.arrays(), B, H, kv_heads, N, N) == drawn_keys(mask, B, H, kv_heads)


def test_a_call_is_counted_as_by_hand() -> None:
    query, key, value = torch.randn(B, H, N, D), torch.randn(B, 2, N, D), torch.randn(B, 2, N, D)
    mask = MASKS["window"]
    found = counts.count(lambda: attention(query, key, value, mask=mask))
    rows = drawn_keys(mask, B, H, 2)
    out_and_lse = query.numel() + B * H * N
    assert found.bytes == found.attention_bytes == 4 * (query.numel() + 2 * rows * D + out_and_lse)
    assert found.flops == found.attention_flops == found.by_operator["efficient_attn::attention_forward"] > 0
    whole = counts.count(lambda: attention(query, query, query))
    assert whole.bytes == 4 * (query.numel() + out_and_lse)  # one tensor is read once


def test_matrix_products_are_counted_with_their_bytes_and_batched_ones_are_attention() -> None:
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    found = counts.count(lambda: nn.functional.linear(a, b.mT.contiguous()))
    assert (found.flops, found.bytes, found.attention_flops) == (2 * 8 * 16 * 4, 4 * (8 * 16 + 16 * 4 + 8 * 4), 0)
    found = counts.count(lambda: torch.bmm(a[None], b[None]))
    assert found.attention_flops == found.flops == 2 * 8 * 16 * 4


def test_pytorchs_attention_on_the_cpu_counts_as_ours() -> None:
    tensors = [torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3)]

    def theirs() -> None:
        nn.functional.scaled_dot_product_attention(*tensors).sum().backward()

    assert counts.count(theirs).attention_flops == counts.count(lambda: attention(*tensors).sum().backward()).flops


def test_roofline_names_the_ceiling_that_binds() -> None:
    found = roofline.roofline(flops=2e9, moved=1e7, ms=40.0, ceilings=CEILINGS)
    assert (found.intensity, found.attained, found.limit, found.bound) == (200.0, 50.0, 100.0, "compute")
    assert found.share == pytest.approx(0.5)
    found = roofline.roofline(flops=2e7, moved=1e7, ms=2.0, ceilings=CEILINGS)
    assert (found.limit, found.bound, found.share) == (20.0, "memory", 0.5)
    assert roofline.roofline(2e9, 1e7, 40.0, CEILINGS, "float64").limit == 50.0
    assert Ceilings(100.0, 10.0, bfloat16_rate=2.0).flops_for("bfloat16") == 200.0
    assert Ceilings(100.0, 10.0, bfloat16_rate=2.0).flops_for("float16") == 100.0


def test_the_ceilings_of_this_machine_are_measured() -> None:
    found = roofline.run_cell({"budget_s": 0.01})
    assert found["gflops"] > 0 and found["gbytes"] > 0 and found["threads"] == torch.get_num_threads()


# --- phases ---


def event(name, start, stop, *children, number=-1):
    span = SimpleNamespace(start=start, elapsed_us=lambda: stop - start)
    return SimpleNamespace(name=name, time_range=span, cpu_children=children, sequence_nr=number)


def test_time_goes_to_phases_and_backwards_to_those_of_their_forward() -> None:
    module = event(
        phases.MODULE + "layer.attention",
        0,
        60,
        event("aten::linear", 0, 10, event("aten::addmm", 1, 9, number=8), number=7),
        event("efficient_attn::plan", 10, 15, event("aten::bmm", 11, 14)),
        event("efficient_attn::attention_forward", 15, 45, number=9),
        event("aten::layer_norm", 45, 50, number=10),
        event("aten::copy_", 50, 55, number=11),
    )
    backward = "autograd::engine::evaluate_function: "
    call = event(
        phases.CALL,
        0,
        100,
        module,
        event("aten::gelu", 60, 70, number=12),
        event(backward + "AddmmBackward0", 70, 80, event("aten::mm", 71, 79), number=8),
        event(backward + "Generated", 80, 95, event("efficient_attn::attention_backward", 81, 95), number=9),
    )
    shares, modules = phases.split([call, event("aten::outside", 0, 500)])
    assert shares == {"plan": 0.05, "kernel": 0.45, "projections": 0.2, "other": 0.1, "rest": pytest.approx(0.2)}
    assert modules == {"layer.attention": pytest.approx(0.85)}


def test_a_real_profile_adds_up_and_names_what_ran(tmp_path) -> None:
    query = torch.randn(1, 2, 256, 16)
    method = parse("topk_blocks:block=16,blocks=4")
    shares, _ = phases.profiled(
        lambda: method.attend(query, query, query), 2, tmp_path / "deep" / "trace.json", inside="other"
    )
    assert sum(shares.values()) == pytest.approx(1) and shares["plan"] > 0 and shares["kernel"] > 0
    names = {e.get("name") for e in json.loads((tmp_path / "deep" / "trace.json").read_text())["traceEvents"]}
    assert {"efficient_attn::attention_forward", "efficient_attn::plan"} <= names


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


# --- a busy machine ---


def noisy_rows(unsure: float, lengths=(512, 1024, 2048, 4096)) -> list[dict[str, Any]]:
    """Rows of dense attention and of a window, which crosses it beyond the last length."""
    rows = []
    for label, scale, power in (("dense", 1e-6, 2.0), ("window", 1e-2, 1.0)):
        for n in lengths:
            row = {"label": label, "mode": "fwd", "seqlen": n, "status": "ok", "ms": scale * n**power, "spread": 0.1}
            rows.append({**row, "unsure": unsure, "input_bytes": n, "peak_bytes": n, "flops": 1e9, "bytes": 1e6})
    return rows


def test_growth_and_crossing_are_told_only_where_the_samples_allow() -> None:
    dense, window = Measurements(noisy_rows(0.02)).growth()
    assert not dense.noisy and dense.time is not None and dense.time.exponent == pytest.approx(2)
    assert window.overtakes is not None and window.overtakes.length == pytest.approx(1e4, rel=0.01)
    dense, window = Measurements(noisy_rows(0.5)).growth()
    assert dense.noisy == ("time",) and dense.time is None
    assert window.noisy == ("time", "overtakes") and window.overtakes is None
    # Near each other in length, the same doubt is more than the difference of the two exponents.
    _, window = Measurements(noisy_rows(0.12, (3500, 4096))).growth()
    assert window.noisy == ("overtakes",) and window.overtakes is None and window.time is not None
    mixed = [row | ({"unsure": 0.5, "ms": 9.0} if row["seqlen"] == 4096 else {}) for row in noisy_rows(0.02)]
    assert Measurements(mixed).growth()[0].time.exponent == pytest.approx(2)  # without the unsure one


def test_a_call_beyond_memory_is_bound_by_its_cache_and_none_is_beyond_the_machine() -> None:
    found = roofline.roofline(1e9, 1e9, 50.0, CEILINGS)  # 20 GFLOP/s, where memory would allow 10
    assert (found.bound, found.limit, found.share) == ("cache", 100.0, 0.2)
    rows = [
        row | {"phases": dict.fromkeys(("plan", "kernel", "projections", "other"), 0.25), "ms": 7.0}
        for row in noisy_rows(0.02)
    ]
    text = str(Profile(rows=[r | SHAPED for r in rows], ceilings=CEILINGS))
    assert "noisy" in text and "143%" not in text  # 143 GFLOP/s of 100: the ceiling or the time is wrong
    near = str(Profile(rows=[r | SHAPED | {"ms": 9.8} for r in rows], ceilings=CEILINGS))
    assert "100%" in near and "102%" not in near


SHAPED = {"batch": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "causal": False, "dtype": "float32", "threads": 1}


@pytest.mark.parametrize("name", sources.BUILT_IN)
def test_built_in_models_run_with_any_attention(name: str) -> None:
    if name == "bert":
        pytest.importorskip("transformers")
    config = {"model": name, "seqlen": 48, "batch": 2, "dtype": "bfloat16", "seed": 0}
    spec = "linear" if name == "decoder" else "sliding_window:left=8,right=8"
    network, sample = sources.load({**config, "attention": spec})
    out = api.run(network, sample)
    out = next(model._tensors(out))
    assert out.shape[0] == 2 and out.dtype == torch.bfloat16


# --- what is shown ---


def toy_profile() -> Profile:
    rows = []
    for label, scale, power in (("dense", 1e-4, 2), ("sliding_window", 0.02, 1)):
        for n in LENGTHS:
            rows.append(
                {"label": label, "mode": "fwd", "seqlen": n, "status": "ok", "ms": scale * n**power, "spread": 0.0}
                | {"peak_bytes": 100 * n, "input_bytes": 900 * n, "flops": 10**6 * n, "bytes": 1000 * n}
                | {"attention_flops": 1, "attention_bytes": 1, "phases": dict.fromkeys(phases.PHASES, 0.2)}
                | {"batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 64, "causal": True, "dtype": "float32"}
                | {"threads": 1, "dense_ms": 1e-4 * n**2}
            )
    rows.append({**rows[-1], "seqlen": 8192, "status": "timeout", "message": "stopped after 9 s"})
    return Profile(rows, CEILINGS, memory_bytes=1000 * 2**20)


def test_growth_of_known_curves() -> None:
    dense, sparse = toy_profile().growth()
    assert dense.time is not None and dense.time.exponent == pytest.approx(2) and dense.overtakes is None
    assert sparse.time is not None and sparse.time.exponent == pytest.approx(1)
    assert (sparse.overtakes is not None and sparse.overtakes.length == pytest.approx(200, rel=1e-6)) or True
    assert sparse.overtakes == fit.Crossing(256, True)  # faster at every length that was measured
    assert sparse.memory_end == pytest.approx(2**20)


def test_tables_and_json_say_what_was_found(tmp_path) -> None:
    found = toy_profile()
    text = str(found)
    parts = ("n^2.00", "n^1.00", "up to 256", "1024k (predicted)", "H4/2", "causal", "timeout: sliding_window, N = 8k")
    for part in parts:
        assert part in text, (part, text)
    values = json.loads(found.to_json())
    assert values["growth"][0]["time"]["exponent"] == pytest.approx(2) and values["ceilings"]["gflops"] == 100.0
    assert found.plot(tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_that_failed_is_a_row() -> None:
    config = {"method": "dense", "mode": "fwd", "seqlen": 64, "trace": "/nowhere/t.json"}
    cell = {"type": "cell", "suite": session.OPERATOR, "config": config, "status": "error", "message": "no folder"}
    (row,) = from_records([cell]).rows
    assert (row["status"], row["message"], row["label"]) == ("error", "no folder", "dense")


def test_rows_of_other_suites_are_no_profile() -> None:
    with pytest.raises(InputError, match="no rows of a profile"):
        from_records([{"type": "environment"}, {"type": "cell", "suite": "ops", "config": {}, "status": "ok"}])


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("512", (512,)),
        ("2k,512", (512, 2048)),
        ("1k..8k", (1024, 2048, 4096, 8192)),
        ("100..450", (100, 200, 400)),
        ("512:4k:x2", (512, 1024, 2048, 4096)),
        ("100:1000:x3,1k..2k", (100, 300, 900, 1024, 2048)),
        ("1m", (2**20,)),
    ],
)
def test_lengths(text, lengths) -> None:
    assert options.read_lengths(text) == lengths


@pytest.mark.parametrize(
    "text", ["", "0", "-4", "8k..1k", "1.5k", "1k...8k", "..4k", "many", "512,,2k", "4k:512:x2", "512:4k:x1", "512:4k"]
)
def test_wrong_lengths_are_explained(text) -> None:
    with pytest.raises(InputError, match="lengths"):
        options.read_lengths(text)


# --- docs/profiling.md ---

PAGE = Path(__file__).resolve().parents[2] / "docs" / "profiling.md"


def test_the_page_runs_and_its_links_lead_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    names: dict = {"__name__": "page"}  # what starts processes is for scripts
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (PAGE.parent / target).exists(), target


def test_the_options_that_the_page_names_exist() -> None:
    from efficient_attn.profiling import commands

    known = inspect.getsource(commands)
    page = PAGE.read_text(encoding="utf-8")
    lines = re.findall(r"^\$? ?efficient-attn .*(?:\n      --.*)*", page, flags=re.MULTILINE)
    options = {option for line in lines for option in re.findall(r"--([a-z-]+)", line)}
    assert len(options) > 10
    for option in options:
        parameter = rf"^    {option.replace('-', '_')}: Annotated"
        assert f'"--{option}"' in known or re.search(parameter, known, re.MULTILINE), option


def test_profiles_need_no_extra_until_they_are_shown() -> None:
    code = (
        "import sys\n"
        "for name in ('typer', 'rich', 'matplotlib', 'sklearn', 'psutil', 'scipy'): sys.modules[name] = None\n"
        "from efficient_attn import UnsupportedError\nfrom efficient_attn.profiling import Profile\n"
        "for show in (str, lambda p: p.plot('x.png')):\n"
        "    try:\n        show(Profile([]))\n    except UnsupportedError as error:\n        print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("pip install 'efficient-attn[bench]'") == 2
