"""Sparse methods: the patterns of `efficient_attn.patterns`, run by exact attention over the pairs that they allow."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from .. import patterns, specs
from ..errors import UnsupportedError
from ..functional import (
    add_to_bias,
    as_block_mask,
    attention_weights,
    causal_mask,
    check_alignment,
    check_key_mask,
    padded_attention,
    resolve_seed,
    select_keys,
)
from ..masks import BlockMask
from ..tracing import PLAN, named
from .base import Method, parse, register, register_compound


class SparseMethod(Method, patterns.Pattern):
    """A pattern as a method: exact attention where the pattern, the mask, the lengths and causality all allow it."""

    exact = True
    accepts_causal = True
    accepts_mask = True
    accepts_bias = True

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
        check_key_mask(key_mask, key)
        check_alignment(is_causal, causal_alignment, query.shape[2], key.shape[2])
        causal = causal_mask(query.shape[2], key.shape[2], is_causal, causal_alignment)
        mask, bias = self._restricted(mask, bias, query, key, scale=scale, key_mask=key_mask, causal=causal)
        if dropout_p > 0.0:
            dropout_seed = resolve_seed(dropout_seed)  # one seed: output and weights drop alike
        shared: dict[str, Any] = {
            "mask": mask,
            "is_causal": is_causal,
            "causal_alignment": causal_alignment,
            "scale": scale,
            "dropout_p": dropout_p,
            "dropout_seed": dropout_seed,
        }
        out = padded_attention(query, key, value, key_mask, bias=bias, backend=backend, **shared)
        if not need_weights:
            return out, None
        if key_mask is not None:
            (key,) = select_keys(key_mask, key)
            bias = add_to_bias(bias, key_mask, query)
        return out, attention_weights(query, key, bias=bias, **shared)

    @named(PLAN)
    def _restricted(
        self,
        mask: BlockMask | Tensor | None,
        bias: Tensor | None,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None,
        key_mask: Tensor | None,
        causal: BlockMask | None,
    ) -> tuple[BlockMask | Tensor | None, Tensor | None]:
        """The pattern's mask and the user's in one, and the bias."""
        tracing = torch.compiler.is_compiling() and not self._analytic
        if tracing and isinstance(mask, Tensor) and mask.dtype == torch.bool:
            # How many blocks both list depends on values, which a traced program must not: -inf in a bias does not.
            bias = torch.where(mask, query.new_zeros(()) if bias is None else bias, -torch.inf)
            mask = None
        user = None if mask is None else as_block_mask(mask, query, key)
        if tracing and user is not None and user.indptr is not None:
            raise UnsupportedError(
                f"torch.compile cannot join the lists of {self.name} with those of a BlockMask. Join them outside, "
                "pattern.block_mask(...) & mask, and use attention(mask=...), or pass the mask as a bool tensor"
            )
        within = user if self.by_content else None
        if self.by_content and causal is not None:
            within = causal if user is None else user & causal
        pattern = self.for_inputs(query, key, scale=scale, key_mask=key_mask, within=within)
        return (pattern if user is None else pattern & user), bias


@register
class Dense(SparseMethod, patterns.Dense):
    """Every pair."""

    name = "dense"
    formula = "softmax(QK^T)V"
    paper = "Vaswani et al. 2017"
    complexity = "n^2 d"

    def _restricted(
        self, mask: BlockMask | Tensor | None, bias: Tensor | None, query: Tensor, key: Tensor, **_: Any
    ) -> tuple[BlockMask | Tensor | None, Tensor | None]:
        return mask, bias


@register
class Causal(SparseMethod, patterns.Causal):
    """Every pair of a query and itself or an earlier key."""

    name = "causal"
    formula = "softmax(QK^T)V over j <= i"
    paper = "Vaswani et al. 2017"
    complexity = "n^2 d / 2"


@register
class SlidingWindow(SparseMethod, patterns.SlidingWindow):
    """Keys at a limited distance to the left and right."""

    name = "sliding_window"
    formula = "softmax(QK^T)V over i - left <= j <= i + right"
    paper = "Beltagy et al. 2020"
    complexity = "n w d"


@register
class Dilated(SparseMethod, patterns.Dilated):
    """Every dilation-th key at a limited distance."""

    name = "dilated"
    formula = "softmax(QK^T)V over j = i + t dilation"
    paper = "Beltagy et al. 2020"
    complexity = "n w d dilation"


@register
class Strided(SparseMethod, patterns.Strided):
    """The last `stride` keys, and every stride-th before."""

    name = "strided"
    formula = "softmax(QK^T)V over i - j <= s or s | i - j"
    paper = "Child et al. 2019"
    complexity = "n^2 d"


@register
class Fixed(SparseMethod, patterns.Fixed):
    """One's own segment, and the keys that summarise every segment."""

    name = "fixed"
    formula = "softmax(QK^T)V over j <= i in i's segment, or at a segment's end"
    paper = "Child et al. 2019"
    complexity = "n (s + n c / s) d"


@register
class Longformer(SparseMethod, patterns.Longformer):
    """A window, and global tokens that see and are seen by all."""

    name = "longformer"
    formula = "softmax(QK^T)V over window + global tokens"
    paper = "Beltagy et al. 2020"
    complexity = "n (w + g) d"


@register
class BigBird(SparseMethod, patterns.BigBird):
    """Blocks: a window, global ones, and random ones."""

    name = "bigbird"
    formula = "softmax(QK^T)V over window + global + random blocks"
    paper = "Zaheer et al. 2020"
    complexity = "n b (w + g + r) d"


@register
class PrefixLM(SparseMethod, patterns.PrefixLM):
    """A prompt that is read in both directions, then causal."""

    name = "prefix_lm"
    formula = "softmax(QK^T)V over j < prefix or j <= i"
    paper = "Raffel et al. 2020"
    complexity = "n^2 d / 2"


@register
class Documents(SparseMethod, patterns.Documents):
    """Packed sequences that do not see each other."""

    name = "documents"
    formula = "softmax(QK^T)V over j in i's document"
    paper = "Krell et al. 2021"
    complexity = "n l d"


@register
class Neighborhood(SparseMethod, patterns.Neighborhood):
    """The nearest tokens of a line, an image or a video."""

    name = "neighborhood"
    formula = "softmax(QK^T)V over the k nearest along each axis, shifted at borders"
    paper = "Hassani et al. 2023"
    complexity = "n k^2 d"


@register
class Axial(SparseMethod, patterns.Axial):
    """One's own row and column of an image."""

    name = "axial"
    formula = "softmax(QK^T)V over i's row and column"
    paper = "Ho et al. 2019"
    complexity = "n (h + w) d"


@register
class TopKBlocks(SparseMethod, patterns.TopKBlocks):
    """The blocks of keys with the largest estimated scores, for each block of queries."""

    name = "topk_blocks"
    formula = "softmax(QK^T)V over the k blocks of largest mean(Q_I) mean(K_J)^T"
    paper = "Lu et al. 2025; Tang et al. 2024"
    complexity = "n k b d + (n / b)^2 d"


@register
class TopPBlocks(SparseMethod, patterns.TopPBlocks):
    """The fewest blocks of keys that are estimated to hold a share of the mass, for each block of queries."""

    name = "topp_blocks"
    formula = "softmax(QK^T)V over the fewest blocks of estimated mass p"
    paper = "Lin et al. 2025"
    complexity = "n k b d + (n / b)^2 d"


@register
class DeepSpeedFixed(SparseMethod, patterns.DeepSpeedFixed):
    """DeepSpeed's FixedSparsityConfig."""

    name = "deepspeed_fixed"
    formula = "softmax(QK^T)V over windows + a run of each, in blocks"
    paper = "DeepSpeed; Child et al. 2019"
    complexity = "n (w b + n g / w) d"


@register
class DeepSpeedVariable(SparseMethod, patterns.DeepSpeedVariable):
    """DeepSpeed's VariableSparsityConfig."""

    name = "deepspeed_variable"
    formula = "softmax(QK^T)V over given windows + given global + random blocks"
    paper = "DeepSpeed"
    complexity = "n b (w + g + r) d"


@register
class DeepSpeedBigBird(SparseMethod, patterns.DeepSpeedBigBird):
    """DeepSpeed's BigBirdSparsityConfig."""

    name = "deepspeed_bigbird"
    formula = "softmax(QK^T)V over window + global + random blocks"
    paper = "DeepSpeed; Zaheer et al. 2020"
    complexity = "n b (w + g + r) d"


@register
class DeepSpeedBSLongformer(SparseMethod, patterns.DeepSpeedBSLongformer):
    """DeepSpeed's BSLongformerSparsityConfig."""

    name = "deepspeed_bslongformer"
    formula = "softmax(QK^T)V over window + given global blocks"
    paper = "DeepSpeed; Beltagy et al. 2020"
    complexity = "n b (w + g) d"


@register
class DeepSpeedLocalSlidingWindow(SparseMethod, patterns.DeepSpeedLocalSlidingWindow):
    """DeepSpeed's LocalSlidingWindowSparsityConfig."""

    name = "deepspeed_local"
    formula = "softmax(QK^T)V over a window of blocks"
    paper = "DeepSpeed"
    complexity = "n b w d"


# --- of several patterns: no names of their own in specs, but & | and per_head(...) ----------------------------------


class _OfParts(SparseMethod):
    """A method with a field `parts`, which are methods too."""

    parts: tuple[patterns.Pattern, ...]

    def _methods(self) -> tuple[Any, ...]:
        return tuple(parse(part) if isinstance(part, patterns.Pattern) else part for part in self.parts)

    def to_json(self) -> str:
        parts = [json.loads(part.to_json()) for part in self.parts]
        return json.dumps({"method": self.name, **specs.options(self), "parts": parts})


@register_compound
class Combined(_OfParts, patterns.Combined):
    """Several sparse methods joined by & or |: `parse("bigbird:block=64 & causal")`."""

    name = "combined"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "parts", self._methods())

    def __str__(self) -> str:
        texts = (f"({part})" if isinstance(part, Combined) else str(part) for part in self.parts)
        return (" & " if self.operator == "and" else " | ").join(texts)


@register_compound
class PerHead(_OfParts, patterns.PerHead):
    """A sparse method for each head: `parse("per_head(sliding_window; strided:stride=64)")`."""

    name = "per_head"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "parts", self._methods())

    def __str__(self) -> str:
        return f"per_head({'; '.join(map(str, self.parts))})"
