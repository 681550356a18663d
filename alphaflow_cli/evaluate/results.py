"""A number with the protocol that gives it its meaning, and where numbers go.

Two numbers may be compared only where network, weights, preprocessing, reference, count and the way the pictures were
made are the same; so all of it is kept with the number, and "FID" is printed for one feature space only. They go to
results.json with the whole protocol, to one line of history per evaluation, and into tables and a chart for people.
"""

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, get_args

import torch

import alphaflow_cli
from alphaflow_cli.charts.chart import BLUE, GREEN, ORANGE, RED, Chart, Line, Panel
from alphaflow_cli.documents import Anything, ListOf, Maybe, Number, Table, Text, Whole, read_json
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.features import Extractor
from alphaflow_cli.files import append, make_folder, write_whole
from alphaflow_cli.recipe.schema import LabelDraw, Metric
from alphaflow_cli.runtime.lock import in_turn
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
OF_PARTS: tuple[Metric, ...] = ("kid", "is")  # their spread is over subsets or splits of the pictures
MOST_KEPT = 900  # evaluations of one results.json; up to 1,000 are read again
RESULTS_SCHEMA = "alphaflow-results/1"
COLOURS = (BLUE, ORANGE, GREEN, RED)
OF_COUNT = ("count", "seeds", "sets")  # what of the pictures differs where only more or fewer were measured
DIGITS = {"KID": 6, "precision": 4, "recall": 4, "density": 4, "coverage": 4}  # after the point; others: 2

SPACE = Table({"network": Text(200), "weights_sha256": Text(64), "preprocessing": Text(300), "dim": Whole(0)})
PICTURES = Table(
    optional={"checkpoint_sha256": Maybe(Text(64)), "nfe": Maybe(Whole(0, 10**9)), "sets": Whole(1, 10**6)},
    others=Anything(),
)
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
        "label": Text(200_000),  # every time of the grid stood in it once, and a grid may have 10,001
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
    spread: float | None  # standard deviation over sets of seeds; of one set over subsets or splits
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
        sets = f"{self.pictures['sets']} sets of " if "sets" in self.pictures else ""
        parts.append(f"{sets}{self.count:,} pictures: {self.label}{labels_text(self.pictures)}")
        parts += [setting_text(key, value) for key, value in self.settings.items() if key != "values"]
        return "; ".join(parts)


def labels_text(pictures: dict[str, Any]) -> str:
    """How the labels of generated pictures were drawn: `, random labels`; nothing where there are none."""
    return f", {pictures['labels']} labels" if pictures.get("labels") in get_args(LabelDraw) else ""


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
    device: str = "cpu"  # the kind that computed pictures and features: each rounds otherwise

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


def mean_of_sets(evaluations: Sequence[Evaluation], sets: int) -> list[Evaluation]:
    """Make one evaluation of each `sets` that differ in their seeds alone: means, and deviations over the sets."""
    if sets == 1:
        return [*evaluations]
    return [_mean(evaluations[first : first + sets]) for first in range(0, len(evaluations), sets)]


def _mean(sets: Sequence[Evaluation]) -> Evaluation:
    rows = [_mean_row(rows) for rows in zip(*(each.rows for each in sets), strict=True)]
    warnings = [*dict.fromkeys(warning for each in sets for warning in each.warnings)]
    parts = dict.fromkeys(part for each in sets for part in each.seconds)  # a set that was there took none of some
    seconds = {part: round(sum(each.seconds.get(part, 0.0) for each in sets), 2) for part in parts}
    name, content = (_joined(texts) for texts in zip(*((each.id, each.pictures_sha256) for each in sets), strict=True))
    return Evaluation(name[:16], content, rows, warnings, seconds, sets[0].processes, sets[0].device)


def _joined(texts: Sequence[str]) -> str:
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def _mean_row(rows: Sequence[Row]) -> Row:
    one, values = rows[0], [row.value for row in rows]
    settings = {**one.settings, "values": values}
    if "times_the_floor" in settings:
        settings["times_the_floor"] = round(fmean(row.settings["times_the_floor"] for row in rows), 2)
    seeds = [one.pictures["seeds"][0], rows[-1].pictures["seeds"][1]]
    pictures = {**one.pictures, "seeds": seeds, "sets": len(rows)}
    return replace(one, value=fmean(values), spread=stdev(values), pictures=pictures, settings=settings)


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
    pictures = {name: value for name, value in row["pictures"].items() if counted or name not in OF_COUNT}
    name = row["name"] if counted else row["name"].rpartition("-")[0]
    reference = (row.get("reference") or {}).get("sha256")
    return json.dumps([name, row["metric"], row["space"], pictures, reference], sort_keys=True)


def best_founded(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the numbers that differ only in how much was measured, the one of most pictures, and of most sets of those."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        before = best.setdefault(_identity(row, counted=False), row)
        if _size(row) >= _size(before):
            best[_identity(row, counted=False)] = row
    return list(best.values())


def _size(row: dict[str, Any]) -> tuple[int, int]:
    return row["count"], row["pictures"].get("sets", 1)


def read_results(path: Path, *, advice: str = "Move it away, or measure again: alphaflow eval.") -> dict[str, Any]:
    """Read results.json; a file of another shape than `save_results` writes is refused in one line."""
    results: dict[str, Any] = read_json(path, RESULTS, advice=advice)
    return results


def row_of(values: dict[str, Any]) -> Row:
    """Make a row of results.json a Row again."""
    return Row(**{**values, "space": FeatureSpace(**values["space"]), "notes": tuple(values.get("notes", ()))})


def save_results(path: Path, history: Path, evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Add the evaluations to results.json, and a line for each to the history; returns what was there and stays.

    Of two commands that end at once the second adds to what the first has written.
    """
    make_folder(path.parent)
    with in_turn(path):
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


def score_chart(evaluations: Sequence[Evaluation], *, sweep: bool) -> Chart | None:
    """Draw each distance against evaluations per picture, or against the midpoint; None where there is one point."""
    curves: dict[str, list[tuple[float, Row]]] = {}
    for evaluation in evaluations:
        for row in evaluation.rows:
            if row.metric not in OF_PARTS and row.reference is not None:
                at = row.pictures["times"][1] if sweep else row.pictures["nfe"]
                curves.setdefault(row.name, []).append((float(at), row))
    longest = max((len(points) for points in curves.values()), default=0)
    if longest < 2:
        return None
    panels = []
    for i, (name, points) in enumerate(curves.items()):
        points.sort(key=lambda point: point[0])  # measured in the order of --nfe
        better = "higher" if points[0][1].metric == "pr" else "lower"
        bars = [(at, row.value - row.spread, row.value + row.spread) for at, row in points if row.spread is not None]
        curve = [(at, row.value) for at, row in points]
        line = Line(name, curve, COLOURS[i % len(COLOURS)], markers=True, spread=bars, spread_label="± 1 sd over seeds")
        panels.append(Panel(f"{name}: {better} is better", [line]))
    rows = [row for points in curves.values() for _, row in points]
    ticks = sorted({at for points in curves.values() for at, _ in points})
    label = "midpoint of a two-step grid" if sweep else "network evaluations per picture"
    title = f"Scores of {rows[0].pictures.get('name') or 'the checkpoint'}"
    return Chart(title, panels, label, subtitle=shared_protocol(rows), log_x=not sweep, x_ticks=ticks)


def shared_protocol(rows: Sequence[Row]) -> str:
    """The protocols of all rows, once each, without the walk that tells the rows apart."""
    weights = [f"weights {str(row.pictures.get('checkpoint_sha256'))[:8]}" for row in rows]
    shared = [row.protocol().partition(f": {row.label}")[0] + labels_text(row.pictures) for row in rows]
    return "; ".join(dict.fromkeys([*shared, *weights]))
