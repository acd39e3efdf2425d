"""What a call means where it does not say: the scale of its scores, and where its diagonal starts when Nq != Nk."""

from __future__ import annotations

ALIGNMENTS = ("top_left", "bottom_right")


def default_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the scores: `scale`, or 1 / sqrt(head_dim)."""
    return head_dim**-0.5 if scale is None else float(scale)


def alignment_offset(alignment: str | None, q_len: int, kv_len: int) -> int:
    """The key at which the diagonal of query 0 starts: 0, or with "bottom_right" kv_len - q_len."""
    return kv_len - q_len if alignment == "bottom_right" else 0
