"""How r ≤ t are drawn.

    one draw = σ(mean + std · normal)        logit_normal
             = uniform                        uniform
    minmax:       t = max, r = min of two draws
    min:          t = the first, r = min of both
    r_in_t_range: t = the first, r = t · the second
    then, with a gap g > 0:  t ← max(t, g),  r ← min(r, t − g)

The first `n_equal` rows of the GLOBAL batch have r = t (core/alpha: equal_rows) and take one draw of their own, which
no gap concerns, or the larger of the two draws that an r < t row takes. Each of the three draws has a law of its own.
Draws come in as plain normals, so that the caller owns the generator and the order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

QUANTILES = 512  # of each draw: the error of the mean interval is below 1e-4


class Law(Protocol):
    """How a normal draw becomes a time in [0, 1]."""

    def __call__(self, draw: Tensor, *, mean: float, std: float) -> Tensor: ...


def logit_normal(draw: Tensor, *, mean: float, std: float) -> Tensor:
    """σ(mean + std · normal): times around σ(mean), never quite 0 or 1."""
    return torch.sigmoid(mean + std * draw)


def uniform(draw: Tensor, *, mean: float, std: float) -> Tensor:
    """Φ(normal): a uniform made from the same normal draw; mean and std are unused."""
    share: Tensor = torch.special.ndtr(draw)
    return share


LAWS: dict[str, Law] = {"logit_normal": logit_normal, "uniform": uniform}


@dataclass(frozen=True)
class Draw:
    """One draw of a time: the law's name and its numbers."""

    law: str
    mean: float
    std: float

    def __call__(self, normals: Tensor) -> Tensor:
        """Turn normals into times, one by one."""
        return LAWS[self.law](normals, mean=self.mean, std=self.std)


@dataclass(frozen=True)
class TimeLaws:
    """All that decides (t, r): the draw of an r = t row, the two of an r < t row, their order and their gap."""

    equal: Draw
    first: Draw
    second: Draw
    order: str
    gap: float  # 0: none
    equal_draw: str  # t of an r = t row: own, or max of the first and the second draw


def minmax(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(t, r) = (max, min) of the two draws."""
    return torch.maximum(first, second), torch.minimum(first, second)


def first_and_min(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(t, r) = (the first draw, the smaller of both)."""
    return first, torch.minimum(first, second)


def r_in_t_range(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(t, r) = (first, first · second): r is uniform in [0, t] where the second draw is uniform."""
    return first, first * second


ORDERS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "minmax": minmax,
    "min": first_and_min,
    "r_in_t_range": r_in_t_range,
}


def keep_apart(t: Tensor, r: Tensor, gap: float) -> tuple[Tensor, Tensor]:
    """Move times to t ≥ gap and r ≤ t − gap."""
    t = t.clamp(min=gap)
    return t, torch.minimum(r, t - gap)


def rows_of(batch: int, *, n_equal: int, parts: int, part: int) -> tuple[slice, int]:
    """One part's rows of the global batch, and how many of them have r = t: rows part, part + parts, …

    The strided cut spreads the r = t rows evenly over the parts (processes × micro-batches) and keeps them first.
    """
    return slice(part, batch, parts), len(range(part, min(n_equal, batch), parts))


def sample_times(normals: Tensor, n_equal: int, laws: TimeLaws) -> tuple[Tensor, Tensor]:
    """Draw (t, r) of a global batch from normals (3, B): row 0 feeds r = t rows that have a draw of their own, rows 1
    and 2 feed all others."""
    first, second = laws.first(normals[1]), laws.second(normals[2])
    own = torch.maximum(first, second) if laws.equal_draw == "max" else laws.equal(normals[0])
    t, r = ORDERS[laws.order](first, second)
    if laws.gap > 0.0:
        t, r = keep_apart(t, r, laws.gap)
    is_equal = torch.arange(len(t), device=t.device) < n_equal
    return torch.where(is_equal, own, t), torch.where(is_equal, own, r)


def mean_interval(laws: TimeLaws) -> float:
    """E[t − r] of an r < t row, by the midpoint rule on the quantiles of both draws; the same on every machine."""
    shares = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    normals = torch.special.ndtri(shares)
    first, second = (each.flatten() for each in torch.meshgrid(normals, normals, indexing="ij"))
    t, r = sample_times(torch.stack([first, first, second]), 0, laws)
    return float((t - r).mean())
