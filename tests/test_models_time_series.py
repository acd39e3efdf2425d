"""Forecasting: losses and measures against their definitions, then the models."""

import math

import pytest
import torch

from efficient_attn.errors import InputError
from efficient_attn.models.forecasting import (
    instance_statistics,
    mase,
    quantile_loss,
    seasonal_naive,
)

# --- what stands beside the models --------------------------------------------------------------------------------


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
    mean, std = instance_statistics(series, eps=1e-5)
    assert mean.flatten().tolist() == [3.0, 5.0]
    assert std.flatten().tolist() == pytest.approx([math.sqrt(3.5 + 1e-5), math.sqrt(1e-5)])
    assert not mean.requires_grad and not std.requires_grad


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
