"""Ctrl-C in every command that takes long, with a terminal and without: what is kept is said, and going on works."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")

PATIENCE_S = 180.0  # of a machine that others use
TESTS = Path(__file__).resolve().parents[1]
LAYERS = 8
MODEL = f"""
import pathlib, torch
from efficient_attn import models

class Noted(models.CausalLM):
    def forward(self, *args, **kwargs):
        pathlib.Path("forward.txt").open("a").write("x")
        return super().forward(*args, **kwargs)

def make(length):
    torch.manual_seed(0)
    tower = models.TransformerConfig(32, {LAYERS}, 4, causal=True, rotary=True)
    model = Noted(models.CausalLMConfig(64, 4096, tower, positions="none"))
    return model, torch.randint(64, (2, length))
"""
WINDOWS = " ".join(f"--candidate sliding_window:left={left},right=0" for left in (16, 32, 64, 128))
# name: the command, and the file in which so many lines say that it is at work; None: what it prints does.
COMMANDS: dict[str, tuple[str, str | None, int]] = {
    "bench": ("bench ops --mode fwd --threads 1 --methods linear --seqlens 64:4k:x2 --out run", "run/results.jsonl", 3),
    "profile": ("profile --op linear --lengths 64:2k:x2 --heads 2 --budget 0.5 --out run", "run/results.jsonl", 3),
    "ranks": ("profile --op dense --op causal --lengths 256 --context-parallel 1,2 --out run", "run/results.jsonl", 3),
    "recommend": ("recommend --length 256 --seconds 0.5 --out run", "run/results.jsonl", 3),
    "train": ("train digits --steps 200 --out run", "run/metrics.jsonl", 3),
    "convert": (f"convert --model model.py:make --probes 1 --budget 0.5 {WINDOWS}", "plan.measured.jsonl", 2),
    "inspect": ("inspect --model model.py:make --length 4096", "forward.txt", 1),
    "fuzz": ("mask module --cases 250", None, 0),
}
FAST = (("convert", "terminal"),)  # the others: make test-slow


def cases() -> list:
    every = [(name, how) for name in COMMANDS for how in ("terminal", "pipe")]
    return [pytest.param(*c, marks=() if c in FAST else pytest.mark.slow, id="-".join(c)) for c in every]


class Running:
    """A command in a session of its own, as a shell starts it; a terminal is its controlling terminal."""

    def __init__(self, command: list[str], folder: Path, how: str) -> None:
        self.terminal = how == "terminal"
        ends = pty.openpty() if self.terminal else os.pipe()
        self.read_end, write_end = ends

        def begin() -> None:
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs in the background of a script ignores it
            if self.terminal:
                fcntl.ioctl(1, termios.TIOCSCTTY, 0)

        environment = {**os.environ, "COLUMNS": "160", "PYTHONPATH": str(TESTS), "TERM": "xterm"}
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=write_end if self.terminal else subprocess.DEVNULL, stdout=write_end,
            stderr=write_end, env=environment, preexec_fn=begin,
        )  # fmt: skip
        os.close(write_end)
        self.said = ""

    def hear(self, seconds: float) -> None:
        """Read what it prints for so long; a terminal that nobody reads would stop it."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and select.select([self.read_end], [], [], left)[0]:
            try:
                got = os.read(self.read_end, 65536)
            except OSError:  # the terminal is closed
                got = b""
            if not got:
                time.sleep(min(left, 0.05))
                return
            self.said += got.decode(errors="replace")

    def interrupt(self) -> None:
        """What Ctrl-C does: all processes of the session are told."""
        if self.terminal:
            os.write(self.read_end, b"\x03")
        else:
            os.killpg(self.process.pid, signal.SIGINT)

    def end(self, seconds: float = PATIENCE_S) -> int:
        until = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < until:
            self.hear(0.2)
        if self.process.poll() is None:
            self.process.kill()
            pytest.fail(f"it goes on for {seconds} s:\n{self.text()}")
        self.hear(0.5)
        os.close(self.read_end)
        return self.process.returncode

    def text(self) -> str:
        """What it printed, without colours; of a line that was written again and again the last."""
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.said).replace("\r\n", "\n")
        return "\n".join(line.rpartition("\r")[2] for line in plain.split("\n"))


def at_work(running: Running, folder: Path, file: str | None, count: int) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        running.hear(0.1)
        assert running.process.poll() is None, running.text()
        if file is None and re.search(r"\d of [\d,]+", running.text()):
            return
        if file is not None and (folder / file).exists():
            text = (folder / file).read_text()
            if max(text.count("\n"), len(text) if file.endswith(".txt") else 0) >= count:
                return
    running.process.kill()
    pytest.fail(f"not at work within {PATIENCE_S:.0f} s:\n{running.text()}")


@pytest.mark.parametrize(("name", "how"), cases())
def test_ctrl_c_says_what_is_kept_and_going_on_works(name: str, how: str, tmp_path: Path) -> None:
    arguments, file, count = COMMANDS[name]
    command = [sys.executable, "-m", "support.fuzz" if name == "fuzz" else "efficient_attn.cli", *arguments.split()]
    (tmp_path / "model.py").write_text(MODEL)
    running = Running(command, tmp_path, how)
    at_work(running, tmp_path, file, count)
    running.interrupt()
    code, text = running.end(), running.text()
    assert code == 130 and "interrupted by Ctrl-C" in text, text
    assert "Traceback" not in text and "KeyboardInterrupt" not in text, text
    going_on = text[text.index("interrupted by Ctrl-C") :].splitlines()[1].strip()
    assert going_on.startswith(sys.executable), text
    before = {path: path.read_text() for path in tmp_path.glob("**/*.jsonl")}
    assert bool(before) == (name not in ("inspect", "fuzz"))
    result = subprocess.run(
        going_on, shell=True, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(TESTS)}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for path, lines in before.items():
        assert not path.exists() or path.read_text().startswith(lines), "what was kept is kept"
    if name in ("convert", "inspect"):
        assert (tmp_path / {"convert": "plan.json", "inspect": "inspect.html"}[name]).exists()
    if name == "convert":
        assert not (tmp_path / "plan.measured.jsonl").exists(), "a search that is done leaves no file behind"
