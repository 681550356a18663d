"""`alphaflow reference`: statistics of real pictures, with their protocol inside."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from alphaflow_cli.commands.common import (
    bad_option,
    begin,
    check_source,
    complete_path,
    device_option,
    examples,
    json_option,
    print_json,
    print_table,
    processes_option,
    share,
    tell,
)
from alphaflow_cli.commands.labelling import given_labelling, image_column_option
from alphaflow_cli.commands.measuring import Metrics, Weights, batch_option, metrics_option, weights_option
from alphaflow_cli.commands.values import IMAGES, SIZE, Destination, WholeWithin
from alphaflow_cli.files import check_new

if TYPE_CHECKING:
    from alphaflow_cli.evaluate.reference import Reference

EXAMPLES = examples(
    "alphaflow reference shapes:1000 --metrics fd-tiny -o shapes.safetensors",
    "alphaflow reference imagenet/train --size 256 --metrics fid,fdd -o imagenet256-train.safetensors",
)


@click.command(epilog=EXAMPLES)
@click.argument("source", shell_complete=complete_path)
@click.option("-o", "--out", "path", required=True, type=Destination(holds_weights=True), help="The file.")
@metrics_option
@click.option("--size", type=SIZE, help="Crop and resize to this side. Default: leave the pictures as they are.")
@click.option(
    "--crop", type=click.Choice(["square", "adm"]), default="square", show_default=True,
    help="With --size: the largest centred square by Lanczos, or ADM's way; as prep-latents.",
)  # fmt: skip
@click.option("--images", "limit", type=IMAGES, help="Take only this many pictures, spread evenly over the source.")
@bad_option
@click.option("--name", default="", help="Name of the reference in every row. Default: the source's name.")
@click.option(
    "--keep", type=WholeWithin(0, 1_000_000), default=10_000, show_default=True,
    help="Features of single pictures to keep, for KID, precision and recall.",
)  # fmt: skip
@image_column_option
@batch_option
@processes_option
@device_option
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
    crop: Literal["square", "adm"],
    limit: int | None,
    bad: Literal["stop", "skip"],
    name: str,
    keep: int,
    batch: int | None,
    processes: int | None,
    device: str | None,
    weights: Weights,
    work: Path,
    as_json: bool,
) -> None:
    """Measure real pictures once, for eval to compare with.

    It keeps mean, covariance and some single features. SOURCE is a folder, archives, parquet, a .npz with arr_0,
    hf://datasets/NAME, or shapes:N. Where a source holds splits and --size is given, the training split is taken.
    Without --metrics: every network whose weights are on this machine.
    """
    _check(path, size, crop)
    check_source(source)
    begin(f"reference {source}")
    from alphaflow_cli.evaluate.evaluate import ReferenceRequest, measure_reference

    column = given_labelling().columns.image
    request = ReferenceRequest(source, path, metrics, weights, work, size, limit, name, keep, batch, crop, column, bad)
    share(partial(measure_reference, request), lambda made: _print(*made, path, as_json=as_json), processes, device)


def _check(path: Path, size: int | None, crop: str) -> None:
    """Refuse a file that cannot be written, and a crop of pictures that are not cropped."""
    if path.suffix != ".safetensors":
        raise click.UsageError(f"-o {path}: a reference is a .safetensors file")
    if crop != "square" and size is None:
        raise click.UsageError(
            f"--crop {crop}: without --size pictures are measured as they are, and nothing is cropped"
        )
    check_new(path)


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
