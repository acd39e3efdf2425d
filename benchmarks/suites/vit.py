"""Suite `vit`: a small vision transformer on scikit-learn's digits, trained for a few seconds with one method.

A patch around every pixel is a token, so that a sequence has 64. The same seed, data order and number of steps for
every method: accuracies compare methods after equal work, and the time of a step says what the work costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from efficient_attn import MultiheadAttention
from efficient_attn.measuring import clock, inputs
from efficient_attn.measuring.calls import sized

from .. import cases, peers
from . import Chart, Claim, Column, Options, Row, Suite, beside, grid

DIM, HEADS, DEPTH = 64, 4, 2
TOKENS, CLASSES = 64, 10
BATCH = 64

MakeAttention = Callable[[], nn.MultiheadAttention]


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, make_attention: MakeAttention) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = make_attention()
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:  # [B, TOKENS, DIM]
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class DigitsViT(nn.Module):
    """Classifies 8 x 8 images: overlapping 3 x 3 patches as tokens, `DEPTH` blocks, mean over tokens, linear."""

    def __init__(self, make_attention: MakeAttention) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, DIM, kernel_size=3, padding=1)
        self.positions = nn.Parameter(torch.randn(TOKENS, DIM) * 0.1)
        self.blocks = nn.Sequential(*(Block(make_attention) for _ in range(DEPTH)))
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES))

    def forward(self, images: Tensor) -> Tensor:  # [B, 8, 8] -> [B, CLASSES]
        tokens = self.embed(images.unsqueeze(1)).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.blocks(tokens).mean(dim=1))
        return logits


def run_cell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Test accuracy after `steps` training steps, time of a step beside torch.nn.MultiheadAttention's, and peak
    memory.

    `config`: method (spec), steps, budget_s (for the interleaved timing of steps), threads.
    """

    def ours() -> nn.MultiheadAttention:
        return MultiheadAttention(DIM, HEADS, batch_first=True, attention=sized(config["method"], TOKENS))

    images, labels, test_images, test_labels = inputs.digits()
    torch.manual_seed(0)
    model = DigitsViT(ours)
    step = trainer(model, images, labels, steps=config["steps"])
    with clock.PeakMemory() as peak:
        losses = [step() for _ in range(config["steps"])]
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_images).argmax(dim=-1) == test_labels).float().mean().item()

    torch.manual_seed(0)
    theirs = DigitsViT(lambda: peers.torch_module(DIM, HEADS))
    steps = {"method": _step(model.train(), images, labels), "torch_module": _step(theirs, images, labels)}
    if config["method"] != "dense":
        dense = DigitsViT(lambda: MultiheadAttention(DIM, HEADS, batch_first=True, attention="dense"))
        steps["dense"] = _step(dense, images, labels)
    times = clock.interleaved(steps, config["budget_s"])
    return {
        **beside(times, "method", ("torch_module", "dense")),
        "accuracy": round(accuracy, 4),
        "loss": round(sum(losses[-10:]) / len(losses[-10:]), 4),
        "peak_bytes": peak.bytes,
    }


def trainer(model: nn.Module, images: Tensor, labels: Tensor, *, steps: int) -> Callable[[], float]:
    """A call that trains on the next seeded batch and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        batch = torch.randint(len(labels), (BATCH,), generator=generator)
        loss = cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.item()

    return step


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    """Forward and backward of one batch, for timing."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(
        cross_entropy(model(images[:BATCH]), labels[:BATCH]), parameters, allow_unused=True
    )


def configs(options: Options) -> Iterable[dict[str, Any]]:
    steps = cases.QUICK_VIT_STEPS if options.quick else cases.VIT_STEPS
    return grid(method=options.specs(cases.VIT_METHODS), steps=steps, **options.common())


def claims(rows: Sequence[Row]) -> list[Claim]:
    best = max(rows, key=lambda row: row["accuracy"])
    steps = best["steps"]
    text = f"After {steps} steps on digits, {best['method']} classifies best: {best['accuracy']:.1%} (one seed)."
    return [Claim(text, (best["id"],))]


SUITE = Suite(
    name="vit",
    about="A vision transformer of two blocks on scikit-learn's digits, a token a pixel, trained with the same seed, "
    "data order and steps for every method. A step is forward and backward of 64 images; vs torch.nn: the same model "
    "with torch.nn.MultiheadAttention.",
    configs=configs,
    run_cell=run_cell,
    key=(Column("method", "method", "text"), Column("steps", "steps", "integer")),
    columns=(
        Column("accuracy", "accuracy", "percent"),
        Column("loss", "loss"),
        Column("step ms", "ms", "ms"),
        Column("vs dense", "speedup_dense", "times"),
        Column("vs torch.nn", "speedup_torch_module", "times"),
        Column("MiB", "peak_bytes", "mib"),
    ),
    charts=(
        Chart("Digits: accuracy against training time", "ms", "accuracy", "ms a step", "test accuracy", log_x=False,
              log_y=False, lines=False),
    ),
    claims=claims,
)  # fmt: skip
