"""From features to rows: every requested metric, with its protocol and its notes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alphaflow_cli.core.frechet import Moments, frechet_distance
from alphaflow_cli.core.scores import inception_score, kid, precision_recall
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.features import Extractor
from alphaflow_cli.evaluate.measure import Pass, load_all
from alphaflow_cli.evaluate.reference import DRAW_SEED, Reference, check_fit, floor_of
from alphaflow_cli.evaluate.results import (
    NEEDS_FEATURES,
    NEEDS_MOMENTS,
    NETWORK,
    TITLE,
    UNBIASED_FROM,
    Row,
    name_of,
    space_of,
)
from alphaflow_cli.recipe.schema import Metric
from alphaflow_cli.runtime.precision import exact_device, true_float32

FEWEST_FEATURES = 100  # single real features
KID_SUBSETS, KID_SIZE = 100, 1000
IS_SPLITS = 10
NEIGHBOURS = 3
BLOCK = 10_000  # rows of a distance matrix at a time


Scored = tuple[str, float, float | None, dict[str, Any]]  # title, value, its spread, how it was computed


@dataclass(frozen=True)
class Measured:
    """A finished pass over the pictures, and the reference that they are compared with."""

    work: Pass
    moments: dict[str, Moments]
    reference: Reference | None
    device: torch.device


def check_reference(
    metrics: tuple[Metric, ...], reference: Reference | None, extractors: dict[str, Extractor], size: tuple[int, int]
) -> None:
    """Refuse metrics that the reference cannot give, before the long pass over the pictures."""
    for metric in metrics:
        if metric == "is":
            continue
        if reference is None:
            raise AlphaflowError(f"{metric} compares with real pictures: add --reference FILE or --reference SOURCE")
        check_fit(reference, NETWORK[metric], extractors[NETWORK[metric]], size)
        kept = reference.stats[NETWORK[metric]].features
        if metric in NEEDS_FEATURES and (kept is None or len(kept) < FEWEST_FEATURES):
            raise AlphaflowError(
                f"{reference.facts['name']}: {metric} needs the features of single real pictures, this file has only "
                "their mean and covariance. Build a reference from pictures: alphaflow reference SOURCE -o FILE"
            )


def score(measured: Measured, metrics: tuple[Metric, ...]) -> list[Row]:
    """Compute the rows of every metric, in the order given."""
    work, rows = measured.work, []
    for metric in metrics:
        extractor, notes = work.extractors[NETWORK[metric]], _notes(measured, metric)
        reference = None if metric == "is" or measured.reference is None else measured.reference.facts
        for title, value, spread, settings in NUMBERS.get(metric, _frechet)(measured, metric):
            row = Row(
                name=name_of(title, extractor, work.source.count),
                value=value,
                spread=spread,
                metric=metric,
                space=space_of(extractor),
                count=work.source.count,
                pictures=work.source.describe(),
                label=work.source.label,
                reference=reference,
                settings=settings,
                notes=notes,
            )
            rows.append(row)
    return rows


def _frechet(measured: Measured, metric: Metric) -> Iterator[Scored]:
    key, reference = NETWORK[metric], measured.reference
    assert reference is not None
    stats, moments = reference.stats[key], measured.moments[key]
    value = frechet_distance(*moments.finalise(), stats.mean, stats.cov)
    floor = floor_of(reference, key, moments.count) if metric == "fd-tiny" else None
    yield TITLE[metric], value, None, {"times_the_floor": round(value / floor, 2)} if floor else {}


def _kid(measured: Measured, metric: Metric) -> Iterator[Scored]:
    fake, real = _single_features(measured, metric)
    size = min(KID_SIZE, len(fake), len(real))
    value, spread = kid(fake, real, _subsets(len(fake), len(real), size))
    yield "KID", value, spread, {"subsets": KID_SUBSETS, "of": size, "single_real_pictures": len(real)}


def _subsets(fakes: int, reals: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    rng = np.random.RandomState(DRAW_SEED)
    for _ in range(KID_SUBSETS):
        chosen = rng.choice(fakes, size, replace=False), rng.choice(reals, size, replace=False)
        yield torch.from_numpy(chosen[0]), torch.from_numpy(chosen[1])


def _inception_score(measured: Measured, metric: Metric) -> Iterator[Scored]:
    features = load_all(measured.work, NETWORK[metric])
    shuffled = np.random.RandomState(DRAW_SEED).permutation(len(features))  # class-sorted sets would collapse
    order = torch.from_numpy(shuffled)
    extractor = measured.work.extractors[NETWORK[metric]]
    with true_float32():
        logits = torch.cat([extractor.logits(part).cpu() for part in torch.split(features[order], BLOCK)])
    value, spread = inception_score(logits, IS_SPLITS)
    yield "IS", value, spread, {"splits": IS_SPLITS, "order": f"shuffled, seed {DRAW_SEED}"}


def _precision_recall(measured: Measured, metric: Metric) -> Iterator[Scored]:
    fake, real = _single_features(measured, metric)
    with true_float32():
        device = exact_device(measured.device)
        shares = precision_recall(fake.to(device), real.to(device), NEIGHBOURS, block=BLOCK)
    for title in ("precision", "recall", "density", "coverage"):
        settings = {"neighbours": NEIGHBOURS, "single_real_pictures": len(real)}
        yield title, getattr(shares, title), None, settings


NUMBERS: dict[Metric, Callable[[Measured, Metric], Iterator[Scored]]] = {
    "kid": _kid,
    "is": _inception_score,
    "pr": _precision_recall,
}  # of the other metrics: a Fréchet distance


def _single_features(measured: Measured, metric: Metric) -> tuple[Tensor, Tensor]:
    """The features of the measured pictures, and those of single pictures of the reference."""
    assert measured.reference is not None
    real = measured.reference.stats[NETWORK[metric]].features
    assert real is not None, metric
    return load_all(measured.work, NETWORK[metric]), real


def _notes(measured: Measured, metric: Metric) -> tuple[str, ...]:
    """What a reader must know before believing the row."""
    key, count = NETWORK[metric], measured.work.source.count
    extractor, notes = measured.work.extractors[key], []
    if metric in NEEDS_MOMENTS:
        if count <= extractor.dim:
            notes.append(f"covariance is singular: {count:,} pictures for {extractor.dim} features")
        if count < UNBIASED_FROM:
            notes.append(f"biased upwards: below {UNBIASED_FROM:,} pictures; compare only with the same count")
    if not extractor.known:
        notes.append(f"weights are not the published ones (sha256 {extractor.weights_sha256[:8]}…)")
    if measured.reference is not None and metric != "is":
        unstated = check_fit(measured.reference, key, extractor, measured.work.source.size)
        notes += [f"reference does not state its {', '.join(unstated)}"] if unstated else []
    return tuple(notes)
