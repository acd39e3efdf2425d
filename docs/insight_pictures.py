"""Makes the pictures of insight.md by the tool itself: python docs/insight_pictures.py [FOLDER]

Writes the models of `make budget` (MiniLM, and those that it trains and keeps) and what they look at into the folder,
inspects each by the command that insight.md shows, and takes pictures of the pages with Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from efficient_attn.benchmarks.suites import budget
from efficient_attn.benchmarks.suites.longer import minilm

DOCS = Path(__file__).resolve().parent
# Name of a picture -> options of `inspect`, the head that is shown, and the height that is kept, in pixels.
PICTURES = {
    "text": ("--model {minilm} --text text.txt --attention sliding_window:left=8,right=8", "3.1", 1290),
    "image": ("--model image --image three.png --attention nystrom:landmarks=64", "2.1", 1225),
    "series": ("--model series --series co2.csv --attention sliding_window:left=64,right=64", "1.1", 1090),
    "clip": ("--model clip --image three.png", "2.2", 1225),
}
WIDTH, COLOURS = 900, 96
TEXT = (
    "The cat sat on the mat because it was tired. The dog that chased the cat sat down as well, because it was tired "
    "too. Neither of them looked at the bird, which had been watching both of them from the roof since the morning."
)
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars --blink-settings=preferredColorScheme=1"


def inputs(folder: Path) -> None:
    """What the models look at: a text, a written 3, and the weeks of CO2 over Mauna Loa."""
    import statsmodels.api
    from PIL import Image
    from sklearn.datasets import load_digits

    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    digits = load_digits()
    three = next(n for n in range(1700, 0, -1) if digits.target[n] == 3)  # one that was held out of training
    Image.fromarray((digits.images[three] * 255 / 16).astype("uint8")).save(folder / "three.png")
    statsmodels.api.datasets.co2.load_pandas().data.to_csv(folder / "co2.csv")


def models(folder: Path) -> None:
    """The trained models of the suite `budget`, as folders that `inspect` reads."""
    for name in ("image", "series", "clip"):
        model = budget.source(name, budget.STEPS, seed=0).model
        model = model.model if isinstance(model, budget.Change) else model
        model.save_pretrained(folder / name)
        task, options, _ = budget.TASKS[name]
        if name == "series":
            chosen = task(**options)
            chosen.reader(chosen.splits(budget.TRAINING_SEED).about).save_pretrained(folder / name)


def take(page: Path, address: str, height: int, out: Path) -> None:
    """A picture of a page's head, in few colours, so that it is small."""
    from PIL import Image

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("the pictures are taken with Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, *FLAGS.split(), f"--user-data-dir={profile}", f"--window-size={WIDTH},{height}"]
        subprocess.run([*command, f"--screenshot={out}", f"{page.as_uri()}#{address}"], check=True, capture_output=True)
    Image.open(out).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(out, optimize=True)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    inputs(folder)
    models(folder)
    program = [sys.executable, "-m", "efficient_attn.cli", "inspect"]
    for name, (options, address, height) in PICTURES.items():
        page = folder.resolve() / f"{name}.html"
        command = [*program, *options.format(minilm=minilm()).split(), "--out", str(page)]
        subprocess.run(command, cwd=folder, check=True)
        out = DOCS / f"insight-{name}.png"
        take(page, address, height, out)
        print(f"{out.name}: {out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path("runs/insight"))
