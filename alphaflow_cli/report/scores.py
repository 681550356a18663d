"""The scores of a run while it trained, as curves: its own, and below them what its recipe expects."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from alphaflow_cli.charts.chart import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, Chart, Line, Panel
from alphaflow_cli.evaluate.results import TITLE
from alphaflow_cli.model.find import nfe_of_best
from alphaflow_cli.recipe.schema import ExpectedScore, Recipe
from alphaflow_cli.text import counted

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
Points = list[tuple[float, float]]


def curves_of_scores(rows: Sequence[dict[str, Any]], cuts: Collection[int] = ()) -> dict[tuple[str, int], Points]:
    """The points (step, value) of each score at each number of evaluations, of the journal's rows that have scores.

    At the steps `cuts`, where the scores were compared with something else for the first time, a curve has a gap.
    """
    curves: dict[tuple[str, int], Points] = {}
    for row in rows:
        for name, values in row["scores"].items():
            for key, value in values.items():
                nfe = key.removeprefix("nfe")
                if value is not None and nfe.isdecimal():
                    points, step = curves.setdefault((name, int(nfe)), []), float(row["step"])
                    points += [(step, math.nan)] if points and row["step"] in cuts else []
                    points.append((step, float(value)))
    return curves


def scores_chart(recipe: Recipe, rows: Sequence[dict[str, Any]], cuts: Collection[int] = ()) -> Chart | None:
    """Draw each score over the steps, a curve for each number of evaluations; dashed, what the recipe expects."""
    curves = curves_of_scores(rows, cuts)
    if not curves:
        return None
    counts = sorted({nfe for _, nfe in curves})
    colours = {nfe: COLOURS[i % len(COLOURS)] for i, nfe in enumerate(counts)}
    panels, furthest = [], max(point[0] for points in curves.values() for point in points)
    for name in dict.fromkeys(name for name, _ in curves):
        lines = []
        for nfe in (each for each in counts if (name, each) in curves):
            expected = expected_points(reached_scores(recipe), name, nfe)
            label = f"expected, {nfe} NFE"
            lines += [Line(label, points, colours[nfe], dashed=True, markers=True) for points in expected]
            points = curves[name, nfe]
            lines.append(Line(f"{nfe} NFE", points, colours[nfe], markers=len(points) < 30))
            furthest = max([furthest, *(point[0] for points in expected for point in points)])
        values = [value for line in lines for _, value in line.points if not math.isnan(value)]
        panels.append(Panel(title_of(name), lines, log_y=min(values) > 0))
    return Chart("Scores while training", panels, "step", x_range=(0, max(furthest, 1)))


def title_of(name: str) -> str:
    """A score's name with the direction that is better."""
    rising = name.startswith(("IS-", "IS(", "precision", "recall", "density", "coverage"))
    return f"{name}: {'higher' if rising else 'lower'} is better"


def reached_scores(recipe: Recipe) -> list[ExpectedScore]:
    """What the recipe expects of a run of this length: a shortened one is another run, and does not get there."""
    return [each for each in recipe.expected if each.step <= recipe.train.steps]


def expected_points(expected: Sequence[ExpectedScore], name: str, nfe: int) -> list[Points]:
    """What a recipe expects of this score at so many evaluations: one curve, or none."""
    fitting = [each for each in expected if each.nfe == nfe and name.startswith(f"{TITLE.get(each.metric)}-")]
    return [sorted((float(each.step), each.value) for each in fitting)] if fitting else []


def expected_notes(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What must be known to compare the curves with what is expected: where it comes from, and of how many pictures."""
    names = {name for name, _ in curves_of_scores(rows)}
    fitting = [each for each in recipe.expected if any(expected_points([each], name, each.nfe) for name in names)]
    shown = [each for each in fitting if each in reached_scores(recipe)]
    beyond = sorted({each.step for each in fitting if each not in shown})
    kinds = dict.fromkeys(f"{TITLE[each.metric]} of {counted(each.images, 'picture')}, {each.source}" for each in shown)
    note = "Expected: {}. A Fréchet distance of fewer pictures is larger: compare the same count only."
    later = f"What the recipe expects at step {beyond[0]:,} is not drawn: this run ends before." if beyond else ""
    return [each for each in (note.format("; ".join(kinds)) if kinds else "", later) if each]


def cut_notes(cuts: Collection[int]) -> list[str]:
    """Say where the reference changed: what stands before is not to be compared with what comes after."""
    where = " and ".join(f"{step:,}" for step in sorted(cuts))
    note = f"eval.reference changed before step {where}: scores on the two sides of a gap do not compare."
    return [note] if cuts else []


def best_notes(steps: dict[Path, int], rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence about each best checkpoint that the run kept; `steps`: the files and the step of each."""
    curves, notes = curves_of_scores(rows), []
    for path, step in sorted(steps.items()):
        nfe = nfe_of_best(path)
        here = {name: dict(points).get(step) for (name, n), points in curves.items() if n == nfe}
        values = [f"{name} {value:.4g}" for name, value in here.items() if value is not None]
        notes.append(f"{path.name}: step {step:,}{', ' + ', '.join(values) if values else ''}.")
    return notes
