"""ViT, MAE and SimCLR."""

import copy

import pytest
import torch
from support.model_checks import check_compiles, check_half_precision, check_round_trip, check_trains

from efficient_attn.errors import CheckpointError, InputError, InputTypeError, UnsupportedError
from efficient_attn.models import (
    MAE,
    Augmentation,
    ImageConfig,
    MAEConfig,
    SimCLR,
    SimCLRConfig,
    TransformerConfig,
    ViT,
    ViTConfig,
)
from efficient_attn.models.contrastive import nt_xent
from efficient_attn.models.masking import random_masking
from efficient_attn.models.patches import patchify, sinusoidal_2d
from efficient_attn.models.vision import accuracy
from efficient_attn.multihead import MultiheadAttention

# --- ViT ---

SPECS = [
    "dense",
    "neighborhood:kernel=3,prefix=1",
    "axial:prefix=1",
    "bigbird:block=16",
    "nystrom:landmarks=4",
    "linformer:rank=4,max_len=64",
    "performer:features=16",
    "sliding_window:left=3,right=3+centroid:block=16",
]


def image_config(attention="dense", **options):
    encoder = TransformerConfig(hidden_dim=32, num_layers=2, num_heads=4, mlp_dim=48, attention=attention)
    return ImageConfig(**({"image_size": 16, "patch_size": 4, "channels": 1, "encoder": encoder} | options))


def theirs(name, tmp_path, **config):
    """A tiny model of transformers with weights that matter everywhere, saved."""
    transformers = pytest.importorskip("transformers")
    kind = "ViTMAE" if "MAE" in name else "ViT"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    cls = getattr(transformers, f"{kind}Config")
    torch.manual_seed(1)
    model = getattr(transformers, name)(cls(image_size=16, patch_size=4, num_channels=3, **sizes, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    return model


def test_vit_equals_transformers(tmp_path):
    model = theirs("ViTForImageClassification", tmp_path, num_labels=5)
    ours = ViT.from_pretrained(tmp_path)
    assert ours.config.num_labels == 5 and not ours.training
    with torch.no_grad():
        for size in ((16, 16), (24, 32)):  # the second one interpolates positions
            images = torch.randn(3, 3, *size)
            expected = model(images, interpolate_pos_encoding=size != (16, 16)).logits
            torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=1e-4)
            hidden = model.vit(images, interpolate_pos_encoding=size != (16, 16)).last_hidden_state
            torch.testing.assert_close(ours.backbone(images), hidden, atol=1e-4, rtol=1e-4)


def test_vit_without_a_head_and_with_a_new_one(tmp_path):
    model = theirs("ViTModel", tmp_path)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(images).last_hidden_state[:, 0]
        torch.testing.assert_close(ViT.from_pretrained(tmp_path).features(images), expected, atol=1e-4, rtol=1e-4)
        tuned = ViT.from_pretrained(tmp_path, num_labels=7, attention="neighborhood:kernel=3,prefix=1")
        assert tuned(images).shape == (2, 7)
    assert tuned.config.backbone.encoder.attention == "neighborhood:kernel=3,prefix=1"


def test_vit_refuses_what_it_does_not_compute(tmp_path):
    theirs("ViTModel", tmp_path, qkv_bias=False)
    with pytest.raises(CheckpointError, match="qkv_bias"):
        ViT.from_pretrained(tmp_path)


@pytest.mark.parametrize("attention", SPECS)
def test_vit_trains_and_comes_back(attention, tmp_path):
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_config(attention), num_labels=3))
    images, labels = torch.randn(6, 1, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    check_trains(model, lambda m: m.loss(images, labels))
    check_round_trip(model, lambda m: m(images), tmp_path)


def test_models_compile():
    images, noise = torch.rand(2, 1, 16, 16), torch.rand(2, 16)
    check_compiles(ViT(ViTConfig(image_config("nystrom:landmarks=4"), num_labels=3)), images)
    check_compiles(mae("neighborhood:kernel=3,prefix=1").loss, images, noise)


def test_half_precision():
    torch.manual_seed(0)
    images, labels, noise = torch.rand(6, 1, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2]), torch.rand(6, 16)
    vit, wide = ViT(ViTConfig(image_config(), num_labels=3)), torch.rand(6, 1, 24, 24)
    check_half_precision(vit, lambda m, dtype: m.loss(images.to(dtype), labels) + m.loss(wide.to(dtype), labels))
    check_half_precision(mae(), lambda m, dtype: m.loss(images.to(dtype), noise))
    views = images, images.flip(2)
    check_half_precision(simclr(), lambda m, dtype: m.loss_of_views(*(view.to(dtype) for view in views)))


def test_vit_loss_is_the_cross_entropy_of_its_logits():
    model = ViT(ViTConfig(image_config(), num_labels=3)).eval()
    images, labels = torch.randn(4, 1, 16, 16), torch.tensor([0, 2, 1, 1])
    expected = -model(images).log_softmax(dim=1)[torch.arange(4), labels].mean()
    torch.testing.assert_close(model.loss(images, labels), expected)


def test_two_dimensional_attention_sees_the_grid_after_the_class_token():
    """In one layer a neighbourhood of 3 x 3 tells a patch's neighbours and the class token of a change, no other."""
    torch.manual_seed(0)
    encoder = TransformerConfig(hidden_dim=32, num_layers=1, num_heads=4, attention="neighborhood:kernel=3,prefix=1")
    model = ViT(ViTConfig(image_config(encoder=encoder, image_size=28), num_labels=3)).double().eval()
    images = torch.randn(1, 1, 28, 28, dtype=torch.float64)
    changed = images.clone()
    changed[:, :, 12:16, 12:16] += 1  # the patch in the middle of 7 x 7
    moved = (model.backbone(images) - model.backbone(changed)).abs().amax(dim=2)[0] > 1e-12
    expected = torch.zeros(7, 7, dtype=torch.bool)
    expected[2:5, 2:5] = True
    assert moved[0] and torch.equal(moved[1:].reshape(7, 7), expected)


def test_set_attention_changes_the_method_and_keeps_the_parameters():
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_config(), num_labels=3)).eval()
    images = torch.randn(2, 1, 16, 16)
    before, names = model(images), set(model.state_dict())
    model.set_attention("neighborhood:kernel=3,prefix=1")
    assert (model(images) - before).abs().max() > 1e-4
    model.set_attention(["dense", "per_head(dense; dense; axial:prefix=1; dense)"])
    assert model.config.backbone.encoder.attention[0] == "dense" and model(images).shape == before.shape
    model.set_attention({"backbone.encoder": "dense"})
    assert torch.equal(model(images), before) and set(model.state_dict()) == names
    with pytest.raises(InputError, match="no square image"):
        model.set_attention("neighborhood:kernel=3")
        model(images)


def test_inspect_shows_layers_and_weights():
    torch.manual_seed(0)
    model, images = ViT(ViTConfig(image_config("axial:prefix=1"), num_labels=3)).eval(), torch.rand(2, 1, 16, 16)
    found = model.inspect(images)
    assert torch.equal(found.last, model.backbone(images)) and len(found.hidden) == 3
    assert [tuple(weights.shape) for weights in found.weights] == [(2, 4, 17, 17)] * 2
    seen = found.weights[0][0, 0, 6] > 0  # the patch in row 1, column 1
    assert seen.nonzero().flatten().tolist() == [0, 2, 5, 6, 7, 8, 10, 14]


def test_pooling():
    tokens = torch.randn(2, 17, 32)
    for pool, expected in (("cls", tokens[:, 0]), ("mean", tokens[:, 1:].mean(1))):
        backbone = ViT(ViTConfig(image_config(pool=pool))).backbone
        assert torch.equal(backbone.pool(tokens), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 18}, "18x18 is no whole number of 4x4 patches"),
        ({"pool": "max"}, "pool must be one of cls, mean"),
        ({"positions": "rotary"}, "positions must be one of learned, sinusoidal"),
        ({"overlap": -1}, "overlap >= 0"),
        ({"patch_size": (4, 0)}, "at least 1"),
        ({"encoder": TransformerConfig(hidden_dim=32, causal=True)}, "not causal"),
    ],
)
def test_wrong_image_configs_are_named(options, message):
    with pytest.raises(InputError, match=message):
        image_config(**options)


def test_vit_names_wrong_input():
    model = ViT(ViTConfig(image_config(), num_labels=3))
    images = torch.zeros(2, 1, 16, 16)
    with pytest.raises(InputError, match="16x18 is no whole number"):
        model(torch.zeros(2, 1, 16, 18))
    with pytest.raises(InputTypeError, match="labels must be int64"):
        model.loss(images, torch.zeros(2))
    with pytest.raises(InputError, match=r"labels must be \(2,\)"):
        model.loss(images, torch.zeros(3, dtype=torch.int64))
    for label in (3, -1, 255):
        with pytest.raises(InputError, match=f"labels must be from 0 to 2, the model's classes; got {label}"):
            model.loss(images, torch.tensor([0, label]))
    assert model.loss(images, torch.tensor([0, -100])).isfinite(), "-100 is no label"
    with pytest.raises(UnsupportedError, match="no head"):
        ViT(ViTConfig(image_config(), num_labels=None))(images)
    with pytest.raises(InputTypeError, match="no ImageBackbone"):
        ViT.from_backbone(MultiheadAttention(32, 4), num_labels=3)


def test_accuracy():
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.1, 0.4]])
    labels = torch.tensor([1, 2])
    assert accuracy(logits, labels) == 0.5 and accuracy(logits, labels, top=2) == 1.0


# --- MAE ---


def mae(attention="dense", **options):
    decoder = TransformerConfig(hidden_dim=16, num_layers=1, num_heads=2, mlp_dim=32)
    return MAE(MAEConfig(image_config(attention, positions="sinusoidal"), decoder, **options))


@pytest.mark.parametrize("normalised", [False, True])
def test_mae_equals_transformers(normalised, tmp_path):
    decoder = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    decoder = {f"decoder_{name}": size for name, size in decoder.items()}
    model = theirs("ViTMAEForPreTraining", tmp_path, norm_pix_loss=normalised, **decoder)
    ours = MAE.from_pretrained(tmp_path)
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    with torch.no_grad():
        expected = model(images, noise=noise)
        found = ours(images, noise)
        assert torch.equal(found.masked, expected.mask.bool())
        torch.testing.assert_close(found.patches, expected.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.loss(images, noise), expected.loss, atol=1e-4, rtol=1e-4)


def test_sinusoidal_positions_are_fixed():
    model = mae()
    for positions, width in ((model.backbone.positions, 32), (model.decoder_positions, 16)):
        assert not positions.requires_grad and torch.equal(positions[1:], sinusoidal_2d(width, (4, 4)))
        assert not positions[0].any()


@pytest.mark.parametrize("attention", SPECS)
def test_mae_trains_and_comes_back(attention, tmp_path):
    torch.manual_seed(0)
    model, images, noise = mae(attention), torch.rand(4, 1, 16, 16), torch.rand(4, 16)
    check_trains(model, lambda m: m.loss(images, noise))
    check_round_trip(model, lambda m: m(images, noise).patches, tmp_path)


@pytest.mark.parametrize("attention", ["dense", "neighborhood:kernel=3,prefix=1", "linformer:rank=4,max_len=64"])
def test_mae_does_not_see_masked_patches(attention):
    torch.manual_seed(0)
    model, images, noise = mae(attention).eval(), torch.rand(2, 1, 16, 16), torch.rand(2, 16)
    before = model(images, noise)
    pixels = before.masked.reshape(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    after = model(torch.where(pixels, 1e3, images), noise)
    torch.testing.assert_close(after.patches, before.patches)
    assert (model(torch.where(pixels, images, 1e3), noise).patches - before.patches).abs().max() > 1e-3


def test_mae_by_grid_equals_visible_patches_alone():
    """With a neighbourhood that is the whole image, running on all patches computes what dense attention does."""
    torch.manual_seed(0)
    model, images, noise = mae().eval(), torch.rand(2, 1, 16, 16), torch.rand(2, 16)
    dense = model(images, noise).patches
    model.set_attention({"backbone.encoder": "neighborhood:kernel=4,prefix=1"})
    assert model.backbone.goes_by_grid()
    torch.testing.assert_close(model(images, noise).patches, dense, atol=1e-5, rtol=1e-5)


def test_reconstruction_keeps_visible_patches():
    torch.manual_seed(0)
    model, images, noise = mae().eval(), torch.rand(2, 1, 16, 24), torch.rand(2, 24)
    filled = model.reconstruct(images, noise)
    masked = random_masking(noise, 0.75).masked
    same = (patchify(filled, (4, 4)) == patchify(images, (4, 4))).all(dim=2)
    assert torch.equal(same, ~masked)


def test_mae_names_wrong_input():
    with pytest.raises(InputError, match="overlap"):
        MAEConfig(image_config(overlap=1))
    with pytest.raises(InputError, match="mask_ratio"):
        mae(mask_ratio=1.0)
    with pytest.raises(InputError, match="one number a patch"):
        mae()(torch.zeros(2, 1, 16, 16), torch.rand(2, 15))


# --- SimCLR and fine-tuning ---


def simclr(attention="dense"):
    return SimCLR(SimCLRConfig(image_config(attention), 8, augmentation=Augmentation(crop=(0.5, 1.0), flip=0.0)))


@pytest.mark.parametrize("attention", ["dense", "neighborhood:kernel=3,prefix=1", "nystrom:landmarks=4"])
def test_simclr_trains_and_comes_back(attention, tmp_path):
    torch.manual_seed(0)
    model, images = simclr(attention), torch.rand(6, 1, 16, 16)
    check_trains(model, lambda m: m.loss(images, torch.Generator().manual_seed(0)), steps=12)
    check_round_trip(model, lambda m: m(images), tmp_path)


def test_simclr_loss_is_nt_xent_of_its_views():
    torch.manual_seed(0)
    model, images = simclr().eval(), torch.rand(5, 1, 16, 16)
    generator = torch.Generator().manual_seed(7)
    first, second = (model.config.augmentation(images, generator) for _ in range(2))
    found = model.loss(images, torch.Generator().manual_seed(7))
    torch.testing.assert_close(found, nt_xent(model(first), model(second), 0.5))


@pytest.mark.parametrize("source", [mae, simclr])
def test_fine_tuning_starts_from_the_trained_backbone(source, tmp_path):
    torch.manual_seed(0)
    trained, images = source("bigbird:block=16"), torch.rand(4, 1, 16, 16)
    labels, state = torch.tensor([0, 1, 0, 1]), copy.deepcopy(trained.state_dict())
    model = ViT.from_backbone(trained, num_labels=2, frozen=True, pool="mean")
    assert torch.equal(model.backbone(images), trained.backbone(images))
    assert model.config.backbone.encoder.attention == "bigbird:block=16" and model.config.backbone.pool == "mean"
    assert torch.equal(model.features(images), trained.backbone(images)[:, 1:].mean(1))
    check_trains(model, lambda m: m.loss(images, labels))
    assert torch.equal(model.backbone(images), trained.backbone(images)) and not model.backbone.training
    thawed = ViT.from_backbone(model, num_labels=2)
    model.freeze(False)
    for other in (thawed, model):
        assert [n for n, p in other.backbone.named_parameters() if p.requires_grad] == [
            n for n, p in trained.backbone.named_parameters() if p.requires_grad
        ]
    before = model.backbone(images).detach()
    check_trains(model, lambda m: m.loss(images, labels))
    assert (model.backbone(images) - before).abs().max() > 1e-4
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained.state_dict().items())
    check_round_trip(model, lambda m: m(images), tmp_path)
