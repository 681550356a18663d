"""One micro-batch from rows to a loss: the only place where the bare and the wrapped network meet.

Targets see the BARE network, without gradient. The loss sees the WRAPPED one, in the one graded forward of the step,
so that gradients synchronise. The r = t rows come first: `n_equal` of them.

    guidance    one call of the bare network: (z | ∅) for all rows and (z | y) for the r < t rows, at (t, t);
                an r = t row's own prediction IS u(z, t, t | y), so it is taken from the graded forward
    0 < α < 1   one call of the bare network at (z_s, r, s), r < t rows only; after the guidance's, whose ṽ makes z_s
    α = 0       du/dt rides along in the graded forward
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alphaflow_cli.core import guidance, objective, path
from alphaflow_cli.engine.build import null_label
from alphaflow_cli.recipe.schema import Guidance, Loss, Recipe


@dataclass(frozen=True)
class Rows:
    """A micro-batch, r = t rows first. `uniforms` decide the label dropout."""

    x: Tensor
    noise: Tensor
    t: Tensor
    r: Tensor
    y: Tensor
    uniforms: Tensor
    n_equal: int


@dataclass(frozen=True)
class Objective:
    """What the step needs of a recipe."""

    loss: Loss
    guidance: Guidance
    y_null: int
    has_labels: bool
    bf16: bool

    @staticmethod
    def of(recipe: Recipe) -> "Objective":
        """The recipe's."""
        return Objective(
            loss=recipe.loss,
            guidance=recipe.guidance,
            y_null=null_label(recipe),
            has_labels=recipe.data.classes > 0,
            bf16=recipe.train.precision == "bf16",
        )

    @property
    def is_guided(self) -> bool:
        """Whether ṽ differs from v anywhere."""
        return self.has_labels and (self.guidance.omega, self.guidance.kappa) != (1.0, 0.0)


@dataclass(frozen=True)
class StepResult:
    """The weighted loss, summed over the rows, and what is logged of each row."""

    loss: Tensor  # () with gradient
    terms: objective.Terms
    v_guided: Tensor
    target: Tensor


def training_step(wrapped: nn.Module, bare: nn.Module, rows: Rows, *, alpha: float, how: Objective) -> StepResult:
    """Times and labels to the loss of the rows. Divide by the rows of the whole step and call backward."""
    k = rows.n_equal
    z_t = path.interpolate(rows.x, rows.noise, rows.t)
    v = path.velocity(rows.x, rows.noise)
    y = _labels(rows, how)
    with precision(rows.x, how):
        u_y, u_null = _guidance_velocities(bare, z_t, rows, y, how)
    v_later = _guided(v[k:], u_y, None if u_null is None else u_null[k:], rows.t[k:], how)
    if alpha == 0.0 and k < len(v):
        with precision(rows.x, how):
            u, du = wrapped(z_t, rows.t, rows.r, y, tangent=v_later, first=k)
        later = objective.mean_target(v_later, du.to(v.dtype), rows.t[k:], rows.r[k:])
    else:
        with precision(rows.x, how):
            later = _later_target(bare, z_t, v_later, rows, y, alpha=alpha, how=how)
        with precision(rows.x, how):
            u = wrapped(z_t, rows.t, rows.r, y)
    u = u.to(v.dtype)
    v_equal = _guided(v[:k], u[:k].detach(), None if u_null is None else u_null[:k], rows.t[:k], how)
    v_guided = torch.cat([v_equal, v_later])
    target = torch.cat([v_equal, later])
    return _loss(u, target, v_guided, k, alpha=alpha, how=how)


@torch.no_grad()
def guided_rows(bare: nn.Module, rows: Rows, how: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """(z_t, ṽ, y) of a batch without r = t rows, as `training_step` makes them: for measurements."""
    assert rows.n_equal == 0, rows.n_equal
    z_t = path.interpolate(rows.x, rows.noise, rows.t)
    y = _labels(rows, how)
    with precision(rows.x, how):
        u_y, u_null = _guidance_velocities(bare, z_t, rows, y, how)
    return z_t, _guided(path.velocity(rows.x, rows.noise), u_y, u_null, rows.t, how), y


def precision(x: Tensor, how: Objective) -> torch.autocast:
    """One region per call: inside one, older torch keeps casts of weights made without gradient for the graded call."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=how.bf16)


def _labels(rows: Rows, how: Objective) -> Tensor:
    mix = how.guidance
    if not how.has_labels or mix.label_dropout == 0.0:
        return rows.y
    return guidance.drop_labels(
        rows.y, rows.t, rows.uniforms, dropout=mix.label_dropout, y_null=how.y_null, t_min=mix.t_min, t_max=mix.t_max
    )


def _guided(v: Tensor, u_y: Tensor | None, u_null: Tensor | None, t: Tensor, how: Objective) -> Tensor:
    if not how.is_guided:
        return v
    mix = how.guidance
    return guidance.guided_velocity(
        v, u_y, u_null, t, omega=mix.omega, kappa=mix.kappa, t_min=mix.t_min, t_max=mix.t_max
    )


@torch.no_grad()
def _guidance_velocities(
    bare: nn.Module, z_t: Tensor, rows: Rows, y: Tensor, how: Objective
) -> tuple[Tensor | None, Tensor | None]:
    """(u⁻(z,t,t|y) of the r < t rows, u⁻(z,t,t|∅) of all rows) in one call; None where its weight is 0."""
    mix, k = how.guidance, rows.n_equal
    need_y = how.is_guided and mix.kappa != 0.0 and k < len(y)
    need_null = how.is_guided and guidance.null_weight(mix.omega, mix.kappa) != 0.0
    n_null = len(y) if need_null else 0
    if not need_y and not need_null:
        return None, None
    places = [slice(0, n_null)] + [slice(k, None)] * need_y
    labels = [torch.full_like(y[:n_null], how.y_null)] + [y[k:]] * need_y
    z, t = (torch.cat([values[place] for place in places]) for values in (z_t, rows.t))
    u = bare(z, t, t, torch.cat(labels)).to(z_t.dtype)
    return (u[n_null:] if need_y else None), (u[:n_null] if need_null else None)


def _later_target(
    bare: nn.Module, z_t: Tensor, v_later: Tensor, rows: Rows, y: Tensor, *, alpha: float, how: Objective
) -> Tensor:
    """The target of the r < t rows for 0 < α ≤ 1."""
    if alpha == 1.0 or len(v_later) == 0:
        return v_later
    k = rows.n_equal
    target = {"data": objective.between_target, "network": objective.shortcut_target}[how.loss.velocity]
    return target(bare, z_t[k:], v_later, t=rows.t[k:], r=rows.r[k:], y=y[k:], alpha=alpha)


def _loss(u: Tensor, target: Tensor, v_guided: Tensor, k: int, *, alpha: float, how: Objective) -> StepResult:
    target = objective.clamp_target(target, k, bound=how.loss.clamp, alpha=alpha).detach()
    error = objective.squared_error(u, target, how.loss.reduction)
    weight = objective.loss_weight(error, k, alpha=alpha, kind=how.loss.weight, c=how.loss.c)
    terms = objective.loss_terms(u, target, v_guided)
    return StepResult(loss=(weight * error).sum(), terms=terms, v_guided=v_guided, target=target)
