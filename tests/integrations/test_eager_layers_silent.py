"""What converted layers must not change without a word: configurations, dropout, precision, other processes."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from efficient_attn import convert

transformers = pytest.importorskip("transformers")

BERT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
BERT |= {"intermediate_size": 64, "max_position_embeddings": 64}
BLOOM = {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}
IDS = torch.randint(3, 49, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, 8:] = 0


def bloom(**options):
    torch.manual_seed(0)
    return transformers.BloomForCausalLM(transformers.BloomConfig(**BLOOM, **options)).eval()


def mpnet(**options):
    torch.manual_seed(0)
    return transformers.MPNetModel(transformers.MPNetConfig(**BERT, **options)).eval()


def gradients(model, **arguments):
    model.zero_grad()
    out = model(IDS, attention_mask=MASK, **arguments)[0]
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)) * MASK[..., None]
    (out * weights).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", [bloom, mpnet])
def test_two_models_of_one_configuration_do_not_share_what_convert_does(make) -> None:
    first = make()
    second = type(first)(first.config).eval()  # the same object goes in
    before = second(IDS, attention_mask=MASK)[0]
    report = convert(first, "sliding_window:left=1,right=1")
    assert torch.equal(second(IDS, attention_mask=MASK)[0], before)
    assert not any("efficient_attn_method" in vars(m) for m in second.modules())
    other = copy.deepcopy(first)
    changed = first(IDS, attention_mask=MASK)[0]
    report.undo()
    assert torch.equal(other(IDS, attention_mask=MASK)[0], changed)  # a copy keeps what it had
    assert not torch.equal(first(IDS, attention_mask=MASK)[0], changed)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = bloom()
    before = gradients(model)
    convert(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for a, b in zip(gradients(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [bloom, mpnet])
def test_autocast_is_as_near_to_float32_as_eager(make) -> None:
    model = make()
    exact = model(IDS, attention_mask=MASK)[0][MASK.bool()]
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(IDS, attention_mask=MASK)[0][MASK.bool()].float()
    convert(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(IDS, attention_mask=MASK)[0][MASK.bool()].float()
        gradients(model)
    assert (ours - exact).abs().max() <= 1.5 * (eager - exact).abs().max() + 2**-8 * exact.abs().max()


@pytest.mark.parametrize("make", [bloom, mpnet])
def test_dropout_in_training_and_none_after(make) -> None:
    name = "attention_dropout" if make is bloom else "attention_probs_dropout_prob"
    other = {"hidden_dropout": 0.0} if make is bloom else {"hidden_dropout_prob": 0.0}
    model = make(**{name: 0.5}, **other)
    before = model(IDS, attention_mask=MASK)[0]
    convert(model)
    model.train()
    torch.manual_seed(0)
    a, b = (model(IDS, attention_mask=MASK)[0] for _ in range(2))
    torch.manual_seed(0)
    again = model(IDS, attention_mask=MASK)[0]
    assert not torch.equal(a, b) and torch.equal(a, again)
    after = model.eval()(IDS, attention_mask=MASK)[0]
    torch.testing.assert_close(after[MASK.bool()], before[MASK.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [bloom, mpnet])
def test_a_row_of_padding_alone_gives_numbers_and_gradients(make) -> None:
    model = make()
    convert(model)
    mask = MASK.clone()
    mask[0] = 0
    out = model(IDS, attention_mask=mask)[0]
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(out[1:], model(IDS[1:], attention_mask=mask[1:])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [pytest.param(bloom, marks=pytest.mark.slow), mpnet])
def test_a_compiled_model_gives_the_same(make) -> None:
    model = make()
    before = model(IDS, attention_mask=MASK)[0]
    convert(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        after = compiled(IDS, attention_mask=MASK)[0]
    torch.testing.assert_close(after[MASK.bool()], before[MASK.bool()], rtol=1e-4, atol=1e-5)


READ = """
import sys, torch, transformers
from efficient_attn import convert
model = transformers.BloomForCausalLM.from_pretrained(sys.argv[1]).eval()
convert(model, "sliding_window:left=2,right=0")
assert torch.allclose(model(torch.load(sys.argv[1] + "/ids.pt"))[0], torch.load(sys.argv[1] + "/out.pt"), atol=1e-5)
whole = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
assert torch.allclose(whole(torch.load(sys.argv[1] + "/ids.pt"))[0], torch.load(sys.argv[1] + "/out.pt"), atol=1e-5)
"""


def test_saved_here_and_read_in_another_process(tmp_path) -> None:
    model = bloom()
    names = list(model.state_dict())
    convert(model, "sliding_window:left=2,right=0")
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert "efficient_attn" not in (tmp_path / "config.json").read_text()
    torch.save(IDS, tmp_path / "ids.pt")
    torch.save(model(IDS)[0].detach(), tmp_path / "out.pt")
    torch.save(model, tmp_path / "model.pt")
    subprocess.run([sys.executable, "-c", READ, str(tmp_path)], check=True, timeout=120)
