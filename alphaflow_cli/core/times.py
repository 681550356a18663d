"""How r ≤ t are drawn.

    one draw = σ(mean + std · normal)        logit_normal
             = uniform                        uniform
    minmax:       t = max, r = min of two draws
    min:          t = the first, r = min of both
    r_in_t_range: t = the first, r = t · the second

The first `n_equal` rows of the GLOBAL batch have r = t (core/alpha: equal_rows) and take one draw of their own.
Draws come in as plain normals, so that the caller owns the generator and the order.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


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


def rows_of(batch: int, *, n_equal: int, parts: int, part: int) -> tuple[slice, int]:
    """One part's rows of the global batch, and how many of them have r = t: rows part, part + parts, …

    The strided cut spreads the r = t rows evenly over the parts (processes × micro-batches) and keeps them first.
    """
    return slice(part, batch, parts), len(range(part, min(n_equal, batch), parts))


def sample_times(
    normals: Tensor, n_equal: int, *, law: str, mean: float, std: float, order: str
) -> tuple[Tensor, Tensor]:
    """Draw (t, r) of a global batch from normals (3, B): row 0 feeds the r = t rows, rows 1 and 2 the others."""
    own, first, second = (LAWS[law](row, mean=mean, std=std) for row in normals)
    t, r = ORDERS[order](first, second)
    is_equal = torch.arange(len(t), device=t.device) < n_equal
    return torch.where(is_equal, own, t), torch.where(is_equal, own, r)
