"""`convert` on timm, open_clip and torchvision, which need torchvision: make test-timm, an environment of its own.

Small models with random weights. Each must give with dense attention what it gave before, change with a window, train,
and be undone.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import efficient_attn
from efficient_attn import InputError, MultiheadAttention, UnsupportedError, convert
from efficient_attn.integrations import routed

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
open_clip = pytest.importorskip("open_clip")
from open_clip import transformer as clip_blocks  # noqa: E402
from timm import layers  # noqa: E402

WINDOW = "sliding_window:left=2,right=2"
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TEXT = torch.tensor([[7, 3, 9, 4, 49, 0, 0, 0, 0, 0], [7, 1, 1, 2, 3, 4, 5, 6, 8, 49]])
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 10, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2},
}


def vit(**options):
    return timm.models.vision_transformer.VisionTransformer(**SMALL, **options)


def eva(**options):
    return timm.models.eva.Eva(**SMALL, use_rot_pos_emb=True, use_abs_pos_emb=False, **options)


def swin():
    sizes = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    return timm.models.swin_transformer.SwinTransformer(**sizes, num_classes=5)


def torchvision_vit():
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 37}
    model = torchvision.models.VisionTransformer(**sizes, num_classes=5)
    torch.nn.init.normal_(model.heads.head.weight)  # it starts at zero
    return model


def clip(**text):
    return open_clip.CLIP(**{**CLIP, "text_cfg": {**CLIP["text_cfg"], **text}})


def custom_clip():
    """open_clip's own blocks with its own Attention, which are for configurations with a scaled attention."""
    torch.manual_seed(0)
    return clip_blocks.CustomResidualAttentionBlock(32, 4, qk_norm=True, scale_heads=True, scale_attn_inner=True)


# name -> (how to make it, its inputs, how many attention layers, of which library)
MODELS = {
    "timm vit": (lambda: vit(qk_norm=True, norm_layer="layernorm"), (IMAGES,), 2, "Attention of timm"),
    "timm vit, differential": (lambda: vit(attn_layer="diff"), (IMAGES,), 2, "DiffAttention of timm"),
    "timm siglip": (lambda: vit(class_token=False, global_pool="map"), (IMAGES,), 3, "of timm"),
    "timm eva": (eva, (IMAGES,), 2, "EvaAttention of timm"),
    "timm eva, AttentionRope": (lambda: eva(attn_type="rope"), (IMAGES,), 2, "AttentionRope of timm"),
    "timm swin": (swin, (IMAGES,), 4, "WindowAttention of timm"),
    "open_clip": (clip, (IMAGES, TEXT), 4, "MultiheadAttention, replaced"),
    "open_clip custom": (custom_clip, (torch.randn(2, 10, 32),), 1, "Attention of open_clip"),
    "torchvision vit": (torchvision_vit, (IMAGES,), 2, "MultiheadAttention, replaced"),
}


def make(name):
    """A model with large random weights: with small ones attention is nearly uniform."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(7))
    return model


def flat(output):
    parts = output if isinstance(output, tuple) else (output,)
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("name", MODELS)
def test_convert_is_checked_trained_and_undone(name):
    _, inputs, count, kind = MODELS[name]
    model = make(name)
    names, expected = set(model.state_dict()), flat(model(*inputs))
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    dense = convert(model, sample=inputs)
    assert len(dense.converted) == count and all(kind in how for how in dense.converted.values()), dense
    assert dense.dense_error < 1e-5 and set(dense.layers) == set(dense.converted)
    flat(model(*inputs)).square().sum().backward()
    largest = max(g.abs().max() for g in gradients.values())
    for n, p in model.named_parameters():
        if n in gradients:
            assert (p.grad - gradients[n]).abs().max() <= 2e-5 * largest, n
    dense.undo()
    report = convert(model, WINDOW, sample=inputs)
    assert report.error > 1e-3 and not report.skipped and set(model.state_dict()) == names
    assert max(layer.attention or 0.0 for layer in report.layers.values()) > 1e-3
    report.undo()
    assert torch.equal(flat(model(*inputs)), expected)


def test_the_pooling_query_attends_to_all():
    model = make("timm siglip")
    report = convert(model, WINDOW, sample=(IMAGES,))
    assert isinstance(model.attn_pool, layers.AttentionPoolLatent)
    assert report.layers["attn_pool"].attention is None and report.layers["blocks.0.attn"].attention > 1e-3


@pytest.mark.parametrize(
    "spec", ["linformer:rank=4,max_len=32", "nystrom:landmarks=4", "performer", "bigbird:block=16"]
)
def test_methods_in_timm(spec):
    model = make("timm vit")
    report = convert(model, spec, sample=(IMAGES,))
    model.train()(IMAGES).square().sum().backward()
    parameters = [p for n, p in model.named_parameters() if "method_state" in n]
    assert len(parameters) == (4 if "linformer" in spec else 0) and all(p.grad is not None for p in parameters)
    report.undo()


def test_only_one_tower_of_clip():
    model = make("open_clip")
    with pytest.raises(UnsupportedError):
        convert(model, "nystrom:landmarks=4", sample=(IMAGES, TEXT))  # the text is causal
    report = convert(
        model, "nystrom:landmarks=4", sample=(IMAGES, TEXT), predicate=lambda name, module: "visual" in name
    )
    assert len(report.converted) == len(report.skipped) == 2
    assert isinstance(model.visual.transformer.resblocks[0].attn, MultiheadAttention)


def test_scaled_cosine_attention_is_left_and_named():
    block = clip_blocks.CustomResidualAttentionBlock(32, 4, scale_cosine_attn=True)
    with pytest.raises(InputError, match="scaled cosine"):
        convert(block, WINDOW)


def test_swin_of_torchvision_is_left_and_named():
    model = torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=16, depths=[2], num_heads=[2], window_size=[4, 4], num_classes=5
    )
    with pytest.raises(InputError, match="ShiftedWindowAttention is of no kind"):
        convert(model, WINDOW)


def test_every_fused_attention_of_timm_is_known():
    """What has `fused_attn` in timm's models calls the function that is routed; a class of another kind would raise."""
    model = make("timm vit")
    block = model.blocks[0].attn
    assert routed.library_of(block) == "timm" and block.fused_attn is not None
    convert(model, WINDOW)
    block.fused_attn = False
    with pytest.raises(UnsupportedError, match="did not call"):
        model(IMAGES)


@pytest.mark.parametrize("spec", ["dense", WINDOW])
def test_torch_compile_in_one_graph(spec):
    model = make("timm vit")
    convert(model, spec)
    expected = model(IMAGES)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(IMAGES), expected)


def test_a_block_for_every_model_at_once():
    model = make("timm vit")
    expected = model(IMAGES)
    with efficient_attn.integrations.use_for_sdpa() as mode:
        torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert mode.served == 2


def test_the_block_of_the_documentation_runs():
    page = (Path(__file__).resolve().parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python timm\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 1
    names = {}
    exec(compile(blocks[0], "integrations.md", "exec"), names)
    assert len(names["report"].converted) == 2
