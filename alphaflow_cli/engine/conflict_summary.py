"""From the lines of single batches to what a reader wants: percentiles of cosines and sizes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alphaflow_cli.core.conflict import cosine

TERMS = ("tfm", "tc", "fm")
PAIRS = (("tfm", "tc"), ("tfm", "fm"), ("tc", "fm"))
STRONG = -0.4  # the paper: cos(∇L_TFM, ∇L_TC) is typically below it

Measurement = Mapping[str, Any]
Products = Mapping[str, float]


def summarise(lines: Sequence[Measurement]) -> dict[str, Any]:
    """Everything that `analyze` tells about one checkpoint."""
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
    """Percentiles 5, 50 and 95 (linear between order statistics), mean, and how many values there were."""
    known = sorted(value for value in values if value is not None and math.isfinite(value))
    if not known:
        return {"p5": None, "p50": None, "p95": None, "mean": None, "count": 0}
    cuts = {f"p{percent}": percentile(known, percent / 100) for percent in (5, 50, 95)}
    return {**cuts, "mean": sum(known) / len(known), "count": len(known)}


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of sorted values."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _pair(products: Iterable[Products], a: str, b: str) -> list[float | None]:
    found = (cosine([p[f"{a}.{b}"]], [p[f"{a}.{a}"]], [p[f"{b}.{b}"]]) for p in products)
    return [value if math.isfinite(value) else None for value in found]


def _cosines(products: Sequence[Products]) -> dict[str, Any]:
    return {f"{a}.{b}": spread(_pair(products, a, b)) for a, b in PAIRS}


def _norms(products: Sequence[Products]) -> dict[str, Any]:
    """Of the three gradients, and of MeanFlow's, which is the sum of the first two."""
    found = {name: spread(math.sqrt(p[f"{name}.{name}"]) for p in products) for name in TERMS}
    whole = (p["tfm.tfm"] + 2 * p["tfm.tc"] + p["tc.tc"] for p in products)
    return found | {"mean_flow": spread(math.sqrt(max(square, 0.0)) for square in whole)}


def _losses(lines: Sequence[Measurement]) -> dict[str, Any]:
    return {name: spread(line["losses"][name] for line in lines) for name in TERMS}


def _of_group(lines: Sequence[Measurement], group: str) -> dict[str, Any]:
    products = [{name: groups[group] for name, groups in line["products"].items()} for line in lines]
    return {"cosines": _cosines(products), "norms": _norms(products)}


def _of_bin(lines: Sequence[Measurement], number: int) -> dict[str, Any]:
    """One range of t − r; batches without a row in it have no say."""
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


def _sizes(found: Sequence[Mapping[str, Sequence[Mapping[str, float]]]]) -> dict[str, list[dict[str, Any]]]:
    """Weight → per α the spread of the relative size and of the cosine to MeanFlow's gradient."""

    def over_batches(kind: str, place: int) -> dict[str, Any]:
        entries = [each[kind][place] for each in found]
        return {"alpha": entries[0]["alpha"], **{n: spread(entry[n] for entry in entries) for n in ("size", "cosine")}}

    return {kind: [over_batches(kind, i) for i in range(len(found[0][kind]))] for kind in (found[0] if found else ())}
