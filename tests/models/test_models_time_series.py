"""Forecasting: losses and measures against their definitions, then the models."""

import dataclasses
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support.model_checks import check_compiles, check_half_precision, check_round_trip, check_trains

from efficient_attn.errors import InputError, InputTypeError, UnsupportedError
from efficient_attn.models import ForecasterConfig, PatchForecaster, TimeSeriesTransformer, TransformerConfig
from efficient_attn.models.forecasting import (
    crps,
    instance_statistics,
    mase,
    quantile_loss,
    seasonal_naive,
    smape,
)

# --- what stands beside the models ---


def test_quantile_loss_equals_its_definition():
    torch.manual_seed(0)
    forecast, target = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    levels = (0.05, 0.3, 0.5, 0.9)
    total = 0.0
    for b in range(2):
        for t in range(3):
            for i, q in enumerate(levels):
                y, f = target[b, t].item(), forecast[b, t, i].item()
                total += q * (y - f) if y >= f else (1 - q) * (f - y)
    assert quantile_loss(forecast, target, levels).item() == pytest.approx(total / 24, rel=1e-12)


def test_quantile_loss_is_least_at_the_quantile():
    y = torch.arange(1001, dtype=torch.float64)
    for q in (0.1, 0.5, 0.9):
        losses = [quantile_loss(torch.full((1001, 1), f, dtype=y.dtype), y, (q,)).item() for f in range(0, 1001, 50)]
        assert losses.index(min(losses)) * 50 == 1000 * q


@pytest.mark.parametrize("levels", [(), (0.5, 0.1), (0.0, 0.5), (0.5, 1.0), (0.5, 0.5)])
def test_wrong_quantiles_are_named(levels):
    with pytest.raises(InputError, match="quantiles must be increasing"):
        quantile_loss(torch.zeros(3, len(levels)), torch.zeros(3), levels)


def test_quantile_loss_names_wrong_shapes():
    with pytest.raises(InputError, match="forecast of 2 quantiles"):
        quantile_loss(torch.zeros(3, 3), torch.zeros(3), (0.1, 0.9))


def test_instance_statistics():
    series = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]], requires_grad=True)
    mean, std = instance_statistics(series)
    assert mean.flatten().tolist() == [3.0, 5.0]
    assert std.flatten().tolist() == pytest.approx([math.sqrt(3.5), 0])
    assert not mean.requires_grad and not std.requires_grad
    for level in (0.1, 1e-30, 1e30):
        assert instance_statistics(torch.full((96,), level))[1] == 0, "flat is 0, not the rounding of its mean"


def test_seasonal_naive_repeats_the_last_season():
    history = torch.arange(10.0).expand(2, 10)
    assert seasonal_naive(history, 7, 3).tolist() == [[7, 8, 9, 7, 8, 9, 7]] * 2
    assert seasonal_naive(history, 2, 1).tolist() == [[9, 9]] * 2
    with pytest.raises(InputError, match="at least that long"):
        seasonal_naive(history, 2, 11)


def test_mase_equals_its_definition():
    torch.manual_seed(0)
    history, target, forecast = torch.randn(3, 20), torch.randn(3, 5), torch.randn(3, 5)
    for m in (1, 4):
        got = mase(forecast, target, history, season=m)
        for s in range(3):
            scale = sum(abs(history[s, t] - history[s, t - m]) for t in range(m, 20)) / (20 - m)
            error = sum(abs(target[s, h] - forecast[s, h]) for h in range(5)) / 5
            assert got[s].item() == pytest.approx((error / scale).item(), rel=1e-5)
    with pytest.raises(InputError, match="longer than the season"):
        mase(forecast, target, history, season=20)


# --- TimeSeriesTransformer ---

SPECS = ["dense", "sliding_window:left=4,right=4", "nystrom:landmarks=4", "performer:features=16"]


def test_the_documents_interface():
    torch.manual_seed(0)
    model = TimeSeriesTransformer(input_dim=3, hidden_dim=32, nhead=4, num_layers=2).eval()
    series = torch.randn(20, 5, 3)  # time, batch, features
    assert model(series).shape == (5, 1)
    first = TimeSeriesTransformer(dataclasses.replace(model.config, batch_first=True)).eval()
    first.load_state_dict(model.state_dict())
    torch.testing.assert_close(first(series.transpose(0, 1)), model(series))


def test_it_reads_order_and_answers_at_the_last_step():
    torch.manual_seed(0)
    model = TimeSeriesTransformer(2, 16, 2, 1, output_dim=3, causal=True, dropout=0.0).eval()
    series = torch.randn(10, 4, 2)
    answer = model(series)
    hidden = model.encoder(model.embedding(series.transpose(0, 1)) + model.positions(torch.arange(10)))
    torch.testing.assert_close(answer, model.head(hidden[:, -1]))
    shuffled = torch.cat([series[:-1].flip(0), series[-1:]])
    assert (model(shuffled) - answer).abs().max() > 1e-4


def test_padding_has_no_influence():
    torch.manual_seed(0)
    model = TimeSeriesTransformer(2, 16, 2, 2, batch_first=True, dropout=0.0).eval()
    series, lengths = torch.randn(3, 12, 2), (12, 7, 1)
    padding = torch.arange(12) >= torch.tensor(lengths)[:, None]
    series[padding] = torch.nan
    padded = model(torch.where(padding[..., None], 1e6, series), key_padding_mask=padding)
    for b, length in enumerate(lengths):
        torch.testing.assert_close(padded[b : b + 1], model(series[b : b + 1, :length]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", SPECS)
def test_time_series_transformer_trains_and_comes_back(attention, tmp_path):
    torch.manual_seed(0)
    model = TimeSeriesTransformer(3, 32, 4, 2, output_dim=2, dropout=0.0, attention=attention)
    series, target = torch.randn(20, 6, 3), torch.randn(6, 2)
    torch.testing.assert_close(model.loss(series, target), (model(series) - target).square().mean())
    check_trains(model, lambda m: m.loss(series, target))
    check_round_trip(model, lambda m: m(series), tmp_path)
    model.set_attention("causal")
    assert model.config.encoder.attention == "causal" and model(series).shape == (6, 2)


def test_time_series_transformer_names_wrong_input():
    model = TimeSeriesTransformer(3, 16, 2, 1, max_len=8)
    for series, error, message in (
        (torch.zeros(5, 2, 4), InputError, r"\(time, batch, 3\)"),
        (torch.zeros(5, 3), InputError, r"\(time, batch, 3\)"),
        (torch.zeros(9, 2, 3), InputError, "positions for 8 tokens"),
        (torch.zeros(0, 2, 3), InputError, "at least one step"),
        (torch.zeros(5, 2, 3, dtype=torch.int64), InputTypeError, "floating-point"),
    ):
        with pytest.raises(error, match=message):
            model(series)
    with pytest.raises(InputError, match=r"target must be \(2, 1\)"):
        model.loss(torch.zeros(5, 2, 3), torch.zeros(2))
    with pytest.raises(InputError, match="output_dim must be"):
        TimeSeriesTransformer(3, 16, 2, 1, output_dim=0)
    with pytest.raises(UnsupportedError, match="cannot be causal"):
        TimeSeriesTransformer(3, 16, 2, 1, causal=True, attention="nystrom")


# --- PatchForecaster ---


def forecaster(attention="dense", **options):
    encoder = TransformerConfig(hidden_dim=32, num_layers=2, num_heads=4, mlp_dim=48, attention=attention)
    sizes = {"context": 40, "horizon": 6, "patch_len": 8, "stride": 4, "quantiles": (0.1, 0.5, 0.9)}
    return PatchForecaster(ForecasterConfig(**(sizes | options), encoder=encoder))


@pytest.mark.parametrize("attention", SPECS)
def test_forecaster_trains_and_comes_back(attention, tmp_path):
    torch.manual_seed(0)
    model = forecaster(attention)
    steps = torch.arange(46.0)
    series = torch.stack([(steps / 3).sin() + 5, (steps / 2).cos() * 100], dim=1).expand(4, -1, -1)
    past, future = series[:, :40], series[:, 40:]
    check_trains(model, lambda m: m.loss(past, future))
    check_round_trip(model, lambda m: m(past), tmp_path)
    model.set_attention("bigbird:block=16")
    assert model(past).shape == (4, 6, 2, 3)


def test_forecaster_tokens_are_the_patches():
    """A context that the stride does not divide loses no step, and the last patch repeats the last value."""
    for context, patch, stride in ((40, 8, 4), (41, 8, 4), (43, 8, 3), (9, 9, 9)):
        model = forecaster(context=context, patch_len=patch, stride=stride)
        seen = []
        model.embedding.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        past = torch.randn(2, context, 3)
        model(past)
        mean, std = instance_statistics(past.transpose(1, 2))
        series = ((past.transpose(1, 2) - mean) / std).flatten(0, 1).float()
        padded = torch.cat([series, series[:, -1:].expand(-1, stride)], dim=1)
        assert seen[0].shape == (6, model.config.num_patches, patch)
        for n in range(model.config.num_patches):
            torch.testing.assert_close(seen[0][:, n], padded[:, n * stride : n * stride + patch])
        assert (model.config.num_patches - 1) * stride + patch >= context


def test_channels_are_apart():
    torch.manual_seed(0)
    model = forecaster().eval()
    past = torch.randn(2, 40, 3)
    forecast = model(past)
    changed = past.clone()
    changed[:, :, 1] = torch.randn(2, 40)
    same = (model(changed) == forecast).all(dim=-1).all(dim=1)
    assert same.tolist() == [[True, False, True]] * 2


# Kinds of series, steps -> values of the order of 1, whose forecasts must be alike in every unit and at every level.
KINDS = {
    "noise": torch.randn,
    "walk": lambda n: torch.randn(n).cumsum(0),
    "trend": lambda n: torch.linspace(-1, 1, n),
    "season": lambda n: (torch.arange(n) / 3).sin(),
    "demand": lambda n: (torch.rand(n) < 0.1).float() * torch.rand(n),
    "one jump": lambda n: (torch.arange(n) > n // 2).float(),
    "flat": lambda n: torch.full((n,), 0.3),
    "zeros": torch.zeros,
}


def in_all_kinds(steps, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.stack([make(steps).to(dtype) for make in KINDS.values()], dim=-1).expand(2, -1, -1)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1e-4, 3.7, 1e4, 1e12, 1e30])
def test_the_unit_changes_neither_forecast_nor_loss(scale):
    series = in_all_kinds(46)
    past, future = series[:, :40], series[:, 40:]
    model = forecaster().eval()
    forecast, loss = model(past), model.loss(past, future)
    torch.testing.assert_close(model(past * scale) / scale, forecast, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.loss(past * scale, future * scale), loss, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("level", [-1e12, -1e5, 300.0, 1e7, 1e9])
def test_the_level_changes_neither_forecast_nor_loss(level):
    """In float64 as far as that has room for the changes: of 1e12 it keeps 16 - 12 digits behind the point."""
    series = in_all_kinds(46, torch.float64)
    past, future = series[:, :40], series[:, 40:]
    model = forecaster().eval()
    forecast, loss = model(past), model.loss(past, future)
    room = 1e-5 + 1e-14 * abs(level)
    torch.testing.assert_close(model(past + level) - level, forecast, atol=room, rtol=1e-4)
    torch.testing.assert_close(model.loss(past + level, future + level), loss, atol=1e-4, rtol=2e-3)
    assert model(past).dtype == torch.float64 and loss.dtype == torch.float32


def test_the_changes_that_float32_keeps_at_a_high_level_are_not_lost():
    torch.manual_seed(0)
    model = forecaster().eval()
    past = torch.randint(-40, 40, (2, 40, 3)).float()
    forecast = model(past + 2.0**23) - 2.0**23  # whole numbers are all that float32 has there
    assert (forecast - model(past)).abs().max() <= 1.0


@pytest.mark.parametrize("jump", [1e-3, 1.0, 1e6])
def test_a_flat_context_forecasts_its_level_and_no_jump_outweighs_all_else(jump):
    model = forecaster()
    past = torch.full((1, 40, 2), 5.0)
    past[:, 0, 1] += 1e-6 * jump  # or lost in 5.0: flat then
    future = torch.full((1, 6, 2), 5.0 + jump)
    assert (model(past)[:, :, 0] == 5.0).all()
    flat, nearly = (model.loss(past[..., c : c + 1], future[..., c : c + 1]) for c in range(2))
    assert flat == 0 and 0 <= nearly < 20
    flat.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_forecaster_loss_is_the_quantile_loss_in_normalised_units():
    torch.manual_seed(0)
    model = forecaster().eval()
    past, future = torch.randn(2, 40, 3) * 7 + 100, torch.randn(2, 6, 3) * 7 + 100
    mean, std = (s.transpose(1, 2) for s in instance_statistics(past.transpose(1, 2)))
    scaled = (model(past) - mean[..., None]) / std[..., None]
    expected = quantile_loss(scaled, (future - mean) / std, (0.1, 0.5, 0.9))
    torch.testing.assert_close(model.loss(past, future), expected, atol=1e-5, rtol=1e-4)


def test_half_precision_and_compilation():
    torch.manual_seed(0)
    series, target = torch.randn(20, 6, 3), torch.randn(6, 1)
    model = TimeSeriesTransformer(3, 32, 4, 2)
    check_half_precision(model, lambda m, dtype: m.loss(series.to(dtype), target.to(dtype)))
    past, future = torch.randn(2, 40, 3) + 5, torch.randn(2, 6, 3) + 5
    check_half_precision(forecaster(), lambda m, dtype: m.loss(past, future))
    check_compiles(forecaster().loss, past, future)
    check_compiles(model, series)
    assert forecaster().bfloat16()(past.bfloat16()).dtype == torch.bfloat16


def test_predicted_quantiles_are_in_order():
    torch.manual_seed(0)
    model = forecaster().eval()
    past = torch.randn(2, 40, 3)
    predicted = model.predict(past)
    assert (predicted.diff(dim=-1) >= 0).all() and torch.equal(model(past), predicted)
    assert torch.equal(model.point(past), predicted[..., 1])


def test_forecaster_names_wrong_input():
    model = forecaster()
    with pytest.raises(InputError, match="reads 40 steps, got 39"):
        model(torch.zeros(2, 39, 1))
    with pytest.raises(InputError, match="batch, time, channels"):
        model(torch.zeros(2, 40))
    with pytest.raises(InputError, match=r"future must be \(2, 6, 1\)"):
        model.loss(torch.zeros(2, 40, 1), torch.zeros(2, 5, 1))
    for wrong in ({"patch_len": 41}, {"stride": 9}, {"horizon": 0}, {"quantiles": (0.9, 0.1)}):
        with pytest.raises(InputError):
            forecaster(**wrong)


# --- missing values and covariates ---


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -1e30, 0.0])
def test_a_missing_value_has_no_influence(fill):
    torch.manual_seed(0)
    model = forecaster()
    past, future = torch.randn(2, 40, 3).cumsum(1), torch.randn(2, 6, 3)
    mask, later = torch.rand(2, 40, 3) > 0.3, torch.rand(2, 6, 3) > 0.3
    expected = model(
        past_values=past, past_observed_mask=mask, future_values=future, future_observed_mask=later.float()
    )
    found = model(
        past_values=past.masked_fill(~mask, fill), past_observed_mask=mask.long(),
        future_values=future.masked_fill(~later, fill), future_observed_mask=later,
    )  # fmt: skip
    torch.testing.assert_close(found.to_tuple(), expected.to_tuple(), atol=0, rtol=0)
    if math.isnan(fill):
        alone = model(past_values=past.masked_fill(~mask, fill), future_values=future.masked_fill(~later, fill))
        torch.testing.assert_close(alone.to_tuple(), expected.to_tuple(), atol=0, rtol=0)
    found.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gaps_are_filled_with_the_value_before_them_and_count_in_no_statistic():
    model = forecaster()
    past = torch.arange(40.0).view(1, 40, 1)
    past[:, 10:15] = torch.nan
    inputs = model._read(past)
    assert (inputs.series[0, 0, 10:15] == 9).all() and inputs.series[0, 0, 15] == 15
    known = past[~past.isnan()].double()
    torch.testing.assert_close(inputs.mean.item(), known.mean().item())
    torch.testing.assert_close(inputs.std.item(), known.std(correction=0).item())
    output = model(past_values=past, future_values=torch.full((1, 6, 1), torch.nan))
    assert output.loss == 0 and output.loc.item() == pytest.approx(known.mean().item())
    nothing = model(past_values=torch.full((1, 40, 1), torch.nan), future_values=torch.zeros(1, 6, 1))
    assert nothing.prediction_outputs.isnan().all() and nothing.loss == 0, "no value, no level; nothing to learn"


def test_a_whole_series_observed_is_no_mask():
    torch.manual_seed(0)
    model, past = forecaster(), torch.randn(2, 40, 3)
    torch.testing.assert_close(model(past, past_observed_mask=torch.ones_like(past)), model(past))


def test_covariates_tell_what_the_past_does_not():
    """A future that only a covariate knows is learned, and each kind has an influence."""
    torch.manual_seed(0)
    model = forecaster(past_covariates=2, future_covariates=1, static_features=3)
    B = 16
    past = torch.randn(B, 40, 1)
    known = torch.randn(B, 46, 1)
    future = known[:, 40:] * 2
    beside = {"past_covariates": torch.randn(B, 40, 2), "static_features": torch.randn(B, 3)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = model(past_values=past, future_values=future, future_covariates=known, **beside).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    whole = beside | {"future_covariates": known}
    expected = model.predict(past, **whole)
    for name, value in whole.items():
        assert not torch.equal(model.predict(past, **(whole | {name: value + 1})), expected), name
        with pytest.raises(InputError, match=f"{name} must be"):
            model.predict(past, **(whole | {name: None}))
        with pytest.raises(InputError, match=f"{name} are not in the config"):
            forecaster().predict(past, **{name: value})
    torch.testing.assert_close(model.predict(past * 10 + 5, **whole), expected * 10 + 5, atol=1e-3, rtol=1e-3)


def test_wrong_masks_are_named():
    model, past = forecaster(), torch.randn(2, 40, 1)
    with pytest.raises(InputError, match="past_observed_mask must be"):
        model(past, past_observed_mask=torch.ones(2, 39, 1))
    with pytest.raises(InputError, match="give both"):
        model(past, future_observed_mask=torch.ones(2, 6, 1))
    with pytest.raises(InputError, match="past_covariates must be at least 0"):
        forecaster(past_covariates=-1)


def test_crps_and_smape_equal_their_definitions():
    forecast, target = torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([3.0])
    levels = (0.1, 0.5, 0.9)
    assert crps(forecast, target, levels).item() == pytest.approx(2 * (0.1 * 2 + 0.5 * 1 + 0.1 * 2) / 3)
    assert crps(forecast[:, 1:2], target, (0.5,)).item() == 1.0, "of a median the absolute error"
    assert smape(torch.tensor([1.0, 0.0, -2.0]), torch.tensor([3.0, 0.0, 2.0])).item() == pytest.approx(200 * 1.5 / 3)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    scale=st.floats(1e-25, 1e25),
    level=st.floats(-1e6, 1e6),
    kind=st.sampled_from(sorted(KINDS)),
    missing=st.floats(0.0, 0.9),
    seed=st.integers(0, 99),
)
def test_any_change_of_unit_and_level_is_one_of_the_forecast(scale, level, kind, missing, seed):
    """f(a (x + b)) = a (f(x) + b), with values missing, covariates and all."""
    torch.manual_seed(0)
    model = forecaster(future_covariates=1, static_features=1).eval()
    torch.manual_seed(seed)
    past = KINDS[kind](40).double().view(1, 40, 1)
    past = past.masked_fill(torch.rand(1, 40, 1) < missing, torch.nan)
    beside = {"future_covariates": torch.randn(1, 46, 1), "static_features": torch.randn(1, 1)}
    expected, found = model.predict(past, **beside), model.predict((past + level) * scale, **beside)
    size = past.nan_to_num(0.0).abs().max() + 1e-9
    torch.testing.assert_close(
        (found / scale - level) / size, expected / size, atol=1e-4 + 1e-14 * abs(level) / float(size), rtol=1e-4,
        equal_nan=True,
    )  # fmt: skip
