"""The training loop. The order of a step is a contract:

batch → times → path → guidance → target → forward → loss → backward → step → ema → journal → save
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from alphaflow_cli.core.alpha import equal_rows
from alphaflow_cli.core.draws import step_draws
from alphaflow_cli.core.times import sample_times
from alphaflow_cli.engine import state
from alphaflow_cli.engine.journal import Journal, console_line, take_counters
from alphaflow_cli.engine.plan import phase_kind
from alphaflow_cli.engine.progress import Progress, say
from alphaflow_cli.engine.run import Run
from alphaflow_cli.engine.signals import StopFlag
from alphaflow_cli.engine.step import Rows, training_step
from alphaflow_cli.errors import AlphaflowError

CHECK_EVERY = 10  # steps between looks at the device's counters and at the stop flag, where a look makes it wait


def train_steps(run: Run, journal: Journal, stop: StopFlag, after_save: Callable[[Run], None]) -> bool:
    """From run.step to the last step, or to a signal; returns whether the end was reached."""
    train, world = run.recipe.train, run.world
    with Progress("train", train.steps, unit="step", done=run.step, shown=world.is_main) as bar:
        while run.step < train.steps:
            one_step(run, run.step)
            run.step += 1
            bar.advance(1)
            look = _is_due(run.step, 1 if world.device.type == "cpu" else CHECK_EVERY) or run.step == train.steps
            if look and _survive_nonfinite(run):
                journal.rewind(run.step)
                continue
            if _is_due(run.step, train.log_every) or run.step == train.steps:
                _log(run, journal, bar)
            stopping = look and world.agree(stop.is_set)
            if stopping or _is_due(run.step, train.save_every) or run.step == train.steps:
                run.save()
            after_save(run)
            if stopping:
                return run.step == train.steps
    return True


def one_step(run: Run, step: int) -> None:
    """One optimiser step on the global batch of this step."""
    recipe, world, device = run.recipe, run.world, run.world.device
    alpha = run.alpha_at(step)
    n_equal = equal_rows(recipe.train.batch, run.equal_share_at(step))
    draws = step_draws(run.seed, step, batch=recipe.train.batch, shape=run.stream.shape, device=device)
    law = recipe.times
    t, r = sample_times(draws.normals, n_equal, law=law.law, mean=law.mean, std=law.std, order=law.order)
    for turn in range(run.split.accumulation):
        place = run.split.rows(world.rank, turn)
        batch = run.stream.batch_at(step, place)
        rows = Rows(
            x=batch.latents.to(run.dtype),
            noise=draws.noise[place].to(run.dtype),
            t=t[place].to(run.dtype),
            r=r[place].to(run.dtype),
            y=batch.y,
            uniforms=draws.uniforms[place],
            n_equal=run.split.equal_rows(world.rank, turn, n_equal),
        )
        last = turn == run.split.accumulation - 1
        with contextlib.nullcontext() if last else world.accelerator.no_sync(run.wrapped):
            result = training_step(run.wrapped, run.net, rows, alpha=alpha, how=run.how)
            # synchronising averages over the processes; the loss is a mean over the global batch
            (result.loss * (world.size / recipe.train.batch)).backward()
        run.sums.add(result.terms, rows.t, rows.r, rows.n_equal)
    run.optimiser.step(step)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _log(run: Run, journal: Journal, bar: Progress) -> None:
    """A row of metrics.jsonl and a line for people, about the steps since the last row."""
    step, last = run.step, run.step - 1
    batch, alpha = run.recipe.train.batch, run.alpha_at(last)
    values: dict[str, Any] = {"step": step, "images_seen": step * batch, "alpha": alpha, "phase": phase_kind(alpha)}
    values |= {"equal_share": run.equal_share_at(last), "lr": run.optimiser.rate_at(last)}
    values |= run.sums.take(run.world.sum(run.sums.values.clone()))
    values |= take_counters(run.optimiser.counters)
    row = journal.row(values, step, batch)
    if run.world.is_main:
        bar.note = console_line(row)


def _survive_nonfinite(run: Run) -> bool:
    """Apply the recipe's policy to gradients that were not finite; True after a roll back."""
    counters = dict(zip(("nonfinite", "streak"), run.optimiser.counters[-2:].tolist(), strict=True))
    policy, limit = run.recipe.optim.nonfinite, run.recipe.optim.nonfinite_limit
    where = f"{run.folder}: step {run.step}: the gradient was not finite"
    if counters["streak"] == 0:
        return False
    if policy == "stop":
        raise AlphaflowError(f"{where}. The weights are those before the step; optim.nonfinite: stop ended the run.")
    if policy == "rollback" and run.retries < limit:
        path = state.newest_state(run.folder)
        if path is None:
            raise AlphaflowError(f"{where}, and there is no saved state to roll back to yet.")
        run.retries += 1
        run.restore(path)
        run.optimiser.counters.zero_()
        if run.world.is_main:
            say(f"{where}; rolled back to step {run.step}, with other draws ({run.retries} of at most {limit} times).")
        return True
    if counters["streak"] >= limit or policy == "rollback":
        raise AlphaflowError(
            f"{where} for {int(counters['streak'])} steps in a row (optim.nonfinite_limit {limit}). Each was skipped. "
            "Lower optim.lr, or look at the data: alphaflow prep-latents --verify."
        )
    if run.world.is_main:
        say(f"{where}; the step was skipped ({int(counters['streak'])} in a row).")
    return False


def free_memory() -> None:
    """After a probe or a grid: give cached blocks back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
