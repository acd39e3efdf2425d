"""A batch that is padded on the left gives each row what it gives alone, with every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from efficient_attn import BlockMask, MultiheadAttention
from efficient_attn.errors import UnsupportedError
from efficient_attn.methods import parse

transformers = pytest.importorskip("transformers")

from efficient_attn.integrations.huggingface import register  # noqa: E402
from efficient_attn.methods.left_padding import Turned  # noqa: E402
from efficient_attn.models.attention import Attention  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37, "vocab_size": 50,
    "max_position_embeddings": 64,
}  # fmt: skip
N = 45
PADS = (0, 5, 11)  # as many blocks of 16 as without: what is drawn at random goes by their number
SPECS = [
    "longformer:window=4,global_tokens=1", "fixed:stride=8",
    "bigbird:block=16,window=1,global_blocks=1,random_blocks=1",
    "strided:stride=8", "dilated:left=3,right=3", "prefix_lm:prefix=4",
    "deepspeed_fixed:num_local_blocks=2", "deepspeed_variable", "deepspeed_bigbird:num_sliding_window_blocks=1",
    "deepspeed_bslongformer:num_sliding_window_blocks=1", "deepspeed_local:num_sliding_window_blocks=1",
    "topk_blocks:block=16,blocks=1,queries=first", "topp_blocks:block=16,mass=0.5,queries=first", "lsh:n_buckets=4",
    "sliding_window:left=4,right=4", "linear", "performer:features=16", "linformer:rank=8,max_len=64",
    "nystrom:landmarks=8", "bigbird:block=16,window=1,global_blocks=1,random_blocks=0+centroid:block=16",
    "sliding_window:left=4,right=4+performer:features=16,block=16", "longformer:window=4,global_tokens=1 & causal",
]  # fmt: skip


def build(kind: str, spec: str, **changes: Any) -> Any:
    register()
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    class_ = getattr(transformers, f"{kind}Model" if kind == "Bert" else f"{kind}ForCausalLM")
    model = class_._from_config(config, attn_implementation=f"efficient_attn:{spec}").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, what is real, and positions that count the real ones."""
    torch.manual_seed(1)
    real = torch.arange(N) >= torch.tensor(PADS)[:, None]
    return torch.randint(3, 49, (len(PADS), N)) * real, real, (real.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_an_encoder(spec: str, weights: bool) -> None:
    model = build("Bert", spec)
    ids, real, positions = batch()
    with torch.no_grad():
        together = model(ids, attention_mask=real.long(), position_ids=positions, output_attentions=weights)
        for row, pad in enumerate(PADS):
            alone = model(ids[row : row + 1, pad:], output_attentions=weights)
            torch.testing.assert_close(together[0][row, pad:], alone[0][0], atol=2e-4, rtol=1e-3)
            if weights:
                for a, b in zip(together.attentions, alone.attentions, strict=True):
                    torch.testing.assert_close(a[row, :, pad:, pad:], b[0], atol=1e-4, rtol=1e-3)


CAUSAL = [spec for spec in SPECS if parse(spec).accepts_causal and "nystrom" not in spec]


@pytest.mark.parametrize("spec", CAUSAL)
def test_a_decoder(spec: str) -> None:
    model = build("Llama", spec)
    ids, real, positions = batch()
    with torch.no_grad():
        together = model(ids, attention_mask=real.long(), position_ids=positions).logits
        for row, pad in enumerate(PADS):
            alone = model(ids[row : row + 1, pad:]).logits[0]
            torch.testing.assert_close(together[row, pad:], alone, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("spec", [s for s in CAUSAL if parse(s).counts_positions and "+" not in s])
def test_generation(spec: str) -> None:
    if parse(spec).pattern.by_content:
        pytest.skip("what is chosen goes by blocks of the cache")
    model = build("Llama", spec)
    ids, real, _ = batch()
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    together = model.generate(ids, attention_mask=real.long(), **settings).logits
    for row, pad in enumerate(PADS):
        alone = model.generate(ids[row : row + 1, pad:], attention_mask=real[row : row + 1, pad:].long(), **settings)
        for a, b in zip(together, alone.logits, strict=True):
            torch.testing.assert_close(a[row], b[0], atol=1e-2, rtol=1e-3)


def test_tensor_masks_and_biases_are_turned_too() -> None:
    """A 4-D mask of a user's, with padding in every row of it, and T5's bias."""
    model = build("Bert", "longformer:window=4,global_tokens=1")
    ids, real, positions = batch()
    seen = torch.rand(N, N) > 0.2
    together = model(ids, attention_mask=real[:, None, None].expand(-1, 1, N, -1), position_ids=positions)[0]
    for row, pad in enumerate(PADS):
        torch.testing.assert_close(together[row, pad:], model(ids[row : row + 1, pad:])[0][0], atol=2e-4, rtol=1e-3)
    turned = Turned.by(torch.tensor(PADS), N)
    call = turned.call({"mask": seen[None, None], "bias": torch.randn(1, 4, N, 1)})
    assert torch.equal(call["mask"][1, 0, : N - 5, : N - 5], seen[5:, 5:])
    assert call["bias"].shape == (len(PADS), 4, N, 1)
    for mask in (BlockMask.from_dense(seen), BlockMask.from_lengths([N] * 3, q_len=N, kv_len=N)):
        with pytest.raises(UnsupportedError, match="padded on the left"):
            turned.call({"mask": mask})


@pytest.mark.parametrize("spec", SPECS)
def test_the_module_and_a_layer(spec: str) -> None:
    """`MultiheadAttention` with key_padding_mask and the models' own layer, which is causal where it can be."""
    method = parse(spec)
    torch.manual_seed(0)
    module = MultiheadAttention(32, 4, batch_first=True, attention=method).double().eval()
    last = method.tail if hasattr(method, "tail") else method
    layer = Attention(32, 4, 2, causal=last.accepts_causal, attention=method).double().eval()
    x, real = torch.randn(len(PADS), N, 32, dtype=torch.float64), torch.arange(N) >= torch.tensor(PADS)[:, None]
    causal = {"attn_mask": ~torch.ones(N, N, dtype=torch.bool).tril()} if method.accepts_mask else {}
    for call in ({}, causal):
        try:
            together, weights = module(x, x, x, key_padding_mask=~real, **call)
        except UnsupportedError:
            assert call
            continue
        for row, pad in enumerate(PADS):
            y = x[row : row + 1, pad:]
            alone, of_one = module(y, y, y, **{name: mask[pad:, pad:] for name, mask in call.items()})
            torch.testing.assert_close(together[row, pad:], alone[0])
            torch.testing.assert_close(weights[row, pad:, pad:], of_one[0])
    together = layer(x, key_mask=real)[0]
    for row, pad in enumerate(PADS):
        torch.testing.assert_close(together[row, pad:], layer(x[row : row + 1, pad:])[0][0])
