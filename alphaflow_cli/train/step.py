"""Guidance's velocities: which rows the network is asked for them, in one batch, and whose answer goes where.

    ∅    u⁻(z_t, t, t | ∅)      y    u⁻(z_t, t, t | y)      Places of rows are counted within the micro-batch.

The network is asked (core/guidance.py: asked_rows) for ∅ first, then for y. What it is not asked, it has said: an r = t
row's own prediction is its y, or its ∅ where the label was dropped; a dropped r < t row's y is its ∅. Which rows these
are is decided on the host, where the times are drawn, so nothing waits for it. Where it must not change from step to
step (compiled blocks: new numbers of rows are new forms) every row is asked.

One micro-batch from rows to a loss: the only place where the bare and the wrapped network meet.

Targets see the BARE network, without gradient. The loss sees the WRAPPED one, in the one graded forward of the step,
so that gradients synchronise. The r = t rows come first: `n_equal` of them. Beside the graded forward there is at most
one call of the network, whatever the phase (two for the Shortcut Model, whose z_s takes a step of the network's own):

    α = 1       none: guidance's rows go along in the graded forward
    0 < α < 1   (z_s, r, s) of the r < t rows; z_s needs ṽ, so guidance's rows went along in the graded forward
    α = 0       guidance's rows; du/dt along their ṽ then rides along in the graded forward
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alphaflow_cli.core import guidance, objective, path
from alphaflow_cli.data.batches import to_device
from alphaflow_cli.recipe.plan import is_guided, null_label
from alphaflow_cli.recipe.schema import Guidance, Loss, Recipe


@dataclass(frozen=True)
class Question:
    """What a micro-batch asks, at (t, t): ∅ of some rows, then y of some r < t rows."""

    places: Tensor  # (asked,) on the device
    n_null: int  # of them for ∅
    n_null_equal: int  # of those, r = t rows
    rows: int
    n_equal: int

    def inputs(self, z_t: Tensor, t: Tensor, y: Tensor, y_null: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(z, t, r, y) of the rows asked."""
        now, n = t[self.places], self.n_null
        labels = torch.cat([torch.full_like(self.places[:n], y_null), y[self.places[n:]]])
        return z_t[self.places], now, now, labels


def ask(t: Tensor, uniforms: Tensor, n_equal: int, mix: Guidance, device: torch.device) -> Question:
    """About what is needed; t and the uniforms of label dropout are on the host."""
    own, null = guidance.asked_rows(
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
    """About everything that could be needed, whatever the times and the dropout."""
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


@dataclass(frozen=True)
class Answers:
    """What the network said to it."""

    question: Question
    values: Tensor

    def later(self) -> tuple[Tensor, Tensor]:
        """(y, ∅) of the r < t rows; zero where neither counts."""
        n, k, places = self.question.n_null, self.question.n_equal, self.question.places
        null = self.values.new_zeros((self.question.rows, *self.values.shape[1:]))
        null = null.index_copy(0, places[:n], self.values[:n])
        own = null.index_copy(0, places[n:], self.values[n:])
        return own[k:], null[k:]

    def equal(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(y, ∅) of the r = t rows, whose own prediction is u."""
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
    question: Question | None = None  # of guidance; None: it asks about all rows that it might need


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
        return self.has_labels and is_guided(self.guidance.omega, self.guidance.kappa)


@dataclass(frozen=True)
class StepResult:
    """The weighted loss, summed over the rows, and what is logged of each row."""

    loss: Tensor  # () with gradient
    terms: objective.Terms
    v_guided: Tensor
    target: Tensor


def training_step(wrapped: nn.Module, bare: nn.Module, rows: Rows, *, alpha: float, how: Objective) -> StepResult:
    """Times and labels to the loss of the rows. Divide by the rows of the whole step and call backward."""
    k, v, y = rows.n_equal, path.velocity(rows.x, rows.noise), _labels(rows, how)
    z_t = path.interpolate(rows.x, rows.noise, rows.t)
    question = _question(rows, how)
    if alpha == 0.0 and k < len(v):
        answers = _ask(bare, question, z_t, rows, y, how)
        v_later = _guided(v[k:], answers.later() if answers else None, rows.t[k:], how)
        with precision(rows.x, how):
            u, du = wrapped(z_t, rows.t, rows.r, y, tangent=v_later, first=k)
        u, later = u.to(v.dtype), objective.mean_target(v_later, du.to(v.dtype), rows.t[k:], rows.r[k:])
    else:
        u, answers = _predict(wrapped, question, z_t, rows, y, how)
        v_later = _guided(v[k:], answers.later() if answers else None, rows.t[k:], how)
        later = _later_target(bare, z_t, v_later, rows, y, alpha=alpha, how=how)
    v_equal = _guided(v[:k], answers.equal(u[:k].detach()) if answers else None, rows.t[:k], how)
    target = torch.cat([v_equal, later])
    return _loss(u, target, torch.cat([v_equal, v_later]), k, alpha=alpha, how=how)


@torch.no_grad()
def guided_rows(bare: nn.Module, rows: Rows, how: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """(z_t, ṽ, y) of a batch without r = t rows, as `training_step` makes them: for measurements."""
    assert rows.n_equal == 0, rows.n_equal
    z_t, y = path.interpolate(rows.x, rows.noise, rows.t), _labels(rows, how)
    answers = _ask(bare, _question(rows, how), z_t, rows, y, how)
    return z_t, _guided(path.velocity(rows.x, rows.noise), answers.later() if answers else None, rows.t, how), y


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


def _question(rows: Rows, how: Objective) -> Question | None:
    """None: there is no guidance."""
    if not how.is_guided:
        return None
    return rows.question or ask_all(len(rows.t), rows.n_equal, how.guidance, rows.t.device)


@torch.no_grad()
def _ask(
    bare: nn.Module, question: Question | None, z_t: Tensor, rows: Rows, y: Tensor, how: Objective
) -> Answers | None:
    """In a call of its own."""
    if question is None:
        return None
    with precision(rows.x, how):
        said = bare(*question.inputs(z_t, rows.t, y, how.y_null))
    return Answers(question, said.to(z_t.dtype))


def _predict(
    wrapped: nn.Module, question: Question | None, z_t: Tensor, rows: Rows, y: Tensor, how: Objective
) -> tuple[Tensor, Answers | None]:
    """u with its gradient; the question goes along."""
    with precision(rows.x, how):
        if question is None:
            return wrapped(z_t, rows.t, rows.r, y).to(z_t.dtype), None
        u, said = wrapped(z_t, rows.t, rows.r, y, beside=question.inputs(z_t, rows.t, y, how.y_null))
    return u.to(z_t.dtype), Answers(question, said.to(z_t.dtype))


def _guided(v: Tensor, answers: tuple[Tensor, Tensor] | None, t: Tensor, how: Objective) -> Tensor:
    """ṽ from u⁻(z_t, t, t | y) and u⁻(z_t, t, t | ∅)."""
    if answers is None:
        return v
    mix, (u_y, u_null) = how.guidance, answers
    return guidance.guided_velocity(
        v, u_y, u_null, t, omega=mix.omega, kappa=mix.kappa, t_min=mix.t_min, t_max=mix.t_max
    )


def _later_target(
    bare: nn.Module, z_t: Tensor, v_later: Tensor, rows: Rows, y: Tensor, *, alpha: float, how: Objective
) -> Tensor:
    """The target of the r < t rows for 0 < α ≤ 1."""
    if alpha == 1.0 or len(v_later) == 0:
        return v_later
    k = rows.n_equal
    target = {"data": objective.between_target, "network": objective.shortcut_target}[how.loss.velocity]
    with precision(rows.x, how):
        return target(bare, z_t[k:], v_later, t=rows.t[k:], r=rows.r[k:], y=y[k:], alpha=alpha)


def _loss(u: Tensor, target: Tensor, v_guided: Tensor, k: int, *, alpha: float, how: Objective) -> StepResult:
    target = objective.clamp_target(target, k, bound=how.loss.clamp, alpha=alpha).detach()
    error = objective.squared_error(u, target, how.loss.reduction)
    weight = objective.loss_weight(error, k, alpha=alpha, kind=how.loss.weight, c=how.loss.c)
    terms = objective.loss_terms(u, target, v_guided)
    return StepResult(loss=(weight * error).sum(), terms=terms, v_guided=v_guided, target=target)
