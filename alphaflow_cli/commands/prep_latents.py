"""`alphaflow prep-latents`: pictures in, a latent store out."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from click.core import ParameterSource

from alphaflow_cli.commands.common import (
    bad_option,
    begin,
    check_source,
    complete_path,
    device_option,
    examples,
    requested_threads,
    share,
    tell,
    threads_option,
)
from alphaflow_cli.commands.labelling import given_labelling, labelling_options
from alphaflow_cli.commands.values import IMAGES, PROCESSES, Destination, NumberWithin, WholeWithin
from alphaflow_cli.recipe.schema import Data

if TYPE_CHECKING:
    from alphaflow_cli.latents.encode import StoreRequest

EMBEDDED_SIZE = 32  # the embedded sets are drawn at this size

EPILOG = examples(
    "alphaflow prep-latents imagenet/ --out latents/imagenet",
    "alphaflow prep-latents photos.zip --size 64 --autoencoder none",
    "alphaflow prep-latents hf://datasets/uoft-cs/cifar10 --size 32 --autoencoder none",
    "alphaflow prep-latents shapes:4000 --out latents/shapes",
    "alphaflow prep-latents --verify latents/shapes",
)


@click.command("prep-latents", epilog=EPILOG)
@click.argument("source", shell_complete=complete_path)
@click.option("--out", type=Destination(is_folder=True), help="The store. [default: latents/SOURCE-SIZE-AUTOENCODER]")
@click.option("--size", type=WholeWithin(1, 8192), help="Side of the square picture. [default: 256; embedded: 32]")
@click.option(
    "--autoencoder",
    metavar="ID|DIR|FILE|none",
    help=f"Hub id, folder or weights file; none stores pixels. [default: {Data.autoencoder}; embedded: none]",
)
@click.option(
    "--dtype",
    type=click.Choice(["fp16", "fp32"]),
    default="fp16",
    show_default=True,
    help="Form of the numbers on disk.",
)
@click.option(
    "--crop",
    type=click.Choice(["square", "adm"]),
    default="square",
    show_default=True,
    help="square: the largest centred square, by Lanczos; adm: halved by box, short side by bicubic, then the square.",
)
@labelling_options
@click.option("--flips", is_flag=True, help="Mirror images, too. With latents they take twice the disk.")
@click.option(
    "--batch", type=WholeWithin(0, 65_536), default=0, help="Pictures encoded at once. [default: by the size]"
)
@click.option("--processes", type=PROCESSES, help="[default: one per GPU, else one]")
@device_option
@threads_option
@click.option("--limit", type=IMAGES, help="Take only this many pictures, spread evenly over the source.")
@bad_option
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "tf32", "bf16"]),
    default="auto",
    show_default=True,
    help="Precision of the encoder. auto: on a GPU the fastest with a small measured error, otherwise fp32.",
)
@click.option(
    "--max-megapixels",
    type=NumberWithin(0, 100_000, open_below=True),
    default=200.0,
    show_default=True,
    help="A larger picture counts as bad.",
)
@click.option("--estimate", "only_estimate", is_flag=True, help="Show disk and time; write nothing.")
@click.option("--verify", "only_verify", is_flag=True, help="SOURCE is a store: read every byte against its checksum.")
def command(
    source: str,
    out: Path | None,
    size: int | None,
    autoencoder: str | None,
    crop: Literal["square", "adm"],
    dtype: str,
    flips: bool,
    batch: int,
    processes: int | None,
    device: str | None,
    limit: int | None,
    bad: Literal["stop", "skip"],
    precision: str,
    max_megapixels: float,
    only_estimate: bool,
    only_verify: bool,
) -> None:
    """Turn pictures into a latent store. Running it again resumes.

    SOURCE is a folder with one folder per class (any depth) or with a table of labels, a zip or tar of one, parquet,
    many archives ('part-{000..146}.tar'), hf://datasets/USER/NAME, or an embedded set: shapes:N or glyphs:N.
    """
    if only_verify:
        return verify_alone(Path(source))
    check_source(source)
    given = given_labelling()
    begin(f"prep-latents {source}")
    from alphaflow_cli.latents.encode import StoreRequest
    from alphaflow_cli.latents.plan import default_out

    size, autoencoder = _or_default(source, size, autoencoder)
    max_pixels = round(max_megapixels * 1e6)
    request = StoreRequest(
        source, size, autoencoder, dtype, flips, batch, limit or 0, bad, precision, max_pixels, crop, given
    )
    store = out or default_out(source, size, autoencoder, crop)
    return (estimate if only_estimate else prepare)(request, store, processes, device)


def verify_alone(store: Path) -> None:
    """Read a store against its checksums; refuse other options beside --verify, which would do nothing."""
    context = click.get_current_context()
    more = [
        param.opts[-1]
        for param in context.command.params
        if isinstance(param, click.Option) and param.name not in (None, "only_verify")
        if context.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE
    ]
    if more:
        raise click.UsageError(
            f"--verify reads the store that SOURCE names, and changes nothing: leave out {', '.join(more)}."
        )
    from alphaflow_cli.latents.prepare import verify

    print_lines(verify(store))


def _or_default(source: str, size: int | None, autoencoder: str | None) -> tuple[int, str]:
    """Size and autoencoder as given, or those that the source wants."""
    from alphaflow_cli.data.sources import is_embedded

    own = (EMBEDDED_SIZE, "none") if is_embedded(source) else (Data.image_size, Data.autoencoder)
    return size or own[0], autoencoder or own[1]


def estimate(request: "StoreRequest", store: Path, processes: int | None, device: str | None) -> None:
    """Print the disk and the time that making the store would take; of a launcher's processes the first does it."""
    from alphaflow_cli.runtime.launch import first_of_launched

    if (launched := first_of_launched()) is None:
        return
    from alphaflow_cli.latents.plan import plan_job
    from alphaflow_cli.latents.prepare import count_encoders, estimate_store
    from alphaflow_cli.runtime.processes import Processes, choose_device
    from alphaflow_cli.runtime.threads import threads_bounded

    count = launched or count_encoders(request.autoencoder, processes, device)
    several = Processes(choose_device(device), size=count)
    with threads_bounded(requested_threads(), on_cpu=several.device.type == "cpu", is_main=True):
        print_lines(estimate_store(plan_job(request, store, several), several))


def prepare(request: "StoreRequest", store: Path, processes: int | None, device: str | None) -> None:
    """Make the store here, or in N processes of which the first prints."""
    from alphaflow_cli.latents.prepare import count_encoders, describe_store, prepare_store

    work = partial(prepare_store, request, store)
    count = partial(count_encoders, request.autoencoder, device=device)
    needs_gpu = request.autoencoder != "none"
    share(work, lambda made: print_lines(describe_store(made)), processes, device, needs_gpu=needs_gpu, count=count)


def print_lines(lines: list[str]) -> None:
    """Print the facts about a store; the last line is its path."""
    for line in lines:
        tell(line)
