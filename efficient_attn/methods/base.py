"""What a method is: an object that a user names, that makes its state and attends."""

from __future__ import annotations

from collections import ChainMap
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..masks import BlockMask
from ..options import Named
from ..patterns import PATTERNS, Pattern

METHODS: ChainMap[str, Any] = ChainMap({}, PATTERNS)  # what a spec names: the patterns, which attend as `Sparse`, first
TAILS: dict[str, Any] = {}  # what may stand behind a +, see hybrid/


class Method(Named):
    """A way to attend. Subclasses are frozen dataclasses: their fields are the options, with usable defaults.

    Class attributes say, beside what `Named` has, whether it is `exact` (softmax attention over the pairs it looks at,
    none of them approximated) and `is_dense` (over all pairs), and what calls may ask of it: `accepts_causal`,
    `accepts_mask` (any mask of pairs), `accepts_bias`.
    """

    family = "method"
    registry = METHODS
    compounds: ClassVar[ChainMap[str, Any]] = ChainMap({}, Pattern.compounds)
    exact: ClassVar[bool] = False
    is_dense: ClassVar[bool] = False
    accepts_causal: ClassVar[bool] = False
    accepts_mask: ClassVar[bool] = False
    accepts_bias: ClassVar[bool] = False

    @property
    def shares_state(self) -> bool:
        """Whether the paper gives all layers of a model one state, which `replace_attention` then shares among them."""
        return False

    def build(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module | None:
        """Make what `attend` needs as `state`: learned parameters and random features; None for methods without any.

        num_heads: those of keys and values, fewer than the queries' when heads are grouped: what a head has of its own
            belongs to its keys.

        Draws nothing from PyTorch's global generator: a model's other parameters start the same with any method.
        """
        return None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        state: nn.Module | None = None,
        key_mask: Tensor | None = None,
        mask: BlockMask | Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        causal_alignment: str | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int | Tensor | None = None,
        backend: str = "auto",
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend by this method.

        Args:
            query, key, value: (B, Hq, Nq, D), (B, Hkv, Nk, D), (B, Hkv, Nk, Dv), as in `attention`.
            state: what `build` returned.
            key_mask: bool (B, Nk), True = attend: padding. What a masked key holds, NaN included, has no influence.
            mask, bias, is_causal, causal_alignment, scale, dropout_p, dropout_seed, backend: as in `attention`.
            need_weights: also return what this method multiplies the values with, dropout included: n x n memory.

        Returns:
            out (B, Hq, Nq, Dv) and weights (B, Hq, Nq, Nk) or None.

        Raises:
            UnsupportedError: what the class attributes say this method does not accept.
            InputError, InputTypeError: arguments that do not belong together, or a missing state.
        """
        raise NotImplementedError


def keep_state(method_state: nn.Module | None, state_dict: dict[str, Any], prefix: str) -> None:
    """Let a checkpoint without parameters of the method load strictly: a module's own, `prefix`method_state, stay."""
    own = f"{prefix}method_state."
    if method_state is not None and not any(name.startswith(own) for name in state_dict):
        state_dict.update({own + name: value for name, value in method_state.state_dict(keep_vars=True).items()})
