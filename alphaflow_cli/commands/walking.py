"""How a trained network is taken, on the command line: its weights, evaluations, sampler, own grid, guidance."""

import math
from collections.abc import Callable
from typing import get_args

import click

from alphaflow_cli.commands.common import Command
from alphaflow_cli.commands.values import GUIDANCE, NFE, WholeWithin
from alphaflow_cli.recipe.schema import MOST_NFE, SamplerChoice
from alphaflow_cli.text import shorten


def to_times(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float] | None:
    """Read a grid such as 1,0.55,0; whether it falls from 1 to 0 is seen where it is walked."""
    if value is None:
        return None
    parts = value.split(",", MOST_NFE + 1)
    if len(parts) > MOST_NFE + 1:
        raise click.BadParameter(f"{shorten(value, 60)!r}: a grid has at most {MOST_NFE:,} steps.")
    try:
        times = [float(part) for part in parts]
    except ValueError:
        times = [math.nan]
    if not all(math.isfinite(time) for time in times):
        raise click.BadParameter(f"{shorten(value, 60)!r}: a grid is numbers from 1 to 0, such as 1,0.55,0.")
    return times


def to_interval(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, float] | None:
    """Read an interval of times such as 0.4,0.65."""
    if value is None:
        return None
    try:
        low, high = (float(part) for part in value.split(",", 2))
    except ValueError:
        low = high = math.nan
    if not 0.0 <= low < high <= 1.0:
        shown = shorten(value, 60)
        raise click.BadParameter(f"{shown!r}: an interval is two times, 0 ≤ LO < HI ≤ 1, such as 0.4,0.65.")
    return low, high


averages_option = click.option(
    "--weights",
    type=click.Choice(["ema", "raw"]),
    default="ema",
    show_default=True,
    help="ema: averaged; raw: not averaged, which only a run folder has.",
)

GUIDING = [
    click.option(
        "--guidance",
        type=GUIDANCE,
        metavar="W",
        help="Scale of the guidance: an input of a model that was trained with all scales; twice the evaluations "
        "of one trained without guidance. Default: the recipe's.",
    ),
    click.option(
        "--interval",
        callback=to_interval,
        metavar="LO,HI",
        help="Times between which guidance acts, for models that take them as an input.",
    ),
    click.option(
        "--guidance-channels",
        type=WholeWithin(1, 4096),
        metavar="N",
        help="Guide only the first N channels, as DiT does with 3. Default: all.",
    ),
]


def walk_options(*, nfe: str) -> Callable[[Command], Command]:
    """Add the options that say how noise becomes data; `nfe` is the help text of --nfe."""
    options = [
        click.option("--nfe", multiple=True, type=NFE, help=nfe),
        click.option(
            "--sampler",
            type=click.Choice(get_args(SamplerChoice)),
            default="auto",
            show_default=True,
            help="auto: the recipe's.",
        ),
        click.option(
            "--times",
            callback=to_times,
            metavar="TIMES",
            help="A grid of your own, such as 1,0.55,0, instead of --nfe. It may begin at 0.9 or above, as in other "
            "systems: the noise then stands for z at that time.",
        ),
        *GUIDING,
    ]

    def add(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return add
