"""CLIP: which text belongs to which image, and classes that are named only after training.

    python examples/clip_matching.py
    python examples/clip_matching.py --attention sliding_window:left=5,right=5 --epochs 30
    python examples/clip_matching.py --model openai/clip-vit-base-patch32 --image cat.jpg --text "a cat" --text "a dog"

Without a model one is trained for a minute on handwritten digits and captions such as "a handwritten three"; the last
line needs a network or a folder.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from efficient_attn.models import CLIP
from efficient_attn.training import TrainOptions, train
from efficient_attn.training.data import captions
from efficient_attn.training.data.text import encode
from efficient_attn.training.tasks import TASKS

TEXTS = tuple(f"a handwritten {name}" for name in captions.NAMES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", default="dense", help="spec of the image tower's attention")
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--model", help="hub id or folder of a trained CLIP")
    parser.add_argument("--image", help="an image file for --model")
    parser.add_argument("--text", action="append", help="a text to compare with, repeatable")
    options = parser.parse_args()
    if options.model:
        match_file(options.model, options.image, options.text or ["a photo of a cat", "a photo of a dog"])
        return

    task = TASKS["clip"](attention=options.attention)
    with tempfile.TemporaryDirectory() as folder:
        chosen = TrainOptions(Path(folder) / "run", epochs=options.epochs, batch=64, lr=2e-3, tensorboard=False)
        result = train(task, chosen)
        model = CLIP.from_pretrained(chosen.out / "model")
    print(f"digits that are named right without a classifier: {result['test']['zero_shot']:.1%}")

    test = task.splits(seed=0).test.batch(torch.arange(5))
    texts = options.text or TEXTS
    ids = captions.pad([encode(text, task.max_length, marks=True) for text in texts])["tokens"]
    with torch.no_grad():
        shares = model(test["image"], ids).softmax(dim=-1)
    for image, share in zip(test["image"], shares, strict=True):
        print("\n".join("".join(" .:-=+*#%@"[int(pixel * 9)] * 2 for pixel in row) for row in image[0]))
        for place in share.topk(2).indices.tolist():
            print(f"{share[place]:6.1%}  {texts[place]}")


def match_file(name: str, image: str | None, texts: list[str]) -> None:
    from transformers import AutoProcessor

    from efficient_attn.training.data.images import pillow

    if image is None:
        raise SystemExit("--model needs --image FILE")
    model, processor = CLIP.from_pretrained(name), AutoProcessor.from_pretrained(name)
    batch = processor(images=pillow().open(image), text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        shares = model(**batch).logits_per_image.softmax(dim=-1)[0]
    for share, text in zip(shares, texts, strict=True):
        print(f"{share:6.1%}  {text}")


if __name__ == "__main__":
    main()
