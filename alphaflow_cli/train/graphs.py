"""The whole training step of a small network as one CUDA graph, which is replayed instead of launched.

A network of a million parameters keeps a GPU busy for a millisecond, and its thousand operators take the host ten to
launch. So forward, backward, the journal's sums, clipping, Adam and the averages are captured once and replayed. What
differs from step to step is written to tensors that keep their place: the batch, its noise, and in one copy from the
host all numbers: times, label dropout, guidance, α and weight of each row, the learning rate, 1 − β of each average.
What decides which operators run makes another graph, a `StepForm`: the phase, the number of r = t rows, the precision.
Guidance asks about every row that it could need, as in compiled blocks.

A graph holds the addresses of weights, moments, averages, counters and sums. So whoever changes these does it in place.
Warming up and capturing leave nothing behind. A form that cannot be captured, or is one too many, is launched by the
same lines: they compute the same, bit for bit. train/compiling.py decides whether a run has graphs at all.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from alphaflow_cli.core.objective import row_alpha
from alphaflow_cli.model.build import DTYPES
from alphaflow_cli.model.compiling import why_not
from alphaflow_cli.recipe.plan import PhaseKind, draws_scale, phase_kind
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.runtime.progress import say
from alphaflow_cli.runtime.transfer import wait_for_gpu
from alphaflow_cli.train.journal import Sums
from alphaflow_cli.train.optimise import Optimiser
from alphaflow_cli.train.step import Objective, Rows, guide_of, random_rows, row_factor, training_step

MOST_GRAPHS = 8  # of one run; each has the operators of a whole step, all share their memory
WARM_UPS = 3  # steps before a capture, as torch wants them: libraries make their workspaces
TIMED_STEPS = 10  # launched, and as many replayed, to see what a graph saves
STANDS_FOR: dict[PhaseKind, float] = {"flow": 1.0, "between": 0.5, "derivative": 0.0}  # an α of each phase
_Work = Callable[[], None]


@dataclass(frozen=True)
class StepForm:
    """What makes a step another graph."""

    kind: PhaseKind
    n_equal: int
    bf16: bool


@contextmanager
def on_own_stream(wanted: bool) -> Iterator[None]:
    """All work of the run on a stream of its own, where its steps may become graphs.

    What autograd keeps of a parameter belongs to the stream where it was first used, and the default stream's work
    cannot be captured.
    """
    if not wanted or not torch.cuda.is_available():
        yield
        return
    here, own = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    own.wait_stream(here)
    with torch.cuda.stream(own):
        yield
    here.wait_stream(own)


class Capturing:
    """Makes CUDA graphs that share one stream and one pool of memory: they are never replayed at the same time."""

    def __init__(self) -> None:
        self.stream: Any = torch.cuda.current_stream()  # that of `on_own_stream`
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: _Work) -> _Work:
        """Do the work a few times, then capture it; returns what replays it."""
        for _ in range(WARM_UPS):
            work()
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        gc.disable()  # what an earlier run has left on the GPU is not to be freed within the capture
        try:  # other threads may pin memory meanwhile: the one that reads latents ahead does
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                work()
        finally:
            gc.enable()
        return graph.replay


class StepGraphs:
    """The steps of one run on one GPU, each on the whole batch, captured or launched."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        net: nn.Module,
        wrapped: nn.Module,
        optimiser: Optimiser,
        sums: Sums,
        capture: Callable[[_Work], _Work] | None = None,
    ) -> None:
        self.recipe, self.net, self.wrapped, self.optimiser, self.sums = recipe, net, wrapped, optimiser, sums
        self.objective, self.capture = Objective.of(recipe), capture or Capturing()
        self.works: dict[StepForm, _Work] = {}
        data, batch, device = recipe.data, recipe.train.batch, optimiser.counters.device
        shape, dtype = (batch, data.channels, data.latent_size, data.latent_size), DTYPES[recipe.train.precision]
        self.x, self.noise = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.y = torch.zeros(batch, dtype=torch.int64, device=device)
        self.drawn = 6 if draws_scale(recipe) else 3  # numbers of a row as `row_draws` has them; then α, and its weight
        count = (self.drawn + 1 + recipe.loss.short_first) * batch + 1 + len(optimiser.emas)
        self.numbers = torch.zeros(count, dtype=torch.float64, device=device)

    def take(self, step: int, rows: Rows, alpha: float) -> None:
        """Take the optimiser step of these rows; their draws but for the noise are on the host, and nothing waits."""
        form = self._form(rows.n_equal, alpha)
        if form not in self.works:
            self.works[form] = self._captured_late(form)
        self._write(step, rows, alpha)
        self.works[form]()

    def prepare(self, step: int, n_equal: int, alpha: float) -> tuple[float, float] | None:
        """Capture the form of a step ahead; seconds of such a step, launched and replayed; None: it is captured."""
        form = self._form(n_equal, alpha)
        if form in self.works:
            return None
        work = partial(self._work, form)
        with self._unchanged():
            self._write(step, random_rows(self.recipe, len(self.y), n_equal, torch.device("cpu")), alpha)
            work()  # the first step also loads kernels, and makes Adam's moments
            launched = _seconds(work)
            replay = self.capture(work)
            replay()
            replayed = _seconds(replay)
        self.works[form] = replay
        return launched, replayed

    def _form(self, n_equal: int, alpha: float) -> StepForm:
        return StepForm(phase_kind(alpha), n_equal, self.objective.at(alpha).bf16)

    def _captured_late(self, form: StepForm) -> _Work:
        """A form that was not foreseen: captured before its first step, or launched."""
        work = partial(self._work, form)
        if len(self.works) >= MOST_GRAPHS:
            return work
        try:
            with self._unchanged():
                return self.capture(work)
        except RuntimeError as error:
            if not is_capture_fault(error):
                raise
            say(f"a step of {form.n_equal} r = t rows was not captured, and is launched: {why_not(error)}")
        return work

    def _write(self, step: int, rows: Rows, alpha: float) -> None:
        """Put a step's rows and numbers where the graphs read them: one copy from the host, from pinned memory."""
        k, ratio = rows.n_equal, torch.ones_like(rows.t)
        if 0.0 < alpha < 1.0:
            ratio[k:] = row_alpha(alpha, rows.t[k:], rows.r[k:], self.objective.gap)
        guide = () if rows.guide is None else rows.guide.T
        factor = row_factor(rows.t, rows.r, k, self.objective, progress=step / self.recipe.train.steps)
        values = [rows.t, rows.r, rows.uniforms, *guide, ratio, *([] if factor is None else [factor])]
        rest = torch.tensor(self.optimiser.numbers_at(step), dtype=torch.float64)
        packed = torch.cat([*(value.double() for value in values), rest])
        self.numbers.copy_(packed.pin_memory() if self.numbers.is_cuda else packed, non_blocking=True)
        self.x.copy_(rows.x, non_blocking=True)
        self.noise.copy_(rows.noise, non_blocking=True)
        self.y.copy_(rows.y, non_blocking=True)

    def _work(self, form: StepForm) -> None:
        """The step itself: nothing here is read on the host, but what the form says."""
        rows, objective = self._rows(form), replace(self.objective, bf16=form.bf16, precise_below=0.0)
        result = training_step(self.wrapped, self.net, rows, alpha=STANDS_FOR[form.kind], objective=objective)
        (result.loss * (1 / len(self.y))).backward()  # type: ignore[no-untyped-call]
        self.sums.add(result.terms, rows.t, rows.r, rows.n_equal)
        self.optimiser.step_by(self.numbers[-1 - len(self.optimiser.emas) :])

    def _rows(self, form: StepForm) -> Rows:
        """The rows as they lie on the device."""
        of_rows = self.numbers[: -1 - len(self.optimiser.emas)].view(-1, len(self.y)).to(self.x.dtype)
        t, r, uniforms = of_rows[:3]
        return Rows(
            x=self.x,
            noise=self.noise,
            t=t,
            r=r,
            y=self.y,
            uniforms=uniforms,
            n_equal=form.n_equal,
            factor=of_rows[-1] if self.recipe.loss.short_first else None,
            guide=guide_of(of_rows[: self.drawn]),
            ratio=of_rows[self.drawn, form.n_equal :] if form.kind == "between" else None,
        )

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Steps within leave no trace: all that they change is put back, in its place."""
        kept = {id(value): (value, value.clone()) for value in [*self.optimiser.changed(), self.sums.values]}
        try:
            yield
        finally:
            with torch.no_grad():
                for value, before in kept.values():
                    value.copy_(before)
                for value in self.optimiser.changed():
                    if id(value) not in kept:  # moments, which begin at zero
                        value.zero_()
            self.optimiser.forget_gradients()


def _seconds(work: _Work) -> float:
    """Seconds of one of several such steps in a row."""
    wait_for_gpu()
    began = time.perf_counter()
    for _ in range(TIMED_STEPS):
        work()
    wait_for_gpu()
    return (time.perf_counter() - began) / TIMED_STEPS


def is_capture_fault(error: RuntimeError) -> bool:
    """Whether CUDA or its memory is at fault; a fault in our own lines shows again when they are launched."""
    faults = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
    return isinstance(error, faults) or "CUDA" in str(error) or "captur" in str(error)
