"""Models of diffusers, small ones: our processors and `convert` against the models as they are."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F

from efficient_attn import InputError, InputTypeError, UnsupportedError, attention, convert
from efficient_attn.integrations.diffusers import EfficientAttnProcessor, processors

diffusers = pytest.importorskip("diffusers")
from diffusers.models import attention_processor  # noqa: E402

WINDOW = "sliding_window:left=3,right=3"


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def unet_inputs(batch=2):
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(batch, 4, 8, 8, generator=generator), torch.randn(batch, 7, 12, generator=generator)
    mask = torch.ones(batch, 7)
    mask[0, 4:] = 0
    return {"sample": image, "timestep": 3, "encoder_hidden_states": text, "encoder_attention_mask": mask}


def sd3():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()


def sd3_inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
        "pooled_projections": torch.randn(2, 6, generator=generator),
        "timestep": torch.tensor([1, 2]),
    }


def flux():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def flux_inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 16, 4, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
        "pooled_projections": torch.randn(2, 6, generator=generator),
        "timestep": torch.tensor([1, 2]),
        "img_ids": torch.randn(16, 3, generator=generator).abs(),
        "txt_ids": torch.zeros(5, 3),
    }


MODELS = {"unet": (unet, unet_inputs), "sd3": (sd3, sd3_inputs), "flux": (flux, flux_inputs)}


@pytest.fixture
def served(monkeypatch):
    """What queries methods were called with."""
    from efficient_attn.methods import Sparse

    calls = []
    attend = Sparse.attend
    monkeypatch.setattr(
        Sparse,
        "attend",
        lambda self, query, *a, **k: calls.append((str(self), query.shape)) or attend(self, query, *a, **k),
    )
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_dense_processors_compute_what_the_models_do(name, served):
    make, inputs = MODELS[name]
    model = make()
    expected = model(**inputs()).sample
    assert not served
    model.set_attn_processor(processors(model))
    actual = model(**inputs()).sample
    assert len(served) == len(model.attn_processors) and {spec for spec, _ in served} == {"dense"}
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    actual.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_one_processor_for_a_unet(served):
    model = unet()
    expected = model(**unet_inputs()).sample
    model.set_attn_processor(EfficientAttnProcessor())
    torch.testing.assert_close(model(**unet_inputs()).sample, expected, rtol=1e-4, atol=1e-5)
    assert len(served) == len(model.attn_processors) == 8


def test_self_attention_gets_the_method_and_the_text_stays_dense(served):
    model = unet()
    expected = model(**unet_inputs()).sample
    model.set_attn_processor(EfficientAttnProcessor(WINDOW))
    assert not torch.allclose(model(**unet_inputs()).sample, expected, atol=1e-4)
    assert [spec for spec, _ in served] == [WINDOW, "dense"] * 4


def test_cross_attention_is_known_by_the_layer_not_by_lengths(served):
    model = unet()
    model.set_attn_processor(EfficientAttnProcessor(WINDOW))
    text = torch.randn(2, 64, 12)  # as many tokens as the image has
    model(**{**unet_inputs(), "encoder_hidden_states": text, "encoder_attention_mask": None})
    assert [spec for spec, _ in served][:2] == [WINDOW, "dense"]


def test_processors_by_name():
    model = unet()
    before = model.attn_processors
    name = next(name for name in before if "attn1" in name)
    found = processors(model, {name: WINDOW})
    assert isinstance(found[name], EfficientAttnProcessor)
    assert all(found[other] is before[other] for other in before if other != name)
    model.set_attn_processor(dict(found))
    again = processors(model, {name: "dense"})[name]
    assert again.processor is before[name]  # not one in another
    with pytest.raises(InputError, match="has no nowhere"):
        processors(model, {"nowhere": WINDOW})
    with pytest.raises(InputError, match="attn_processors"):
        processors(torch.nn.Linear(2, 2))


def test_the_signature_is_that_of_the_processor_within():
    class Picky:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, tint=0.0):
            q = hidden_states[:, None]
            return F.scaled_dot_product_attention(q, q, q)[:, 0] + tint

    processor = EfficientAttnProcessor(processor=Picky())
    assert "tint" in inspect.signature(processor.__call__).parameters
    layer = attention_processor.Attention(8, heads=2, dim_head=4)
    layer.set_processor(processor)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(x, tint=1.5), attention(x[:, None], x[:, None], x[:, None])[:, 0] + 1.5)
    torch.testing.assert_close(copy.deepcopy(layer)(x, tint=1.5), layer(x, tint=1.5))


def test_what_raises():
    layer = attention_processor.Attention(8, heads=2, dim_head=4, processor=EfficientAttnProcessor())
    layer.set_processor(EfficientAttnProcessor(WINDOW, attention_processor.AttnProcessor()))
    with pytest.raises(UnsupportedError, match="AttnProcessor did not call"):
        layer(torch.randn(2, 5, 8))
    with pytest.raises(InputTypeError, match="attn, hidden_states"):
        EfficientAttnProcessor("dense", 3)
    with pytest.raises(InputError, match="no method"):
        EfficientAttnProcessor("bigbrid")


def test_without_diffusers_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"efficient-attn\[diffusers\]"):
        EfficientAttnProcessor()


@pytest.mark.parametrize("name", MODELS)
def test_convert_is_checked_and_undone(name):
    make, inputs = MODELS[name]
    model = make()
    expected = model(**inputs()).sample
    before = model.attn_processors
    report = convert(model, WINDOW, sample=inputs())
    assert len(report.converted) == len(before) and not report.skipped
    assert all("of diffusers" in how for how in report.converted.values())
    assert report.dense_error < 1e-4 and report.error > 1e-4
    assert set(report.layers) == set(report.converted)
    assert model.attn_processors == before  # whatever processor a layer has, its call is served
    report.undo()
    assert torch.equal(model(**inputs()).sample, expected)


def test_low_rank_methods_in_self_attention():
    model = unet()
    report = convert(model, "nystrom:landmarks=8", sample=unet_inputs())
    assert report.error > 1e-6
    report.undo()
    report = convert(model, "linformer:rank=8,max_len=64", sample=unet_inputs())
    added = [name for name, _ in model.named_parameters() if "method_state" in name]
    assert len(added) == 8 and all("attn1" in name for name in added)
