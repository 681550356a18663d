"""Several runs on one page: samples of equal seeds, scores, curves over each other, and what differs in the recipes.

Scores share a line only where name, evaluations, feature network and reference are the same. Curves run over steps, or
over pictures seen where the batches differ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from alphaflow_cli.charts import chart
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.results import best_founded, labels_text, read_results, row_of, value_text
from alphaflow_cli.files import sha256_of, write_whole
from alphaflow_cli.model.find import check_run
from alphaflow_cli.recipe import load_recipe
from alphaflow_cli.recipe.loader import flatten, set_text
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.report.page import (
    BUDGET,
    Section,
    drawn,
    embed,
    html_document,
    html_table,
    note,
    spread_over,
    step_words,
)
from alphaflow_cli.report.run import JOURNAL_POINTS, Cells, environment_of, journal_of, status_of
from alphaflow_cli.report.scores import COLOURS, Points, curves_of_scores, title_of
from alphaflow_cli.sample.walk import grid_text
from alphaflow_cli.train.scores import new_references, score_rows

MOST_RUNS = 12
OTHER = " (other weights)"  # behind a value that was measured before the run's weights were replaced
BESIDE = "display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr))"
WALK = (  # what makes a line of the scores, beside the name; the last three are of some pictures only
    *("nfe", "sampler", "times", "guidance_at_sampling", "labels"),
    *("guidance_scale", "guidance_interval", "guidance_channels"),
)
FIELDS = {  # of the journal: what may be compared between runs, and its panel's title
    "l_tfm": "TFM: trajectory flow matching",
    "v_loss": "r = t: plain flow matching",
    "grad_norm": "norm of the gradient",
}


@dataclass(frozen=True)
class ComparedRun:
    """What is read of one run."""

    label: str
    folder: Path
    recipe: Recipe
    rows: list[dict[str, Any]]  # of the journal
    scored: list[dict[str, Any]]  # those with scores


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Write the page of several runs; returns its path."""
    if not out.name or out.is_dir():
        raise AlphaflowError(f"{out}: is a folder. Name the page's file, such as {out / 'compare.html'}")
    if len({run.resolve() for run in runs}) < len(runs) or len(runs) > MOST_RUNS:
        raise AlphaflowError(f"compare up to {MOST_RUNS} runs, each of them once.")
    labels = [run.resolve().name for run in runs]
    labels = [str(run) if labels.count(label) > 1 else label for run, label in zip(runs, labels, strict=True)]
    write_whole(out, comparison_page([read_run(run, label) for run, label in zip(runs, labels, strict=True)]))
    return out


def read_run(folder: Path, label: str) -> ComparedRun:
    """Read a run's recipe and journal, and check what is drawn of them."""
    check_run(folder)
    rows = journal_of(folder)
    return ComparedRun(label, folder, load_recipe(str(folder / "recipe.yaml")), rows, score_rows(folder))


def comparison_page(runs: Sequence[ComparedRun]) -> str:
    """Write the HTML document that compares several runs; it needs no other file."""
    names = [run.label for run in runs]
    sections = [
        Section("samples", "Samples of equal seeds", _samples(runs)),
        Section("scores", "Scores", _scores(runs)),
        Section("curves", "Curves", _curves(runs)),
        Section("recipes", "What differs in the recipes", _differences(runs)),
        Section("runs", "The runs", html_table(_facts(runs), head=("", *names))),
    ]
    return html_document("Runs compared", " · ".join(names), "", sections)


def _samples(runs: Sequence[ComparedRun]) -> str:
    """The newest grid that all runs have of one step, else the newest of each."""
    grids = [
        {path.stem: path for path in (run.folder / "samples").glob("step-*.png") if path.is_file()} for run in runs
    ]
    shared = set.intersection(*(set(each) for each in grids))
    parts = []
    for run, each in zip(runs, grids, strict=True):
        if not each:
            missing = note("No sample grids in this run (train.sample_every).")
            parts.append(f"<div><h3>{escape(run.label)}</h3>{missing}</div>")
            continue
        name = max(shared) if shared else max(each)
        ((_, address),) = embed([each[name]], BUDGET // len(runs))
        words = f"{run.label}, {step_words(name)}"
        picture = f'<figure><img src="{address}" alt="{escape(words)}"></figure>'
        parts.append(f"<div><h3>{escape(words)}</h3>{picture}</div>")
    same = "All are of one step." if shared else "No step has a grid in every run: each shows its newest."
    beside = f'<div style="{BESIDE}">{"".join(parts)}</div>'
    return beside + note(f"The same seeds and labels wherever the classes are the same. {same}")


def _scores(runs: Sequence[ComparedRun]) -> str:
    parts = []
    table = _measured(runs)
    if table:
        head = ("score", "NFE", *(run.label for run in runs), "protocol")
        parts += [html_table(table, head=head, numbers=range(1, len(runs) + 2), style="scores")]
        stale = any(OTHER in cell for line in table for cell in line[2 : 2 + len(runs)])
        of = ", of each run's newest weights" + (" where the table does not say that they are others" if stale else "")
        parts += [note(f"Measured by alphaflow eval{of}. One line has one protocol.")]
    trained = _while_training(runs)
    if trained:
        parts += [html_table(trained, head=("while training", *(run.label for run in runs)), style="scores")]
        parts += [note("The last value, and the best with its step.")]
    return "".join(parts) or note("None of these runs was measured. Run: alphaflow eval RUN, or train with eval.every.")


def _measured(runs: Sequence[ComparedRun]) -> Cells:
    """One line for each score of one protocol, one column for each run."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    protocols: dict[tuple[str, ...], str] = {}
    for run in runs:
        path = run.folder / "results.json"
        evaluations, model = read_results(path)["evaluations"] if path.is_file() else [], ""
        if evaluations and (run.folder / "model.safetensors").is_file():
            model = sha256_of(run.folder / "model.safetensors")
        for row in (row_of(each) for each in best_founded([row for each in evaluations for row in each["rows"]])):
            pictures, reference = row.pictures, row.reference or {}
            walk = [str(pictures.get(key)) for key in WALK]
            space = (row.space.network, row.space.weights_sha256, row.space.preprocessing)
            key = (row.name, *walk, *space, str(reference.get("sha256")))
            digest = pictures.get("checkpoint_sha256") or model
            lines.setdefault(key, {})[run.label] = value_text(row) + (OTHER if model and digest != model else "")
            against = f"; reference {reference['name']} ({reference['sha256'][:8]})" if reference else ""
            protocols[key] = (
                f"{row.space.network}{against}{_walk(pictures)}{_guidance(pictures)}{labels_text(pictures)}"
            )
    return [
        (key[0], key[1], *(lines[key].get(run.label, "") for run in runs), protocols[key])
        for key in sorted(lines, key=lambda key: (key[0], int(key[1]) if key[1].isdecimal() else 0, key))
    ]


def _walk(pictures: dict[str, Any]) -> str:
    """The sampler and its grid of times."""
    sampler, times = pictures.get("sampler"), pictures.get("times")
    if not isinstance(times, list) or not all(isinstance(t, float | int) for t in times):  # not one of ours
        return "" if sampler is None else f"; {sampler} {times}"
    return f"; {sampler} on {grid_text(times)}"


def _guidance(pictures: dict[str, Any]) -> str:
    """The guidance at sampling; where the network takes its scale as an input, the scale and the interval."""
    scale, interval = pictures.get("guidance_scale"), pictures.get("guidance_interval")
    if scale is not None:
        return f"; guidance {scale}" + (f" in {interval}" if interval else "")
    scale, channels = pictures.get("guidance_at_sampling", 1.0), pictures.get("guidance_channels")
    return "" if scale == 1.0 else f"; guidance {scale}" + (f" on {channels} channels" if channels else "")


def _while_training(runs: Sequence[ComparedRun]) -> Cells:
    """The last score of each run and its best one, among those that were compared with the same reference."""
    curves = [_score_curves(run, "step") for run in runs]
    lines: Cells = []
    for name, nfe in sorted({key for each in curves for key in each}):
        cells = []
        for each in curves:
            points = each.get((name, nfe), [])
            gaps = [i for i, (_, value) in enumerate(points) if math.isnan(value)]
            points = points[gaps[-1] + 1 :] if gaps else points
            choose = max if "higher" in title_of(name) else min
            best = choose(points, key=lambda point: point[1]) if points else (0.0, 0.0)
            cells.append(f"{points[-1][1]:.4g}; {best[1]:.4g} at {best[0]:,.0f}" if points else "")
        lines.append((f"{name} at {nfe} NFE", *cells))
    return lines


def _score_curves(run: ComparedRun, x: str) -> dict[tuple[str, int], Points]:
    curves = curves_of_scores(run.scored, new_references(run.folder, run.scored))
    batch = 1 if x == "step" else run.recipe.train.batch
    return {key: [(step * batch, value) for step, value in points] for key, points in curves.items()}


def _curves(runs: Sequence[ComparedRun]) -> str:
    x = "step" if len({run.recipe.train.batch for run in runs}) == 1 else "pictures seen"
    scores = [_score_curves(run, x) for run in runs]
    panels = []
    for name, nfe in sorted({key for each in scores for key in each}):
        lines = [_line(i, runs[i], each[name, nfe]) for i, each in enumerate(scores) if (name, nfe) in each]
        positive = all(value > 0 for line in lines for _, value in line.points if not math.isnan(value))
        panels.append(chart.Panel(f"{title_of(name)}, {nfe} NFE", lines, log_y=positive))
    for field, title in FIELDS.items():
        lines = [_line(i, run, _field(run, field, x)) for i, run in enumerate(runs)]
        if any(line.points for line in lines):
            panels.append(chart.Panel(title, lines))
    if not panels:
        return note("None of these runs has a journal with rows yet.")
    last = max(point[0] for panel in panels for line in panel.lines for point in line.points)
    picture = drawn(chart.Chart("Runs over each other", panels, x, x_range=(0, max(last, 1))))
    caption = "Losses are unweighted. Only those whose target is the same in every recipe are shown; l and TC are not."
    return picture + note(caption)


def _field(run: ComparedRun, field: str, x: str) -> Points:
    key = "step" if x == "step" else "images_seen"
    return spread_over(
        [(float(row[key]), float(row[field])) for row in run.rows if row.get(field) is not None], JOURNAL_POINTS
    )


def _line(i: int, run: ComparedRun, points: Points) -> chart.Line:
    return chart.Line(run.label, points, COLOURS[i % len(COLOURS)], dashed=i >= len(COLOURS), markers=len(points) < 30)


def _differences(runs: Sequence[ComparedRun]) -> str:
    """Every field in which not all recipes agree, and the value of each run."""
    flat = [flatten(run.recipe) for run in runs]
    rows = [
        (field, *(set_text(each[field]) for each in flat))
        for field in flat[0]
        if field != "name" and len({set_text(each[field]) for each in flat}) > 1
    ]
    if not rows:
        return note("Nothing: they are runs of one recipe.")
    return html_table(rows, head=("field", *(run.label for run in runs)))


def _facts(runs: Sequence[ComparedRun]) -> Cells:
    speeds = [dict(environment_of({}, "", run.rows)).get("seconds per step", "") for run in runs]
    return [
        ("recipe", *(run.recipe.name for run in runs)),
        ("state", *(status_of(run.recipe, run.rows, {}) for run in runs)),
        ("seconds per step", *speeds),
    ]
