"""From the lines of single batches to what a reader wants: percentiles of cosines and sizes, and pictures of them.

The pictures show cosines over steps, over t − r and over the blocks, and the gradient's size over α.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alphaflow_cli.charts.chart import BLUE, GREEN, ORANGE, RED, Chart, Line, Panel
from alphaflow_cli.charts.draw import to_png
from alphaflow_cli.core.conflict import cosine
from alphaflow_cli.files import write_whole
from alphaflow_cli.train.conflict import PAIRS, TERMS

STRONG = -0.4  # the paper: cos(∇L_TFM, ∇L_TC) is typically below it
PAIR_NAMES = {"tfm.tc": "cos(TFM, TC)", "tfm.fm": "cos(TFM, FM')", "tc.fm": "cos(TC, FM')"}
PAIR_COLOURS = {"tfm.tc": RED, "tfm.fm": BLUE, "tc.fm": ORANGE}
SIZES = {"adaptive": ("published", RED), "converging": ("converging", GREEN)}
LOWEST = 0.002  # where α = 0 stands on a logarithmic axis

BatchLine = Mapping[str, Any]
Products = Mapping[str, float]
Summary = dict[str, Any]
CosinePoints = list[tuple[float, Any]]  # (x, cosines of one summary, bin or group)


def summarise(lines: Sequence[BatchLine]) -> dict[str, Any]:
    """Summarise a checkpoint's batches: percentiles of all, of each group of tensors, of each bin of t − r."""
    totals = [{name: sum(groups.values()) for name, groups in line["products"].items()} for line in lines]
    groups = list(lines[0]["products"]["tfm.tc"]) if lines else []
    cosines = _cosines(totals)
    strong = [value < STRONG for value in _pair(totals, "tfm", "tc") if value is not None]
    return {
        "batches": len(lines),
        "rows": sum(line["rows"] for line in lines),
        "cosines": cosines,
        "share_below_-0.4": sum(strong) / len(strong) if strong else None,
        "norms": _norms(totals),
        "losses": _losses(lines),
        "groups": {name: _of_group(lines, name) for name in groups},
        "bins": [_of_bin(lines, number) for number in range(len(lines[0]["bins"]) if lines else 0)],
        "sizes": _sizes([line["sizes"] for line in lines if "sizes" in line]),
    }


def spread(values: Iterable[float | None]) -> dict[str, float | int | None]:
    """Percentiles 5, 50 and 95 (linear between order statistics), mean and count of the values that are known."""
    known = sorted(value for value in values if value is not None and math.isfinite(value))
    if not known:
        return {"p5": None, "p50": None, "p95": None, "mean": None, "count": 0}
    cuts = {f"p{percent}": percentile(known, percent / 100) for percent in (5, 50, 95)}
    return {**cuts, "mean": sum(known) / len(known), "count": len(known)}


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, linear between two of them."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _pair(products: Iterable[Products], a: str, b: str) -> list[float | None]:
    cosines = (cosine([p[f"{a}.{b}"]], [p[f"{a}.{a}"]], [p[f"{b}.{b}"]]) for p in products)
    return [value if math.isfinite(value) else None for value in cosines]


def _cosines(products: Sequence[Products]) -> dict[str, Any]:
    return {f"{a}.{b}": spread(_pair(products, a, b)) for a, b in PAIRS}


def _norms(products: Sequence[Products]) -> dict[str, Any]:
    """Norms of the three gradients, and of MeanFlow's, which is the sum of the first two."""
    norms = {name: spread(math.sqrt(p[f"{name}.{name}"]) for p in products) for name in TERMS}
    whole = (p["tfm.tfm"] + 2 * p["tfm.tc"] + p["tc.tc"] for p in products)
    return norms | {"mean_flow": spread(math.sqrt(max(square, 0.0)) for square in whole)}


def _losses(lines: Sequence[BatchLine]) -> dict[str, Any]:
    return {name: spread(line["losses"][name] for line in lines) for name in TERMS}


def _of_group(lines: Sequence[BatchLine], group: str) -> dict[str, Any]:
    products = [{name: groups[group] for name, groups in line["products"].items()} for line in lines]
    return {"cosines": _cosines(products), "norms": _norms(products)}


def _of_bin(lines: Sequence[BatchLine], number: int) -> dict[str, Any]:
    """Summarise one bin of t − r; batches without a row in it do not count."""
    bins, count = [line["bins"][number] for line in lines], len(lines[0]["bins"])
    filled = [each for each in bins if each["rows"]]
    products = [each["products"] for each in filled]
    return {
        "from": number / count,
        "to": (number + 1) / count,
        "rows": sum(each["rows"] for each in bins),
        "cosines": _cosines(products),
        "norms": _norms(products),
        "losses": _losses(filled),
    }


def _sizes(measured: Sequence[Mapping[str, Sequence[Mapping[str, float]]]]) -> dict[str, list[dict[str, Any]]]:
    """Weight → per α the spread of the relative size and of the cosine to MeanFlow's gradient."""

    def over_batches(kind: str, place: int) -> dict[str, Any]:
        entries = [each[kind][place] for each in measured]
        return {"alpha": entries[0]["alpha"], **{n: spread(entry[n] for entry in entries) for n in ("size", "cosine")}}

    return {
        kind: [over_batches(kind, i) for i in range(len(measured[0][kind]))]
        for kind in (measured[0] if measured else ())
    }


def write_charts(out: Path, summaries: Sequence[Summary]) -> list[Path]:
    """Write every picture that there are numbers for, and remove former ones; one of a checkpoint shows the last."""
    charts = {"bins": bins_chart(summaries[-1]), "blocks": blocks_chart(summaries[-1])}
    if summaries[-1]["sizes"]:
        charts["alpha"] = sizes_chart(summaries[-1])
    if len(summaries) > 1:
        charts["steps"] = steps_chart(summaries)
    for name in {"alpha", "steps"} - set(charts):
        (out / f"conflict-{name}.png").unlink(missing_ok=True)
    paths = {name: out / f"conflict-{name}.png" for name in charts}
    for name, chart in charts.items():
        write_whole(paths[name], to_png(chart))
    return list(paths.values())


def subtitle(summary: Summary) -> str:
    """The line below a picture's title: recipe, step and how much was measured."""
    size = f"{summary['batches']} batches of {summary['rows_per_batch']} rows"
    return f"{summary['recipe']}, step {summary['step']}, {size}"


def steps_chart(summaries: Sequence[Summary]) -> Chart:
    """Draw the cosines of a run's checkpoints over their steps."""
    points = [(float(each["step"] or 0), each["cosines"]) for each in summaries]
    last = summaries[-1]
    return Chart(
        title="Cosines between gradients along the run",
        subtitle=f"{last['recipe']}, {last['batches']} batches of {last['rows_per_batch']} rows each",
        x_label="step",
        panels=cosine_panels(points),
    )


def bins_chart(summary: Summary) -> Chart:
    """Draw a checkpoint's cosines over the interval t − r."""
    points = [((each["from"] + each["to"]) / 2, each["cosines"]) for each in summary["bins"]]
    edges = sorted({edge for each in summary["bins"] for edge in (each["from"], each["to"])})
    return Chart(
        title="Cosines between gradients by t − r",
        subtitle=subtitle(summary),
        x_label="t − r, middle of its bin",
        x_range=(0.0, 1.0),
        x_ticks=edges,
        panels=cosine_panels(points),
    )


def blocks_chart(summary: Summary) -> Chart:
    """Draw a checkpoint's cosines in each block of the network."""
    blocks = {name: group for name, group in summary["groups"].items() if name.startswith("blocks.")}
    points = [(float(name.split(".")[1]), group["cosines"]) for name, group in blocks.items()]
    return Chart(
        title="Cosines between gradients by block",
        subtitle=subtitle(summary),
        x_label="block",
        x_ticks=[x for x, _ in points],
        panels=cosine_panels(points, bars=True),
    )


def cosine_panels(points: CosinePoints, *, bars: bool = False) -> list[Panel]:
    """One panel per pair of gradients: the median over batches, and the range of its 5th to 95th percentiles."""
    panels = []
    for pair, colour in PAIR_COLOURS.items():
        measured = [(x, cosines[pair]) for x, cosines in points if cosines[pair]["p50"] is not None]
        medians = [(x, each["p50"]) for x, each in measured]
        spread = [(x, each["p5"], each["p95"]) for x, each in measured]
        line = Line("median", medians, colour, bars, markers=not bars, spread=spread, spread_label="5% to 95%")
        panels.append(Panel(PAIR_NAMES[pair], [line], (-1.0, 1.0), height=150))
    return panels


def sizes_chart(summary: Summary) -> Chart:
    """Draw the weighted gradient over α against MeanFlow's: its size and its direction."""
    panels = []
    for name, title in (("size", "relative size"), ("cosine", "cosine")):
        lines = []
        for kind, (label, colour) in SIZES.items():
            entries = [entry for entry in summary["sizes"][kind] if entry[name]["p50"] is not None]
            points = [(entry["alpha"] or LOWEST, entry[name]["p50"]) for entry in entries]
            lines.append(Line(label, points, colour, markers=True))
        panels.append(Panel(title, lines, height=190))
    return Chart(
        title="Gradient over α / at α = 0",
        subtitle=subtitle(summary),
        x_label=f"α (0 is drawn at {LOWEST:g})",
        log_x=True,
        x_ticks=[LOWEST, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0],
        panels=panels,
    )
