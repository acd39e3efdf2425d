"""Linformer: keys and values mixed along the sequence (Wang et al., 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.call import accumulation_dtype
from ..errors import InputError, InputTypeError
from ..functional import attention, attention_weights
from ..inputs import check_key_mask, prepare_inputs, select_keys
from ..options import check_choice, check_range, register
from .base import MethodState, fill
from .lowrank import LowRankMethod, refuse_causal


def linformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    *,
    length_powers: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention over r learned mixtures of the keys and values: softmax(scale Q (E K)^T) (F V), O(N r (D + Dv)).

    Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020, eq. 7. Masked keys and values count as zero.
    A mixture holds keys of every position, so there is no causal Linformer, no mask of pairs, and no bias.

    Args:
        query, key, value, scale, dropout_p, dropout_seed: as in `attention`; dropout acts on the (Nq, r) weights.
        key_projection: E, (r, max_len), or (Hkv, r, max_len) with own mixtures for each head; Nk <= max_len. Shorter
            sequences use the first Nk columns.
        value_projection: F, like E.
        length_powers: (2,), a and b: of n keys that are not masked, mixed keys are multiplied by (max_len / n)^a and
            mixed values by (max_len / n)^b. None: by nothing, as in the paper, where n is max_len.
        key_mask: see `efficient_attn.methods.lowrank`.

    Returns:
        out (B, Hq, Nq, Dv). Differentiable in every tensor.

    Raises:
        UnsupportedError: is_causal. InputError, InputTypeError: arguments that do not belong together.
    """
    query, key, value = prepare_inputs(query, key, value)
    check_key_mask(key_mask, key)
    if is_causal:
        refuse_causal("Linformer", "each of its r keys mixes all positions")
    E = sequence_projection("key_projection", key_projection, key)
    F_ = sequence_projection("value_projection", value_projection, value)
    if E.shape[-2] != F_.shape[-2]:
        raise InputError(f"key_projection has rank {E.shape[-2]}, value_projection {F_.shape[-2]}; they must be equal")
    grow_key, grow_value = length_factors(length_powers, key_projection, key, key_mask)
    key, value = select_keys(key_mask, key, value)
    return attention(
        query,
        _mixed(E, key) * grow_key,
        _mixed(F_, value) * grow_value,
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        backend=backend,
    )


def linformer_weights(
    query: Tensor,
    key: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    *,
    length_powers: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
) -> Tensor:
    """What multiplies the values in `linformer_attention`: softmax(scale Q (E K)^T) F, (B, Hq, Nq, Nk), any sign."""
    query, key, _ = prepare_inputs(query, key, key)
    check_key_mask(key_mask, key)
    if is_causal:
        refuse_causal("Linformer", "each of its r keys mixes all positions")
    E = sequence_projection("key_projection", key_projection, key)
    F_ = sequence_projection("value_projection", value_projection, key)
    grow_key, grow_value = length_factors(length_powers, key_projection, key, key_mask)
    (key,) = select_keys(key_mask, key)
    mixed = E @ key * grow_key
    weights = attention_weights(query, mixed, scale=scale, dropout_p=dropout_p, dropout_seed=dropout_seed) * grow_value
    weights = weights @ (F_ if F_.dim() == 2 else F_.repeat_interleave(query.shape[1] // max(key.shape[1], 1), 0))
    return weights if key_mask is None else weights.masked_fill(~key_mask[:, None, None, :], 0.0)


def _mixed(projection: Tensor, x: Tensor) -> Tensor:
    """(r, N) or (H, r, N) times (B, H, N, D): contiguous (B, H, r, D)."""
    if projection.dim() == 3:
        return (projection @ x).contiguous()
    # One product for all heads, in the layout that a module's projections have: there nothing is copied.
    B, H, N, D = x.shape
    mixed = projection @ x.permute(2, 0, 1, 3).reshape(N, B * H * D)
    return mixed.view(projection.shape[0], B, H, D).permute(1, 2, 0, 3).contiguous()


def length_factors(
    powers: Tensor | None, projection: Tensor, key: Tensor, key_mask: Tensor | None
) -> tuple[Tensor | float, Tensor | float]:
    """What keeps the size of mixed keys and values where fewer than max_len are mixed, to broadcast to (B, H, r, D).

    key: (B, Hkv, Nk, D), of which only shape, dtype and device count.
    """
    if powers is None:
        return 1.0, 1.0
    dtype = accumulation_dtype(key.dtype)
    there = torch.full((1,), key.shape[2], device=key.device) if key_mask is None else key_mask.sum(1)
    ratio = projection.shape[-1] / there.clamp(min=1).to(dtype)[:, None, None, None]
    of_key, of_value = powers.to(device=key.device, dtype=dtype)
    return (ratio**of_key).to(key.dtype), (ratio**of_value).to(key.dtype)


def sequence_projection(name: str, projection: Any, tensor: Tensor) -> Tensor:
    """The first Nk columns of E or F, in the dtype of the tensor that it mixes."""
    if not isinstance(projection, Tensor) or not projection.is_floating_point():
        raise InputTypeError(f"{name} must be a floating-point tensor, got {type(projection).__name__}")
    heads, length = tensor.shape[1:3]
    if projection.dim() not in (2, 3) or projection.shape[:-2] not in ((), (heads,)) or projection.shape[-2] < 1:
        raise InputError(
            f"{name} must be (rank, max_len) or (Hkv, rank, max_len) with Hkv={heads}, got {tuple(projection.shape)}"
        )
    if projection.shape[-1] < length:
        raise InputError(
            f"{length} keys do not fit {name} {tuple(projection.shape)}: Linformer is built for max_len="
            f"{projection.shape[-1]} keys. Build it with max_len >= {length}"
        )
    return projection[..., :length].to(tensor.dtype)


class LinformerState(MethodState):
    """E and F of a Linformer: (rank, max_len), or (Hkv, rank, max_len) with share="none".

    `length_powers` is saved beside them: a checkpoint from before it existed loads with (0, 0), and computes as then.
    """

    length_powers: Tensor
    key_projection: nn.Parameter
    value_projection: nn.Parameter | None

    def __init__(
        self, method: Linformer, num_heads: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.method = method
        heads = (num_heads,) if method.share == "none" else ()
        empty = torch.empty(*heads, method.rank, method.max_len, device=device, dtype=dtype)
        self.key_projection = nn.Parameter(empty)
        if method.share in ("kv", "layerwise"):
            self.register_parameter("value_projection", None)
        else:
            self.value_projection = nn.Parameter(torch.empty_like(empty))
        self.register_buffer("length_powers", torch.zeros(2, device=device, dtype=dtype))
        self.reset_parameters()

    def value(self) -> Tensor:
        """F, which is E with share="kv" and "layerwise"."""
        return self.key_projection if self.value_projection is None else self.value_projection

    def reset_parameters(self) -> None:
        """Start again as the method's `init` says."""
        generator = torch.Generator().manual_seed(self.method.seed)
        rank, max_len = self.method.rank, self.method.max_len
        cpu = torch.device("cpu")  # whatever the default device: what is drawn is the same everywhere
        segment = torch.arange(max_len, device=cpu) * rank // max_len == torch.arange(rank, device=cpu)[:, None]
        for parameter in self.parameters():
            if self.method.init == "pool":
                initial = segment / segment.sum(-1, keepdim=True)
            else:
                initial = torch.randn(parameter.shape, generator=generator, device=cpu) * max_len**-0.5
            fill(parameter, initial)
        # Means become sums of fewer terms, of which the other mixtures, empty ones, take a share of the softmax; of
        # random mixtures the variance falls, of keys and values alike.
        fill(self.length_powers, torch.tensor((0.0, 1.0) if self.method.init == "pool" else (0.5, 0.5), device=cpu))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        if f"{prefix}key_projection" in state_dict:
            state_dict.setdefault(f"{prefix}length_powers", torch.zeros_like(self.length_powers, device="cpu"))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@register
@dataclass(frozen=True)
class Linformer(LowRankMethod):
    """Keys and values mixed down to `rank` by learned matrices (see `linformer_attention`).

    Fields:
        rank: r, the number of mixtures.
        max_len: the longest sequence of keys; E and F have rank x max_len numbers each, and N keys use the first N of
            their columns. What is mixed of fewer keys is scaled up (`length_powers` of the state), so that an untrained
            layer keeps the size of its output. Still choose it near the lengths that you have: with init=pool, N keys
            begin with about rank N / max_len of the mixtures, the others empty.
        share: "headwise": E and F for all heads; "kv": one matrix for keys, values and all heads; "layerwise": that one
            for all layers too (`replace_attention` shares it); "none": own E and F for each head of
            the keys.
        init: "pool" starts as means over max_len / rank consecutive positions: attention at a lower resolution;
            "normal" as random mixtures of N(0, 1 / max_len), which keep the scale of the keys.
        seed: of "normal".
    """

    name = "linformer"
    formula = "softmax(Q(EK)^T)(FV), E and F learned"
    paper = "Wang et al. 2020"
    complexity = "n r d"
    _attention = staticmethod(linformer_attention)
    _weights = staticmethod(linformer_weights)

    rank: int = 64
    max_len: int = 512
    share: str = "headwise"
    init: str = "pool"
    seed: int = 0

    def check(self) -> None:
        check_range(self, "rank", 1)
        check_range(self, "max_len", 1)
        check_range(self, "seed", 0, 2**62)
        check_choice(self, "share", ("headwise", "kv", "layerwise", "none"))
        check_choice(self, "init", ("pool", "normal"))
        if self.rank > self.max_len:
            raise InputError(
                f"linformer: rank={self.rank} exceeds max_len={self.max_len}; lower the rank or raise max_len"
            )

    @property
    def counts_positions(self) -> bool:
        return True

    @property
    def shares_state(self) -> bool:
        return self.share == "layerwise"

    def build(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        return LinformerState(self, num_heads, device=device, dtype=dtype)

    def _options(self, state: Any, query: Tensor, key: Tensor, key_mask: Tensor | None) -> Mapping[str, Any]:
        powers = getattr(state, "length_powers", None)  # not in what was pickled before there was any
        return {"key_projection": state.key_projection, "value_projection": state.value(), "length_powers": powers}
