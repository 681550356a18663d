"""Guidance's velocities: which rows the network is asked for them, in one batch, and whose answer goes where.

    ∅    u⁻(z_t, t, t | ∅)      y    u⁻(z_t, t, t | y)      Places of rows are counted within the micro-batch.

The network is asked (core/guidance.py: asked_rows) for ∅ first, then for y. What it is not asked, it has said: an r = t
row's own prediction is its y, or its ∅ where the label was dropped; a dropped r < t row's y is its ∅. Which rows these
are is decided on the host, where the times are drawn, so nothing waits for it. Where it must not change from step to
step (compiled blocks: new numbers of rows are new forms) every row is asked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alphaflow_cli.core import guidance
from alphaflow_cli.data.transfer import to_device
from alphaflow_cli.recipe.schema import Guidance


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
