"""The pages, written anew from the lines of results.jsonl: RESULTS.md, newer/RESULTS.md and EVIDENCE.md."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean

from conflict import BIAS, cells, table_along, table_at_rest, with_grades
from members import (
    ALONE,
    BUDGETS,
    CLAIMED,
    CURRICULA,
    CUTS,
    FIRST,
    LONG,
    LONGEST,
    MEMBERS,
    MORE_SEEDS,
    NEW_SEEDS,
    NEWER,
    PRECISIONS,
    RUNGS,
    SEEDS,
    SHARES,
    STEPS,
    WIDTH,
    Job,
    Line,
    best_curriculum,
    grade,
    kind_of,
)
from pictures import budget_rows, conflict_chart, grid_of, over_budget, over_nfe
from table import RULERS, factor, runs_of, scores, table, verdict

from alphaflow_cli.charts.draw import to_png

COMMANDS = {  # by the kind of device whose runs a page shows: the pages anew, then every run anew
    "cuda": ("run.py", "run.py CIFAR10 --jobs 16"),
    "cpu": ("run.py --device cpu", "run.py CIFAR10 --device cpu --jobs 2"),
}
LIMITS = """## What it does not support

- FD-tiny and FD-cnn are no FID. The one sees texture and colour, the other class and shape as a small classifier of
  CIFAR-10 knows them. Compare numbers of one ruler on one page only.
- Of twenty intervals of 95% one misses the truth by chance, and these pages hold more than twenty.
- A network of this size, at 16 px and without guidance, says nothing about ImageNet. One learning rate and one average
  serve all members and budgets: a member may prefer another."""
PAIRS_FIRST = (
    ("alphaflow-25", "meanflow-25"),
    ("alphaflow-50", "meanflow-75"),
    ("alphaflow-25", "meanflow-75"),
    ("alphaflow-25-converging", "alphaflow-25"),
    ("alphaflow-25-converging", "alphaflow-25-unclamped"),
    ("alphaflow-25-linear", "alphaflow-25"),
)
GROUPS_FIRST = (
    ("baselines", ALONE),
    ("MeanFlow, α-Flow", ("meanflow-25", "alphaflow-25", "alphaflow-50", "meanflow-75")),
    ("α-Flow .25", ("alphaflow-25-linear", "alphaflow-25", "alphaflow-25-unclamped", "alphaflow-25-converging")),
)
GROUPS_NEWER = (
    ("α-Flow, SoFlow", ("meanflow-25", "alphaflow-25", "soflow-75", "soflow-0")),
    (
        "one thing changed",
        ("meanflow-25", "meanflow-25-data", "meanflow-25-boundary", "meanflow-25-short"),
    ),
    ("the steps of improved MeanFlow", ("meanflow-25-boundary", *RUNGS)),
)


def write_pages(lines: Sequence[Line], faults: Mapping[str, str], left: Sequence[Job], results: Path) -> Iterator[Path]:
    """Write the pages of whose members all have runs, and EVIDENCE.md where there is a run for its questions."""
    results.mkdir(parents=True, exist_ok=True)
    first, newer = (at_equal_budget(lines, members) for members in (FIRST, (*NEWER, *PRECISIONS)))
    if {*FIRST} <= {line["member"] for line in first}:
        (results / "results.png").write_bytes(to_png(over_nfe(first, GROUPS_FIRST)))
        text = [*head("The family at equal budget", first), *first_page(first), *tail(faults, of_page(left, FIRST))]
        yield write(results / "RESULTS.md", text)
    if {*NEWER} - {*RUNGS} <= {line["member"] for line in newer}:
        (results / "newer").mkdir(exist_ok=True)
        (results / "newer" / "results.png").write_bytes(to_png(over_nfe(newer, GROUPS_NEWER)))
        save(results / "newer" / "samples.png", grid_of(results / "strips", strips_of(NEWER)))
        text = [*head("The newer members at equal budget", newer), *newer_page(newer, results / "newer")]
        text += tail(faults, of_page(left, (*NEWER, *PRECISIONS)))
        yield write(results / "newer" / "RESULTS.md", text)
    if any(line["steps"] != STEPS or line["member"] in CURRICULA[1:] for line in lines):
        best = best_curriculum(lines)
        draw_evidence(lines, best, results)
        text = [*head("When does the curriculum pay?", lines), *evidence_page(lines, best, results)]
        text += tail(faults, [job for job in left if job.cut not in ("newer", "first")])
        yield write(results / "EVIDENCE.md", text)


def write(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save(path: Path, data: bytes | None) -> None:
    if data is not None:
        path.write_bytes(data)


def strips_of(members: Sequence[str]) -> list[tuple[str, str]]:
    return [(MEMBERS[member].label, f"{member}-{STEPS}-s0") for member in members]


def head(title: str, lines: Sequence[Line]) -> list[str]:
    """What every page begins with: its command and the conditions of its runs."""
    again, anew = COMMANDS[kind_of(lines[0])]
    facts = {name: sorted({str(line[name]) for line in lines}) for name in ("device", "commit", "ruler", "images")}
    return [
        f"# {title}",
        "",
        "Written by `run.py` from results.jsonl; do not edit. The pages anew from finished runs; then every run anew:",
        "",
        f"    python benchmarks/convergence/{again}",
        f"    python benchmarks/convergence/{anew} --results NEW",
        "",
        "- Data: CIFAR-10 at 16 px (Lanczos), pixel space, ten classes, no flips, no guidance; named cifar10-jpeg.",
        "- Network: DiT dim 64, depth 4, heads 4, patch 2; Adam, lr 0.001, batch 64; float32, TF32 off, unless said.",
        f"- Scores: {', '.join(facts['images'])} pictures, labels drawn per seed, averaged weights, equal steps of the",
        "  trajectory sampler (flow matching: Euler). FD-tiny is against the training pictures, FD-cnn, precision and",
        f"  recall against the test pictures (ruler {', '.join(facts['ruler'])}).",
        '- "as asked": the share of samples that the classifier labels as they were asked for.',
        f"- Hardware: {', '.join(facts['device'])}; trained at commit {', '.join(facts['commit'])}.",
        f"- Finished: {len(lines)} runs. ± is the standard deviation over seeds; × is the factor between two members",
        "  over common seeds, with its 95% interval. What counts as better was written before: PROTOCOL.md.",
        "",
    ]


def at_equal_budget(lines: Sequence[Line], members: Sequence[str]) -> list[Line]:
    """The runs of a page that compares members at one budget: with the seeds that all of them are to have."""
    equal = [line for line in lines if (line["steps"], line["width"]) == (STEPS, WIDTH) and line["seed"] in SEEDS]
    return [line for line in equal if line["member"] in members]


def without_choosing(lines: Sequence[Line], best: str | None) -> list[Line]:
    """All runs but those that chose the best curriculum: they make it look better than it is."""
    return [
        line
        for line in lines
        if (line["member"], line["steps"], line["width"]) != (best, STEPS, WIDTH) or line["seed"] not in SEEDS
    ]


def of_page(left: Sequence[Job], members: Sequence[str]) -> list[Job]:
    """The missing runs of a page that compares members at one budget."""
    own = (STEPS, WIDTH)
    return [job for job in left if job.member in members and (job.steps, job.width) == own and job.seed in SEEDS]


def tail(faults: Mapping[str, str], left: Sequence[Job]) -> list[str]:
    """What every page ends with: the runs that are not there, by name, and what does not follow."""
    lines = [f"- Failed: {name}: {text.strip().splitlines()[-1]}" for name, text in faults.items()]
    lines += [f"- Not run yet, {question}: {'; '.join(runs)}." for question, runs in by_question(left).items()]
    return ["## What is missing", "", *(lines or ["- Nothing."]), "", LIMITS]


def by_question(left: Sequence[Job]) -> dict[str, list[str]]:
    """What is missing for each question, in texts: one for the members that lack the same seeds of the same runs."""
    seeds: dict[tuple[str, int, int, str], list[int]] = {}
    for job in left:
        seeds.setdefault((CUTS[job.cut], job.steps, job.width, job.member), []).append(job.seed)
    members: dict[tuple[str, int, int, tuple[int, ...]], list[str]] = {}
    for (question, steps, width, member), missing in seeds.items():
        members.setdefault((question, steps, width, tuple(sorted(missing))), []).append(member)
    texts: dict[str, list[str]] = {}
    for (question, steps, width, missing), names in members.items():
        wide = f", dim {width}" if width != WIDTH else ""
        word = f"seed{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        texts.setdefault(question, []).append(f"{', '.join(names)} ({steps:,} steps{wide}, {word})")
    return texts


def judged(
    lines: Sequence[Line],
    pairs: Sequence[tuple[str, str]],
    steps: int = STEPS,
    width: int = WIDTH,
    *,
    kind: str = "scores",
) -> list[str]:
    """A sentence for each pair that has runs, at 1 and 2 NFE; `kind`: of which scores of the first one."""
    there = [pair for pair in pairs if all(runs_of(lines, member, steps, width=width) for member in pair)]
    return [
        f"- {MEMBERS[a].label} against {MEMBERS[b].label}, {nfe} NFE: "
        + verdict(runs_of(lines, a, steps, width=width), runs_of(lines, b, steps, width=width), nfe, kind=kind)
        for a, b in there
        for nfe in (1, 2)
    ]


def first_page(lines: Sequence[Line]) -> list[str]:
    return [
        *table(lines, FIRST, STEPS),
        "",
        "![both rulers over NFE](results.png)",
        "",
        "## What the evidence supports",
        "",
        *judged(lines, PAIRS_FIRST),
        "",
        "## The conflict",
        "",
        "cos(∇L_TFM, ∇L_TC) while training, raw weights, batches of 64 rows, all seeds together: the median, and the",
        "share of points below -0.4.",
        "",
        *table_along(lines, FIRST, STEPS),
        "",
        "At the last step, averaged weights, the median over batches with the 5th and 95th percentile:",
        "",
        *(table_at_rest(lines) or ["- not measured yet."]),
        "",
        *BIAS,
        "",
    ]


def newer_page(lines: Sequence[Line], folder: Path) -> list[str]:
    own = " (measured: [two steps by consistency](samplers.md))" if (folder / "samplers.md").is_file() else ""
    others = [(member, base) for base in CLAIMED for member in NEWER if member not in (*CLAIMED, *RUNGS)]
    rounding = [*((member, "alphaflow-25") for member in PRECISIONS), PRECISIONS[::-1]]
    ladder = [("meanflow-25-boundary", "meanflow-25"), *((b, a) for a, b in pairwise(("meanflow-25-boundary", *RUNGS)))]
    return [
        *table(lines, NEWER, STEPS),
        "",
        "![both rulers over NFE](results.png)",
        "",
        f"At 2 and 4 NFE SoFlow is sampled as all others are; its own sampler is the consistency one{own}.",
        "",
        "The same seeds, a picture of each class; the members with the scale as an input by guidance of scale 2:",
        "",
        "![samples](samples.png)",
        "",
        "## What the evidence supports",
        "",
        *judged(lines, [CLAIMED[::-1], *others, *((member, "meanflow-25") for member in RUNGS)]),
        "",
        "With guidance of scale 2, which those without the scale as an input do not have:",
        "",
        *judged(lines, [(member, "meanflow-25") for member in RUNGS[1:]], kind="guided"),
        "",
        "Each step of improved MeanFlow against the one before it:",
        "",
        *judged(lines, ladder),
        "",
        "Rounding at small α:",
        "",
        *table(lines, ("alphaflow-25", *PRECISIONS), STEPS),
        "",
        *judged(lines, rounding),
        "",
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
