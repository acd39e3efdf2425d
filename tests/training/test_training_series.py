"""Tables of series in every layout, forecasts of new tables, and backtests."""

import csv
import json
import math
from datetime import datetime, timedelta

import pytest
import torch
from typer.testing import CliRunner

from efficient_attn.errors import CheckpointError, InputError
from efficient_attn.training import TrainOptions, train
from efficient_attn.training.data import series
from efficient_attn.training.data.series_reader import SeriesReader, calendar
from efficient_attn.training.forecasting import backtest, forecast, load
from efficient_attn.training.tasks import TASKS
from efficient_attn.training.tasks.series import measures

pytest.importorskip("pandas")
Y = SeriesReader(("y",))
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def times(count, step=DAY, start=datetime(2023, 1, 30)):
    return [start + step * n for n in range(count)]


# --- time ---


def of_months(count, day=1):
    return [datetime(2020 + n // 12, n % 12 + 1, day) for n in range(count)]


def ends_of_months(count):
    return [moment - DAY for moment in of_months(count + 1)[1:]]


EVEN = {
    "days": times(60),
    "hours": times(60, HOUR),
    "weeks": times(60, 7 * DAY),
    "months": of_months(60),
    "mid-months": of_months(60, 15),
    "ends of months": ends_of_months(60),
    "quarters": of_months(180)[::3],
    "years": of_months(240)[::12],
}


@pytest.mark.parametrize("name", EVEN)
def test_rows_at_one_distance_are_read_and_go_on(tmp_path, name):
    moments = EVEN[name]
    path = write(tmp_path / "t.csv", ["ds", "y"], [(moment.isoformat(), n) for n, moment in enumerate(moments[:-5])])
    (one,) = Y.read(path)
    assert one.values.flatten().tolist() == list(range(len(moments) - 5)) and one.times == moments[:-5]
    assert one.later(5) == moments[-5:]


UNEVEN = {
    "a day left out": times(40)[:20] + times(40)[21:],
    "business days": [moment for moment in times(40) if moment.weekday() < 5],
    "another time": [*times(20), *times(20, HOUR, datetime(2023, 4, 1))],
    "months and a half": [*of_months(20)[:10], *of_months(20, 15)[10:]],
}


@pytest.mark.parametrize("name", UNEVEN)
def test_rows_at_several_distances_are_refused_or_put_on_a_grid(tmp_path, name):
    moments = UNEVEN[name]
    path = write(tmp_path / "t.csv", ["ds", "y"], [(moment.isoformat(), n + 1) for n, moment in enumerate(moments)])
    with pytest.raises(InputError, match=r"not at one distance in column 'ds': mostly .* give --frequency"):
        Y.read(path)
    (rows,) = SeriesReader(("y",), frequency="rows").read(path)
    assert rows.values.flatten().tolist() == list(range(1, len(moments) + 1))
    (days,) = SeriesReader(("y",), frequency="D", aggregate="sum").read(path)
    assert days.values.nansum() == sum(range(1, len(moments) + 1)) and days.values.isnan().any()
    assert days.times == times(len(days.times), DAY, moments[0]) and days.later(1) == [days.times[-1] + DAY]


def test_numbers_and_calendars_in_parts_need_one_distance_too(tmp_path):
    for header, rows in (
        (["t", "y"], [(n * 2 + (n > 20), n) for n in range(40)]),
        (["year", "month", "y"], [(2000 + n // 12, n % 12 + 1, n) for n in range(40) if n != 20]),
    ):
        with pytest.raises(InputError, match="not at one distance"):
            Y.read(write(tmp_path / "t.csv", header, rows))
    whole = write(tmp_path / "t.csv", ["year", "month", "y"], [(2000 + n // 12, n % 12 + 1, n) for n in range(40)])
    assert len(Y.read(whole)[0].values) == 40


def test_several_rows_of_a_step_are_joined(tmp_path):
    path = write(tmp_path / "t.csv", ["ds", "y"], [(moment, n) for n, moment in enumerate(times(48, HOUR))])
    for how, expected in (("mean", [11.5, 35.5]), ("sum", [276, 852]), ("last", [23, 47])):
        (one,) = SeriesReader(("y",), frequency="D", aggregate=how).read(path)
        assert one.values.flatten().tolist() == expected
    with pytest.raises(InputError, match="--frequency 'fortnight' is none of pandas'"):
        SeriesReader(("y",), frequency="fortnight").read(path)
    with pytest.raises(InputError, match="--aggregate must be one of"):
        SeriesReader(aggregate="median")


# --- layouts ---


def long_table(path, *, gap=None):
    """Two shops of other lengths and levels, a price that is known ahead, and how large each shop is."""
    rows = []
    for shop, (count, level, size) in {"north": (80, 10, 1.5), "south": (70, 1000, 3.0)}.items():
        for n, moment in enumerate(times(count)):
            price = math.sin(n)
            y = level * (1 + 0.1 * (n % 7) + 0.3 * price)
            rows.append((shop, moment.date(), "" if n == gap else repr(y), repr(price), n % 5, size))
    return write(path, ["unique_id", "ds", "y", "price", "visits", "size"], rows)


LONG = SeriesReader(("y",), "unique_id", past=("visits",), future=("price",), static=("size",), calendar=True)


def test_a_long_table_is_several_series(tmp_path):
    path = long_table(tmp_path / "t.csv", gap=20)
    with pytest.raises(InputError, match=r"2 series below one another.*--id unique_id"):
        SeriesReader().read(path)
    north, south = LONG.read(path)
    assert (north.name, south.name, len(north.values), len(south.values)) == ("north", "south", 80, 70)
    assert north.values.isnan().nonzero().tolist() == [[20, 0]] and south.static.tolist() == [3.0]
    assert north.past.flatten().tolist() == [n % 5 for n in range(80)] and north.future.shape == (80, 7)
    parts = series.load(path, context=14, horizon=7, season=7, reader=LONG)
    batch = parts.train.batch(torch.arange(len(parts.train)))
    B = len(parts.train)
    shapes = {name: tuple(value.shape) for name, value in batch.items()}
    assert shapes == {
        "past": (B, 14, 1), "future": (B, 7, 1), "past_covariates": (B, 14, 1), "future_covariates": (B, 21, 7),
        "static_features": (B, 1), "scale": (B, 1),
    }  # fmt: skip
    assert batch["static_features"].unique().tolist() == [-1, 1] and batch["future_covariates"].abs().max() < 6
    ratio = parts.about["scale"][1, 0] / parts.about["scale"][0, 0]
    assert 50 < ratio < 150, "each series has its own scale"


@pytest.mark.parametrize(
    ("reader", "says"),
    [
        (SeriesReader(("y",), "shop"), "no column shop"),
        (SeriesReader(("y",), "unique_id", static=("price",)), "'north': column 'price' is no feature of the whole"),
        (SeriesReader(("y",), "unique_id", past=("ds",)), "which is no number"),
    ],
)
def test_long_tables_that_are_none_are_refused(tmp_path, reader, says):
    with pytest.raises(InputError, match=says):
        reader.read(long_table(tmp_path / "t.csv"))
    with pytest.raises(InputError, match="column y has two parts"):
        SeriesReader(("y",), future=("y",))
    with pytest.raises(InputError, match="--calendar needs a column of dates"):
        SeriesReader(calendar=True).read(write(tmp_path / "u.csv", ["y"], [(n * n,) for n in range(9)]))


def test_a_calendar_comes_round():
    turned = calendar([datetime(2024, 1, 1), datetime(2024, 1, 1, 12), datetime(2024, 1, 8), datetime(2024, 7, 1)])
    assert turned[0].tolist() == [0, 0, 0, 1, 1, 1] and turned[1, 3] == -1
    assert torch.allclose(turned[0, [1, 4]], turned[2, [1, 4]]) and turned[3, 5] < -0.99


def test_a_reader_is_saved(tmp_path):
    LONG.save_pretrained(tmp_path)
    assert SeriesReader.from_pretrained(tmp_path) == LONG
    with pytest.raises(CheckpointError, match="name a run of train forecast"):
        SeriesReader.from_pretrained(tmp_path / "other")


def test_missing_values_take_no_part_in_the_measures():
    quantiles = torch.tensor([1.0, 2.0, 3.0]).expand(1, 2, 1, 3)
    future = torch.tensor([[[4.0], [torch.nan]]])
    found = measures(quantiles, quantiles[..., 1], future, torch.tensor([[2.0]]), (0.1, 0.5, 0.9))
    assert found["mase"].item() == 1.0 and found["smape"].item() == pytest.approx(200 * 2 / 6)
    assert found["crps"].item() == pytest.approx(2 * (0.1 * 3 + 0.5 * 2 + 0.9 * 1) / 3 / 2)
    filled = series.last_known(torch.tensor([torch.nan, 1.0, torch.nan, 3.0]))
    assert filled.tolist() == [1.0, 1.0, 1.0, 3.0]


# --- forecasts and backtests ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of the long table with everything beside it."""
    folder = tmp_path_factory.mktemp("forecast")
    task = TASKS["forecast"](
        data=str(long_table(folder / "t.csv", gap=20)), columns="y", id="unique_id", season=7, context=14, horizon=7,
        patch=7, stride=7, dim=16, layers=1, heads=2, dropout=0.0,
        past_covariates="visits", future_covariates="price", static_features="size", calendar=True,
    )  # fmt: skip
    options = TrainOptions(folder / "run", steps=300, batch=16, lr=5e-3, tensorboard=False, threads=1)
    return folder, train(task, options)


def test_a_model_of_several_series_learns_what_covariates_tell(run):
    _, result = run
    test = result["test"]
    assert test["mase"] < 0.8 * test["naive_mase"] and test["crps"] < test["naive_crps"]
    assert test["smape"] < test["naive_smape"] and all(map(math.isfinite, test.values()))


def command(*arguments):
    from efficient_attn.cli import app

    return CliRunner().invoke(app, list(map(str, arguments)))


def read_rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_forecasts_a_new_table(run, tmp_path):
    pytest.importorskip("matplotlib")
    folder, _ = run
    rows = read_rows(folder / "t.csv")
    ahead = [
        (shop, (datetime(2023, 1, 30) + DAY * n).date(), "", repr(math.sin(n)), "", size)
        for shop, begin, size in (("north", 80, 1.5), ("south", 70, 3.0))
        for n in range(begin, begin + 10)
    ]
    table = write(tmp_path / "new.csv", list(rows[0]), [*(tuple(row.values()) for row in rows), *ahead])
    done = command(
        "forecast", folder / "run", "--data", table, "--horizon", 10, "--out", tmp_path / "f.csv",
        "--plot", tmp_path / "f.png",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "go on from medians" in done.output and (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    found = read_rows(tmp_path / "f.csv")
    assert len(found) == 20 and list(found[0]) == [
        "unique_id",
        "ds",
        "column",
        "q0.1",
        "q0.25",
        "q0.5",
        "q0.75",
        "q0.9",
    ]
    assert found[0]["ds"] == "2023-04-20 00:00:00" and found[-1]["unique_id"] == "south"
    errors = []
    for row in found:
        values = [float(row[f"q{level}"]) for level in (0.1, 0.25, 0.5, 0.75, 0.9)]
        assert values == sorted(values)
        n = (datetime.fromisoformat(row["ds"]) - datetime(2023, 1, 30)).days
        level = 10 if row["unique_id"] == "north" else 1000
        errors.append(abs(values[2] / level - (1 + 0.1 * (n % 7) + 0.3 * math.sin(n))))
    assert sum(errors) / len(errors) < 0.2
    short = command("forecast", folder / "run", "--data", folder / "t.csv", "--out", tmp_path / "g.csv")
    assert short.exit_code == 2 and "needs price for them; the table has 0 rows" in " ".join(short.output.split())
    assert not (tmp_path / "g.csv").exists()


def test_the_command_measures_beside_the_baselines(run, tmp_path):
    pytest.importorskip("statsmodels")
    folder, _ = run
    done = command("backtest", folder / "run", "--data", folder / "t.csv", "--windows", 2, "--out", tmp_path / "b.json")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "b.json").read_text())
    assert list(found) == ["model", "seasonal naive", "ETS"]
    assert all(row["windows"] == 4 and math.isfinite(row["crps"]) for row in found.values())
    assert found["model"]["mase"] < found["seasonal naive"]["mase"] and found["ETS"]["mase"] < 2
    model, reader = load(folder / "run" / "model")
    every = reader.read(folder / "t.csv")
    again = backtest(model, reader, every, 2, season=7, ets=False)
    assert again["model"]["mase"] == pytest.approx(found["model"]["mase"])
    with pytest.raises(InputError, match="steps of the series 'north' are too few for 40 windows"):
        backtest(model, reader, every, 40, season=7, ets=False)


@pytest.mark.parametrize(("scale", "level"), [(1e-6, 0.0), (1e6, 0.0), (1.0, 1e8)])
def test_a_forecast_has_the_unit_of_its_table(tmp_path, scale, level):
    torch.manual_seed(0)
    from efficient_attn.models import ForecasterConfig, PatchForecaster, TransformerConfig

    model = PatchForecaster(ForecasterConfig(16, 4, 4, 4, encoder=TransformerConfig(16, 1, 2))).eval()
    values = [10 + (n % 7) + (n * n % 11) / 8 for n in range(40)]
    made = []
    for unit, offset in ((1.0, 0.0), (scale, level)):
        table = write(tmp_path / "t.csv", ["y"], [(repr(value * unit + offset),) for value in values])
        (one,) = SeriesReader().read(table)
        made.append(forecast(model, SeriesReader(), one, 9).quantiles)
    torch.testing.assert_close((made[1] - level) / scale, made[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("days", "same"), [(1, True), (7, False), (1 / 24, False)])
def test_a_table_of_other_steps_than_those_of_the_training_is_refused(tmp_path, days, same):
    """A model of days would forecast weeks as if they were days."""
    times = [datetime(2024, 1, 1) + n * DAY for n in range(60)]
    learned = write(tmp_path / "t.csv", ["ds", "y"], [(time, n % 7) for n, time in enumerate(times)])
    every = SeriesReader().read(learned)
    SeriesReader(season=7).fitted(every, [40]).save_pretrained(tmp_path)
    reader = SeriesReader.from_pretrained(tmp_path)
    new = [(datetime(2025, 3, 1) + n * days * DAY, n % 5) for n in range(30)]
    table = write(tmp_path / "new.csv", ["ds", "y"], new)
    if same:
        assert len(reader.read(table)) == 1
    else:
        with pytest.raises(InputError, match="apart, and the model learned from rows that are 1 day"):
            reader.read(table)
    numbered = write(tmp_path / "numbered.csv", ["y"], [(n * n % 11,) for n in range(30)])
    assert len(reader.read(numbered)) == 1, "a table that does not say when has no distance"


def test_a_short_past_counts_as_missing_and_what_cannot_be_forecast_is_said(tmp_path):
    from efficient_attn.models import ForecasterConfig, PatchForecaster, TransformerConfig

    torch.manual_seed(0)
    model = PatchForecaster(ForecasterConfig(16, 4, 4, 4, encoder=TransformerConfig(16, 1, 2))).eval()
    (one,) = SeriesReader().read(write(tmp_path / "t.csv", ["y"], [(n,) for n in (3, 1, 4, 1, 5)]))
    found = forecast(model, SeriesReader(), one, 4)
    past = torch.cat([torch.full((11, 1), torch.nan, dtype=torch.float64), one.values])
    assert torch.equal(found.quantiles, model.predict(past[None])[0]) and found.times is None and found.end == 5
    ended = [(n, "" if n > 3 else n) for n in range(40)]
    (one,) = SeriesReader(("a", "b")).read(write(tmp_path / "u.csv", ["a", "b"], ended))
    with pytest.raises(InputError, match="b: no value in the last 16 steps to go on from"):
        forecast(model, SeriesReader(), one, 4)
    done = command("forecast", tmp_path / "nothing", "--data", tmp_path / "t.csv")
    assert done.exit_code == 2 and "does not exist" in done.output
