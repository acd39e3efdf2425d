"""local-attention's LocalAttention and a window of ours."""

from __future__ import annotations

from efficient_attn import SlidingWindow, attention

from . import Operator, Pair, Peer, Shape, missing

WINDOW = 128  # keys to each side


def _build(shape: Shape) -> Pair:
    from local_attention import LocalAttention

    if shape.seqlen % WINDOW:
        raise NotImplementedError(f"it takes lengths that are multiples of {WINDOW}, got {shape.seqlen}")
    window = SlidingWindow(left=WINDOW, right=WINDOW)
    theirs: Operator = LocalAttention(WINDOW, exact_windowsize=True, use_rotary_pos_emb=False)
    return Pair(
        shape.qkv(), lambda query, key, value: attention(query, key, value, mask=window), theirs, shape.tolerance
    )


PEERS = (
    Peer(
        "local_attention",
        f"{WINDOW} keys to each side",
        _build,
        "local-attention",
        missing("local_attention", "local-attention"),
    ),
)
