"""Forecasts of a trained `PatchForecaster` for new tables, and its backtest over rolling windows beside seasonal naive
and exponential smoothing (ETS, Hyndman et al. 2008, of statsmodels)."""

from __future__ import annotations

import csv
import dataclasses
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from ..errors import EfficientAttnError, InputError, UnsupportedError
from ..measuring import terminal
from ..measuring.run_folder import check_file
from ..measuring.terminal import note
from ..models import PatchForecaster
from .data import series as data
from .data.base import existing
from .data.series_reader import Series, SeriesReader, calendar
from .tasks.series import covariates, measures, naive_forecast

PANELS = 12  # of a plot
Made = tuple[Tensor, tuple[float, ...]]  # quantiles [S, C, Q], their levels


@dataclass(frozen=True)
class Forecast:
    """What comes after a series: quantiles float64 [S, C, Q], and the times of the S steps if they are known."""

    series: Series
    end: int
    quantiles: Tensor
    times: list[datetime] | None


def load(run: Path) -> tuple[PatchForecaster, SeriesReader]:
    """The model of a run of `train forecast`, or of its folder `model`, and what reads tables for it.

    Raises:
        InputError: no such folder. CheckpointError: it holds something else.
    """
    folder = existing(run, "the folder of a run of train forecast", "the run")
    folder = folder / "model" if (folder / "model").is_dir() else folder
    return PatchForecaster.from_pretrained(folder), SeriesReader.from_pretrained(folder)


def forecast(model: PatchForecaster, reader: SeriesReader, series: Series, horizon: int) -> Forecast:
    """The next `horizon` steps after the last value that is known.

    Steps beyond the model's horizon are forecast from its own medians, so that their quantiles are too narrow. A past
    that is shorter than the model's context counts as missing before its beginning.

    Raises:
        InputError: future covariates that the table does not have, or a series without values.
    """
    known = ~series.values.isnan().all(dim=1)
    if not known.any():
        raise InputError(f"the series {series.name!r} has no value to go on from")
    end = int(known.nonzero()[-1]) + 1
    config = model.config
    whole = reader.scaled(_continued(reader, series, end, horizon))
    values, blocks = whole.values.clone(), []
    for start in range(end, end + horizon, config.horizon):
        part = data.window(_padded(dataclasses.replace(whole, values=values), start, config), *_sizes(start, config))
        batch = {name: value[None] for name, value in part.items()}
        quantiles = model.predict(batch["past"], **covariates(batch))[0].to(torch.float64)
        blocks.append(quantiles)
        values[start : start + config.horizon] = quantiles[: len(values) - start, :, model.middle]
    made = torch.cat(blocks)[:horizon]
    if made.isnan().any():
        empty = [
            name for name, column in zip(series.columns, made.isnan().any(dim=2).any(dim=0), strict=True) if column
        ]
        raise InputError(f"{', '.join(empty)}{_of(series)}: no value in the last {config.context} steps to go on from")
    times = None if whole.times is None else whole.times[end : end + horizon]
    return Forecast(series, end, made, times)


def _sizes(start: int, config: Any) -> tuple[int, int, int]:
    return max(start, config.context), config.context, config.horizon


def _continued(reader: SeriesReader, series: Series, end: int, horizon: int) -> Series:
    """The series up to `end`, and rows of what is known of the horizon."""
    rows = len(series.values) - end
    if reader.future and rows < horizon:
        raise InputError(
            f"a forecast of {horizon} steps needs {', '.join(reader.future)} for them; the table has {rows} rows after "
            f"the last value{_of(series)}; add rows with these columns and nothing to forecast"
        )
    more = max(horizon - rows, 0)
    later = series.later(more) if more else []
    times = None if series.times is None or later is None else [*series.times, *later]
    if reader.calendar and times is None:
        raise InputError("the times of the steps to come do not follow from the table; give it --frequency in training")

    def longer(table: Tensor) -> Tensor:
        return torch.cat([table, table.new_full((more, table.shape[1]), torch.nan)])

    future = longer(series.future)
    if reader.calendar and times is not None:
        future[:, len(reader.future) :] = calendar(times)
    values = longer(series.values)
    values[end:] = torch.nan
    return dataclasses.replace(series, values=values, past=longer(series.past), future=future, times=times)


def _of(series: Series) -> str:
    return f" of the series {series.name!r}" if series.name else ""


def _padded(series: Series, start: int, config: Any) -> Series:
    """With missing rows before its beginning where the context reaches back farther, and after its end."""
    before, after = max(config.context - start, 0), max(start + config.horizon - len(series.values), 0)

    def padded(table: Tensor) -> Tensor:
        parts = [table.new_full((count, table.shape[1]), torch.nan) for count in (before, after)]
        return torch.cat([parts[0], table, parts[1]])

    return dataclasses.replace(
        series, values=padded(series.values), past=padded(series.past), future=padded(series.future)
    )


# --- backtest ---


def backtest(
    model: PatchForecaster, reader: SeriesReader, every: Sequence[Series], windows: int, *, season: int, ets: bool
) -> dict[str, dict[str, float]]:
    """MASE, sMAPE and CRPS of forecasts for the last `windows` horizons of each series, which do not overlap.

    MASE and CRPS are over the seasonal naive forecast's error before the first window. A point forecast's CRPS is its
    absolute error.

    Returns:
        By method: model, seasonal naive, and with `ets` ETS.

    Raises:
        InputError: series too short. UnsupportedError: ETS without statsmodels.
    """
    config = model.config
    methods: dict[str, Callable[[Series, Series, int], Made]] = {
        "model": lambda one, scaled, start: _by_model(model, scaled, start),
        "seasonal naive": lambda one, scaled, start: (
            naive_forecast(one.values[None, :start], config.horizon, season)[0][..., None], (0.5,)
        ),
    }  # fmt: skip
    if ets:
        methods["ETS"] = lambda one, scaled, start: _by_ets(
            one.values[:start], config.horizon, season, config.quantiles
        )
    errors: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for one in every:
        first = len(one.values) - windows * config.horizon
        if first < config.context or first <= season:
            raise InputError(
                f"{len(one.values)} steps{_of(one)} are too few for {windows} windows "
                f"of {config.horizon} steps after a context of {config.context}; lower --windows"
            )
        scaled = reader.scaled(one)
        scale = data.naive_error(one.values[:first], season)[None]
        if not (scale > 0).all():
            raise InputError(f"series {one.name!r} repeats itself exactly each season; there is nothing to measure")
        for start in range(first, len(one.values), config.horizon):
            target = one.values[None, start : start + config.horizon]
            if target.isnan().all():
                continue
            for name, make in methods.items():
                quantiles, levels = make(one, scaled, start)
                middle = quantiles[..., min(range(len(levels)), key=lambda i: abs(levels[i] - 0.5))]
                found = measures(quantiles[None], middle[None], target, scale, levels)
                errors[name].append({key: value.item() for key, value in found.items()})
    return {
        name: {key: sum(one[key] for one in rows) / len(rows) for key in rows[0]} | {"windows": len(rows)}
        for name, rows in errors.items()
    }


def _by_model(model: PatchForecaster, scaled: Series, start: int) -> Made:
    config = model.config
    batch = {name: value[None] for name, value in data.window(scaled, start, config.context, config.horizon).items()}
    return model.predict(batch["past"], **covariates(batch))[0].to(torch.float64), config.quantiles


def _by_ets(history: Tensor, horizon: int, season: int, levels: tuple[float, ...]) -> Made:
    """Additive errors, damped trend and, where there are two seasons, additive season, fitted to the whole history."""
    try:
        from pandas import Series as Column
        from statsmodels.tsa.exponential_smoothing.ets import ETSModel
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "ETS comes with statsmodels; pip install 'efficient-attn[train]', or --no-ets"
        ) from error
    made = []
    for column in data.last_known(history.T).numpy():
        seasonal: dict[str, Any] = {"seasonal": "add", "seasonal_periods": season}
        kind = seasonal if season > 1 and len(column) >= 2 * season + 4 else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an optimiser that stopped early: what it found is judged here
            fitted = ETSModel(Column(column), error="add", trend="add", damped_trend=True, **kind).fit(
                disp=False, maxiter=200
            )
            ahead = fitted.get_prediction(start=len(column), end=len(column) + horizon - 1)
            rows = []
            for level in levels:
                frame = ahead.summary_frame(alpha=2 * min(level, 1 - level) if level != 0.5 else 0.5)
                name = "mean" if level == 0.5 else "pi_lower" if level < 0.5 else "pi_upper"
                rows.append(torch.from_numpy(frame[name].to_numpy(copy=True)))
        made.append(torch.stack(rows, dim=-1))
    return torch.stack(made, dim=1), levels


# --- files and commands ---


def write_table(found: Sequence[Forecast], levels: Sequence[float], path: Path, id_column: str | None) -> None:
    """One row a step and column: series (of a long table), ds or step, column, and a column for each quantile."""
    dated = all(one.times is not None for one in found)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        first = [id_column] if id_column else []
        writer.writerow([*first, "ds" if dated else "step", "column", *(f"q{level:g}" for level in levels)])
        for one in found:
            for step, row in enumerate(one.quantiles.tolist()):
                when = one.times[step].isoformat(" ") if one.times is not None and dated else one.end + step
                for column, values in zip(one.series.columns, row, strict=True):
                    writer.writerow([*([one.series.name] if id_column else []), when, column, *map(repr, values)])


def draw(found: Sequence[Forecast], levels: Sequence[float], path: Path) -> None:
    """The end of each series and its forecast, at most 12 panels.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "a plot needs matplotlib; pip install 'efficient-attn[bench]', or leave --plot"
        ) from error
    panels = [(one, column) for one in found for column in range(one.quantiles.shape[1])][:PANELS]
    figure = Figure(figsize=(8, 2.4 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    middle = min(range(len(levels)), key=lambda i: abs(levels[i] - 0.5))
    for axis, (one, column) in zip(axes, panels, strict=True):
        begin = max(0, one.end - 4 * len(one.quantiles))
        past = one.series.times[begin : one.end] if one.series.times and one.times else range(begin, one.end)
        ahead = one.times or range(one.end, one.end + len(one.quantiles))
        quantiles = one.quantiles[:, column]
        axis.plot(past, one.series.values[begin : one.end, column], color="0.3", linewidth=1)
        axis.plot(ahead, quantiles[:, middle], color="C0")
        for low in range(len(levels) // 2):
            axis.fill_between(ahead, quantiles[:, low], quantiles[:, -1 - low], color="C0", alpha=0.2, linewidth=0)
        axis.set_title(" ".join(filter(None, (one.series.name, one.series.columns[column]))), fontsize=9, loc="left")
    figure.savefig(path, dpi=120)


def forecast_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run of `train forecast`.")],
    table: Annotated[Path, typer.Option("--data", help="A .csv as the one that was trained on, up to now.")],
    out: Annotated[Path, typer.Option(help="Where the forecast goes, a .csv.")] = Path("forecast.csv"),
    horizon: Annotated[
        int | None, typer.Option(help="Steps. Default: the model's; more go on from its medians.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="A picture of it, .png or .svg.")] = None,
) -> None:
    """Forecasts what comes after a table, by a model that `train forecast` made."""
    console = terminal.console(width=120)

    def work() -> None:
        model, reader = load(run)
        steps = model.config.horizon if horizon is None else horizon
        if steps < 1:
            raise InputError(f"--horizon must be at least 1, given {steps}")
        if steps > model.config.horizon:
            note(
                console,
                "note:",
                f" steps after {model.config.horizon} go on from medians, their quantiles are too narrow",
            )
        found = [forecast(model, reader, one, steps) for one in reader.read(existing(table, "a .csv file"))]
        write_table(found, model.config.quantiles, out, reader.id)
        if plot is not None:
            draw(found, model.config.quantiles, plot)
        for path in (out, plot):
            if path is not None:
                console.print(str(path), soft_wrap=True)

    _run(work)


def backtest_command(
    run: Annotated[Path, typer.Argument(help="Folder of a run of `train forecast`.")],
    table: Annotated[Path, typer.Option("--data", help="A .csv as the one that was trained on, with later steps.")],
    windows: Annotated[int, typer.Option(min=1, help="Horizons at the end of each series.")] = 5,
    season: Annotated[int | None, typer.Option(min=1, help="Steps in a season. Default: that of the training.")] = None,
    ets: Annotated[bool, typer.Option(help="Fit statsmodels' ETS before each window.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Measures a model of `train forecast` on the last steps of a table, beside seasonal naive and ETS."""
    console = terminal.console(width=120)

    def work() -> None:
        model, reader = load(run)
        steps = season or reader.season
        if steps is None:
            raise InputError("give --season, how many observations make one")
        if out is not None:
            check_file("--out", out)
        read = reader.read(existing(table, "a .csv file"))
        found = backtest(model, reader, read, windows, season=steps, ets=ets)
        shown = Table("", "MASE", "sMAPE %", "CRPS", "windows", box=None, padding=(0, 2, 0, 0))
        for name, row in found.items():
            shown.add_row(name, *(f"{row[key]:.3f}" for key in ("mase", "smape", "crps")), str(row["windows"]))
        console.print(shown)
        if out is not None:
            out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    _run(work)


def _run(work: Callable[[], None]) -> None:
    """Do it; an error of ours is said in a line, exit code 2."""
    try:
        work()
    except EfficientAttnError as error:
        terminal.say_error(error)
        raise typer.Exit(2) from None
