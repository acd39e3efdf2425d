"""A vision transformer that learns to read digits, with dense, sparse and low-rank attention in turn.

    python examples/image_classification.py
    python examples/image_classification.py --attention neighborhood:kernel=3,prefix=1 --steps 800
    python examples/image_classification.py --model google/vit-base-patch16-224 --image cat.jpg   # with a network

The images are scikit-learn's 1,797 handwritten digits.
"""

import argparse
import time

import torch

from efficient_attn.models import ImageConfig, TransformerConfig, ViT, ViTConfig
from efficient_attn.models.vision import accuracy
from efficient_attn.training.data import images

ATTENTION = ("dense", "sliding_window:left=5,right=5", "nystrom:landmarks=8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", action="append", help=f"spec, repeatable; default: {', '.join(ATTENTION)}")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--model", help="hub id or folder of a trained ViT, to classify --image")
    parser.add_argument("--image", help="an image file")
    options = parser.parse_args()
    if options.model:
        classify(options.model, options.image, options.attention)
        return

    data = images.load(seed=0)
    test = data.test.batch(torch.arange(len(data.test)))
    for attention in options.attention or ATTENTION:
        model, seconds = fit(attention, data, options.steps)
        with torch.no_grad():
            share = accuracy(model(test["image"]), test["label"])
        print(
            f"{attention:32} {share:6.1%} of {len(data.test)} new digits after {options.steps} steps, {seconds:.0f} s"
        )


def fit(attention: str, data, steps: int):
    torch.manual_seed(0)
    encoder = TransformerConfig(hidden_dim=64, num_layers=3, num_heads=4, mlp_dim=128, attention=attention)
    backbone = ImageConfig(image_size=8, patch_size=2, channels=1, overlap=1, pool="mean", encoder=encoder)
    model = ViT(ViTConfig(backbone, num_labels=10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    begun = time.perf_counter()
    for _ in range(steps):
        batch = data.train.batch(torch.randint(len(data.train), (64,)))
        loss = model.loss(batch["image"], batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval(), time.perf_counter() - begun


def classify(name: str, image: str | None, attention: list[str] | None) -> None:
    if image is None:
        raise SystemExit("--model needs --image FILE")
    model = ViT.from_pretrained(name, attention=(attention or ["dense"])[0])
    pixels = images.read_image(image, model.config.backbone.image_size).permute(2, 0, 1).float() / 127.5 - 1
    with torch.no_grad():
        found = model(pixels.unsqueeze(0)).softmax(dim=-1)[0].topk(5)
    for share, label in zip(found.values, found.indices, strict=True):
        print(f"{share:6.1%}  class {int(label)}")


if __name__ == "__main__":
    main()
