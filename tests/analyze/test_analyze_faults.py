"""`alphaflow analyze` on damaged files, diverged weights, other places, and rows that training would call ties."""

import json
import math
import os
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from analyzed_runs import analyze, train

from alphaflow_cli.charts.chart import Chart, Line, Panel
from alphaflow_cli.charts.draw import to_svg
from alphaflow_cli.cli import run as cli
from alphaflow_cli.core.objective import is_tie
from alphaflow_cli.model.checkpoint import load_checkpoint, save_checkpoint
from alphaflow_cli.recipe.schema import Recipe, Times
from alphaflow_cli.train.conflict import conflict_rows

pytestmark = pytest.mark.usefixtures("short")


def fault_of(capsys, *line):
    capsys.readouterr()
    assert cli(["analyze", *map(str, line)]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_an_out_that_is_a_file_is_told(tiny_run, tmp_path, capsys):
    file = tmp_path / "taken"
    file.write_text("mine")
    said = fault_of(capsys, tiny_run, "--out", file / "x", "--batches", "1")
    assert f"{file}/x: cannot be written" in said
    assert file.read_text() == "mine"


def test_weights_that_are_not_finite_stop_the_analysis(tiny_run, tmp_path, capsys):
    model = load_checkpoint(tiny_run / "model.safetensors")
    path = tmp_path / "nan.safetensors"
    save_checkpoint(path, replace(model, weights={n: w * math.nan for n, w in model.weights.items()}))
    line = (path, "--data", tiny_run / "latents", "--out", tmp_path / "a", "--batch", "8", "--batches", "1")
    assert "a loss or a gradient is not finite" in fault_of(capsys, *line)
    assert not list((tmp_path / "a").glob("*/batches.jsonl"))
    assert not (tmp_path / "a" / "conflict.json").exists()


def test_a_logarithmic_axis_without_points_is_drawn():
    panel = Panel("nothing", [Line("none", [(0.0, 1.0)])], log_y=True)
    for lines in ([panel], [replace(panel, lines=[])]):
        assert "empty" in to_svg(Chart("empty", lines, "α", log_x=True))


def copied(measured, folder):
    """A copy of the analysis; its document and the file of its batches."""
    shutil.copytree(measured, folder)
    (lines,) = folder.glob("*/batches.jsonl")
    return json.loads((folder / "conflict.json").read_text()), lines


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "damage", ["\0" * 40, '{"batch": ' + "[" * 100_000, '{"batch": 1e400}', '{"batch": 0, "ro', "[1, 2]", "{}", "ÿ"]
)
def test_a_damaged_line_is_measured_again(tiny_run, measured, tmp_path, capsys, damage):
    whole, lines = copied(measured, tmp_path / "a")
    first, second, third = lines.read_bytes().splitlines()
    lines.write_bytes(damage.encode("latin-1") + b"\n" + second + b"\n" + third + b"\n")
    again = analyze(tiny_run, tmp_path / "a", capsys, "--batches", "3")
    assert again["checkpoints"] == whole["checkpoints"]
    assert lines.read_bytes().splitlines()[1:] == [second, third, first]


@pytest.mark.usefixtures("no_pictures")
def test_a_digit_that_changed_in_a_line_is_measured_again_and_a_former_line_is_read(
    tiny_run,
    measured,
    tmp_path,
    capsys,
):
    whole, lines = copied(measured, tmp_path / "a")
    first, second, third = lines.read_text().splitlines()
    former = {name: value for name, value in json.loads(second).items() if name != "sha256"}
    changed = first.replace('"rows": 8', '"rows": 7', 1)
    assert changed != first
    lines.write_text("\n".join([changed, json.dumps(former), third, ""]))
    again = analyze(tiny_run, tmp_path / "a", capsys, "--batches", "3")
    assert again["checkpoints"] == whole["checkpoints"]
    assert lines.read_text().splitlines()[1:] == [json.dumps(former), third, first]
    lines.write_text(json.dumps({"batch": 0, "rows": 8}) + "\n")
    line = (tiny_run, "--out", tmp_path / "a", "--batch", "8", "--batches", "1")
    assert f"{lines}: not the batches of an analysis, or damaged" in fault_of(capsys, *line)


@pytest.mark.usefixtures("no_pictures")
def test_two_analyses_at_once_count_no_batch_twice(tiny_run, measured, tmp_path, capsys):
    whole, lines = copied(measured, tmp_path / "a")
    first, second, third = lines.read_text().splitlines()
    other = json.dumps({**json.loads(first), "rows": 1})  # what a second process wrote for the same batch
    lines.write_text("\n".join([first, other, third, ""]))
    again = analyze(tiny_run, tmp_path / "a", capsys, "--batches", "3")
    assert again["checkpoints"] == whole["checkpoints"]
    assert lines.read_text().splitlines()[-1] == second


@pytest.mark.parametrize("place", ["model.safetensors", "checkpoints/step-00000006/model.safetensors"])
def test_a_file_in_a_run_finds_the_runs_latents_and_folder(tiny_run, tmp_path, capsys, monkeypatch, place):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("analysis"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli(["analyze", str(run / place), "--batch", "8", "--batches", "1"]) == 0
    assert (run / "analysis" / "conflict.json").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("room", [50, 3_000, 12_000])
def test_a_disk_that_fills_up_ends_an_analysis_in_one_line_and_the_same_command_goes_on(
    tiny_run,
    measured,
    tmp_path,
    capsys,
    room,
):
    line = (tiny_run, "--out", tmp_path / "a", "--batch", "8", "--batches", "3")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        said = fault_of(capsys, *line)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in said
    assert sum("error:" in text for text in said.splitlines()) == 1
    whole = json.loads((measured / "conflict.json").read_text())
    assert analyze(tiny_run, tmp_path / "a", capsys, "--batches", "3")["checkpoints"] == whole["checkpoints"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_file_of_batches_that_is_none_is_one_line(tiny_run, measured, tmp_path, capsys, kind):
    _, lines = copied(measured, tmp_path / "a")
    lines.unlink()
    os.mkfifo(lines) if kind == "pipe" else lines.mkdir()
    said = fault_of(capsys, tiny_run, "--out", tmp_path / "a", "--batch", "8", "--batches", "1")
    assert f"{lines}: is a folder, a pipe or a device, not a file" in said


def drawn(times, index=0):
    x = torch.zeros(64, 1, 2, 2)
    return conflict_rows(Recipe(times=times), x, torch.zeros(64, dtype=torch.long), seed=3, index=index)


@pytest.mark.parametrize("order", ["min", "minmax", "r_in_t_range"])
def test_every_row_has_r_before_t_and_the_same_one_again(order):
    one, same, other = drawn(Times(order=order)), drawn(Times(order=order)), drawn(Times(order=order), index=1)
    assert not is_tie(one.t, one.r).any()
    assert torch.equal(one.t, same.t)
    assert torch.equal(one.r, same.r)
    assert not torch.equal(one.t, other.t)


def test_of_ties_only_the_times_are_drawn_again():
    """Under order min, t is the first draw and r the smaller one: rows that were r < t keep both."""
    kept, all_later = drawn(Times(order="minmax")), drawn(Times(order="min"))
    same = (kept.t == all_later.t) & (kept.r == all_later.r)
    assert 16 < int(same.sum()) < 48
    assert torch.equal(kept.noise, all_later.noise)


def changed(tiny_run, path, **times):
    model = load_checkpoint(tiny_run / "model.safetensors")
    save_checkpoint(path, replace(model, recipe=replace(model.recipe, times=Times(**times))))
    return path


@pytest.mark.usefixtures("no_pictures")
def test_all_rows_are_measured_whatever_the_order_of_times(tiny_run, tmp_path, capsys):
    path = changed(tiny_run, tmp_path / "min.safetensors", order="min")
    found = analyze(path, tmp_path / "a", capsys, "--batches", "2", "--data", str(tiny_run / "latents"))
    assert found["checkpoints"][0]["rows"] == 16


def test_times_that_never_differ_are_told(tiny_run, tmp_path, capsys):
    path = changed(tiny_run, tmp_path / "equal.safetensors", std=1e-12)
    line = (path, "--data", tiny_run / "latents", "--out", tmp_path / "a", "--batch", "8", "--batches", "1")
    assert "8 of 8 rows never got r < t" in fault_of(capsys, *line)


@pytest.mark.parametrize(("law", "rows"), [("times.order=min", 8), ("times.std=1e-12", 0)])
def test_training_records_how_many_rows_it_measured(tmp_path, law, rows):
    run = train(tmp_path / "run", law, "train.conflict_every=2", "train.steps=2")
    text = (run / "metrics.jsonl").read_text().splitlines()[-1]
    found = json.loads(text)["conflict"]
    assert found["rows"] == rows
    assert ("norm_tfm" in found) == (rows > 0)
