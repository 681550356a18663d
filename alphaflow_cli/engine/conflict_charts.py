"""Pictures of the conflict: cosines over steps, over t − r and over the blocks, and the gradient's size over α."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alphaflow_cli.charts.chart import BLUE, GREEN, ORANGE, RED, Bars, Chart, Line, Panel
from alphaflow_cli.charts.draw import to_png
from alphaflow_cli.engine.files import write_atomically

NAMES = {"tfm.tc": "cos(TFM, TC)", "tfm.fm": "cos(TFM, FM')", "tc.fm": "cos(TC, FM')"}
COLOURS = {"tfm.tc": RED, "tfm.fm": BLUE, "tc.fm": ORANGE}
SIZES = {"adaptive": ("published", RED), "converging": ("converging", GREEN)}
LOWEST = 0.002  # where α = 0 stands on a logarithmic axis

Summary = dict[str, Any]
Points = list[tuple[float, Any]]  # (x, cosines of one summary, bin or group)


def write_charts(out: Path, summaries: Sequence[Summary]) -> list[Path]:
    """Every picture that there are numbers for; the last checkpoint's where a picture shows one."""
    charts = {"bins": bins_chart(summaries[-1]), "blocks": blocks_chart(summaries[-1])}
    if summaries[-1]["sizes"]:
        charts["alpha"] = sizes_chart(summaries[-1])
    if len(summaries) > 1:
        charts["steps"] = steps_chart(summaries)
    paths = []
    for name, chart in charts.items():
        path, picture = out / f"conflict-{name}.png", to_png(chart)
        write_atomically(path, _writer(picture))
        paths.append(path)
    return paths


def _writer(picture: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(picture)

    return write


def subtitle(summary: Summary) -> str:
    """What was measured, in a few words."""
    size = f"{summary['batches']} batches of {summary['rows_per_batch']} rows"
    return f"{summary['recipe']}, step {summary['step']}, {size}"


def steps_chart(summaries: Sequence[Summary]) -> Chart:
    """Cosines along a run."""
    points = [(float(each["step"] or 0), each["cosines"]) for each in summaries]
    last = summaries[-1]
    return Chart(
        title="Cosines between gradients along the run",
        subtitle=f"{last['recipe']}, {last['batches']} batches of {last['rows_per_batch']} rows each",
        x_label="step",
        panels=cosine_panels(points),
    )


def bins_chart(summary: Summary) -> Chart:
    """Cosines over the interval t − r."""
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
    """Cosines in each block of the network."""
    blocks = {name: group for name, group in summary["groups"].items() if name.startswith("blocks.")}
    points = [(float(name.split(".")[1]), group["cosines"]) for name, group in blocks.items()]
    return Chart(
        title="Cosines between gradients by block",
        subtitle=subtitle(summary),
        x_label="block",
        x_ticks=[x for x, _ in points],
        panels=cosine_panels(points, bars=True),
    )


def cosine_panels(points: Points, *, bars: bool = False) -> list[Panel]:
    """One panel per pair of gradients: the median over batches, and how far its 5th and 95th percentiles lie apart."""
    panels = []
    for pair, colour in COLOURS.items():
        measured = [(x, cosines[pair]) for x, cosines in points if cosines[pair]["p50"] is not None]
        medians = [(x, each["p50"]) for x, each in measured]
        spread = [(x, each["p5"], each["p95"]) for x, each in measured]
        line = (
            Bars("median", medians, colour, spread, "5% to 95%")
            if bars
            else Line("median", medians, colour, markers=True, spread=spread, spread_label="5% to 95%")
        )
        panels.append(Panel(NAMES[pair], [line], (-1.0, 1.0), height=150))
    return panels


def sizes_chart(summary: Summary) -> Chart:
    """The weighted gradient over α, against MeanFlow's: its size, and its direction."""
    panels = [
        _over_alpha(summary, "size", "relative size"),
        _over_alpha(summary, "cosine", "cosine"),
    ]
    return Chart(
        title="Gradient over α / at α = 0",
        subtitle=subtitle(summary),
        x_label=f"α (0 is drawn at {LOWEST:g})",
        log_x=True,
        x_ticks=[LOWEST, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0],
        panels=panels,
    )


def _over_alpha(summary: Summary, name: str, title: str) -> Panel:
    lines = []
    for kind, (label, colour) in SIZES.items():
        entries = [entry for entry in summary["sizes"][kind] if entry[name]["p50"] is not None]
        points = [(entry["alpha"] or LOWEST, entry[name]["p50"]) for entry in entries]
        lines.append(Line(label, points, colour, markers=True))
    return Panel(title, lines, height=190)
