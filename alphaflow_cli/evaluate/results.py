"""What a number means: the protocol printed beside every score.

Two numbers may be compared only where network, weights, preprocessing, reference, count and the way the pictures were
made are the same; so all of it is kept with the number, and "FID" is printed for one feature space only.

Where numbers go: results.json with the whole protocol, one line of history per evaluation, a Markdown row.
"""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch

import alphaflow_cli
from alphaflow_cli.documents import Anything, ListOf, Maybe, Number, Table, Text, Whole, read_json
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.features import Extractor
from alphaflow_cli.files import append, make_folder, write_whole
from alphaflow_cli.recipe.schema import Metric
from alphaflow_cli.text import for_markdown

UNBIASED_FROM = 50_000  # pictures; the published figures are of that many
NETWORK: dict[Metric, str] = {
    "fid": "inception",
    "kid": "inception",
    "is": "inception",
    "pr": "inception",
    "fdd": "dinov2",
    "fcd": "clip",
    "fd-tiny": "tiny",
}
TITLE: dict[Metric, str] = {"fid": "FID", "kid": "KID", "is": "IS", "fdd": "FDD", "fcd": "FCD", "fd-tiny": "FD-tiny"}
LOWER_IS_BETTER = {"FID": True, "KID": True, "IS": False, "FDD": True, "FCD": True, "FD-tiny": True}
NEEDS_FEATURES: tuple[Metric, ...] = (
    "kid",
    "pr",
)  # of the reference, one by one; the others need its moments, or nothing
NEEDS_MOMENTS: tuple[Metric, ...] = ("fid", "fdd", "fcd", "fd-tiny")


@dataclass(frozen=True)
class FeatureSpace:
    """What two sets of features must share to be compared; an empty string says: the file does not tell."""

    network: str  # id of the extractor
    weights_sha256: str
    preprocessing: str
    dim: int


SPACE = Table({"network": Text(200), "weights_sha256": Text(64), "preprocessing": Text(300), "dim": Whole(0)})


@dataclass(frozen=True)
class Row:
    """One number and its protocol."""

    name: str  # FID-10k
    value: float
    spread: float | None  # standard deviation over subsets or splits
    metric: Metric
    space: FeatureSpace
    count: int  # pictures measured
    pictures: dict[str, Any]  # their source, as it describes itself
    label: str  # the same in a few words
    reference: dict[str, Any] | None  # name, kind, hash, count, size, how it was prepared
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def told(self) -> str:
        """The protocol in one line."""
        weights = f" {self.space.weights_sha256[:8]}" if self.space.weights_sha256 else ""
        parts = [f"{self.space.network}{weights}"]
        if self.reference is not None:
            parts.append(f"reference {told_reference(self.reference)}")
        parts.append(f"{self.count:,} pictures: {self.label}")
        parts += [f"{key.replace('_', ' ')} {value}" for key, value in self.settings.items()]
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self)


def told_reference(reference: dict[str, Any]) -> str:
    """`name (kind, 50,000 pictures, 1a2b3c4d)`."""
    count = reference.get("count")
    told = f"{count:,} pictures" if count else "count not stated"
    return f"{reference['name']} ({reference['kind']}, {told}, {reference['sha256'][:8]})"


def space_of(extractor: Extractor) -> FeatureSpace:
    """The space an extractor maps to."""
    return FeatureSpace(extractor.id, extractor.weights_sha256, extractor.preprocessing, extractor.dim)


def name_of(title: str, extractor: Extractor, count: int) -> str:
    """FID-10k; with weights that are not the published ones, FID is not its name: FD(inception 5a993ec0)-10k."""
    if not extractor.known:
        title = f"{'FD' if title == 'FID' else title}(weights {extractor.weights_sha256[:8]})"
    return f"{title}-{count_name(count)}"


def count_name(count: int) -> str:
    """50k, 2048."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def environment() -> dict[str, str]:
    """Versions that decide the last digits."""
    packages = {name: version(name) for name in ("torch-fidelity", "timm", "numpy")}
    return {
        "alphaflow": alphaflow_cli.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "precision": "features float32 (TF32 off), moments and distances float64",
        **packages,
    }


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
    write_whole(path, text)
    lines = "".join(json.dumps(each.as_dict(), ensure_ascii=False) + "\n" for each in evaluations)
    try:
        append(history, lines)
    except OSError as fault:
        raise AlphaflowError(f"{history}: cannot be written ({fault.strerror}); {path} is whole") from fault


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
