"""The conflict on a run's page: what training recorded, and what `alphaflow analyze` found."""

from pathlib import Path
from typing import Any

from alphaflow_cli.charts.chart import Chart
from alphaflow_cli.documents import Anything, ListOf, Maybe, Number, Table, Text, Whole, read_json
from alphaflow_cli.engine.conflict_charts import NAMES, SIZES, bins_chart, sizes_chart, steps_chart

Told = list[tuple[str, ...]]
SPREAD = Table(dict.fromkeys(("p5", "p50", "p95"), Maybe(Number(-1e200, 1e200))), others=Anything())
COSINES = Table(dict.fromkeys(NAMES, SPREAD), others=Anything())
SIZE = Table({"alpha": Number(0, 1), "size": SPREAD, "cosine": SPREAD}, others=Anything())
SUMMARY = Table(
    {
        "step": Maybe(Whole(0)),
        "recipe": Text(1000),
        "batches": Whole(0),
        "rows_per_batch": Whole(0),
        "cosines": COSINES,
        "bins": ListOf(
            Table({"from": Number(0, 1), "to": Number(0, 1), "cosines": COSINES}, others=Anything()), most=1000
        ),
        "sizes": Table(optional=dict.fromkeys(SIZES, ListOf(SIZE, most=1000)), others=Anything()),
    },
    others=Anything(),
)
CONFLICT = Table({"checkpoints": ListOf(SUMMARY, least=1, most=10_000)}, others=Anything())


def analysis_of(run: Path) -> tuple[list[Chart], Told]:
    """Charts of RUN/analysis, and a line per checkpoint and pair; nothing where there is no analysis."""
    path = run / "analysis" / "conflict.json"
    if not path.is_file():
        return [], []
    found = read_json(path, CONFLICT, advice="Move it away, or make it again: alphaflow analyze.")["checkpoints"]
    charts = [steps_chart(found)] if len(found) > 1 else []
    charts.append(bins_chart(found[-1]))
    charts += [sizes_chart(found[-1])] if SIZES.keys() <= found[-1]["sizes"].keys() else []
    return charts, [line for each in found for line in told_cosines(each)]


def told_cosines(summary: dict[str, Any]) -> Told:
    """Percentiles of a checkpoint's cosines, a line per pair."""
    told: Told = []
    for pair, values in summary["cosines"].items():
        cells = ["none" if values[p] is None else f"{values[p]:+.3f}" for p in ("p5", "p50", "p95")]
        told.append((f"step {summary['step']}, {NAMES[pair]}", *cells))
    return told
