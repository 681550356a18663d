"""How many threads a run computes with on a CPU: chosen once by a few steps, stored, and watched.

No switch serves an idle machine and a busy one: two threads halve a step's time on idle cores, and make it many times
as long beside one busy process, because threads that wait spin. So a few steps with 1 and with N threads choose, before
the run begins. The choice is stored with the state and kept by a resume: the number of threads decides how sums are
rounded, and timing must not. For the same reason a run whose steps become three times as long changes the number only
where a test finds the same bits with 1 and with N threads; otherwise one line advises.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from alphaflow_cli.recipe.plan import equal_share_at, phase_kind, phases
from alphaflow_cli.recipe.schema import Recipe
from alphaflow_cli.recipe.speed import phase_flops
from alphaflow_cli.runtime.processes import World
from alphaflow_cli.runtime.progress import say
from alphaflow_cli.runtime.threads import Threads, crowded, threads_granted
from alphaflow_cli.text import counted
from alphaflow_cli.train.estimate import Trial, timed
from alphaflow_cli.train.run import Run
from alphaflow_cli.train.state import StateFacts

MOST_ROUNDS = 5  # of a step with 1 and one with N threads
MOST_SECONDS = 1.0  # that measuring may take, or
MOST_SHARE = 0.01  # this share of the run, whichever is more
CORE_FLOPS = 5e10  # a core does so many operations per second: what is plainly too slow to be tried is not tried
SLOW = 3.0  # times as long as before: the machine is busy with other work


def choose_threads(
    recipe: Recipe, world: World, rows: int, requested: int | None, saved: StateFacts | None
) -> Threads | None:
    """Set the threads of a run, the same number on every process; None on a GPU, where torch's own number stays."""
    if world.device.type != "cpu":
        if requested:
            torch.set_num_threads(requested)
        return None
    threads = _choose(recipe, world, rows, threads_granted(requested), saved)
    count = int(-world.largest(-threads.count))  # machines may differ
    before = saved.threads if saved and saved.processes == world.size else None
    if world.is_main:
        say(crowded(threads) or f"threads: {count} ({threads.reason})")
        if before and before != count:
            say(f"beware: the run computed with {counted(before, 'thread')} so far: other threads round otherwise")
    torch.set_num_threads(count)
    return replace(threads, count=count)


def _choose(recipe: Recipe, world: World, rows: int, most: Threads, saved: StateFacts | None) -> Threads:
    """As the user says, as the run has computed so far, or as a few steps tell; at most so many as may be."""
    if world.agree(most.chosen):  # on one machine alone, perhaps
        return most
    if saved is not None and saved.processes == world.size:
        kept = saved.threads or most.count  # of earlier versions: torch's own number
        return Threads(kept, "as the run began") if kept <= most.count else most
    if world.largest(most.count) == 1:
        return most
    steps = recipe.train.steps - (saved.step if saved else 0)
    one, several = measure_threads(recipe, rows, most.count, steps, world)
    if not one:
        return Threads(most.count, f"{most.reason}; the run is too short to try other numbers")
    over = "over " if several > SLOW * one else ""
    tried = f"{most.reason}; a step took {one:.3g} s with 1, {over}{several:.3g} s with {most.count}"
    return Threads(1 if one < several else most.count, tried)


def measure_threads(recipe: Recipe, rows: int, most: int, steps: int, world: World) -> tuple[float, float]:
    """Seconds per step with 1 and with `most` threads, on the slowest process; zeros where measuring does not pay."""
    times: dict[int, list[float]] = {1: [], most: []}
    guess = max(flops for *_, flops in phase_flops(recipe)) / world.size / CORE_FLOPS
    if 3 * guess < max(MOST_SECONDS, MOST_SHARE * guess * steps):
        with torch.random.fork_rng(devices=[]):
            _time_rounds(recipe, rows, steps, times, world.device)
    each = [world.largest(statistics.median(values) if values else math.inf) for values in times.values()]
    return (each[0], each[1]) if max(each) < math.inf else (0.0, 0.0)


def _time_rounds(recipe: Recipe, rows: int, steps: int, times: dict[int, list[float]], device: torch.device) -> None:
    """Time a step with each number of threads in turn, once at least, until the time for it is spent."""
    most = max(times)
    longest = max(phases(recipe), key=lambda phase: phase.until - phase.first)
    torch.set_num_threads(1)
    trial, middle = Trial(recipe, device, compiled=False), (longest.first + longest.until) // 2
    step, last = partial(trial.step, rows, middle), 0.0
    for count in (1, most):  # the first step of a program also loads, and starts threads, what later ones have
        torch.set_num_threads(count)
        trial.step(1, middle)
    began = time.perf_counter()
    until = began + MOST_SECONDS
    while len(times[1]) < MOST_ROUNDS and time.perf_counter() + last < until:
        torch.set_num_threads(1)
        times[1].append(timed(step))
        torch.set_num_threads(most)
        longest_wait = SLOW * times[1][-1]
        times[most].append(timed(partial(_cut_short, trial.net, step, longest_wait)))
        if times[most][-1] > longest_wait:  # beside other work threads may wait for seconds: no need to look again
            break
        last = times[1][-1] + times[most][-1]
        until = max(until, began + MOST_SHARE * times[1][0] * steps)


class _TooLong(Exception):
    """Raised within a step that takes longer than we wait."""


def _cut_short(net: nn.Module, work: Callable[[], None], seconds: float) -> None:
    """Do the work; break it off at the next layer, forward or backward, once it has taken so long."""
    until = time.perf_counter() + seconds

    def check(*_: object) -> None:
        if time.perf_counter() > until:
            raise _TooLong

    hooks = [module.register_forward_hook(check) for module in net.modules()]
    hooks += [w.register_post_accumulate_grad_hook(check) for w in net.parameters() if w.requires_grad]  # type: ignore[no-untyped-call]
    try:
        with contextlib.suppress(_TooLong):
            work()
    finally:
        for hook in hooks:
            hook.remove()


class Watch:
    """Looks, while a run trains on a CPU, for steps that have become three times as long as they were.

    It looks when the journal is written, acts once in a phase, and gives the run its own number of threads back when
    the phase ends: another phase has other sums. Phases differ by less than a factor of three.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.kind = run, ""
        self.count = run.threads.count if run.threads else 1
        self.may_change = run.threads is not None and not run.threads.chosen  # the user's own number is kept
        self.seconds, self.steps, self.least, self.done = 0.0, 0, math.inf, False

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.seconds, self.steps = self.seconds + time.perf_counter() - self._began, self.steps + 1

    def look(self) -> None:
        """Compare the steps since the last look with the fastest such row. All processes must call it."""
        run = self.run
        kind = phase_kind(run.alpha_at(run.step - 1))
        if kind != self.kind:
            self.kind, self.done = kind, False
            if run.threads:
                torch.set_num_threads(self.count)
        if not self.done and self.count > 1:
            now = self.seconds / max(self.steps, 1)
            if run.world.agree(now > SLOW * self.least):
                self.done = True
                self._act(now)
            self.least = min(self.least, now)
        self.seconds, self.steps = 0.0, 0

    def _act(self, now: float) -> None:
        """Go on with one thread where that changes no bit and is faster; otherwise advise it, where it is faster."""
        run, several = self.run, self.count
        one, same = try_one_thread(run, several)
        change = same and self.may_change
        slower = one >= now
        if run.world.is_main and not slower:
            what = f"a step takes {now:.3g} s, and took {self.least:.3g} s before: this machine is busy otherwise"
            say(f"{what}; {_way(several, one, same=same, change=change)}")
        torch.set_num_threads(1 if change and not slower else several)


def _way(several: int, one: float, *, same: bool, change: bool) -> str:
    if change:
        return f"going on with 1 thread instead of {several} ({one:.3g} s), which computes the same bits here (tested)"
    why = "" if same else f", but rounds otherwise than with {several}"
    return f"with 1 thread it takes {one:.3g} s{why}. Nothing is changed; to go on so, stop the run and add --threads 1"


def try_one_thread(run: Run, several: int) -> tuple[float, bool]:
    """Seconds of a step with one thread now, and whether such a step computes the same bits as with several.

    Where the number of rows changes from step to step, a test of one number proves nothing, and counts as failed.
    """
    recipe, world, rows = run.recipe, run.world, run.split.micro_batch
    results, seconds = [], 0.0
    for count in (several, 1):
        torch.set_num_threads(count)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            trial = Trial(recipe, world.device, compiled=False)
            began = time.perf_counter()
            for _ in range(2):
                trial.step(rows, run.step - 1)
            seconds = (time.perf_counter() - began) / 2 * run.split.accumulation
        results.append([*trial.optimiser.weights, trial.optimiser.counters])
    same = not _rows_vary(run) and all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return world.largest(seconds), not world.agree(not same)


def _rows_vary(run: Run) -> bool:
    share, last = equal_share_at(run.recipe), run.recipe.train.steps - 1
    return run.objective.is_guided or share(0) != share(last)
