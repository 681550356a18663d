"""One micro-batch, from its rows to their loss: the only place where the bare and the wrapped network meet.

Targets see the BARE network, without gradient. The loss sees the WRAPPED one, in the one graded forward of the step,
so that gradients synchronise. The r = t rows come first: `n_equal` of them. Beside the graded forward there is at most
one call of the network, whatever the phase (two for the Shortcut Model, whose z_s takes a step of the network's own):

    α = 1       none: guidance's rows go along in the graded forward
    0 < α < 1   (z_s, r, s) of the r < t rows; z_s needs ṽ, so guidance's rows went along in the graded forward
    α = 0       guidance's rows; du/dt along their ṽ then rides along in the graded forward

Guidance's rows are those whose velocity at (t, t) it needs (train/questions.py). With loss.tangent: network every r < t
row is among them while α < 1: its y is what z moves along.

A network with a velocity head gives v̂ beside u, from the same graded forward. Then v̂ answers guidance's questions, and
learns ṽ on every row: l_u and l_v, each with a weight of its own, are added.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from alphaflow_cli.core import guidance, path
from alphaflow_cli.core.draws import StepDraws
from alphaflow_cli.core.objective import (
    Ratio,
    Terms,
    between_target,
    clamp_target,
    loss_terms,
    loss_weight,
    mean_target,
    row_alpha,
    short_first,
    shortcut_target,
    squared_error,
)
from alphaflow_cli.core.times import Draw, TimeLaws, mean_interval
from alphaflow_cli.model.build import DTYPES
from alphaflow_cli.nn.tangent import Inputs
from alphaflow_cli.recipe.plan import draws_scale, is_small, needs_velocities, null_label
from alphaflow_cli.recipe.schema import Guidance, Loss, Recipe, TimeDraw, Times
from alphaflow_cli.train.questions import Answers, Question, ask_all, dropped_rows, guide_of_answers, guided_rows


@dataclass(frozen=True)
class Objective:
    """What a step needs to know of a recipe, and nothing else of it."""

    loss: Loss
    guidance: Guidance
    y_null: int
    has_labels: bool
    bf16: bool
    gap: float = 0.0  # the least t − s
    mean_interval: float = 0.0  # E[t − r] of r < t rows, where loss.short_first needs it
    has_head: bool = False  # whether the network gives v̂ beside u
    precise_below: float = 0.0  # the α below which, but for 0, rounding to bf16 eats the gradient

    @staticmethod
    def of(recipe: Recipe) -> "Objective":
        """Collect what a step needs of a recipe."""
        return Objective(
            loss=recipe.loss,
            guidance=recipe.guidance,
            y_null=null_label(recipe),
            has_labels=recipe.data.classes > 0,
            bf16=recipe.train.precision == "bf16",
            gap=recipe.times.gap,
            mean_interval=mean_interval(time_laws(recipe.times)) if recipe.loss.short_first else 0.0,
            has_head=recipe.model.velocity_head is not None,
            precise_below=recipe.train.precise_below,
        )

    @property
    def is_guided(self) -> bool:
        """Whether guidance moves the velocity anywhere: ṽ ≠ v."""
        return self.has_labels and any(needs_velocities(self.guidance))

    def at(self, alpha: float) -> "Objective":
        """The same, without bf16 where α is small: there the target is u and α times a difference of two answers."""
        return replace(self, bf16=False) if self.bf16 and is_small(alpha, self.precise_below) else self

    def has_tangent(self, alpha: float) -> bool:
        """Whether z moves along the network's own velocity at this α, which then must be asked of every r < t row."""
        return self.loss.tangent == "network" and alpha < 1.0


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
    question: Question | None = None  # which rows guidance needs; None: all that it could need
    factor: Tensor | None = None  # what each row's loss is multiplied by; None: by 1
    guide: Tensor | None = None  # (rows, 3) scale, t_lo and t_hi of each row, where the network is told of them
    ratio: Tensor | None = None  # α of each r < t row while 0 < α < 1; None: from the step's α


@dataclass(frozen=True)
class Outputs:
    """What the one forward with a gradient gives."""

    u: Tensor
    v_hat: Tensor | None  # of a network with a velocity head
    riding: Tensor | None  # du of the r < t rows, or the velocities of a question's rows

    @property
    def velocity(self) -> Tensor:
        """What the network takes for the velocity on r = t rows: v̂, or u; without gradient."""
        return (self.u if self.v_hat is None else self.v_hat).detach()


@dataclass(frozen=True)
class StepResult:
    """The weighted loss, summed over the rows, and what is logged or compared of each row."""

    loss: Tensor  # () with gradient
    head_loss: Tensor | float  # () what a velocity head adds to it
    terms: Terms
    v_guided: Tensor
    target: Tensor


def row_draws(t: Tensor, r: Tensor, draws: StepDraws, n_equal: int, mix: Guidance) -> Tensor:
    """All that is drawn on the host for each row: t, r, the uniforms of label dropout, then w, t_lo and t_hi, if drawn.

    (3, B) or (6, B).
    """
    values = [t, r, guidance.only_equal_rows(draws.uniforms, n_equal) if mix.drop == "equal" else draws.uniforms]
    if mix.scale == "drawn":
        scale, low, high = draws.guide
        ends = guidance.intervals(low, high, n_equal) if mix.interval == "drawn" else (0.0 * low, 0.0 * high + 1.0)
        values += [guidance.scales(scale, most=mix.scale_max, beta=mix.scale_beta), *ends]
    return torch.stack(values)


def guide_of(values: Tensor) -> Tensor | None:
    """The guide (rows, 3) among the values of `row_draws`; None where none is drawn."""
    return values[3:].T if len(values) > 3 else None


def random_rows(recipe: Recipe, count: int, n_equal: int, device: torch.device) -> Rows:
    """Rows of the recipe's shapes with random content, for timing and memory only."""
    data, dtype = recipe.data, DTYPES[recipe.train.precision]
    shape = (data.channels, data.latent_size, data.latent_size)
    x, noise = (torch.randn((count, *shape), device=device, dtype=dtype) for _ in range(2))
    r = torch.full((count,), 0.25, device=device, dtype=dtype)
    t = torch.full_like(r, 0.75)
    r = torch.cat([t[:n_equal], r[n_equal:]])
    y = torch.zeros(count, dtype=torch.int64, device=device).clamp(max=null_label(recipe))
    guide = r.new_tensor([2.0, 0.0, 1.0]).repeat(count, 1) if draws_scale(recipe) else None
    return Rows(x=x, noise=noise, t=t, r=r, y=y, uniforms=r, n_equal=n_equal, guide=guide)


def training_step(wrapped: nn.Module, bare: nn.Module, rows: Rows, *, alpha: float, objective: Objective) -> StepResult:
    """The loss of the rows, summed: divide it by the rows of the whole step, then call backward.

    Where the rows have their own `ratio`, any α of the same phase and precision gives the same operators and numbers.
    """
    objective = objective.at(alpha)
    k, v, y = rows.n_equal, path.velocity(rows.x, rows.noise), _labels(rows, objective)
    z_t = path.interpolate(rows.x, rows.noise, rows.t)
    ratio = row_alpha(alpha, rows.t[k:], rows.r[k:], objective.gap) if rows.ratio is None else rows.ratio
    question = _question(rows, objective, alpha)
    if alpha == 0.0 and k < len(v):
        answers = _ask(bare, question, z_t, rows, y, objective)
        v_later = _guided(v[k:], answers.later() if answers else None, rows, slice(k, None), objective)
        made = _predict(wrapped, None, z_t, rows, y, objective, tangent=_along(v_later, answers, objective, alpha))
        assert made.riding is not None
        later = mean_target(v_later, made.riding, rows.t[k:], rows.r[k:])
    else:
        made = _predict(wrapped, question, z_t, rows, y, objective)
        answers = Answers(question, made.riding) if question and made.riding is not None else None
        v_later = _guided(v[k:], answers.later() if answers else None, rows, slice(k, None), objective)
        along = _along(v_later, answers, objective, alpha)
        later = v_later if alpha == 1.0 else _later_target(bare, z_t, v_later, along, rows, y, ratio, objective)
    v_equal = _guided(v[:k], answers.equal(made.velocity[:k]) if answers else None, rows, slice(k), objective)
    target = clamp_target(torch.cat([v_equal, later]), k, bound=objective.loss.clamp, alpha=alpha)
    return _loss(made, target, torch.cat([v_equal, v_later]), rows, ratio, objective)


@torch.no_grad()
def moving_rows(bare: nn.Module, rows: Rows, objective: Objective) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make (z_t, ṽ, the tangent, y) of a batch without r = t rows as `training_step` does at α = 0: to measure them."""
    assert rows.n_equal == 0, rows.n_equal
    z_t, y = path.interpolate(rows.x, rows.noise, rows.t), _labels(rows, objective)
    answers, v = _ask(bare, _question(rows, objective, 0.0), z_t, rows, y, objective), path.velocity(rows.x, rows.noise)
    v_guided = _guided(v, answers.later() if answers else None, rows, slice(None), objective)
    return z_t, v_guided, _along(v_guided, answers, objective, 0.0), y


def precision(x: Tensor, objective: Objective) -> torch.autocast:
    """bf16 around one call, where the recipe wants it. One region per call: inside one, older torch keeps casts of
    weights that were made without gradient, and the graded call would use them."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=objective.bf16)


def _labels(rows: Rows, objective: Objective) -> Tensor:
    mix = objective.guidance
    if not objective.has_labels or mix.label_dropout == 0.0:
        return rows.y
    return torch.where(dropped_rows(rows.t, rows.uniforms, mix), objective.y_null, rows.y)


def _question(rows: Rows, objective: Objective, alpha: float) -> Question | None:
    """Which rows guidance and the tangent need; None: there is neither."""
    tangent = objective.has_tangent(alpha)
    if not (objective.is_guided or tangent):
        return None
    return rows.question or ask_all(len(rows.t), rows.n_equal, objective.guidance, rows.t.device, tangent=tangent)


@torch.no_grad()
def _ask(
    bare: nn.Module, question: Question | None, z_t: Tensor, rows: Rows, y: Tensor, objective: Objective
) -> Answers | None:
    """Evaluate the question's rows in a call of their own, without gradient."""
    if question is None:
        return None
    z, t, r, labels, guide = _inputs(question, z_t, rows, y, objective)
    with precision(rows.x, objective):
        velocities = bare(z, t, r, labels, guide=guide, heads="velocity" if objective.has_head else "u")
    return Answers(question, velocities.to(z_t.dtype))


def _predict(
    wrapped: nn.Module,
    question: Question | None,
    z_t: Tensor,
    rows: Rows,
    y: Tensor,
    objective: Objective,
    *,
    tangent: Tensor | None = None,
) -> Outputs:
    """The network of all rows, with its gradient. The derivative along a tangent of the r < t rows, or the question's
    rows, go along in the same call."""
    first = 0 if tangent is None else rows.n_equal
    beside = None if question is None else _inputs(question, z_t, rows, y, objective)
    with precision(rows.x, objective):
        out = wrapped(
            z_t,
            rows.t,
            rows.r,
            y,
            tangent=tangent,
            first=first,
            beside=beside,
            guide=rows.guide,
            heads="both" if objective.has_head else "u",
        )
    parts = [part.to(z_t.dtype) for part in ((out,) if isinstance(out, Tensor) else out)]
    u, v_hat = parts[0], parts[1] if objective.has_head else None
    return Outputs(u, v_hat, parts[-1] if tangent is not None or question is not None else None)


def _inputs(question: Question, z_t: Tensor, rows: Rows, y: Tensor, objective: Objective) -> Inputs:
    """The network's inputs of a question's rows."""
    acts = guided_rows(rows.t, rows.uniforms, rows.guide, objective.guidance)
    return question.inputs(z_t, rows.t, y, objective.y_null, guide_of_answers(rows.guide, acts))


def _guided(v: Tensor, answers: tuple[Tensor, Tensor] | None, rows: Rows, some: slice, objective: Objective) -> Tensor:
    """ṽ of some rows from the pair u⁻(z_t, t, t | y), u⁻(z_t, t, t | ∅); without them there is no guidance: ṽ = v."""
    if answers is None:
        return v
    mix, (u_y, u_null), t = objective.guidance, answers, rows.t[some]
    guide = None if rows.guide is None else rows.guide[some]
    acts = guided_rows(t, rows.uniforms[some], guide, mix)
    omega: float | Tensor = mix.omega
    kappa: float | Tensor = mix.kappa
    null: float | Tensor = guidance.null_weight(mix.omega, mix.kappa)
    if guide is not None:
        kappa = 1.0 - 1.0 / guide[:, 0]
        null = -kappa
    elif mix.fade_from is not None:
        fading = guidance.fade(t, start=mix.fade_from, rate=mix.fade_rate)
        omega, null = guidance.faded_weights(fading, omega=mix.omega, kappa=mix.kappa)
    return guidance.guided_velocity(v, u_y, u_null, acts, omega=omega, kappa=kappa, null=null)


def _along(v_later: Tensor, answers: Answers | None, objective: Objective, alpha: float) -> Tensor:
    """What z moves along in the targets of the r < t rows: ṽ, or the network's own velocity."""
    return answers.later()[0] if answers and objective.has_tangent(alpha) else v_later


def _later_target(
    bare: nn.Module,
    z_t: Tensor,
    v_later: Tensor,
    along: Tensor,
    rows: Rows,
    y: Tensor,
    ratio: Ratio,
    objective: Objective,
) -> Tensor:
    """The target of the r < t rows while 0 < α < 1; for α = 0 it is `mean_target`."""
    if len(v_later) == 0:
        return v_later
    k = rows.n_equal
    point = {"t": rows.t[k:], "r": rows.r[k:], "y": y[k:]}
    net = bare if rows.guide is None else partial(bare, guide=rows.guide[k:])
    with precision(rows.x, objective):
        if objective.loss.velocity == "network":
            return shortcut_target(net, z_t[k:], v_later, **point, alpha=ratio)
        return between_target(net, z_t[k:], v_later, along, **point, alpha=ratio)


def _loss(
    made: Outputs, target: Tensor, v_guided: Tensor, rows: Rows, ratio: Ratio, objective: Objective
) -> StepResult:
    u, target, v_guided, loss = made.u, target.detach(), v_guided.detach(), objective.loss
    error = squared_error(u, target, loss.reduction)
    weight = loss_weight(
        error, rows.n_equal, alpha=ratio, kind=loss.weight, c=loss.c, power=loss.power, later=loss.later
    )
    weight = weight if rows.factor is None else weight * rows.factor
    total, terms = _weighted_sum(error, weight), loss_terms(u, target, v_guided, made.v_hat)
    head_loss: Tensor | float = 0.0
    if made.v_hat is not None:  # on every row the same loss, whatever α
        error = squared_error(made.v_hat, v_guided, loss.reduction)
        weight = loss_weight(error, len(error), alpha=0.0, kind=loss.weight, c=loss.c, power=loss.power, later=1.0)
        head_loss = _weighted_sum(error, weight)
        total = total + head_loss
    return StepResult(loss=total, head_loss=head_loss, terms=terms, v_guided=v_guided, target=target)


def _weighted_sum(error: Tensor, weight: Tensor) -> Tensor:
    """Σ weight · error, of which an infinite error makes the gradient NaN: the optimiser then leaves the step out.

    The weight of such an error is 1/∞ = 0: its gradient would be 0, and a run that has diverged would go on to its end.
    """
    return (torch.where(error.isfinite(), weight, torch.nan) * error).sum()


def row_factor(t: Tensor, r: Tensor, n_equal: int, objective: Objective, *, progress: float) -> Tensor | None:
    """What each row's loss is multiplied by, after `progress` of the run; None: by 1."""
    if not objective.loss.short_first:
        return None
    return short_first(t, r, n_equal, progress=progress, mean_interval=objective.mean_interval)


def time_laws(times: Times) -> TimeLaws:
    """The laws of a recipe's draws: what a draw leaves open is as in the first one."""
    first = Draw(times.law, times.mean, times.std)
    return TimeLaws(
        _draw(times.equal, first), first, _draw(times.second, first), times.order, times.gap, times.equal_draw
    )


def _draw(draw: TimeDraw, first: Draw) -> Draw:
    law, mean, std = draw.law or first.law, draw.mean, draw.std
    return Draw(law, first.mean if mean is None else mean, first.std if std is None else std)
