"""What the runs say of the conflict, cos(∇L_TFM, ∇L_TC): along training by their journals, and at rest by `analyze`."""

from collections.abc import Callable, Iterable, Sequence
from statistics import correlation, median

from members import MEMBERS, WIDTH, Line

BELOW = -0.4
LAST = 0.7  # of a run: from here on it is in its last part
BIAS = (
    "The gradients of one batch share its rows and noise, and what they share adds to their products: the smaller the",
    "batch, the nearer a cosine comes to that of the noise. So a cosine, and a share below -0.4, belongs to its number",
    "of rows. Where training has come to rest, the weighted sum of the gradients is nearly zero, and large batches",
    "show the halves opposed whatever else is true. The paper reports a cosine that is typically below -0.4 during",
    "more than 95% of training, on ImageNet latents, with larger networks and many more steps.",
)
COLUMNS = ("step", "alpha", "cos_tfm_tc", "cos_tfm_fm", "norm_tfm", "norm_tc")


def points(lines: Iterable[Line]) -> list[dict[str, float]]:
    """Every point of the runs' journals that has a cosine, with its place in the run as a share."""
    named = [
        {**dict(zip(COLUMNS, values, strict=True)), "place": values[0] / line["steps"]}
        for line in lines
        for values in line["conflict"]
    ]
    return [point for point in named if point["cos_tfm_tc"] is not None]


def cosine(found: Sequence[dict[str, float]]) -> str:
    """The median cosine and the share below −.4."""
    if not found:
        return "–"
    values = [point["cos_tfm_tc"] for point in found]
    return f"{median(values):+.2f}, {sum(value < BELOW for value in values) / len(values):.0%}"


PARTS: dict[str, Callable[[dict[str, float]], bool]] = {
    "whole run": lambda point: True,
    "its last 30%": lambda point: point["place"] >= LAST,
    "while 0 < α < .1": lambda point: 0 < point["alpha"] < 0.1,
}


def cells(lines: Iterable[Line]) -> list[str]:
    """Of each part of the run."""
    found = points(lines)
    return [cosine([point for point in found if holds(point)]) for holds in PARTS.values()]


def with_grades(runs: Sequence[tuple[float, Sequence[Line]]]) -> list[str]:
    """The rank correlation over members of their grade with their median cosine, in each part of the run."""
    texts = []
    for name, holds in PARTS.items():
        pairs = [(grade, [p["cos_tfm_tc"] for p in points(lines) if holds(p)]) for grade, lines in runs]
        known = [(grade, median(values)) for grade, values in pairs if values]
        if len(known) > 2 and len({value for _, value in known}) > 1:
            grades, cosines = zip(*known, strict=True)
            texts.append(f"{correlation(ranks(grades), ranks(cosines)):+.2f} ({name}, {len(known)} members)")
    return texts


def ranks(values: Sequence[float]) -> list[float]:
    """The place of each value in order; equal ones share the mean of their places."""
    return [sum((other < value) + (other == value) / 2 for other in values) for value in values]


def curve(lines: Iterable[Line], window: int = 3) -> list[tuple[float, float]]:
    """(share of the run, median cosine over the seeds and over some points on both sides)."""
    by_place: dict[float, list[float]] = {}
    for point in points(lines):
        by_place.setdefault(round(point["place"], 4), []).append(point["cos_tfm_tc"])
    places = sorted(by_place)
    spans = [places[max(0, i - window) : i + window + 1] for i in range(len(places))]
    return [
        (place, median(v for near in span for v in by_place[near])) for place, span in zip(places, spans, strict=True)
    ]


def table_along(lines: Sequence[Line], members: Iterable[str], steps: int) -> list[str]:
    """One line per member, all seeds of the narrow network together."""
    rows = []
    for member in members:
        mine = [line for line in lines if (line["member"], line["steps"], line["width"]) == (member, steps, WIDTH)]
        if any(line["conflict"] for line in mine):
            rows.append(f"| {MEMBERS[member].label} | {len(mine)} | {' | '.join(cells(mine))} |")
    head = [f"| member | runs | {' | '.join(PARTS)} |", "|---|---|---|---|---|"]
    return [*head, *rows] if rows else []


def table_at_rest(lines: Iterable[Line]) -> list[str]:
    """The runs that were analyzed at their end."""
    rows = []
    for line in lines:
        for each in line.get("at_rest", ()):
            pair = [
                f"{c['p50']:+.2f} ({c['p5']:+.2f} to {c['p95']:+.2f})"
                for c in (each["cosines"]["tfm.tc"], each["cosines"]["tfm.fm"])
            ]
            name, size = MEMBERS[line["member"]].label, f"{each['batches']} × {each['rows']}"
            rows.append(f"| {name} | {size} | {pair[0]} | {each['below']:.0%} | {pair[1]} |")
    head = ["| member | batches × rows | TFM, TC | below -0.4 | TFM, FM' |", "|---|---|---|---|---|"]
    return [*head, *rows] if rows else []
