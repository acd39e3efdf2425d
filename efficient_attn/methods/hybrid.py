"""Hybrids `a+b`: a sparse method, exact, and a tail for the keys that it leaves out, under one softmax denominator.

`sliding_window:left=64,right=64+centroid:block=64`. The exact part is the pattern widened to whole blocks of `block`
tokens, an option of the tail; see `efficient_attn.hybrid.split`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import hybrid, specs
from ..defaults import default_scale
from ..errors import InputError, InputTypeError, UnsupportedError
from ..functional import (
    MaskLike,
    add_to_bias,
    attention_weights,
    check_dropout,
    check_key_mask,
    merge_attention,
    padded_attention,
    prepare_inputs,
    resolve_seed,
    select_keys,
)
from ..lowrank.common import drop_columns, drop_keys
from ..masks import BlockMask
from .base import JOIN, TAILS, Method, check_choice, check_range, from_json, parse, read_json, read_spec
from .lowrank import Performer, PerformerState
from .sparse import SparseMethod


class Tail:
    """The approximate part of a hybrid. Subclasses are frozen dataclasses, described like a `Method`."""

    name: ClassVar[str]
    formula: ClassVar[str]
    paper: ClassVar[str]
    complexity: ClassVar[str]
    exact: ClassVar[bool] = False
    accepts_causal: ClassVar[bool] = False
    accepts_mask: ClassVar[bool] = True
    primitive: ClassVar[str] = "attention"
    block: int

    __str__ = Method.__str__

    def build(self, head_dim: int, *, device: Any = None, dtype: torch.dtype | None = None) -> nn.Module | None:
        """The state that `branch` needs, or None."""
        return None

    def branch(self, query: Tensor, key: Tensor, value: Tensor, split: hybrid.Split, **call: Any) -> hybrid.Branch:
        """The tail's (out, lse). `call`: projection, key_mask, is_causal, scale, dropout_p, dropout_seed, backend."""
        raise NotImplementedError

    def weights(self, query: Tensor, key: Tensor, split: hybrid.Split, **call: Any) -> Tensor:
        """What multiplies the values in `branch`."""
        raise NotImplementedError

    def _check_block(self) -> None:
        check_range(self, "block", 16, 256)
        if self.block % 16:
            raise InputError(f"{self.name}: block must be a multiple of 16 from 16 to 256, got {self.block}")


def register_tail(cls: type[Tail]) -> type[Tail]:
    """Class decorator: make a tail known to `parse`, `from_json` and the table."""
    TAILS[cls.name] = cls
    return cls


@register_tail
@dataclass(frozen=True)
class CentroidTail(Tail):
    """Each block of keys by its mean key, mean value and count (see `hybrid.centroid_branch`).

    Fields:
        block: the size of a block.
        second_order: "none", or the variance of the scores within a block, "diagonal" or "full".
    """

    name = "centroid"
    formula = "sum over blocks c of n_c e^(q mean k_c) (mean v_c)"
    paper = "this package"
    complexity = "n w d + n^2 d / block"
    accepts_causal = True

    block: int = 64
    second_order: str = "none"

    def __post_init__(self) -> None:
        self._check_block()
        check_choice(self, "second_order", hybrid.SECOND_ORDER)

    def branch(self, query: Tensor, key: Tensor, value: Tensor, split: hybrid.Split, **call: Any) -> hybrid.Branch:
        del call["projection"], call["is_causal"]
        return hybrid.centroid_branch(query, key, value, split, second_order=self.second_order, **call)

    def weights(self, query: Tensor, key: Tensor, split: hybrid.Split, **call: Any) -> Tensor:
        del call["projection"], call["is_causal"]
        return hybrid.centroid_weights(query, key, split, second_order=self.second_order, **call)


class FeatureTail(Tail):
    """A tail that factorises the kernel. Dropout drops whole keys, as in the low-rank methods."""

    def branch(self, query: Tensor, key: Tensor, value: Tensor, split: hybrid.Split, **call: Any) -> hybrid.Branch:
        del call["backend"]
        value = drop_keys(value, call.pop("dropout_p"), call.pop("dropout_seed"))
        return self._branch(query, key, value, split, **call)

    def weights(self, query: Tensor, key: Tensor, split: hybrid.Split, **call: Any) -> Tensor:
        dropout_p, dropout_seed = call.pop("dropout_p"), call.pop("dropout_seed")
        return drop_columns(self._weights(query, key, split, **call), key.shape[1], dropout_p, dropout_seed)

    def _branch(self, query: Tensor, key: Tensor, value: Tensor, split: hybrid.Split, **call: Any) -> hybrid.Branch:
        raise NotImplementedError

    def _weights(self, query: Tensor, key: Tensor, split: hybrid.Split, **call: Any) -> Tensor:
        raise NotImplementedError


@register_tail
@dataclass(frozen=True)
class NystromTail(FeatureTail):
    """The kernel interpolated from landmarks (see `hybrid.nystrom_branch`). Not causal: landmarks mix positions.

    Fields:
        landmarks, pinv_iterations: as in `Nystrom`.
        block: queries and keys are exact or in the tail by whole blocks of this size.
    """

    name = "nystrom"
    formula = "e^(QK~^T) pinv(e^(Q~K~^T)) e^(Q~K^T) outside the window"
    paper = "this package, after Xiong et al. 2021"
    complexity = "n (w + m) d + n^2 m d / block^2"

    landmarks: int = 32
    pinv_iterations: int = 6
    block: int = 64

    def __post_init__(self) -> None:
        check_range(self, "landmarks", 1)
        check_range(self, "pinv_iterations", 1, 100)
        self._check_block()

    def _options(self, query: Tensor, key: Tensor, call: dict[str, Any]) -> dict[str, Any]:
        if call.pop("is_causal"):
            raise UnsupportedError(
                "a nystrom tail cannot be causal: its landmarks mix positions. Use +performer or +centroid"
            )
        del call["projection"]
        query_mask = call["key_mask"] if query.shape[2] == key.shape[2] else None
        return call | {
            "landmarks": self.landmarks,
            "pinv_iterations": self.pinv_iterations,
            "query_mask": query_mask,
        }

    def _branch(self, query: Tensor, key: Tensor, value: Tensor, split: hybrid.Split, **call: Any) -> hybrid.Branch:
        return hybrid.nystrom_branch(query, key, value, split, **self._options(query, key, call))

    def _weights(self, query: Tensor, key: Tensor, split: hybrid.Split, **call: Any) -> Tensor:
        return hybrid.nystrom_tail_weights(query, key, split, **self._options(query, key, call))


@register_tail
@dataclass(frozen=True)
class PerformerTail(FeatureTail):
    """Positive random features: with a sparse part, this is Scatterbrain (see `hybrid.performer_branch`).

    Fields:
        features, orthogonal, seed, redraw_interval: as in `Performer`.
        block: queries and keys are exact or in the tail by whole blocks of this size.
    """

    name = "performer"
    formula = "phi(Q) phi(K)^T outside the window"
    paper = "Chen et al. 2021 (Scatterbrain)"
    complexity = "n (w + m) d + n^2 m d / block^2"
    accepts_causal = True

    features: int = 256
    orthogonal: bool = True
    seed: int = 0
    redraw_interval: int = 0
    block: int = 64

    def __post_init__(self) -> None:
        self._performer()
        self._check_block()

    def _performer(self) -> Performer:
        return Performer(
            features=self.features,
            orthogonal=self.orthogonal,
            seed=self.seed,
            redraw_interval=self.redraw_interval,
        )

    def build(self, head_dim: int, *, device: Any = None, dtype: torch.dtype | None = None) -> nn.Module:
        return PerformerState(self._performer(), head_dim, device=device, dtype=dtype)

    def _branch(self, query: Tensor, key: Tensor, value: Tensor, split: hybrid.Split, **call: Any) -> hybrid.Branch:
        return hybrid.performer_branch(query, key, value, split, call.pop("projection"), **call)

    def _weights(self, query: Tensor, key: Tensor, split: hybrid.Split, **call: Any) -> Tensor:
        return hybrid.performer_tail_weights(query, key, split, call.pop("projection"), **call)


@dataclass(frozen=True)
class Hybrid(Method):
    """A sparse method and a tail in one softmax: `Hybrid(SlidingWindow(left=64, right=64), CentroidTail())`.

    Every allowed pair is counted once: exactly around the pattern, in whole blocks of `tail.block`, else by the tail.
    The pattern says what is exact, never what is hidden: pass is_causal, key_mask or mask for that. With a window of
    right=0 alone the future is in the tail.

    Fields:
        sparse: a sparse method that is a pattern of pairs, of positions or chosen by content.
        tail: `CentroidTail`, `NystromTail` or `PerformerTail`.
    """

    name = "hybrid"
    accepts_causal = True
    accepts_mask = True

    sparse: SparseMethod
    tail: Tail

    def __post_init__(self) -> None:
        if not isinstance(self.tail, Tail):
            raise InputTypeError(f"a hybrid ends with a tail, one of {', '.join(TAILS)}; got {self.tail!r}")
        if not isinstance(self.sparse, SparseMethod):
            raise InputError(
                f"a hybrid starts with a sparse method that is a pattern of pairs, got {self.sparse}; write for "
                f"instance sliding_window:left=64,right=64+{self.tail}"
            )

    def __str__(self) -> str:
        sparse = str(self.sparse)
        return f"({sparse})+{self.tail}" if " " in sparse else f"{sparse}+{self.tail}"

    def to_json(self) -> str:
        """The method with all its options as a JSON object, which `from_json` reads."""
        tail = {"method": self.tail.name, **specs.options(self.tail)}
        return json.dumps({"method": self.name, "sparse": json.loads(self.sparse.to_json()), "tail": tail})

    def build(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module | None:
        return self.tail.build(head_dim, device=device, dtype=dtype)

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
        if bias is not None:
            raise UnsupportedError(f"{self} cannot add a bias to the scores of its tail; use a sparse method or dense")
        query, key, value = prepare_inputs(query, key, value)
        check_key_mask(key_mask, key)
        check_dropout(dropout_p)
        scale = default_scale(scale, query.shape[-1])
        pairs: dict[str, Any] = {"mask": mask, "is_causal": is_causal, "causal_alignment": causal_alignment}
        split = hybrid.plan(self.sparse, query, key, self.tail.block, key_mask=key_mask, scale=scale, **pairs)
        projection = self._projection(state, counted=True)
        exact: dict[str, Any] = {"mask": split.exact, "scale": scale, "dropout_p": dropout_p}
        exact["dropout_seed"] = resolve_seed(dropout_seed) if dropout_p > 0.0 else None
        tail: dict[str, Any] = {"scale": scale, "projection": projection, "key_mask": key_mask, "is_causal": is_causal}
        tail |= {"dropout_p": dropout_p, "dropout_seed": exact["dropout_seed"]}
        if dropout_p > 0.0:
            tail["dropout_seed"] = exact["dropout_seed"] + 1  # the two branches drop independently
        near = padded_attention(query, key, value, key_mask, return_lse=True, backend=backend, **exact)
        far = self.tail.branch(query, key, value, split, backend=backend, **tail)
        out, lse = merge_attention((near[0], far.out), (near[1], far.lse))
        if not need_weights:
            return out, None
        key_bias = None
        if key_mask is not None:
            (key,) = select_keys(key_mask, key)
            key_bias = add_to_bias(None, key_mask, query)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        shares = [torch.exp(part - lse).unsqueeze(-1) for part in (near[1], far.lse)]
        weights = shares[0] * attention_weights(query, key, bias=key_bias, **exact)
        weights = weights + shares[1] * self.tail.weights(query, key, split, **tail)
        return out, weights.to(query.dtype)

    def branch_share(
        self,
        query: Tensor,
        key: Tensor,
        *,
        state: nn.Module | None = None,
        key_mask: Tensor | None = None,
        mask: MaskLike = None,
        is_causal: bool = False,
        causal_alignment: str | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """How much of each row's softmax mass the exact part and the tail carry, (B, Hq, Nq, 2); rows add up to 1.

        A row that sees no key has 0 and 0. O(N) memory. Arguments and errors as in `attend`.
        """
        query, key, _ = prepare_inputs(query, key, key)
        check_key_mask(key_mask, key)
        projection = self._projection(state, counted=False)
        scale = default_scale(scale, query.shape[-1])
        pairs: dict[str, Any] = {"mask": mask, "is_causal": is_causal, "causal_alignment": causal_alignment}
        split = hybrid.plan(self.sparse, query, key, self.tail.block, key_mask=key_mask, scale=scale, **pairs)
        value = torch.zeros_like(key[..., :1])
        _, near = padded_attention(
            query, key, value, key_mask, mask=split.exact, scale=scale, return_lse=True, backend=backend
        )
        call: dict[str, Any] = {"projection": projection, "key_mask": key_mask, "is_causal": is_causal, "scale": scale}
        far = self.tail.branch(query, key, value, split, dropout_p=0.0, dropout_seed=None, backend=backend, **call)
        lses = torch.stack([near, far.lse], -1)
        empty = (lses == -torch.inf).all(-1, keepdim=True)
        return torch.softmax(lses.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)

    def _projection(self, state: Any, *, counted: bool) -> Tensor | None:
        """The random features of the tail, if it has any; `counted` as a forward of training."""
        if not isinstance(self.tail, PerformerTail):
            return None
        if state is None:
            raise InputError(f"{self} needs state: pass what build(embed_dim, num_heads, head_dim) returned")
        projection: Tensor = state.current() if counted else state.projection
        return projection


def branch_share(query: Tensor, key: Tensor, method: str | Hybrid, **arguments: Any) -> Tensor:
    """`Hybrid.branch_share` for a spec: each row's softmax mass in the exact part and in the tail, (B, Hq, Nq, 2).

    Raises:
        InputError: a method that has no branches; and what `Hybrid.branch_share` raises.
    """
    found = parse(method)
    if not isinstance(found, Hybrid):
        raise InputError(f"{found} has one branch; branch_share is for hybrids such as {found}+centroid")
    return found.branch_share(query, key, **arguments)


def _from_spec(parts: list[str]) -> Hybrid:
    """Read the parts of `a+b`."""
    if len(parts) != 2:
        raise InputError(f"{'+'.join(parts)!r} joins {len(parts)} parts; a hybrid is one sparse method + one tail")
    sparse: Any = parse(parts[0])
    return Hybrid(sparse, read_spec(parts[1], TAILS))


def _from_json(given: Mapping[str, Any]) -> Hybrid:
    parts = given.get("sparse"), given.get("tail")
    if set(given) != {"method", "sparse", "tail"} or not all(
        isinstance(part, Mapping) and isinstance(part.get("method"), str) for part in parts
    ):
        raise InputError(
            'a hybrid in JSON is {"method": "hybrid", "sparse": {"method": ...}, "tail": {"method": ...}}; got '
            f"{dict(given)!r}"
        )
    sparse, tail = parts
    assert sparse is not None and tail is not None
    exact: Any = from_json(sparse)
    return Hybrid(exact, read_json(tail, TAILS))


JOIN["spec"], JOIN["json"] = _from_spec, _from_json
