"""RESULTS.md: conditions, table, what the numbers support and what they do not."""

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conflict import conflict_lines, training_lines
from record import processor
from table import NAMES, Job, Run, chart, pairs_of, read_run, table, verdict

from alphaflow_cli.charts.draw import to_png
from alphaflow_cli.recipe import load_recipe

LIMITS = """## What it does not support

- FD-tiny is no FID: it sees texture and colour, and hardly the class. The orders above hold for it alone.
- Two members that do not differ are apart on every one of three seeds each in one comparison of ten. Of several such
  sentences, one may be chance; a gap of many standard deviations is not.
- A network of this size after so few steps says nothing about ImageNet, long training, or other shares.
- One learning rate and one budget for all: a member may prefer another.
- Seconds were measured with other programs on the same machine; compare them with care."""


def write_results(
    done: Sequence[Job], failed: dict[str, str], jobs: int, conflicts: Sequence[dict[str, Any]], how: argparse.Namespace
) -> None:
    """Write RESULTS.md and results.png."""
    runs = [read_run(job) for job in done]
    commits = sorted({commit for job in done for commit in commits_of(job)})
    told = conflict_lines(conflicts, NAMES) + training_lines(done, NAMES)
    how.results.mkdir(parents=True, exist_ok=True)
    if runs:
        (how.results / "results.png").write_bytes(to_png(chart(runs, how.members)))
    text = document(runs, failed, jobs, told, commits, how)
    (how.results / "RESULTS.md").write_text(text, encoding="utf-8")


def commits_of(job: Job) -> list[str]:
    """The program's commits, one for each time that a run was begun or resumed."""
    path = job.folder.with_suffix(".commits")
    return path.read_text(encoding="utf-8").split() if path.is_file() else ["unknown"]


def conditions(
    runs: Sequence[Run], failed: dict[str, str], jobs: int, commits: Sequence[str], how: argparse.Namespace
) -> list[str]:
    """Write the conditions: data, network, score, machine."""
    recipe = load_recipe(str(Path(__file__).parent / "recipes" / "alphaflow-25.yaml"))
    m, name = recipe.model, how.reference_name
    return [
        f"- Data: CIFAR-10 at 16 px (Lanczos), pixel space, ten classes, no flips, no guidance; named {name}.",
        f"- Network: DiT dim {m.dim}, depth {m.depth}, heads {m.heads}, patch {m.patch}; Adam, lr {recipe.optim.lr:g},",
        f"  batch {recipe.train.batch}, {how.steps:,} steps, the same for every member.",
        f"- Score: FD-tiny of {how.images:,} pictures against the training pictures; labels drawn per seed,",
        "  averaged weights; trajectory sampler with equal steps (flow matching: Euler).",
        f"- Hardware: {processor()}, {how.jobs} runs at a time, one thread each;",
        f"  Python {platform.python_version()}; trained at commit {', '.join(commits) or 'unknown'}.",
        f"- Finished: {len(runs)} of {jobs} runs. ± is the standard deviation over seeds.",
        *(f"- Failed: {run}: {why}" for run, why in failed.items()),
    ]


def document(
    runs: Sequence[Run],
    failed: dict[str, str],
    jobs: int,
    conflict: Sequence[str],
    commits: Sequence[str],
    how: argparse.Namespace,
) -> str:
    """Write the whole page."""
    judged = [
        f"- {what}, {nfe} NFE: {verdict(runs, a, b, nfe)}" for a, b, what in pairs_of(how.members) for nfe in (1, 2)
    ]
    lines = [
        "# The family at equal budget",
        "",
        "Written by `run.py`; do not edit. Regenerate every number, table and picture:",
        "",
        f"    python benchmarks/convergence/run.py CIFAR10{how.told}",
        "",
        *conditions(runs, failed, jobs, commits, how),
        "",
        *table(runs),
        "",
        *(["![FD-tiny over NFE](results.png)", ""] if runs else []),
        "## What the evidence supports",
        "",
        *judged,
        "",
        "## The conflict",
        "",
        *(conflict or ["- not measured yet."]),
        "",
        LIMITS,
    ]
    return "\n".join(lines) + "\n"
