"""The training loop. The order of a step is a contract:

batch → times → path → guidance → target → forward → loss → backward → step → ema → journal → save

While α > 0 guidance's rows go along in the forward, which then comes before the guided velocity and the target.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alphaflow_cli.core.alpha import equal_rows
from alphaflow_cli.core.draws import step_draws
from alphaflow_cli.core.times import sample_times
from alphaflow_cli.data.transfer import to_device
from alphaflow_cli.engine import conflict_probe
from alphaflow_cli.engine.guide import ask
from alphaflow_cli.engine.journal import Journal, console_line, take_counters
from alphaflow_cli.engine.memory import within_memory
from alphaflow_cli.engine.nonfinite import survive_nonfinite
from alphaflow_cli.engine.plan import phase_kind
from alphaflow_cli.engine.progress import Progress
from alphaflow_cli.engine.run import Run
from alphaflow_cli.engine.signals import StopFlag
from alphaflow_cli.engine.step import Rows, training_step
from alphaflow_cli.engine.trackers import Trackers
from alphaflow_cli.engine.utilisation import step_flops

CHECK_EVERY = 10  # steps between looks at the device's counters and at the stop flag, where a look makes it wait


def train_steps(
    run: Run, journal: Journal, stop: StopFlag, *, trackers: Trackers, after_save: Callable[[Run], None]
) -> bool:
    """From run.step to the last step, or to a signal; returns whether the end was reached."""
    train, world = run.recipe.train, run.world
    look_every = 1 if world.device.type == "cpu" else CHECK_EVERY
    with Progress("train", train.steps, unit="step", done=run.step, shown=world.is_main) as bar:
        while run.step < train.steps:
            one_step(run, run.step)
            run.step += 1
            bar.advance(1)
            last = run.step == train.steps
            log, save = last or _is_due(run.step, train.log_every), last or _is_due(run.step, train.save_every)
            look = log or save or _is_due(run.step, look_every)
            if look and survive_nonfinite(run):
                journal.rewind(run.step)
                bar.advance(run.step - bar.done)
                continue
            if log:
                row = _log(run, journal)
                trackers.log(row)
                bar.advance(0, console_line(row))
            stopping = look and world.agree(stop.is_set)
            if stopping or save:
                run.save()
            after_save(run)
            if stopping:
                return last
    return True


def one_step(run: Run, step: int) -> None:
    """One optimiser step on the global batch of this step."""
    within_memory(run, lambda: gradients(run, step))
    if not run.checked:
        run.world.check_synchronised(run.net)
        run.checked = True
    run.optimiser.step(step)


def gradients(run: Run, step: int) -> None:
    """Of the mean loss over the global batch of this step, on every process."""
    recipe, world = run.recipe, run.world
    alpha = run.alpha_at(step)
    n_equal = equal_rows(recipe.train.batch, run.equal_share_at(step))
    draws = step_draws(run.seed, step, batch=recipe.train.batch, shape=run.stream.shape, device=world.device)
    law = recipe.times
    t, r = sample_times(draws.normals, n_equal, law=law.law, mean=law.mean, std=law.std, order=law.order)
    times = torch.stack([t, r, draws.uniforms]).to(run.dtype)
    for turn in range(run.split.accumulation):
        place, mine = run.split.rows(world.rank, turn), run.split.equal_rows(world.rank, turn, n_equal)
        rows = rows_at(run, step, place, noise=draws.noise[place], times=times[:, place], n_equal=mine)
        last = turn == run.split.accumulation - 1
        with contextlib.nullcontext() if last else world.accelerator.no_sync(run.wrapped):
            result = training_step(run.wrapped, run.net, rows, alpha=alpha, how=run.how)
            # synchronising averages over the processes; the loss is a mean over the global batch
            (result.loss * (world.size / recipe.train.batch)).backward()  # type: ignore[no-untyped-call]
        run.sums.add(result.terms, rows.t, rows.r, rows.n_equal)


def rows_at(run: Run, step: int, place: slice, *, noise: Tensor, times: Tensor, n_equal: int) -> Rows:
    """A micro-batch; `times` are t, r and the uniforms of label dropout, on the host."""
    batch, device, how = run.stream.batch_at(step, place), run.world.device, run.how
    t, r, uniforms = to_device(times, device)
    question = None  # compiled blocks are asked about every row, so that their number stays
    if how.is_guided and not run.recipe.train.compile:
        question = ask(times[0], times[2], n_equal, how.guidance, device)
    return Rows(
        x=batch.latents.to(run.dtype),
        noise=noise.to(run.dtype),
        t=t,
        r=r,
        y=batch.y,
        uniforms=uniforms,
        n_equal=n_equal,
        question=question,
    )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _log(run: Run, journal: Journal) -> dict[str, Any]:
    """A row of metrics.jsonl about the steps since the last row."""
    step, last = run.step, run.step - 1
    batch, alpha, share = run.recipe.train.batch, run.alpha_at(last), run.equal_share_at(last)
    values: dict[str, Any] = {"step": step, "images_seen": step * batch, "alpha": alpha, "phase": phase_kind(alpha)}
    values |= {"equal_share": share, "lr": run.optimiser.rate_at(last)}
    values |= run.sums.take(run.world.sum(run.sums.values.clone()))
    values |= take_counters(run.optimiser.counters)
    if conflict_probe.is_due(run):
        values["conflict"] = conflict_probe.measure(run)
    return journal.row(values, step=step, batch=batch, flops=step_flops(run.recipe, alpha, equal_rows(batch, share)))
