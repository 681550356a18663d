"""The rows of a run's results.json for its page."""

import json
from pathlib import Path
from typing import Any

from alphaflow_cli.engine.protocol import FeatureSpace, Row
from alphaflow_cli.engine.results import told_value
from alphaflow_cli.report.page import Score


def scores_of(path: Path) -> list[Score]:
    """Every number, by NFE; none where nothing was measured."""
    if not path.is_file():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for evaluation in document.get("evaluations", []) for row in evaluation["rows"]]
    return sorted(map(score_of, rows), key=lambda score: (score.name, score.nfe))


def score_of(values: dict[str, Any]) -> Score:
    """One number with its protocol in a line."""
    notes = tuple(values.get("notes", ()))
    row = Row(**{**values, "space": FeatureSpace(**values["space"]), "notes": notes})
    return Score(row.name, str(row.pictures.get("nfe", "")), told_value(row), "; ".join([row.told(), *notes]))
