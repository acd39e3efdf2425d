"""The command line: options are checked before work starts, runs can be interrupted and resumed, files reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from typer.testing import CliRunner

from efficient_attn import cli
from efficient_attn.benchmarks import cases, commands
from efficient_attn.measuring import options, records

SMALL = [
    "bench",
    "ops",
    "--quick",
    "--methods",
    "dense,linear",
    "--seqlens",
    "64,128",
    "--mode",
    "fwd",
    "--threads",
    "1",
]


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}).invoke(cli.app, list(arguments))


# --- options ---


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("dense", ["dense"]),
        ("dense,linear", ["dense", "linear"]),
        ("bigbird:block=64,window=3,dense", ["bigbird:block=64,window=3", "dense"]),
        ("strided:a=1,b=2+linear:c=3, linear", ["strided:a=1,b=2+linear:c=3", "linear"]),
        (",dense,", ["dense"]),
        (
            "per_head(strided:stride=16,part=local; fixed:stride=16,causal=false),bigbird & causal",
            ["per_head(strided:stride=16,part=local; fixed:stride=16,causal=false)", "bigbird & causal"],
        ),
    ],
)
def test_specs_in_a_list_keep_their_own_commas(text, specs):
    assert options.split_specs(text) == specs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "choose from all, cpu,"),
        (["all", "ops"], "'all' stands alone"),
        (["--backend", "gpu"], "choose from auto, triton, cuda, cpu"),
        (["--dtype", "int8"], "choose from float32"),
        (["--mode", "backward"], "choose from fwd, fwd_bwd, decode"),
        (["--methods", "bigbirt"], "did you mean 'bigbird'"),
        (["--methods", "bigbird:blocks=64"], "no option 'blocks'"),
        (["--seqlens", "many"], "not a length"),
        (["--threads", "0"], "threads"),
    ],
)
def test_wrong_options_stop_before_any_work(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("raise OSError('no toys')")
    result = invoke("bench", "--load", str(tmp_path / "broken.py"), "--out", str(tmp_path / "run"))
    assert result.exit_code == 2 and "OSError: no toys" in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_written_over(tmp_path):
    (tmp_path / "results.jsonl").write_text("")
    result = invoke("bench", "--out", str(tmp_path))
    assert result.exit_code == 2 and "--resume" in result.output


def test_resume_needs_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("bench", "--resume")
    assert result.exit_code == 2 and "no run" in result.output


def test_a_plan_has_every_combination():
    cells = commands.grid(
        ["ops", "vit"], commands.read_options(True, ["dense,linear"], "64,128", None, "float32", False, 1)
    )
    assert len(cells) == 2 * 2 * len(cases.MODES) + 2
    assert len(commands.grid(["cpu"], commands.read_options(False, None, None, None, "float32", False, 2))) == len(
        cases.TARGETS
    )


# --- info ---


def test_info_is_json_on_request():
    found = json.loads(invoke("info", "--json").output)
    assert found["versions"]["torch"] and found["machine"]["cpu"]
    assert set(found["backends"]) >= {"cpu", "reference"} and found["backends"]["reference"] == []


def test_info_prints_every_backend():
    output = invoke("info").output
    assert "reference" in output and "serves" in output and "instruction set" in output


# --- runs ---


def test_a_run_writes_tables_lines_and_a_picture_and_is_resumed(tmp_path):
    out = tmp_path / "run"
    result = invoke(*SMALL, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "dense" in result.output and "linear" in result.output and "vs SDPA" in result.output
    found = list(records.read(out / "results.jsonl"))
    assert [record["type"] for record in found] == ["environment"] + ["cell"] * 4
    assert {record["status"] for record in found[1:]} == {"ok"}
    assert (out / "results.png").exists()

    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])  # as kill -9 leaves it
    result = invoke(*SMALL, "--out", str(out), "--resume")
    assert "3 of 4 cells are done already" in result.output
    cells = [record["id"] for record in records.read(out / "results.jsonl") if record["type"] == "cell"]
    assert len(cells) == 4 and set(cells) == {record["id"] for record in found[1:]}

    result = invoke("report", str(out / "results.jsonl"), "--png", str(tmp_path / "again.png"))
    assert result.exit_code == 0 and "vs SDPA" in result.output and (tmp_path / "again.png").exists()


def test_a_cell_over_its_memory_limit_is_a_row_and_the_run_ends_normally(tmp_path):
    arguments = ["bench", "ops", "--quick", "--methods", "dense", "--seqlens", "64k", "--mode", "fwd"]
    result = invoke(*arguments, "--memory-limit", "0.1", "--out", str(tmp_path / "run"))
    assert result.exit_code == 0
    (cell,) = (record for record in records.read(tmp_path / "run" / "results.jsonl") if record["type"] == "cell")
    assert cell["status"] == "oom" and "oom" in result.output


def test_report_of_a_file_without_cells_is_an_error(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"type": "environment"}\n')
    result = invoke("report", str(path))
    assert result.exit_code == 2 and "no cell" in result.output


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_shows_its_results_and_can_go_on(tmp_path, number, code):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "efficient_attn.cli", "bench", "ops", "--mode", "fwd", "--threads", "1"]
    command += ["--methods", "linear", "--seqlens", "64:4k:x2", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_cells(out / "results.jsonl", 1, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "interrupted" in output and "vs SDPA" in output
    kept = [record for record in records.read(out / "results.jsonl") if record["type"] == "cell"]
    assert 1 <= len(kept) < 7 and {record["status"] for record in kept} == {"ok"}


def wait_for_cells(path, count, process):
    for _ in range(600):
        if path.exists() and sum(record["type"] == "cell" for record in records.read(path)) >= count:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.kill()
    pytest.fail("no cell within a minute")


RUN = """
from efficient_attn.cli import main

if __name__ == "__main__":
    main()
"""


def test_a_working_directory_is_not_imported_from(tmp_path):
    """As in a checkout of PyTorch, or beside somebody's random.py: nothing there runs."""
    here, script = tmp_path / "here", tmp_path / "script" / "run.py"
    (here / "torch").mkdir(parents=True)
    script.parent.mkdir()
    script.write_text(RUN)
    for name in ("torch/__init__.py", "random.py", "numpy.py", "sklearn.py", "tempfile.py"):
        (here / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r})")
    command = [sys.executable, str(script), *SMALL, "--out", "run"]
    result = subprocess.run(command, cwd=here, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not (tmp_path / "executed").exists()
    statuses = [row["status"] for row in records.read(here / "run" / "results.jsonl") if row["type"] == "cell"]
    assert statuses == ["ok"] * 4


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.slow)])
def test_a_terminal_that_lacks_a_sign_shows_the_rest(encoding, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for arguments in (["bench", "--help"], ["train", "--list"], ["bench", "no\u2713suite"]):
        command = [sys.executable, "-m", "efficient_attn.cli", *arguments]
        result = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path)
        assert result.returncode == (2 if "no" in arguments[-1][:2] else 0), result.stderr.decode(errors="replace")
        assert b"Traceback" not in result.stderr


CELL = {"type": "cell", "id": "a", "suite": "ops", "status": "oom", "message": "[/INST] [red]x[/] :smile: [bold"}
CELL["config"] = {"method": "dense", "seqlen": 64, "mode": "fwd", "threads": 1, "dtype": "float32"}


def test_brackets_in_messages_and_paths_are_printed_as_they_are(tmp_path):
    folder = tmp_path / "[red]run[" / "[/x]"
    folder.mkdir(parents=True)
    path = folder / "results.jsonl"
    path.write_text(json.dumps(CELL) + "\n")
    result = invoke("report", str(path))
    assert result.exit_code == 0 and CELL["message"] in result.output, (result.output, result.exception)
    result = invoke("compare", str(folder), str(tmp_path / "[red]run["))
    assert result.exit_code == 2 and "[red]run[ has no results.jsonl" in joined(result.output)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"suite": "ops"}', "line 1 is no record"),
        ("[1, 2]", "line 1 is no record"),
        ("3", "line 1 is no record"),
        ('{"type": "cell"}', "line 1 is no record"),
        ('{"type": "cell", "suite": "ops", "status": "ok", "config": []}', "line 1 is no record"),
        ("nonsense", "is not JSON"),
        ('{"type": "environment"}', ""),
    ],
)
@pytest.mark.parametrize("command", ["report", "compare", "recommend"])
def test_odd_result_files_are_explained(tmp_path, command, text, message):
    path = tmp_path / "results.jsonl"
    path.write_text(text + "\n\n{}\n" if message else text + "\n")
    arguments = {"report": [], "compare": [str(path)], "recommend": ["--from"]}[command]
    result = invoke(command, *arguments, str(path))
    assert result.exit_code == 2 and message in joined(result.output), (result.output, result.exception)


def test_a_file_of_cells_alone_is_shown(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(CELL) + "\n")
    assert invoke("report", str(path)).exit_code == 0


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "results.jsonl"
    cell = {**CELL, "status": "ok", "ms": 1.0, "spread": 0.1, "peak_bytes": 1, "error": 0.0, "density": 1.0}
    path.write_text(json.dumps(cell | {"dense_ms": 1.0, "sdpa_ms": 1.0, "speedup_dense": 1, "speedup_sdpa": 1}) + "\n")
    for arguments in (
        ["bench", "--out", str(tmp_path / "file" / "x")],
        ["profile", "--op", "dense", "--out", str(tmp_path / "file" / "x")],
        ["report", str(path), "--png", str(tmp_path / "file" / "x.png")],
        ["report", str(path), "--html", str(tmp_path / "file" / "x.html")],
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2 and "file" in joined(result.output), (arguments, result.output, result.exception)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_named(tmp_path):
    """What a command prints, what it draws, and a file that may not grow: exit code, no traceback."""
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(CELL) + "\n")
    program = [sys.executable, "-m", "efficient_attn.cli"]
    with open("/dev/full", "w") as full:
        result = subprocess.run([*program, "report", str(path)], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode != 0 and "Traceback" not in result.stderr and "No space left" in result.stderr
    limit = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); sys.argv = sys.argv[1:]"
    )
    limited = [sys.executable, "-c", f"{limit}; runpy.run_module('efficient_attn.cli', run_name='__main__')"]
    for arguments in ([*SMALL, "--out", "run"], ["report", str(path), "--html", "page.html"]):
        result = subprocess.run([*limited, "cli", *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert "Traceback" not in result.stderr and "File too large" in joined(result.stderr), (arguments, result)
        assert result.returncode != 0


def test_a_run_is_named_by_its_folder_or_its_file(tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps(CELL) + "\n")
    (tmp_path / "empty").mkdir()
    by_folder, by_file = invoke("report", str(tmp_path)), invoke("report", str(tmp_path / "results.jsonl"))
    assert by_folder.exit_code == by_file.exit_code == 0 and by_folder.output == by_file.output
    result = invoke("report", str(tmp_path / "empty"))
    assert result.exit_code == 2 and "has no results.jsonl" in joined(result.output)


def test_lengths_have_one_grammar():
    for text in ("1k..32k", "1k:32k:x2", "1k,2k,4k,8k,16k,32k"):
        assert options.read_lengths(text) == tuple(1024 * 2**n for n in range(6))
    for command in (["bench", "--seqlens"], ["profile", "--op", "dense", "--lengths"]):
        result = invoke(*command, "1k:2k")
        assert result.exit_code == 2 and "1k..256k or 512:64k:x2" in joined(result.output), result.output


def joined(output):
    return " ".join(output.replace("│", " ").split())


def test_without_the_extra_the_command_names_it():
    code = "import sys; sys.modules['typer'] = None; import efficient_attn, efficient_attn.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'efficient-attn[bench]'" in result.stderr and "typer" in result.stderr
