"""`alphaflow ema`: averages of other half-lives, after training."""

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from alphaflow_cli.commands.common import (
    begin,
    device_option,
    examples,
    json_option,
    print_json,
    print_table,
    processes_option,
    share,
)
from alphaflow_cli.commands.measuring import Metrics, metrics_option, reference_option
from alphaflow_cli.commands.values import IMAGES, NFE, Destination, NumberWithin, UserPath, WholeWithin
from alphaflow_cli.text import shorten

if TYPE_CHECKING:
    from alphaflow_cli.ema.averages import Average

MOST_MOVED = 100  # times the change
EXAMPLES = examples(
    "alphaflow ema runs/b2 --half-life 2000 --half-life 20000",
    "alphaflow ema runs/b2 --power 0.05 --power 0.10 --metrics fid --images 10000 --nfe 1",
    "alphaflow ema runs/quickstart --half-life 25 --no-scores",
)


def to_merges(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[tuple[int, float], ...]:
    """Read 4000:0.5, which moves the average on by half of its change since step 4,000."""
    merges = []
    for text in value:
        step, _, factor = text.partition(":")
        try:
            number = float(factor)
        except ValueError:
            number = math.nan
        if not (step.isdecimal() and len(step) < 10 and abs(number) <= MOST_MOVED and number != 0):
            raise click.BadParameter(f"{shorten(text, 60)!r}: write STEP:FACTOR, such as 4000:0.5.")
        merges.append((int(step), number))
    return tuple(dict.fromkeys(merges))


@click.command("ema", epilog=EXAMPLES)
@click.argument("run", metavar="RUN", type=UserPath())
@click.option(
    "--half-life",
    "half_lives",
    multiple=True,
    type=NumberWithin(0, 100_000_000, open_below=True),
    help="Steps. May be repeated.",
)
@click.option(
    "--power",
    "widths",
    multiple=True,
    type=NumberWithin(0.001, 0.28),
    metavar="SIGMA",
    help="A power function of this width, relative to the run so far, such as 0.10. May be repeated.",
)
@click.option(
    "--merge",
    "merges",
    multiple=True,
    callback=to_merges,
    metavar="STEP:FACTOR",
    help="The average moved on by this factor of its change since that step. May be repeated.",
)
@click.option("--step", type=WholeWithin(1, 100_000_000), help="The checkpoint's step. Default: the newest.")
@click.option("--scores/--no-scores", "scored", default=True, help="Draw and measure each average, or only make it.")
@click.option("--nfe", multiple=True, type=NFE, help="Evaluations per picture; repeatable. Default: the recipe's.")
@metrics_option
@reference_option("What to compare with. Default: the recipe's.")
@click.option("--images", type=IMAGES, help="Number of pictures. Default: the recipe's eval.quick_images.")
@processes_option
@device_option
@click.option(
    "--out", type=Destination(is_folder=True, holds_weights=True), help="Folder. Default: RUN/averages/step-N."
)
@json_option
def command(
    run: Path,
    half_lives: tuple[float, ...],
    widths: tuple[float, ...],
    merges: tuple[tuple[int, float], ...],
    step: int | None,
    scored: bool,
    nfe: tuple[int, ...],
    metrics: Metrics,
    reference: str | None,
    images: int | None,
    processes: int | None,
    device: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Make averages of the weights that a run did not keep, of those that it kept, and score all in one table.

    Each becomes a checkpoint, which sample, eval and push take. The table says how far it is expected to be
    from the true average. The averages that the run kept are in it too; as a check, each is made of the others.
    """
    from alphaflow_cli.model.find import check_run

    if not scored and (nfe or metrics or images or reference):
        raise click.UsageError("--no-scores measures nothing: leave --nfe, --metrics, --reference and --images out.")
    check_run(run)
    begin(f"ema {run}")
    from alphaflow_cli.ema.averages import EmaRequest, average_again

    request = EmaRequest(
        run=run, half_lives=tuple(dict.fromkeys(half_lives)), widths=tuple(dict.fromkeys(widths)), merges=merges,
        step=step,        scored=scored, metrics=metrics, nfe=nfe, images=images, reference=reference, out=out,
    )  # fmt: skip
    share(partial(average_again, request), partial(show, as_json=as_json), processes, device)


def show(made: "tuple[list[Average], Path, int]", *, as_json: bool) -> None:
    """Print the table, the grid and the folder."""
    averages, folder, step = made
    if as_json:
        listed = [
            {"name": each.name, "path": str(each.path), "expected_error": each.expected_error, "check": each.check}
            | {"evaluations": [evaluation.as_dict() for evaluation in each.evaluations]}
            for each in averages
        ]
        print_json({"step": step, "averages": listed, "path": str(folder)})
        return
    head, rows = table(averages)
    print_table(rows, head=head)
    if any(average.evaluations for average in averages):
        click.echo(str(folder / "grid.png"))
    click.echo(str(folder))


def table(averages: "list[Average]") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The head and the lines: each average with its errors, then its scores, one column for each."""
    from alphaflow_cli.evaluate.results import value_text

    measured = [[row for each in average.evaluations for row in each.rows] for average in averages]
    cells = [{f"{row.name} at {row.pictures['nfe']} NFE": value_text(row) for row in rows} for rows in measured]
    columns = list(dict.fromkeys(name for each in cells for name in each))
    lines = []
    for average, scores in zip(averages, cells, strict=True):
        errors = ("" if error is None else f"{error:.1e}" for error in (average.expected_error, average.check))
        lines.append((average.name, *errors, *(scores.get(name, "") for name in columns)))
    return ("average", "expected error", "check", *columns), lines
