"""The run page where files are damaged, foreign, or of other weights than the run's model."""

import contextlib
import json
import os
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
from run_pages import SETS, Page, report, score, write_run
from safetensors import safe_open
from safetensors.torch import save_file

from alphaflow_cli.cli import run as cli
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.results import Evaluation, document
from alphaflow_cli.files import sha256_of
from alphaflow_cli.model.checkpoint import load_checkpoint, save_checkpoint
from alphaflow_cli.recipe import dump_recipe, load_recipe
from alphaflow_cli.sample.grid import grid_png


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "quickstart")


def rows_text(row):
    return json.dumps(document([Evaluation("e", "ef" * 32, row, [], {}, 1)]))


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
    assert len(said.splitlines()) == 2  # the line that says what begins, and the error
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
    assert words[words.index("--data") + 1] == "the cat's latents"


def test_a_fetched_model_is_not_called_a_run_that_has_not_begun(folder, capsys):
    (folder / "metrics.jsonl").unlink()
    text = Page(report(folder, capsys).read_text(encoding="utf-8")).text
    assert "checkpoint of step 300; no journal here" in text
    assert "not begun" not in text


# Documents that others wrote: one line for each, whatever stands in them.


def changed(document, place, value):
    """The document with another value at a place (keys and numbers)."""
    copy = json.loads(json.dumps(document))
    here = copy
    for key in place[:-1]:
        here = here[key]
    if value is DELETED:
        del here[place[-1]]
    else:
        here[place[-1]] = value
    return copy


DELETED = object()
VALUES = [
    None,
    True,
    -1,
    1.5,
    10**18,
    1e150,
    1e300,
    "",
    "x" * 20_000,
    [],
    {},
    [[]],
    {"a": 1},
    "<b>\x1b[2J\u202e",
    "\ud800",
    DELETED,
]


def places(document):
    """Every place in a tree."""
    keys = document.keys() if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        yield (key,)
        yield from ((key, *rest) for rest in places(document[key]))


def one_line_or_a_page(folder, capsys, name):
    """The report of a folder whose file was changed: a page, or one line that names the file."""
    code, err = cli(["report", str(folder)]), capsys.readouterr().err
    assert code in (0, 1)
    assert len(err.splitlines()) == 1 + code  # the line that says what begins, and the error
    assert code == 0 or name in err
    assert all(line.isprintable() for line in err.splitlines())
    if code == 0:
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert "<b>" not in page


@pytest.mark.slow
def test_results_of_any_shape_are_a_page_or_one_line(folder, capsys):
    good = json.loads(rows_text([score(1, 7.5)]))
    for place in places(good):
        for value in VALUES:
            (folder / "results.json").write_text(json.dumps(changed(good, place, value)))
            one_line_or_a_page(folder, capsys, "results.json")


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_a_row_of_results_of_any_shape_is_a_page_or_one_line(folder, capsys, value):
    (folder / "metrics.jsonl").unlink()  # its curves would be drawn every time
    good = json.loads(rows_text([score(1, 7.5)]))
    for place in (
        ("evaluations",),
        *(("evaluations", 0, "rows", 0, key) for key in ("value", "space", "pictures", "notes")),
    ):
        (folder / "results.json").write_text(json.dumps(changed(good, place, value)))
        one_line_or_a_page(folder, capsys, "results.json")


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_an_origin_of_any_shape_is_a_page_or_one_line(folder, capsys, value):
    (folder / "metrics.jsonl").unlink()  # its curves would be drawn every time
    good = load_checkpoint(folder / "model.safetensors").origin
    for key in ("step", "weights", "autoencoder", "versions", "init_from", "class_names", "converted"):
        saved_with(folder, **{key: None if value is DELETED else value})
        one_line_or_a_page(folder, capsys, "model.safetensors")
        with contextlib.suppress(AlphaflowError):
            load_checkpoint(folder / "model.safetensors")
        write_origin(folder, good)


def write_origin(folder, origin, text=None):
    """Put an origin, or any text, in the place of the model's own."""
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        held, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(held, path, metadata=metadata | {"origin": json.dumps(origin) if text is None else text})


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, '{"step": NaN}', '{"a": 1, "a": 2}', '{"step": ' + "1" * 5_000 + "}"]
)
def test_an_origin_that_is_no_json_is_one_line(folder, capsys, text):
    write_origin(folder, None, text)
    assert cli(["report", str(folder)]) == 1
    assert cli(["sample", str(folder), "--grid", str(folder / "g.png")]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 2
    assert all("(its origin): " in line for line in said)


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_a_journal_of_any_shape_is_a_page_or_one_line(folder, capsys, value):
    (folder / "results.json").unlink()  # its scores would be drawn every time
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for key in ("step", "images_seen", "l", "l_tfm", "grad_norm", "seconds_per_step", "memory_gb", "conflict"):
        path.write_text(
            "".join(json.dumps(changed(row | {"conflict": {}, "memory_gb": 1}, (key,), value)) + "\n" for row in rows)
        )
        one_line_or_a_page(folder, capsys, "metrics.jsonl")


@pytest.mark.parametrize("name", ["recipe.yaml", "results.json", "samples/step-00000100.png", "analysis/conflict.json"])
def test_a_pipe_in_a_run_does_not_stop_the_report(folder, capsys, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    assert cli(["report", str(folder)]) == (name == "recipe.yaml")


def test_words_in_a_run_are_escaped_on_its_page(folder, capsys):
    hostile = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"
    saved_with(folder, init_from=hostile, versions={hostile: hostile}, autoencoder={"id": hostile})
    row = score(1, 7.5)
    measured(folder, replace(row, name=hostile[:90], label=hostile, notes=(hostile,), settings={hostile: hostile}))
    recipe = load_recipe("quickstart", SETS)
    (folder / "recipe.yaml").write_text(
        dump_recipe(replace(recipe, eval=replace(recipe.eval, reference=hostile))), encoding="utf-8"
    )
    page = report(folder, capsys).read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "<img src=x" not in page


def test_a_page_is_not_called_a_pdf(folder, capsys):
    assert cli(["report", str(folder), "-o", "run.pdf"]) == 2
    assert "'run.pdf' must end in .html" in capsys.readouterr().err


@pytest.mark.parametrize("out", [".", "/", "folder"])
def test_a_page_is_not_written_over_a_folder(folder, capsys, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert cli(["report", str(folder), "-o", out]) == 2  # click's own check of an option
    assert "is a directory" in capsys.readouterr().err
