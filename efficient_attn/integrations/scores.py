"""Eager attention, read while it is written: products of queries and keys that are never made.

A layer of another library writes

    scores = q @ k^T / sqrt(D) + mask;  weights = dropout(softmax(scores));  out = weights @ v

in PyTorch's operations. Inside a `ScoreMode` (score_mode.py) the first product is a `Scores`, which notes what becomes
of it (scales, biases, masks, views), softmax makes it a `Weights`, and the product with v is one call of attention.
What is none of this makes the scores after all, as the layer would have, so that a matrix product that is no attention
stays right.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import inputs
from ..biases import Bias
from ..errors import UnsupportedError
from ..methods import DENSE, Method
from ..methods.continuation import goes_by_positions
from . import huggingface
from .huggingface_masks import PairMask
from .layer_state import LAYER_METHOD
from .lazy import Lazy, made
from .torch_sdpa import only_hides

HIDES = -1e8  # what is filled into scores at or below this hides a pair


def letters(equation: str) -> tuple[str, str, str]:
    """The letters of two operands and of what comes out of an einsum."""
    given, _, out = equation.replace(" ", "").partition("->")
    left, _, right = given.partition(",")
    return left, right, out


@dataclass(eq=False)
class Scores(Lazy):
    """query @ key^T times a scale, plus terms; seen by the layer as (*lead, Nq, Nk).

    Attributes:
        query, key: (..., Nq, D) and (..., Nk, D), whose leading dimensions broadcast to `held`.
        lead: the leading dimensions as the layer sees them, after its views. held: as they are held.
        terms: what is added: tensors, PairMasks, biases by a few numbers; bool tensors, True = attend.
    """

    mode: Any
    query: Tensor
    key: Tensor
    lead: tuple[int, ...]
    held: tuple[int, ...] = ()
    scale: float = 1.0
    terms: tuple[Any, ...] = field(default=())

    def __post_init__(self) -> None:
        self.lead = tuple(self.lead)
        self.held = tuple(self.held) or self.lead

    def operate(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What a tensor's operation makes of the scores."""
        other = args[0] if args else next(iter(kwargs.values()), None)
        with self.mode.pause():
            if name in SAME:
                return self
            if name in VIEWS and (shape := self._viewed(args)) is not None:
                return self.stored(shape) if len(shape) > len(self.held) else replace(self, lead=shape)
            if name in ("mul", "rmul", "imul", "multiply", "div", "truediv", "itruediv", "divide", "true_divide"):
                factor: Any = other
                if "mul" not in name:
                    factor = None if other is None or not _is_factor(other) else 1.0 / other
                if _is_factor(factor) and "rounding_mode" not in kwargs:
                    return self.scaled(factor)
            if name in ("add", "radd", "iadd") and not kwargs and self._is_term(other):
                return self.plus(other)
            if name in ("sub", "isub") and isinstance(other, Tensor) and self._is_term(other):
                return self.plus(-other)
            if name in ("sub", "isub") and isinstance(other, (_RowConstant, int, float)):
                return self  # softmax is the same
            if name in ("amax", "max") and kwargs.get("dim", args[0] if args else None) in (-1, (-1,), self.dim() - 1):
                return _RowConstant()
            if name in ("max", "maximum", "clamp", "clamp_min", "clip") and _is_least(*args, **kwargs):
                return self
            if name == "masked_fill" and _hides(args[1] if len(args) > 1 else kwargs.get("value")):
                hidden = args[0] if args else kwargs["mask"]
                return self.plus(hidden if isinstance(hidden, PairMask) else ~hidden.bool())
            if name == "softmax":
                dim = args[0] if args else kwargs.get("dim")
                if dim in (-1, self.dim() - 1):
                    return Weights(self.mode, self, self.lead)
        return NotImplemented

    def chosen(self, condition: Any, kept: Any, other: Any) -> Any:
        """What torch.where makes of the scores: where it fills in what hides, a mask."""
        if isinstance(condition, Tensor) and kept is self and _hides(other):
            return self.plus(condition)
        if isinstance(condition, Tensor) and other is self and _hides(kept):
            return self.plus(~condition)
        return NotImplemented

    def scaled(self, factor: Any) -> Scores:
        """Times a number, or a tensor that is the same for all keys."""
        if isinstance(factor, (int, float)):
            terms = tuple(t if _only_a_mask(t) else _times(t, factor) for t in self.terms)
            return replace(self, scale=self.scale * factor, terms=terms)
        factor = self._as_held(factor) if factor.dim() else factor
        terms = tuple(t if _only_a_mask(t) else t * factor for t in self.terms)
        return replace(self, query=(self.query * factor).to(self.query.dtype), terms=terms)

    def plus(self, term: Any) -> Scores:
        if isinstance(term, (int, float)):
            return self
        if isinstance(term, Tensor):
            term = self._as_held(term)
        return replace(self, terms=(*self.terms, made(term)))

    def _is_term(self, other: Any) -> bool:
        if isinstance(other, (PairMask, Bias, Scores, int, float)):
            return not isinstance(other, Scores) or other.shape == self.shape
        if not isinstance(other, Tensor) or not other.is_floating_point():
            return False
        full = self.shape
        return other.dim() <= len(full) and all(
            a in (1, b) for a, b in zip(other.shape[::-1], full[::-1], strict=False)
        )

    def _viewed(self, args: Any) -> tuple[int, ...] | None:
        """The leading dimensions after a view that leaves queries and keys alone, or None."""
        shape = list(args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
        Nq, Nk = self.shape[-2:]
        total = math.prod(self.shape)
        if -1 in shape:
            known = -math.prod(shape)
            shape[shape.index(-1)] = total // known if known > 0 and total % known == 0 else 0
        if len(shape) < 3 or tuple(shape[-2:]) != (Nq, Nk) or math.prod(shape) != total:
            return None
        return tuple(shape[:-2])

    def stored(self, lead: tuple[int, ...]) -> Scores:
        """The same, held by other leading dimensions."""
        query, key = (_led(x, self.held, lead) for x in (self.query, self.key))
        terms = tuple(_led(t, self.held, lead) if isinstance(t, Tensor) else t for t in self.terms)
        return replace(self, query=query, key=key, lead=lead, held=lead, terms=terms)

    def _as_held(self, term: Tensor) -> Tensor:
        """A tensor that broadcasts to what the layer sees, as one that broadcasts to what is held."""
        term = term[(None,) * (len(self.lead) + 2 - term.dim())]
        return _led(term, self.lead, self.held)

    def attend(self, value: Tensor, dropout_p: float) -> tuple[Tensor, Tensor | None]:
        """The product of its softmax with value (..., Nk, Dv), (*lead, Nq, Dv), and weights (*lead, Nq, Nk) or None.

        Raises:
            UnsupportedError: what the method cannot serve.
        """
        mode, held = self.mode, self.held
        value = _led(value, self.lead, held) if value.shape[:-2] != self.key.shape[:-2] else value
        four = [_four(x, held) for x in (self.query, self.key, value)]
        query, key, value = inputs.autocast(*four)
        query, key = query.to(value.dtype), key.to(value.dtype)
        if key.shape[:2] != value.shape[:2] or key.shape[0] != query.shape[0] or query.shape[1] % key.shape[1]:
            full = (math.prod(held[:-1]), held[-1])
            query, key, value = (x.expand(*full, -1, -1) for x in (query, key, value))
        mask, bias = self._masks(query)
        Nq, Nk = query.shape[2], key.shape[2]
        method: Method = getattr(mode.layer, LAYER_METHOD, mode.method)
        if mode.cross:
            method = DENSE
        elif mode.cached and Nq != Nk and not isinstance(mask, PairMask) and goes_by_positions(method):
            raise UnsupportedError(
                f"{method} needs to know where {Nq} queries stand among {Nk} cached keys, which the mask of "
                f"{type(mode.layer).__qualname__} does not say; generate with use_cache=False, or dense"
            )
        mode.reached = True
        out, weights = huggingface.attend(
            method, mode.layer, query, key, value, mask, dropout=dropout_p, scaling=self.scale, is_causal=False,
            position_bias=bias, output_attentions=mode.weights,
        )  # fmt: skip
        out = out.transpose(1, 2).reshape(*self.lead, Nq, value.shape[-1])
        return out, None if weights is None else weights.reshape(*self.lead, Nq, Nk)

    def _masks(self, query: Tensor) -> tuple[Any, Any]:
        """The terms as a mask for `huggingface.attend`, and what else is added."""
        mask: Any = None
        biases: list[Any] = []
        for term in self.terms:
            if isinstance(term, Tensor):
                term = _four(term, self.held)
                keys_alone = term.shape[1] == term.shape[2] == 1
                fixed = term.is_floating_point() and not term.requires_grad
                if fixed and (keys_alone or not self.mode.method.accepts_bias):
                    term = only_hides(term)
            if isinstance(term, PairMask) or (isinstance(term, Tensor) and term.dtype == torch.bool):
                mask = term if mask is None else _both(mask, term)
            else:
                biases.append(term.to(query.dtype) if isinstance(term, Tensor) else term)
        tensors = [b for b in biases if isinstance(b, Tensor)]
        bias: Any = None
        for tensor in tensors:
            bias = tensor if bias is None else bias + tensor
        others = [b for b in biases if not isinstance(b, Tensor)]
        return mask, [*([] if bias is None else [bias]), *others] if others else bias

    def tensor(self) -> Tensor:
        """The scores, made."""
        with self.mode.pause():
            found = self.query @ self.key.transpose(-1, -2)
            found = found if self.scale == 1.0 else found * self.scale
            found = found.expand(*self.held, *found.shape[-2:])
            for term in self.terms:
                if isinstance(term, PairMask):
                    term = term.added(found.dtype)
                if isinstance(term, Bias):
                    raise UnsupportedError(f"{type(self.mode.layer).__qualname__} calculates with its position bias")
                hides = term.dtype == torch.bool
                found = found.masked_fill(~term, torch.finfo(found.dtype).min) if hides else found + term
            return found.reshape(self.shape)


SAME = frozenset({"to", "float", "type", "type_as", "contiguous", "half", "bfloat16", "double", "nan_to_num", "clone"})
VIEWS = frozenset({"view", "reshape"})


class _RowConstant:
    """A number for each row of scores: taken from all of them it changes no softmax."""

    def unsqueeze(self, dim: int) -> _RowConstant:
        return self

    def __getitem__(self, index: Any) -> _RowConstant:
        return self

    def detach(self) -> _RowConstant:
        return self


@dataclass(eq=False)
class Weights(Lazy):
    """The softmax of scores, after a dropout."""

    mode: Any
    scores: Scores
    lead: tuple[int, ...]
    dropout_p: float = 0.0
    returned: Tensor | None = None

    @property
    def query(self) -> Tensor:  # type: ignore[override]
        return self.scores.query

    @property
    def key(self) -> Tensor:  # type: ignore[override]
        return self.scores.key

    def operate(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """What a tensor's operation makes of the weights.

        Raises:
            UnsupportedError: anything but dropout, views and the product with values.
        """
        with self.mode.pause():
            if name in SAME or name == "detach":
                return self
            if name in VIEWS and (shape := self.scores._viewed(args)) is not None:
                scores = self.scores
                scores = scores.stored(shape) if len(shape) > len(scores.held) else replace(scores, lead=shape)
                return replace(self, scores=scores, lead=shape)
            if name in ("dropout", "dropout_"):
                p = args[0] if args else kwargs.get("p", 0.5)
                on = args[1] if len(args) > 1 else kwargs.get("training", True)
                return replace(self, dropout_p=float(p) if on else 0.0)
            if name == "masked_fill" and self._hidden_already(*args, **kwargs):
                return self
            if name in ("matmul", "bmm") and isinstance(args[0], Tensor):
                out, self.returned = self.scores.attend(args[0], self.dropout_p)
                return out
            if name == "einsum":
                return self._einsum(*args)
        raise UnsupportedError(
            f"{type(self.mode.layer).__qualname__} applies {name} to its attention weights, which efficient_attn does "
            "not make; use eager attention for it, or leave it out with convert(predicate=...)"
        )

    def _hidden_already(self, mask: Any = None, value: Any = None) -> bool:
        """Whether weights are set to 0 where scores were hidden."""
        if not isinstance(mask, Tensor) or float(value) != 0.0:
            return False
        shown = self.scores._as_held(~mask.bool())
        terms = [t for t in self.scores.terms if isinstance(t, Tensor) and t.dtype == torch.bool]
        return any(t.shape == shown.shape and torch.equal(t, shown) for t in terms)

    def _einsum(self, equation: str, value: Tensor) -> Tensor:
        left, right, out = letters(equation)
        batch, keys = left[:-2], left[-1]
        feature = [x for x in right if x not in left]
        if len(feature) != 1 or keys not in right or sorted(out) != sorted((*batch, left[-2], *feature)):
            raise UnsupportedError(f"{type(self.mode.layer).__qualname__} multiplies its weights by {equation}")
        rows = value.permute([right.index(x) for x in (*batch, keys, *feature)])
        found, self.returned = self.scores.attend(rows, self.dropout_p)
        made = (*batch, left[-2], *feature)
        return found.permute([made.index(x) for x in out])

    def tensor(self) -> Tensor:
        """The weights, made."""
        if self.returned is not None:
            return self.returned.reshape(self.shape)
        if not self.mode.method.is_dense:
            raise UnsupportedError(
                f"{type(self.mode.layer).__qualname__} returns weights that {self.mode.method} has not"
            )
        return self.scores.tensor().softmax(-1)


def returned(result: Any, wanted: bool) -> Any:
    """What a layer returned, with tensors in the place of what was never made; None for weights nobody asked for."""
    if isinstance(result, Weights):
        return result.tensor() if wanted else None
    if isinstance(result, Scores):
        return result.tensor()
    if isinstance(result, tuple) and type(result) is tuple:
        return tuple(returned(x, wanted) for x in result)
    return result


# --- operands ---


def _led(x: Tensor, lead: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """A tensor whose leading dimensions broadcast to `lead`, as one whose leading dimensions broadcast to `new`."""
    own = tuple(x.shape[:-2])
    own = (1,) * (len(lead) - len(own)) + own
    if lead == new:
        return x
    if all(n == 1 for n in own):
        return x.reshape(*(1 for _ in new), *x.shape[-2:])
    if own != lead:
        if own[0] == 1 and new[-1:] == lead[-1:] and own[-1] == lead[-1] == math.prod(own):
            return x.reshape(*(1 for _ in new[:-1]), new[-1], *x.shape[-2:])
        x = x.expand(*lead, *x.shape[-2:])
    return x.reshape(*new, *x.shape[-2:])


def _four(x: Tensor, held: tuple[int, ...]) -> Tensor:
    """(B, H, rows, columns) of what is held by any number of leading dimensions, the last of them heads."""
    x = x[(None,) * (len(held) + 2 - x.dim())]
    if len(held) == 1:
        return x[:, None]
    if len(held) == 2:
        return x
    return _led(x, held, (math.prod(held[:-1]), held[-1])) if x.shape[:-2] == held else _broad(x, held)


def _broad(x: Tensor, held: tuple[int, ...]) -> Tensor:
    if all(n == 1 for n in x.shape[:-3]):
        return x.reshape(1, *x.shape[-3:])
    return x.expand(*held[:-1], *x.shape[-3:]).flatten(0, -4)


def _both(mask: Any, other: Any) -> Any:
    """The pairs that two masks allow, where the queries stand in the sequence kept."""
    placed = next((m for m in (mask, other) if isinstance(m, PairMask) and m.start is not None), None)
    if placed is None:
        return mask & other
    found = placed & (other if placed is mask else mask)
    return dataclasses.replace(found, start=placed.start, offset=placed.offset, left=placed.left)


def _is_factor(x: Any) -> bool:
    if isinstance(x, Tensor):
        return x.is_floating_point() and (x.dim() == 0 or x.shape[-1] == 1)
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x != 0


def _only_a_mask(term: Any) -> bool:
    return isinstance(term, PairMask) or (isinstance(term, Tensor) and term.dtype == torch.bool)


def _times(term: Any, factor: float) -> Any:
    if isinstance(term, Bias):
        raise UnsupportedError(f"scores are scaled after a {type(term).__name__} was added")
    return term if factor == 1 else term * factor


def _hides(value: Any) -> bool:
    """Whether scores filled with a number hide pairs."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and (torch.compiler.is_compiling() or float(value) <= HIDES)
    return isinstance(value, (int, float)) and value <= HIDES


def _is_least(*args: Any, **kwargs: Any) -> bool:
    """Whether scores bounded below by this are what they were."""
    given = [x for x in (*args, *kwargs.values()) if x is not None]
    return len(given) == 1 and (not kwargs or "min" in kwargs or "other" in kwargs) and _hides(given[0])
