"""ONNX Runtime's attention on CPUs: MultiHeadAttention and GroupQueryAttention of its contributed operators.

Each is a graph of one operator, run on the caller's memory (IO binding), on as many threads as PyTorch has.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efficient_attn import attention

from . import Pair, Peer, Shape, missing

GROUP = 4  # query heads of one key head


def _session(operator: str, inputs: Mapping[str, Tensor], outputs: Sequence[str], **attributes: Any) -> Any:
    onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    helper, types = onnx.helper, onnx.TensorProto
    kinds = {torch.float32: types.FLOAT, torch.int32: types.INT32}
    values = [helper.make_tensor_value_info(n, kinds[t.dtype], list(t.shape)) for n, t in inputs.items() if n]
    node = helper.make_node(operator, list(inputs), outputs, domain="com.microsoft", **attributes)
    results = [helper.make_tensor_value_info(name, types.FLOAT, None) for name in outputs]
    graph = helper.make_graph([node], "attention", values, results)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: Mapping[str, Tensor], out: Tensor) -> Tensor:
    """One run on these tensors, contiguous and alive until it is done; what else it returns is thrown away."""
    binding = session.io_binding()
    names = {torch.float32: "float32", torch.int32: "int32"}
    numpy = importlib.import_module("numpy")
    for name, tensor in inputs.items():
        binding.bind_input(name, "cpu", 0, getattr(numpy, names[tensor.dtype]), list(tensor.shape), tensor.data_ptr())
    binding.bind_output("out", "cpu", 0, numpy.float32, list(out.shape), out.data_ptr())
    for result in session.get_outputs()[1:]:
        binding.bind_output(result.name, "cpu")
    session.run_with_iobinding(binding)
    return out


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H * D) as (B, H, N, D), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _multi_head(shape: Shape) -> Pair:
    if shape.dtype != torch.float32:
        raise NotImplementedError(f"its CPU operator takes float32, got {shape.dtype}")
    query, key, value = (t.transpose(1, 2).flatten(2).contiguous() for t in shape.qkv())
    inputs = {"query": query, "key": key, "value": value}
    session = _session("MultiHeadAttention", inputs, ["out"], num_heads=shape.heads)
    out = torch.empty_like(query)

    def theirs(*tensors: Tensor) -> Tensor:
        return _run(session, dict(zip(inputs, tensors, strict=True)), out)

    def ours(*tensors: Tensor) -> Tensor:
        return attention(*(_heads(t, shape.heads) for t in tensors)).transpose(1, 2).flatten(2)

    return Pair((query, key, value), ours, theirs, shape.tolerance)


def _grouped(shape: Shape) -> Pair:
    """Causal, a prompt at the start of an empty cache: what GroupQueryAttention is for."""
    if shape.dtype != torch.float32:
        raise NotImplementedError(f"its CPU operator takes float32, got {shape.dtype}")
    kv_heads = max(1, shape.heads // GROUP)
    query, key, value = shape.qkv()
    query, key, value = (
        t.transpose(1, 2).flatten(2).contiguous() for t in (query, key[:, :kv_heads], value[:, :kv_heads])
    )
    empty = query.new_zeros(shape.batch, kv_heads, 0, shape.head_dim)
    fixed = {
        "past_key": empty, "past_value": empty,
        "seqlens_k": torch.full((shape.batch,), shape.seqlen - 1, dtype=torch.int32),
        "total_sequence_length": torch.tensor([shape.seqlen], dtype=torch.int32),
    }  # fmt: skip
    inputs = {"query": query, "key": key, "value": value, **fixed}
    session = _session(
        "GroupQueryAttention", inputs, ["out", "present_key", "present_value"],
        num_heads=shape.heads, kv_num_heads=kv_heads,
    )  # fmt: skip
    out = torch.empty_like(query)

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _run(session, {"query": query, "key": key, "value": value, **fixed}, out)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = (_heads(query, shape.heads), _heads(key, kv_heads), _heads(value, kv_heads))
        return attention(*heads, is_causal=True).transpose(1, 2).flatten(2)

    note = "theirs also writes its cache of keys and values"
    return Pair((query, key, value), ours, theirs, shape.tolerance, note)


def _absent() -> str | None:
    return missing("onnxruntime", "onnxruntime")() or missing("onnx", "onnx")()


def _peer(name: str, computes: str, build: Any) -> Peer:
    return Peer(name, computes, build, "onnxruntime", _absent, trains=False, apart=True)


PEERS = (
    _peer("onnxruntime_mha", "exact attention, forward", _multi_head),
    _peer("onnxruntime_gqa", f"exact attention, causal, {GROUP} query heads for each key head, forward", _grouped),
)
