"""The rows of a run's results.json for its page."""

from pathlib import Path
from typing import Any

from alphaflow_cli.engine.protocol import FeatureSpace, Row
from alphaflow_cli.engine.results import read_results, told_value
from alphaflow_cli.report.page import Score


def scores_of(path: Path, model: str) -> list[Score]:
    """Every number, by NFE; none where nothing was measured. `model`: checksum of the run's model, empty: none."""
    if not path.is_file():
        return []
    rows = [row_of(row) for evaluation in read_results(path)["evaluations"] for row in evaluation["rows"]]
    rows.sort(key=lambda row: (row.name, row.pictures.get("nfe") or 0))
    return [score_of(row, model) for row in rows]


def row_of(values: dict[str, Any]) -> Row:
    """A row as it was written."""
    return Row(**{**values, "space": FeatureSpace(**values["space"]), "notes": tuple(values.get("notes", ()))})


def score_of(row: Row, model: str) -> Score:
    """One number with its protocol in a line; that of other weights than the run's model says so."""
    digest = row.pictures.get("checkpoint_sha256") or ""
    other = [f"of other weights (sha {digest[:8]})"] if model and digest and digest != model else []
    told = "; ".join([*other, row.told(), *row.notes])
    return Score(row.name, str(row.pictures.get("nfe", "")), told_value(row), told)
