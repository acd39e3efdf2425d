"""What cannot be served says what was given, what is allowed and what to do, wherever it comes from."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from efficient_attn import BlockMask, attention
from efficient_attn.errors import InputError, InputTypeError, MaskError, UnsupportedError
from efficient_attn.methods import DENSE, parse

transformers = pytest.importorskip("transformers")

from efficient_attn.integrations import huggingface  # noqa: E402
from efficient_attn.integrations.huggingface import register  # noqa: E402
from efficient_attn.integrations.huggingface_masks import PairMask  # noqa: E402

X = torch.randn(1, 2, 32, 8)
TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37, "vocab_size": 128,
}  # fmt: skip
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4}
IDS = torch.randint(3, 40, (2, 10))


def build(model: str, config: str, implementation: str, **options: Any) -> Any:
    register()
    made = getattr(transformers, config)(**options)
    return getattr(transformers, model)._from_config(made, attn_implementation=implementation).eval()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), torch.tensor(float("-inf"))])
@pytest.mark.parametrize("spec", ["dense", "bigbird", "linformer", "nystrom", "performer", "bigbird+centroid"])
def test_a_scale_is_a_finite_number(spec: str, scale: Any) -> None:
    method = parse(spec)
    with pytest.raises(InputError, match="scale"):
        method.attend(X, X, X, state=method.build(16, 2, 8), scale=scale)
    with pytest.raises(InputTypeError, match="scale must be a number or None, got 'a'"):
        method.attend(X, X, X, state=method.build(16, 2, 8), scale="a")  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", [1, 1.0, None, "s", torch.ones(()), torch.ones(1, dtype=torch.int32)])
def test_a_predicate_returns_bools(answer: Any) -> None:
    with pytest.raises(MaskError, match="must return a bool tensor"):
        BlockMask.from_predicate(lambda b, h, i, j: answer, q_len=32, kv_len=32)


def test_a_predicate_returns_what_its_indices_broadcast_to() -> None:
    with pytest.raises(MaskError, match="broadcast"):
        BlockMask.from_predicate(lambda b, h, i, j: torch.ones(3, 3, dtype=torch.bool), q_len=32, kv_len=32)
    mask = BlockMask.from_predicate(lambda b, h, i, j: True, q_len=32, kv_len=32)  # type: ignore[arg-type, return-value]
    assert mask.density == 1


def test_masks_made_under_inference_mode_can_train() -> None:
    seen = torch.rand(32, 32) > 0.3
    lengths = torch.tensor([5])
    wanted = [BlockMask.from_dense(seen), BlockMask.from_lengths(lengths, q_len=32, kv_len=32)]
    with torch.inference_mode():
        made = [BlockMask.from_dense(seen), BlockMask.from_lengths(lengths, q_len=32, kv_len=32)]
    for masks in (wanted, made):
        masks.append(masks[0] & masks[1])
    for mask, right in zip(made, wanted, strict=True):
        gradients = []
        for each in (mask, right):
            q = X.clone().requires_grad_()
            gradients += torch.autograd.grad(attention(q, q, q, mask=each).square().sum(), q)
        assert torch.equal(*gradients)


def siglip2(implementation: str) -> Tensor:
    model = build("Siglip2VisionModel", "Siglip2VisionConfig", implementation, **VISION, num_patches=16, patch_size=2)
    there = torch.tensor([[1] * 12 + [0] * 4])
    return model(torch.randn(1, 16, 12), pixel_attention_mask=there, spatial_shapes=torch.tensor([[3, 4]]))[0]


def doge(implementation: str) -> Tensor:
    return build("DogeModel", "DogeConfig", implementation, **TEXT, num_key_value_heads=2)(IDS)[0]


def informer(implementation: str) -> Tensor:
    sizes = {
        f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    options = {"prediction_length": 4, "context_length": 8, "d_model": 16, "lags_sequence": [1, 2]}
    model = build("InformerModel", "InformerConfig", implementation, **sizes, **options, num_time_features=1)
    past = {"past_values": torch.randn(2, 10), "past_observed_mask": torch.ones(2, 10)}
    future = {"future_values": torch.randn(2, 4), "future_time_features": torch.randn(2, 4, 1)}
    return model(**past, past_time_features=torch.randn(2, 10, 1), **future)[0]


def git(implementation: str) -> Tensor:
    vision = {**VISION, "image_size": 8, "patch_size": 4}
    return build("GitModel", "GitConfig", implementation, **TEXT, vision_config=vision)(IDS)[0]


def sam(implementation: str) -> Tensor:
    vision = {**VISION, "output_channels": 16, "image_size": 16, "patch_size": 4, "window_size": 2, "mlp_dim": 16}
    return build("SamVisionModel", "SamVisionConfig", implementation, **vision)(torch.randn(1, 3, 16, 16))[0]


@pytest.mark.parametrize("model", [git, sam])
def test_models_that_cannot_be_served_are_refused(model: Any) -> None:
    model("eager")
    with pytest.raises(UnsupportedError, match=r"by name in a table") as refusal:
        model("efficient_attn:sliding_window:left=4,right=4")
    assert "eager" in str(refusal.value)


def test_layers_that_no_name_reaches_are_refused_when_it_is_set() -> None:
    register()
    vision = {**VISION, "output_channels": 16, "image_size": 16, "patch_size": 4, "window_size": 2, "mlp_dim": 16}
    model = build("SamVisionModel", "SamVisionConfig", "eager", **vision)
    with pytest.raises(UnsupportedError, match="SamVisionAttention, when it was made"):
        model.set_attn_implementation("efficient_attn")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 1, "num_heads": 4, "vocab_size": 50}
    for set_name in (
        lambda name: build("LongT5Model", "LongT5Config", name, **sizes),
        lambda name: build("LongT5Model", "LongT5Config", "eager", **sizes).set_attn_implementation(name),
    ):
        set_name("efficient_attn")
        with pytest.raises(UnsupportedError, match="its encoder's local"):
            set_name("efficient_attn:sliding_window")


@pytest.mark.parametrize("model", [siglip2, doge, informer])
def test_models_that_calculate_with_their_mask_are_served(model: Any) -> None:
    """A tensor stands in for the mask where they ask for one."""
    outs = []
    for implementation in ("eager", "efficient_attn"):
        torch.manual_seed(0)
        outs.append(model(implementation))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)


def test_wide_heads_say_what_a_user_of_transformers_can_do() -> None:
    wide = build("BertModel", "BertConfig", "efficient_attn", **{**TEXT, "hidden_size": 1200, "num_attention_heads": 2})
    with pytest.raises(InputError, match="attn_implementation"):
        wide(IDS)


def padded() -> PairMask:
    """Causal, 2 x 4 x 6, with two keys of padding in the first row."""
    key_mask = torch.ones(2, 6, dtype=torch.bool)
    key_mask[0, 4:] = False
    return PairMask((2, 1, 4, 6), key_mask, BlockMask(4, 6, window=(-1, 0), window_offset=2), start=2)


MASK = padded().dense()
ADDED = torch.zeros(2, 1, 4, 6).masked_fill(~MASK, torch.finfo(torch.float32).min)
NUMBERS = torch.randn(2, 1, 4, 6)


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda m: m[:, :, 1:, :3], MASK[:, :, 1:, :3]),
        (lambda m: m[:, 0], MASK[:, 0]),
        (lambda m: m[..., -1:], MASK[..., -1:]),
        (lambda m: m[:, :, None], MASK[:, :, None]),
        (lambda m: m[:1, :, :, :6], MASK[:1]),
        (lambda m: torch.stack([m, m]), torch.stack([MASK, MASK])),
        (lambda m: m.expand(-1, 3, -1, -1), MASK.expand(-1, 3, -1, -1)),
        (lambda m: m.repeat(1, 2, 1, 1), MASK.repeat(1, 2, 1, 1)),
        (lambda m: m.repeat_interleave(2, dim=0), MASK.repeat_interleave(2, dim=0)),
        (lambda m: m.transpose(2, 3)[..., :2], MASK.transpose(2, 3)[..., :2]),
        (lambda m: torch.cat([m, m[..., :1]], -1), torch.cat([MASK, MASK[..., :1]], -1)),
        (lambda m: torch.cat([torch.zeros(2, 1, 4, 2), m], -1), torch.cat([torch.zeros(2, 1, 4, 2), ADDED], -1)),
        (lambda m: m[:, :, :2] + NUMBERS[:, :, :2], ADDED[:, :, :2] + NUMBERS[:, :, :2]),
        (lambda m: NUMBERS + m, ADDED + NUMBERS),
        (lambda m: torch.add(NUMBERS, m), ADDED + NUMBERS),
        (lambda m: m & (NUMBERS > 0), MASK & (NUMBERS > 0)),
        (lambda m: (NUMBERS > 0) | m, MASK | (NUMBERS > 0)),
        (lambda m: NUMBERS.masked_fill(~m, 0), NUMBERS.masked_fill(~MASK, 0)),
        (lambda m: NUMBERS.masked_fill(m.logical_not(), 0), NUMBERS.masked_fill(~MASK, 0)),
        (lambda m: torch.where(m, NUMBERS, 0), torch.where(MASK, NUMBERS, 0)),
        (lambda m: m.to("cpu", torch.float32).contiguous(), MASK),
    ],
)
def test_a_pair_mask_is_a_tensor_where_a_model_needs_one(use: Any, expected: Tensor) -> None:
    found = use(padded())
    assert found.shape == expected.shape and found.dtype == expected.dtype and found.dim() == found.ndim
    assert torch.equal(found.dense() if isinstance(found, PairMask) else found, expected)


def test_a_pair_mask_is_made_only_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    dense = PairMask.dense
    monkeypatch.setattr(PairMask, "dense", lambda self: (made.append(1), dense(self))[1])
    mask = padded()
    assert mask.dtype == torch.bool and torch.device(mask.device).type == "cpu"
    assert mask.size(2) == 4 and mask.size() == mask.shape == (2, 1, 4, 6) and mask.dim() == mask.ndim == 4
    assert mask.contiguous() is mask and mask.to("cpu").key_mask is not None
    for whole in (mask[:], mask[:, :, :, :6], mask[:, :, :4], mask[:, :, :, :99]):
        assert whole is mask
    assert not made
    assert mask[:, :, :3] is not mask and made


def test_one_row_of_a_mask_is_one_for_every_query() -> None:
    row = torch.tensor([[True, True, False, True, True]])
    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 5, 8)
    layer = torch.nn.Module()
    found, _ = huggingface.attend(DENSE, layer, query, key, key, PairMask((1, 1, 1, 5), None, row[None, None]))
    expected, _ = huggingface.attend(DENSE, layer, query, key, key, row[:, None, None].expand(1, 1, 4, 5))
    torch.testing.assert_close(found, expected)


def test_a_pair_mask_refuses_what_means_two_things() -> None:
    """Hidden is the least number in eager's masks, and False here: other numbers would come of it, silently."""
    mask = PairMask((1, 1, 4, 4))
    for use in (
        lambda: mask + 1, lambda: 1 - mask, lambda: mask * 2, lambda: torch.ones(1) * mask, lambda: list(mask),
        lambda: mask < 0, lambda: mask.masked_fill(mask, 0), lambda: mask.float(),
        lambda: torch.nn.functional.pad(mask, (1, 0)), lambda: mask.sum(),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match="attention mask"):
            use()
    assert not hasattr(mask, "sum") and not hasattr(mask, "nothing_known") and mask.dim() == mask.ndim == 4
    assert mask.dtype == torch.bool and mask.size() == mask.shape and mask.size(-1) == 4
    assert copy.deepcopy(mask).shape == pickle.loads(pickle.dumps(mask)).shape == mask.shape
