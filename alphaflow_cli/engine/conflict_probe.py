"""The conflict measured while training: one batch now and then, beside the run and without touching it.

Nothing of the run changes: the draws have their own seeds, gradients are computed apart from `.grad`, and neither the
optimiser nor the journal's sums hear of it. The raw weights are measured, on one micro-batch of the next step's data.
"""

import time
from typing import Any

from alphaflow_cli.core.conflict import cosine
from alphaflow_cli.engine.conflict import measure_conflict, prepare_rows
from alphaflow_cli.engine.conflict_rows import conflict_rows
from alphaflow_cli.engine.conflict_summary import PAIRS, TERMS
from alphaflow_cli.engine.run import Run


def is_due(run: Run) -> bool:
    """At the first row of the journal at or after each multiple of `train.conflict_every`."""
    every, log_every = run.recipe.train.conflict_every, max(1, run.recipe.train.log_every)
    return every > 0 and run.step % every < log_every


def measure(run: Run) -> dict[str, Any]:
    """`cos_tfm_tc`, …, `norm_tfm`, …, of this process's batch; only the main process's is written, and computed.

    `rows` are those measured; times that never differ leave none, and then there is nothing else to tell.
    """
    if not run.world.is_main:
        return {}
    began = time.monotonic()
    batch = run.stream.batch_at(run.step, run.split.rows(0, 0))
    rows = conflict_rows(run.recipe, batch.latents, batch.y, seed=run.seed, index=run.step)
    later = prepare_rows(run.net, rows, run.how)
    if not len(later.t):
        return {"rows": 0, "seconds": round(time.monotonic() - began, 3)}
    found = measure_conflict(run.net, later, run.how)
    products = {name: list(groups.values()) for name, groups in found["products"].items()}
    values: dict[str, Any] = {"rows": len(later.t)}
    for a, b in PAIRS:
        values[f"cos_{a}_{b}"] = cosine(products[f"{a}.{b}"], products[f"{a}.{a}"], products[f"{b}.{b}"])
    values |= {f"norm_{name}": sum(products[f"{name}.{name}"]) ** 0.5 for name in TERMS}
    return values | {"seconds": round(time.monotonic() - began, 3)}
