"""A first hour with the package, end to end, as a newcomer spends it: `make first-hour`.

Every step ends well within its time, and none keeps silent for longer than `SILENCE_S` without saying why.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.slow
SILENCE_S = 30.0  # a line every five seconds, and the minutes of others' work on the same cores
CLI = (sys.executable, "-m", "efficient_attn.cli")

DROP_IN = """
import torch
from efficient_attn import replace_attention

model = torch.nn.Transformer(64, 4, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=128, batch_first=True)
before = set(model.state_dict())
replace_attention(model.encoder, attention="sliding_window:left=32,right=32")
assert before == set(model.state_dict())
out = model(torch.randn(2, 200, 64), torch.randn(2, 40, 64))
out.sum().backward()
assert out.shape == (2, 40, 64) and all(p.grad is not None for p in model.parameters())
print("an nn.Transformer with a window in its encoder, forward and backward")
"""
BERT = """
import torch
from transformers import BertConfig, BertModel
from efficient_attn.integrations import convert

torch.manual_seed(0)
config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
model = BertModel(config).eval()
report = convert(model, "sliding_window:left=16,right=16", sample={"input_ids": torch.randint(100, (1, 128))})
assert report.dense_error < 1e-4 and report.converted
print(report)
"""
INSPECT = """
import pathlib, sys, torch
from efficient_attn import cli, models

torch.manual_seed(0)
tower = models.TransformerConfig(32, 2, 4, causal=True, rotary=True)
models.CausalLM(models.CausalLMConfig(259, 512, tower, positions="none")).save_pretrained("lm")
pathlib.Path("text.txt").write_text("attention looks at what matters and leaves the rest alone. " * 8)
sys.argv[1:] = "inspect --model lm --text text.txt --length 256 --attention sliding_window:left=32,right=0".split()
cli.main()
"""
PROFILE = "profile --op sliding_window --lengths 1k..32k --heads 2 --budget 0.1 --out profile"
RECOMMEND = "recommend --length 2k --activations photographs --seconds 0.1 --out recommend"
TRAIN = "train digits --attention nystrom:landmarks=16 --steps 30 --out train"
STEPS = {
    "info": (*CLI, "info"),
    "bench": (*CLI, "bench", "--quick", "--out", "bench"),
    "drop-in": (sys.executable, "-c", DROP_IN),
    "bert": (sys.executable, "-c", BERT),
    "profile": (*CLI, *PROFILE.split()),
    "recommend": (*CLI, *RECOMMEND.split()),
    "inspect": (sys.executable, "-c", INSPECT),
    "train": (*CLI, *TRAIN.split()),
}


@pytest.fixture(scope="module")
def patience():
    """Seconds that a step may keep silent: as long as a start takes, which on a busy machine is longer."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import efficient_attn.cli, matplotlib.pyplot"], check=True)
    return max(SILENCE_S, 3 * (time.monotonic() - started))


@pytest.mark.parametrize("name", STEPS)
def test_step(name, tmp_path, patience):
    if name == "bert":
        pytest.importorskip("transformers")
    started = last = time.monotonic()
    command = STEPS[name]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"},
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    said, longest = [], 0.0
    while True:
        try:
            line = lines.get(timeout=300)
        except queue.Empty:
            process.kill()
            pytest.fail(f"{name}: nothing for five minutes after {said[-3:]}")
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
        if line is None:
            break
        said.append(line)
    code = process.wait()
    text = "".join(said)
    print(f"\n{name}: {time.monotonic() - started:.0f} s, the longest silence {longest:.0f} s\n{text}")
    assert code == 0 and "Traceback" not in text, text
    assert longest < patience, f"{name} kept silent for {longest:.0f} s"
    written = {name: f"{name}/{name}.png" for name in ("profile", "recommend")}
    written |= {"bench": "bench/report.html", "inspect": "inspect.html"}
    assert name not in written or (tmp_path / written[name]).exists()
    if name == "bench":
        assert "Speed against torch SDPA" in text and "report.html" in text
