"""Wrong arguments of every command: one line that names what was given, exit code 2, and nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")

import typer.main

from efficient_attn import cli, models

NOWHERE = "file/x"  # below a file no folder can be made, by root neither
METHOD = "there is no method 'nosuch'"
LENGTH = "'abc' is not a length"
MODEL = "--model own.py"
TEXT = "--model lm --text text.txt --length 16"
# command: (arguments, what the line says)
WRONG: dict[str, list[tuple[str, str]]] = {
    "info": [("extra", "extra")],
    "bench": [
        ("nosuch", "suite 'nosuch' does not exist"),
        ("--seqlens abc", LENGTH),
        ("--seqlens 0", "'0' is not a length"),
        ("--seqlens 8k..1k", "beyond the last"),
        ("--methods nosuch", METHOD),
        ("--methods bigbird:block=0", "block must be a multiple of 16"),
        ("--peers nosuch", "--peers 'nosuch' does not exist"),
        ("--load nosuch.py", "nosuch.py"),
        ("--load broken.py", "No module named 'nosuchpackage'"),
        ("--resume", "there is no run under bench-results"),
        (f"--out {NOWHERE}", "cannot be made"),
    ],
    "report": [
        ("", "Missing argument"),
        ("nosuch", "'nosuch' does not exist"),
        ("folder", "has no results.jsonl"),
        ("cells.jsonl", "line 1 is no record"),
    ],
    "compare": [
        ("nosuch nosuch", "nosuch"),
        ("folder folder", "has no results.jsonl"),
        ("cells.jsonl cells.jsonl", "line 1 is no record"),
    ],
    "profile": [
        ("", "give --op SPEC or --model NAME"),
        ("--op nosuch", METHOD),
        ("--op dense --lengths abc", LENGTH),
        ("--op dense --heads 0", "heads must be a positive integer"),
        ("--op dense --dtype nosuch", "dtype 'nosuch' does not exist"),
        (f"--op dense --out {NOWHERE}", "cannot be made"),
        ("--op dense --trace folder", "--trace folder cannot be written: Is a directory"),
        ("--op dense --context-parallel x", "numbers of ranks"),
        ("--model nosuch", "there is no model 'nosuch'"),
        ("--model nosuch.py:make", "nosuch.py, which does not exist"),
        ("--model broken.py:make", "ModuleNotFoundError: No module named 'nosuchpackage' (line 1 of "),
        ("--model encoder --attention nosuch", METHOD),
    ],
    "recommend": [
        ("", "give --length N"),
        ("--length abc", LENGTH),
        ("--length 1k --candidate nosuch", METHOD),
        ("--length 1k --budget nan", "budget is an error"),
        ("--length 1k --device cuda", "measured on the CPU"),
        (f"--length 1k --out {NOWHERE}", "cannot be made"),
        (f"--length 1k {MODEL}:fails", "ValueError: it is broken (line 4 of "),
        ("--from nosuch", "nosuch has no results.jsonl"),
        ("--from folder", "folder has no results.jsonl"),
        ("--from broken.json", "no rows with times and errors"),
    ],
    "convert": [
        ("", "Missing option '--model'"),
        ("--model file", "file is a file; a checkpoint is a folder"),
        ("--model folder", "folder has no config.json"),
        (f"{MODEL}:nosuch", "nosuch, which is no function"),
        (f"{MODEL}:fails", "ValueError: it is broken (line 4 of "),
        (f"{MODEL}:number", "returned int; it must return (model, sample)"),
        (f"{MODEL}:plain", "no attention that can be converted"),
        ("--model broken.py:make", "No module named 'nosuchpackage'"),
        (f"{MODEL}:plain --out folder", "--out folder cannot be written: Is a directory"),
        (f"{MODEL}:plain --out nosuch/plan.json", "--out nosuch/plan.json: there is no folder nosuch"),
        (f"{MODEL}:plain --length 1", "--length"),
        ("--model lm --data nosuch", "--data nosuch does not exist"),
        ("--model lm --data broken.npz", "broken.npz holds no arrays of numbers"),
        ("--model lm --data broken.safetensors", "broken.safetensors cannot be read"),
        ("--model lm --data text.txt --length 100000", "too few for 8 pieces of 100000"),
        ("--model lm --data text.txt --length 16 --candidate nosuch", METHOD),
    ],
    "inspect": [
        ("", "Missing option '--model'"),
        ("--model file", "file is a file; a checkpoint is a folder"),
        (f"{MODEL}:fails", "ValueError: it is broken (line 4 of "),
        (f"{MODEL}:plain", "no attention was seen"),
        ("--model lm", "give one of --text"),
        ("--model lm --text nosuch", "--text nosuch does not exist"),
        ("--model lm --data broken.safetensors", "broken.safetensors cannot be read"),
        (f"{TEXT} --attention nosuch", METHOD),
        (f"{TEXT} --plan broken.json", "the plan is not JSON"),
        (f"{TEXT} --out folder", "--out folder cannot be written: Is a directory"),
        (f"{TEXT} --out {NOWHERE}", f"--out {NOWHERE}: there is no folder file"),
    ],
    "forecast": [
        ("", "Missing argument"),
        ("nosuch --data table.csv", "the run nosuch does not exist"),
        ("lm --data table.csv", "lm holds a CausalLM"),
        ("file --data table.csv", "file is a file"),
    ],
    "backtest": [
        ("nosuch --data table.csv", "the run nosuch does not exist"),
        ("lm --data table.csv --windows 0", "--windows"),
    ],
    "train": [
        ("nosuch", "No such command 'nosuch'"),
        ("digits --attention nosuch", METHOD),
        ("digits --steps 0", "--steps must be at least 1"),
        ("digits --device nosuch", "--device 'nosuch' does not exist"),
        ("digits --resume", "there is no run of digits"),
        (f"digits --out {NOWHERE}", "cannot be made"),
        ("images", "images needs --data FOLDER"),
        ("lm --data nosuch", "--data nosuch does not exist"),
        ("forecast --data nosuch.csv", "--data nosuch.csv does not exist"),
    ],
}
OWN = """import torch

def fails(length):
    raise ValueError("it is\\nbroken")

def number(length):
    return 3

def plain(length):
    return torch.nn.Linear(4, 4), torch.randn(2, 4)
"""


def commands() -> dict[str, object]:
    """Every command of the command line, those of `train` as well, by what a user types."""
    found = {}
    for name, command in typer.main.get_command(cli.app).commands.items():
        found[name] = command
        found |= {f"{name} {task}": one for task, one in getattr(command, "commands", {}).items()}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("wrong")
    for name in ("file", "broken.npz", "broken.safetensors"):
        (place / name).write_text("x")
    (place / "folder").mkdir()
    (place / "broken.json").write_text("{")
    (place / "cells.jsonl").write_text('{"type": "cell"}\n\n')
    (place / "table.csv").write_text("a,b\n1,x\n")
    (place / "text.txt").write_text("hello world " * 50)
    (place / "broken.py").write_text("import nosuchpackage\n")
    (place / "own.py").write_text(OWN)
    tower = models.TransformerConfig(32, 1, 2, causal=True, rotary=True)
    models.CausalLM(models.CausalLMConfig(259, 512, tower, positions="none")).save_pretrained(place / "lm")
    return place


def said(arguments, monkeypatch, capsys):
    """The line that the command ends with, which begins with "error: "."""
    monkeypatch.setattr(sys, "argv", ["efficient-attn", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2, (arguments, lines)
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def contents(place: Path) -> set[str]:
    return {str(path) for path in place.rglob("*") if "__pycache__" not in path.parts}


def test_every_command_is_here():
    assert {name.partition(" ")[0] for name in commands()} == set(WRONG)


@pytest.mark.parametrize("command", WRONG)
def test_the_line_names_what_is_wrong(command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = contents(folder)
    for arguments, text in WRONG[command]:
        line = said([command, *arguments.split()], monkeypatch, capsys)
        assert text in line, (arguments, line)
        made = {path for path in contents(folder) - before if "-results" not in path}  # the empty folder of a run
        assert not made, (arguments, made)


def test_options_that_do_not_exist_and_numbers_that_are_none(monkeypatch, capsys):
    every, count = commands(), 0
    monkeypatch.setattr(cli, "app", typer.main.get_command(cli.app))  # which otherwise is made anew each time
    for name, command in every.items():
        words = name.split()
        assert "--nosuch" in said([*words, "--nosuch"], monkeypatch, capsys)
        for option in command.params:
            if type(option.default) in (int, float):
                line = said([*words, option.opts[0], "abc"], monkeypatch, capsys)
                assert f"'{option.opts[0]}'" in line and "see efficient-attn" in line, (name, line)
                count += 1
    assert count > 100


def test_without_a_command_there_is_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["efficient-attn"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code and "recommend" in capsys.readouterr().out


def test_the_exit_code_of_a_command_is_that_of_the_program(tmp_path, monkeypatch):
    """Such as 1 of `compare` for a run that is worse."""
    cell = {"type": "cell", "suite": "ops", "status": "ok", "message": "", "ms": 1.0, "samples_ms": [1.0] * 9}
    config = {"method": "dense", "mode": "fwd", "threads": 1, "dtype": "float32"}
    for name, status in (("a", "ok"), ("b", "oom")):
        (tmp_path / name).mkdir()
        rows = [cell | {"id": f"{n}", "config": {**config, "seqlen": n}} for n in (64, 128)]
        rows[1]["status"] = status
        (tmp_path / name / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    for arguments, code in (("a a", 0), ("a b", 1)):
        monkeypatch.setattr(sys, "argv", ["efficient-attn", "compare", *arguments.split()])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert (end.value.code or 0) == code


def test_an_error_does_not_wait_for_what_takes_seconds_to_import():
    slow = ("torch._dynamo", "sklearn", "matplotlib.pyplot", "transformers")
    code = f"import sys, efficient_attn.cli; print([name for name in {slow} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr
