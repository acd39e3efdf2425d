"""The Triton backend (kernels/): the same functions as `reference`, on any GPU that Triton compiles for.

With TRITON_INTERPRET=1 the kernels run on CPU tensors in Triton's interpreter, for tests: only when asked for by name.
Nothing here waits for the GPU, and memory is allocated for results and O(n) workspace only, so that a call can be
captured in a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

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
    readable,
    refuse_orders,
    sink_gradient,
    zeroed,
)
from . import shared
from .launch import launch
from .shared import device_reasons  # asked of every backend

WIDEST = 256  # head dimension


def not_supported_reasons(call: Call) -> list[str]:
    """Why this backend cannot serve `call`."""
    reasons = device_reasons(call.device)
    if call.dtype == torch.float64:
        reasons.append("it computes in float32, which float64 inputs do not allow")
    if max(call.D, call.Dv) > WIDEST:
        reasons.append(f"it serves head dimensions up to {WIDEST}; these are {call.D} and {call.Dv}")
    return reasons


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
    query, key, value, mask = *map(readable, (query, key, value)), shared.contiguous(mask)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    nothing = out.numel() == 0 or shared.sees_nothing(mask, key)
    if nothing or leaves_rows(mask.query_order, query):
        out.zero_(), lse_without_keys(lse, sinks)
    if nothing:
        return out, lse
    k = shared.kernels()
    problem = shared.problem_of(query, key, value, mask, scale, dropout_p, dropout_seed)
    B, Hq, Hkv, Nq, Nk, _, Dv = problem.sizes
    tokens, ordered = query.shape[2], mask.query_order is not None or mask.key_order is not None
    inputs = shared.inputs_of(query, key, value, bias, problem, softcap, sinks, diagonals)
    biased = bias is not None or softcap > 0.0 or diagonals is not None
    group = Hq // Hkv

    def run(config: Any) -> None:
        alone = mask.indptr is not None or dropout_p > 0.0 or ordered
        pack = 1 if alone or 2 * Nq > config.block_q else group
        if mask.indptr is None:
            config = k.short(config, k.padded(Nq * pack))
        lines, tiles = B * Hq // pack, shared.tile_count(Nq * pack, config.block_q, mask, 0)
        splits = shared.split_count(
            lines * tiles, shared.key_tile_count(Nk, config.block_k, mask), shared.processors(query.device)
        )
        walked = shared.mask_of(mask, B, False, problem, Hq // pack, lines * tiles > shared.processors(query.device))
        part_out, part_lse = out, lse
        if splits > 1:
            part_out = query.new_empty(splits * B, Hq, tokens, Dv, dtype=torch.float32)
            part_lse = query.new_empty(splits * B, Hq, tokens, dtype=torch.float32)
            if leaves_rows(mask.query_order, query):
                part_lse.fill_(-math.inf)
        section = shared.section_of(lines, Nk, key, value, group // pack)
        _launch(
            k.attention_forward_kernel,
            inputs._replace(mask=walked),
            (*shared.described(k, config, key, value, mask), k.Output(*shared.rows_of(part_out), part_lse)),
            k.Grid(tiles * lines * splits, lines, Hq // pack, section, splits),
            config, mask, problem, {} if splits > 1 else {"walk_k": 32}, pack,
        )  # fmt: skip
        if splits > 1:
            rows, block = B * Hq * tokens, max(1, 1024 // k.padded(Dv))
            launch(
                k.merge_kernel,
                -(-rows // block),
                part_out,
                part_lse,
                shared.rows_of(out),
                lse,
                rows,
                Hq,
                tokens,
                splits,
                Dv,
                k.padded(Dv),
                block,
                warps=4,
            )

    with shared.on_device(query.device):
        run(shared.config_of("forward", query, Dv, mask, problem, biased, run))
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
    query, key, value, mask = *map(readable, (query, key, value)), shared.contiguous(mask)
    B, Hq, Nq, _ = query.shape
    Nk, heads = key.shape[2], 1 if average else Hq
    weights = query.new_empty(B, heads, Nq, Nk)
    if weights.numel() == 0 or Hq == 0 or shared.sees_nothing(mask, key):
        return out, lse, weights.zero_()
    k = shared.kernels()
    problem = shared.problem_of(query, key, value, mask, scale, dropout_p, dropout_seed)
    inputs = shared.inputs_of(query, key, value, bias, problem, *modifiers)._replace(
        mask=shared.mask_of(mask, B, False, problem)
    )
    config = shared.config_of("bias_gradient", query, 0, mask, problem, True)  # the same scores, a tile at a time
    tiles = (-(-Nq // config.block_q), -(-Nk // config.block_k))
    with shared.on_device(query.device):
        launch(k.attention_weights_kernel, B * heads * math.prod(tiles),
            *inputs, shared.upstream_of(out, lse, lse, scale, None, Hq), k.Weights(weights, heads, *tiles, Hq // heads),
            shared.constants_of(config, mask, problem), warps=config.warps, stages=config.stages,
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
    if out.numel() == 0 or shared.sees_nothing(mask, key):
        gradients = modifier_gradients_without_keys(grad_lse, sinks, diagonals, diagonals_require_grad)
        return *zeroed((dq, dk, dv, dbias)), *gradients
    if leaves_rows(mask.query_order, query):
        dq.zero_()
    if leaves_rows(mask.key_order, key) or (mask.key_order is not None and mask.kv_lengths is not None):
        dk.zero_(), dv.zero_()
    query, key, value, out, grad_out = map(readable, (query, key, value, out, grad_out))
    mask = shared.contiguous(mask)
    grad_lse = None if grad_lse is None else grad_lse.to(torch.float32).contiguous()
    lse = lse.contiguous()
    k = shared.kernels()
    problem = shared.problem_of(query, key, value, mask, scale, dropout_p, dropout_seed)
    B, Hq, Hkv, Nq, Nk, _, Dv = problem.sizes
    group, tokens = Hq // Hkv, query.shape[2]
    delta = torch.empty_like(lse)
    inputs = shared.inputs_of(query, key, value, bias, problem, softcap, sinks, diagonals)
    biased = bias is not None or softcap > 0.0 or diagonals is not None
    given = shared.upstream_of(grad_out, lse, delta, scale, grad_weights, Hq)

    def run_keys(config: Any) -> None:
        programs = shared.tile_count(Nk, config.block_k, mask, 1) * B * Hkv
        walked = shared.mask_of(mask, B, True, problem, Hkv, programs > shared.processors(query.device))
        section = shared.section_of(B * Hkv, Nq * group, query, grad_out, 1)
        _launch(
            k.key_gradient_kernel, inputs._replace(mask=walked), (given, shared.rows_of(dk), shared.rows_of(dv)),
            k.Grid(programs, B * Hkv, Hkv, section), config, mask, problem, {"walk_q": 32},
        )  # fmt: skip

    def run_queries(config: Any) -> None:
        programs = shared.tile_count(Nq, config.block_q, mask, 0) * B * Hq
        walked = shared.mask_of(mask, B, False, problem, Hq, programs > shared.processors(query.device))
        section = shared.section_of(B * Hq, Nk, key, value, group)
        _launch(
            k.query_gradient_kernel, inputs._replace(mask=walked), (given, shared.rows_of(dq)),
            k.Grid(programs, B * Hq, Hq, section), config, mask, problem, {"walk_k": 32},
        )  # fmt: skip

    with shared.on_device(query.device):
        rows, block = B * Hq * tokens, 32
        launch(
            k.delta_kernel,
            -(-rows // block),
            shared.rows_of(out),
            shared.rows_of(grad_out),
            grad_lse,
            delta,
            rows,
            Hq,
            tokens,
            Dv,
            k.padded(Dv),
            block,
            warps=4,
        )
        if grad_weights is not None:
            config = shared.config_of("query_gradient", query, Dv, mask, problem, biased)
            programs = shared.tile_count(Nq, config.block_q, mask, 0) * B * Hq
            launch(k.weight_products_kernel, programs,
                *inputs._replace(mask=shared.mask_of(mask, B, False, problem, Hq)), given,
                k.Grid(programs, B * Hq, Hq, shared.section_of(B * Hq, Nk, key, value, group)),
                shared.constants_of(config, mask, problem), warps=config.warps, stages=config.stages,
            )  # fmt: skip
        run_keys(shared.config_of("key_gradient", query, Dv, mask, problem, biased, run_keys))
        run_queries(shared.config_of("query_gradient", query, Dv, mask, problem, biased, run_queries))
        config = shared.config_of("bias_gradient", query, Dv, mask, problem, True)
        inputs = inputs._replace(mask=shared.mask_of(mask, B, False, problem))
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
    problem: shared.Problem,
    steps: dict[str, int],
    pack: int = 1,
) -> None:
    """Launch a kernel, and where the mask hides pairs once more for the tiles that a NaN behind it has spoiled, in
    smaller `steps`."""
    hides = shared.hides_pairs(
        mask, inputs.bias.ptr if inputs.modifiers.diagonals is None else inputs.modifiers.diagonals
    )
    programs, device = grid.programs, inputs.q.ptr.device
    flags = torch.empty(programs, dtype=torch.int32, device=device) if hides else None
    for safe in (False, True) if hides else (False,):
        if safe:
            config, programs = shared.kernels().safe(config, **steps), min(programs, shared.processors(device))
        launch(kernel, programs,
            *inputs, *arguments, flags, grid, shared.constants_of(config, mask, problem, pack, grid.splits > 1, safe),
            warps=config.warps, stages=config.stages,
        )  # fmt: skip


def _bias_gradient(
    k: Any,
    config: Any,
    inputs: Any,
    given: Any,
    bias: Tensor,
    dbias: Tensor,
    mask: MaskArrays,
    problem: shared.Problem,
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
    launch(k.bias_gradient_kernel, target.shape[0] * target.shape[1] * math.prod(out_tiles),
        *inputs, given, k.Bias(target, *target.stride()), k.Broadcast(target.shape[1], *out_tiles, *loops),
        shared.constants_of(config, mask, problem), sum_q, sum_k, False, warps=config.warps,
        stages=config.stages,
    )  # fmt: skip
    if target is not dbias:
        dbias.copy_(target.sum_to_size(dbias.shape))


def _diagonal_gradient(
    k: Any, config: Any, inputs: Any, given: Any, diagonals: Tensor, mask: MaskArrays, problem: shared.Problem
) -> Tensor:
    """ddiagonals: square tiles are summed up along diagonals of tiles, (.., tiles, side, side), and each sum is skewed
    and laid beside its neighbours."""
    B, Hq, _Hkv, Nq, Nk = problem.sizes[:5]
    config = k.square(config, max(problem.sizes[5:]))
    side = config.block_q
    q_tiles, k_tiles = -(-Nq // side), -(-Nk // side)
    count, lines = q_tiles + k_tiles - 1, diagonals.shape[:2]
    sums = diagonals.new_empty(*lines, count, side, side)
    launch(k.bias_gradient_kernel, lines[0] * lines[1] * count,
        *inputs, given, k.Bias(sums, *sums.stride()[:2], side, 1),
        k.Broadcast(lines[1], count, 1, B // lines[0], Hq // lines[1], 1, k_tiles),
        shared.constants_of(config, mask, problem), False, False, True, warps=config.warps,
        stages=config.stages,
    )  # fmt: skip
    # Of a tile, (r, c) belongs to r - c: with its columns turned round, r + c' after the skew.
    skewed = F.pad(sums.flip(-1), (0, side)).flatten(-2)[..., : side * (2 * side - 1)]
    along = skewed.unflatten(-1, (side, 2 * side - 1)).sum(-2)  # (.., tiles, 2 side - 1)
    first = F.pad(along[..., :side].flatten(-2), (0, side))
    second = F.pad(F.pad(along[..., side:], (0, 1)).flatten(-2), (side, 0))
    start = k_tiles * side - Nk
    return (first + second)[..., start : start + Nq + Nk - 1].contiguous()
