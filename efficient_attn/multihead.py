"""`MultiheadAttention`: torch.nn.MultiheadAttention with a choice of attention, and the tools to put it into a model.

It is a subclass, with its parent's constructor, parameters, initialisation, `state_dict` and call; one keyword is new,
`attention=`. The parent's projections surround one call of `Method.attend`:

    query, key, value --projections--> heads (N, H, L, D) --self.attention.attend--> heads --out_proj--> output

Where it differs from its parent, on purpose:

* A query that may see no key gives 0 (and weights 0) on every path; the parent gives NaN on some.
* Nested tensors are accepted wherever dense ones are, in training too, strided and jagged.
* In eval mode it keeps running its own attention. Otherwise `nn.TransformerEncoderLayer` would not call this
  module but run dense attention on its weights; a forward pre-hook that does nothing is the documented way out.

Letters: N batch, L queries, S keys, E embed_dim, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import pad_sequence

from .errors import InputError, UnsupportedError
from .handover import clone, hand_over_hooks, hides_forward, put
from .inputs import MAX_HEAD_DIM, resolve_seed
from .methods import DENSE, Method, parse
from .methods.base import keep_state
from .methods.continuation import goes_by_positions
from .methods.left_padding import attend_from_first
from .patterns import Pattern
from .self_attention import self_attention
from .tracing import is_onnx_export, shapes_only, unwrapped

_functional: Any = F  # the parent's own checks, private there, so that errors are the parent's too
_plain_torch_function: Any = Tensor.__torch_function__
_modules: Any = nn.modules.module
_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
_PLAIN = (Tensor, nn.Parameter, type(None))
_TorchMultiheadAttention = nn.MultiheadAttention  # bound once: a patched torch.nn must not change our parent


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

    Raises:
        InputError: a method_state that does not belong to this method.

    Attributes:
        attention: the `Method`. To change it, use `replace_attention` or `from_torch`.
        dense_across: whether queries that are not as many as the keys get dense attention: cross-attention and learned
            queries have no place in the keys' sequence, of which a method could mean anything. `replace_attention`
            sets it, which cannot know how a module will be called; a module that is made with a method has it False.
        method_state: the method's own parameters (Linformer's projections ...), None for a method without any. They
            appear in `state_dict` under "method_state."; a checkpoint that has none of them still loads strictly.
    """

    attention: Method
    dense_across: bool = False
    method_state: nn.Module | None

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
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
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

        Everything else that `module` carries comes along: mode, hooks, attributes set by other code. `method_state` is
        that of the constructor.

        Raises:
            InputError: a method_state that does not belong to this method.
            UnsupportedError: `module` is of a subclass, whose own computation would be lost.
        """
        method = parse(attention)
        check_replaceable("the module", module)
        ours: MultiheadAttention = clone(module, cls)
        ours._modules.pop("method_state", None)
        ours._set_method(method, method_state)
        return ours

    def to_torch(self) -> nn.MultiheadAttention:
        """Return a plain torch.nn.MultiheadAttention on the same Parameter objects, for tools that check for that type.

        It computes dense attention whatever `self.attention` is; the method's own parameters stay behind.
        """
        plain: nn.MultiheadAttention = clone(self, _TorchMultiheadAttention)
        plain.__dict__.pop("attention")
        plain.__dict__.pop("method_state", None)
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
        weight = self.out_proj.weight
        sizes = (self.embed_dim, self.num_heads, self.head_dim)
        if state is None:
            state = method.build(*sizes, device=weight.device, dtype=weight.dtype)
        else:
            _check_state(method, state, method.build(*sizes, device="meta"), weight.device)
        self.attention = method
        self.method_state = None if state is None else state.train(self.training)
        self._guard_own_forward()

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
            return self._record_as_leaf(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
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
            return self._forward_nested(query, key, value, need_weights, average_attn_weights)
        foreign = self._why_foreign(query, key, value)
        if foreign is not None:
            if not self.attention.is_dense:
                raise UnsupportedError(
                    f"attention={str(self.attention)!r} cannot run with {foreign}; only dense attention can be left to "
                    "PyTorch. Use attention='dense', or to_torch() for a dense module on the same parameters"
                )
            if is_onnx_export():
                value = value[:]  # keeps the parent off its fast path, which no exporter knows
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        _check_mask_dtype("key_padding_mask", key_padding_mask, "attn_mask", attn_mask)
        _check_mask_dtype("attn_mask", attn_mask)
        _functional._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        promised = is_causal and attn_mask is not None
        as_bias = attn_mask is not None and attn_mask.dtype != torch.bool
        method = self._method_for(query, key)
        accepted = method.accepts_bias if as_bias else method.accepts_mask
        if promised and (not accepted or (key_padding_mask is None and not need_weights)):
            read_mask, causal = None, True  # as the parent, without a look at the mask
        else:
            read_mask, causal = attn_mask, False
        if is_causal != promised or not self._fits(query, key, value, key_padding_mask, read_mask):
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
            or self.head_dim > MAX_HEAD_DIM
            or is_onnx_export()
            or _is_more_than_linear(self.out_proj)
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
        q, k, v = self._project_to_heads(query, key, value)
        extra = (self.bias_k is not None) + self.add_zero_attn
        if extra:
            k, v = self._append_columns(k, self.bias_k), self._append_columns(v, self.bias_v)
        key_mask, mask, bias = self._read_masks(method, key_padding_mask, attn_mask, q, extra)
        dropout_p = self.dropout if self.training else 0.0
        out, weights = attend_from_first(
            method,
            q,
            k,
            v,
            state=self.method_state,
            key_mask=key_mask,
            mask=mask,
            bias=bias,
            is_causal=is_causal,
            causal_alignment="top_left" if is_causal else None,
            dropout_p=dropout_p,
            dropout_seed=resolve_seed(None) if dropout_p > 0.0 else None,
            need_weights="mean" if need_weights and average_attn_weights else need_weights,
        )
        # Called, not only read as the parent does: adapters, hooks and offloading on it are reached.
        out = self.out_proj(self._merge_heads(out, query.dim() == 3))
        if weights is None:
            return out, None
        return out, weights if query.dim() == 3 else weights.squeeze(0)

    # --- projections: the parameters are read at every call, so that what others merge into them counts ---

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to E features each; inputs that are one tensor share one matrix product."""
        E = self.embed_dim
        if not self._qkv_same_embed_dim:
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            return (
                F.linear(query, self.q_proj_weight, biases[0]),
                F.linear(key, self.k_proj_weight, biases[1]),
                F.linear(value, self.v_proj_weight, biases[2]),
            )
        weight = self.in_proj_weight
        bias = None if self.in_proj_bias is None else self.in_proj_bias.to(weight.dtype)
        if query is key and key is value:
            q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
            return q, k, v
        q = F.linear(query, weight[:E], None if bias is None else bias[:E])
        if key is value:
            k, v = F.linear(key, weight[E:], None if bias is None else bias[E:]).chunk(2, dim=-1)
            return q, k, v
        k = F.linear(key, weight[E : 2 * E], None if bias is None else bias[E : 2 * E])
        return q, k, F.linear(value, weight[2 * E :], None if bias is None else bias[2 * E :])

    def _project_to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project, and view as heads (N, H, L, D).

        Without a gradient the features of one product are taken apart as heads at once; with one that would copy the
        gradient once more.
        """
        if (
            query is key
            and key is value
            and query.dim() == 3
            and self._qkv_same_embed_dim
            and not torch.is_grad_enabled()
        ):
            weight, bias = self.in_proj_weight, self.in_proj_bias
            projected = F.linear(query, weight, None if bias is None else bias.to(weight.dtype))
            heads = projected.view(*query.shape[:2], 3, self.num_heads, self.head_dim)
            q, k, v = heads.permute((2, 0, 3, 1, 4) if self.batch_first else (2, 1, 3, 0, 4)).unbind(0)
            return q, k, v
        q, k, v = (self._split_heads(x) for x in self._project(query, key, value))
        return q, k, v

    def _split_heads(self, x: Tensor) -> Tensor:
        """(L, N, E), (N, L, E) or (L, E) -> (N, H, L, D), a view."""
        x = x.view(*x.shape[:-1], self.num_heads, self.head_dim)
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge_heads(self, x: Tensor, batched: bool) -> Tensor:
        """(N, H, L, D) -> the layout of the query."""
        if not batched:
            return x.squeeze(0).transpose(0, 1).flatten(1)
        return (x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(2)

    def _append_columns(self, x: Tensor, learned: Tensor | None) -> Tensor:
        """Append the learned row (add_bias_kv) and the zero row (add_zero_attn) to keys or values (N, H, S, D)."""
        rows = [x]
        if learned is not None:
            rows.append(learned.view(1, self.num_heads, 1, self.head_dim).to(x.dtype).expand(x.shape[0], -1, -1, -1))
        if self.add_zero_attn:
            rows.append(x.new_zeros(*x.shape[:2], 1, self.head_dim))
        return torch.cat(rows, dim=2)

    # --- masks ---

    def _read_masks(
        self, method: Method, key_padding_mask: Tensor | None, attn_mask: Tensor | None, q: Tensor, extra: int
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Turn the module's masks (True = leave out) into key_mask (N, S), mask (N|1, H|1, L, S) and bias for `attend`.

        Bool masks become True = attend, float masks become bias; the `extra` appended columns are always visible.
        """
        key_mask = mask = bias = None
        if attn_mask is not None:
            heads = (1, 1) if attn_mask.dim() == 2 else (q.shape[0], self.num_heads)
            attn_mask = attn_mask.reshape(*heads, *attn_mask.shape[-2:])
            if attn_mask.dtype == torch.bool:
                mask = F.pad(~attn_mask, (0, extra), value=True)
            else:
                bias = F.pad(_as_bias(attn_mask, q), (0, extra))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.reshape(q.shape[0], -1)
            if key_padding_mask.dtype != torch.bool and not method.accepts_bias:
                key_padding_mask = _padding_as_bool(key_padding_mask, method)
            if key_padding_mask.dtype == torch.bool:
                key_mask = F.pad(~key_padding_mask, (0, extra), value=True)
            else:
                per_key = F.pad(_as_bias(key_padding_mask, q), (0, extra))[:, None, None, :]
                bias = per_key if bias is None else bias + per_key
        return key_mask, mask, bias

    def _fits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> bool:
        """Whether sizes belong together; dimensions have been checked."""
        if (self.bias_k is None) != (self.bias_v is None):
            return False
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != (self.embed_dim, self.kdim, self.vdim):
            return False
        lengths = 0 if query.dim() == 2 or not self.batch_first else 1
        N, L, S = 1, query.shape[lengths], key.shape[lengths]
        if query.dim() == 3:
            N = query.shape[1 - lengths]
            if key.shape[1 - lengths] != N:
                return False
        if key.shape[:-1] != value.shape[:-1]:
            return False
        if attn_mask is not None and attn_mask.shape not in ((L, S), (N * self.num_heads, L, S)):
            return False
        return key_padding_mask is None or key_padding_mask.shape in ((N, S), (S,))

    # --- inputs that are not plain tensors ---

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average_attn_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within each sequence of nested tensors (strided or jagged); returns a nested tensor like query.

        The sequences are padded for the computation, the padding masked, so weights are (N, max L, max S).
        """
        _functional._mha_shape_check(query, key, value, None, None, self.num_heads)
        if not (query.is_nested and key.is_nested and value.is_nested) or not self.batch_first:
            raise UnsupportedError(
                "nested tensors need batch_first=True and must come as query, key and value together; got batch_first="
                f"{self.batch_first}, nested: query={query.is_nested}, key={key.is_nested}, value={value.is_nested}"
            )
        parts = {id(nested): nested.unbind() for nested in (query, key, value)}
        q_lengths, k_lengths, v_lengths = ([x.shape[0] for x in parts[id(nested)]] for nested in (query, key, value))
        if k_lengths != v_lengths or len(q_lengths) != len(k_lengths):
            raise InputError(
                f"each sequence needs as many values as keys; got lengths {q_lengths}, {k_lengths}, {v_lengths}"
            )
        if q_lengths != k_lengths and goes_by_positions(self.attention):
            # Padding keeps queries at their keys from the top left on; other places differ from sequence to sequence.
            top_left = getattr(self.attention, "alignment", None) == "top_left" and not self.dense_across
            dense = self.dense_across and max(q_lengths) != max(k_lengths)
            if not top_left and not dense:
                raise InputError(
                    f"{self.attention} goes by positions, and where nested queries of lengths {q_lengths} stand among "
                    f"keys of {k_lengths} is not known; say alignment=top_left (query i at key i), or use dense"
                )
        padded = {name: pad_sequence(list(sequences), batch_first=True) for name, sequences in parts.items()}
        padding = None
        if min(k_lengths) != max(k_lengths):
            positions = torch.arange(max(k_lengths), device=query.device)
            padding = positions >= torch.tensor(k_lengths, device=query.device)[:, None]
        q, k, v = (padded[id(nested)] for nested in (query, key, value))  # one object stays one object
        out, weights = self.forward(q, k, v, padding, need_weights, None, average_attn_weights)
        rows = [out[n, :length] for n, length in enumerate(q_lengths)]
        jagged: Any = query
        if query.layout is torch.jagged and jagged.lengths() is None:
            # The query's own offsets, for only then do the two add up in a residual connection.
            return torch.nested.nested_tensor_from_jagged(torch.cat(rows), offsets=jagged.offsets()), weights
        return torch.nested.as_nested_tensor(rows, layout=query.layout), weights

    def _why_foreign(self, query: Tensor, key: Tensor, value: Tensor) -> str | None:
        """Name what keeps our operators from serving a call that PyTorch's dense module can serve, or return None."""
        if self.head_dim > MAX_HEAD_DIM:
            return f"head_dim={self.head_dim} (at most {MAX_HEAD_DIM})"
        if self.training and self.dropout == 1.0:
            return "dropout=1.0"
        if is_onnx_export():
            return "an export to ONNX, which has no operator for it"
        if torch.compiler.is_compiling():
            return None
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return "torch.jit.trace, which would freeze the block lists of one length (torch.export keeps them apart)"
        tensors = (query, key, value, self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias)
        for tensor in tensors:
            if type(tensor) not in _PLAIN and _overrides_torch_function(tensor):
                return f"{type(tensor).__name__}, which overrides __torch_function__"
        return None

    def _record_as_leaf(self, *args: Any) -> Any:
        """Under FX symbolic tracing, record one call of this module, as FX does for the modules of torch.nn."""
        tracer: Any = next(arg for arg in args if isinstance(arg, Proxy)).tracer
        path = tracer.path_of_module(self)
        if not path:
            raise UnsupportedError("torch.fx cannot trace into MultiheadAttention; trace the model that contains it")
        return tracer.create_proxy("call_module", path, args, {})

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
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._guard_own_forward()

    def _guard_own_forward(self) -> None:
        if keep_own_forward not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(keep_own_forward)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, attention={str(self.attention)!r}"


def replace_attention(
    model: nn.Module,
    attention: str | Method | Pattern = "dense",
    *,
    predicate: Callable[[str, nn.MultiheadAttention], bool] | None = None,
) -> dict[str, nn.Module]:
    """Replace every `nn.MultiheadAttention` in `model` (also inside nn.Transformer, also ours) in place.

    The replacement holds the same Parameter objects, so optimisers and checkpoints stay valid, the same mode, and the
    same hooks: handles that were returned for them now act on it. A module that appears twice is replaced by one. What
    other code put around a module's forward goes on around the replacement's.

    Cross-attention stays dense unless it is named: the `multihead_attn` of nn.TransformerDecoderLayer is left alone
    without a predicate, and a replacement that is called with fewer or more queries than keys attends densely
    (`MultiheadAttention.dense_across`; set it False where the method is meant for such calls).

    Args:
        model: the module to search; itself not an attention module (use `MultiheadAttention.from_torch` for that).
        attention: a spec string, `Method` or `Pattern`. Modules that have this method already stay as they are. With
            linformer:share=layerwise all of them get one projection: that of the first which has it, or a new one.
        predicate: called with (name, module); False leaves that module alone.

    Returns:
        What was replaced, by name; `model.set_submodule(name, old)` puts it back.

    Raises:
        InputError: `model` is an attention module itself.
        UnsupportedError: a module of a subclass, whose own computation would be lost, or with a forward on the instance
            that does not lead to its own. Then nothing has been replaced.
        InputError: layers on different devices that would share a state. Likewise.
    """
    method = parse(attention)
    if isinstance(getattr(model, "_orig_mod", model), _TorchMultiheadAttention):
        raise InputError(
            f"the model is a {type(model).__name__} and cannot be replaced inside itself; "
            "use MultiheadAttention.from_torch(model, attention=...)"
        )
    found: dict[str, Any] = {}
    shared: Any = None  # the state of all modules, for a method that shares one
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, _TorchMultiheadAttention):
            continue
        if predicate is None:
            wanted = method.is_dense or not _attends_to_memory(model, name)
        else:
            wanted = predicate(name, module)
        if not wanted:
            continue
        check_replaceable(repr(name), module)
        has_method = getattr(module, "attention", None) == method
        if has_method and method.shares_state and shared is None:
            shared = module.method_state
        elif not has_method or (method.shares_state and module.method_state is not shared):
            found[name] = module
    replacements: dict[int, MultiheadAttention] = {}
    for module in found.values():
        if id(module) not in replacements:
            replacement = MultiheadAttention.from_torch(module, method, method_state=shared)
            replacement.dense_across = True
            replacements[id(module)] = replacement
            shared = replacement.method_state if method.shares_state else None
    for module in {id(m): m for m in found.values()}.values():
        hand_over_hooks(module, replacements[id(module)])
    return dict(put(model, name, replacements[id(module)]) for name, module in found.items())


def _is_more_than_linear(module: nn.Module) -> bool:
    """Whether a call of it may do something else than to multiply by its weight and add its bias: an adapter, hooks."""
    known: Any = module
    return (
        type(module) not in _LINEAR
        or "forward" in module.__dict__
        or bool(known._forward_hooks or known._forward_pre_hooks or known._backward_hooks or known._backward_pre_hooks)
        or _modules._has_any_global_hook()
    )


def _attends_to_memory(model: nn.Module, name: str) -> bool:
    """Whether the submodule of this name is the cross-attention of a decoder layer of torch.nn."""
    path, _, last = name.rpartition(".")
    return last == "multihead_attn" and isinstance(model.get_submodule(path), nn.TransformerDecoderLayer)


def check_replaceable(name: str, module: nn.Module) -> None:
    """Raise UnsupportedError for a module whose own forward would be lost: of a subclass, or put on the instance."""
    if type(module) not in (_TorchMultiheadAttention, MultiheadAttention):
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


def _check_mask_dtype(name: str, mask: Tensor | None, other_name: str = "", other: Tensor | None = None) -> None:
    """Let PyTorch's own rule judge the dtype (an empty mask will do, so nothing of L x S is allocated)."""
    if mask is not None:
        _functional._canonical_mask(
            mask.new_empty(0),
            name,
            _functional._none_or_dtype(other),
            other_name,
            torch.float32,
            check_other=other is not None,
        )


def _as_bias(mask: Tensor, query: Tensor) -> Tensor:
    """A float mask in a dtype that `attention` takes; float32 beside half inputs stays, for -1e9 is -inf in float16."""
    if mask.dtype == torch.float32 and query.dtype in (torch.float16, torch.bfloat16):
        return mask
    return mask.to(query.dtype)


def _padding_as_bool(key_padding_mask: Tensor, method: Method) -> Tensor:
    """A float padding mask of 0 and -inf, which is what nn.TransformerEncoder makes of a bool one, as bool again."""
    padded = key_padding_mask == -torch.inf
    only_padding = (padded | (key_padding_mask == 0)).all()
    message = (
        f"attention={str(method)!r} cannot add a float key_padding_mask to its scores; it takes a bool mask, or a "
        "float one of 0 and -inf only"
    )
    if torch.compiler.is_compiling() or shapes_only(key_padding_mask):
        torch._assert_async(only_padding, message)
    elif not unwrapped(only_padding).all():  # for every sample of a vmap
        raise UnsupportedError(message)
    return padded


def _overrides_torch_function(tensor: Any) -> bool:
    """Whether a class overrides torch functions; tensors, parameters and bare subclasses do not."""
    override = getattr(type(tensor), "__torch_function__", None)
    if override is None or override is torch._C._disabled_torch_function_impl:
        return False
    return getattr(override, "__func__", None) is not _plain_torch_function.__func__
