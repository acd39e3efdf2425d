"""`MultiheadAttention`: torch.nn.MultiheadAttention with a choice of attention and of what else is done to scores.

It is a subclass, with its parent's constructor, parameters, initialisation, `state_dict` and call; new keywords are
`attention=`, `softcap=`, `sinks=` and `position_bias=`. The parent's projections surround one call of `Method.attend`:

    query, key, value --projections--> heads (N, H, L, D) --self.attention.attend--> heads --out_proj--> output

Where it differs from its parent, on purpose:

* A query that may see no key gives 0 (and weights 0) on every path; the parent gives NaN on some.
* Nested tensors are accepted wherever dense ones are, in training too, strided and jagged.
* In eval mode it keeps running its own attention. Otherwise `nn.TransformerEncoderLayer` would not call this
  module but run dense attention on its weights; a forward pre-hook that does nothing is the documented way out.

Letters: N batch, L queries, S keys, E embed_dim, H heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from .. import sharding
from ..biases import Bias, BiasLike, PositionBias, join
from ..errors import InputError, UnsupportedError
from ..handover import clone, hides_forward
from ..inputs import MAX_HEAD_DIM, check_softcap, resolve_seed
from ..methods import DENSE, Method, parse
from ..methods.base import keep_state
from ..methods.left_padding import attend_from_first
from ..patterns import Pattern
from ..self_attention import self_attention
from ..tracing import is_onnx_export
from .foreign import is_more_than_linear, record_as_leaf, why_foreign
from .masks import check_mask_dtype, fits, read_masks
from .nested import forward_nested
from .projections import append_columns, merge_heads, project_to_heads

_functional: Any = F  # the parent's own checks, private there, so that errors are the parent's too
TorchMultiheadAttention = nn.MultiheadAttention  # bound once: a patched torch.nn must not change our parent


def keep_own_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A forward pre-hook that does nothing: its presence keeps nn.TransformerEncoderLayer from bypassing `forward`."""


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose attention is chosen by name: dense, sparse or low-rank.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            `torch.nn.MultiheadAttention`; the same seed gives the same parameters.
        attention: a spec string such as "bigbird:block=64,window=3", a `Method` such as `Nystrom(landmarks=64)`, or a
            `Pattern` such as `SlidingWindow(left=64, right=0)`.
        method_state: another module's `method_state` to use instead of a new one: the same parameters in both, as tied
            weights are, in `state_dict` under both names. For methods that share them between layers
            (linformer:share=layerwise), which `replace_attention` does by itself.
        softcap: None or c > 0: scores x become c tanh(x / c), as in `attention`.
        sinks: learn a logit for each head that stands beside those of the keys and has no value; from 0 on.
        position_bias: what is added to scores in O(n) memory: an `ALiBi`, `RelativeBias`, `T5Bias` or another such, or
            a `PositionBias` that holds one; one that several modules hold is the same parameters in all of them.

    Raises:
        InputError: a method_state that does not belong to this method, a softcap that is none.
        UnsupportedError: a softcap, sinks or a position bias with a method that knows none (low rank, hybrids).

    Attributes:
        attention: the `Method`. To change it, use `replace_attention` or `from_torch`.
        dense_across: whether queries that are not as many as the keys get dense attention: cross-attention and learned
            queries have no place in the keys' sequence, of which a method could mean anything. `replace_attention`
            sets it, which cannot know how a module will be called; a module that is made with a method has it False.
        method_state: the method's own parameters (Linformer's projections ...), None for a method without any. They
            appear in `state_dict` under "method_state."; a checkpoint that has none of them still loads strictly.
        softcap: the cap or None; sinks: a parameter (H) or None; position_bias: a `PositionBias` or None. `state_dict`
            has "sinks" and "position_bias.".
    """

    attention: Method
    dense_across: bool = False
    method_state: nn.Module | None
    softcap: float | None
    sinks: nn.Parameter | None
    position_bias: PositionBias | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        attention: str | Method | Pattern = "dense",
        method_state: nn.Module | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        position_bias: Bias | PositionBias | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        check_softcap(softcap)
        if isinstance(position_bias, Bias):
            position_bias = PositionBias(position_bias).to(device=device, dtype=dtype)
        learned = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype)) if sinks else None
        self._set_modifiers(softcap, learned, position_bias)
        self._set_method(parse(attention), method_state)

    @classmethod
    def from_torch(
        cls,
        module: nn.MultiheadAttention,
        attention: str | Method | Pattern = "dense",
        *,
        method_state: nn.Module | None = None,
    ) -> MultiheadAttention:
        """Return a module that computes `attention` with `module`'s parameters: the same Parameter objects, no copies.

        Everything else that `module` carries comes along: mode, hooks, attributes set by other code, and of a module of
        ours its softcap, sinks and position bias. `method_state` is that of the constructor.

        Raises:
            InputError: a method_state that does not belong to this method.
            UnsupportedError: `module` is of a subclass, whose own computation would be lost, or does to scores what the
                method does not know.
        """
        method = parse(attention)
        check_replaceable("the module", module)
        ours: MultiheadAttention = clone(module, cls)
        ours._modules.pop("method_state", None)
        if not isinstance(module, MultiheadAttention):
            ours._set_modifiers(None, None, None)
        ours._set_method(method, method_state)
        return ours

    def to_torch(self) -> nn.MultiheadAttention:
        """Return a plain torch.nn.MultiheadAttention on the same Parameter objects, for tools that check for that type.

        It computes dense attention whatever `self.attention` is; the method's own parameters stay behind.

        Raises:
            UnsupportedError: a softcap, sinks or a position bias, which it would leave out.
        """
        self._refuse_modifiers("torch.nn.MultiheadAttention, which would leave it out")
        plain: nn.MultiheadAttention = clone(self, TorchMultiheadAttention)
        plain.__dict__.pop("attention")
        for name in ("method_state", "softcap", "position_bias"):
            plain.__dict__.pop(name, None)
        plain._parameters.pop("sinks", None)
        plain._modules.pop("method_state", None)
        for key, hook in list(plain._forward_pre_hooks.items()):
            if hook is keep_own_forward:
                del plain._forward_pre_hooks[key]
        return plain

    def _set_method(self, method: Method, state: nn.Module | None = None) -> None:
        if (self.bias_k is not None or self.add_zero_attn) and not method.is_dense:
            raise UnsupportedError(
                f"attention={str(method)!r} depends on the positions of keys, and the keys that add_bias_kv and "
                "add_zero_attn append have none; use attention='dense', or neither of the two"
            )
        if not method.accepts_modifiers:
            self._refuse_modifiers(f"attention={str(method)!r}; dense and sparse methods serve it")
        weight = self.out_proj.weight
        sizes = (self.embed_dim, self.num_heads, self.head_dim)
        if state is None:
            state = method.build(*sizes, device=weight.device, dtype=weight.dtype)
        else:
            _check_state(method, state, method.build(*sizes, device="meta"), weight.device)
        self.attention = method
        self.method_state = None if state is None else state.train(self.training)
        self._guard_own_forward()

    def _set_modifiers(
        self, softcap: float | None, sinks: nn.Parameter | None, position_bias: PositionBias | None
    ) -> None:
        if position_bias is not None and (self.bias_k is not None or self.add_zero_attn):
            raise UnsupportedError(
                "position_bias goes by the positions of keys, and the keys that add_bias_kv and add_zero_attn append "
                "have none; leave one of them out"
            )
        self.softcap = softcap
        self.register_parameter("sinks", sinks)
        self.position_bias = position_bias

    def _refuse_modifiers(self, whom: str) -> None:
        """Raise UnsupportedError where something is done to scores that `whom` does not know."""
        has = {"softcap": self.softcap, "sinks": self.sinks, "position_bias": self.position_bias}
        found = [name for name, given in has.items() if given is not None]
        if found:
            raise UnsupportedError(f"{' and '.join(found)} of this module cannot be served by {whom}")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as `torch.nn.MultiheadAttention.forward` does.

        Args:
            query: (L, N, E), or (N, L, E) with batch_first, or (L, E) unbatched, or a nested tensor of N x (L_n, E).
            key: (S, N, kdim), laid out like query.
            value: (S, N, vdim), laid out like query.
            key_padding_mask: (N, S) or (S,): bool with True for keys to leave out, or float to add to the scores.
            need_weights: also return the weights of this method, an L x S request; with dropout, the dropped ones.
            attn_mask: (L, S) or (N*H, L, S): bool with True for pairs to leave out, or float to add to the scores.
            average_attn_weights: average the weights over the heads.
            is_causal: a promise that attn_mask, which must be given, is the causal mask. As in the parent, it takes the
                mask's place when neither weights nor key_padding_mask are in play; a method that knows causality but no
                masks always goes by it.

        Returns:
            (output like query with E features, weights or None); weights (N, L, S), per head (N, H, L, S), without N
            for unbatched input. S grows by one for each of add_bias_kv and add_zero_attn.

        Raises:
            AssertionError, RuntimeError: the parent's own errors for what the parent refuses.
            UnsupportedError: what this method, or any but dense attention, cannot do.
        """
        if isinstance(query, Proxy) or isinstance(key, Proxy) or isinstance(value, Proxy):
            return record_as_leaf(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if query is key and key is value and key_padding_mask is None and attn_mask is None and not is_causal:
            found = self._in_one_step(query, need_weights, average_attn_weights)
            if found is not None:
                return found
        if query.is_nested or key.is_nested or value.is_nested:
            if key_padding_mask is not None or attn_mask is not None or is_causal:
                raise UnsupportedError(
                    "a nested tensor carries its own lengths, and key_padding_mask, attn_mask and is_causal cannot be "
                    "combined with it; pad it (to_padded_tensor) to use masks, or build nn.TransformerEncoder with "
                    "enable_nested_tensor=False"
                )
            return forward_nested(self, query, key, value, need_weights, average_attn_weights)
        foreign = why_foreign(self, query, key, value)
        if foreign is not None:
            if not self.attention.is_dense:
                raise UnsupportedError(
                    f"attention={str(self.attention)!r} cannot run with {foreign}; only dense attention can be left to "
                    "PyTorch. Use attention='dense', or to_torch() for a dense module on the same parameters"
                )
            self._refuse_modifiers(f"PyTorch's own module, which alone can run with {foreign}")
            if is_onnx_export():
                value = value[:]  # keeps the parent off its fast path, which no exporter knows
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        check_mask_dtype("key_padding_mask", key_padding_mask, "attn_mask", attn_mask)
        check_mask_dtype("attn_mask", attn_mask)
        # Inside context_parallel a mask is that of the whole sequence, which attention() knows the sizes of.
        own_mask = attn_mask if sharding.active is None else None
        _functional._mha_shape_check(query, key, value, key_padding_mask, own_mask, self.num_heads)
        promised = is_causal and attn_mask is not None
        as_bias = attn_mask is not None and attn_mask.dtype != torch.bool
        method = self._method_for(query, key)
        accepted = method.accepts_bias if as_bias else method.accepts_mask
        if promised and (not accepted or (key_padding_mask is None and not need_weights)):
            read_mask, causal = None, True  # as the parent, without a look at the mask
        else:
            read_mask, causal = attn_mask, False
        if is_causal != promised or not fits(
            self, query, key, value, key_padding_mask, read_mask if sharding.active is None else None
        ):
            # The parent says what is wrong, in its own words; value[:] keeps it off its fast path, which checks less.
            super().forward(query, key, value[:], key_padding_mask, need_weights, attn_mask, is_causal=is_causal)
            raise InputError(
                f"shapes that do not belong together: query {tuple(query.shape)}, key {tuple(key.shape)}, value "
                f"{tuple(value.shape)} with embed_dim={self.embed_dim}, kdim={self.kdim}, vdim={self.vdim}"
            )
        return self._forward_plain(
            method, query, key, value, key_padding_mask, need_weights, read_mask, average_attn_weights, causal
        )

    def _in_one_step(
        self, x: Tensor, need_weights: bool, average: bool, is_causal: bool = False
    ) -> tuple[Tensor, Tensor | None] | None:
        """Dense self-attention without masks and dropout, where `self_attention` can make it in one step, else None."""
        if (
            not self.attention.is_dense
            or not self._qkv_same_embed_dim
            or self.bias_k is not None
            or self.bias_v is not None
            or self.add_zero_attn
            or (self.training and self.dropout > 0.0)
            or self.softcap is not None
            or self.sinks is not None
            or self.position_bias is not None
            or self.head_dim > MAX_HEAD_DIM
            or is_onnx_export()
            or is_more_than_linear(self.out_proj)
        ):
            return None
        weights: Any = None if not need_weights else "mean" if average else "each"
        return self_attention(
            x, self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias, self.num_heads,
            batch_first=self.batch_first, weights=weights, is_causal=is_causal,
        )  # fmt: skip

    def _method_for(self, query: Tensor, key: Tensor) -> Method:
        """The method of a call: dense for queries of another length than the keys, with `dense_across`."""
        if not self.dense_across:
            return self.attention
        length = 0 if query.dim() == 2 or not self.batch_first else 1
        return self.attention if query.shape[length] == key.shape[length] else DENSE

    def _forward_plain(
        self,
        method: Method,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The computation, for dense tensors that passed every check."""
        if is_causal and query is key and key is value and key_padding_mask is None and attn_mask is None:
            found = self._in_one_step(query, need_weights, average_attn_weights, is_causal)
            if found is not None:
                return found
        q, k, v = project_to_heads(self, query, key, value)
        extra = (self.bias_k is not None) + self.add_zero_attn
        if extra:
            sharding.refuse("a key beside the sequence (add_bias_kv, add_zero_attn)")
            k, v = append_columns(self, k, self.bias_k), append_columns(self, v, self.bias_v)
        key_mask, mask, bias = read_masks(self, method, key_padding_mask, attn_mask, q, extra)
        scores: BiasLike = bias if self.position_bias is None else join(bias, [self.position_bias()])
        modifiers: dict[str, Any] = {}
        if self.softcap is not None or self.sinks is not None:
            modifiers = {"softcap": self.softcap, "sinks": self.sinks}
        dropout_p = self.dropout if self.training else 0.0
        out, weights = attend_from_first(
            method,
            q,
            k,
            v,
            state=self.method_state,
            key_mask=key_mask,
            mask=mask,
            bias=scores,
            is_causal=is_causal,
            causal_alignment="top_left" if is_causal else None,
            dropout_p=dropout_p,
            dropout_seed=resolve_seed(None) if dropout_p > 0.0 else None,
            need_weights="mean" if need_weights and average_attn_weights else need_weights,
            **modifiers,
        )
        # Called, not only read as the parent does: adapters, hooks and offloading on it are reached.
        out = self.out_proj(merge_heads(self, out, query.dim() == 3))
        if weights is None:
            return out, None
        return out, weights if query.dim() == 3 else weights.squeeze(0)

    def __prepare_scriptable__(self) -> nn.MultiheadAttention:
        """What torch.jit.script compiles in our place: for dense attention the parent, on the same parameters."""
        if not self.attention.is_dense:
            raise UnsupportedError(
                f"TorchScript cannot compile attention={str(self.attention)!r}; use torch.compile or torch.export, or "
                "script to_torch(), which computes dense attention"
            )
        return self.to_torch()

    # --- state ---

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        keep_state(self.method_state, state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "attention" not in state:
            state["attention"], state["method_state"] = DENSE, None
        if "softcap" not in state:
            state["softcap"], state["position_bias"] = None, None
            state["_parameters"] = state["_parameters"] | {"sinks": None}
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._guard_own_forward()

    def _guard_own_forward(self) -> None:
        if keep_own_forward not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(keep_own_forward)

    def extra_repr(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, attention={str(self.attention)!r}"
        text += "" if self.softcap is None else f", softcap={self.softcap:g}"
        return text if self.sinks is None else f"{text}, sinks=True"


def check_replaceable(name: str, module: nn.Module) -> None:
    """Raise UnsupportedError for a module whose own forward would be lost: of a subclass, or put on the instance."""
    if type(module) not in (TorchMultiheadAttention, MultiheadAttention):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise UnsupportedError(
            f"{name} is a {kind}, not a plain torch.nn.MultiheadAttention, and what it does differently would be lost. "
            "Replace before quantising or parametrising it, or leave it out with predicate="
        )
    if hides_forward(module):
        raise UnsupportedError(
            f"{name} has a forward of its own on the instance, which does not lead to {type(module).__name__}.forward "
            "as far as can be seen, so that a replacement might never be called. Replace before wrapping it, or leave "
            "it out with predicate="
        )


def _check_state(method: Method, given: nn.Module, own: nn.Module | None, device: torch.device) -> None:
    """Raise InputError unless `given` is a state like `own`, on the device."""
    found = {name: tensor.shape for name, tensor in given.state_dict().items()}
    wanted = {} if own is None else {name: tensor.shape for name, tensor in own.state_dict().items()}
    if type(given) is not type(own) or found != wanted:
        raise InputError(
            f"method_state {type(given).__name__} of {found} does not belong to attention={str(method)!r}, which has "
            f"{type(own).__name__} of {wanted}; pass another module's method_state, or leave it out"
        )
    for tensor in given.state_dict().values():
        if tensor.device != device:
            raise InputError(f"a method_state on {tensor.device} cannot serve a module on {device}; move one of them")
