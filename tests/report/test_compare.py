"""Scores over the steps on a run's page, what its recipe expects below them, and several runs on one page."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from run_pages import STEPS, Page, report, write_run

from alphaflow_cli.cli import run as cli
from alphaflow_cli.evaluate.results import document, read_results
from alphaflow_cli.files import sha256_of
from alphaflow_cli.model.checkpoint import load_checkpoint, save_checkpoint
from alphaflow_cli.model.find import best_name
from alphaflow_cli.recipe import dump_recipe, load_recipe
from alphaflow_cli.report.compare import read_run
from alphaflow_cli.report.run import curves_of
from alphaflow_cli.report.scores import curves_of_scores, expected_notes, scores_chart, title_of
from alphaflow_cli.train.journal import read_rows
from alphaflow_cli.train.scores import new_references, score_rows


def add_scores(folder, values, name="FD-tiny-2k"):
    """Rows of the journal as a run with eval.every writes them."""
    with (folder / "metrics.jsonl").open("a") as file:
        for step, value in zip(STEPS, values, strict=True):
            row = {"step": step, "images_seen": 64 * step, "scores": {name: {"nfe1": value, "nfe2": value / 2}}}
            file.write(json.dumps(row | {"evals": {"nfe1": "ab12"}}) + "\n")


@pytest.fixture
def folder(tmp_path):
    run = write_run(tmp_path / "one")
    add_scores(run, (90.0, 12.5, 20.0))
    results = (run / "results.json").read_text()
    (run / "results.json").write_text(results.replace("cd" * 32, sha256_of(run / "model.safetensors")))
    return run


def test_the_page_shows_scores_over_steps_above_what_the_recipe_expects(folder, capsys):
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(re.sub(r"(?m)^  steps: \d+", "  steps: 850", text))
    recipe, rows = load_recipe(str(folder / "recipe.yaml")), score_rows(folder)
    (panel,) = scores_chart(recipe, rows).panels
    assert panel.title == "FD-tiny-2k: lower is better"
    assert title_of("IS(weights 5a993ec0)-2k").endswith(": higher is better")
    assert [(line.label, line.dashed) for line in panel.lines] == [
        ("expected, 1 NFE", True), ("1 NFE", False), ("expected, 2 NFE", True), ("2 NFE", False),
    ]  # fmt: skip
    assert panel.lines[0].points == [(850.0, 13.2)]
    assert scores_chart(recipe, rows).x_range == (0, 850.0), "what is expected later can be seen already"
    assert curves_of_scores(rows)["FD-tiny-2k", 1] == [(100.0, 90.0), (200.0, 12.5), (300.0, 20.0)]
    shutil.copyfile(folder / "model.safetensors", folder / best_name(1))
    page = Page(report(folder, capsys).read_text(encoding="utf-8"))
    assert "Scores while training" in page.text
    assert "FD-tiny of 2,000 pictures, measured" in page.text
    assert "best-nfe1.safetensors: step 300, FD-tiny-2k 20." in page.text


def test_what_the_recipe_expects_after_the_end_of_a_shortened_run_is_not_drawn(folder):
    recipe, rows = load_recipe(str(folder / "recipe.yaml")), score_rows(folder)
    chart = scores_chart(recipe, rows)
    assert [line.label for line in chart.panels[0].lines] == ["1 NFE", "2 NFE"]
    assert chart.x_range == (0, 300.0)
    assert expected_notes(recipe, rows) == ["What the recipe expects at step 850 is not drawn: this run ends before."]


def test_the_curve_of_a_velocity_head_is_drawn_though_the_last_row_of_the_journal_holds_scores(folder):
    recipe, rows = load_recipe(str(folder / "recipe.yaml")), read_rows(folder / "metrics.jsonl")
    for row in rows:
        row |= {} if "scores" in row else {"l_head": 0.5}
    drawn = [line.label for panel in curves_of(recipe, rows).panels for line in panel.lines]
    assert "velocity head" in drawn
    assert "velocity head" not in [line.label for panel in curves_of(recipe, rows[3:]).panels for line in panel.lines]


def test_a_run_without_scores_draws_none_and_one_of_another_metric_expects_nothing(tmp_path):
    run = write_run(tmp_path / "one")
    recipe = load_recipe(str(run / "recipe.yaml"))
    assert scores_chart(recipe, score_rows(run)) is None
    add_scores(run, (3.0, 2.0, 1.0), name="FID-10k")
    (panel,) = scores_chart(recipe, score_rows(run)).panels
    assert [line.label for line in panel.lines] == ["1 NFE", "2 NFE"]
    assert expected_notes(recipe, score_rows(run)) == []


def test_a_curve_has_a_gap_where_the_reference_changed_and_the_page_says_so(folder, capsys):
    with (folder / "metrics.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    for step, name in zip(STEPS, ("aa", "bb", "cc"), strict=True):
        (row,) = (row for row in rows if row["step"] == step and "scores" in row)
        row["evals"] = {"nfe1": name}
        row["scores"] = {"FD-tiny-2k": {"nfe1": 3.0}} if name == "aa" else row["scores"]
        document = read_results(folder / "results.json")
        for each in (each for one in document["evaluations"] for each in one["rows"]):
            each["reference"]["sha256"] = ("11" if name == "aa" else "22") * 32
        (folder / "evals" / name).mkdir(parents=True)
        (folder / "evals" / name / "results.json").write_text(json.dumps(document))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = score_rows(folder)
    assert new_references(folder, scored) == {200}
    recipe = load_recipe(str(folder / "recipe.yaml"))
    (panel,) = scores_chart(recipe, scored, {200}).panels
    assert panel.log_y
    assert str(panel.lines[0].points) == "[(100.0, 3.0), (200.0, nan), (200.0, 12.5), (300.0, 20.0)]"
    other = write_run(folder.parent / "other")
    assert "FD-tiny-2k at 1 NFE 20; 12.5 at 200" in compare(folder, other, capsys).text, "of the newer reference alone"
    words = "eval.reference changed before step 200: scores on the two sides of a gap do not compare."
    assert words in Page(report(folder, capsys).read_text(encoding="utf-8")).text


@pytest.mark.parametrize("scores", [3, {"FD-tiny-2k": 3}, {"FD-tiny-2k": {"nfe1": "low"}}, {"x": {"nfe1": [1]}}])
def test_scores_of_another_shape_are_one_line(scores, folder, capsys):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 300, "images_seen": 1, "scores": scores}) + "\n")
    assert cli(["report", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "metrics.jsonl: the scores of step 300" in error
    assert "Traceback" not in error


def pair(folder, *sets):
    """A second run of the same recipe, changed."""
    other = shutil.copytree(folder, folder.parent / "two")
    recipe = load_recipe(str(folder / "recipe.yaml"), sets)
    (other / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return other


def compare(folder, other, capsys):
    out = folder.parent / "compare.html"
    assert cli(["report", str(folder), str(other), "-o", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    return Page(out.read_text(encoding="utf-8"))


def test_two_runs_stand_on_one_page_that_loads_nothing(folder, capsys):
    other = pair(folder, "optim.lr=7e-3", "train.seed=3")
    (other / "samples" / "step-00000300.png").unlink()
    page = compare(folder, other, capsys)
    assert page.open == []
    assert all(source.startswith("data:image/webp;base64,") for source in page.sources)
    assert len(page.sources) == 2
    for words in (
        "one, step 200", "two, step 200", "All are of one step", "optim.lr 0.002 0.007", "train.seed 0 3",
        "FD-tiny-2k at 1 NFE 20; 12.5 at 200 20; 12.5 at 200", "finished: step 300 of 300",
    ):  # fmt: skip
        assert words in page.text, words


def test_scores_of_one_protocol_share_a_line_and_others_do_not(folder, capsys):
    other = pair(folder)
    results = read_results(other / "results.json")
    for row in (row for each in results["evaluations"] for row in each["rows"]):
        row["value"] = 1.25
        if row["pictures"]["nfe"] == 2:
            row["reference"]["sha256"] = "99" * 32
    (other / "results.json").write_text(json.dumps(document([]) | {"evaluations": results["evaluations"]}))
    text = compare(folder, other, capsys).text
    assert "FD-tiny-2k 1 7.50 1.25 fd_haar192" in text
    assert "FD-tiny-2k 2 3.25  fd_haar192" in text.replace("3.25 fd", "3.25  fd")
    assert "1.25 fd_haar192; reference glyphs (99999999)" in text


def test_a_score_of_weights_that_were_replaced_since_is_not_called_one_of_the_newest(folder, capsys):
    other = pair(folder)
    text = compare(folder, other, capsys).text
    assert "Measured by alphaflow eval, of each run's newest weights. One line" in text
    assert "other weights" not in text
    path = other / "model.safetensors"
    checkpoint = load_checkpoint(path)
    save_checkpoint(path, replace(checkpoint, origin={**checkpoint.origin, "step": 400}))  # it trained on
    text = compare(folder, other, capsys).text
    assert "FD-tiny-2k 1 7.50 7.50 (other weights) fd_haar192" in text
    assert "newest weights where the table does not say that they are others. One line" in text


def test_scores_at_two_scales_of_guidance_are_two_lines(folder, capsys):
    """Of a network that takes the scale as an input the last one measured stood for all, beside any other run's."""
    results = read_results(folder / "results.json")
    (evaluation,) = results["evaluations"]
    told = {2.0: None, 7.0: [0.4, 0.65]}
    rows = [
        row | {"value": scale, "pictures": row["pictures"] | {"guidance_scale": scale, "guidance_interval": interval}}
        for scale, interval in told.items()
        for row in evaluation["rows"][:1]
    ]
    evaluations = [{**evaluation, "rows": [row]} for row in rows]
    (folder / "results.json").write_text(json.dumps(document([]) | {"evaluations": evaluations}))
    text = compare(folder, pair(folder), capsys).text
    assert "FD-tiny-2k 2 2.00 2.00 fd_haar192" in text
    assert "FD-tiny-2k 2 7.00 7.00 fd_haar192" in text
    assert "; guidance 2.0" in text
    assert "; guidance 7.0 in [0.4, 0.65]" in text


def test_every_line_of_scores_says_its_guidance_and_a_long_grid_by_its_ends(folder, capsys):
    results = read_results(folder / "results.json")
    (evaluation,) = results["evaluations"]
    grid = [t / 250 for t in range(250, -1, -1)]
    rows = [
        row | {"value": scale, "pictures": row["pictures"] | {"sampler": "flow", "times": times, **more}}
        for scale, times, more in (
            (1.5, grid, {"guidance_at_sampling": 1.5}),
            (4.0, grid, {"guidance_at_sampling": 4.0, "guidance_channels": 3, "labels": "random"}),
            (9.0, [1.0, 2 / 3, 0.0], {"guidance_at_sampling": 1.0, "labels": "balanced"}),
            (8.0, "strange", {}),
        )
        for row in evaluation["rows"][:1]
    ]
    evaluations = [{**evaluation, "rows": [row]} for row in rows]
    (folder / "results.json").write_text(json.dumps(document([]) | {"evaluations": evaluations}))
    text, walk = compare(folder, pair(folder), capsys).text, "flow on 250 steps: 1, 0.996, 0.992, …, 0.004, 0"
    assert f"1.50 1.50 fd_haar192; reference glyphs (abababab); {walk}; guidance 1.5 " in text
    assert (
        f"4.00 4.00 fd_haar192; reference glyphs (abababab); {walk}; guidance 4.0 on 3 channels, random labels" in text
    )
    assert "; flow on 1, 0.666667, 0, balanced labels" in text
    assert "; flow strange" in text


def test_runs_of_other_batches_are_compared_over_pictures_seen(folder, capsys):
    page = compare(folder, pair(folder, "train.batch=32"), capsys)
    assert "pictures seen" in page.text


def test_a_run_with_nothing_in_it_is_compared_all_the_same(folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(folder / "recipe.yaml", bare / "recipe.yaml")
    page = compare(folder, bare, capsys)
    assert "No sample grids in this run" in page.text
    assert "not begun, 300 steps planned" in page.text
    assert read_run(bare, "bare").rows == []


@pytest.mark.parametrize(("again", "message"), [(True, "each of them once"), (False, "not a run folder")])
def test_what_cannot_be_compared_is_refused(again, message, folder, tmp_path, capsys):
    other = folder if again else tmp_path / "nowhere"
    assert cli(["report", str(folder), str(other), "-o", str(tmp_path / "x.html")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()
