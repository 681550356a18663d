"""Which rows a step asks the bare network about, and its answers: the velocities that guidance and the tangent need.

Guidance needs two velocities of the network at (t, t): ∅, u⁻(z_t, t, t | ∅), and y, u⁻(z_t, t, t | y); a tangent of the
network's own needs y of every r < t row. A `Question` lists the rows of which they are needed (core/guidance.py:
rows_to_ask), first those for ∅, then those for y; `Answers` puts the velocities back in their places. The others are
known without a call: an r = t row's own prediction is its y, or its ∅ where the label was dropped; a dropped r < t
row's y is its ∅. Which rows these are is decided on the host, where the times are drawn, so nothing waits for it. Where
their number must not change from step to step (compiled blocks: new numbers of rows are new forms) all rows are
evaluated.

A network that takes the guidance scale as an input is asked for y at the row's scale, or at 1 where guidance does not
act; for ∅ at 1; always with the interval [0, 1].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alphaflow_cli.core import guidance
from alphaflow_cli.data.batches import to_device
from alphaflow_cli.nn.tangent import Inputs
from alphaflow_cli.recipe.plan import dropout_times, guided_times, needs_velocities
from alphaflow_cli.recipe.schema import Guidance


@dataclass(frozen=True)
class Question:
    """Rows of a micro-batch whose velocity at (t, t) guidance needs: for ∅ first, then for y, these of r < t rows."""

    places: Tensor  # (rows needed,) their indices in the micro-batch, on the device
    n_null: int  # of them for ∅
    n_null_equal: int  # of those, r = t rows
    rows: int
    n_equal: int

    def inputs(self, z_t: Tensor, t: Tensor, y: Tensor, y_null: int, guide: Tensor | None = None) -> Inputs:
        """The network's inputs of these rows, with r = t; `guide` as `guide_of_answers` gives it."""
        t_here, n = t[self.places], self.n_null
        labels = torch.cat([torch.full_like(self.places[:n], y_null), y[self.places[n:]]])
        if guide is not None:
            one = torch.ones_like(t_here[:n])
            guide = torch.cat([torch.stack([one, 0.0 * one, one], 1), guide[self.places[n:]]])
        return z_t[self.places], t_here, t_here, labels, guide


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

    def equal(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """The velocities (y, ∅) of the r = t rows, whose own prediction is `own`."""
        n = self.question.n_null_equal
        return own, own.index_copy(0, self.question.places[:n], self.values[:n])


def dropped_rows(t: Tensor, uniforms: Tensor, mix: Guidance) -> Tensor:
    """Which rows lose their label, (B,) bool."""
    t_min, t_max = dropout_times(mix)
    return guidance.dropped(t, uniforms, dropout=mix.label_dropout, t_min=t_min, t_max=t_max)


def guided_rows(t: Tensor, uniforms: Tensor, guide: Tensor | None, mix: Guidance) -> Tensor:
    """Where guidance acts, (B,) bool: inside the interval, and not where a dropped row learns v, or the scale is 1."""
    if guide is None:
        acts = guidance.inside(t, *guided_times(mix))
        return acts & ~dropped_rows(t, uniforms, mix) if mix.dropped == "plain" else acts
    drawn = mix.interval == "drawn"
    acts = guidance.in_own_interval(t, guide[:, 1], guide[:, 2]) if drawn else guidance.inside(t, *guided_times(mix))
    return acts & ~dropped_rows(t, uniforms, mix) & (guide[:, 0] > 1.0)


def guide_of_answers(guide: Tensor | None, acts: Tensor) -> Tensor | None:
    """What the network is told where it is asked for y, (B, 3): the row's scale where guidance acts, else 1; [0, 1]."""
    if guide is None:
        return None
    scale = torch.where(acts, guide[:, 0], 1.0)
    return torch.stack([scale, torch.zeros_like(scale), torch.ones_like(scale)], 1)


def ask(
    t: Tensor,
    uniforms: Tensor,
    n_equal: int,
    mix: Guidance,
    device: torch.device,
    *,
    guide: Tensor | None = None,
    tangent: bool = False,
) -> Question:
    """List only the rows that are needed for guidance and, if wanted, for the tangent; t, the uniforms of label dropout
    and the guide must be on the host."""
    needs_own, needs_null = needs_velocities(mix)
    acts, dropped = guided_rows(t, uniforms, guide, mix), dropped_rows(t, uniforms, mix)
    own, null = guidance.rows_to_ask(acts, dropped, n_equal, own=needs_own, null=needs_null, tangent=tangent)
    places = (null.nonzero().flatten(), own.nonzero().flatten())
    return _join_question(*places, n_null_equal=int(null[:n_equal].sum()), rows=len(t), n_equal=n_equal, device=device)


def ask_all(rows: int, n_equal: int, mix: Guidance, device: torch.device, *, tangent: bool = False) -> Question:
    """List every row that could be needed, whatever the times and the dropout: always the same number."""
    needs_own, needs_null = needs_velocities(mix)
    n_null, first = rows if needs_null else 0, n_equal if needs_own or tangent else rows
    places = (torch.arange(n_null, device=device), torch.arange(first, rows, device=device))
    return _join_question(*places, n_null_equal=min(n_null, n_equal), rows=rows, n_equal=n_equal, device=device)


def _join_question(
    null: Tensor, own: Tensor, *, n_null_equal: int, rows: int, n_equal: int, device: torch.device
) -> Question:
    if len(null) + len(own) == 0:  # ∅ of the first row all the same: a sharded network is called on every process
        null, n_null_equal = null.new_zeros(1), min(n_equal, 1)
    return Question(to_device(torch.cat([null, own]), device), len(null), n_null_equal, rows, n_equal)
