"""Steps that may be written as a share of the run."""

from alphaflow_cli.recipe.schema import Step


def resolve_step(step: Step, total: int) -> int:
    """The optimiser step meant by a step or a percentage of `total` steps, rounded to the nearest."""
    return step if isinstance(step, int) else round(float(step.removesuffix("%")) / 100 * total)
