"""What `eval`, `reference` and `ema` share on the command line: metrics, weights, batch."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import click

from alphaflow_cli.commands.common import Command, check_source, complete_path
from alphaflow_cli.commands.values import BATCH
from alphaflow_cli.recipe.schema import Metric

Metrics = tuple[Metric, ...]
Weights = dict[str, Path]
STATISTICS = (".safetensors", ".npz", ".pkl", ".pickle", ".pt")  # endings of their files; all else are pictures
NETWORKS = ("inception", "dinov2", "clip")


def metrics_option(function: Command) -> Command:
    """Add `--metrics fid,fdd`; the command receives a tuple, which is empty where the option was left out."""
    names = ", ".join(get_args(Metric))
    option = click.option("--metrics", callback=_parse_metrics, metavar="NAME,...", help=f"Any of {names}.")
    return option(function)


def reference_option(text: str) -> Callable[[Command], Command]:
    """Add `--reference FILE|SOURCE`, completed by paths; `text` says what it is for."""

    def check(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
        if value and not value.endswith(STATISTICS):
            check_source(value)
        return value

    return click.option("--reference", metavar="FILE|SOURCE", callback=check, shell_complete=complete_path, help=text)


def weights_option(function: Command) -> Command:
    """Add `--weights inception=FILE`, which may be repeated; the command receives a table of files by network."""
    text = "Weights of a feature network that are not in a usual place. May be repeated."
    return click.option("--weights", multiple=True, callback=_parse_weights, metavar="NETWORK=FILE", help=text)(
        function
    )


def batch_option(function: Command) -> Command:
    """Add `--batch N`, the number of pictures that a feature network sees at once."""
    text = "Pictures that a feature network sees at once. Changes no number. Default: 64; Inception on a GPU 256."
    return click.option("--batch", type=BATCH, help=text)(function)


def _parse_metrics(ctx: click.Context, param: click.Parameter, value: str | None) -> Metrics:
    known = {str(name): name for name in get_args(Metric)}
    names = [name.strip() for name in value.split(",")] if value else []
    for name in names:
        if name not in known:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(known)}")
    return tuple(dict.fromkeys(known[name] for name in names))


def _parse_weights(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> Weights:
    files: Weights = {}
    for each in value:
        network, _, file = each.partition("=")
        if network not in NETWORKS or not file:
            raise click.BadParameter(f"{each!r}: write NETWORK=FILE, the network one of {', '.join(NETWORKS)}")
        files[network] = Path(file)
    return files
