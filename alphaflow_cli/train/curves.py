"""What a recipe looks like over its steps: alpha and its phases, the share of r = t rows, the learning rate."""

from collections.abc import Callable

from alphaflow_cli.charts import chart
from alphaflow_cli.recipe import plan
from alphaflow_cli.recipe.schema import Recipe

POINTS = 600  # along the run; each change of phase has its own besides
BANDS: dict[plan.PhaseKind, tuple[str, str]] = {
    "flow": ("α = 1: flow matching", chart.SHADES[0]),
    "between": ("0 < α < 1", chart.SHADES[1]),
    "derivative": ("α = 0: JVP", chart.SHADES[2]),
}


def recipe_chart(recipe: Recipe) -> chart.Chart:
    """Draw alpha, the share of r = t rows and the learning rate over the steps, the phases of alpha shaded."""
    phases, steps = plan.phases(recipe), recipe.train.steps
    cuts = {step for phase in phases for step in (phase.first, phase.until - 1)}
    xs = sorted({round(i * (steps - 1) / POINTS) for i in range(POINTS + 1)} | cuts)

    def curve(name: str, at: Callable[[int], float], colour: str) -> list[chart.Line]:
        return [chart.Line(name, [(step, at(step)) for step in xs], colour)]

    return chart.Chart(
        title=f"Recipe {recipe.name}",
        subtitle=", ".join([f"{steps:,} steps, batch {recipe.train.batch:,}", *_changes(phases)]),
        x_label="step",
        x_range=(0, steps),
        bands=[chart.Band(phase.first, phase.until, *BANDS[phase.kind]) for phase in phases],
        panels=[
            chart.Panel("α", curve("α", plan.alpha_at(recipe), chart.BLUE), (0, 1.05), height=190),
            chart.Panel(
                "equal_share: share of rows with r = t",
                curve("equal_share", plan.equal_share_at(recipe), chart.ORANGE),
                (0, 1.05),
                height=110,
            ),
            chart.Panel(
                "learning rate",
                curve("lr", plan.learning_rate_at(recipe), chart.GREEN),
                (0, 1.15 * recipe.optim.lr),
                height=110,
            ),
        ],
    )


def _changes(phases: list[plan.Phase]) -> list[str]:
    """The steps at which the kind of target changes, in words."""
    names = {"flow": "α = 1", "between": "0 < α < 1", "derivative": "JVP"}
    return [f"{names[phase.kind]} from {phase.first:,}" for phase in phases[1:]]
