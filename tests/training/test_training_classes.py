"""Tasks of classes: given and stratified splits, class weights, F1 and confusions, mixup, grey images, and a pretrained
text model with its tokenizer."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from efficient_attn.errors import InputError
from efficient_attn.models import TextClassifier, ViT
from efficient_attn.training import TrainOptions, train
from efficient_attn.training.data import images, text
from efficient_attn.training.data.base import split_labelled
from efficient_attn.training.tasks import TASKS
from efficient_attn.training.tasks.classes import confusion, scores
from efficient_attn.training.tasks.vision import mixed

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "what", "terrible", "great"]


def run(task, folder, **options):
    return train(task, TrainOptions(folder, batch=8, tensorboard=False, threads=1, **({"steps": 4} | options)))


# --- splits ---


@pytest.mark.parametrize("counts", [(3, 3), (3, 40), (10, 100, 1000), (7, 8, 9, 10)])
def test_each_class_is_in_each_split_with_its_share(counts):
    labels = torch.cat([torch.full((count,), number) for number, count in enumerate(counts)])
    names = list(map(str, range(len(counts))))
    parts = split_labelled(labels, names, 0)
    assert torch.cat(parts).sort().values.tolist() == list(range(len(labels)))
    for number, count in enumerate(counts):
        shares = [int((labels[part] == number).sum()) for part in parts]
        assert shares[1] == shares[2] == max(1, round(count / 10)) and shares[0] >= 1
    assert all(torch.equal(*pair) for pair in zip(parts, split_labelled(labels, names, 0), strict=True))
    assert not torch.equal(parts[0], split_labelled(labels, names, 1)[0])


def test_a_class_of_too_few_is_named():
    with pytest.raises(InputError, match="class 'rare' has 2 examples to be divided into train, valid, test"):
        split_labelled(torch.tensor([0] * 9 + [1] * 2), ["many", "rare"], 0)
    given = ["train"] * 9 + ["test"] * 2
    with pytest.raises(InputError, match="class 'rare' has 0 examples"):
        split_labelled(torch.tensor([0] * 9 + [1] * 2), ["many", "rare"], 0, given)


def picture(path, value, mode="RGB", size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.mark.parametrize("names", [("train", "val", "test"), ("train", "test"), ("training", "validation")])
def test_images_that_come_divided_stay_so(tmp_path, names):
    values = {"train": 50, "training": 50, "val": 150, "validation": 150, "test": 250}
    for split in names:
        for label in ("cat", "dog"):
            for number in range(6):
                picture(tmp_path / split / label / f"{number}.png", values[split], "L")
    parts = images.load(0, tmp_path, image_size=8)
    assert parts.about["names"] == ["cat", "dog"] and parts.about["channels"] == 1
    found = {
        name: getattr(parts, name).batch(torch.arange(len(getattr(parts, name)))) for name in ("train", "valid", "test")
    }
    held = {"val": "valid", "validation": "valid", "test": "test"}
    for split in names[1:]:
        batch = found[held[split]]
        assert len(batch["label"]) == 12 and (batch["image"] * 255).round().eq(values[split]).all()
    assert (found["train"]["image"] * 255).round().eq(50).all()
    assert all(batch["label"].unique().tolist() == [0, 1] for batch in found.values())
    assert sum(parts.about["counts"]) == len(parts.train)


def test_two_folders_for_one_split_are_refused(tmp_path):
    for split in ("train", "val", "dev"):
        picture(tmp_path / split / "cat" / "0.png", 5)
    with pytest.raises(InputError, match="dev and val, which both are valid"):
        images.load(0, tmp_path)


def write_texts(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": words, "label": label, "id": 3}) + "\n" for words, label in rows))
        return path
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([("text", "label"), *rows])
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_texts_from_every_kind_of_table(tmp_path, suffix):
    rows = [(f"word {i}", "ab"[i % 3 == 0]) for i in range(30)]
    parts = text.load(0, str(write_texts(tmp_path / f"all{suffix}", rows)))
    assert len(parts.train) == 24 and parts.about["counts"] == [16, 8]
    folder = tmp_path / "divided"
    folder.mkdir()
    for split, words in (("train", rows[:20]), ("dev", rows[20:26]), ("test", rows[26:])):
        write_texts(folder / f"{split}{suffix}", words)
    parts = text.load(0, str(folder))
    tokens = parts.test.batch(torch.arange(4))["tokens"]
    assert sorted(text.decode(row) for row in tokens) == [words for words, _ in rows[26:]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"text": "a", "label": 1}\nno\n', "line 2 is no JSON"),
        ('{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2 lacks label"),
        ('{"text": "a", "label": ["x", "y"]}\n', "line 1 holds several values in label"),
        ("[1]\n", "line 1 lacks fields"),
        ('{"words": "a", "label": 1}\n', "needs a column named text"),
    ],
)
def test_json_lines_that_cannot_be_read_are_explained(tmp_path, content, says):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=says):
        text.load(0, str(path))


# --- colours ---


@pytest.mark.parametrize(
    ("modes", "channels"), [(("L", "L"), 1), (("1", "I;16"), 1), (("L", "RGB"), 3), (("LA", "L"), 1), (("P", "L"), 3)]
)
def test_images_are_grey_if_all_of_them_are(tmp_path, modes, channels):
    for label, mode in zip(("cat", "dog"), modes, strict=True):
        for number in range(3):
            picture(tmp_path / label / f"{number}.png", 1 if mode == "1" else (9, 255) if mode == "LA" else 9, mode)
    parts = images.load(0, tmp_path, image_size=8)
    assert parts.about["channels"] == channels
    assert parts.train.batch(torch.arange(2))["image"].shape == (2, channels, 8, 8)
    for asked in (1, 3):
        assert images.load(0, tmp_path, image_size=8, channels=asked).about["channels"] == asked


def test_grey_is_the_luminance_of_colours(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    assert images.read_image(tmp_path / "red.png", 4, 1).unique().tolist() == [76]
    Image.new("L", (8, 8), 76).save(tmp_path / "grey.png")
    assert images.read_image(tmp_path / "grey.png", 4, 1).shape == (4, 4, 1)
    assert images.read_image(tmp_path / "grey.png", 4).shape == (4, 4, 3)


def test_mixup_mixes_images_and_their_labels_alike():
    torch.manual_seed(0)
    labels = torch.arange(6)
    pictures = torch.nn.functional.one_hot(labels, 6).float().view(6, 1, 1, 6).expand(-1, 3, 2, -1)
    pixels, soft = mixed(pictures, labels, 6, 0.5)
    assert torch.equal(pixels[:, 0, 0], soft) and (soft.sum(-1) - 1).abs().max() < 1e-6
    assert ((soft > 0) & (soft < 1)).any()


def test_a_folder_of_grey_images_trains_with_everything(tmp_path):
    rng = np.random.default_rng(0)
    for label, level in (("dark", 60), ("light", 200)):
        for number in range(12 if label == "dark" else 6):
            path = tmp_path / "data" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(level - 40, level + 40, (8, 8), dtype=np.uint8)).save(path)
    small = {"data": str(tmp_path / "data"), "image_size": 8, "dim": 16, "layers": 1, "heads": 2}
    result = run(TASKS["images"](**small, mixup=0.3, label_smoothing=0.1), tmp_path / "mixed")
    assert result["details"]["classes"] == ["dark", "light"]
    assert sum(map(sum, result["details"]["confusion"])) == result["examples"]["test"]
    run(TASKS["images"](**small, class_weights="balanced"), tmp_path / "weighted")
    model = ViT.from_pretrained(tmp_path / "weighted" / "model")
    assert model.config.backbone.channels == 1 and model.config.id2label == {0: "dark", 1: "light"}
    weights = model.config.labels.class_weights
    assert weights[1] == pytest.approx(2 * weights[0], rel=0.3)
    for wrong in (
        {"mixup": 0.2, "class_weights": "balanced"},
        {"mixup": -1.0},
        {"class_weights": "more"},
        {"channels": 2},
    ):
        with pytest.raises(InputError):
            TASKS["images"](**small, **wrong)


# --- measures ---


def test_f1_and_confusions_are_scikit_learns():
    from sklearn import metrics

    torch.manual_seed(0)
    values = {"label": torch.randint(0, 4, (60,)), "predicted": torch.randint(0, 4, (60,)).clamp(max=2)}
    matrix = confusion(values, 5)
    true, named = values["label"].tolist(), values["predicted"].tolist()
    assert matrix.tolist() == metrics.confusion_matrix(true, named, labels=range(5)).tolist()
    expected = metrics.precision_recall_fscore_support(true, named, labels=range(5), zero_division=0)
    for name, theirs in zip(("precision", "recall", "f1"), expected, strict=False):
        assert scores(matrix)[name].tolist() == pytest.approx(list(theirs))


def test_accumulated_batches_of_weighted_classes_make_the_step_of_one_batch(tmp_path):
    for label, count in (("x", 4), ("y", 20)):
        for number in range(count):
            picture(tmp_path / "data" / label / f"{number}.png", (number * 9) % 255, "L")
    task = TASKS["images"](
        data=str(tmp_path / "data"), image_size=8, dim=16, layers=1, heads=2, class_weights="balanced", augment=False
    )
    losses = []
    for name, batch, accumulate in (("one", 16, 1), ("four", 4, 4)):
        train(task, TrainOptions(tmp_path / name, steps=3, batch=batch, accumulate=accumulate, tensorboard=False))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if '"train"' in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- a pretrained text model ---


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def reviews(count):
    return [(f"what a {('terrible', 'great')[i % 4 == 0]} film", ("no", "yes")[i % 4 == 0]) for i in range(count)]


@pytest.mark.parametrize("max_length", [8, 40])
def test_a_pretrained_text_model_is_tuned_and_saved_with_its_tokenizer(bert, tmp_path, max_length):
    from transformers import AutoTokenizer

    data = write_texts(tmp_path / "a.jsonl", reviews(60))
    task = TASKS["text"](
        data=str(data), checkpoint=str(bert), max_length=max_length, class_weights="balanced",
        attention="sliding_window:left=8,right=8",
    )  # fmt: skip
    result = run(task, tmp_path / "run", steps=40, lr=1e-2)
    assert result["test"]["f1"] > 0.9 and result["details"]["classes"] == ["no", "yes"]
    folder = tmp_path / "run" / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), TextClassifier.from_pretrained(folder)
    inputs = tokenizer(["what a great film", "what a terrible film"], padding=True, return_tensors="pt")
    named = model(**inputs).logits.argmax(-1).tolist()
    assert [model.config.id2label[number] for number in named] == ["yes", "no"]
    assert model.config.max_len == max(16, max_length) and model.config.encoder.attention.startswith("sliding_window")


def test_a_text_task_without_what_it_needs_is_refused(tmp_path):
    with pytest.raises(InputError, match="needs --data and --checkpoint"):
        TASKS["text"](data="x.csv")
    data = write_texts(tmp_path / "a.csv", reviews(20))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="gives no tokenizer"):
        TASKS["text"](data=str(data), checkpoint=str(tmp_path / "empty")).splits(0)
