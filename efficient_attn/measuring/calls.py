"""Methods as calls of no arguments: bound to what a layer attends to, with the mask that they plan and their error."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import inputs, methods
from ..defaults import alignment_offset, default_scale
from ..masks import BlockMask
from ..methods.continuation import continuation
from ..methods.hybrid import plan

ERROR_ROWS = 256  # queries, spread evenly, over which an error is taken
WARM_UP_LENGTH = 256
UNPLANNED = ("dense", "lsh", "sorted_buckets")  # no mask, or one of sorted tokens, made anew in every call

Call = Callable[[], object]
Operator = Callable[[Tensor, Tensor, Tensor], Tensor]


def sized(spec: str, length: int) -> methods.Method:
    """The method of a spec; learned projections over positions (Linformer's) are made as long as the sequence."""
    method: Any = methods.parse(spec)
    resized: methods.Method = dataclasses.replace(method, max_len=length) if hasattr(method, "max_len") else method
    return resized


def shaped(method: methods.Method, length: int) -> methods.Method:
    """The method for so many tokens; an image that is no square becomes the rectangle nearest to one."""
    pattern: Any = getattr(method, "pattern", None)
    if getattr(pattern, "size", 0) is not None or getattr(pattern, "axes", 2) != 2 or math.isqrt(length) ** 2 == length:
        return method
    height = next(h for h in range(math.isqrt(length), 0, -1) if length % h == 0)
    return methods.Sparse(dataclasses.replace(pattern, size=(height, length // height)))


def binder(
    mode: str,
    qkv: Sequence[Tensor],
    state: nn.Module | None = None,
    more: Sequence[Tensor] = (),
    grad_out: Tensor | None = None,
) -> Callable[[Operator], Call]:
    """Bind an operator to its inputs: a call of no arguments.

    Args:
        mode: fwd or decode (forward without gradients), fwd_bwd, or bwd: the backward alone, on a graph that is kept.
        qkv: query, key and value.
        state: a module whose parameters are differentiated too.
        more: other tensors that are.
        grad_out: the gradient of the output; by default the query, rolled, as structured as the inputs.
    """
    if mode in ("fwd", "decode"):
        return lambda operator: torch.no_grad()(lambda: operator(*qkv))
    leaves = [t.detach().clone().requires_grad_() for t in qkv]
    parameters = [] if state is None else [p for p in state.parameters() if p.requires_grad]
    wanted = [*leaves, *parameters, *more]
    gradient = qkv[0].roll(1, dims=2) if grad_out is None else grad_out

    def bound(operator: Operator) -> Call:
        if mode == "fwd_bwd":
            return lambda: torch.autograd.grad(operator(*leaves), wanted, gradient, allow_unused=True)
        out = operator(*leaves)
        return lambda: torch.autograd.grad(out, wanted, gradient, retain_graph=True, allow_unused=True)

    return bound


@dataclass
class Layer:
    """What one layer attends to: query (B, Hq, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv), and which pairs
    count: causality (with its alignment), padding (B, Nk) and a mask of pairs."""

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool = False
    causal_alignment: str | None = None
    key_mask: Tensor | None = None
    mask: BlockMask | None = None
    scale: float | None = None

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of `Method.attend`."""
        names = ("is_causal", "causal_alignment", "scale", "key_mask", "mask")
        return {name: getattr(self, name) for name in names}

    def first(self, length: int) -> Layer | None:
        """Its first tokens, where a shorter piece means the same: without padding and mask."""
        if self.key_mask is not None or self.mask is not None:
            return None
        query, key, value = (t[:, :, :length] for t in self.qkv)
        return dataclasses.replace(self, query=query, key=key, value=value)

    def grad_out(self) -> Tensor:
        """A gradient of the output's shape, as structured as the values."""
        group = self.query.shape[1] // self.value.shape[1]
        rows = torch.arange(self.query.shape[2]) % self.value.shape[2]
        return self.value.detach().repeat_interleave(group, dim=1)[:, :, rows].roll(1, dims=2).contiguous()


class Bound:
    """A method bound to a layer, as a call of no arguments.

    Args:
        spec: of the method, which is made as long and as wide as the layer.
        layer: what it attends to.
        mode: see `binder`; "decode" places the layer's queries at the end of the keys.
        more: further keywords of `Method.attend`, such as the backend.
    """

    def __init__(self, spec: str, layer: Layer, mode: str, **more: Any) -> None:
        self.layer, self.mode, self.more = layer, mode, more
        heads, _, head_dim = layer.query.shape[1:]
        self._sized = sized(spec, layer.key.shape[2])
        self.method = shaped(self._sized, layer.key.shape[2])
        self.state: nn.Module | None = self.method.build(
            heads * head_dim, layer.key.shape[1], head_dim, dtype=layer.query.dtype
        )
        self._inputs = self._bound_inputs(layer)

    def _bound_inputs(self, layer: Layer) -> Callable[[Operator], Call]:
        grad_out = layer.grad_out() if self.mode == "fwd_bwd" else None
        return binder(self.mode, layer.qkv, self.state, grad_out=grad_out)

    def operator(self, layer: Layer) -> Operator:
        """The method as a function of query, key and value."""
        method, options = shaped(self._sized, layer.key.shape[2]), layer.options | self.more
        if self.mode == "decode":
            method, mask = self._at_the_end(layer)
            options |= {"mask": mask}

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = method.attend(query, key, value, state=self.state, **options)[0]
            return out

        return attend

    def _at_the_end(self, layer: Layer) -> tuple[methods.Method, BlockMask | None]:
        (_, heads, q_len, _), kv_len = layer.query.shape, layer.key.shape[2]
        device = layer.query.device
        return continuation(self.method, q_len, kv_len, num_heads=heads, first=kv_len - q_len, device=device)

    @cached_property
    def _call(self) -> Call:
        return self._inputs(self.operator(self.layer))

    def __call__(self) -> object:
        return self._call()

    def warm_up(self) -> None:
        """Run on a short piece: thread pools, code pages and caches of the library are not a call's memory."""
        short = self.layer.first(WARM_UP_LENGTH)
        if short is not None:
            self._bound_inputs(short)(self.operator(short))()

    @torch.no_grad()
    def error(self, exact: Layer | None = None) -> float:
        """The `relative_error` of the output, to dense attention on `exact` where that is another layer."""
        return relative_error(self.operator(self.layer)(*self.layer.qkv), exact or self.layer)

    def plan_masks(self) -> list[BlockMask]:
        """The masks that the method makes before it attends, that of the exact pairs first."""
        if self.mode == "decode":
            mask = self._at_the_end(self.layer)[1]
            return [] if mask is None else [mask]
        return planned(self.method, self.layer)

    def plan(self) -> dict[str, Any]:
        """Make the masks, which a later call finds made: `plan_ms`, `density`, `mask_bytes`; empty without masks."""
        started = time.perf_counter()
        masks = self.plan_masks()
        if not masks:
            return {}
        spent = (time.perf_counter() - started) * 1e3
        bytes_of_all = sum(mask.nbytes for mask in masks)
        return {"plan_ms": round(spent, 4), "density": round(masks[0].density, 6), "mask_bytes": bytes_of_all}


def planned(method: methods.Method, layer: Layer) -> list[BlockMask]:
    """The masks that a method makes before it attends, that of the exact pairs first."""
    options = layer.options
    if isinstance(method, methods.Hybrid):
        split = plan(method.sparse.pattern, layer.query, layer.key, method.tail.block, **options)
        return [split.exact, split.over_blocks]
    if not isinstance(method, methods.Sparse) or method.name in UNPLANNED:
        return []
    pattern = method.pattern.aligned(options["causal_alignment"])
    causal = inputs.causal_mask(
        layer.query.shape[2], layer.key.shape[2], options["is_causal"], options["causal_alignment"]
    )
    within = causal if pattern.by_content else None
    found = pattern.for_inputs(
        layer.query, layer.key, scale=options["scale"], key_mask=options["key_mask"], within=within
    )
    return [found if causal is None else found & causal]


def relative_error(out: Tensor, layer: Layer) -> float:
    """|out - exact| / |exact| (Frobenius) over `ERROR_ROWS` queries, exact being dense attention in float64.

    In self-attention queries that are padding count no more than their keys.
    """
    length = layer.query.shape[2]
    rows = torch.linspace(0, length - 1, min(length, ERROR_ROWS)).round().long()
    visible = _visible(layer, rows)
    group = layer.query.shape[1] // layer.key.shape[1]
    scale = default_scale(layer.scale, layer.query.shape[-1])
    difference = norm = 0.0
    for b, h in itertools.product(*map(range, layer.query.shape[:2])):  # one head at a time: rows x keys in float64
        value = layer.value[b, h // group].double()
        scores = layer.query[b, h, rows].double() @ layer.key[b, h // group].double().mT * scale
        if visible is not None:
            scores = scores.masked_fill(~visible[b % visible.shape[0], h % visible.shape[1]], -torch.inf)
        if layer.key_mask is not None:
            scores = scores.masked_fill(~layer.key_mask[b], -torch.inf)
            value = value.masked_fill(~layer.key_mask[b, :, None], 0.0)
        exact = scores.softmax(dim=-1).nan_to_num(0.0) @ value  # a row without keys is 0
        counts = slice(None) if layer.key_mask is None or length != layer.key.shape[2] else layer.key_mask[b, rows]
        difference += (out[b, h, rows].double() - exact)[counts].square().sum().item()
        norm += exact[counts].square().sum().item()
    return float(f"{(difference / norm) ** 0.5:.3g}") if norm else float(difference > 0)


def _visible(layer: Layer, rows: Tensor) -> Tensor | None:
    """The pairs of some queries that causality and mask allow, bool (1 | B, 1 | Hq, rows, Nk); None: all."""
    length, kv_len = layer.query.shape[2], layer.key.shape[2]
    visible = None
    if layer.is_causal:
        offset = alignment_offset(layer.causal_alignment, length, kv_len)
        visible = (torch.arange(kv_len) <= rows[:, None] + offset)[None, None]
    if layer.mask is not None:
        drawn = layer.mask.to_dense()[:, :, rows]
        visible = drawn if visible is None else drawn & visible
    return visible
