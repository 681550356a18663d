"""What happens after a gradient that was not finite: the recipe's policy. The optimiser has skipped the step already.

skip       go on, say so; so many in a row end the run
rollback   back to the last saved state, with other noise and times; so many times at most
stop       end the run
replace    nothing here: the optimiser replaced the values and took the step, as published, and counted it
"""

from alphaflow_cli.engine.optimise import COUNTERS
from alphaflow_cli.engine.progress import say
from alphaflow_cli.engine.run import Run, newest_for_all
from alphaflow_cli.errors import AlphaflowError

ADVICE = "Lower optim.lr, or look at the data: alphaflow prep-latents --verify."


def survive_nonfinite(run: Run) -> bool:
    """Apply the policy to what was counted since the last journal row; True after a roll back."""
    found = dict(zip(COUNTERS, run.optimiser.counters.tolist(), strict=True))
    policy, count, streak = run.recipe.optim.nonfinite, int(found["nonfinite"]), int(found["streak"])
    where = f"{run.folder}: step {run.step}: the gradient was not finite"
    if policy == "replace" or count == 0 or (policy == "skip" and streak == 0):
        return False
    if policy == "stop":
        raise AlphaflowError(f"{where}. The last save is kept; optim.nonfinite: stop ended the run. {ADVICE}")
    if policy == "rollback":
        _roll_back(run, where)
        return True
    limit = run.recipe.optim.nonfinite_limit
    if streak >= limit:
        raise AlphaflowError(
            f"{where} for {streak} steps in a row (optim.nonfinite_limit {limit}). Each was skipped. {ADVICE}"
        )
    if run.world.is_main:
        say(f"{where}; the step was skipped ({streak} in a row).")
    return False


def _roll_back(run: Run, where: str) -> None:
    limit, path = run.recipe.optim.nonfinite_limit, newest_for_all(run.folder, run.world)
    if path is None:
        raise AlphaflowError(f"{where}, and there is no saved state to roll back to yet. {ADVICE}")
    if run.retries >= limit:
        raise AlphaflowError(
            f"{where} again, after {run.retries} rolls back (optim.nonfinite_limit {limit}). "
            f"The last save is kept. {ADVICE}"
        )
    run.retries += 1
    run.restore(path)
    run.world.wait()  # nobody saves, and removes the state, while another still reads it
    if run.world.is_main:
        say(f"{where}; rolled back to step {run.step}, with other draws ({run.retries} of at most {limit} times).")
