"""The conflict between the objective's two halves (docs/method.md, "Why a curriculum").

    L_MF = L_TFM + L_TC + constant,   L_TFM = E ‖u − ṽ‖²,   L_TC = E [2 (t − r) uᵀ du⁻/dt]

and the border case L_FM' = E ‖u(z, t, t) − ṽ‖² on r = t rows. The conflict is the cosine between their gradients.
Norms are means over C·H·W and rows, as in the training loss. Products are summed in float64.
"""

from collections.abc import Iterable, Mapping
from math import sqrt

import torch
from torch import Tensor

from alphaflow_cli.core.path import expand


def trajectory_loss(u: Tensor, v_guided: Tensor) -> Tensor:
    """L_TFM, the trajectory half of the objective; on r = t rows it is L_FM', the border case."""
    return (u - v_guided).square().mean()


def consistency_loss(u: Tensor, du: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """L_TC, the consistency half of the objective; du/dt gets no gradient."""
    return (2.0 * expand(t - r, u) * u * du.detach()).mean()


def products(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    """The inner product of two gradients, tensor by tensor: name of the tensor → product."""
    values = [(first[name].double() * second[name].double()).sum() for name in first]
    return dict(zip(first, torch.stack(values).tolist(), strict=True))


def cosine(ab: Iterable[float], aa: Iterable[float], bb: Iterable[float]) -> float:
    """The cosine a·b / (|a| |b|) of two gradients, from products per tensor; NaN where a gradient vanishes."""
    length = sqrt(sum(aa)) * sqrt(sum(bb))
    return sum(ab) / length if length > 0 else float("nan")
