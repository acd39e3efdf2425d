"""The block-sparse self-attention of BigBird in Hugging Face transformers, and ours under the mask that it draws.

Their layer draws random blocks in training only; in evaluation it lists block 0 once more for each of them, which
counts its keys several times. So it runs in training mode, where nothing else is random.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from efficient_attn import BlockMask, attention

from . import Pair, Peer, Shape, missing

BLOCK, RANDOM_BLOCKS = 64, 3


def _build(shape: Shape) -> Pair:
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    if shape.seqlen % BLOCK or shape.seqlen // BLOCK <= 5 + 2 * RANDOM_BLOCKS:
        least = BLOCK * (6 + 2 * RANDOM_BLOCKS)
        raise NotImplementedError(f"their layer takes multiples of {BLOCK} from {least} tokens, got {shape.seqlen}")
    config = BigBirdConfig(
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        block_size=BLOCK,
        num_random_blocks=RANDOM_BLOCKS,
        max_position_embeddings=shape.seqlen,  # else the last block of the sequence is drawn, though it is global
    )
    module: Any = BigBirdBlockSparseAttention(config, seed=0).train().requires_grad_(False)
    module = module.to(dtype=shape.dtype, device=shape.device)
    everywhere = torch.ones(shape.batch, shape.seqlen, device=shape.device, dtype=shape.dtype)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(everywhere, BLOCK)

    def theirs(x: Tensor) -> Tensor:
        out: Tensor = module(x, band, rows, columns, blocked, blocked)[0]
        return out

    x = shape.tokens()
    mask, twice = _visible(module, theirs, x, shape)

    def ours(x: Tensor) -> Tensor:
        query, key, value = (shape.heads_of(linear, x) for linear in (module.query, module.key, module.value))
        return attention(query, key, value, mask=mask).transpose(1, 2).flatten(2)

    if twice:
        note = f"theirs draws {twice} blocks that their row sees already, and counts their keys twice"
        return Pair((x,), ours, theirs, None, note)
    return Pair((x,), ours, theirs, shape.tolerance)


def _visible(module: Any, call: Any, x: Tensor, shape: Shape) -> tuple[BlockMask, int]:
    """The blocks that a call of their layer looks at, and how many of them it draws though they are seen already: what
    it draws is observed where it is gathered from."""
    drawn: list[Tensor] = []
    gather = module.torch_gather_b2

    def seen(blocks: Tensor, indices: Tensor) -> Tensor:
        drawn.append(indices)  # (B, H, blocks - 2, random): for all rows but the first and the last
        gathered: Tensor = gather(blocks, indices)
        return gathered

    module.torch_gather_b2 = seen
    with torch.no_grad():
        call(x)
    del module.torch_gather_b2
    count = shape.seqlen // BLOCK
    visible = torch.zeros(shape.heads, count, count, dtype=torch.bool)
    near = torch.arange(count)
    visible |= (near[:, None] - near).abs() <= 1
    visible[:, [0, -1]] = True
    visible[:, :, [0, -1]] = True
    chosen = drawn[0][0].cpu()
    twice = int(visible[:, 1:-1].gather(2, chosen).sum())
    visible[:, 1:-1].scatter_(2, chosen, True)
    per_token = visible.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    return BlockMask.from_dense(per_token.to(shape.device), block_size=(BLOCK, BLOCK)), twice


PEERS = (
    Peer(
        "hf_bigbird",
        f"BigBird, blocks of {BLOCK}, {RANDOM_BLOCKS} random, with projections",
        _build,
        "transformers",
        missing("transformers", "transformers"),
    ),
)
