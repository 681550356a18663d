"""Figures of the finished runs: means over seeds, and what may be said of two members.

Two members are compared over the seeds that both have: runs of one seed are pairs. The mean of log(FD of one ÷ FD of
the other) has a t interval of 95%, shown as a factor. An order is claimed where it lies on one side of 1.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import mean, stdev

from members import MEMBERS, STEPS, WIDTH, Line

RULERS = {"fd_tiny": "FD-tiny", "fd_cnn": "FD-cnn"}
QUANTILES = (  # of t at 97.5%, by degrees of freedom
    12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216,
)  # fmt: skip
LEAST = 1e-9  # of an FD whose logarithm is taken


def runs_of(
    lines: Iterable[Line], member: str, steps: int, *, seeds: Collection[int] | None = None, width: int = WIDTH
) -> dict[int, Line]:
    """Seed → the finished run of a member."""
    wanted = (line for line in lines if (line["member"], line["steps"], line["width"]) == (member, steps, width))
    return {line["seed"]: line for line in wanted if seeds is None or line["seed"] in seeds}


def scores(runs: dict[int, Line], ruler: str, nfe: int, *, kind: str = "scores") -> dict[int, float]:
    return {seed: line[kind][str(nfe)][ruler] for seed, line in runs.items()}


def spread(values: Collection[float], digits: int = 2) -> str:
    """`12.30 ± 0.40` over seeds; one seed has no spread."""
    shown = f"{mean(values):.{digits}f}"
    return f"{shown} ± {stdev(values):.{digits}f}" if len(values) > 1 else shown


@dataclass(frozen=True)
class Factor:
    """FD of one member as a multiple of another's: the mean over pairs with its interval."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def side(self) -> int:
        """−1: less, so better; 1: more; 0: no order."""
        return (self.low > 1) - (self.high < 1)

    def __str__(self) -> str:
        mean = beside_1(self.mean) if self.side else f"{self.mean:.2f}"
        return f"× {mean} ({beside_1(self.low)} to {beside_1(self.high)})"


def beside_1(value: float) -> str:
    """A factor with two digits after the point, or as many as show on which side of 1 it lies."""
    digits = next((digits for digits in range(2, 7) if round(value, digits) != 1), 2)
    return f"{value:.{digits}f}"


def factor(a: dict[int, float], b: dict[int, float]) -> Factor | None:
    """Compare over the common seeds; None below two."""
    common = sorted(a.keys() & b.keys())
    if len(common) < 2:
        return None
    ratios = [log(max(a[seed], LEAST) / max(b[seed], LEAST)) for seed in common]
    reach = QUANTILES[min(len(common) - 1, len(QUANTILES)) - 1] * stdev(ratios) / sqrt(len(common))
    return Factor(exp(mean(ratios)), exp(mean(ratios) - reach), exp(mean(ratios) + reach), len(common))


def verdict(a: dict[int, Line], b: dict[int, Line], nfe: int, *, kind: str = "scores") -> str:
    """What both rulers say of two members at so many evaluations; `kind`: of which scores of the first."""
    found = {name: factor(scores(a, ruler, nfe, kind=kind), scores(b, ruler, nfe)) for ruler, name in RULERS.items()}
    if any(each is None for each in found.values()):
        return "not finished yet."
    known = {name: each for name, each in found.items() if each is not None}
    sides = {name: each.side for name, each in known.items()}
    words = {-1: "better", 1: "worse"}
    if len(set(sides.values())) == 1:
        side = next(iter(sides.values()))
        order = f"{words[side]} by both rulers" if side else "no order"
    else:
        order = ", ".join(f"{words[side]} by {name}" if side else f"no order by {name}" for name, side in sides.items())
    numbers = ", ".join(f"{name} {each}" for name, each in known.items())
    return f"{numbers}, {next(iter(known.values())).seeds} seeds: **{order}**."


HEAD = (
    "| member | seeds | FD-tiny, 1 NFE | 2 NFE | 4 NFE | FD-cnn, 1 NFE | 2 NFE | 4 NFE | as asked, 1 NFE | 2 NFE "
    "| precision, recall, 1 NFE |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def row(label: str, runs: dict[int, Line], *, kind: str = "scores") -> str:
    """One line of a table."""
    distances = [spread(scores(runs, ruler, nfe, kind=kind).values()) for ruler in RULERS for nfe in (1, 2, 4)]
    labels = [f"{mean(scores(runs, 'as_asked', nfe, kind=kind).values()):.1%}" for nfe in (1, 2)]
    near = ", ".join(f"{mean(scores(runs, name, 1, kind=kind).values()):.2f}" for name in ("precision", "recall"))
    return f"| {label} | {len(runs)} | {' | '.join([*distances, *labels, near])} |"


def table(lines: Sequence[Line], members: Iterable[str], steps: int, *, width: int = WIDTH) -> list[str]:
    """One line per member that has runs; a second one where it was sampled with guidance too."""
    rows = []
    for member in members:
        runs = runs_of(lines, member, steps, width=width)
        if runs:
            rows.append(row(MEMBERS[member].label, runs))
        guided = {seed: line for seed, line in runs.items() if "guided" in line}
        if guided:
            scale = next(iter(guided.values()))["scale"]
            rows.append(row(f"the same, sampled with scale {scale:g}", guided, kind="guided"))
    return [*HEAD, *rows] if rows else ["- not measured yet."]


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
