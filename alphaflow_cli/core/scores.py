"""Scores from features other than the Fréchet distance: KID, Inception Score, precision/recall, density/coverage.

    KID      unbiased MMD² with k(a, b) = (a·b/D + 1)³, averaged over subsets     Bińkowski et al., arXiv:1801.01401
    IS       exp(mean KL(p(y|x) ‖ p(y))), averaged over splits                    Salimans et al., arXiv:1606.03498
    P, R     share of one set inside the k-nearest-neighbour balls of the other   Kynkäänniemi et al., arXiv:1904.06991
    D, C     balls of the real set: how many hold a sample, how many are hit      Naeem et al., arXiv:2002.09797

Whoever calls draws the subsets and the order; nothing here is random. Shapes: features (N, D), logits (N, K).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def kernel_distance(fake: Tensor, real: Tensor) -> Tensor:
    """Unbiased squared MMD of two sets with the polynomial kernel of degree 3; may be slightly negative."""
    fake, real = fake.double(), real.double()
    n, m = len(fake), len(real)
    within_fake, within_real = _kernel(fake, fake), _kernel(real, real)
    across = _kernel(fake, real).mean()
    own = (within_fake.sum() - within_fake.trace()) / (n * (n - 1))
    other = (within_real.sum() - within_real.trace()) / (m * (m - 1))
    return own + other - 2 * across


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def kid(fake: Tensor, real: Tensor, subsets: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean and standard deviation of the kernel distance over subsets, each a pair of index tensors."""
    values = torch.stack([kernel_distance(fake[i], real[j]) for i, j in subsets])
    return float(values.mean()), float(values.std(correction=0))


def inception_score(logits: Tensor, splits: int) -> tuple[float, float]:
    """Mean and standard deviation of exp(KL) over equal splits, in the order of the rows."""
    log_p = logits.double().log_softmax(dim=1)
    n = len(log_p)
    scores = []
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        marginal = part.exp().mean(dim=0).log()
        scores.append((part.exp() * (part - marginal)).sum(dim=1).mean().exp())
    stacked = torch.stack(scores)
    return float(stacked.mean()), float(stacked.std(correction=0))


@dataclass(frozen=True)
class Coverage:
    """Precision, recall, density and coverage; density may exceed 1, the others lie in [0, 1]."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(fake: Tensor, real: Tensor, neighbours: int, *, block: int) -> Coverage:
    """Precision, recall, density and coverage, from balls that reach to the k-th neighbour (itself not counted).

    Distances are computed in blocks of rows.
    """
    fake_radius = _radii(fake, neighbours, block=block, in_rows=True)
    real_radius = _radii(real, neighbours, block=block, in_rows=False)
    precise = hits = 0.0
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    recalled = torch.zeros_like(covered)
    for rows, radius in zip(torch.split(fake, block), torch.split(fake_radius, block), strict=True):
        gaps = torch.cdist(rows, real)  # (block, N_real)
        inside = gaps <= real_radius
        precise += float(inside.any(dim=1).sum())
        hits += float(inside.sum())
        covered |= inside.any(dim=0)
        recalled |= (gaps <= radius[:, None]).any(dim=0)
    return Coverage(
        precision=precise / len(fake),
        recall=float(recalled.double().mean()),
        density=hits / (neighbours * len(fake)),
        coverage=float(covered.double().mean()),
    )


def _radii(features: Tensor, neighbours: int, *, block: int, in_rows: bool) -> Tensor:
    """How far it is from each to its k-th neighbour, computed as in the gaps that are compared with it.

    There fakes stand in rows and reals in columns: d(a, b) and d(b, a) round otherwise, and what lies on the edge of a
    ball would fall out of it.
    """
    parts = torch.split(features, block)
    gaps = (torch.cdist(part, features) if in_rows else torch.cdist(features, part).T for part in parts)
    return torch.cat([each.topk(neighbours + 1, largest=False).values.amax(dim=1) for each in gaps])
