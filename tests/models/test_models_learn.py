"""The reference models learn real data within minutes on a CPU: digits, their names, sunspots and carbon dioxide."""

import pytest
import torch

from efficient_attn.measuring.inputs import digits
from efficient_attn.models import (
    CLIP,
    Augmentation,
    CLIPConfig,
    ForecasterConfig,
    ImageConfig,
    PatchForecaster,
    SimCLR,
    SimCLRConfig,
    TextTowerConfig,
    TransformerConfig,
    ViT,
    ViTConfig,
)
from efficient_attn.models.clip import recall_at
from efficient_attn.models.forecasting import mase, seasonal_naive
from efficient_attn.models.vision import accuracy

pytestmark = pytest.mark.slow

SIGNS = {"flip": 0.0, "jitter": 0.0, "grayscale_p": 0.0, "blur_p": 0.0}  # a mirrored digit is none
GENTLE = Augmentation(crop=(0.7, 1.0), ratio=(0.85, 1.18), rotation=10.0, **SIGNS)
STRONG = Augmentation(crop=(0.5, 1.0), ratio=(0.75, 1.33), rotation=15.0, **SIGNS)


def data():
    """Images (B, 1, 8, 8) and labels, for training and for testing."""
    images, labels, test_images, test_labels = digits()
    return images[:, None], labels, test_images[:, None], test_labels


def backbone(attention="dense"):
    encoder = TransformerConfig(hidden_dim=64, num_layers=3, num_heads=4, mlp_dim=128, attention=attention)
    return ImageConfig(image_size=8, patch_size=2, channels=1, overlap=1, pool="mean", encoder=encoder)


def fit(model, step, steps, lr, weight_decay=0.05):
    """Train with AdamW on what `step` draws, the learning rate up and down again; leaves the model in eval mode."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(steps):
        loss = step(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def classify(model, images, labels, steps, lr, batch=64):
    """Train a classifier on gently changed images."""

    def step(model):
        chosen = torch.randint(len(labels), (batch,))
        return model.loss(GENTLE(images[chosen]), labels[chosen])

    return fit(model, step, steps, lr)


@torch.no_grad()
def tested(model, images, labels):
    return accuracy(model(images), labels)


@pytest.mark.parametrize(
    ("attention", "least"),
    [
        ("dense", 0.97),
        ("neighborhood:kernel=3,prefix=1", 0.96),
        ("nystrom:landmarks=8", 0.96),
        ("linformer:rank=8,max_len=17", 0.96),
        ("performer:features=32", 0.96),
    ],
)
def test_vit_learns_digits(attention, least, record_property):
    images, labels, test_images, test_labels = data()
    torch.manual_seed(0)
    model = ViT(ViTConfig(backbone(attention), num_labels=10))
    classify(model, images, labels, steps=900, lr=2e-3)
    found = tested(model, test_images, test_labels)
    record_property("accuracy", found)
    assert found >= least


def test_simclr_helps_where_labels_are_few(record_property):
    """Ten labels a class: fine-tuning from SimCLR's backbone is better than starting from nothing."""
    images, labels, test_images, test_labels = data()
    few = torch.cat([(labels == c).nonzero().flatten()[:10] for c in range(10)])
    torch.manual_seed(0)
    scratch = ViT(ViTConfig(backbone(), num_labels=10))
    classify(scratch, images[few], labels[few], steps=200, lr=2e-3)
    trained = SimCLR(SimCLRConfig(backbone(), 64, temperature=0.2, augmentation=STRONG))
    fit(trained, lambda model: model.loss(images[torch.randint(len(images), (128,))]), steps=400, lr=2e-3)
    tuned = classify(ViT.from_backbone(trained, num_labels=10), images[few], labels[few], steps=200, lr=1e-3)
    before, after = (tested(model, test_images, test_labels) for model in (scratch, tuned))
    record_property("accuracy from scratch, from SimCLR", (before, after))
    assert after > before + 0.02


# --- CLIP ---

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
CAPTIONS = ["a photo of the digit {}", "{}", "the number {}", "a handwritten {}", "a {} written by hand"]
END = 1


def byte_ids(texts, length=40):
    """(B, length) bytes, an end token, and zeros."""
    rows = [torch.tensor([*text.encode(), END]) for text in texts]
    return torch.stack([torch.nn.functional.pad(row, (0, length - len(row))) for row in rows])


@pytest.mark.parametrize(("image", "text"), [("dense", "dense"), ("nystrom:landmarks=8", "sliding_window:right=0")])
def test_clip_names_digits_that_it_has_not_seen(image, text, record_property):
    images, labels, test_images, test_labels = data()
    torch.manual_seed(0)
    words = TransformerConfig(64, 2, 4, mlp_dim=128, causal=True, attention=text)
    model = CLIP(CLIPConfig(backbone(image), TextTowerConfig(128, 40, END, words), projection_dim=32))

    def step(model):
        chosen = torch.randint(len(labels), (64,))
        forms = torch.randint(len(CAPTIONS), (64,)).tolist()
        captions = [CAPTIONS[f].format(NAMES[c]) for f, c in zip(forms, labels[chosen].tolist(), strict=True)]
        return model.loss(GENTLE(images[chosen]), byte_ids(captions))

    fit(model, step, steps=400, lr=2e-3)
    prompts = byte_ids([form.format(name) for name in NAMES for form in CAPTIONS])
    classes = model.class_embeddings(prompts, torch.arange(10).repeat_interleave(len(CAPTIONS)))
    with torch.no_grad():
        zero_shot = accuracy(model.classify(test_images, classes), test_labels)
        record_property("zero-shot accuracy", zero_shot)
        assert zero_shot >= 0.9
        first = torch.stack([(test_labels == c).nonzero()[0, 0] for c in range(10)])
        found = recall_at(2, model.encode_image(test_images[first]), model.encode_text(prompts[:: len(CAPTIONS)]))
        assert found >= 0.8


# --- forecasting ---


def series(name):
    datasets = pytest.importorskip("statsmodels.datasets")
    table = getattr(datasets, name).load_pandas().data
    column = table["SUNACTIVITY"] if name == "sunspots" else table["co2"].interpolate()
    return torch.tensor(column.to_numpy(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "season", "test_share", "attention", "sizes", "steps"),
    [
        ("sunspots", 11, 0.1, "dense", (66, 11, 22, 11), 120),
        ("co2", 52, 0.2, "dense", (208, 52, 26, 13), 360),
        ("co2", 52, 0.2, "linformer:rank=8,max_len=16", (208, 52, 26, 13), 360),
    ],
)
def test_forecasts_beat_the_seasonal_naive_ones(name, season, test_share, attention, sizes, steps, record_property):
    """MASE < 1, over every window of the last part of the series, which training has not seen."""
    values = series(name)
    context, horizon, patch, stride = sizes
    known = values[: len(values) - int(len(values) * test_share)]
    torch.manual_seed(0)
    encoder = TransformerConfig(32, 2, 4, mlp_dim=64, dropout=0.2, attention=attention)
    model = PatchForecaster(ForecasterConfig(context, horizon, patch, stride, encoder=encoder))
    window = torch.arange(context + horizon)

    def step(model):
        drawn = known[torch.randint(len(known) - len(window) + 1, (32, 1)) + window].unsqueeze(2)
        return model.loss(drawn[:, :context], drawn[:, context:])

    fit(model, step, steps, lr=2e-3, weight_decay=0.01)
    starts = torch.arange(len(known), len(values) - horizon + 1)[:, None]
    past, future = values[starts - context + torch.arange(context)], values[starts + torch.arange(horizon)]
    history = known.expand(len(past), -1)
    ours = mase(model.point(past.unsqueeze(2)).squeeze(2), future, history, season).mean()
    naive = mase(seasonal_naive(past, horizon, season), future, history, season).mean()
    record_property("MASE of ours, of seasonal-naive", (ours.item(), naive.item()))
    assert ours < 1 and ours < 0.9 * naive
    low, high = (model.predict(past.unsqueeze(2))[:, :, 0, q] for q in (0, -1))  # 10 % and 90 %
    assert 0.6 < ((future >= low) & (future <= high)).float().mean() < 0.98
