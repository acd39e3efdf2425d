"""Suite `forecasts`: sunspots and co2 by `train forecast`'s defaults, beside the seasonal naive forecast and ETS.

The horizon is one season of each series (11 years, 52 weeks), and the context two: fixed by that rule, not by what it
gives. The last fifth of a series is the test, over which windows roll that do not overlap; ETS is fitted before each.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from efficient_attn.training import TrainOptions, forecasting, train
from efficient_attn.training.data.series import SERIES
from efficient_attn.training.data.series_reader import SeriesReader
from efficient_attn.training.tasks.series import Forecast

from . import Column, Options, Suite, grid

NAMES = ("sunspots", "co2")
METHODS = ("dense", "sliding_window:left=4,right=4", "nystrom:landmarks=8")
BASELINES = ("seasonal naive", "ETS")
SEEDS, STEPS, QUICK_STEPS = 5, 600, 5
CONTEXT_SEASONS, PATCH = 2, {"sunspots": (4, 2), "co2": (8, 4)}  # steps in a token and from token to token


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Errors over the windows of the test. `config`: data, method (a spec or a baseline), steps, threads, seed."""
    started = time.process_time()
    season, method = SERIES[config["data"]], config["method"]
    patch, stride = PATCH[config["data"]]
    spec = "dense" if method in BASELINES else method
    sizes: dict[str, Any] = {"context": CONTEXT_SEASONS * season, "horizon": season, "patch": patch, "stride": stride}
    task = Forecast(attention=spec, series=config["data"], **sizes)
    splits = task.splits(config["seed"])
    whole = splits.test.series[0]
    windows = len(whole.values[splits.test.starts[0] :]) // season
    with tempfile.TemporaryDirectory() as place:
        steps = 1 if method in BASELINES else config["steps"]  # which the model that nobody asks about takes
        options = {key: value for key, value in task.defaults.items() if key != "steps"}
        run = Path(place, "run")
        train(
            task,
            TrainOptions(
                run, steps=steps, seed=config["seed"], threads=config["threads"], tensorboard=False, **options
            ),
        )
        model, _ = forecasting.load(run)
    found = forecasting.backtest(
        model.eval(), SeriesReader(), [whole], windows, season=season, ets=method == "ETS"
    )["model" if method not in BASELINES else method]  # fmt: skip
    return {
        "score": round(found["mase"], 4),
        "score_is": "mase",
        "smape": round(found["smape"], 4),
        "crps": round(found["crps"], 4),
        "windows": int(found["windows"]),
        "cpu_seconds": round(time.process_time() - started, 2),
    }


def configs(options: Options) -> Iterable[dict[str, Any]]:
    """The baselines depend on no seed."""
    steps = QUICK_STEPS if options.quick else STEPS
    yield from grid(data=NAMES, method=BASELINES, steps=0, threads=options.threads, seed=options.seed)
    for seed in range(options.seed, options.seed + (1 if options.quick else SEEDS)):
        yield from grid(data=NAMES, method=options.methods or METHODS, steps=steps, threads=options.threads, seed=seed)


SUITE = Suite(
    name="forecasts",
    about="A PatchForecaster of the defaults on sunspots and co2, a season ahead from two seasons, over the last fifth "
    "of each series in windows that do not overlap. mase and crps are over the seasonal naive error before them.",
    configs=configs,
    run_cell=run_cell,
    key=(Column("series", "data", "text"), Column("method", "method", "text"), Column("seed", "seed", "integer")),
    columns=(
        Column("MASE", "score"),
        Column("sMAPE %", "smape"),
        Column("CRPS", "crps"),
        Column("windows", "windows", "integer"),
        Column("CPU s", "cpu_seconds"),
    ),
    default=False,
)
