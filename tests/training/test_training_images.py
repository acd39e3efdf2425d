"""Data of images and captions: every depth, mode and orientation of a file, folders, digits."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
import torch

from efficient_attn import InputError
from efficient_attn.training.data import captions, images, series, text


def everything(data):
    return data.batch(torch.arange(len(data)))


# --- images and captions ---


def test_other_kinds_of_files_are_no_tables(tmp_path):
    path = tmp_path / "a.xlsx"
    path.write_bytes(b"PK")
    with pytest.raises(InputError, match="is no text; save it"):
        series.read_table(path, None)


@pytest.mark.parametrize("load", [images.load, captions.load])
def test_digits_are_as_large_as_asked_for(load):
    pytest.importorskip("sklearn")
    own, same, large = load(0), load(0, image_size=8), load(0, image_size=32)
    some = torch.arange(5)
    small, wide = own.train.batch(some)["image"], large.train.batch(some)["image"]
    assert own.about["image_size"] == 8 and large.about["image_size"] == 32 and wide.shape == (5, 1, 32, 32)
    torch.testing.assert_close(same.train.batch(some)["image"], small)
    torch.testing.assert_close(wide, torch.nn.functional.interpolate(small, (32, 32), mode="bilinear"))
    if load is images.load:
        colours = load(0, channels=3)
        assert colours.about["channels"] == 3 and colours.test.batch(some)["image"].shape == (5, 3, 8, 8)


def test_digits_are_divided_by_seed():
    pytest.importorskip("sklearn")
    one, same, few = images.load(1), images.load(1), images.load(1, labels_per_class=10)
    assert torch.equal(one.test.indices, same.test.indices) and torch.equal(one.test.indices, few.test.indices)
    used = torch.cat([one.train.indices, one.valid.indices, one.test.indices])
    assert len(used.unique()) == 1797 and len(one.test) == 359
    assert everything(few.train)["label"].bincount().tolist() == [10] * 10
    assert set(few.train.indices.tolist()) <= set(one.train.indices.tolist())
    pixels = everything(one.test)["image"]
    assert pixels.shape == (359, 1, 8, 8) and pixels.min() == 0 and pixels.max() == 1
    with pytest.raises(InputError, match="were asked for"):
        images.load(1, labels_per_class=1000)


def picture(path, colour, size=(20, 10)):
    pillow = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.new("RGB", size, colour).save(path)


def test_images_from_a_folder(tmp_path):
    for number in range(5):
        picture(tmp_path / "red" / f"{number}.png", (255, 0, 0))
        picture(tmp_path / "white" / f"{number}.jpg", (255, 255, 255), size=(9, 33))
    parts = images.load(0, tmp_path, image_size=8)
    batch = everything(parts.train)
    assert batch["image"].shape == (6, 3, 8, 8) and parts.about["names"] == ["red", "white"]
    for image, label in zip(batch["image"], batch["label"], strict=True):
        expected = torch.tensor([1.0, label, label]).view(3, 1, 1)
        assert (image - expected).abs().max() < 0.02
    (tmp_path / "red" / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"0\.png cannot be read as an image"):
        for part in (parts := images.load(0, tmp_path, image_size=8)).train, parts.valid, parts.test:
            everything(part)
    with pytest.raises(InputError, match="a folder of images for each class"):
        images.load(0, tmp_path / "red")


def test_an_image_keeps_its_central_square(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    pillow.fromarray(wide).save(tmp_path / "wide.png")
    assert (images.read_image(tmp_path / "wide.png", 4) == 200).all()


GREYS = np.arange(256).repeat(16).reshape(64, 64)


def deep_tiff(path, values, **tags):
    """A TIFF of unsigned 16-bit numbers, written by hand: Pillow writes neither 12 bits nor white as zero."""
    names = {"bits": 258, "photometric": 262}
    entries = {256: 64, 257: 64, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: 64, 279: values.nbytes}
    entries |= {names[name]: value for name, value in tags.items()}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    head = struct.pack("<2sHI", b"II", 42, 8 + values.nbytes)
    path.write_bytes(head + values.tobytes() + struct.pack("<H", len(entries)) + table + bytes(4))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("8.png", GREYS.astype(np.uint8)),
        ("8.tif", GREYS.astype(np.uint8)),
        ("16.png", (GREYS * 257).astype(np.uint16)),
        ("16.tif", (GREYS * 257).astype(np.uint16)),
        ("16-big-endian.tif", (GREYS * 257).astype(">u2")),
        ("float.tif", (GREYS / 255).astype(np.float32)),
        ("colour.png", GREYS.astype(np.uint8)[..., None].repeat(3, 2)),
        ("opaque.png", np.stack([*[GREYS] * 3, np.full_like(GREYS, 255)], 2).astype(np.uint8)),
        ("grey-opaque.png", np.stack([GREYS, np.full_like(GREYS, 255)], 2).astype(np.uint8)),
    ],
)
def test_an_image_is_the_same_in_every_depth_and_mode(tmp_path, name, values):
    pillow = pytest.importorskip("PIL.Image")
    pillow.fromarray(values).save(tmp_path / name)
    for size in (64, 16):
        pillow.fromarray(GREYS.astype(np.uint8)).save(tmp_path / "plain.png")
        expected = images.read_image(tmp_path / "plain.png", size).float()
        read = images.read_image(tmp_path / name, size)
        assert read.shape == (size, size, 3) and (read.float() - expected).abs().max() <= 1, "rounding to bytes"
    batch = images.ImageFiles([tmp_path / name, tmp_path / "plain.png"], 8).batch(torch.arange(2))["image"]
    assert batch.dtype == torch.float32 and (batch[0] - batch[1]).abs().max() < 0.01


def test_deep_greys_are_scaled_by_the_depth_that_the_file_states(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.tif"
    deep_tiff(path, (GREYS * 257).astype("<u2"))
    torch.testing.assert_close(images.read_image(path, 64)[..., 0], torch.from_numpy(GREYS).float())
    deep_tiff(path, (GREYS * 257).astype("<u2"), photometric=0)
    torch.testing.assert_close(images.read_image(path, 64)[..., 0], 255 - torch.from_numpy(GREYS).float())
    twelve = np.zeros((64, 96), np.uint8)  # two numbers in three bytes
    high, low = (GREYS * 16)[:, ::2], (GREYS * 16)[:, 1::2]
    twelve[:, ::3], twelve[:, 1::3], twelve[:, 2::3] = high >> 4, (high & 15) << 4 | low >> 8, low & 255
    deep_tiff(path, twelve, bits=12)
    expected = torch.from_numpy(GREYS * 16 * 255 / 4095).float()
    torch.testing.assert_close(images.read_image(path, 64)[..., 0], expected)
    pillow.fromarray((GREYS * 16).astype(np.uint16)).save(tmp_path / "a.png")  # 12 bits of 16: dark, but all there
    assert len(images.read_image(tmp_path / "a.png", 64).unique()) == 256


def test_transparent_is_white(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    half = np.zeros((8, 8, 4), np.uint8)  # black ink, or nothing
    half[:4, :, 3] = 255
    pillow.fromarray(half).save(tmp_path / "a.png")
    pillow.fromarray(half).quantize(4).save(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        read = images.read_image(tmp_path / name, 8)
        assert (read[:4] == 0).all() and (read[4:] == 255).all()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((GREYS * 16).astype(np.int32), "from 0 to 4080 of a kind whose black and white the file does not say"),
        ((GREYS * 4.0 - 1000).astype(np.float32), "from -1000 to 20"),
        (np.full((4, 4), np.nan, np.float32), "from nan to nan"),
    ],
)
def test_images_without_a_known_range_are_refused(tmp_path, values, says):
    pillow = pytest.importorskip("PIL.Image")
    pillow.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=says):
        images.read_image(tmp_path / "a.tif", 8)


def test_several_pages_are_refused(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    page = pillow.new("L", (4, 4))
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page, page])
    with pytest.raises(InputError, match="holds 3 pages"):
        images.read_image(tmp_path / "a.tif", 4)


CLUTTER = (
    ".ipynb_checkpoints/0{}",
    "._0{}",
    ".hidden{}",
    "cat/.ipynb_checkpoints/0{}",
    "cat/._0{}",
    "__MACOSX/cat/0{}",
)


def test_hidden_files_are_no_examples_and_empty_classes_are_refused(tmp_path):
    for root, suffix in ((tmp_path / "images", ".png"), (tmp_path / "texts", ".txt")):
        for name in ("cat", "dog"):
            for number in range(5):
                file = root / name / f"{number}{suffix}"
                picture(file, (9, 9, 9)) if suffix == ".png" else file.parent.mkdir(parents=True, exist_ok=True)
                file.exists() or file.write_text("a text")
        for name in CLUTTER:
            (root / name.format(suffix)).parent.mkdir(parents=True, exist_ok=True)
            (root / name.format(suffix)).write_bytes(b"\0\5\x16\7")
    for read in (
        lambda: images.load(0, tmp_path / "images", image_size=8),
        lambda: text.load(0, str(tmp_path / "texts")),
    ):
        parts = read()
        assert parts.about["names"] == ["cat", "dog"] and sum(map(len, (parts.train, parts.valid, parts.test))) == 10
        parts.fingerprint()
    (tmp_path / "images/cat/0.txt").write_text("a cat")
    assert [image.name for image, _ in captions._from_text_files(tmp_path / "images")] == ["0.png"]
    for root, read in (
        ("images", lambda: images.load(0, tmp_path / "images")),
        ("texts", lambda: text.load(0, str(tmp_path / "texts"))),
    ):
        (tmp_path / root / "bird").mkdir()
        (tmp_path / root / "bird" / ".DS_Store").write_bytes(b"")
        with pytest.raises(InputError, match=r"bird holds no (images|text files)"):
            read()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "deep.png"])
def test_an_image_is_turned_as_its_camera_was_held(tmp_path, name, orientation):
    pillow = pytest.importorskip("PIL.Image")
    seen = np.zeros((16, 16), np.uint8)
    seen[:8, :8], seen[:8, 8:], seen[8:, :8] = 250, 170, 90  # as it shall be seen, no two turns of it alike
    stored = [
        seen,
        seen[:, ::-1],
        seen[::-1, ::-1],
        seen[::-1],
        seen.T,
        np.rot90(seen),
        seen[::-1, ::-1].T,
        np.rot90(seen, 3),
    ]
    exif = pillow.Exif()
    exif[274] = orientation
    values = np.ascontiguousarray(stored[orientation - 1])
    pillow.fromarray(values.astype(np.uint16) * 257 if name == "deep.png" else values).save(tmp_path / name, exif=exif)
    read = images.read_image(tmp_path / name, 16)[..., 0].float()
    assert (read - torch.from_numpy(seen)).abs().max() < 12, "but for JPEG's losses"


def test_an_image_too_large_to_decode_is_explained(tmp_path, monkeypatch):
    pillow = pytest.importorskip("PIL.Image")
    picture(tmp_path / "a.png", (0, 0, 0), size=(30, 30))
    monkeypatch.setattr(pillow, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"a\.png is too large to be decoded"):
        images.read_image(tmp_path / "a.png", 8)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_captions_may_have_a_byte_order_mark_and_other_encodings_are_explained(tmp_path, encoding):
    for number in range(4):
        picture(tmp_path / f"{number}.png", (number, 0, 0))
        (tmp_path / f"{number}.txt").write_text("naïve", encoding=encoding)
    if encoding == "latin-1":
        with pytest.raises(InputError, match=r"0\.txt is not in UTF-8"):
            captions.load(0, tmp_path)
    else:
        assert text.decode(everything(captions.load(0, tmp_path).train)["tokens"][0]) == "naïve"


def test_captions_name_their_digit():
    pytest.importorskip("sklearn")
    parts = captions.load(0)
    batch = everything(parts.train)
    for tokens, label in zip(batch["tokens"], batch["label"], strict=True):
        assert captions.NAMES[label] in re.split(r"\W+", text.decode(tokens))
    prompts = [text.decode(tokens) for tokens in parts.about["prompts"]["tokens"]]
    assert len(prompts) == 50 and all(captions.NAMES[place // 5] in prompt for place, prompt in enumerate(prompts))


def test_captions_from_files(tmp_path):
    for number in range(4):
        picture(tmp_path / f"{number}.png", (number, 0, 0))
        (tmp_path / f"{number}.txt").write_text(f"number {number}")
    parts = captions.load(0, tmp_path, image_size=4)
    batch = everything(parts.train)
    for image, tokens in zip(batch["image"], batch["tokens"], strict=True):
        assert text.decode(tokens) == f"number {round(image[0, 0, 0].item() * 255)}"
    (tmp_path / "captions.csv").write_text("file,caption\n" + "".join(f"{n}.png,table {n}\n" for n in range(4)))
    assert text.decode(everything(captions.load(0, tmp_path).train)["tokens"][0]).startswith("table")
    (tmp_path / "captions.csv").write_text("file,caption\nmissing.png,x\n")
    with pytest.raises(InputError, match=r"missing\.png, which does not exist"):
        captions.load(0, tmp_path)
    (tmp_path / "captions.csv").write_text("image,words\n")
    with pytest.raises(InputError, match="columns file and caption"):
        captions.load(0, tmp_path)
