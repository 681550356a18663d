"""The pages, written anew from the lines of results.jsonl: RESULTS.md, newer/RESULTS.md, EVIDENCE.md (evidence.py)."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from conflict import BIAS, table_along, table_at_rest
from evidence import draw_evidence, evidence_page
from members import (
    ALONE,
    CLAIMED,
    CURRICULA,
    CUTS,
    FIRST,
    NEWER,
    PRECISIONS,
    RUNGS,
    SEEDS,
    STEPS,
    WIDTH,
    Job,
    Line,
    best_curriculum,
    kind_of,
)
from pictures import grid_of, over_nfe, save, strips_of
from table import judged, table

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
