"""The conflict on a run's page: what training recorded, and what `alphaflow analyze` found."""

import json
from pathlib import Path
from typing import Any

from alphaflow_cli.charts.chart import Chart
from alphaflow_cli.engine.conflict_charts import NAMES, bins_chart, sizes_chart, steps_chart
from alphaflow_cli.errors import blamed_on

Told = list[tuple[str, ...]]


def analysis_of(run: Path) -> tuple[list[Chart], Told]:
    """Charts of RUN/analysis, and a line per checkpoint and pair; nothing where there is no analysis."""
    path = run / "analysis" / "conflict.json"
    if not path.is_file():
        return [], []
    with blamed_on(path, "the numbers of alphaflow analyze"):
        found = json.loads(path.read_text(encoding="utf-8"))["checkpoints"]
        if not found:
            raise ValueError("no checkpoint in it")
        charts = [steps_chart(found)] if len(found) > 1 else []
        charts.append(bins_chart(found[-1]))
        charts += [sizes_chart(found[-1])] if found[-1]["sizes"] else []
        return charts, [line for each in found for line in told_cosines(each)]


def told_cosines(summary: dict[str, Any]) -> Told:
    """Percentiles of a checkpoint's cosines, a line per pair."""
    told: Told = []
    for pair, values in summary["cosines"].items():
        cells = ["none" if values[p] is None else f"{values[p]:+.3f}" for p in ("p5", "p50", "p95")]
        told.append((f"step {summary['step']}, {NAMES[pair]}", *cells))
    return told
