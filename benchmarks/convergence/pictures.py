"""The pictures of the pages: FD over budget, over NFE, the conflict along the run, and grids of the same seeds."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from conflict import curve
from members import LONG, MEMBERS, NEW_SEEDS, STEPS, Line
from PIL import Image
from table import RULERS, runs_of, scores

from alphaflow_cli.charts.chart import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, Chart, Panel
from alphaflow_cli.charts.chart import Line as Curve
from alphaflow_cli.sample.grid import grid_png

COLOURS = (ORANGE, BLUE, GREEN, PURPLE, RED, GREY)
SIDE = 16  # pixels of a picture in a strip


def curve_of(label: str, colour: str, points: dict[float, list[float]]) -> Curve:
    """Means over seeds, with the standard deviation shaded."""
    means = [(x, mean(values)) for x, values in sorted(points.items())]
    many = [(x, values) for x, values in sorted(points.items()) if len(values) > 1]
    shade = [
        (x, max(mean(values) - stdev(values), mean(values) / 10), mean(values) + stdev(values)) for x, values in many
    ]
    return Curve(label, means, colour, markers=True, spread=shade)


def over_budget(lines: Sequence[Line], members: Sequence[str], budgets: Sequence[int]) -> Chart:
    """Both rulers at 1 and 2 NFE over the number of steps."""
    budgets = [steps for steps in budgets if any(runs_of(lines, member, steps) for member in members)]
    panels = []
    for ruler, name in RULERS.items():
        for nfe in (1, 2):
            curves = [
                curve
                for member, colour in zip(members, COLOURS, strict=False)
                for curve in budget_curves(lines, member, budgets, ruler, nfe, colour)
            ]
            panels.append(Panel(f"{name}, {nfe} NFE", curves, log_y=True))
    return Chart(
        title="CIFAR-10 at 16 px, score over budget",
        subtitle="mean over seeds, shaded one standard deviation; lower is better",
        x_label="steps of 64 rows",
        x_ticks=[float(steps) for steps in budgets],
        log_x=True,
        panels=panels,
    )


def budget_curves(
    lines: Sequence[Line], member: str, budgets: Sequence[int], ruler: str, nfe: int, colour: str
) -> list[Curve]:
    """A member's score by budget; what two classifiers have measured is not joined by a line."""
    parts: dict[str, dict[float, list[float]]] = {}
    for steps in budgets:
        runs = runs_of(lines, member, steps)
        for classifier in {line["ruler"] for line in runs.values()}:  # one: a table is of one ruler
            part = parts.setdefault(classifier if ruler == "fd_cnn" else "", {})
            part[float(steps)] = [*scores(runs, ruler, nfe).values()]
    labels = [MEMBERS[member].label, *[""] * len(parts)]
    return [curve_of(label, colour, part) for label, part in zip(labels, parts.values(), strict=False)]


def over_nfe(lines: Sequence[Line], groups: Sequence[tuple[str, Sequence[str]]]) -> Chart:
    """Both rulers over network evaluations, a panel for each group and ruler."""
    panels = []
    for title, members in groups:
        for ruler, name in RULERS.items():
            curves = []
            for member, colour in zip(members, COLOURS, strict=False):
                runs = runs_of(lines, member, STEPS)
                if runs:
                    found = {float(nfe): [*scores(runs, ruler, nfe).values()] for nfe in (1, 2, 4)}
                    curves.append(curve_of(MEMBERS[member].label, colour, found))
            panels.append(Panel(f"{name}, {title}", curves, log_y=True))
    return Chart(
        title="CIFAR-10 at 16 px, equal budget",
        subtitle="mean over seeds, shaded one standard deviation; lower is better",
        x_label="network evaluations per picture",
        x_ticks=[1.0, 2.0, 4.0],
        log_x=True,
        panels=panels,
    )


def conflict_chart(lines: Sequence[Line], groups: Sequence[tuple[str, Sequence[str], int]]) -> Chart:
    """cos(∇L_TFM, ∇L_TC) along the runs, a panel for each group of members and number of steps."""
    panels = []
    for title, members, steps in groups:
        found = {member: curve(runs_of(lines, member, steps).values()) for member in members}
        curves = [
            Curve(MEMBERS[member].label, points, colour)
            for (member, points), colour in zip(found.items(), COLOURS, strict=False)
            if points
        ]
        panels.append(Panel(f"cos(∇L_TFM, ∇L_TC), {title}", curves, y_range=(-1.0, 0.5), height=220))
    return Chart(
        title="The conflict along the run",
        subtitle="64 rows; median over seeds and neighbouring points; below −0.4 the halves undo each other",
        x_label="share of the run",
        panels=panels,
    )


def halves(strips: Path, name: str) -> list[list[np.ndarray]] | None:
    """The pictures of a run's strip at 1 NFE and at 2 NFE; None where it is not there."""
    path = strips / f"{name}.png"
    if not path.is_file():
        return None
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return [[pixels[r : r + SIDE, c : c + SIDE] for c in range(0, pixels.shape[1], SIDE)] for r in (0, SIDE)]


def grid_of(strips: Path, runs: Iterable[tuple[str, str]]) -> bytes | None:
    """Rows of (label, run): one picture of each class at 1 NFE, then the same seeds at 2 NFE."""
    there = [(label, found) for label, name in runs if (found := halves(strips, name))]
    if not there:
        return None
    rows = [one + two for _, (one, two) in there]
    count = len(rows[0]) // 2
    columns = ["1 NFE"] * count + ["2 NFE"] * count
    return grid_png(rows, row_names=[spelled(label) for label, _ in there], column_names=columns)


def spelled(label: str) -> str:
    """A label in letters that the font of a grid has."""
    return label.replace("α", "alpha").replace("→", "to").replace("…", "...")


def budget_rows(best: str | None) -> list[tuple[str, str]]:
    """Labels and runs of the grid over budgets."""
    shares = ("meanflow-25", "alphaflow-25", "meanflow-75", "alphaflow-50")
    pairs = [(member, steps) for steps in (2_000, 6_000, LONG) for member in shares]
    rows = [(f"{MEMBERS[member].label}, {steps:,}", f"{member}-{steps}-s0") for member, steps in pairs]
    confirmed = [("meanflow-25", "MeanFlow .25, 3,000"), ("alphaflow-25", "α-Flow .25, 3,000")]
    confirmed += [(best, f"{MEMBERS[best].label}, 3,000")] if best else []
    return [*rows, *((label, f"{member}-{STEPS}-s{NEW_SEEDS[0]}") for member, label in confirmed)]


def strips_of(members: Sequence[str]) -> list[tuple[str, str]]:
    return [(MEMBERS[member].label, f"{member}-{STEPS}-s0") for member in members]


def save(path: Path, data: bytes | None) -> None:
    if data is not None:
        path.write_bytes(data)
