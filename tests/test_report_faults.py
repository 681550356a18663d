"""The run page where files are damaged, foreign, or of other weights than the run's model."""

import json
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
from test_report import SETS, Page, report, score, write_run

from alphaflow_cli.cli import run as cli
from alphaflow_cli.data.files import sha256_of
from alphaflow_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from alphaflow_cli.engine.results import Evaluation, document
from alphaflow_cli.recipe import dump_recipe, load_recipe
from alphaflow_cli.report.grid import grid_png


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "quickstart")


def rows_text(row):
    return json.dumps(document([Evaluation("e", row, "ef" * 32, [], {}, 1)]))


WITHOUT_SPACE = re.sub(r'"space": \{[^}]*\}, ', "", rows_text([score(1, 7.5)]))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("results.json", b"{"),
        ("results.json", b"[]"),
        ("results.json", WITHOUT_SPACE.encode()),
        ("analysis/conflict.json", b"{"),
        ("analysis/conflict.json", b'{"checkpoints": []}'),
        ("analysis/conflict.json", b'{"checkpoints": [{"step": 3}]}'),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{"),
        ("samples/step-00000100.png", b"no picture"),
        ("samples/step-00000100.png", grid_png([[np.zeros((32, 32, 3), np.uint8)]])[:-40]),
        ("metrics.jsonl", b"\xff\xfe{\n"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(folder, capsys, name, data):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    assert cli(["report", str(folder)]) == 1
    said = capsys.readouterr().err
    assert str(path) in said
    assert len(said.splitlines()) == 1
    assert not (folder / "report.html").exists()


def test_a_truncated_model_is_named(folder, capsys):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert cli(["report", str(folder)]) == 1
    assert f"{path}: not a checkpoint, or damaged" in capsys.readouterr().err


def measured(folder, *scores):
    (folder / "results.json").write_text(rows_text(scores))


def test_scores_of_other_weights_say_so(folder, capsys):
    own, other = score(1, 7.5), score(2, 3.25)
    own.pictures["checkpoint_sha256"] = sha256_of(folder / "model.safetensors")
    measured(folder, own, other)
    text = Page(report(folder, capsys).read_text(encoding="utf-8")).text
    assert text.count("of other weights") == 1
    assert "of other weights (sha cdcdcdcd)" in text
    assert text.index("7.5") < text.index("of other weights")


def test_nfe_are_sorted_as_numbers(folder, capsys):
    measured(folder, *(score(nfe, 100.0 + nfe) for nfe in (16, 4, 1, 2)))
    text = Page(report(folder, capsys).read_text(encoding="utf-8")).text
    places = [text.index(value) for value in ("101", "102", "104", "116")]
    assert places == sorted(places)


def saved_with(folder, **origin):
    path = folder / "model.safetensors"
    model = load_checkpoint(path)
    save_checkpoint(path, replace(model, origin={**model.origin, **origin}))


def training_words(text):
    return shlex.split(re.search(r"alphaflow train [^\n]*", text).group())


def test_the_command_says_whose_weights_it_began_with(folder, capsys):
    saved_with(folder, init_from="the teacher's run")
    words = training_words(Page(report(folder, capsys).read_text(encoding="utf-8")).text)
    assert words[words.index("--init-from") + 1] == "the teacher's run"


def test_a_value_with_an_apostrophe_is_quoted_for_the_shell(folder, capsys):
    recipe = load_recipe("quickstart", [*SETS, 'data.store="the cat\'s latents"'])
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    words = training_words(Page(report(folder, capsys).read_text(encoding="utf-8")).text)
    assert "data.store=the cat's latents" in words


def test_a_fetched_model_is_not_called_a_run_that_has_not_begun(folder, capsys):
    (folder / "metrics.jsonl").unlink()
    text = Page(report(folder, capsys).read_text(encoding="utf-8")).text
    assert "checkpoint of step 300; no journal here" in text
    assert "not begun" not in text
