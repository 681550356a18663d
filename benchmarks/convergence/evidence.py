"""EVIDENCE.md: when does the curriculum pay? By budget, by curriculum, by size."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from conflict import BIAS, cells, table_along, with_grades
from members import (
    BUDGETS,
    CURRICULA,
    LONG,
    LONGEST,
    MEMBERS,
    MORE_SEEDS,
    NEW_SEEDS,
    SEEDS,
    SHARES,
    STEPS,
    WIDTH,
    Line,
    grade,
)
from pictures import budget_rows, conflict_chart, grid_of, over_budget, save, strips_of
from table import RULERS, factor, judged, runs_of, scores, table

from alphaflow_cli.charts.draw import to_png


def without_choosing(lines: Sequence[Line], best: str | None) -> list[Line]:
    """All runs but those that chose the best curriculum: they make it look better than it is."""
    return [
        line
        for line in lines
        if (line["member"], line["steps"], line["width"]) != (best, STEPS, WIDTH) or line["seed"] not in SEEDS
    ]


def draw_evidence(lines: Sequence[Line], best: str | None, results: Path) -> None:
    """The pictures of EVIDENCE.md."""
    shares = [member for pair in SHARES for member in pair]
    members = ["meanflow-25", "alphaflow-25", *([best] if best else []), "alphaflow-50", "meanflow-75"]
    budgets = (BUDGETS[0], STEPS, BUDGETS[1], LONG, LONGEST)
    (results / "budget.png").write_bytes(to_png(over_budget(without_choosing(lines, best), members, budgets)))
    some = dict.fromkeys(
        ["meanflow-25", "alphaflow-25", *([best] if best else []), "low-002", "alpha-0-30", "alpha-30-100"]
    )
    groups = [("6,000 steps", shares, BUDGETS[1]), ("3,000 steps", [*some], STEPS)]
    (results / "conflict.png").write_bytes(to_png(conflict_chart(lines, groups)))
    save(results / "samples.png", grid_of(results / "strips", budget_rows(best)))
    save(results / "curricula.png", grid_of(results / "strips", strips_of(("meanflow-25", *CURRICULA))))


def evidence_page(lines: Sequence[Line], best: str | None, results: Path) -> list[str]:
    there = [path for path in (results / "ladders.md", results.parent / "ladders.md") if path.is_file()]  # one ruler
    return [
        "## The rulers",
        "",
        *(there[0].read_text(encoding="utf-8").splitlines() if there else ["- not measured yet."]),
        "",
        *budget_part(lines, best),
        *curriculum_part(lines, best),
        *size_part(lines, best),
    ]


def budget_part(lines: Sequence[Line], best: str | None) -> list[str]:
    shares = [member for pair in SHARES for member in pair]
    members = [*shares, *([best] if best else [])]
    pairs = [("alphaflow-25", "meanflow-25"), ("alphaflow-50", "meanflow-75"), ("alphaflow-25", "meanflow-75")]
    pairs += [("meanflow-75", "meanflow-25"), ("alphaflow-50", "meanflow-25"), ("alphaflow-50", "alphaflow-25")]
    pairs += [(best, "meanflow-25")] if best else []
    text, fair = ["## (a) Budget", ""], without_choosing(lines, best)
    if best:
        text += [f"The runs of {STEPS:,} steps that chose {MEMBERS[best].label} in (b) are left out here.", ""]
    for steps in (BUDGETS[0], STEPS, BUDGETS[1], LONG, LONGEST):
        text += [f"### {steps:,} steps", "", *table(fair, members, steps), "", *judged(fair, pairs, steps), ""]
    if len({line["ruler"] for line in lines}) > 1:
        text += ["Not all tables have the same ruler: compare FD-cnn within a table, not from one to the next.", ""]
    return [
        *text,
        "![score over budget](budget.png)",
        "",
        "The conflict, cos(∇L_TFM, ∇L_TC), on 64 rows at twelve points of each run of 6,000 steps: the median, and the",
        "share of points below -0.4.",
        "",
        *table_along(lines, members, BUDGETS[1]),
        "",
        "The same seeds by budget:",
        "",
        "![samples](samples.png)",
        "",
    ]


def curriculum_part(lines: Sequence[Line], best: str | None) -> list[str]:
    members = ["meanflow-25", *CURRICULA]
    chosen = []
    if best:
        chosen = [
            "### On new seeds",
            "",
            f"Of the curricula besides the published one, **{MEMBERS[best].label}** (`{best}`) "
            f"has the least grade over the seeds {SEEDS[0]} to {SEEDS[-1]}.",
            f"On the new seeds {NEW_SEEDS[0]} to {NEW_SEEDS[-1]}, which did not choose it:",
            "",
            *confirmed(lines, best),
            "",
        ]
    return [
        "## (b) Curriculum",
        "",
        "3,000 steps, share .25, least grade first. × is FD at 1 NFE as a multiple of MeanFlow's of the",
        "same seeds. The conflict is cos(∇L_TFM, ∇L_TC): its median, and the share of points below -0.4.",
        "",
        *curriculum_table(lines, members),
        "",
        *grades_and_conflict(lines),
        *chosen,
        "![the conflict along the run](conflict.png)",
        "",
        *BIAS,
        "",
        "The same seeds:",
        "",
        "![samples](curricula.png)",
        "",
    ]


def common_seeds(lines: Sequence[Line]) -> tuple[int, ...]:
    """Those of the plan's seeds that every curriculum has which was run at all."""
    found = [runs_of(lines, member, STEPS, seeds=(*SEEDS, *MORE_SEEDS)).keys() for member in CURRICULA]
    there = [{*seeds} for seeds in found if seeds]
    return tuple(sorted(set.intersection(*there))) if there else ()


def curriculum_table(lines: Sequence[Line], members: Sequence[str]) -> list[str]:
    seeds = common_seeds(lines)
    base = runs_of(lines, "meanflow-25", STEPS, seeds=seeds)
    graded = [(value, member) for member in members if (value := grade(lines, member, STEPS, seeds)) is not None]
    rows = []
    for value, member in sorted(graded):
        runs = runs_of(lines, member, STEPS, seeds=seeds)
        factors = [factor(scores(runs, ruler, 1), scores(base, ruler, 1)) for ruler in RULERS]
        shown = [str(each) if each and member != "meanflow-25" else "–" for each in factors]
        means = [mean(scores(runs, ruler, nfe).values()) for ruler in RULERS for nfe in (1, 2)]
        asked = f"{mean(scores(runs, 'as_asked', 1).values()):.1%}"
        figures = [f"{value:.2f}", *(f"{each:.2f}" for each in means), asked]
        rows.append(f"| {' | '.join([MEMBERS[member].label, *figures, *shown, *cells(runs.values())])} |")
    return [
        f"Seeds that all of them have: {', '.join(map(str, seeds)) or 'none'}.",
        "",
        "| curriculum | grade | FD-tiny, 1 NFE | 2 NFE | FD-cnn, 1 NFE | 2 NFE | as asked | × FD-tiny | × FD-cnn "
        "| conflict | last 30% | 0 < α < .1 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def grades_and_conflict(lines: Sequence[Line]) -> list[str]:
    seeds = common_seeds(lines)
    graded = [
        (value, [*runs_of(lines, member, STEPS, seeds=seeds).values()])
        for member in CURRICULA
        if (value := grade(lines, member, STEPS, seeds)) is not None
    ]
    texts = with_grades(graded)
    if not texts:
        return []
    return [
        "Do those with less conflict score better? The rank correlation over the curricula of grade and median",
        f"cosine (−1: the less opposed the halves, the better the grade; 0: no relation): {', '.join(texts)}.",
        "",
    ]


def confirmed(lines: Sequence[Line], best: str) -> list[str]:
    new = [line for line in lines if line["seed"] in NEW_SEEDS]
    pairs = [(best, "alphaflow-25"), (best, "meanflow-25"), ("alphaflow-25", "meanflow-25")]
    return [*table(new, dict.fromkeys(["meanflow-25", "alphaflow-25", best]), STEPS), "", *judged(new, pairs)]


def size_part(lines: Sequence[Line], best: str | None) -> list[str]:
    members, width = ["meanflow-25", "alphaflow-25", *([best] if best else [])], 2 * WIDTH
    pairs = [("alphaflow-25", "meanflow-25"), *([(best, "meanflow-25"), (best, "alphaflow-25")] if best else [])]
    text = ["## (c) Twice the width", "", f"Dim {width}, heads {width // 16}.", ""]
    for steps in (STEPS, LONG):
        text += [f"### {steps:,} steps", "", *table(lines, members, steps, width=width), ""]
        text += [*judged(lines, pairs, steps, width), ""]
    return text
