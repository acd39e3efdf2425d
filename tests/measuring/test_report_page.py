"""The report as one HTML file: what is inside, what is beside it, and (slow) how it behaves in a real browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from efficient_attn.benchmarks import html_report, suites, view
from efficient_attn.measuring import records

SHAPE = {"batch": 1, "heads": 4, "head_dim": 64, "dtype": "float32", "threads": 1}
METHODS = ("dense", "bigbird:block=64,window=3", "linear")


LONG = tuple(f"bigbird:block={block},window=3,global_blocks=2,random_blocks=2" for block in (32, 64, 128))


def a_run(methods=METHODS):
    """Records as a run of two suites leaves them: figures, a noisy row, failures."""
    environment = records.environment(threads=1, noise=0.01, seed=0)
    cells = []
    for number, method in enumerate(methods):
        for seqlen in (512, 1024, 2048):
            for mode in ("fwd", "fwd_bwd"):
                config = {"method": method, "seqlen": seqlen, "mode": mode, **SHAPE}
                ms = (1 + number) * seqlen / 512 * (3 if mode == "fwd_bwd" else 1)
                metrics = {"ms": ms, "spread": 0.4 if seqlen == 512 else 0.02, "samples": 9, "dense_ms": 2 * ms}
                metrics |= {"sdpa_ms": 3 * ms, "speedup_dense": 2.0 - (method == "dense"), "speedup_sdpa": 3.0}
                metrics |= {"peak_bytes": seqlen * 4096, "error": 0.03 * number + 1e-7, "times": [ms] * 9}
                cells.append({"suite": "ops", "status": "ok", "config": config, **metrics})
    broken = {**cells[0]["config"], "method": "linear", "seqlen": 4096}
    cells.append({"suite": "ops", "status": "oom", "config": broken, "message": "no room </script><b>&"})
    for percent in (50, 10):
        config = {"pattern": "random", "percent": percent, "seqlen": 2048, "mode": "fwd", "dtype": "float32"}
        metrics = {"density": percent / 100, "ms": percent, "spread": 0.0, "samples": 5, "dense_ms": 90.0}
        metrics |= {"ideal_ms": 0.9 * percent, "sdpa_ms": 95.0, "efficiency": 0.9, "speedup_dense": 90 / percent}
        cells.append({"suite": "sparsity", "status": "ok", "config": config | {"threads": 1}, **metrics})
    cells.append({"suite": "gone", "status": "ok", "config": {"threads": 1}, "ms": float("nan")})
    ids = [{"type": "cell", "id": f"id{number}", "code": "abc", **cell} for number, cell in enumerate(cells)]
    return [environment, *ids]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "out.html"
    written = html_report.write(a_run(), path, ["runs/a.jsonl"])
    return path, written


def embedded(path):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_is_one_file_without_a_network(report):
    text = report[0].read_text()
    assert not re.search(
        r'(?:src|href)="(?!#)|url\(|@import|fetch\(|XMLHttpRequest|https?://(?!www\.w3\.org/2000/svg)', text
    )
    assert text.count("<script") == 2 and "/*data*/" not in text


def test_every_row_is_in_the_page_with_what_it_depends_on(report):
    data = embedded(report[0])
    assert [row["id"] for row in data["rows"]] == [f"id{number}" for number in range(22)]
    assert data["rows"][0]["shape"] == "B1 H4 N512 D64" and data["rows"][2]["series"] == "dense"
    assert data["rows"][18]["message"] == "no room </script><b>&" and data["rows"][21]["ms"] is None
    (environment,) = data["environments"]
    assert environment["torch"] and environment["code"] and environment["threads"] == "1"
    assert [suite["name"] for suite in data["suites"]] == ["ops", "sparsity"]
    names = {row["id"] for row in data["rows"]}
    assert data["claims"] and all(claim["rows"] and set(claim["rows"]) <= names for claim in data["claims"])
    assert any("2 without" in part or "1 without" in part for part in [data["about"]])


def test_pictures_and_csv_lie_beside_it(report):
    path, written = report
    folder = path.parent / "out_files"
    assert written[0] == path and all(file.stat().st_size > 0 for file in written)
    rows = read_csv(folder / "rows.csv")
    assert len(rows) == 22 and rows[0]["ms"] == "1.0"
    assert read_csv(folder / "sparsity.csv")[1]["density"] == "0.1"
    pictures = [file for file in written if file.suffix == ".png"]
    assert len(pictures) == sum(len(suite["panels"]) for suite in embedded(path)["suites"]) >= 6
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.with_suffix(".svg") in written for file in pictures)


def test_the_command_writes_it(tmp_path):
    from typer.testing import CliRunner

    from efficient_attn import cli

    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in a_run()))
    arguments = ["report", str(tmp_path / "a.jsonl"), "--html", str(tmp_path / "page" / "out.html")]
    result = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "gone, which is not loaded" in result.output and (tmp_path / "page" / "out_files" / "rows.csv").exists()


def test_what_decides_a_figure_is_never_joined_by_a_line():
    chart = suites.get("ops").charts[0]
    rows = [{"seqlen": n, "ms": 1.0, "mode": "fwd", "threads": t, "id": f"{n}{t}"} for t in (1, 2) for n in (1, 2)]
    found = view.panels(chart, rows)
    assert [title for title, _ in found] == [f"{chart.title}, threads {t}" for t in (1, 2)]
    assert [[row["id"] for row in group] for _, group in found] == [["11", "21"], ["12", "22"]]
    assert [title for title, _ in view.panels(chart, rows[:2])] == [chart.title]


# --- in a browser ---

# The flags keep Chromium from looking for a network, a GPU and a sandbox that a container has not.
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the page is looked at with playwright, if it is there"
    )
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser, report):
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.errors = []
    page.on(
        "console", lambda message: page.errors.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: page.errors.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(report[0].as_uri())
    yield page
    assert page.errors == []
    context.close()


def opened(page):
    """Everything measured, a click away."""
    page.click("#everything > summary")
    page.wait_for_selector("#suites table")
    return page.locator("#suites figure")


@pytest.mark.slow
def test_it_begins_with_findings_the_front_and_the_curves(page):
    assert 1 <= page.locator("#claims li").count() <= 5
    assert page.locator("#front circle.point").count() == 4  # three methods and PyTorch's
    assert page.locator("#curves figure").count() == 3 and page.locator("#multiples figure").count() == 2
    assert not page.locator("#suites table").count()
    assert "bigbird" in page.locator("#ranking").inner_text()


@pytest.mark.slow
def test_the_length_and_the_error_decide_the_advice(page):
    """Of the made-up run `dense` is the fastest and `linear` the slowest, with errors of 0, 3 % and 6 %."""
    assert page.locator("#length-number").input_value() == "2048"
    assert page.locator("#advice h3").inner_text() == "dense"
    page.fill("#length-number", "700")
    page.press("#length-number", "Enter")
    assert "at 700 tokens" in page.locator("#front-title").inner_text()
    page.locator("#length").focus()
    page.keyboard.press("Home")
    assert "at 512 tokens" in page.locator("#front-title").inner_text()
    assert "forward" in page.locator("#front-title").inner_text()
    page.locator(".segmented button", has_text="training step").click()
    assert "training step" in page.locator("#front-title").inner_text()
    page.locator(".segmented button", has_text="exact").click()
    assert page.locator(".rank.beyond").count() == 2
    code = page.locator("#advice code").inner_text()
    assert code == 'efficient_attn.replace_attention(model, attention="dense")'


@pytest.mark.slow
def test_groups_show_their_curves(page):
    assert page.locator("#curves figure").first.locator("polyline.line").count() == 3
    page.locator(".chip", has_text="global").click()
    assert page.locator("#curves figure").first.locator("polyline.line").count() == 1


@pytest.mark.slow
def test_it_draws_charts_and_tables(page):
    opened(page)
    assert page.locator("#suites figure").count() >= 6
    assert page.locator("table[data-suite=ops] tbody tr").count() == 19
    assert page.locator("table[data-suite=sparsity] tbody tr").count() == 2
    first = page.locator("#suites figure").first
    assert first.locator("circle.point").count() == 9 and first.locator("polyline.reference").count() == 1
    assert page.locator("#count").inner_text() == "21 of 22 rows"


@pytest.mark.slow
def test_filters_show_their_rows_only(page):
    opened(page)
    page.select_option("#filter-series", "bigbird")
    assert page.locator("#count").inner_text() == "6 of 22 rows"
    assert page.locator("#suites figure").first.locator("circle.point").count() == 3
    page.select_option("#filter-mode", "fwd")
    assert page.locator("table[data-suite=ops] tbody tr").count() == 3
    assert page.locator("section[data-suite=sparsity]").count() == 0
    page.click("#reset")
    page.select_option("#filter-suite", "sparsity")
    assert page.locator("section[data-suite]").count() == 1
    page.click("#reset")
    page.fill("#filter-search", "no room")
    assert page.locator("tr.failed").count() == 1 and "oom: no room </script>" in page.locator("tr.failed").inner_text()
    page.click("#reset")
    assert page.locator("#count").inner_text() == "21 of 22 rows"


@pytest.mark.slow
def test_hover_legend_scales_and_sorting(page):
    opened(page)
    figure = page.locator("#suites figure").first
    figure.locator("circle.point").first.hover()
    tip = page.locator("#tip")
    assert tip.is_visible() and "dense, 512, fwd" in tip.inner_text() and "ms: 1" in tip.inner_text()
    before = figure.locator("circle.point").last.get_attribute("cy")
    figure.locator("button[data-axis=y]").click()
    assert page.locator("#suites figure").first.locator("button[data-axis=y]").get_attribute("aria-pressed") == "false"
    points = page.locator("#suites figure").first.locator("circle.point")
    assert {points.last.get_attribute("cy"), points.nth(1).get_attribute("cy")} != {before}
    page.locator("#suites figure").first.locator(".legend button", has_text="linear").click()
    assert page.locator("#suites figure").first.locator("circle.point").count() == 6
    head = page.locator("table[data-suite=ops] th", has_text="ms").first
    head.click()
    page.locator("table[data-suite=ops] th", has_text="ms").first.click()
    slowest = page.locator("table[data-suite=ops] tbody tr").first.inner_text()
    assert "36" in slowest


@pytest.mark.slow
def test_a_claim_leads_to_its_rows(page):
    link = page.locator("#claims a").first
    ids = link.get_attribute("data-rows").split()
    link.click()
    assert page.locator("tr.marked").count() == len(ids)
    assert page.locator(f"#row-{ids[0]}").is_visible() and page.url.endswith(f"#row-{ids[0]}")


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 768, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_is_readable_in_the_dark(browser, width, scheme, tmp_path):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    html_report.write(a_run(LONG), tmp_path / "long.html", ["runs/with-a-long-name/results.jsonl"])
    page.goto((tmp_path / "long.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing but tables scrolls sideways
    opened(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert Path(tmp_path / "page.png").stat().st_size > 10_000
    contrast = """(selector) => {
        const light = (colour) => {
            const parts = colour.match(/[0-9.]+/g).slice(0, 3).map((part) => part / 255);
            const linear = parts.map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
        };
        const node = document.querySelector(selector);
        const style = getComputedStyle(node);
        const ink = light(node instanceof SVGElement ? style.fill : style.color);
        let back = node;
        while (back && /, 0\\)|transparent/.test(getComputedStyle(back).backgroundColor)) back = back.parentElement;
        const page = light(getComputedStyle(back || document.body).backgroundColor);
        return (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
    }"""
    for selector, least in (("h1", 7), ("td", 7), (".note", 4.5), ("a", 4.5), ("svg text", 4.5), ("circle.point", 3)):
        assert page.evaluate(contrast, selector) >= least, selector
    context.close()
