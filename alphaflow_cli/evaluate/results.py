"""A number with the protocol that gives it its meaning, and where numbers go.

Two numbers may be compared only where network, weights, preprocessing, reference, count and the way the pictures were
made are the same; so all of it is kept with the number, and "FID" is printed for one feature space only. They go to
results.json with the whole protocol, to one line of history per evaluation, and into tables for people.
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
from alphaflow_cli.runtime.progress import say
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
NEEDS_FEATURES: tuple[Metric, ...] = ("kid", "pr")  # of single pictures of the reference
NEEDS_MOMENTS: tuple[Metric, ...] = ("fid", "fdd", "fcd", "fd-tiny")  # the reference's mean and covariance
MOST_KEPT = 900  # evaluations of one results.json; up to 1,000 are read again
RESULTS_SCHEMA = "alphaflow-results/1"
DIGITS = {"KID": 6, "precision": 4, "recall": 4, "density": 4, "coverage": 4}  # after the point; others: 2

SPACE = Table({"network": Text(200), "weights_sha256": Text(64), "preprocessing": Text(300), "dim": Whole(0)})
PICTURES = Table(optional={"checkpoint_sha256": Maybe(Text(64)), "nfe": Maybe(Whole(0, 10**9))}, others=Anything())
REFERENCE = Table(
    {"name": Text(300), "kind": Text(100), "sha256": Text(64)}, {"count": Maybe(Whole(0))}, others=Anything()
)
RESULT_ROW = Table(
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
EVALUATION = Table({"rows": ListOf(RESULT_ROW, most=1000)}, others=Anything())
RESULTS = Table({"evaluations": ListOf(EVALUATION, most=1000)}, others=Anything())  # only rows are read again


@dataclass(frozen=True)
class FeatureSpace:
    """What two sets of features must share to be compared. An empty string: the file does not state it."""

    network: str  # id of the extractor
    weights_sha256: str
    preprocessing: str
    dim: int


@dataclass(frozen=True)
class Row:
    """One number and its protocol, as a line of results.json."""

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

    def protocol(self) -> str:
        """Write the protocol in one line, as it stands beside the number."""
        weights = f" {self.space.weights_sha256[:8]}" if self.space.weights_sha256 else ""
        parts = [f"{self.space.network}{weights}"]
        if self.reference is not None:
            count = f"{self.reference['count']:,} pictures" if self.reference.get("count") else "count not stated"
            facts = f"{self.reference['kind']}, {count}, {self.reference['sha256'][:8]}"
            parts.append(f"reference {self.reference['name']} ({facts})")
        parts.append(f"{self.count:,} pictures: {self.label}")
        parts += [setting_text(key, value) for key, value in self.settings.items()]
        return "; ".join(parts)


def setting_text(key: str, value: object) -> str:
    """How a score was computed, in words: `subsets 100`, `1.3 times the floor of real pictures`."""
    if key == "times_the_floor":
        return f"{value} times the floor of real pictures"
    return f"{key.replace('_', ' ')} {value}"


@dataclass(frozen=True)
class Evaluation:
    """All numbers of one set of pictures, measured in one pass."""

    id: str
    pictures_sha256: str
    rows: Sequence[Row]
    warnings: Sequence[str]
    seconds: dict[str, float]
    processes: int

    def as_dict(self) -> dict[str, Any]:
        """The evaluation as results.json and the history hold it, with the time at which this is called."""
        return {"id": self.id, "measured": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **asdict(self)}


def space_of(extractor: Extractor) -> FeatureSpace:
    """The feature space of an extractor, as a protocol names it."""
    return FeatureSpace(extractor.id, extractor.weights_sha256, extractor.preprocessing, extractor.dim)


def name_of(title: str, extractor: Extractor, count: int) -> str:
    """A number's name: FID-10k. With other weights than the published ones it is no FID: FD(weights 5a993ec0)-10k."""
    if not extractor.known:
        title = f"{'FD' if title == 'FID' else title}(weights {extractor.weights_sha256[:8]})"
    return f"{title}-{count // 1000}k" if count % 1000 == 0 else f"{title}-{count}"


def environment() -> dict[str, str]:
    """The versions that decide a number's last digits."""
    packages = {name: version(name) for name in ("torch-fidelity", "timm", "numpy")}
    return {
        "alphaflow": alphaflow_cli.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "precision": "features float32 (TF32 off), moments and distances float64",
        **packages,
    }


def value_text(row: Row) -> str:
    """Write a value with two decimals, or more where it is small, and its spread: `12.30`, `0.001234 ± 0.0002`."""
    title = row.name.split("(")[0].split("-")[0]
    digits = DIGITS.get(title)
    form, spread = (f".{digits}f",) * 2 if digits else (".2f" if abs(row.value) >= 0.1 else ".4g", ".2g")
    return f"{row.value:{form}}" + ("" if row.spread is None else f" ± {row.spread:{spread}}")


def notes(evaluation: Evaluation) -> dict[str, list[str]]:
    """Every note of an evaluation, once, with the names of the rows that it belongs to."""
    names: dict[str, list[str]] = {}
    for row in evaluation.rows:
        for note in row.notes:
            names.setdefault(note, []).append(row.name)
    return names


def document(evaluations: Sequence[Evaluation], earlier: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The content of results.json: environment and evaluations, after those that it held before."""
    return {
        "schema": RESULTS_SCHEMA,
        "environment": environment(),
        "evaluations": [*earlier, *(each.as_dict() for each in evaluations)],
    }


def still_true(path: Path, evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The evaluations that results.json holds of the same weights, without those that are measured anew.

    Each is kept with the environment in which it was measured. A file that cannot be read is replaced, and that is
    said: what was measured now is worth more.
    """
    if not path.is_file():
        return []
    try:
        there = read_results(path)
    except AlphaflowError as fault:
        say(f"{path}: written anew, because what it held cannot be read ({fault})")
        return []
    new = [asdict(row) for each in evaluations for row in each.rows]
    done, digests = {_identity(row) for row in new}, {row["pictures"].get("checkpoint_sha256") for row in new}
    kept = []
    for each in there["evaluations"]:
        same = {row["pictures"].get("checkpoint_sha256") for row in each["rows"]} <= digests
        if same and not {_identity(row) for row in each["rows"]} <= done:
            kept.append({"environment": there.get("environment", {}), **each})
    return kept[-MOST_KEPT:]


def _identity(row: dict[str, Any], *, counted: bool = True) -> str:
    """What makes two numbers the same number; without `counted`, of however many pictures."""
    pictures = {name: value for name, value in row["pictures"].items() if counted or name not in ("count", "seeds")}
    name = row["name"] if counted else row["name"].rpartition("-")[0]
    reference = (row.get("reference") or {}).get("sha256")
    return json.dumps([name, row["metric"], row["space"], pictures, reference], sort_keys=True)


def best_founded(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the numbers that differ in nothing but how many pictures they were measured on, the one of most pictures."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        before = best.setdefault(_identity(row, counted=False), row)
        if row["count"] >= before["count"]:
            best[_identity(row, counted=False)] = row
    return list(best.values())


def read_results(path: Path, *, advice: str = "Move it away, or measure again: alphaflow eval.") -> dict[str, Any]:
    """Read results.json; a file of another shape than `save_results` writes is refused in one line."""
    results: dict[str, Any] = read_json(path, RESULTS, advice=advice)
    return results


def row_of(values: dict[str, Any]) -> Row:
    """Make a row of results.json a Row again."""
    return Row(**{**values, "space": FeatureSpace(**values["space"]), "notes": tuple(values.get("notes", ()))})


def save_results(path: Path, history: Path, evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Add the evaluations to results.json, and a line for each to the history; returns what was there and stays."""
    make_folder(path.parent)
    kept = still_true(path, evaluations)
    write_whole(path, json.dumps(document(evaluations, kept), indent=1, ensure_ascii=False) + "\n")
    lines = "".join(json.dumps(each.as_dict(), ensure_ascii=False) + "\n" for each in evaluations)
    append(history, lines, kept=f"{path} is whole.")
    return kept


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """Write a Markdown table for a README: one line per set of pictures, the protocols below it."""
    names = list(dict.fromkeys(row.name for each in evaluations for row in each.rows))
    lines = [f"| pictures | {' | '.join(map(for_markdown, names))} |", f"|---|{'---|' * len(names)}"]
    for each in evaluations:
        values = {row.name: value_text(row) for row in each.rows}
        lines.append(f"| {for_markdown(each.rows[0].label)} | {' | '.join(values.get(name, '') for name in names)} |")
    rows = [row for each in evaluations for row in each.rows]
    texts = [f"{row.name}: {'; '.join([row.protocol(), *row.notes])}" for row in rows]
    protocols = [f"- {for_markdown(text, limit=2000)}" for text in texts]
    return "\n".join([*lines, "", *dict.fromkeys(protocols)]) + "\n"
