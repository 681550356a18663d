"""`alphaflow reference`: statistics of real pictures, with their protocol inside."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from alphaflow_cli.commands.common import (
    IMAGES,
    PROCESSES,
    SIZE,
    Destination,
    WholeWithin,
    examples,
    json_option,
    print_json,
    print_table,
    share,
    tell,
)
from alphaflow_cli.commands.measuring import Metrics, Weights, batch_option, metrics_option, weights_option
from alphaflow_cli.files import check_new

if TYPE_CHECKING:
    from alphaflow_cli.evaluate.reference import Reference

EXAMPLES = examples(
    "alphaflow reference shapes:1000 --metrics fd-tiny -o shapes.safetensors",
    "alphaflow reference imagenet/train --size 256 --metrics fid,fdd -o imagenet256-train.safetensors",
)


@click.command(epilog=EXAMPLES)
@click.argument("source")
@click.option("-o", "--out", "path", required=True, type=Destination(holds_weights=True), help="The file.")
@metrics_option
@click.option("--size", type=SIZE, help="Centre crop, Lanczos to this side; else as they are.")
@click.option("--images", "limit", type=IMAGES, help="Only so many pictures, taken evenly.")
@click.option("--name", default="", help="How the reference is called in every row; the source's name otherwise.")
@click.option(
    "--keep", type=WholeWithin(0, 1_000_000), default=10_000, show_default=True,
    help="Single features kept, for KID, precision and recall.",
)  # fmt: skip
@batch_option
@click.option("--processes", type=PROCESSES, help="Processes to share the work. Default: one per GPU.")
@weights_option
@click.option(
    "--work", type=Destination(is_folder=True, holds_weights=True), default=Path("evals"), show_default=True,
    help="Folder for unfinished work.",
)  # fmt: skip
@json_option
def command(
    source: str,
    path: Path,
    metrics: Metrics,
    size: int | None,
    limit: int | None,
    name: str,
    keep: int,
    batch: int,
    processes: int | None,
    weights: Weights,
    work: Path,
    as_json: bool,
) -> None:
    """Measure real pictures once, for eval to compare with.

    Kept are mean, covariance and some single features. SOURCE is a folder, a zip, a tar, a .npz with arr_0,
    hf://datasets/NAME, or shapes:N. Where a source holds splits and --size is given, the training split is taken.
    Without --metrics: every network whose weights are on this machine.
    """
    if path.suffix != ".safetensors":
        raise click.UsageError(f"-o {path}: a reference is a .safetensors file")
    check_new(path)

    from alphaflow_cli.evaluate.evaluate import ReferenceRequest, measure_reference

    request = ReferenceRequest(source, path, metrics, weights, work, size, limit, name, keep, batch)
    share(partial(measure_reference, request), lambda made: _print(*made, path, as_json=as_json), processes)


def _print(reference: "Reference", warnings: list[str], path: Path, *, as_json: bool) -> None:
    for warning in warnings:
        tell(f"warning: {warning}", err=True)
    spaces = {key: each.space for key, each in reference.stats.items()}
    if as_json:
        print_json({"path": str(path), "facts": reference.facts, "spaces": {k: vars(v) for k, v in spaces.items()}})
        return
    rows: list[tuple[str, ...]] = [
        (key, str(each.dim), each.network, each.weights_sha256[:8] or "none") for key, each in spaces.items()
    ]
    print_table(rows, head=("features", "dim", "network", "weights"))
    click.echo(str(path))
