"""The comparison's numbers, all from the runs' own files; their table and picture; and what they say of two members."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Protocol

from alphaflow_cli.charts.chart import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, Chart, Line, Panel

NFE = (1, 2, 4)
NAMES = {
    "flow": "flow matching",
    "trajectory-25": "trajectory flow matching .25",
    "shortcut-75": "Shortcut .75, plain square",
    "shortcut-75-adaptive": "Shortcut .75, adaptive weight",
    "meanflow-25": "MeanFlow .25",
    "meanflow-75": "MeanFlow .75",
    "alphaflow-25": "α-Flow .25",
    "alphaflow-50": "α-Flow .5",
    "alphaflow-25-converging": "α-Flow .25, converging weight, no clamp",
    "alphaflow-25-linear": "α-Flow .25, linear schedule",
    "alphaflow-25-unclamped": "α-Flow .25, no clamp",
    "meanflow-25-boundary": "MeanFlow .25, boundary tangent",
    "meanflow-25-short": "MeanFlow .25, short intervals first",
    "meanflow-25-data": "MeanFlow .25, predicts the data",
    "soflow-75": "SoFlow, as on ImageNet",
    "soflow-0": "SoFlow, as on CIFAR-10",
}
NEWER = (
    "meanflow-25",
    "alphaflow-25",
    "soflow-75",
    "meanflow-25-boundary",
    "meanflow-25-data",
    "meanflow-25-short",
    "soflow-0",
)
FIRST_SEED = "seed 0 alone"  # of a panel some of whose members have no other
PANELS = (  # title, members with their colours and short names
    (
        "baselines",
        (
            ("flow", GREY, "FM"),
            ("trajectory-25", BLUE, "TFM .25"),
            ("shortcut-75", ORANGE, "Shortcut .75"),
            ("shortcut-75-adaptive", RED, "the same, adaptive"),
        ),
    ),
    (
        "MeanFlow, α-Flow",
        (
            ("meanflow-25", ORANGE, "MeanFlow .25"),
            ("meanflow-75", RED, "MeanFlow .75"),
            ("alphaflow-25", BLUE, "α-Flow .25"),
            ("alphaflow-50", GREEN, "α-Flow .5"),
        ),
    ),
    (
        f"α-Flow .25, {FIRST_SEED}",
        (
            ("alphaflow-25", BLUE, "published"),
            ("alphaflow-25-unclamped", ORANGE, "no clamp"),
            ("alphaflow-25-converging", PURPLE, "converging"),
            ("alphaflow-25-linear", GREEN, "linear"),
        ),
    ),
    (
        "MeanFlow .25, one thing changed",
        (
            ("meanflow-25", ORANGE, "as it is"),
            ("meanflow-25-boundary", GREEN, "boundary tangent"),
            ("meanflow-25-short", PURPLE, "short first"),
            ("meanflow-25-data", RED, "predicts data"),
        ),
    ),
    (
        "α-Flow and SoFlow",
        (
            ("alphaflow-25", BLUE, "α-Flow .25"),
            ("soflow-75", GREEN, "as on ImageNet"),
            ("soflow-0", RED, "as on CIFAR-10"),
        ),
    ),
)
PAIRS = (  # each is judged at 1 and 2 NFE
    ("alphaflow-25", "meanflow-25", "α-Flow against MeanFlow, both at share .25"),
    ("alphaflow-50", "meanflow-75", "α-Flow at share .5 against MeanFlow at share .75, as published"),
    ("alphaflow-25", "meanflow-75", "α-Flow at share .25 against MeanFlow at share .75"),
    (
        "alphaflow-25-converging",
        "alphaflow-25",
        "the converging weight without clamp against the published settings, share .25",
    ),
    (
        "alphaflow-25-converging",
        "alphaflow-25-unclamped",
        "the converging weight against the published one, both without clamp",
    ),
    ("shortcut-75", "shortcut-75-adaptive", "Shortcut with the plain square against the adaptive weight, share .75"),
    ("alphaflow-25-linear", "alphaflow-25", "the linear schedule against the sigmoid, share .25"),
    ("soflow-75", "meanflow-25", "SoFlow as on ImageNet against MeanFlow at share .25"),
    ("soflow-75", "alphaflow-25", "SoFlow as on ImageNet against α-Flow at share .25"),
    ("soflow-0", "meanflow-25", "SoFlow as on CIFAR-10 against MeanFlow at share .25"),
    ("meanflow-25-boundary", "meanflow-25", "the boundary tangent against the data's, MeanFlow at share .25"),
    ("meanflow-25-short", "meanflow-25", "short intervals first against all alike, MeanFlow at share .25"),
    ("meanflow-25-data", "meanflow-25", "predicting the data against the velocity, MeanFlow at share .25"),
)


class Job(Protocol):
    """A run of the comparison."""

    @property
    def member(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def folder(self) -> Path: ...


@dataclass(frozen=True)
class Run:
    """One finished run's numbers."""

    member: str
    seed: int
    scores: dict[int, float]  # NFE → FD-tiny
    velocity_loss: float | None  # r = t rows, mean of the last ten points of the journal; none without such rows
    seconds: float
    steps: int
    images_seen: int


def read_run(job: Job) -> Run:
    """Read a run's numbers from metrics.jsonl and results.json."""
    rows = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    results = json.loads((job.folder / "results.json").read_text(encoding="utf-8"))["evaluations"]
    scores = {row["pictures"]["nfe"]: row["value"] for each in results for row in each["rows"]}
    steps = [0, *(row["step"] for row in rows)]
    seconds = sum(row["seconds_per_step"] * (b - a) for row, a, b in zip(rows, steps, steps[1:], strict=False))
    losses = [row["v_loss"] for row in rows[-10:] if row["v_loss"] is not None]
    velocity_loss = mean(losses) if losses else None
    return Run(job.member, job.seed, scores, velocity_loss, seconds, rows[-1]["step"], rows[-1]["images_seen"])


def told(values: Sequence[float]) -> str:
    """`12.3 ± 0.4` over seeds; one seed has no spread."""
    shown = f"{mean(values):.2f}"
    return f"{shown} ± {stdev(values):.2f}" if len(values) > 1 else shown


def table(runs: Sequence[Run]) -> list[str]:
    """Make the table, one line per member."""
    lines = [
        "| member | seeds | FD-tiny, 1 NFE | 2 NFE | 4 NFE | velocity loss | images seen | seconds per run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for member, name in NAMES.items():
        mine = [run for run in runs if run.member == member]
        if mine:
            scores = " | ".join(told([run.scores[nfe] for run in mine]) for nfe in NFE)
            losses = [run.velocity_loss for run in mine if run.velocity_loss is not None]
            loss = told(losses) if losses else "–"
            spent = f"{mine[0].images_seen:,} | {mean(run.seconds for run in mine):,.0f}"
            lines.append(f"| {name} | {len(mine)} | {scores} | {loss} | {spent} |")
    return lines


def verdict(runs: Sequence[Run], first: str, second: str, nfe: int) -> str:
    """What may be said of two members: an order only where no seed of one lies among the other's."""
    a, b = ({run.seed: run.scores[nfe] for run in runs if run.member == member} for member in (first, second))
    if not a or not b:
        return "not finished yet."
    if len(a) < 3 or len(b) < 3:
        common = sorted(set(a) & set(b))
        numbers = (
            f"{told([a[seed] for seed in common])} against {told([b[seed] for seed in common])}" if common else "–"
        )
        seeds = f"seed{'s' if len(common) > 1 else ''} {', '.join(map(str, common)) or 'none'}"
        return f"{numbers} on their common {seeds}: no order is claimed."
    x, y = list(a.values()), list(b.values())
    numbers = f"{told(x)} against {told(y)}"
    if max(x) < min(y) or max(y) < min(x):
        better = "better" if mean(x) < mean(y) else "worse"
        return f"{numbers}: {better} on every seed ({len(x)} and {len(y)} seeds)."
    return f"{numbers}: the seeds overlap, so these runs show no order."


def pairs_of(members: Collection[str]) -> list[tuple[str, str, str]]:
    """The pairs that are judged where these members are compared."""
    return [pair for pair in PAIRS if {*pair[:2]} <= {*members}]


def chart(runs: Sequence[Run], members: Collection[str]) -> Chart:
    """FD-tiny over NFE, the mean over seeds: the panels of these members."""
    panels = []
    for title, shown in PANELS:
        if not {member for member, _, _ in shown} <= {*members}:
            continue
        lines = []
        for member, colour, name in shown:
            alone = FIRST_SEED in title
            mine = [run for run in runs if run.member == member and not (alone and run.seed)]
            points = [(float(nfe), mean(run.scores[nfe] for run in mine)) for nfe in NFE] if mine else []
            lines.append(Line(name, points, colour, markers=True))
        panels.append(Panel(f"FD-tiny, {title}", lines, log_y=True))
    return Chart(
        title="CIFAR-10 at 16 px, equal budget",
        subtitle="mean over seeds; lower is better",
        x_label="network evaluations per picture",
        x_ticks=[float(nfe) for nfe in NFE],
        log_x=True,
        panels=panels,
    )
