"""The suites of the four fields: every cell runs, the page's table is of their rows, and the series is what it says."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

from efficient_attn.benchmarks import suites
from efficient_attn.benchmarks.suites import fields, fields_cost

PAGE = Path(__file__).resolve().parents[2] / "docs" / "fields.py"
QUICK = suites.Options(quick=True, budget_s=0.01)


@pytest.mark.skipif(not PAGE.exists(), reason="needs the checkout")
@pytest.mark.parametrize("field", fields.FIELDS)
def test_a_field_is_learned_and_measured_and_stands_in_the_table(field, tmp_path):
    spec = importlib.util.spec_from_file_location("fields_page", PAGE)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    method = fields.FIELDS[field].methods[-1]
    written = []
    for suite in (fields, fields_cost):
        config = next(c for c in suite.configs(QUICK) if (c["field"], c["method"]) == (field, method))
        config |= {"steps": 1, "batch": 2, "held_out": 4}
        record = {"type": "cell", "suite": suite.SUITE.name, "config": config, "status": "ok", **suite.run_cell(config)}
        assert json.loads(json.dumps(record)) == record
        assert {column.key for column in suite.SUITE.columns} <= record.keys()
        written.append(record)
    assert 1000 <= written[1]["tokens"] <= 2048
    again = {**written[0], "score": written[0]["score"] + 1}
    rows = page.table(page.cells([*written, again], "fields"), page.cells(written, "fields_cost")).splitlines()
    assert len(rows) == 3 and f"{written[0]['score'] + 0.5:.3f} ± 0.707 | 2 |" in rows[2]


def test_every_seed_has_whole_sets_of_fields_and_methods():
    found = [(c["seed"], c["field"], c["method"]) for c in fields.configs(suites.Options())]
    each = [(name, method) for name, field in fields.FIELDS.items() for method in field.methods]
    assert found == [(seed, *one) for seed in range(fields.SEEDS) for one in each]
    kinds = {fields.METHODS[0]} | {method.partition(":")[0] for method in fields.METHODS[1:]}
    assert kinds == {"dense", "sliding_window", "bigbird", "nystrom", "linformer"}
    assert [(c["field"], c["method"]) for c in fields_cost.configs(suites.Options())] == each


def test_the_series_repeats_its_season_and_can_be_forgotten():
    values = fields.long_series(0).values[:, 0]
    assert len(values) == fields.STEPS
    season = values.unfold(0, fields.SEASON, fields.SEASON)
    apart = season - season.mean(1, keepdim=True)
    near, far = (apart[1:] - apart[:-1]).std(), (apart - apart.roll(fields.SEASON // 2, 1)).std()
    assert near < 0.8 < 1.2 < far, "a season tells the next one, half a season nothing"
    field = fields.FIELDS["short series"]
    past = field.splits(0).train.batch(torch.arange(2))["past"]
    assert past[:, : -fields.SHORT].isnan().all() and not past[:, -fields.SHORT :].isnan().any()
