"""Where numbers go: results.json with the whole protocol, one line of history per evaluation, a Markdown row."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from alphaflow_cli.documents import Anything, ListOf, Maybe, Number, Table, Text, Whole, read_json
from alphaflow_cli.engine.files import append, write_atomically
from alphaflow_cli.engine.measure import make_folder
from alphaflow_cli.engine.protocol import SPACE, Row, environment
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe.schema import Metric
from alphaflow_cli.text import for_markdown

SCHEMA = "alphaflow-results/1"
DIGITS = {
    "KID": 6,
    "precision": 4,
    "recall": 4,
    "density": 4,
    "coverage": 4,
}  # after the point; 4 significant otherwise

PICTURES = Table(optional={"checkpoint_sha256": Maybe(Text(64)), "nfe": Maybe(Whole(0, 10**9))}, others=Anything())
REFERENCE = Table(
    {"name": Text(300), "kind": Text(100), "sha256": Text(64)}, {"count": Maybe(Whole(0))}, others=Anything()
)
ROW = Table(
    {
        "name": Text(100),
        "value": Number(-1e12, 1e12),
        "spread": Maybe(Number(0, 1e12)),
        "metric": Text(one_of=get_args(Metric)),
        "space": SPACE,
        "count": Whole(0),
        "pictures": PICTURES,
        "label": Text(1000),
        "reference": Maybe(REFERENCE),
    },
    {"settings": Table(others=Anything()), "notes": ListOf(Text(2000), most=100)},
)
RESULTS = Table(
    {
        "evaluations": ListOf(
            Table(
                {"rows": ListOf(ROW, most=1000)},
                {
                    "id": Text(200),
                    "measured": Text(100),
                    "pictures_sha256": Text(64),
                    "warnings": ListOf(Text(2000), most=1000),
                    "seconds": Table(others=Number()),
                    "processes": Whole(1),
                },
            ),
            most=1000,
        )
    },
    {"schema": Text(100), "environment": Table(others=Text(300))},
)


@dataclass(frozen=True)
class Evaluation:
    """One set of pictures, measured."""

    id: str
    rows: Sequence[Row]
    pictures_sha256: str
    warnings: Sequence[str]
    seconds: dict[str, float]
    processes: int

    def as_dict(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "id": self.id,
            "measured": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "pictures_sha256": self.pictures_sha256,
            "rows": [row.as_dict() for row in self.rows],
            "warnings": list(self.warnings),
            "seconds": self.seconds,
            "processes": self.processes,
        }


def told_value(row: Row) -> str:
    """`12.34`, `0.001234 ± 0.0002`."""
    title = row.name.split("(")[0].split("-")[0]
    digits = DIGITS.get(title)
    shown = f"{row.value:.{digits}f}" if digits else _significant(row.value)
    if row.spread is None:
        return shown
    return f"{shown} ± {row.spread:.{digits}f}" if digits else f"{shown} ± {row.spread:.2g}"


def _significant(value: float) -> str:
    return f"{value:.1f}" if value >= 1000 else f"{value:.4g}"


def notes(evaluation: Evaluation) -> dict[str, list[str]]:
    """Each note once, with the rows it belongs to."""
    found: dict[str, list[str]] = {}
    for row in evaluation.rows:
        for note in row.notes:
            found.setdefault(note, []).append(row.name)
    return found


def document(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The whole of results.json."""
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "evaluations": [each.as_dict() for each in evaluations],
    }


def read_results(path: Path, *, advice: str = "Move it away, or measure again: alphaflow eval.") -> dict[str, Any]:
    """results.json as `save_results` writes it; of another shape, one line."""
    found: dict[str, Any] = read_json(path, RESULTS, advice=advice)
    return found


def save_results(path: Path, history: Path, evaluations: Sequence[Evaluation]) -> None:
    """results.json anew, and a line for each evaluation at the end of the history."""
    make_folder(path.parent)
    text = json.dumps(document(evaluations), indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: _write(temporary, text))
    lines = "".join(json.dumps(each.as_dict(), ensure_ascii=False) + "\n" for each in evaluations)
    try:
        append(history, lines)
    except OSError as fault:
        raise AlphaflowError(f"{history}: cannot be written ({fault.strerror}); {path} is whole") from fault


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """A table for a README: one line per set of pictures, the protocols below."""
    names = list(dict.fromkeys(row.name for each in evaluations for row in each.rows))
    lines = [f"| pictures | {' | '.join(map(for_markdown, names))} |", f"|---|{'---|' * len(names)}"]
    for each in evaluations:
        values = {row.name: told_value(row) for row in each.rows}
        lines.append(f"| {for_markdown(each.rows[0].label)} | {' | '.join(values.get(name, '') for name in names)} |")
    rows = [row for each in evaluations for row in each.rows]
    told = [f"- {for_markdown(f'{row.name}: ' + '; '.join([row.told(), *row.notes]), limit=2000)}" for row in rows]
    return "\n".join([*lines, "", *dict.fromkeys(told)]) + "\n"
