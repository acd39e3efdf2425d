"""What a call means where it does not say: the scale of its scores, and where its diagonal starts when Nq != Nk."""

from __future__ import annotations

import math

from .errors import InputError, InputTypeError

ALIGNMENTS = ("top_left", "bottom_right")


def default_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the scores: `scale`, or 1 / sqrt(head_dim).

    Raises:
        InputError, InputTypeError: a scale that is no finite number.
    """
    if scale is None:
        return float(head_dim**-0.5)
    try:
        number = float(scale)
    except (TypeError, ValueError):
        raise InputTypeError(f"scale must be a number or None, got {scale!r}") from None
    if not -math.inf < number < math.inf:  # torch.compile has no isfinite for a symbolic one
        raise InputError(f"scale must be finite, got {number}; None stands for 1 / sqrt(head_dim)")
    return number


def alignment_offset(alignment: str | None, q_len: int, kv_len: int) -> int:
    """The key at which the diagonal of query 0 starts: 0, or with "bottom_right" kv_len - q_len."""
    return kv_len - q_len if alignment == "bottom_right" else 0
