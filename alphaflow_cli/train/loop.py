"""The training loop. The order of a step is a contract:

    batch → times → path → guidance → target → forward → loss → backward → step → ema → journal → save

`gradients` draws the batch and the times and calls backward; `training_step` (step.py) goes from the path to the loss;
the optimiser (optimise.py) steps and averages; `train_steps` writes the journal and saves. While α > 0 guidance's rows
go along in the forward, which then comes before the guided velocity and the target. Where the steps are CUDA graphs
(graphs.py), all from the path to the averages is replayed.

The draws are functions of (seed, step), so a step can be begun anew: after it ran out of memory, with smaller
micro-batches (not on several processes: the others wait in the middle of an exchange for the one that failed, so the
run ends and says what to do), or after a gradient that was not finite. The recipe's policy (optim.nonfinite) says
what follows such a gradient; the optimiser has not taken the step:

    skip       go on and say so; so many in a row end the run
    rollback   go back to the last saved state, with other noise and times; so many times at most
    stop       end the run
    replace    nothing here: the optimiser replaced the values and took the step, as published, and counted it
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alphaflow_cli.core.alpha import equal_rows
from alphaflow_cli.core.draws import step_draws
from alphaflow_cli.core.times import sample_times
from alphaflow_cli.data.batches import to_device
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe.plan import phase_kind
from alphaflow_cli.runtime.launch import StopFlag
from alphaflow_cli.runtime.progress import Progress, say
from alphaflow_cli.train import conflict
from alphaflow_cli.train.graphs import StepGraphs
from alphaflow_cli.train.journal import Journal, Trackers, console_line, mean_step_flops, take_counters
from alphaflow_cli.train.optimise import COUNTERS
from alphaflow_cli.train.parallel import split_batch
from alphaflow_cli.train.questions import ask
from alphaflow_cli.train.run import Run, newest_for_all
from alphaflow_cli.train.step import Rows, guide_of, row_draws, row_factor, time_laws, training_step
from alphaflow_cli.train.threads import Watch

CHECK_EVERY = 10  # steps between looks at the device's counters and at the stop flag, where a look makes it wait
NONFINITE_ADVICE = "Lower optim.lr, or look at the data: alphaflow prep-latents --verify."


def train_steps(
    run: Run, journal: Journal, stop: StopFlag, *, trackers: Trackers, after_save: Callable[[Run], bool | None]
) -> bool:
    """Train from run.step to the last step, or until a signal; returns whether the end was reached.

    `after_save` returns True where a signal cut short what it does: it is not done, and the run stops there.
    """
    train, world = run.recipe.train, run.world
    look_every = 1 if world.device.type == "cpu" else CHECK_EVERY
    watch = Watch(run)
    if run.step < train.steps:
        settle_buckets(run)
    with Progress("train", train.steps, unit="step", done=run.step, shown=world.is_main) as bar:
        while run.step < train.steps:
            with watch:
                one_step(run, run.step)
            run.step += 1
            bar.advance(1)
            last = run.step == train.steps
            log, save = (last or _is_due(run.step, every) for every in (train.log_every, train.save_every))
            save = save or _is_due(run.step, run.recipe.eval.every)  # scores are those of a saved checkpoint
            look = log or save or _is_due(run.step, look_every)
            if look and survive_nonfinite(run):
                journal.rewind(run.step)
                bar.advance(run.step - bar.done)
                continue
            if log:
                watch.look()
                row = log_row(run, journal)
                trackers.log(row)
                bar.advance(0, console_line(row))
            stopping = look and world.agree(stop.is_set)
            if stopping or save:
                run.save()
            cut_short = after_save(run)
            if stopping or cut_short:
                return last and not cut_short
    return True


def settle_buckets(run: Run) -> None:
    """Let DDP arrange its buckets before the first step: it does so anew after its first backward pass.

    The place of a gradient in them decides how its sum over three or more processes is rounded. So without this the
    first step after every start would be rounded otherwise than the same step of a run that was not interrupted.
    """
    if run.optimiser.in_buckets and run.world.size > 2:
        before = run.sums.values.clone()
        within_memory(run, lambda: gradients(run, 0))
        run.sums.values.copy_(before)
        run.optimiser.forget_gradients()


def one_step(run: Run, step: int) -> None:
    """Take one optimiser step on the global batch of this step."""
    within_memory(run, lambda: replay(run, run.graphs, step) if run.graphs else gradients(run, step))
    if run.graphs:
        return
    if not run.checked:
        run.world.check_synchronised(run.net)
        run.checked = True
    run.optimiser.step(step)


def gradients(run: Run, step: int) -> None:
    """Add up the gradients of the mean loss over the global batch of this step, in micro-batches, on every process."""
    recipe, world, alpha = run.recipe, run.world, run.alpha_at(step)
    noise, drawn, n_equal = draws_at(run, step)
    for turn in range(run.split.accumulation):
        place, mine = run.split.rows(world.rank, turn), run.split.equal_rows(world.rank, turn, n_equal)
        rows = rows_at(run, step, place, noise=noise[place], drawn=drawn[:, place], n_equal=mine)
        last = turn == run.split.accumulation - 1
        with contextlib.nullcontext() if last else world.accelerator.no_sync(run.wrapped):
            result = training_step(run.wrapped, run.net, rows, alpha=alpha, objective=run.objective)
            # synchronising averages over the processes; the loss is a mean over the global batch
            (result.loss * (world.size / recipe.train.batch)).backward()  # type: ignore[no-untyped-call]
        run.sums.add(result.terms, rows.t, rows.r, rows.n_equal)


def replay(run: Run, graphs: StepGraphs, step: int) -> None:
    """Take the whole step as a graph: one process, one micro-batch."""
    noise, drawn, n_equal = draws_at(run, step)
    batch, (t, r, uniforms) = run.stream.batch_at(step, run.split.rows(0, 0)), drawn[:3]
    guide = guide_of(drawn)
    rows = Rows(x=batch.latents, noise=noise, t=t, r=r, y=batch.y, uniforms=uniforms, n_equal=n_equal, guide=guide)
    graphs.take(step, rows, run.alpha_at(step))


def draws_at(run: Run, step: int) -> tuple[Tensor, Tensor, int]:
    """What is drawn for the global batch of a step: noise, on the device, and, on the host, the values of `row_draws`.

    The number of r = t rows comes with them.
    """
    recipe = run.recipe
    n_equal = equal_rows(recipe.train.batch, run.equal_share_at(step))
    draws = step_draws(run.seed, step, batch=recipe.train.batch, shape=run.stream.shape, device=run.world.device)
    t, r = sample_times(draws.normals, n_equal, time_laws(recipe.times))
    return draws.noise, row_draws(t, r, draws, n_equal, recipe.guidance).to(run.dtype), n_equal


def rows_at(run: Run, step: int, place: slice, *, noise: Tensor, drawn: Tensor, n_equal: int) -> Rows:
    """Read a micro-batch of the stream. `drawn` are its rows' values of `row_draws`, on the host."""
    batch, device, objective = run.stream.batch_at(step, place), run.world.device, run.objective
    here = to_device(drawn, device)
    t, r, uniforms = here[:3]
    question = None  # compiled blocks: all rows that guidance could need, so that their number stays
    tangent = objective.has_tangent(run.alpha_at(step))
    if (objective.is_guided or tangent) and not run.compiled:
        mix, guide = objective.guidance, guide_of(drawn)
        question = ask(drawn[0], drawn[2], n_equal, mix, device, guide=guide, tangent=tangent)
    return Rows(
        x=batch.latents.to(run.dtype),
        noise=noise.to(run.dtype),
        t=t,
        r=r,
        y=batch.y,
        uniforms=uniforms,
        n_equal=n_equal,
        guide=guide_of(here),
        question=question,
        factor=row_factor(t, r, n_equal, objective, progress=step / run.recipe.train.steps),
    )


def _is_due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps is done after this one; 0 means never."""
    return every > 0 and step % every == 0


def log_row(run: Run, journal: Journal) -> dict[str, Any]:
    """Write a row of metrics.jsonl about the steps since the last row, and return it."""
    step, last = run.step, run.step - 1
    batch, alpha, share = run.recipe.train.batch, run.alpha_at(last), run.equal_share_at(last)
    values: dict[str, Any] = {"step": step, "images_seen": step * batch, "alpha": alpha, "phase": phase_kind(alpha)}
    values |= {"equal_share": share, "lr": run.optimiser.rate_at(last)}
    values |= run.sums.take(run.world.sum(run.sums.values.clone()))
    values |= take_counters(run.optimiser.counters)
    if conflict.is_due(run):
        values["conflict"] = conflict.measure(run)
    every = run.compiled or run.graphs is not None  # then guidance asks about every row that it could need
    flops = mean_step_flops(run.recipe, alpha, equal_rows(batch, share), compiled=every)
    return journal.row(values, step=step, batch=batch, flops=flops)


def within_memory(run: Run, gradients: Callable[[], None]) -> None:
    """Call `gradients`; while it runs out of memory, call it again with micro-batches of half as many rows."""
    before = run.sums.values.clone()
    while _runs_out(run, gradients):
        # here the failed attempt's frames, and what they held, are gone
        smaller = split_batch(run.split.batch, processes=run.world.size, micro_batch=-(-run.split.micro_batch // 2))
        say(f"out of memory at step {run.step}: going on with {smaller}")
        run.split, run.graphs = smaller, None
        run.sums.values.copy_(before)
        run.optimiser.forget_gradients()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _runs_out(run: Run, gradients: Callable[[], None]) -> bool:
    """Whether the memory ran out and smaller micro-batches may be tried; otherwise running out ends the run."""
    try:
        gradients()
    except torch.OutOfMemoryError as error:
        rows = run.split.micro_batch
        if run.may_shrink and run.world.size == 1 and rows > 1:
            return True
        way = f"--micro-batch {-(-rows // 2)}" if rows > 1 else "--set train.gradient_checkpointing=true"
        raise AlphaflowError(
            f"{run.folder}: out of memory at step {run.step} with micro-batches of {rows} rows ({error}). The last "
            f"checkpoint is kept; go on from it with: {way}"
        ) from error
    return False


def survive_nonfinite(run: Run) -> bool:
    """Apply the policy to the non-finite gradients since the last journal row; True after a roll back."""
    counts = dict(zip(COUNTERS, run.optimiser.counters.tolist(), strict=True))
    policy, count, streak = run.recipe.optim.nonfinite, int(counts["nonfinite"]), int(counts["streak"])
    where = f"{run.folder}: step {run.step}: the gradient was not finite"
    if policy == "replace" or count == 0 or (policy == "skip" and streak == 0):
        return False
    if policy == "stop":
        raise AlphaflowError(f"{where}. The last save is kept; optim.nonfinite: stop ended the run. {NONFINITE_ADVICE}")
    if policy == "rollback":
        _roll_back(run, where)
        return True
    limit = run.recipe.optim.nonfinite_limit
    if streak >= limit:
        raise AlphaflowError(
            f"{where} for {streak} steps in a row (optim.nonfinite_limit {limit}). Each was skipped. {NONFINITE_ADVICE}"
        )
    if run.world.is_main:
        say(f"{where}; the step was skipped ({streak} in a row).")
    return False


def _roll_back(run: Run, where: str) -> None:
    limit, path = run.recipe.optim.nonfinite_limit, newest_for_all(run.folder, run.world)
    if path is None:
        raise AlphaflowError(f"{where}, and there is no saved state to roll back to yet. {NONFINITE_ADVICE}")
    if run.retries >= limit:
        raise AlphaflowError(
            f"{where} again, after {run.retries} rolls back (optim.nonfinite_limit {limit}). "
            f"The last save is kept. {NONFINITE_ADVICE}"
        )
    run.retries += 1
    run.restore(path)
    run.world.wait()  # nobody saves, and removes the state, while another still reads it
    if run.world.is_main:
        say(f"{where}; rolled back to step {run.step}, with other draws ({run.retries} of at most {limit} times).")
