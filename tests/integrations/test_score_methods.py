"""Layers past transformers' interface whose scores are one method, against eager: out, gradients, what they write."""

from __future__ import annotations

import pytest
import torch

from efficient_attn import convert

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
MODELS = {
    "GPTJ": ("GPTJForCausalLM", "GPTJConfig", {**TEXT, "rotary_dim": 4, "eos_token_id": 2}),
    "CodeGen": ("CodeGenForCausalLM", "CodeGenConfig", {**TEXT, "rotary_dim": 4, "n_ctx": 64, "eos_token_id": 2}),
    "GPTNeo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {"vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4, "bos_token_id": 1}
        | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "eos_token_id": 2},
    ),
    "GPTNeoXJapanese": (
        "GPTNeoXJapaneseForCausalLM",
        "GPTNeoXJapaneseConfig",
        {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1}
        | {"eos_token_id": 2},
    ),
    "ImageGPT": ("ImageGPTForCausalImageModeling", "ImageGPTConfig", {**TEXT, "scale_attn_by_inverse_layer_idx": True}),
}
IDS = torch.randint(3, 49, (2, 14), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0


def make(family: str):
    model, config, options = MODELS[family]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**options))
    with torch.no_grad():
        for parameter in made.parameters():  # beyond the initial 0.02, so that attention decides over what comes out
            parameter.mul_(3)
    return made.eval()


def run(model, mask=MASK):
    model.zero_grad()
    out = model(IDS, attention_mask=mask).logits[mask.bool()]
    out.square().sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", MODELS)
def test_equal_to_eager_and_back(family: str) -> None:
    model = make(family)
    before = run(model)
    report = convert(model, sample={"input_ids": IDS}, repeats=0)
    assert len(report.converted) == 2 and report.dense_error is not None and not report.skipped
    out, gradients = run(model)
    torch.testing.assert_close(out, before[0], rtol=1e-4, atol=1e-4)
    largest = max(float(g.abs().max()) for g in before[1])
    assert all((a - b).abs().max() <= 2e-5 * largest for a, b in zip(gradients, before[1], strict=True))
    report.undo()
    assert torch.equal(run(model)[0], before[0])


@pytest.mark.parametrize("family", [name for name in MODELS if name != "ImageGPT"])
def test_generates_what_eager_does(family: str) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model = make(family)
    before = model.generate(IDS, attention_mask=MASK, **options)
    convert(model)
    assert torch.equal(model.generate(IDS, attention_mask=MASK, **options), before)


@pytest.mark.parametrize("family", MODELS)
def test_another_method_changes_and_says_what(family: str) -> None:
    model = make(family)
    before = model(IDS).logits
    report = convert(model, "sliding_window:left=2,right=0", sample={"input_ids": IDS}, repeats=0)
    after = model(IDS).logits
    assert report.error is not None and report.error > 1e-3
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=1e-4, atol=1e-4)  # what the window holds anyway
    assert not torch.allclose(after[:, 8:], before[:, 8:], rtol=1e-3, atol=1e-3)
    assert [name for name, _ in model.named_modules() if "attn" in name or "attention" in name]


def test_weights_are_returned_where_they_are_asked_for() -> None:
    model = make("GPTJ")
    before = model(IDS, output_attentions=True).attentions
    convert(model)
    after = model(IDS, output_attentions=True).attentions
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
