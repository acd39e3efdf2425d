"""OpenVINO's ScaledDotProductAttention on CPUs: a model of one operator, on the caller's memory."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from efficient_attn import attention

from . import Pair, Peer, Shape, missing


def _build(causal: bool, shape: Shape) -> Pair:
    vino, opset = importlib.import_module("openvino"), importlib.import_module("openvino.opset13")
    kinds = {torch.float32: vino.Type.f32, torch.bfloat16: vino.Type.bf16}
    if shape.dtype not in kinds:
        raise NotImplementedError(f"float32 and bfloat16 are compared, got {shape.dtype}")
    query, key, value = (t.contiguous() for t in shape.qkv())
    kind = kinds[shape.dtype]
    parameters = [opset.parameter(list(query.shape), kind) for _ in range(3)]
    model = vino.Model([opset.scaled_dot_product_attention(*parameters, causal=causal)], parameters)
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": kind.get_type_name()}
    request = vino.Core().compile_model(model, "CPU", settings).create_infer_request()
    out = torch.empty_like(query)

    def tensor_of(t: Tensor) -> Any:
        flat = t.view(torch.int16).numpy() if t.dtype == torch.bfloat16 else t.numpy()
        return vino.Tensor(flat, list(t.shape), kind)

    def theirs(*tensors: Tensor) -> Tensor:
        for index, tensor in enumerate(tensors):
            request.set_input_tensor(index, tensor_of(tensor))
        request.set_output_tensor(tensor_of(out))
        request.infer()
        return out

    def ours(*tensors: Tensor) -> Tensor:
        return attention(*tensors, is_causal=causal)

    return Pair((query, key, value), ours, theirs, shape.tolerance)


def _peer(name: str, causal: bool) -> Peer:
    computes = f"exact attention{', causal' if causal else ''}, forward"
    return Peer(name, computes, lambda shape: _build(causal, shape), "openvino", _absent, trains=False, apart=True)


_absent = missing("openvino", "openvino")
PEERS = (_peer("openvino", False), _peer("openvino_causal", True))
