"""Random and adversarial inputs against every bound that `insight` promises: python -m support.certify --inputs 100000

An input is the queries and keys of one head. For each: no row drops more than `tau_max`, the error of the output is the
certified one, and the interval of a sample holds the mean mass dropped, but for as many as its confidence allows.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, replace
from typing import Any

import torch

from efficient_attn import TopKBlocks, TopPBlocks, attention
from efficient_attn.insight import certificate, sampled_certificate

D, BLOCK, HEADS, CONFIDENCE = 16, 16, 2, 0.95
SLACK = 1e-4  # of a float32 softmax


def gaussian(B: int, N: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    query, key = (torch.randn(B, HEADS, N, D, generator=generator) for _ in range(2))
    return query, key


def clustered(B: int, N: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of a block are alike, and queries look at one block: what a bound can see."""
    blocks = -(-N // BLOCK)
    centres = 2.5 * torch.randn(B, HEADS, blocks, 1, D, generator=generator)
    key = (centres + 0.1 * torch.randn(B, HEADS, blocks, BLOCK, D, generator=generator)).flatten(2, 3)[:, :, :N]
    return key, key


def needle(B: int, N: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One key of an otherwise uninteresting block has all the mass: what means do not see."""
    query, key = gaussian(B, N, generator)
    key = 0.1 * key
    key[:, :, N // 2 + 3] = 12.0 * torch.nn.functional.normalize(query[:, :, 1], dim=-1)
    return query * 4, key


def opposed(B: int, N: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that cancel in the mean: +v and -v, of every size."""
    query, key = gaussian(B, N, generator)
    key[:, :, 1::2] = -key[:, :, : 2 * (N // 2) : 2]
    return query * 5, key * torch.logspace(-2, 1, N)[:, None]


def drifting(B: int, N: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    query, key = gaussian(B, N, generator)
    return query * 0.3, key.cumsum(2) * 0.3


INPUTS = (gaussian, clustered, needle, opposed, drifting)
PATTERNS: tuple[Any, ...] = (
    TopKBlocks(block=BLOCK, blocks=1, sink=0, local=1),
    TopKBlocks(block=BLOCK, fraction=0.25, summary="minmax", queries="first"),
    TopPBlocks(block=BLOCK, mass=0.5),
)


@dataclass
class Counts:
    """What was tried, and what went beyond its bound."""

    inputs: int = 0
    rows: int = 0
    tau_violations: int = 0
    error_violations: int = 0
    samples: int = 0
    missed: int = 0

    def violated(self) -> bool:
        """Whether a bound was broken, or an interval missed more often than its confidence allows."""
        allowed = (1 - CONFIDENCE) * self.samples + 4 * (CONFIDENCE * (1 - CONFIDENCE) * self.samples) ** 0.5
        return self.tau_violations + self.error_violations > 0 or self.missed > allowed


def certify(inputs: int, seed: int = 0, batch: int = 64) -> Counts:
    """Try so many inputs, in batches of one kind, length, pattern and tau_max each."""
    choose, generator, counts = random.Random(seed), torch.Generator().manual_seed(seed), Counts()
    while counts.inputs < inputs:
        B, N = min(batch, -(-(inputs - counts.inputs) // HEADS)), choose.choice((33, 75, 96))
        query, key = choose.choice(INPUTS)(B, N, generator)
        value, tau_max = torch.randn(B, HEADS, N, 4, generator=generator), choose.choice((0.01, 0.05, 0.1, 0.3))
        where = {"is_causal": choose.random() < 0.5}
        mask = replace(choose.choice(PATTERNS), tau_max=tau_max)
        found = certificate(query, key, value, mask=mask, **where)
        wrong = (attention(query, key, value, **where) - attention(query, key, value, mask=mask, **where)).norm(dim=-1)
        size = value.abs().amax() * D**0.5
        counts.tau_violations += int((found.tau > tau_max * (1 + SLACK)).sum())
        counts.error_violations += int(((wrong - found.error).abs() > SLACK * size).sum())
        loose = replace(mask, tau_max=None)
        right = float(certificate(query[:1], key[:1], value[:1], mask=loose, **where).tau.mean())
        interval = sampled_certificate(
            query[:1], key[:1], mask=loose, **where, samples=16, confidence=CONFIDENCE, generator=generator
        )
        counts.samples += 1
        counts.missed += not interval.low - 1e-6 <= right <= interval.high + 1e-6
        counts.inputs += B * HEADS
        counts.rows += B * HEADS * N
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = certify(options.inputs, options.seed)
    print(
        f"{counts.inputs} inputs, {counts.rows} rows: {counts.tau_violations} beyond tau_max, "
        f"{counts.error_violations} errors that differ from the certified one; {counts.missed} of {counts.samples} "
        f"sampled intervals missed the mean, at {CONFIDENCE:.0%} confidence"
    )
    raise SystemExit(counts.violated())


if __name__ == "__main__":
    main()
