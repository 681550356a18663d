"""The Fréchet distance of two Gaussians, and the moments it is computed from.

    d² = |m_a − m_b|² + tr(S_a) + tr(S_b) − 2·tr((S_a·S_b)^½)

The last trace is the sum of the singular values of R_aᵀ·R_b, where S = R·Rᵀ comes from a symmetric eigendecomposition.
It needs no square root of an unsymmetric matrix, survives covariances of too few samples, and is accurate to rounding:
the usual forms (`sqrtm`, eigenvalues of S_a·S_b) lose half the digits and have returned plainly wrong distances.
Everything is float64. Shapes: features (N, D), mean (D,), covariance (D, D).
"""

import warnings

import torch
from torch import Tensor

from alphaflow_cli.errors import AlphaflowError

ASYMMETRY = 1e-6  # relative to the larger matrix: a collapsed set has a covariance of pure rounding noise
NEGATIVE_WARNING = 1e-6  # most negative eigenvalue / largest of both: statistics kept in float32 stay below it
NEGATIVE_REFUSED = 1e-3  # beyond this it is no covariance


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Fréchet (2-Wasserstein) distance between N(mean_a, cov_a) and N(mean_b, cov_b)."""
    _check(mean_a, cov_a, mean_b, cov_b)
    mean_a, cov_a, mean_b, cov_b = (each.double() for each in (mean_a, cov_a, mean_b, cov_b))
    scale = max(float(cov_a.abs().max()), float(cov_b.abs().max()))
    root_a, trace_a = _root(cov_a, scale)
    root_b, trace_b = _root(cov_b, scale)
    shift = (mean_a - mean_b).square().sum()
    overlap = torch.linalg.svdvals(root_a.T @ root_b).sum()
    distance = float(shift + trace_a + trace_b - 2 * overlap)
    return max(distance, 0.0)  # rounding may leave −1e-13 where the two are equal


def _root(cov: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A matrix R with R·Rᵀ = cov, and the trace of R·Rᵀ; negative eigenvalues are rounding and become 0."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    lowest = float(values[0])
    if lowest < -NEGATIVE_REFUSED * scale:
        raise AlphaflowError(f"not a covariance matrix: smallest eigenvalue {lowest:.3g} (largest entry {scale:.3g})")
    if lowest < -NEGATIVE_WARNING * scale:
        warnings.warn(f"covariance has an eigenvalue of {lowest:.3g}; taken as 0", stacklevel=3)
    values = values.clamp(min=0)
    return vectors * values.sqrt(), values.sum()


def _check(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> None:
    dim = mean_a.numel()
    shapes = [tuple(each.shape) for each in (mean_a, cov_a, mean_b, cov_b)]
    if shapes != [(dim,), (dim, dim), (dim,), (dim, dim)]:
        raise AlphaflowError(f"moments do not fit: mean {shapes[0]}, covariance {shapes[1]} / {shapes[2]}, {shapes[3]}")
    for name, each in (("mean", mean_a), ("covariance", cov_a), ("mean", mean_b), ("covariance", cov_b)):
        if not bool(torch.isfinite(each).all()):
            raise AlphaflowError(f"the {name} has values that are not finite; the features it came from are broken")
    scale = max(float(cov_a.abs().max()), float(cov_b.abs().max()))
    for cov in (cov_a, cov_b):
        gap = float((cov - cov.T).abs().max())
        if gap > ASYMMETRY * scale:
            raise AlphaflowError(f"covariance is not symmetric: entries differ by {gap:.3g} (largest {scale:.3g})")


class Moments:
    """Running float64 sums of features: count, Σf, Σf·fᵀ. The sums of several processes add up."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.sums = torch.zeros(dim + 1, dim + 1, dtype=torch.float64)  # of [f, 1]·[f, 1]ᵀ: one tensor to all-reduce

    @property
    def count(self) -> int:
        """How many features the sums hold."""
        return round(float(self.sums[-1, -1]))

    def update(self, features: Tensor) -> None:
        """Add features (N, D) to the sums."""
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise AlphaflowError(f"features have the shape {tuple(features.shape)}, but should have (N, {self.dim})")
        if not bool(torch.isfinite(features).all()):
            raise AlphaflowError("features have values that are not finite")
        rows = features.to(self.sums.device, torch.float64)
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        self.sums += rows.T @ rows

    def finalise(self) -> tuple[Tensor, Tensor]:
        """The mean and the covariance of all features so far; the covariance is divided by N − 1."""
        n = self.count
        if n < 2:
            raise AlphaflowError(f"a covariance needs at least 2 samples, there are {n}")
        mean = self.sums[:-1, -1] / n
        cov = (self.sums[:-1, :-1] - n * torch.outer(mean, mean)) / (n - 1)
        return mean, (cov + cov.T) / 2
