"""One micro-batch, from its rows to their loss: the only place where the bare and the wrapped network meet.

Targets see the BARE network, without gradient. The loss sees the WRAPPED one, in the one graded forward of the step,
so that gradients synchronise. The r = t rows come first: `n_equal` of them. Beside the graded forward there is at most
one call of the network, whatever the phase (two for the Shortcut Model, whose z_s takes a step of the network's own):

    α = 1       none: guidance's rows go along in the graded forward
    0 < α < 1   (z_s, r, s) of the r < t rows; z_s needs ṽ, so guidance's rows went along in the graded forward
    α = 0       guidance's rows; du/dt along their ṽ then rides along in the graded forward

With loss.tangent: network every r < t row is among guidance's while α < 1: its y is what z moves along.

Guidance needs two velocities of the network at (t, t): ∅, u⁻(z_t, t, t | ∅), and y, u⁻(z_t, t, t | y). A `Question`
lists the rows of which they are needed (core/guidance.py: rows_to_ask), first those for ∅, then those for y; `Answers`
puts the velocities back in their places. The others are known without a call: an r = t row's own prediction is its y,
or its ∅ where the label was dropped; a dropped r < t row's y is its ∅. Which rows these are is decided on the host,
where the times are drawn, so nothing waits for it. Where their number must not change from step to step (compiled
blocks: new numbers of rows are new forms) all rows are evaluated.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from alphaflow_cli.core import guidance, path
from alphaflow_cli.core.objective import (
    Ratio,
    Terms,
    boundary_target,
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
from alphaflow_cli.data.batches import to_device
from alphaflow_cli.model.build import DTYPES
from alphaflow_cli.recipe.plan import guided_times, is_guided, null_label
from alphaflow_cli.recipe.schema import Guidance, Loss, Recipe, TimeDraw, Times


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
    precise_below: float = 0.0  # the α below which, but for 0, rounding to bf16 eats the gradient

    @staticmethod
    def of(recipe: Recipe) -> "Objective":
        """Take it from a recipe."""
        return Objective(
            loss=recipe.loss,
            guidance=recipe.guidance,
            y_null=null_label(recipe),
            has_labels=recipe.data.classes > 0,
            bf16=recipe.train.precision == "bf16",
            gap=recipe.times.gap,
            mean_interval=mean_interval(time_laws(recipe.times)) if recipe.loss.short_first else 0.0,
            precise_below=recipe.train.precise_below,
        )

    @property
    def is_guided(self) -> bool:
        """Whether guidance moves the velocity anywhere: ṽ ≠ v."""
        return self.has_labels and is_guided(self.guidance.omega, self.guidance.kappa)

    def at(self, alpha: float) -> "Objective":
        """The same, without bf16 where α is small: there the target is u and α times a difference of two answers."""
        return replace(self, bf16=False) if self.bf16 and 0.0 < alpha < self.precise_below else self

    def has_tangent(self, alpha: float) -> bool:
        """Whether z moves along the network's own velocity at this α, which then must be asked of every r < t row."""
        return self.loss.tangent == "network" and alpha < 1.0


@dataclass(frozen=True)
class Question:
    """Rows of a micro-batch whose velocity at (t, t) guidance needs: for ∅ first, then for y, these of r < t rows."""

    places: Tensor  # (rows needed,) their indices in the micro-batch, on the device
    n_null: int  # of them for ∅
    n_null_equal: int  # of those, r = t rows
    rows: int
    n_equal: int

    def inputs(self, z_t: Tensor, t: Tensor, y: Tensor, y_null: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The network's inputs (z, t, r, y) of these rows, with r = t."""
        t_here, n = t[self.places], self.n_null
        labels = torch.cat([torch.full_like(self.places[:n], y_null), y[self.places[n:]]])
        return z_t[self.places], t_here, t_here, labels


@dataclass(frozen=True)
class Answers:
    """The velocities that the network gave for a question."""

    question: Question
    values: Tensor

    def later(self) -> tuple[Tensor, Tensor]:
        """The velocities (y, ∅) of the r < t rows; zero where neither counts."""
        n, k, places = self.question.n_null, self.question.n_equal, self.question.places
        null = self.values.new_zeros((self.question.rows, *self.values.shape[1:]))
        null = null.index_copy(0, places[:n], self.values[:n])
        own = null.index_copy(0, places[n:], self.values[n:])
        return own[k:], null[k:]

    def equal(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The velocities (y, ∅) of the r = t rows, whose own prediction is u."""
        n = self.question.n_null_equal
        return u, u.index_copy(0, self.question.places[:n], self.values[:n])


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


@dataclass(frozen=True)
class StepResult:
    """The weighted loss, summed over the rows, and what is logged or compared of each row."""

    loss: Tensor  # () with gradient
    terms: Terms
    v_guided: Tensor
    target: Tensor


def random_rows(recipe: Recipe, count: int, n_equal: int, device: torch.device) -> Rows:
    """Rows of the recipe's shapes with random content, for timing and memory only."""
    data, dtype = recipe.data, DTYPES[recipe.train.precision]
    shape = (data.channels, data.latent_size, data.latent_size)
    x, noise = (torch.randn((count, *shape), device=device, dtype=dtype) for _ in range(2))
    r = torch.full((count,), 0.25, device=device, dtype=dtype)
    t = torch.full_like(r, 0.75)
    r = torch.cat([t[:n_equal], r[n_equal:]])
    y = torch.zeros(count, dtype=torch.int64, device=device)
    return Rows(x=x, noise=noise, t=t, r=r, y=y.clamp(max=null_label(recipe)), uniforms=r, n_equal=n_equal)


def training_step(wrapped: nn.Module, bare: nn.Module, rows: Rows, *, alpha: float, objective: Objective) -> StepResult:
    """The loss of the rows, summed: divide it by the rows of the whole step, then call backward."""
    objective = objective.at(alpha)
    k, v, y = rows.n_equal, path.velocity(rows.x, rows.noise), _labels(rows, objective)
    z_t = path.interpolate(rows.x, rows.noise, rows.t)
    question, ratio = _question(rows, objective, alpha), row_alpha(alpha, rows.t[k:], rows.r[k:], objective.gap)
    if alpha == 0.0 and k < len(v):
        answers = _ask(bare, question, z_t, rows, y, objective)
        v_later = _guided(v[k:], answers.later() if answers else None, rows, slice(k, None), objective)
        along = _along(v_later, answers, objective, alpha)
        with precision(rows.x, objective):
            u, du = wrapped(z_t, rows.t, rows.r, y, tangent=along, first=k)
        u, later = u.to(v.dtype), mean_target(v_later, du.to(v.dtype), rows.t[k:], rows.r[k:])
    else:
        u, answers = _predict(wrapped, question, z_t, rows, y, objective)
        v_later = _guided(v[k:], answers.later() if answers else None, rows, slice(k, None), objective)
        along = _along(v_later, answers, objective, alpha)
        later = v_later if alpha == 1.0 else _later_target(bare, z_t, v_later, along, rows, y, ratio, objective)
    v_equal = _guided(v[:k], answers.equal(u[:k].detach()) if answers else None, rows, slice(k), objective)
    target = clamp_target(torch.cat([v_equal, later]), k, bound=objective.loss.clamp, alpha=alpha)
    return _loss(u, target, torch.cat([v_equal, v_later]), rows, ratio, objective)


@torch.no_grad()
def guided_rows(bare: nn.Module, rows: Rows, objective: Objective) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def ask(
    t: Tensor, uniforms: Tensor, n_equal: int, mix: Guidance, device: torch.device, *, tangent: bool = False
) -> Question:
    """List only the rows that are needed for guidance and, if wanted, for the tangent; t and the uniforms of label
    dropout must be on the host."""
    t_min, t_max = guided_times(mix)
    own, null = guidance.rows_to_ask(
        t,
        uniforms,
        n_equal,
        omega=mix.omega,
        kappa=mix.kappa,
        dropout=mix.label_dropout,
        t_min=t_min,
        t_max=t_max,
        plain=mix.dropped == "plain",
        tangent=tangent,
    )
    places = (null.nonzero().flatten(), own.nonzero().flatten())
    return _join_question(*places, n_null_equal=int(null[:n_equal].sum()), rows=len(t), n_equal=n_equal, device=device)


def ask_all(rows: int, n_equal: int, mix: Guidance, device: torch.device, *, tangent: bool = False) -> Question:
    """List every row that could be needed, whatever the times and the dropout: always the same number."""
    n_null = rows if guidance.null_weight(mix.omega, mix.kappa) != 0.0 else 0
    first = n_equal if mix.kappa != 0.0 or tangent else rows
    places = (torch.arange(n_null, device=device), torch.arange(first, rows, device=device))
    return _join_question(*places, n_null_equal=min(n_null, n_equal), rows=rows, n_equal=n_equal, device=device)


def _join_question(
    null: Tensor, own: Tensor, *, n_null_equal: int, rows: int, n_equal: int, device: torch.device
) -> Question:
    if len(null) + len(own) == 0:  # ∅ of the first row all the same: a sharded network is called on every process
        null, n_null_equal = null.new_zeros(1), min(n_equal, 1)
    return Question(to_device(torch.cat([null, own]), device), len(null), n_null_equal, rows, n_equal)


def _labels(rows: Rows, objective: Objective) -> Tensor:
    mix = objective.guidance
    if not objective.has_labels or mix.label_dropout == 0.0:
        return rows.y
    t_min, t_max = guided_times(mix)
    return guidance.drop_labels(
        rows.y,
        rows.t,
        rows.uniforms,
        dropout=mix.label_dropout,
        y_null=objective.y_null,
        t_min=t_min,
        t_max=t_max,
    )


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
    with precision(rows.x, objective):
        velocities = bare(*question.inputs(z_t, rows.t, y, objective.y_null))
    return Answers(question, velocities.to(z_t.dtype))


def _predict(
    wrapped: nn.Module, question: Question | None, z_t: Tensor, rows: Rows, y: Tensor, objective: Objective
) -> tuple[Tensor, Answers | None]:
    """u of all rows, with its gradient; the question's rows go along in the same call."""
    with precision(rows.x, objective):
        if question is None:
            return wrapped(z_t, rows.t, rows.r, y).to(z_t.dtype), None
        u, velocities = wrapped(z_t, rows.t, rows.r, y, beside=question.inputs(z_t, rows.t, y, objective.y_null))
    return u.to(z_t.dtype), Answers(question, velocities.to(z_t.dtype))


def _guided(v: Tensor, answers: tuple[Tensor, Tensor] | None, rows: Rows, some: slice, objective: Objective) -> Tensor:
    """ṽ of some rows from the pair u⁻(z_t, t, t | y), u⁻(z_t, t, t | ∅); without them there is no guidance: ṽ = v."""
    if answers is None:
        return v
    mix, (u_y, u_null), t = objective.guidance, answers, rows.t[some]
    acts = guidance.inside(t, *guided_times(mix))
    if mix.dropped == "plain":
        acts = acts & (rows.uniforms[some] >= mix.label_dropout)
    omega: float | Tensor = mix.omega
    null: float | Tensor = guidance.null_weight(mix.omega, mix.kappa)
    if mix.fade_from is not None:
        fading = guidance.fade(t, start=mix.fade_from, rate=mix.fade_rate)
        omega, null = guidance.faded_weights(fading, omega=mix.omega, kappa=mix.kappa)
    return guidance.guided_velocity(v, u_y, u_null, acts, omega=omega, kappa=mix.kappa, null=null)


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
    with precision(rows.x, objective):
        if objective.loss.velocity == "network":
            return shortcut_target(bare, z_t[k:], v_later, **point, alpha=ratio)
        return boundary_target(bare, z_t[k:], v_later, along, **point, alpha=ratio)


def _loss(u: Tensor, target: Tensor, v_guided: Tensor, rows: Rows, ratio: Ratio, objective: Objective) -> StepResult:
    target, loss = target.detach(), objective.loss
    error = squared_error(u, target, loss.reduction)
    weight = loss_weight(
        error, rows.n_equal, alpha=ratio, kind=loss.weight, c=loss.c, power=loss.power, later=loss.later
    )
    weight = weight if rows.factor is None else weight * rows.factor
    terms = loss_terms(u, target, v_guided)
    return StepResult(loss=(weight * error).sum(), terms=terms, v_guided=v_guided, target=target)


def row_factor(t: Tensor, r: Tensor, n_equal: int, objective: Objective, *, progress: float) -> Tensor | None:
    """What each row's loss is multiplied by, after `progress` of the run; None: by 1."""
    if not objective.loss.short_first:
        return None
    return short_first(t, r, n_equal, progress=progress, mean_interval=objective.mean_interval)


def time_laws(times: Times) -> TimeLaws:
    """The laws of a recipe's draws: what a draw leaves open is as in the first one."""
    first = Draw(times.law, times.mean, times.std)
    return TimeLaws(_draw(times.equal, first), first, _draw(times.second, first), times.order, times.gap)


def _draw(draw: TimeDraw, first: Draw) -> Draw:
    law, mean, std = draw.law or first.law, draw.mean, draw.std
    return Draw(law, first.mean if mean is None else mean, first.std if std is None else std)
