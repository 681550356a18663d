"""The running average of the weights.

    half_life = min(h, ramp · step),   β = 0.5^(n / max(half_life, 1e-8)),   ema ← β ema + (1 − β) weights

on the 0-based steps that n divides, after the optimiser's step; n is 1 as published. So at step 0 (β = 0) the average
is the weights themselves. With ramp 0 there is no ramp: the half-life is h from the first step on, and the average
begins at the initial weights.

Each average is a sum of the weights at all steps, each with its share: its profile over the steps. The weights after
the 0-based step k have in the average of N steps

    p(k) = (1 − β_k) Π β_j over k < j < N,   the initial weights (k = −1)   p(−1) = Π β_j over all j

and p sums to 1. So the average of any other profile is, as nearly as profiles can say, the sum of kept averages whose
profiles, with the same factors, add up to it (arXiv:2312.02696, section 3). The power function of that paper has

    p(k) = ((k + 1)/N)^(γ+1) − (k/N)^(γ+1),   relative width σ = √(γ+1) / ((γ+2) √(γ+3))

σ is the standard deviation of k/N.

How far such a sum Σ c_j A_j is from the wanted average, relative to the weights' size, can be expected beforehand. Let
p be the wanted profile, p_j that of A_j. Step k moves the weights by m_k of their size, in a direction that the
optimiser's momentum b keeps for a while (the directions of two steps have the cosine b to the power of their distance):

    x_k = m_{k+1} Σ_{i ≤ k} (Σ_j c_j p_j(i) − p(i)),   y_k = b y_{k−1} + √(1 − b²) x_k
    error² = Σ_k y_k² + Σ_h rounding_h²

An average is kept in float32, and each of its steps rounds it by a ROUNDING of its size. The next steps let that fade
as they let the weights fade, so averages of one half-life h share it: rounding_h is what Σ c_j leaves of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# rms of rounding to float32, relative: half a unit of the last place at most, evenly, of values spread over all sizes
ROUNDING = 2.0**-23 / math.sqrt(12 * 1.5 / math.log(2))


def ema_beta(step: int, *, half_life: float, ramp: float, every: int) -> float:
    """β of the 0-based step `step`; 1, which moves nothing, on a step that `every` does not divide."""
    if step % every:
        return 1.0
    half_life = min(half_life, ramp * step) if ramp > 0.0 else half_life
    return float(0.5 ** (every / max(half_life, 1e-8)))


@dataclass(frozen=True)
class Decay:
    """How an exponential average forgets: the logarithms of β over the steps, the first one and those after it."""

    first: float  # of step 0, which may forget everything; beside it the others would lose their digits
    logs: Tensor  # (steps,) float64; 0 at step 0
    total: Tensor  # their sums up to and with each step

    @staticmethod
    def of(steps: int, *, half_life: float, ramp: float, every: int) -> "Decay":
        """The decay over the 0-based steps 0 … steps − 1."""
        k = torch.arange(steps, dtype=torch.float64)
        lives = (ramp * k).clamp(max=half_life) if ramp > 0.0 else torch.full_like(k, half_life)
        logs = -math.log(2.0) * every / lives.clamp(min=1e-8)
        logs[k % every != 0] = 0.0
        first, logs[0] = float(logs[0]), 0.0
        return Decay(first, logs, logs.cumsum(0))

    def profile(self, step: int, places: range) -> Tensor:
        """The shares of the weights after these steps (−1: the initial ones) in the average of `step` steps."""
        end, first = self.total[step - 1], max(places.start, 0)
        k = torch.arange(first, max(first, min(places.stop, step)))
        logs = self.logs[k] + self.first * (k == 0).double()
        shares = -torch.expm1(logs) * torch.exp(end - self.total[k])
        initial = [torch.exp(end + self.first)[None]] if places.start < 0 else []
        return torch.cat([*initial, shares, shares.new_zeros(max(0, places.stop - max(places.start, step)))])

    def roundings(self, steps: Sequence[int]) -> Tensor:
        """What rounding left in the averages of these steps: born up to average i, after the one before, still in j."""
        ends, before = self.total[torch.tensor(steps) - 1], [0, *steps[:-1]]
        born = []
        for end, first, last in zip(ends, before, steps, strict=True):
            moved = self.logs[first:last] < 0.0
            born.append((torch.exp(2 * (end - self.total[first:last])) * moved).sum().sqrt())
        return ROUNDING * torch.stack(born)[:, None] * torch.exp(ends - ends[:, None]).triu()


def power_profile(gamma: float, step: int, places: range) -> Tensor:
    """The shares of the weights after the steps in `places` in the power-function average of `step` steps."""
    k = torch.arange(places.start, places.stop, dtype=torch.float64).clamp(max=step)
    below, above = (k / step).clamp(min=0.0), ((k + 1) / step).clamp(0.0, 1.0)
    return above ** (gamma + 1) - below ** (gamma + 1)


def power_of_width(width: float) -> float:
    """The γ whose power-function average has this relative width σ; by bisection, since σ falls as γ grows."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        sigma = math.sqrt(middle + 1) / ((middle + 2) * math.sqrt(middle + 3))
        low, high = (middle, high) if sigma > width else (low, middle)
    return (low + high) / 2


def with_momentum(rows: Tensor, before: Tensor, b: float) -> Tensor:
    """The y of these x, row by row, from the y before the first; by doubling how far back the sums reach."""
    y, reach = torch.cat([before, math.sqrt(1 - b * b) * rows]), 1
    while reach < len(y) and b**reach > 1e-18:
        y[reach:] += b**reach * y[:-reach]
        reach *= 2
    return y[1:]


def momentum_tail(last: Tensor, b: float) -> Tensor:
    """One row that stands for the endless ones after the last step, where x is 0 and y fades."""
    return last * b / math.sqrt(1 - b * b)


def factors(triangle: Tensor, columns: Sequence[int], target: int) -> Tensor:
    """The factors, which sum to 1, of the averages in `columns` whose sum is nearest to the one in column `target`.

    `triangle`: R of the QR decomposition of what each of them adds to the error, which has all inner products.
    """
    base, rest = triangle[:, columns[0]], triangle[:, list(columns[1:])]
    solved = torch.linalg.lstsq(
        rest - base[:, None], (triangle[:, target] - base)[:, None], rcond=1e-9, driver="gelsd"
    ).solution[:, 0]
    return torch.cat([(1 - solved.sum())[None], solved])


@torch.no_grad()
def update_ema(ema: Sequence[Tensor], weights: Sequence[Tensor], beta: float) -> None:
    """Move the average towards the weights, in place and in one fused sweep: ema ← β ema + (1 − β) weights."""
    torch._foreach_lerp_(list(ema), list(weights), 1.0 - beta)


@torch.no_grad()
def move_ema(ema: Sequence[Tensor], weights: Sequence[Tensor], move: Tensor) -> None:
    """The same where 1 − β is a number on the device, (); 0 moves nothing."""
    spread = move.expand(max(weight.numel() for weight in weights)).contiguous()  # one sweep wants as many as weights
    torch._foreach_lerp_(list(ema), list(weights), [spread[: w.numel()].view(w.shape) for w in weights])
