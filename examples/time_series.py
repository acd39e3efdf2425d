"""A Transformer that foretells the number of sunspots of the next year from the forty before.

    python examples/time_series.py
    python examples/time_series.py --attention "sliding_window:left=12,right=0" --causal
    python examples/time_series.py --series co2

The series come with statsmodels. The last fifth of the years is never seen in training; the forecast that it is
compared with repeats the value one season ago.
"""

import argparse

import torch

from efficient_attn.models import TimeSeriesTransformer
from efficient_attn.training.data import series


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", default="sunspots", choices=series.SERIES)
    parser.add_argument("--attention", default="dense", help="any spec, as nystrom:landmarks=8")
    parser.add_argument("--causal", action="store_true", help="each step sees itself and those before")
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    season = series.SERIES[options.series]
    data = series.load(options.series, context=max(40, season), horizon=1)

    torch.manual_seed(0)
    model = TimeSeriesTransformer(
        input_dim=1,
        hidden_dim=32,
        nhead=4,
        num_layers=2,
        batch_first=True,
        dropout=0.1,
        causal=options.causal,
        attention=options.attention,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps)
    for step in range(options.steps):
        past, change, size = window(data.train, torch.randint(len(data.train), (32,)))
        loss = model.loss(past, change)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step + 1 == options.steps:
            print(f"step {step + 1:4}  loss {loss.item():.3f}")

    model.eval()
    everything = torch.arange(len(data.test))
    past, change, size = window(data.test, everything)
    with torch.no_grad():
        error = ((model(past) - change) * size).abs().mean()
    batch = data.test.batch(everything)
    naive = (batch["future"][:, 0] - batch["past"][:, -season]).abs().mean()
    print(f"mean error of {len(data.test)} unseen steps: {error:.2f}, of the value one season ago: {naive:.2f}")


def window(data, indices):
    """The past around its last value in units of its deviation, the change from there to the next step, the unit."""
    batch = data.batch(indices)
    last, size = batch["past"][:, -1:], batch["past"].std(dim=1, keepdim=True)
    return (batch["past"] - last) / size, ((batch["future"] - last) / size)[:, 0], size[:, 0]


if __name__ == "__main__":
    main()
