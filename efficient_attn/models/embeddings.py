"""From token ids to vectors, and the checks that all text models share. B batch, N tokens, E features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, InputTypeError
from .positions import check_length, make_positions


class Embeddings(nn.Module):
    """token + position (+ type), then norm and dropout where asked for.

    Args:
        vocab_size, dim, max_len: sizes.
        positions, offset: as in `make_positions`.
        types: number of token types (segments); 0 for none.
        norm_eps: epsilon of a LayerNorm of the sum; None for none.
        scaled: multiply token vectors by sqrt(dim), as Vaswani et al. 2017 do.
        dropout: of the result.
        own_table: False where the vectors of tokens are those of another module, given in each call.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        max_len: int,
        *,
        positions: str = "learned",
        offset: int = 0,
        types: int = 0,
        norm_eps: float | None = None,
        scaled: bool = False,
        dropout: float = 0.0,
        own_table: bool = True,
    ) -> None:
        super().__init__()
        self.vocab_size, self.max_len = vocab_size, max_len
        self.scale = dim**0.5 if scaled else 1.0
        self.tokens = nn.Embedding(vocab_size, dim) if own_table else None
        self.positions = make_positions(positions, max_len, dim, offset=offset)
        self.types = nn.Embedding(types, dim) if types else None
        self.norm = None if norm_eps is None else nn.LayerNorm(dim, norm_eps)
        self.dropout = nn.Dropout(dropout)
        if self.tokens is not None:  # logits of tied weights start at the scale of 1 with `scaled`
            nn.init.normal_(self.tokens.weight, std=dim**-0.5 if scaled else 0.02)
        if self.types is not None:
            nn.init.normal_(self.types.weight, std=0.02)

    def forward(
        self, ids: Tensor, positions: Tensor, *, types: Tensor | None = None, table: Tensor | None = None
    ) -> Tensor:
        """ids (B, N), positions (N) or (B, N), types (B, N) or None: all of type 0; table (V, E) -> (B, N, E).

        Raises:
            InputError: ids or types out of range, more tokens than positions. InputTypeError: not integers.
        """
        check_ids("input_ids", ids, self.vocab_size)
        if self.positions is not None:
            check_length(ids.shape[1], self.max_len)
        weight = self.tokens.weight if self.tokens is not None else table
        assert weight is not None
        x = F.embedding(ids, weight)
        x = x if self.scale == 1.0 else x * self.scale
        if self.types is not None:
            if types is None:
                x = x + self.types.weight[0]
            else:
                check_ids("token_type_ids", types, self.types.num_embeddings)
                x = x + self.types(types)
        elif types is not None and not torch.compiler.is_compiling() and bool(types.any()):  # tokenizers give zeros
            raise InputError("this model has no token types; leave token_type_ids out")
        if self.positions is not None:
            x = x + self.positions(positions)
        found: Tensor = self.dropout(x if self.norm is None else self.norm(x))
        return found


def check_ids(name: str, ids: Tensor, size: int) -> None:
    """Raise unless ids are integers (B, N) from 0 to size - 1; the range is looked at on the CPU alone."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise InputTypeError(f"{name} must be an int64 tensor (batch, tokens), got {kind}")
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise InputError(f"{name} must be (batch, tokens) with at least one token, got {tuple(ids.shape)}")
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= size:
            raise InputError(f"{name} must be from 0 to {size - 1}, got {least} to {most}")


def as_padding(name: str, mask: Tensor | None, ids: Tensor, earlier: int = 0) -> Tensor | None:
    """An attention mask (B, earlier + N), 1 or True = a token, as True = padding.

    Raises:
        InputError: another shape. InputTypeError: floats.
    """
    if mask is None:
        return None
    if mask.is_floating_point():
        raise InputTypeError(f"{name} must be bool or integer with 1 = a token, got {mask.dtype}")
    wanted = (ids.shape[0], earlier + ids.shape[1])
    if mask.shape != wanted:
        raise InputError(f"{name} must be {wanted}, got {tuple(mask.shape)}")
    return mask == 0


def count_positions(mask: Tensor) -> Tensor:
    """Positions of tokens (B, N) from 0, as if the padding (0 in the mask) were not there; padding gets 0."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
