"""`convert(budget=...)`: the measured error is within the budget, whatever the model; the plan applies again."""

from __future__ import annotations

import copy
import itertools
import json
import re

import pytest
import torch
from torch import nn

from efficient_attn import ConversionError, InputError, InputTypeError, UnsupportedError, convert, models, parse
from efficient_attn.integrations import Budget, Plan
from efficient_attn.integrations.budget import Kept, calibration, fingerprint, layers
from efficient_attn.integrations.budget.calibration import calibrate
from efficient_attn.integrations.budget.candidates import default_candidates
from efficient_attn.integrations.budget.choice import Option, choose
from efficient_attn.integrations.budget.comparing import Compared
from efficient_attn.integrations.budget.distillation import distilled

N = 64
CANDIDATES = (
    "sliding_window:left=2,right=2",
    "sliding_window:left=16,right=16",
    "sliding_window:left=48,right=48",
    "topk_blocks:block=16,blocks=2",
    "sliding_window:left=4,right=4+centroid:block=16",
    "nystrom:landmarks=8",
)
COSTS = dict(zip(CANDIDATES, (1.0, 4.0, 8.0, 5.0, 3.0, 2.0), strict=True))


def cost(method, call):
    return next((c for spec, c in COSTS.items() if parse(spec) == method), 10.0)


def within(limit, **fields):
    return Budget(limit, **{"candidates": CANDIDATES, "cost": cost, **fields})


def torch_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), torch.randn(4, N, 32)


def own_causal():
    torch.manual_seed(0)
    tower = models.TransformerConfig(hidden_dim=32, num_layers=2, num_heads=4, causal=True)
    config = models.CausalLMConfig(vocab_size=50, max_len=N, decoder=tower)
    return models.CausalLM(config), torch.randint(0, 50, (4, N))


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37
    )
    there = torch.ones(4, N, dtype=torch.long)
    there[1, 50:] = there[3, 40:] = 0
    return transformers.BertModel(config), {"input_ids": torch.randint(0, 50, (4, N)), "attention_mask": there}


MODELS = {"torch": torch_encoder, "own": own_causal, "transformers": bert}


def output(model, sample):
    model.eval()
    with torch.no_grad():
        found = model(**sample) if isinstance(sample, dict) else model(sample)
    found = found if isinstance(found, torch.Tensor) else found[0]
    return found[sample["attention_mask"].bool()] if isinstance(sample, dict) else found


def second_half(sample):
    return {name: t[2:] for name, t in sample.items()} if isinstance(sample, dict) else sample[2:]


def error(before, after):
    return float((after - before).double().norm() / before.double().norm())


@pytest.mark.parametrize("limit", [0.001, 0.02, 0.1, 0.6])
@pytest.mark.parametrize("name", MODELS)
def test_the_error_is_within_the_budget_and_the_plan_gives_the_same_again(name, limit, tmp_path):
    model, sample = MODELS[name]()
    fresh = copy.deepcopy(model)
    before, held_before = output(model, sample), output(model, second_half(sample))
    report = convert(model, budget=within(limit), sample=sample, repeats=0)
    after = output(model, sample)
    assert error(held_before, output(model, second_half(sample))) <= limit * 1.001 + 1e-6
    assert report.error <= limit and report.found.error == pytest.approx(report.error, rel=1e-3, abs=1e-6)
    assert set(report.plan.layers) == set(report.found.table.dense) and len(report.plan.layers) >= 2
    if limit == 0.6:  # so large that something must be gained, and not all of it dense
        assert not report.plan.is_dense and not torch.equal(before, after)
    report.plan.save(tmp_path / "plan.json")
    for plan in (report.plan, json.loads(report.plan.to_json()), tmp_path / "plan.json"):
        again = copy.deepcopy(fresh)
        convert(again, plan=plan)
        torch.testing.assert_close(output(again, sample), after, rtol=1e-5, atol=1e-6)
    report.undo()
    assert torch.equal(output(model, sample), before)
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]


def test_a_larger_budget_costs_no_more():
    model, sample = torch_encoder()
    costs = []
    for limit in (0.01, 0.05, 0.2, 0.6):
        report = convert(model, budget=within(limit), sample=sample, repeats=0)
        costs.append(sum(cost(parse(spec), None) for spec in report.plan.layers.values()))
        report.undo()
    assert costs == sorted(costs, reverse=True) and costs[-1] < costs[0]


def test_heads_choose_by_themselves():
    model, sample = torch_encoder()
    report = convert(model, budget=within(0.2, per="head"), sample=sample, repeats=0)
    specs = " ".join(report.plan.layers.values())
    assert report.error <= 0.2 and "per_head(" in specs and "nystrom" not in specs and "centroid" not in specs
    again = torch_encoder()[0]
    convert(again, plan=report.plan.to_json() and Plan(dict(report.plan.layers)))
    assert torch.equal(output(again, sample), output(model, sample))


def test_a_metric_may_fall_by_the_budget_and_no_more():
    model, sample = torch_encoder()
    target = torch.randn(N, 32)

    def metric(m):
        return -float((output(m, sample) - target).square().mean())

    before = metric(model)
    report = convert(model, budget=within(0.01, metric=metric), sample=sample, repeats=0)
    assert before - metric(model) <= 0.01 + 1e-9 and not report.plan.is_dense
    assert report.found.metric[0] == pytest.approx(before) and "metric" in str(report)


@pytest.mark.parametrize("calls", [1, 2, 4])
def test_a_failure_leaves_the_model_alone(calls):
    model, sample = torch_encoder()
    kinds, before, left = [type(m) for m in model.modules()], output(model, sample), [calls]

    def metric(m):
        left[0] -= 1
        if m is not model:
            assert [type(x) for x in model.modules()] == kinds  # the search runs elsewhere
        if not left[0]:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        convert(model, budget=within(0.1, metric=metric), sample=sample)
    assert [type(m) for m in model.modules()] == kinds and torch.equal(output(model, sample), before)


@pytest.mark.parametrize("distill", [0, 2])
@pytest.mark.parametrize("stop", [("layers measured", 2), ("trials on held-out samples", 3)])
def test_an_interrupted_search_goes_on_from_what_it_measured(tmp_path, monkeypatch, stop, distill):
    """Also with another budget; and what was distilled, whose parameters are not kept, is distilled again."""
    model, sample = torch_encoder()
    costs = lambda method, call: 2.5 if method.name == "linformer" else cost(method, call)  # noqa: E731
    options = {"distill": distill, "candidates": (*CANDIDATES, "linformer:rank=8"), "cost": costs}
    path, about, calls = tmp_path / "kept.jsonl", {"data": fingerprint(model, sample)}, [0]

    def interrupting(what, done, of):
        calls[0] += what.startswith(stop[0])
        if calls[0] == stop[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept = Kept(path, about, resume=False)
        convert(model, budget=within(0.05, **options, progress=interrupting, kept=kept), sample=sample)
    kept.begin()  # as the command does when it is interrupted
    assert re.search(r"\d layers and \d+ trials that were measured are kept in", str(kept))
    assert (len(kept.layers) >= 1) == (distill == 0) and (len(kept.errors) >= 1) == stop[0].startswith("trials")
    measured, figures = [], calibration._figures
    monkeypatch.setattr(calibration, "_figures", lambda *a: measured.append(a[1].name) or figures(*a))
    again = Kept(path, about, resume=True)
    assert json.dumps(again.layers) == json.dumps(kept.layers) and again.errors == kept.errors
    report = convert(copy.deepcopy(model), budget=within(0.05, **options, kept=again), sample=sample, repeats=0)
    assert not set(measured) & set(kept.layers) and len(set(measured)) == 3 - len(kept.layers)
    again.remove()
    assert not path.exists()
    whole = convert(copy.deepcopy(model), budget=within(0.05, **options), sample=sample, repeats=0)
    assert report.plan.layers == whole.plan.layers and report.found.error == pytest.approx(whole.found.error)


def test_measurements_of_something_else_are_not_gone_on_with(tmp_path):
    model, sample = torch_encoder()
    path, mark = tmp_path / "kept.jsonl", fingerprint(model, sample)
    with pytest.raises(InputError, match="no measurements to go on with"):
        Kept(path, {"data": mark}, resume=True)
    kept = Kept(path, {"data": mark, "probes": 4}, resume=False)
    assert not path.exists(), "what is refused before anything is measured leaves no file"
    kept.put_error(("dense",), 0.0)
    with pytest.raises(InputError, match="another probes: 4, now 2"):
        Kept(path, {"data": mark, "probes": 2}, resume=True)
    with torch.no_grad():
        next(model.parameters()).flatten()[0] += 1
    assert fingerprint(model, sample) != mark != fingerprint(model, sample + 1)


class Linear(nn.Module):
    """One attention layer with nothing but a matrix behind it: the outputs move by J (C - O) exactly."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 7)

    def forward(self, x):
        return self.head(self.attend(x, x, x, need_weights=False)[0])


def test_the_sensitivity_is_what_the_outputs_move_by():
    torch.manual_seed(0)
    model, sample = Linear().eval(), torch.randn(8, N, 32)
    convert(model)
    specs = [parse(spec) for spec in CANDIDATES]
    table = calibrate(
        model, sample, lambda length: specs, compared=Compared(), probes=64, seed=0, cost=cost, note=lambda *a: None
    )
    y = output(model, sample)
    for figures in table.figures["attend"]:
        undo = layers.set_method(model.attend, figures.method)
        moved = error(y, output(model, sample))
        inner = copy.deepcopy(model.attend)
        undo()
        assert figures.sensitivity == pytest.approx(moved, rel=0.15), figures.method
        with torch.no_grad():
            was, now = (a(sample, sample, sample, need_weights=False)[0] for a in (model.attend, inner))
            bias = model.attend.out_proj.bias
        assert figures.error == pytest.approx(float((now - was).norm() / (was - bias).norm()), rel=1e-4)
        together = sum(e**2 for e in figures.head_sensitivities) ** 0.5
        assert together == pytest.approx(figures.sensitivity, rel=0.5)  # equal where heads are independent


def test_the_knapsack_is_optimal_and_never_exceeds():
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        sizes = torch.randint(1, 5, (4,), generator=generator).tolist()
        groups = []
        for size in sizes:
            errors, costs = torch.rand(2, size, generator=generator).tolist()
            groups.append(
                [
                    Option("dense", 0.0, 1.0),
                    *(Option(str(n), e, c) for n, (e, c) in enumerate(zip(errors, costs, strict=True))),
                ]
            )
        allowance = float(torch.rand((), generator=generator)) * 2
        chosen = choose(groups, allowance)
        assert sum(o.error for o in chosen) <= allowance * (1 + 1e-9)
        every = [c for c in itertools.product(*groups) if sum(o.error for o in c) <= allowance * 0.995]
        assert sum(o.cost for o in chosen) <= min(sum(o.cost for o in c) for c in every) + 1e-9
    assert [o.name for o in choose([[Option("dense", 0.0, 1.0), Option("x", 0.1, 0.5)]], 0.0)] == ["dense"]


def test_wrong_estimates_cost_time_but_no_accuracy(monkeypatch):
    """Where the estimates say that nothing matters, the measured error still decides."""
    from efficient_attn.integrations.budget import search

    def careless(*args, **kwargs):
        table = calibrate(*args, **kwargs)
        for figures in table.figures.values():
            for f in figures:
                f.sensitivity = 1e-6 * f.cost
        return table

    monkeypatch.setattr(search, "calibrate", careless)
    model, sample = torch_encoder()
    report = convert(model, budget=within(0.05), sample=sample, repeats=0)
    assert report.error <= 0.05 and any(t.error > 0.05 for t in report.found.trials)


def test_what_a_layer_cannot_have_and_layers_that_stay_dense_are_said():
    model, sample = own_causal()
    found = convert(model, budget=within(0.3), sample=sample, repeats=0).found
    for figures in found.table.figures.values():
        refused = {str(f.method): f.refused for f in figures if f.refused}
        assert [spec for spec in refused if "nystrom" in spec] and "causal" in next(iter(refused.values()))
    torch.manual_seed(0)
    towers = {
        "encoder": models.TransformerConfig(hidden_dim=32, num_layers=1, num_heads=4),
        "decoder": models.TransformerConfig(
            hidden_dim=32, num_layers=1, num_heads=4, causal=True, cross_attention=True
        ),
    }
    config = models.Seq2SeqConfig(vocab_size=50, max_len=N, **towers)
    sample = (torch.randint(3, 50, (2, N)), torch.randint(3, 50, (2, N // 2)))
    report = convert(models.Seq2Seq(config), budget=within(0.3), sample=sample, repeats=0)
    assert any("cross" in name for name in report.found.table.fixed)
    assert not any("cross" in name for name in report.plan.layers)


def test_shares_of_a_hybrid_and_the_page(tmp_path):
    model, sample = torch_encoder()
    hybrid = CANDIDATES[4]
    report = convert(model, budget=within(0.5, candidates=[hybrid]), sample=sample, repeats=1)
    shares = report.found.shares
    assert shares and all(near + far == pytest.approx(1.0, abs=1e-4) for near, far in shares.values())
    report.save_page(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r'(?:src|href)="|url\(|@import|<script|https?://', text)
    assert all(f"<code>{name}</code>" in text for name in report.plan.layers) and hybrid in text
    assert "exact part" in text and f"{report.found.error:.3g}" in text
    with pytest.raises(InputError, match="no search"):
        convert(torch_encoder()[0]).save_page(tmp_path / "none.html")


def alike(name):
    """A model, and sequences of which each place holds nearly the same in all: what a Linformer can learn."""
    torch.manual_seed(1)
    if name == "transformers":
        model, _ = bert()
        with torch.no_grad():  # as it starts it attends to all keys alike, which means of keys do exactly
            for layer in model.encoder.layer:
                for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                    linear.weight *= 8
        ids = torch.randint(0, 50, (1, N)).expand(8, N)
        there = torch.ones(8, N, dtype=torch.long)
        there[3, 50:] = there[7, 40:] = 0
        changed = torch.where(torch.rand(8, N) < 0.1, torch.randint(0, 50, (8, N)), ids)
        return model, {"input_ids": changed, "attention_mask": there}
    tower = models.TransformerConfig(hidden_dim=32, num_layers=2, num_heads=4)
    model = torch_encoder()[0] if name == "torch" else models.Transformer(tower)
    return model, torch.randn(1, N, 32) + 0.3 * torch.randn(8, N, 32)


@pytest.mark.parametrize("name", MODELS)
def test_distilled_parameters_lower_the_error_and_come_with_the_plan(name, tmp_path):
    model, sample = alike(name)
    fresh, spec = copy.deepcopy(model), "linformer:rank=8,max_len=64"
    errors = []
    for distill in (0, 200):
        budget = within(10.0, candidates=[spec], distill=distill, cost=lambda method, call: 1.0 + method.is_dense)
        report = convert(model, budget=budget, sample=sample, repeats=0)
        errors.append(report.error)
        assert set(report.plan.fitted) == (set(report.plan.layers) if distill else set())
        assert ("distilled" in report.plan.to_json()) == ("distilled parameters" in str(report)) == bool(distill)
        after = output(model, sample)
        report.undo()
    assert errors[1] < 0.9 * errors[0], errors
    report.plan.save(tmp_path / "plan.json")
    for plan in (report.plan, tmp_path / "plan.json"):
        again = copy.deepcopy(fresh)
        undo = convert(again, plan=plan).undo
        torch.testing.assert_close(output(again, sample), after, rtol=1e-5, atol=1e-6)
        undo()
        assert not any("method_state" in key for key in again.state_dict())
    with pytest.raises(InputError, match="path of the plan's file"):
        convert(copy.deepcopy(fresh), plan=json.loads(report.plan.to_json()))
    (tmp_path / "plan.pt").unlink()
    with pytest.raises(InputError, match="there is no"):
        convert(copy.deepcopy(fresh), plan=tmp_path / "plan.json")


def test_distillation_never_leaves_the_checked_half_worse():
    torch.manual_seed(0)
    model, method = Linear().eval(), parse("linformer:rank=8,max_len=64")
    convert(model)
    _, found = layers.record(model, torch.cat([torch.randn(2, N, 32).cumsum(1), torch.randn(2, N, 32)]))
    (call,) = found["attend"].calls
    fitted = distilled([call], method, 30)
    checked = []
    for state in (call.build(method), fitted.build(method, "cpu", torch.float32)):
        with torch.no_grad():
            wrong = (call.attend(method, state) - call.out)[2:].transpose(1, 2).flatten(2) @ call.project.T
        checked.append(float(wrong.square().sum()))
    assert checked[1] <= checked[0] * (1 + 1e-6)
    assert distilled([call], parse("sliding_window:left=4,right=4"), 3) is None


def test_nothing_gained_is_an_answer():
    model, sample = torch_encoder()
    report = convert(model, budget=within(0.5, cost=lambda method, call: 1.0), sample=sample, repeats=0)
    assert report.plan.is_dense and "nothing is gained" in str(report) and report.error < 1e-5


def test_measured_time_decides_without_a_cost():
    model, sample = torch_encoder()
    report = convert(model, budget=Budget(0.5, candidates=CANDIDATES[:2]), sample=sample, repeats=0)
    assert report.error <= 0.5 and report.found.seconds is not None
    assert report.plan.is_dense or report.found.speedup > 1.0
    assert report.plan.about["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("length", [1, 7, 64, 65, 256, 512, 4096])
def test_default_candidates_are_cheaper_than_all_pairs(length):
    for method in default_candidates(length):
        q = torch.randn(1, 2, min(length, 512), 16)
        if length <= 512:
            assert method.attend(q, q, q, state=method.build(32, 2, 16))[0].isfinite().all()
    assert default_candidates(1) == [] and len(default_candidates(512)) > 15


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"budget": 0.1}, InputError, "sample="),
        ({"budget": 0.1, "sample": torch.randn(1, N, 32)}, InputError, "held_out="),
        ({"budget": 0.1, "attention": "causal"}, InputError, "one of them"),
        ({"budget": 0.1, "plan": {}}, InputError, "one of them"),
        ({"plan": {"format": "x"}}, InputError, "no plan"),
        ({"budget": within(0.5, distill=2), "sample": torch.randn(2, N, 32)}, InputError, "batch of 1"),
        ({"plan": {"format": "efficient-attn plan", "version": 9, "layers": {}}}, InputError, "version 9"),
        ({"plan": "nowhere.json"}, InputError, "cannot be read"),
        ({"plan": 3}, InputTypeError, "path"),
        ({"plan": Plan({"layers.9.self_attn": "causal"})}, InputError, "another model"),
        ({"plan": Plan({"layers.0.self_attn": "nonsense"})}, InputError, "nonsense"),
        ({"budget": Budget(0.1, held_out=[]), "sample": torch.randn(2, N, 32)}, InputError, "held_out is empty"),
        ({"budget": 0.1, "sample": torch.full((2, N, 32), torch.nan)}, InputError, "no finite number"),
        ({"budget": Budget(0.0), "sample": torch.randn(2, N, 32)}, ConversionError, "budget"),
        ({"budget": Budget(0.1, metric=lambda m: "a"), "sample": torch.randn(2, N, 32)}, ConversionError, "metric"),
    ],
)
def test_errors_say_what_to_do_and_change_nothing(arguments, kind, says):
    model, sample = torch_encoder()
    before, kinds = output(model, sample), [type(m) for m in model.modules()]
    with pytest.raises(kind, match=re.escape(says)):
        convert(model, **arguments)
    assert torch.equal(output(model, sample), before) and [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("limit", [-0.1, float("nan"), float("inf")])
def test_a_budget_is_a_number(limit):
    with pytest.raises(InputError, match="finite number"):
        Budget(limit)
    with pytest.raises(InputTypeError):
        Budget("2 %")
    with pytest.raises(InputError, match="layer, head"):
        Budget(0.1, per="model")
    with pytest.raises(InputError, match="at least one"):
        Budget(0.1, candidates=["dense"])
    with pytest.raises(InputTypeError, match="sequence"):
        Budget(0.1, candidates="causal")
    with pytest.raises(InputError, match="layers share"):
        Budget(0.1, candidates=["linformer:share=layerwise"])


def test_a_converted_model_and_a_plan_that_does_not_fit_are_refused():
    model, sample = own_causal()
    report = convert(model, "causal")
    with pytest.raises(InputError, match="undo it first"):
        convert(model, budget=within(0.1), sample=sample)
    report.undo()
    names = convert(model, budget=within(0.3), sample=sample, repeats=0)
    names.undo()
    with pytest.raises(UnsupportedError, match="causal"):
        convert(model, plan=Plan(dict.fromkeys(names.plan.layers, "nystrom:landmarks=8")))
    assert all(
        m.attention == parse("dense")
        for m in model.modules()
        if isinstance(getattr(m, "attention", None), type(parse("dense")))
    )
