"""One micro-batch, from its rows to their loss: the only place where the bare and the wrapped network meet.

Targets see the BARE network, without gradient. The loss sees the WRAPPED one, in the one graded forward of the step,
so that gradients synchronise. The r = t rows come first: `n_equal` of them. Beside the graded forward there is at most
one call of the network, whatever the phase (two for the Shortcut Model, whose z_s takes a step of the network's own):

    α = 1       none: guidance's rows go along in the graded forward
    0 < α < 1   (z_s, r, s) of the r < t rows; z_s needs ṽ, so guidance's rows went along in the graded forward
    α = 0       guidance's rows; du/dt along their ṽ then rides along in the graded forward

Guidance needs two velocities of the network at (t, t): ∅, u⁻(z_t, t, t | ∅), and y, u⁻(z_t, t, t | y). A `Question`
lists the rows of which they are needed (core/guidance.py: rows_to_ask), first those for ∅, then those for y; `Answers`
puts the velocities back in their places. The others are known without a call: an r = t row's own prediction is its y,
or its ∅ where the label was dropped; a dropped r < t row's y is its ∅. Which rows these are is decided on the host,
where the times are drawn, so nothing waits for it. Where their number must not change from step to step (compiled
blocks: new numbers of rows are new forms) all rows are evaluated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alphaflow_cli.core import guidance, path
from alphaflow_cli.core.objective import (
    Terms,
    between_target,
    clamp_target,
    loss_terms,
    loss_weight,
    mean_target,
    shortcut_target,
    squared_error,
)
from alphaflow_cli.data.batches import to_device
from alphaflow_cli.model.build import DTYPES
from alphaflow_cli.recipe.plan import is_guided, null_label
from alphaflow_cli.recipe.schema import Guidance, Loss, Recipe


@dataclass(frozen=True)
class Objective:
    """What a step needs to know of a recipe, and nothing else of it."""

    loss: Loss
    guidance: Guidance
    y_null: int
    has_labels: bool
    bf16: bool

    @staticmethod
    def of(recipe: Recipe) -> "Objective":
        """Take it from a recipe."""
        return Objective(
            loss=recipe.loss,
            guidance=recipe.guidance,
            y_null=null_label(recipe),
            has_labels=recipe.data.classes > 0,
            bf16=recipe.train.precision == "bf16",
        )

    @property
    def is_guided(self) -> bool:
        """Whether guidance moves the velocity anywhere: ṽ ≠ v."""
        return self.has_labels and is_guided(self.guidance.omega, self.guidance.kappa)


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
    k, v, y = rows.n_equal, path.velocity(rows.x, rows.noise), _labels(rows, objective)
    z_t = path.interpolate(rows.x, rows.noise, rows.t)
    question = _question(rows, objective)
    if alpha == 0.0 and k < len(v):
        answers = _ask(bare, question, z_t, rows, y, objective)
        v_later = _guided(v[k:], answers.later() if answers else None, rows.t[k:], objective)
        with precision(rows.x, objective):
            u, du = wrapped(z_t, rows.t, rows.r, y, tangent=v_later, first=k)
        u, later = u.to(v.dtype), mean_target(v_later, du.to(v.dtype), rows.t[k:], rows.r[k:])
    else:
        u, answers = _predict(wrapped, question, z_t, rows, y, objective)
        v_later = _guided(v[k:], answers.later() if answers else None, rows.t[k:], objective)
        later = _later_target(bare, z_t, v_later, rows, y, alpha=alpha, objective=objective)
    v_equal = _guided(v[:k], answers.equal(u[:k].detach()) if answers else None, rows.t[:k], objective)
    target = torch.cat([v_equal, later])
    return _loss(u, target, torch.cat([v_equal, v_later]), k, alpha=alpha, objective=objective)


@torch.no_grad()
def guided_rows(bare: nn.Module, rows: Rows, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Make (z_t, ṽ, y) of a batch without r = t rows as `training_step` makes them: for measurements."""
    assert rows.n_equal == 0, rows.n_equal
    z_t, y = path.interpolate(rows.x, rows.noise, rows.t), _labels(rows, objective)
    answers = _ask(bare, _question(rows, objective), z_t, rows, y, objective)
    return z_t, _guided(path.velocity(rows.x, rows.noise), answers.later() if answers else None, rows.t, objective), y


def precision(x: Tensor, objective: Objective) -> torch.autocast:
    """bf16 around one call, where the recipe wants it. One region per call: inside one, older torch keeps casts of
    weights that were made without gradient, and the graded call would use them."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=objective.bf16)


def ask(t: Tensor, uniforms: Tensor, n_equal: int, mix: Guidance, device: torch.device) -> Question:
    """List only the rows that guidance needs; t and the uniforms of label dropout must be on the host."""
    own, null = guidance.rows_to_ask(
        t,
        uniforms,
        n_equal,
        omega=mix.omega,
        kappa=mix.kappa,
        dropout=mix.label_dropout,
        t_min=mix.t_min,
        t_max=mix.t_max,
    )
    places = (null.nonzero().flatten(), own.nonzero().flatten())
    return _join_question(*places, n_null_equal=int(null[:n_equal].sum()), rows=len(t), n_equal=n_equal, device=device)


def ask_all(rows: int, n_equal: int, mix: Guidance, device: torch.device) -> Question:
    """List every row that guidance could need, whatever the times and the dropout: always the same number."""
    n_null = rows if guidance.null_weight(mix.omega, mix.kappa) != 0.0 else 0
    first = n_equal if mix.kappa != 0.0 else rows
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
    return guidance.drop_labels(
        rows.y,
        rows.t,
        rows.uniforms,
        dropout=mix.label_dropout,
        y_null=objective.y_null,
        t_min=mix.t_min,
        t_max=mix.t_max,
    )


def _question(rows: Rows, objective: Objective) -> Question | None:
    """Which rows guidance needs; None: there is no guidance."""
    if not objective.is_guided:
        return None
    return rows.question or ask_all(len(rows.t), rows.n_equal, objective.guidance, rows.t.device)


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


def _guided(v: Tensor, answers: tuple[Tensor, Tensor] | None, t: Tensor, objective: Objective) -> Tensor:
    """ṽ from the pair u⁻(z_t, t, t | y), u⁻(z_t, t, t | ∅); without them there is no guidance, and ṽ = v."""
    if answers is None:
        return v
    mix, (u_y, u_null) = objective.guidance, answers
    return guidance.guided_velocity(
        v, u_y, u_null, t, omega=mix.omega, kappa=mix.kappa, t_min=mix.t_min, t_max=mix.t_max
    )


def _later_target(
    bare: nn.Module, z_t: Tensor, v_later: Tensor, rows: Rows, y: Tensor, *, alpha: float, objective: Objective
) -> Tensor:
    """The target of the r < t rows while 0 < α ≤ 1; for α = 0 it is `mean_target`."""
    if alpha == 1.0 or len(v_later) == 0:
        return v_later
    k = rows.n_equal
    target = {"data": between_target, "network": shortcut_target}[objective.loss.velocity]
    with precision(rows.x, objective):
        return target(bare, z_t[k:], v_later, t=rows.t[k:], r=rows.r[k:], y=y[k:], alpha=alpha)


def _loss(u: Tensor, target: Tensor, v_guided: Tensor, k: int, *, alpha: float, objective: Objective) -> StepResult:
    target = clamp_target(target, k, bound=objective.loss.clamp, alpha=alpha).detach()
    error = squared_error(u, target, objective.loss.reduction)
    weight = loss_weight(error, k, alpha=alpha, kind=objective.loss.weight, c=objective.loss.c)
    terms = loss_terms(u, target, v_guided)
    return StepResult(loss=(weight * error).sum(), terms=terms, v_guided=v_guided, target=target)
