"""PyTorch's fused path of an encoder in evaluation, and ours in the same encoder; and its compiler on the formula."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from efficient_attn import attention, replace_attention

from . import Operator, Pair, Peer, Shape, no_grad_of


def _encoder(padded: bool, shape: Shape) -> Pair:
    layer = nn.TransformerEncoderLayer(shape.width, shape.heads, 4 * shape.width, batch_first=True, dtype=shape.dtype)
    theirs = no_grad_of(nn.TransformerEncoder(layer, 1, enable_nested_tensor=padded))
    ours = copy.deepcopy(theirs)
    replace_attention(ours, "dense")
    x, hidden = shape.tokens(), None
    if padded:  # a quarter of the tokens of every second sequence
        lengths = torch.full((shape.batch,), shape.seqlen)
        lengths[::2] -= shape.seqlen // 4
        hidden = torch.arange(shape.seqlen) >= lengths[:, None]

    def call(model: nn.Module) -> Operator:
        def forward(x: Tensor) -> Tensor:
            out: Tensor = model(x, src_key_padding_mask=hidden)
            # What stands at padding is nobody's: PyTorch's nested path leaves zeros there, and may cut it off.
            return out if hidden is None else out.masked_fill(hidden[:, : out.shape[1], None], 0.0)

        return forward

    return Pair((x,), call(ours), call(theirs), shape.tolerance)


def _compiled(shape: Shape) -> Pair:
    def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ key.mT * shape.head_dim**-0.5, -1) @ value

    return Pair(shape.qkv(), attention, torch.compile(formula), shape.tolerance)


PEERS = (
    Peer("torch_encoder", "nn.TransformerEncoderLayer, evaluation", partial(_encoder, False), trains=False),
    Peer(
        "torch_encoder_padded", "nn.TransformerEncoder with padding, evaluation", partial(_encoder, True), trains=False
    ),
    Peer("compiled_formula", "exact attention", _compiled, compiles=True),
)
