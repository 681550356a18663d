"""What the verbs that read pictures share on the command line: where the pictures and their classes stand in tables."""

from collections.abc import Callable
from typing import Any

import click

from alphaflow_cli.commands.common import Command
from alphaflow_cli.data.tables import Columns, Labelling

KEPT = "alphaflow_cli.labelling"  # of a context's meta: what these options hold


def image_column_option(function: Command) -> Command:
    """Add `--image-column NAME` alone, for verbs that need no classes; `given_labelling` has it."""
    option: Callable[[Command], Command] = _kept(
        "--image-column", metavar="NAME", help="Column of the pictures, in parquet files."
    )
    return option(function)


def labelling_options(function: Command) -> Command:
    """Add --labels, --unlabelled, --image-column, --label-column; `given_labelling` has them."""
    options = [
        _kept("--labels", metavar="FILE", help="A csv, jsonl or json of pictures' names and classes."),
        _kept("--unlabelled", is_flag=True, help="All pictures are one class."),
        _kept("--image-column", metavar="NAME", help="Column of the pictures (parquet) or of their names (table)."),
        _kept("--label-column", metavar="NAME", help="Column of the classes (parquet, table), or their key (json)."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def given_labelling() -> Labelling:
    """What these options say on the command line that is running."""
    kept: dict[str, Any] = click.get_current_context().meta.get(KEPT, {})
    table, column = kept.get("labels") or "", kept.get("label_column") or ""
    if kept.get("unlabelled") and (table or column):
        raise click.UsageError("--unlabelled: all pictures are one class, so neither --labels nor a column is needed")
    return Labelling(table, bool(kept.get("unlabelled")), Columns(kept.get("image_column") or "", column))


def _kept(name: str, **options: Any) -> Any:
    """Make an option that goes into the context, and not into the command's long list of arguments."""
    return click.option(name, expose_value=False, callback=_keep, **options)


def _keep(ctx: click.Context, param: click.Parameter, value: object) -> None:
    ctx.meta.setdefault(KEPT, {})[param.name] = value
