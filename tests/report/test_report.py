"""The run page: complete, self-contained, honest about what is missing; and alive in a real browser."""

import base64
import io
import math
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from latent_stores import moments_store
from PIL import Image
from run_pages import SETS, STEPS, Page, report, write_run

from alphaflow_cli.charts.chart import BLUE, DARK, GREY, PAPER
from alphaflow_cli.cli import run as cli
from alphaflow_cli.recipe import dump_recipe, load_recipe
from alphaflow_cli.recipe.plan import phases
from alphaflow_cli.report.page import BUDGET, embed, spread_over
from alphaflow_cli.report.run import commands_of, curves_of
from alphaflow_cli.train.store import resolve_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture
def page(run_folder, capsys):
    return Page(report(run_folder, capsys).read_text(encoding="utf-8"))


def test_the_page_loads_nothing_from_anywhere(run_folder, capsys):
    text = report(run_folder, capsys).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []  # every element was closed
    assert page.sources
    assert all(source.startswith("data:image/webp;base64,") for source in page.sources)
    assert page.links
    assert (
        {link[1:] for link in page.links if link[0] == "#"}
        == {link.lstrip("#") for link in page.links}
        <= set(page.ids)
    )
    assert not {"link", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", text)
    assert {link[1:] for link in re.findall(r'xlink:href="([^"]*)"', text)} <= set(page.ids)
    assert "default-src &#x27;none&#x27;" in text
    assert len(set(page.ids)) == len(page.ids)


def test_the_page_tells_the_run(page):
    for words in (
        "finished: step 300 of 300, 19,200 images seen",
        "optim.lr", "0.002", "the shipped recipe quickstart",
        f"α = 1 until step {phases(load_recipe('quickstart', SETS))[0].until}",
        "FD-tiny-2k", "7.5", "3.25", "reference glyphs (pictures, 2,000 pictures, abababab)",
        "x.y", "alphaflow train quickstart --set model.dim=16",
        "step 300", "Recorded while training",
    ):  # fmt: skip
        assert words in page.text, words
    assert {"run", "alpha", "curves", "conflict", "samples", "scores", "recipe", "environment", "reproduce"} <= set(
        page.ids
    )
    assert page.tags.count("img") == len(STEPS)
    assert page.tags.count("svg") == 2 * 3  # plan, curves, conflict, each wide and narrow


def test_the_page_bears_the_runs_name_and_gives_commands_for_this_run(run_folder, tmp_path, monkeypatch, capsys):
    mine = shutil.copytree(run_folder, tmp_path / "tries" / "mine")
    for name in ("results.json", "metrics.jsonl"):
        (mine / name).unlink()
    monkeypatch.chdir(tmp_path)
    text = report(Path("tries/mine"), capsys).read_text(encoding="utf-8")
    assert "<h1>mine</h1>" in text
    assert "recipe quickstart, by alphaflow 0.1.0" in text
    assert "Not measured. Run: alphaflow eval tries/mine --reference shapes:10000" in text
    assert "afterwards: alphaflow analyze tries/mine --batches 100" in text
    assert "RUN" not in Page(text).text


def test_samples_come_first_then_scores_then_curves(page):
    sections = ["samples", "scores", "curves", "alpha", "conflict", "run", "recipe", "environment", "reproduce"]
    assert [each for each in page.ids if each in sections] == sections


def test_a_loss_whose_target_changes_is_cut_where_a_phase_ends():
    recipe = load_recipe("quickstart", ["train.steps=300", "alpha.kind=linear", "alpha.start=100", "alpha.end=200"])
    cuts = [phase.until for phase in phases(recipe)][:-1]
    rows = [{"step": step, "l": 1.0, "l_tfm": 1.0, "l_tc": 0.1, "v_loss": 0.5} for step in range(10, 301, 10)]
    lines = {line.label: line for panel in curves_of(recipe, rows).panels for line in panel.lines}
    assert len(cuts) == 2
    for label in ("l", "TC"):
        assert [at for at, value in lines[label].points if math.isnan(value)] == cuts
    for label in ("TFM", "r = t"):
        assert [at for at, value in lines[label].points if math.isnan(value)] == []


def test_the_commands_lead_from_the_pictures_to_the_scores(page):
    text = page.text[page.text.index("How to reproduce", page.text.index("Environment")) :]
    commands = re.findall(r"alphaflow (\S+) (.*\S)", text)
    assert [verb for verb, _ in commands][-5:] == ["train", "sample", "eval", "analyze", "report"]
    assert ("eval", f"runs/quickstart --reference {load_recipe('quickstart').eval.reference}") in commands
    assert "pip install alphaflow-cli" in text


def test_a_run_on_data_of_ones_own_is_made_again_by_data_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moments_store(tmp_path / "mine")
    recipe = resolve_run("quickstart", (), data=Path("mine"), out=None).recipe
    commands = commands_of(recipe, tmp_path / "run", {}, images=300)
    assert "alphaflow train quickstart --data mine --out runs/run" in commands
    assert any(line.startswith("alphaflow prep-latents SOURCE --size 32 ") for line in commands)
    assert not any("--crop" in line for line in commands), "the usual one"
    adm = commands_of(replace(recipe, data=replace(recipe.data, crop="adm")), tmp_path / "run", {})
    either = commands_of(replace(recipe, data=replace(recipe.data, crop=None)), tmp_path / "run", {"crop": "adm"})
    assert [each.count(" --crop adm ") for each in map(" ".join, (adm, either))] == [1, 1]
    assert "alphaflow eval runs/run --reference SOURCE --images 300" in commands
    (tmp_path / "mine" / "manifest.json").write_text("{")  # damaged since: its values are said one by one
    (line,) = (line for line in commands_of(recipe, tmp_path / "run", {}) if line.startswith("alphaflow train "))
    assert re.fullmatch(r"alphaflow train quickstart (--set \S+ )+--data mine --out runs/run", line)


def test_scores_stand_in_the_order_of_nfe(page):
    assert page.text.index("7.5") < page.text.index("3.25")


def test_the_command_it_gives_makes_this_very_recipe(page, run_folder):
    words = shlex.split(re.search(r"alphaflow train [^\n]*", page.text).group())
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert dump_recipe(load_recipe(words[2], sets)) == (run_folder / "recipe.yaml").read_text(encoding="utf-8")


def test_a_run_that_has_just_begun_says_what_is_missing(tmp_path, capsys):
    recipe = load_recipe("quickstart")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    text = Page(report(tmp_path, capsys).read_text(encoding="utf-8")).text
    for words in ("not begun", "No difference from", "No sample grids", "Not measured", "Not recorded", "no row yet"):
        assert words in text


def test_a_folder_that_is_no_run_is_told(tmp_path, capsys):
    assert cli(["report", str(tmp_path)]) == 1
    assert "not a run folder" in capsys.readouterr().err


def test_what_a_file_says_cannot_become_markup(tmp_path, capsys):
    folder = write_run(tmp_path / "r")
    results = folder / "results.json"
    results.write_text(results.read_text().replace("glyphs", "<script>alert(1)</script>"))
    text = report(folder, capsys).read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_noisy_grids_stay_below_the_budget_and_the_last_one_stays(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
    for step in range(9):
        noise.save(tmp_path / f"step-{step:08d}.png")
    whole = embed(sorted(tmp_path.glob("*.png")))
    assert len(whole) == 9
    budget = sum(map(decoded_size, whole)) // 3
    found = embed(sorted(tmp_path.glob("*.png")), budget)
    assert 1 < len(found) < 9
    assert found[-1][0] == "step-00000008"
    assert sum(map(decoded_size, found)) <= budget
    Image.open(io.BytesIO(base64.b64decode(found[0][1].partition(",")[2]))).load()
    assert 4 * BUDGET / 3 < 4_500_000  # base64, and room for curves in a page of 5 MB


def decoded_size(picture):
    return len(base64.b64decode(picture[1].partition(",")[2]))


def test_spreading_keeps_order_and_the_last():
    assert spread_over(range(5), 10) == [0, 1, 2, 3, 4]
    assert spread_over(range(101), 5) == [0, 25, 50, 75, 100]
    assert spread_over(range(7), 1) == [6]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=3000",
]


def browse(address, tmp_path, *options):
    """The page's DOM after its script has run."""
    line = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *options, "--dump-dom", address]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_every_chart_has_a_form_for_a_telephone_with_letters_as_large_as_the_others(run_folder, capsys):
    text = report(run_folder, capsys).read_text(encoding="utf-8")
    shown = {name: re.findall(rf'<div class="{name}"><svg [^>]* width="(\d+)"', text) for name in ("wide", "narrow")}
    assert len(shown["wide"]) == len(shown["narrow"]) == 3
    assert set(shown["wide"]) == {"960"}
    assert max(map(int, shown["narrow"])) <= 380  # a window of 420 pixels, less the page's margins


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_in_a_real_browser_the_charts_follow_light_and_dark(run_folder, tmp_path, capsys):
    text = report(run_folder, capsys).read_text(encoding="utf-8")
    probe = """<script>
      const style = (part, what) => getComputedStyle(document.querySelector(part))[what];
      const curve = 'svg path[style*="fill: none"][style*="2.2"]';
      document.body.setAttribute("data-found", [style("svg path", "fill"), style("svg text", "fill"),
        style(curve, "stroke"), style("section", "backgroundColor")].join("|"));
    </script></body>"""
    path = tmp_path / "probed.html"
    path.write_text(text.replace("</body>", probe), encoding="utf-8")
    found = {}
    for dark in (False, True):
        scheme = f"--blink-settings=preferredColorScheme={int(not dark)}"
        found[dark] = re.search(r'data-found="([^"]*)"', browse("file://" + quote(str(path)), tmp_path, scheme))[1]
    light, dark = (found[key].split("|") for key in (False, True))
    assert light == [rgb(PAPER), rgb(GREY), rgb(BLUE), rgb(PAPER)]
    assert dark == [rgb(DARK[PAPER]), rgb(DARK[GREY]), rgb(DARK[BLUE]), rgb(DARK[PAPER])]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_in_a_real_browser_the_values_below_the_pointer_are_shown(run_folder, tmp_path, capsys):
    text = report(run_folder, capsys).read_text(encoding="utf-8")
    probe = """<script>
      const box = document.querySelector("#curves .chart"), frame = box.getBoundingClientRect();
      const point = (share) => box.dispatchEvent(new PointerEvent("pointermove",
        {clientX: frame.left + share * frame.width, clientY: frame.top + 50, bubbles: true}));
      point(0.62);
      const inside = box.querySelector(".values").textContent;
      point(-1);
      document.body.setAttribute("data-found", [inside, box.querySelector(".values").hidden].join("|"));
    </script></body>"""
    path = tmp_path / "probed.html"
    path.write_text(text.replace("</body>", probe), encoding="utf-8")
    found = re.search(r'data-found="([^"]*)"', browse("file://" + quote(str(path)), tmp_path))[1]
    values, hidden = found.split("|")
    assert hidden == "true"
    assert values.splitlines()[0] == "step 200"
    assert "TFM (losses with one target throughout): 0.5" in values
    assert "seconds (seconds per step): 0.25" in values


def rgb(colour):
    """As a browser writes it."""
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_in_a_real_browser_the_slider_moves_through_the_samples(run_folder, tmp_path, capsys):
    text = report(run_folder, capsys).read_text(encoding="utf-8")
    probe = """<script>
      window.addEventListener("load", () => {
        const pictures = Array.from(document.querySelectorAll("#sample-pictures img"));
        const told = document.getElementById("sample-step"), slider = document.getElementById("sample-slider");
        const states = [told.textContent + ":" + pictures.map(p => p.hidden ? 0 : 1).join("")];
        slider.value = 0;
        slider.dispatchEvent(new Event("input"));
        states.push(told.textContent + ":" + pictures.map(p => p.hidden ? 0 : 1).join(""));
        const drawn = pictures.every(p => p.complete && p.naturalWidth > 0);
        const wide = getComputedStyle(document.querySelector(".wide")).display;
        const over = document.documentElement.scrollWidth - document.documentElement.clientWidth;
        document.body.setAttribute("data-found", [...states, drawn, wide, over].join("|"));
      });
    </script></body>"""
    path = tmp_path / "probed.html"
    path.write_text(text.replace("</body>", probe), encoding="utf-8")
    found = {}
    for width in (1200, 500):
        dom = browse("file://" + quote(str(path)), tmp_path, f"--window-size={width},900")
        found[width] = re.search(r'data-found="([^"]*)"', dom).group(1).split("|")
    assert found[1200] == ["step 300:001", "step 100:100", "true", "block", "0"]
    assert found[500] == ["step 300:001", "step 100:100", "true", "none", "0"]
