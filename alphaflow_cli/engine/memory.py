"""When a step runs out of memory: with --micro-batch auto, the same step again in smaller parts.

The draws are functions of (seed, step), so a step can be begun anew. Not on several processes: the others wait in the
middle of an exchange for the one that failed, so the run ends and says what to do.
"""

from collections.abc import Callable

import torch

from alphaflow_cli.engine.progress import say
from alphaflow_cli.engine.run import Run
from alphaflow_cli.engine.split import split_batch
from alphaflow_cli.errors import AlphaflowError


def within_memory(run: Run, gradients: Callable[[], None]) -> None:
    """Call `gradients`, again and again until its micro-batches fit."""
    before = run.sums.values.clone()
    while _runs_out(run, gradients):
        # here the failed attempt's frames, and what they held, are gone
        smaller = split_batch(run.split.batch, processes=run.world.size, micro_batch=-(-run.split.micro_batch // 2))
        say(f"out of memory at step {run.step}: going on with {smaller}")
        run.split = smaller
        run.sums.values.copy_(before)
        run.optimiser.forget_gradients()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _runs_out(run: Run, gradients: Callable[[], None]) -> bool:
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
