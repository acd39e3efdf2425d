"""`recommend`: the front is one, the pick is the fastest within the budget, errors are those on given activations."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("sklearn")
pytest.importorskip("typer")

from typer.testing import CliRunner

from efficient_attn import InputError, UnsupportedError, attention, cli, parse
from efficient_attn.measuring import calls, records
from efficient_attn.profiling import (
    Candidate,
    activations,
    from_rows,
    operator,
    pareto,
    recommend,
    recommendation,
    session,
)

OPERATOR = "efficient_attn.profiling.operator"


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(cli.app, list(arguments))


# --- the front ---


def test_the_front_is_what_no_other_beats() -> None:
    draw = random.Random(0)
    for _ in range(50):
        points = [Candidate(str(k), 1.0, draw.randint(1, 9) / 10, draw.randint(0, 9) / 10) for k in range(12)]
        front = pareto(points)

        def beats(a: Candidate, b: Candidate) -> bool:
            return a.relative <= b.relative and a.error <= b.error and (a.relative, a.error) != (b.relative, b.error)

        assert front and not any(beats(a, b) for a, b in itertools.product(points, front))
        places = {(c.relative, c.error) for c in front}
        unbeaten = {(c.relative, c.error) for c in points if not any(beats(a, c) for a in points)}
        assert places == unbeaten and len(front) == len(places)
        assert [c.relative for c in front] == sorted(c.relative for c in front)


def rows_of(figures, **changed):
    """Rows of `recommend` with given (method, ms, dense_ms, error)."""
    config = {"batch": 1, "heads": 4, "kv_heads": 4, "head_dim": 64, "seqlen": 1024, "dtype": "float32"}
    config |= {"mode": "fwd", "causal": False, **changed}
    return [
        {"type": "cell", "suite": OPERATOR, "status": "ok", "config": {**config, "method": method}}
        | {"ms": ms, "error": error, **({"dense_ms": dense} if dense else {})}
        for method, ms, dense, error in figures
    ]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FIGURES = [("dense", 10, None, 1e-7), ("bigbird", 4, 10, 0.05), ("linear", 1, 10, 0.8), ("nystrom", 6, 10, 0.3)]


@pytest.mark.parametrize(
    ("budget", "pick", "reason"),
    [
        (0.1, "bigbird", "2.50x as fast as dense with an error of 5.0e-02; linear is faster, but errs by 8.0e-01"),
        (0.9, "linear", "10.00x as fast"),
        (1e-3, "dense", "all that is faster errs more: bigbird by 5.0e-02"),
        (1e-9, None, "Nothing is within an error of 1e-09: dense, the closest"),
    ],
)
def test_the_pick_is_the_fastest_within_the_budget_and_says_why(tmp_path, budget, pick, reason) -> None:
    found = from_rows([written(tmp_path / "a.jsonl", rows_of(FIGURES))], budget=budget)
    assert (found.pick.method if found.pick else None) == pick
    assert reason in found.reason and reason in " ".join(str(found).split())
    assert [c.method for c in found.front] == ["linear", "bigbird", "dense"]
    assert [c.method for c in found.candidates] == ["linear", "bigbird", "nystrom", "dense"]
    assert json.loads(found.to_json())["budget"] == budget
    assert found.plot(tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("doubt", [{"unsure": 0.5}, {"unsure": 0.01, "dense_unsure": 0.5}])
def test_a_pick_of_a_busy_machine_is_called_so(tmp_path, doubt) -> None:
    rows = [row | (doubt if row["config"]["method"] == "bigbird" else {}) for row in rows_of(FIGURES)]
    found = from_rows([written(tmp_path / "a.jsonl", rows)], budget=0.1)
    assert found.pick is not None and found.pick.noisy and "too noisy to tell" in found.reason and "4~" in str(found)
    assert "too noisy" not in from_rows([tmp_path / "a.jsonl"], budget=0.9).reason


def test_methods_are_compared_by_the_ratio_to_the_dense_attention_beside_them(tmp_path) -> None:
    rows = rows_of([("dense", 10, None, 1e-7), ("bigbird", 9, 30, 0.05), ("longformer", 8, 8, 0.01)])  # a busy machine
    found = from_rows([written(tmp_path / "a.jsonl", rows)], budget=0.1)
    assert found.pick is not None and found.pick.method == "bigbird" and found.pick.relative == pytest.approx(0.3)
    rows = rows_of([("dense", 10, None, 1e-7), ("bigbird", 9, None, 0.05)])  # dense was too slow to stand beside it
    found = from_rows([written(tmp_path / "b.jsonl", rows)], budget=0.1)
    assert found.pick is not None and found.pick.relative == pytest.approx(0.9) and "separate" in found.caption
    found = from_rows([written(tmp_path / "c.jsonl", rows[1:])], budget=0.1)
    assert found.pick is not None and found.pick.relative == 1.0 and "could not run" in found.caption


def test_rows_are_chosen_by_shape_and_failures_are_kept(tmp_path) -> None:
    rows = rows_of(FIGURES) + rows_of(FIGURES[:2], seqlen=4096)
    rows.append({**rows[0], "config": {**rows[0]["config"], "method": "lsh"}, "status": "oom", "message": "too much"})
    path = written(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match=r"several shapes.*N1024.*N4096"):
        from_rows([path], budget=0.1)
    with pytest.raises(InputError, match=r"no rows for.*There are.*N1024"):
        from_rows([path], budget=0.1, seqlen=77)
    with pytest.raises(InputError, match="chosen by batch"):
        from_rows([path], budget=0.1, lenght=77)
    found = from_rows([path], budget=0.1, seqlen=1024)
    assert found.failed == [("lsh", "oom", "too much")] and "oom: lsh: too much" in str(found)
    with pytest.raises(InputError, match="cannot be read"):
        from_rows([tmp_path / "missing.jsonl"], budget=0.1)


def test_rows_of_the_benchmark_suite_serve_too(tmp_path) -> None:
    config = {"method": "dense", "seqlen": 512, "mode": "fwd", "causal": False, "dtype": "float32", "threads": 1}
    config |= {"batch": 1, "heads": 4, "head_dim": 64, "budget_s": 1.0}
    cell = {"type": "cell", "suite": "ops", "status": "ok", "config": config, "ms": 3.0, "dense_ms": 3.0, "error": 1e-7}
    other = {**cell, "config": {**config, "method": "linear"}, "ms": 1.0, "error": 0.5}
    found = from_rows([written(tmp_path / "a.jsonl", [cell, other])], budget=0.6)
    assert found.pick is not None and found.pick.method == "linear" and "photographs" in found.caption


# --- measured ---


def test_candidates_are_measured_on_random_activations(tmp_path) -> None:
    call = {"budget": 0.5, "length": 128, "heads": 2, "head_dim": 16, "threads": 1, "budget_s": 0.01, "out": tmp_path}
    specs = ["sliding_window:left=1000,right=1000", "linear"]
    found = recommend(candidates=specs, **call)
    errors = {c.method: c.error for c in found.candidates}
    assert sorted(errors) == sorted(["dense", *specs])
    assert errors["dense"] < 1e-5 and errors[specs[0]] < 1e-5  # a window over everything is dense
    assert errors["linear"] > 0.5 and "seed 0" in found.caption and found.pick is not None
    lines = len((tmp_path / "results.jsonl").read_text().splitlines())
    assert {c.method: c.error for c in recommend(candidates=specs, **call).candidates} == errors
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == lines + 1  # the environment alone


def test_a_candidate_that_cannot_serve_is_kept_with_its_reason() -> None:
    found = recommend(
        candidates=["nystrom"], budget=0.1, length=64, heads=1, head_dim=16, causal=True, threads=1, budget_s=0.01
    )
    assert [c.method for c in found.candidates] == ["dense"]
    ((method, status, message),) = found.failed
    assert (method, status) == ("nystrom", "unsupported") and "causal" in message


class Net(nn.Module):
    """Two layers of attention; the second sees padding or is causal."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.MultiheadAttention(32, 2, batch_first=True) for _ in range(2))
        self.causal = causal

    def forward(self, x, padding=None):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).isinf() if self.causal else None
        for layer in self.layers:
            x = (
                x
                + layer(x, x, x, key_padding_mask=padding, attn_mask=mask, is_causal=self.causal, need_weights=False)[0]
            )
        return x


def padding_of(lengths, size):
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("kind", ["plain", "padded", "holes", "causal", "bare"])
def test_a_models_activations_are_what_its_layers_attend_to(kind, tmp_path) -> None:
    x = torch.randn(2, 40, 32)
    sample = {"x": x}
    if kind == "padded":
        sample["padding"] = padding_of([40, 23], 40)
    elif kind == "holes":
        sample["padding"] = torch.arange(40).expand(2, 40) % 3 == 1
    model = nn.MultiheadAttention(32, 2, batch_first=True) if kind == "bare" else Net(kind == "causal")
    layers = activations.captured(model, (x, x, x) if kind == "bare" else sample)
    assert len(layers) == (1 if kind == "bare" else 2)
    first = model if kind == "bare" else model.layers[0]
    query, key, value = nn.functional.linear(x, first.in_proj_weight, first.in_proj_bias).chunk(3, -1)
    heads = [t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (query, key, value)]
    seen = sample.get("padding", torch.zeros(2, 40, dtype=torch.bool)).logical_not()[:, None, :, None]
    for ours, theirs in zip(layers[0].qkv, heads, strict=True):
        assert torch.allclose(ours * seen, theirs * seen, atol=1e-5)
    assert layers[0].is_causal == (kind == "causal")
    assert (layers[0].key_mask is not None) == (kind in ("padded", "holes"))
    if kind in ("padded", "holes"):
        assert torch.equal(layers[0].key_mask, ~sample["padding"])

    activations.save(layers, tmp_path / "a.pt")
    config = {"seed": 0, "dtype": "float32", "activations": str(tmp_path / "a.pt")}
    for layer, again in zip(layers, activations.load(config), strict=True):
        assert torch.equal(layer.query, again.query) and layer.is_causal == again.is_causal
        exact = parse("dense").attend(*again.qkv, **again.options)[0]
        assert calls.relative_error(exact, again) < 1e-5
        assert calls.relative_error(exact + exact.std(), again) > 0.1


def test_a_models_mask_of_pairs_is_kept(tmp_path) -> None:
    pairs = torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) > 0.5
    pairs.fill_diagonal_(True)

    class Masked(Net):
        def forward(self, x):
            return self.layers[0](x, x, x, attn_mask=~pairs, need_weights=False)[0]

    layers = activations.captured(Masked(), torch.randn(1, 40, 32))
    activations.save(layers, tmp_path / "a.pt")
    (layer,) = activations.load({"seed": 0, "dtype": "float32", "activations": str(tmp_path / "a.pt")})
    assert torch.equal(layer.mask.to_dense()[0, 0], pairs)
    exact = attention(*layer.qkv, mask=pairs)
    assert calls.relative_error(exact, layer) < 1e-5
    assert calls.relative_error(attention(*layer.qkv), layer) > 0.1


def test_a_bias_is_refused_for_only_dense_attention_has_one() -> None:
    class Biased(Net):
        def forward(self, x):
            return self.layers[0](x, x, x, attn_mask=torch.randn(40, 40), need_weights=False)[0]

    with pytest.raises(UnsupportedError, match="bias"):
        activations.captured(Biased(), torch.randn(1, 40, 32))


def test_recommend_for_a_model_takes_its_largest_error() -> None:
    model = Net()
    before = [type(layer) for layer in model.layers]
    found = recommend(
        model,
        {"x": torch.randn(2, 64, 32), "padding": padding_of([64, 30], 64)},
        budget=0.2,
        candidates=["sliding_window:left=63,right=63"],
        threads=1,
        budget_s=0.01,
    )
    assert [type(layer) for layer in model.layers] == before
    assert "B2 H2 N64 D16" in found.title and "2 layers of Net" in found.caption
    dense = next(c for c in found.candidates if c.method == "dense")
    assert dense.error < 1e-5 and len(found.candidates) == 2, found.failed
    # Of a window over everything only the padding, which does not count, would differ.
    assert min(c.error for c in found.candidates if c is not dense) < 1e-5


def test_the_error_of_several_layers_is_the_largest(tmp_path) -> None:
    torch.manual_seed(0)
    easy = calls.Layer(*(torch.ones(1, 1, 16, 8) for _ in range(3)))
    hard = calls.Layer(*(torch.randn(1, 1, 16, 8) * 3 for _ in range(3)))
    activations.save([easy, hard], tmp_path / "a.pt")
    config = {"method": "linear", "mode": "fwd", "dtype": "float32", "seed": 0, "budget_s": 0.01, "dense": False}
    found = operator.run_cell({**config, "error": True, "activations": str(tmp_path / "a.pt")})
    assert found["error"] == max(found["errors"]) and found["errors"][0] < 1e-5 < 0.1 < found["errors"][1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"length": 64, "budget": -1.0}, InputError, "at least 0"),
        ({"budget": 0.1}, InputError, "length="),
        ({"length": 0, "budget": 0.1}, InputError, "positive"),
        ({"length": 64, "budget": 0.1, "device": "cuda"}, UnsupportedError, "from_rows"),
        ({"length": 64, "budget": 0.1, "candidates": ["bigbirt"]}, InputError, "did you mean"),
        ({"length": 64, "budget": 0.1, "candidates": []}, InputError, "candidates"),
        ({"length": 64, "budget": 0.1, "activations": "poems"}, InputError, "random, photographs"),
        ({"model": Net(), "budget": 0.1}, InputError, "sample"),
        ({"model": nn.Linear(2, 2), "sample": torch.ones(1, 2), "budget": 0.1}, InputError, "no attention"),
    ],
)
def test_wrong_input_is_named(options, error, message) -> None:
    with pytest.raises(error, match=message):
        recommend(**options)


# --- the command line ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile"], "give --op SPEC or --model NAME"),
        (["profile", "--op", "dense", "--model", "encoder"], "one of the two"),
        (["profile", "--op", "bigbirt"], "did you mean 'bigbird'"),
        (["profile", "--op", "dense", "--lengths", "8k..1k"], "beyond"),
        (["profile", "--op", "dense", "--mode", "bwd"], "choose from fwd, fwd_bwd"),
        (["profile", "--op", "dense", "--dtype", "int8"], "choose from float32"),
        (["profile", "--op", "dense", "--heads", "0"], "positive"),
        (["profile", "--model", "gpt9"], "encoder, decoder, bert"),
        (["profile", "--op", "dense", "--resume"], "name it with --out"),
        (["recommend"], "give --length N"),
        (["recommend", "a.jsonl"], "come after --from"),
        (["recommend", "--length", "1k,2k"], "2 lengths"),
        (["recommend", "--length", "64", "--budget", "-1"], "at least 0"),
        (["recommend", "--length", "64", "--device", "cuda"], "measured on the CPU"),
        (["recommend", "--length", "64", "--model", "encoder", "--heads", "4"], "the model's own"),
        (["recommend", "--from", "nowhere.jsonl"], "cannot be read"),
    ],
)
def test_wrong_options_stop_before_any_work(tmp_path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.rglob("results.jsonl"))


def test_the_commands_measure_show_and_go_on(tmp_path) -> None:
    out = tmp_path / "a"
    arguments = ["profile", "--op", "sliding_window:left=8,right=8", "--lengths", "64"]
    arguments += ["--heads", "2", "--head-dim", "16", "--threads", "1", "--budget", "0.05", "--out", str(out)]
    result = invoke(*arguments)
    assert result.exit_code == 0 and "Growth" in result.output and "GFLOP/s" in result.output, result.output
    assert (out / "profile.png").exists()
    assert invoke(*arguments).exit_code == 2  # a run is not written over
    result = invoke(*arguments, "--resume", "--json")
    found = json.loads(result.stdout)
    assert [row["status"] for row in found["rows"]] == ["ok"]
    cells = [r for r in records.read(out / "results.jsonl") if r["type"] == "cell"]
    assert len(cells) == 2  # the ceilings too, each once

    out = tmp_path / "b"
    result = invoke("recommend", "--length", "64", "--heads", "2", "--head-dim", "16", "--threads", "1", "--seconds",
                    "0.05", "--candidate", "linear", "--out", str(out), "--budget", "0.001")  # fmt: skip
    assert result.exit_code == 0 and "Use dense" in result.output, result.output
    assert (out / "recommend.png").exists()
    other = written(tmp_path / "c.jsonl", [])
    result = invoke("recommend", "--budget", "10", "--json", "--from", str(out / "results.jsonl"), str(other))
    assert {c["method"] for c in json.loads(result.stdout)["candidates"]} == {"dense", "linear"}


def test_an_interrupted_profile_shows_what_it_has(tmp_path, monkeypatch) -> None:
    measure = session.Session.run

    def interrupted(self, suite, config):
        if config.get("seqlen") == 128:
            raise KeyboardInterrupt
        return measure(self, suite, config)

    arguments = [
        "profile",
        "--op",
        "dense",
        "--lengths",
        "64,128",
        "--heads",
        "1",
        "--threads",
        "1",
        "--budget",
        "0.05",
    ]
    monkeypatch.setattr(session.Session, "run", interrupted)
    result = invoke(*arguments, "--out", str(tmp_path / "a"))
    assert result.exit_code == 130 and "interrupted" in result.output and "Growth" in result.output, result.output
    monkeypatch.setattr(session.Session, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    result = invoke(*arguments, "--out", str(tmp_path / "b"))
    assert result.exit_code == 130 and "--resume" in result.output
    monkeypatch.setattr(session.Session, "run", measure)
    result = invoke(*arguments, "--out", str(tmp_path / "a"), "--resume")
    assert result.exit_code == 0
    lengths = [r["config"].get("seqlen") for r in records.read(tmp_path / "a" / "results.jsonl") if r["type"] == "cell"]
    assert lengths == [None, 64, 128]


@pytest.mark.slow
def test_a_model_named_on_the_command_line_is_recommended_for(tmp_path) -> None:
    result = invoke("recommend", "--model", "decoder", "--length", "64", "--candidate", "linear", "--threads", "1",
                    "--seconds", "0.05", "--out", str(tmp_path / "a"))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "causal" in result.output and "2 layers of CausalLM" in " ".join(result.output.split())


def test_the_default_candidates_are_methods_that_a_bare_name_does_not_need() -> None:
    assert all(str(parse(spec)) for spec in recommendation.CANDIDATES)
