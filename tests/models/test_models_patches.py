"""Images before and after a model: patches, positions, masking, augmentations and losses against their definitions."""

import dataclasses
import math

import pytest
import torch

from efficient_attn.errors import InputError, InputTypeError
from efficient_attn.models import (
    Augmentation,
)
from efficient_attn.models.contrastive import nt_xent
from efficient_attn.models.masking import masked_mse, normalise_patches, random_masking, take
from efficient_attn.models.patches import PatchEmbedding, patchify, resize_positions, sinusoidal_2d, unpatchify

# --- patches and positions ---


def test_patchify_cuts_in_row_major_order_with_channels_last():
    images = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    patches = patchify(images, (2, 3))
    assert patches.shape == (2, 4, 18)
    for n, (row, column) in enumerate([(0, 0), (0, 3), (2, 0), (2, 3)]):
        block = images[:, :, row : row + 2, column : column + 3]
        assert torch.equal(patches[:, n], block.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(unpatchify(patches, (2, 3), (2, 2)), images)


def test_patch_embedding_is_a_linear_map_of_patches():
    torch.manual_seed(0)
    embedding = PatchEmbedding(3, 5, (2, 4)).double()
    images = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    tokens, grid = embedding(images)
    weight = embedding.projection.weight.permute(0, 2, 3, 1).flatten(1)  # [E, P*P*C]
    assert grid == (3, 2)
    torch.testing.assert_close(tokens, patchify(images, (2, 4)) @ weight.T + embedding.projection.bias)


def test_overlap_keeps_the_grid():
    tokens, grid = PatchEmbedding(1, 4, (2, 2), overlap=1)(torch.randn(1, 1, 8, 6))
    assert grid == (4, 3) and tokens.shape == (1, 12, 4)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, 8, 9), InputError, "8x9 is no whole number of 4x4 patches"),
        (torch.zeros(1, 1, 8, 8), InputError, r"must be \(batch, 3"),
        (torch.zeros(3, 8, 8), InputError, r"must be \(batch, 3"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), InputTypeError, "floating-point"),
    ],
)
def test_patch_embedding_names_wrong_images(images, error, message):
    with pytest.raises(error, match=message):
        PatchEmbedding(3, 5, (4, 4))(images)


def test_sinusoidal_positions_encode_column_and_row():
    positions = sinusoidal_2d(8, (3, 5))
    for row in range(3):
        for column in range(5):
            expected = []
            for x in (column, row):
                angles = [x / 10000 ** (i / 2) for i in range(2)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert positions[row * 5 + column].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(InputError, match="4 divides"):
        sinusoidal_2d(6, (2, 2))


def test_resized_positions_follow_rows_and_columns():
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    field = torch.stack([rows, columns, torch.full((6, 8), 3.0)], dim=-1).reshape(48, 3)
    resized = resize_positions(field, (6, 8), (12, 16)).reshape(12, 16, 3)
    torch.testing.assert_close(resized[..., 2], torch.full((12, 16), 3.0))
    torch.testing.assert_close(resized[:, :1, 0].expand(-1, 16), resized[..., 0])
    torch.testing.assert_close(resized[:1, :, 1].expand(12, -1), resized[..., 1])
    assert (resized[1:-1, 0, 0].diff() > 0).all() and (resized[0, 1:-1, 1].diff() > 0).all()
    assert resize_positions(field, (6, 8), (6, 8)) is field


# --- masking and losses ---


def test_random_masking_keeps_the_patches_of_least_noise():
    torch.manual_seed(0)
    noise = torch.rand(5, 16)
    masking = random_masking(noise, 0.75)
    for b in range(5):
        kept = sorted(sorted(range(16), key=lambda n: noise[b, n].item())[:4])
        assert masking.visible[b].tolist() == kept
        assert masking.masked[b].tolist() == [n not in kept for n in range(16)]
    tokens = torch.randn(5, 16, 3)
    visible = take(tokens, masking.visible)
    shuffled = torch.cat([visible, torch.full((5, 12, 3), 7.0)], dim=1)
    restored = take(shuffled, masking.restore)
    assert torch.equal(restored, torch.where(masking.masked[..., None], torch.tensor(7.0), tokens))


def test_random_masking_counts_and_errors():
    noise = torch.rand(2, 10)
    assert random_masking(noise, 0.9).visible.shape == (2, 1)  # 10 * (1 - 0.9) is 0.9999999999999998
    assert random_masking(noise, 0.75).visible.shape == (2, 2)
    assert not random_masking(noise, 0.0).masked.any()
    for ratio in (0.95, 1.0, -0.1):
        with pytest.raises(InputError, match="mask ratio"):
            random_masking(noise, ratio)


def test_masked_mse_looks_at_masked_patches_alone():
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    masked = torch.tensor([[True, False, True], [False, False, True]])
    prediction[~masked] = torch.nan
    picked = [(0, 0), (0, 2), (1, 2)]
    expected = sum(((prediction[i] - target[i]) ** 2).mean() for i in picked) / 3
    torch.testing.assert_close(masked_mse(prediction, target, masked), expected)
    normal = normalise_patches(target * 5 + 3)
    torch.testing.assert_close(normal.mean(-1), torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(normal.std(-1), torch.ones(2, 3))


def test_nt_xent_equals_its_definition():
    torch.manual_seed(0)
    first, second, t = torch.randn(4, 6), torch.randn(4, 6), 0.3
    z = [v / v.norm() for v in torch.cat([first, second])]
    losses = []
    for i in range(8):
        j = (i + 4) % 8
        others = sum(math.exp(z[i] @ z[k] / t) for k in range(8) if k != i)
        losses.append(-math.log(math.exp(z[i] @ z[j] / t) / others))
    assert nt_xent(first, second, t).item() == pytest.approx(sum(losses) / 8, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert nt_xent(first, second, t).item() == pytest.approx(sum(losses) / 8, rel=1e-5)
    with pytest.raises(InputError, match="one shape"):
        nt_xent(first, second[:3])
    with pytest.raises(InputError, match="temperature"):
        nt_xent(first, second, 0.0)


# --- augmentations ---

NOTHING = Augmentation(crop=(1, 1), ratio=(1, 1), flip=0, jitter=0, grayscale_p=0, blur_p=0)


def test_no_augmentation_is_the_image():
    images = torch.rand(3, 3, 12, 12)
    torch.testing.assert_close(NOTHING(images), images, atol=1e-5, rtol=0)


def test_each_augmentation_does_what_it_says():
    images = torch.rand(4, 3, 16, 16)
    mirrored = dataclasses.replace(NOTHING, flip=1.0)(images)
    torch.testing.assert_close(mirrored, images.flip(-1), atol=1e-5, rtol=0)
    gray = dataclasses.replace(NOTHING, grayscale_p=1.0)(images)
    luma = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    torch.testing.assert_close(gray, luma[:, None].expand(-1, 3, -1, -1), atol=1e-5, rtol=0)
    turned = dataclasses.replace(NOTHING, rotation=180.0)
    generator = torch.Generator().manual_seed(1)
    assert not torch.allclose(turned(images, generator), images, atol=0.05)
    cropped = dataclasses.replace(NOTHING, crop=(0.25, 0.25))(torch.arange(16.0).expand(64, 1, 16, 16) / 16)
    span = cropped[..., -1] - cropped[..., 0]
    torch.testing.assert_close(span, torch.full_like(span, 15 / 2 / 16), atol=0.5 / 16, rtol=0)
    blurred = dataclasses.replace(NOTHING, blur_p=1.0)(images)
    assert (blurred.var(dim=(2, 3)) < images.var(dim=(2, 3))).all()
    bright = dataclasses.replace(NOTHING, jitter=1.0, jitter_p=1.0)(images)
    assert not torch.allclose(bright, images, atol=0.05)


def test_views_differ_by_image_and_repeat_by_seed():
    image = torch.rand(1, 3, 16, 16).expand(4, -1, -1, -1)
    first, again = (Augmentation()(image, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert all(not torch.equal(first[0], first[b]) for b in range(1, 4))
    assert first.min() >= 0 and first.max() <= 1


def test_wrong_augmentations_are_named():
    for wrong in ({"crop": (0.5, 1.5)}, {"ratio": (2.0, 1.0)}, {"flip": 1.5}, {"jitter": -1.0}, {"rotation": 200.0}):
        with pytest.raises(InputError):
            Augmentation(**wrong)
    with pytest.raises(InputTypeError):
        Augmentation()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
