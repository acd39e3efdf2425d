"""The Triton backend (kernels/): the same functions as `reference`, on any GPU that Triton compiles for.

With TRITON_INTERPRET=1 the kernels run on CPU tensors in Triton's interpreter, for tests: only when asked for by name.
Nothing here waits for the GPU, and memory is allocated for results and O(n) workspace only, so that a call can be
captured in a CUDA graph.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...masks import MaskArrays
from ..call import (
    Call,
    check_gradients_in_order,
    leaves_rows,
    lse_without_keys,
    modifier_gradients_without_keys,
    order_steps,
    readable,
    refuse_orders,
    sink_gradient,
    zeroed,
)
from . import autotune
from . import plan as triton_plan

LOG2E = math.log2(math.e)
L2_BYTES = 32 * 2**20  # keys and values that are worked off together
INTERPRETER_PROCESSORS = 8
WIDEST = 256  # head dimension
HALF = (torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; Triton reads the variable when the kernels are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def kernels() -> Any:
    """The kernels, imported at first use: importing Triton takes a while and needs no GPU to succeed."""
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    from ...kernels import (
        attention,
        attention_backward,
        attention_statistics,
        attention_weights,
        configs,
        linear_attention,
        plan,
        tiles,
        walk,
    )

    exact = (attention, attention_backward, attention_weights, attention_statistics)
    modules = (tiles, walk, configs, plan, *exact, linear_attention)
    names = {k: v for module in modules for k, v in vars(module).items() if not k.startswith("_")}
    return type("Kernels", (), names | {"triton": triton, "TensorDescriptor": TensorDescriptor})


@lru_cache(maxsize=64)
def capability(device: torch.device) -> int:
    """80 for compute capability 8.0, and so on; 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def device_reasons(device: torch.device) -> list[str]:
    """Why the kernels cannot run on tensors of this device."""
    reasons = []
    if not installed():
        reasons.append("Triton is not installed; pip install triton (Linux, NVIDIA GPU)")
    if device.type == "cpu" and not interpreted():
        reasons.append("it runs on CUDA tensors; these are on cpu (TRITON_INTERPRET=1 runs it there, for tests)")
    elif device.type not in ("cpu", "cuda"):
        reasons.append(f"it runs on CUDA tensors; these are on {device}")
    elif device.type == "cuda" and interpreted():
        reasons.append("TRITON_INTERPRET=1 is set, under which Triton runs on CPU tensors only")
    elif device.type == "cuda" and torch.version.hip is None and capability(device) < 80:
        reasons.append(f"it needs compute capability 8.0 or newer; this GPU has {capability(device) / 10}")
    return reasons


def not_supported_reasons(call: Call) -> list[str]:
    """Why this backend cannot serve `call`."""
    reasons = device_reasons(call.device)
    if call.dtype == torch.float64:
        reasons.append("it computes in float32, which float64 inputs do not allow")
    if max(call.D, call.Dv) > WIDEST:
        reasons.append(f"it serves head dimensions up to {WIDEST}; these are {call.D} and {call.Dv}")
    return reasons


class _Problem(NamedTuple):
    """What forward and backward derive from their arguments alike."""

    sizes: tuple[int, ...]  # B, Hq, Hkv, Nq, Nk, D, Dv; Nq rows and Nk columns where these have an order
    tokens: tuple[int, int]  # queries and keys of the tensors
    order_steps: tuple[int, ...]  # from a batch element and from a head to the next, in the orders of both
    scale: float  # positive, in log2
    sign: int
    dropout: Any  # tiles.Dropout
    low: int | None
    high: int | None
    precision: str


def attention_forward(
    query: Tensor,  # (B, Hq, Nq, D)
    key: Tensor,  # (B, Hkv, Nk, D)
    value: Tensor,  # (B, Hkv, Nk, Dv)
    bias: Tensor | None,
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return out (B, Hq, Nq, Dv) in the query's dtype and lse (B, Hq, Nq) float32, as `reference.attention_forward`."""
    if diagonals is not None:
        refuse_orders(mask, "a bias by relative position")
    query, key, value, mask = *map(readable, (query, key, value)), _contiguous(mask)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    nothing = out.numel() == 0 or _sees_nothing(mask, key)
    if nothing or leaves_rows(mask.query_order, query):
        out.zero_(), lse_without_keys(lse, sinks)
    if nothing:
        return out, lse
    k = kernels()
    problem = _problem(query, key, value, mask, scale, dropout_p, dropout_seed)
    B, Hq, Hkv, Nq, Nk, _, Dv = problem.sizes
    tokens, ordered = query.shape[2], mask.query_order is not None or mask.key_order is not None
    inputs = _inputs(query, key, value, bias, problem, softcap, sinks, diagonals)
    biased = bias is not None or softcap > 0.0 or diagonals is not None
    group = Hq // Hkv

    def run(config: Any) -> None:
        alone = mask.indptr is not None or dropout_p > 0.0 or ordered
        pack = 1 if alone or 2 * Nq > config.block_q else group
        if mask.indptr is None:
            config = k.short(config, k.padded(Nq * pack))
        lines, tiles = B * Hq // pack, _tiles(Nq * pack, config.block_q, mask, 0)
        splits = _splits(lines * tiles, _key_tiles(Nk, config.block_k, mask), processors(query.device))
        walked = _mask(mask, B, False, problem, Hq // pack, lines * tiles > processors(query.device))
        part_out, part_lse = out, lse
        if splits > 1:
            part_out = query.new_empty(splits * B, Hq, tokens, Dv, dtype=torch.float32)
            part_lse = query.new_empty(splits * B, Hq, tokens, dtype=torch.float32)
            if leaves_rows(mask.query_order, query):
                part_lse.fill_(-math.inf)
        section = _section(lines, Nk, key, value, group // pack)
        _launch(
            k.attention_forward_kernel,
            inputs._replace(mask=walked),
            (*_described(k, config, key, value, mask), k.Output(*_rows(part_out), part_lse)),
            k.Grid(tiles * lines * splits, lines, Hq // pack, section, splits),
            config, mask, problem, {} if splits > 1 else {"walk_k": 32}, pack,
        )  # fmt: skip
        if splits > 1:
            rows, block = B * Hq * tokens, 16
            k.merge_kernel[(-(-rows // block),)](
                part_out, part_lse, _rows(out), lse, rows, Hq, tokens, splits, Dv, k.padded(Dv), block, num_warps=4
            )

    with _on(query.device):
        run(_config("forward", query, Dv, mask, problem, biased, run))
    return out, lse


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    average: bool,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out, lse and weights (B, Hq | 1, Nq, Nk), as `reference.attention_with_weights`."""
    refuse_orders(mask, "returning weights")
    modifiers = (softcap, sinks, diagonals)
    out, lse = attention_forward(query, key, value, bias, mask, scale, dropout_p, dropout_seed, *modifiers)
    query, key, value, mask = *map(readable, (query, key, value)), _contiguous(mask)
    B, Hq, Nq, _ = query.shape
    Nk, heads = key.shape[2], 1 if average else Hq
    weights = query.new_empty(B, heads, Nq, Nk)
    if weights.numel() == 0 or Hq == 0 or _sees_nothing(mask, key):
        return out, lse, weights.zero_()
    k = kernels()
    problem = _problem(query, key, value, mask, scale, dropout_p, dropout_seed)
    inputs = _inputs(query, key, value, bias, problem, *modifiers)._replace(mask=_mask(mask, B, False, problem))
    config = _config("bias_gradient", query, 0, mask, problem, True)  # the same scores, a tile at a time
    tiles = (-(-Nq // config.block_q), -(-Nk // config.block_k))
    with _on(query.device):
        k.attention_weights_kernel[(B * heads * math.prod(tiles),)](
            *inputs, _upstream(out, lse, lse, scale, None, Hq), k.Weights(weights, heads, *tiles, Hq // heads),
            _constants(config, mask, problem), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out, lse, weights


def attention_backward(
    grad_out: Tensor,  # (B, Hq, Nq, Dv)
    grad_lse: Tensor | None,  # (B, Hq, Nq)
    grad_weights: Tensor | None,  # (B, Hq | 1, Nq, Nk)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mask: MaskArrays,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
    bias_requires_grad: bool,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    diagonals: Tensor | None = None,
    diagonals_require_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return dq, dk, dv, dbias, dsinks and ddiagonals, as `reference.attention_backward`."""
    check_gradients_in_order(mask, grad_weights, sinks, bias if bias_requires_grad else None, query)
    if diagonals is not None:
        refuse_orders(mask, "a bias by relative position")
    dq, dk, dv = (t.new_empty(t.shape) for t in (query, key, value))
    dbias = bias.new_empty(bias.shape) if bias is not None and bias_requires_grad else None
    if out.numel() == 0 or _sees_nothing(mask, key):
        gradients = modifier_gradients_without_keys(grad_lse, sinks, diagonals, diagonals_require_grad)
        return *zeroed((dq, dk, dv, dbias)), *gradients
    if leaves_rows(mask.query_order, query):
        dq.zero_()
    if leaves_rows(mask.key_order, key) or (mask.key_order is not None and mask.kv_lengths is not None):
        dk.zero_(), dv.zero_()
    query, key, value, out, grad_out = map(readable, (query, key, value, out, grad_out))
    mask = _contiguous(mask)
    grad_lse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
    lse = lse.contiguous()
    k = kernels()
    problem = _problem(query, key, value, mask, scale, dropout_p, dropout_seed)
    B, Hq, Hkv, Nq, Nk, _, Dv = problem.sizes
    group, tokens = Hq // Hkv, query.shape[2]
    delta = torch.empty_like(lse)
    inputs = _inputs(query, key, value, bias, problem, softcap, sinks, diagonals)
    biased = bias is not None or softcap > 0.0 or diagonals is not None
    given = _upstream(grad_out, lse, delta, scale, grad_weights, Hq)

    def run_keys(config: Any) -> None:
        programs = _tiles(Nk, config.block_k, mask, 1) * B * Hkv
        walked = _mask(mask, B, True, problem, Hkv, programs > processors(query.device))
        section = _section(B * Hkv, Nq * group, query, grad_out, 1)
        _launch(
            k.key_gradient_kernel, inputs._replace(mask=walked), (given, _rows(dk), _rows(dv)),
            k.Grid(programs, B * Hkv, Hkv, section), config, mask, problem, {"walk_q": 32},
        )  # fmt: skip

    def run_queries(config: Any) -> None:
        programs = _tiles(Nq, config.block_q, mask, 0) * B * Hq
        walked = _mask(mask, B, False, problem, Hq, programs > processors(query.device))
        section = _section(B * Hq, Nk, key, value, group)
        _launch(
            k.query_gradient_kernel, inputs._replace(mask=walked), (given, _rows(dq)),
            k.Grid(programs, B * Hq, Hq, section), config, mask, problem, {"walk_k": 32},
        )  # fmt: skip

    with _on(query.device):
        rows, block = B * Hq * tokens, 32
        k.delta_kernel[(-(-rows // block),)](
            _rows(out), _rows(grad_out), grad_lse, delta, rows, Hq, tokens, Dv, k.padded(Dv), block, num_warps=4
        )
        if grad_weights is not None:
            config = _config("query_gradient", query, Dv, mask, problem, biased)
            programs = _tiles(Nq, config.block_q, mask, 0) * B * Hq
            k.weight_products_kernel[(programs,)](
                *inputs._replace(mask=_mask(mask, B, False, problem, Hq)), given,
                k.Grid(programs, B * Hq, Hq, _section(B * Hq, Nk, key, value, group)),
                _constants(config, mask, problem), num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
        run_keys(_config("key_gradient", query, Dv, mask, problem, biased, run_keys))
        run_queries(_config("query_gradient", query, Dv, mask, problem, biased, run_queries))
        config = _config("bias_gradient", query, Dv, mask, problem, True)
        inputs = inputs._replace(mask=_mask(mask, B, False, problem))
        if dbias is not None:
            assert bias is not None
            _bias_gradient(k, config, inputs, given, bias, dbias, mask, problem)
        ddiagonals = None
        if diagonals is not None and diagonals_require_grad:
            ddiagonals = _diagonal_gradient(k, config, inputs, given, diagonals, mask, problem)
    return dq, dk, dv, dbias, sink_gradient(sinks, lse, delta), ddiagonals


def _launch(
    kernel: Any,
    inputs: Any,
    arguments: tuple[Any, ...],
    grid: Any,
    config: Any,
    mask: MaskArrays,
    problem: _Problem,
    steps: dict[str, int],
    pack: int = 1,
) -> None:
    """Launch a kernel, and where the mask hides pairs once more for the tiles that a NaN behind it has spoiled, in
    smaller `steps`."""
    hides = _hides(mask, inputs.bias.ptr if inputs.modifiers.diagonals is None else inputs.modifiers.diagonals)
    programs, device = grid.programs, inputs.q.ptr.device
    flags = torch.empty(programs, dtype=torch.int32, device=device) if hides else None
    for safe in (False, True) if hides else (False,):
        if safe:
            config, programs = kernels().safe(config, **steps), min(programs, processors(device))
        kernel[(programs,)](
            *inputs, *arguments, flags, grid, _constants(config, mask, problem, pack, grid.splits > 1, safe),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


def _bias_gradient(
    k: Any,
    config: Any,
    inputs: Any,
    given: Any,
    bias: Tensor,
    dbias: Tensor,
    mask: MaskArrays,
    problem: _Problem,
) -> None:
    """Fill dbias. A bias that is the same for every query or key gets one row of sums for each head first."""
    B, Hq, _Hkv, Nq, Nk = problem.sizes[:5]
    queries, keys = problem.tokens
    sum_k = bias.shape[3] == 1 and keys > 1
    sum_q = not sum_k and bias.shape[2] == 1 and queries > 1
    target = dbias
    if sum_k or sum_q:
        shape = (B, Hq, queries, 1) if sum_k else (B, Hq, 1, keys)
        target = dbias.new_empty(shape, dtype=torch.float32)
    if mask.query_order is not None or mask.key_order is not None:
        target.zero_()  # where no row or column of the order leads
    q_tiles, k_tiles = -(-Nq // config.block_q), -(-Nk // config.block_k)
    out_tiles = (1 if sum_q else q_tiles, 1 if sum_k else k_tiles)
    loops = (B // target.shape[0], Hq // target.shape[1], q_tiles // out_tiles[0], k_tiles // out_tiles[1])
    k.bias_gradient_kernel[(target.shape[0] * target.shape[1] * math.prod(out_tiles),)](
        *inputs, given, k.Bias(target, *target.stride()), k.Broadcast(target.shape[1], *out_tiles, *loops),
        _constants(config, mask, problem), sum_q, sum_k, False, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if target is not dbias:
        dbias.copy_(target.sum_to_size(dbias.shape))


def _diagonal_gradient(
    k: Any, config: Any, inputs: Any, given: Any, diagonals: Tensor, mask: MaskArrays, problem: _Problem
) -> Tensor:
    """ddiagonals: square tiles are summed up along diagonals of tiles, (.., tiles, side, side), and each sum is skewed
    and laid beside its neighbours."""
    B, Hq, _Hkv, Nq, Nk = problem.sizes[:5]
    config = k.square(config, max(problem.sizes[5:]))
    side = config.block_q
    q_tiles, k_tiles = -(-Nq // side), -(-Nk // side)
    count, lines = q_tiles + k_tiles - 1, diagonals.shape[:2]
    sums = diagonals.new_empty(*lines, count, side, side)
    k.bias_gradient_kernel[(lines[0] * lines[1] * count,)](
        *inputs, given, k.Bias(sums, *sums.stride()[:2], side, 1),
        k.Broadcast(lines[1], count, 1, B // lines[0], Hq // lines[1], 1, k_tiles),
        _constants(config, mask, problem), False, False, True, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    # Of a tile, (r, c) belongs to r - c: with its columns turned round, r + c' after the skew.
    skewed = F.pad(sums.flip(-1), (0, side)).flatten(-2)[..., : side * (2 * side - 1)]
    along = skewed.unflatten(-1, (side, 2 * side - 1)).sum(-2)  # (.., tiles, 2 side - 1)
    first = F.pad(along[..., :side].flatten(-2), (0, side))
    second = F.pad(F.pad(along[..., side:], (0, 1)).flatten(-2), (side, 0))
    start = k_tiles * side - Nk
    return (first + second)[..., start : start + Nq + Nk - 1].contiguous()


# --- from tensors to what the kernels read ---


def _problem(
    query: Tensor, key: Tensor, value: Tensor, mask: MaskArrays, scale: float, dropout_p: float, seed: Tensor | None
) -> _Problem:
    B, Hq, _, D = query.shape
    Hkv, Dv = key.shape[1], value.shape[3]
    Nq, *query_steps = order_steps(mask.query_order, "query_order", query)
    Nk, *key_steps = order_steps(mask.key_order, "key_order", key)
    origin = None
    if seed is not None and seed.numel() > 1:
        seed, *origin = seed.reshape(-1).to(query.device).split((1, 3))
    if dropout_p > 0.0 and seed is not None:
        # A seed on the CPU is a number that is known here; one on the GPU is read there, for no call may wait for it.
        seed = seed.reshape(1) if seed.device == query.device else torch.full((1,), int(seed), device=query.device)
    low = None if mask.window_left < 0 else mask.window_offset - mask.window_left
    high = None if mask.window_right < 0 else mask.window_offset + mask.window_right
    return _Problem(
        (B, Hq, Hkv, Nq, Nk, D, Dv),
        (query.shape[2], key.shape[2]),
        (*query_steps, *key_steps),
        abs(scale) * LOG2E if scale != 0.0 else 1.0,
        (scale > 0.0) - (scale < 0.0),
        kernels().Dropout(
            seed if dropout_p > 0.0 else None,
            origin[0] if origin else None,
            int(dropout_p * 2.0**32),
            1.0 / (1.0 - dropout_p),
        ),
        None if low is None else min(max(low, -Nq), Nk),  # beyond these bounds nothing changes
        None if high is None else min(max(high, -Nq), Nk),
        "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    )


def _constants(
    config: Any, mask: MaskArrays, problem: _Problem, pack: int = 1, split: bool = False, safe: bool = False
) -> Any:
    """What an attention kernel is compiled for."""
    k = kernels()
    _B, Hq, Hkv, _Nq, _Nk, D, Dv = problem.sizes
    tile = (config.block_q, config.block_k)
    block = (mask.block_q, mask.block_k) if mask.indptr is not None else tile
    head_dims = (D, Dv, k.padded(D), k.padded(Dv))
    return k.Constants(*head_dims, *tile, *block, Hq // Hkv, problem.sign, problem.precision, pack, split, safe)


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    problem: _Problem,
    softcap: float,
    sinks: Tensor | None,
    diagonals: Tensor | None,
) -> Any:
    """What every attention kernel reads, but for the mask: each kernel has its own view of it."""
    _B, Hq, _Hkv, Nq, Nk = problem.sizes[:5]
    k, sizes = kernels(), (Hq, Nq, Nk, problem.scale)
    cap = (softcap * LOG2E, 1.0 / (softcap * LOG2E)) if softcap > 0.0 else (None, None)
    sinks = None if sinks is None else sinks.float().contiguous()
    strides: tuple[int, ...] = (0, 0)
    if diagonals is not None:
        diagonals = diagonals if diagonals.stride(2) == 1 else diagonals.contiguous()
        lines = zip(diagonals.shape[:2], diagonals.stride()[:2], strict=True)
        strides = tuple(0 if size == 1 else step for size, step in lines)
    modifiers = k.Modifiers(*cap, sinks, diagonals, *strides)
    rows = map(_rows, (query, key, value))
    return k.Inputs(*rows, _bias(bias), None, problem.dropout, k.Sizes(*sizes), modifiers)


def _upstream(
    grad_out: Tensor, lse: Tensor, delta: Tensor, scale: float, grad_weights: Tensor | None, heads: int
) -> Any:
    """What the passes of the backward read besides the inputs."""
    strides: tuple[int, ...] = (0, 0, 0, 0)
    share = 1.0
    if grad_weights is not None:
        steps = zip(grad_weights.shape, grad_weights.stride(), strict=True)
        strides = tuple(0 if size == 1 else step for size, step in steps)
        share = grad_weights.shape[1] / heads
    return kernels().Upstream(*_rows(grad_out), lse, delta, scale, grad_weights, *strides, share)


def _rows(tensor: Tensor) -> Any:
    return kernels().Rows(tensor, *tensor.stride()[:3])


def _described(k: Any, config: Any, key: Tensor, value: Tensor, mask: MaskArrays) -> tuple[Any, Any]:
    """Descriptors of keys and values where the configuration asks for them and TMA can read both, else None twice."""
    if not config.descriptors or mask.key_order is not None or not all(map(_describable, (key, value))):
        return None, None
    block = lambda tensor: [1, 1, config.block_k, k.padded(tensor.shape[3])]  # noqa: E731
    key_tiles, value_tiles = (k.TensorDescriptor(t, list(t.shape), list(t.stride()), block(t)) for t in (key, value))
    return key_tiles, value_tiles


def _describable(tensor: Tensor) -> bool:
    """Whether TMA can read (B, H, N, D): addresses in steps of 16 bytes, none of them 0."""
    steps = [step * tensor.element_size() for step in tensor.stride()[:3]]
    return tensor.data_ptr() % 16 == 0 and tensor.stride(3) == 1 and all(s > 0 and s % 16 == 0 for s in steps)


def _bias(bias: Tensor | None) -> Any:
    if bias is None:
        return kernels().Bias(None, 0, 0, 0, 0)
    steps = (0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True))
    return kernels().Bias(bias, *steps)


def _mask(mask: MaskArrays, batch: int, transposed: bool, problem: _Problem, heads: int = 0, long: bool = False) -> Any:
    """The mask as a kernel reads it that walks whole rows of the list for `heads` lines of a batch element, the longest
    rows first if they are many (`long`); heads=0: as one that looks up single blocks."""
    lengths = None if mask.kv_lengths is None else mask.kv_lengths.expand(batch).contiguous()
    orders: tuple[Any, ...] = ()
    if mask.query_order is not None or mask.key_order is not None:
        cut = lengths if mask.key_order is not None else None
        orders = (mask.query_order, mask.key_order, *problem.order_steps, *problem.tokens, cut)
        lengths = lengths if cut is None else None
    if mask.indptr is None:
        return kernels().Mask(*(None,) * 7, lengths, 1, 1, 0, 0, 0, problem.low, problem.high, *orders)
    indptr, indices, tile_ids = mask[8:11] if transposed else mask[4:7]
    assert mask.tiles is not None and indptr is not None and indices is not None
    entries, clean, live, order = (indices, tile_ids), None, None, None
    if heads:
        Nq, Nk = problem.sizes[3:5]
        plan = triton_plan.plan(kernels(), mask, transposed, Nq, Nk, problem.low, problem.high)
        entries, clean, live = plan[:2], plan.clean, plan.live
        order = triton_plan.order(plan, mask, heads) if long else None
    tiles = mask.tiles
    tiles = tiles if tiles.data_ptr() % 16 == 0 else tiles.clone()  # bits are read in words
    blocks = (indptr.numel() - 1) // (mask.batch * mask.heads)
    numbers = (mask.batch, mask.heads, blocks, indices.numel(), tiles.shape[0], problem.low, problem.high)
    return kernels().Mask(indptr, *entries, clean, live, order, tiles, lengths, *numbers, *orders)


def _contiguous(mask: MaskArrays) -> MaskArrays:
    """The mask with contiguous arrays: itself, unless it was made of slices."""
    return MaskArrays._make(x.contiguous() if isinstance(x, Tensor) else x for x in mask)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# --- sizes of the grids ---


def _config(
    kernel: str,
    query: Tensor,
    Dv: int,
    mask: MaskArrays,
    problem: _Problem,
    biased: bool,
    run: Callable[[Any], None] | None = None,
) -> Any:
    """The kernel's configuration: the table's, or where autotuning is on the one with which `run` is fastest."""
    k, listed, chip = kernels(), mask.indptr is not None, capability(query.device)
    head_dim, half = max(query.shape[3], Dv), query.dtype in HALF
    ordered = mask.query_order is not None or mask.key_order is not None
    extras = biased or problem.dropout.seed is not None
    blocks = (mask.block_q, mask.block_k) if listed else (None, None)
    default = k.default_config(kernel, head_dim, half, chip, listed, extras, ordered)
    if ordered and problem.dropout.seed is not None:
        default = k.for_single_pairs(default, kernel, head_dim)
    default = k.fit(default, *blocks)
    if run is None or chip == 0 or not autotune.enabled() or torch.cuda.is_current_stream_capturing():
        return default
    B, Hq, Hkv, Nq, Nk = problem.sizes[:5]
    case = (kernel, query.dtype, query.shape[3], Dv, biased, problem.dropout.seed is None, blocks, problem.low is None)
    size = (problem.high is None, Hq // Hkv, *(n.bit_length() for n in (B * Hq, Nq, Nk)))
    key = "/".join(map(str, (torch.cuda.get_device_name(query.device), k.triton.__version__, *case, ordered, *size)))
    candidates = k.candidates(kernel, default, head_dim, query.element_size(), chip)
    return k.Config(*autotune.best(key, [k.fit(c, *blocks) for c in candidates], lambda c: _time(run, k.Config(*c))))


def _time(run: Callable[[Any], None], config: Any) -> float:
    """Median milliseconds of a launch; infinity where this GPU has not the resources for the configuration."""
    k = kernels()
    try:
        return float(k.triton.testing.do_bench(lambda: run(config), warmup=10, rep=50, return_mode="median"))
    except (k.triton.runtime.errors.OutOfResources, k.triton.runtime.errors.PTXASError):
        return math.inf


def _hides(mask: MaskArrays, bias: Tensor | None) -> bool:
    """Whether a key may be visible to one query of a tile and not to another, so that a NaN in it must be kept away."""
    return mask.indptr is not None or mask.window_left >= 0 or mask.window_right >= 0 or bias is not None


def _sees_nothing(mask: MaskArrays, key: Tensor) -> bool:
    """Whether the shapes of a mask say that it shows no pair."""
    orders = (order for order in (mask.query_order, mask.key_order) if order is not None)
    return key.shape[2] == 0 or _lists_nothing(mask) or any(order.shape[1] == 0 for order in orders)


def _lists_nothing(mask: MaskArrays) -> bool:
    return mask.indices is not None and mask.indices.numel() == 0


def _tiles(length: int, tile: int, mask: MaskArrays, axis: int) -> int:
    """Tiles of `tile` rows that cover the queries (axis 0) or keys (axis 1); a list's blocks are covered whole."""
    if mask.indptr is None:
        return -(-length // tile)
    block = (mask.block_q, mask.block_k)[axis]
    return -(-length // block) * (block // tile)


def _key_tiles(kv_len: int, tile: int, mask: MaskArrays) -> int:
    """Key tiles that a program walks, on average under a list."""
    if mask.indptr is None or mask.indices is None:
        return -(-kv_len // tile)
    return mask.indices.numel() * mask.block_k // tile // max(mask.indptr.numel() - 1, 1)


def _splits(programs: int, key_tiles: int, processors: int) -> int:
    """How many programs share the keys of one query tile: enough to fill the GPU, with at least two key tiles each."""
    if programs >= 0.8 * processors or key_tiles < 4:
        return 1
    return max(1, min(-(-2 * processors // programs), key_tiles // 2, 128))


def _section(lines: int, length: int, first: Tensor, second: Tensor, sharing: int) -> int:
    """Lines whose `length` rows of two tensors fit the L2 cache together; `sharing` lines read the same rows."""
    line = max(1, length * (first.shape[3] + second.shape[3]) * first.element_size())
    return max(1, min(lines, L2_BYTES // line * sharing))
