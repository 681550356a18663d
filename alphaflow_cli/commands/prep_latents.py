"""`alphaflow prep-latents`: pictures in, a latent store out."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from alphaflow_cli.commands.common import examples
from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.recipe.schema import Data

if TYPE_CHECKING:
    from alphaflow_cli.engine.estimate import Estimate

GLYPH_SIZE = 32  # the embedded set is drawn at this size

EPILOG = examples(
    "alphaflow prep-latents imagenet/ --out latents/imagenet",
    "alphaflow prep-latents photos.zip --size 64 --autoencoder none",
    "alphaflow prep-latents glyphs:4000 --out latents/glyphs",
    "alphaflow prep-latents --verify latents/glyphs",
)


@click.command("prep-latents", epilog=EPILOG)
@click.argument("source")
@click.option("--out", type=click.Path(path_type=Path), help="The store. [default: latents/SOURCE-SIZE-AUTOENCODER]")
@click.option("--size", type=click.IntRange(1, 8192), help="Side of the square picture. [default: 256; glyphs: 32]")
@click.option(
    "--autoencoder",
    metavar="ID|DIR|FILE|none",
    help=f"By Hub id, folder or weights file; none stores pixels. [default: {Data.autoencoder}; glyphs: none]",
)
@click.option("--dtype", type=click.Choice(["fp16", "fp32"]), default="fp16", show_default=True, help="On disk.")
@click.option("--flips", is_flag=True, help="Store the mirror images' latents, too (twice the disk).")
@click.option("--batch", type=click.IntRange(0), default=0, help="Pictures encoded at once. [default: by the size]")
@click.option("--processes", type=click.IntRange(1), help="[default: one per GPU, else one]")
@click.option("--limit", type=click.IntRange(1), help="Take so many pictures, spread evenly over the source.")
@click.option(
    "--bad",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="A file that is no whole picture ends the run, or is left out and counted.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "tf32", "bf16"]),
    default="auto",
    show_default=True,
    help="Of the encoder. auto: on a GPU the fastest whose measured error is small, else fp32.",
)
@click.option(
    "--max-megapixels",
    type=click.FloatRange(0, min_open=True),
    default=200.0,
    show_default=True,
    help="A larger picture is taken for a bomb.",
)
@click.option("--estimate", "only_estimate", is_flag=True, help="Say disk and time, write nothing.")
@click.option("--verify", "only_verify", is_flag=True, help="SOURCE is a store: read every byte against its checksum.")
def command(
    source: str,
    out: Path | None,
    size: int | None,
    autoencoder: str | None,
    dtype: str,
    flips: bool,
    batch: int,
    processes: int | None,
    limit: int | None,
    bad: Literal["stop", "skip"],
    precision: str,
    max_megapixels: float,
    only_estimate: bool,
    only_verify: bool,
) -> None:
    """Turn pictures into a latent store that training reads. Running it again resumes.

    SOURCE is a folder with one folder per class (any depth), a zip or tar of one, hf://datasets/USER/NAME, or glyphs:N
    (the embedded set). Pictures directly in the folder are one class.
    """
    if only_verify:
        return verify(Path(source))
    from alphaflow_cli.engine.estimate import estimate
    from alphaflow_cli.engine.prepare import default_processes, plan_job, prepare
    from alphaflow_cli.engine.prepare_plan import Request, default_out

    glyphs = source.startswith("glyphs:")
    size = size or (GLYPH_SIZE if glyphs else Data.image_size)
    autoencoder = autoencoder or ("none" if glyphs else Data.autoencoder)
    max_pixels = round(max_megapixels * 1e6)
    request = Request(source, size, autoencoder, dtype, flips, batch, limit or 0, bad, precision, max_pixels)
    out, processes = out or default_out(source, size, autoencoder), processes or default_processes()
    if only_estimate:
        return print_estimate(estimate(plan_job(request, out, processes)[0], out, processes), out)
    prepare(request, out, processes=processes, shown=True)
    print_store(out)
    return None


def verify(store: Path) -> None:
    """Every byte against its checksum."""
    from alphaflow_cli.data.store import verify_store

    faults = verify_store(store)
    if faults:
        raise AlphaflowError("\n".join(faults))
    print_store(store)


def print_store(store: Path) -> None:
    """What is in it, and where it is."""
    from alphaflow_cli.data.manifest import read_manifest
    from alphaflow_cli.engine.progress import size

    manifest = read_manifest(store)
    plan, total = manifest.plan, sum(shard.bytes for shard in manifest.shards)
    shape = "x".join(str(length) for length in plan.latent)
    click.echo(
        f"{manifest.count:,} pictures, {plan.classes:,} classes, {plan.kind} {shape} {plan.dtype}, {size(total)}"
    )
    if manifest.bad:
        first = manifest.bad[0]
        click.echo(
            f"left out: {len(manifest.bad):,}, the first {first['name']!r}: {first['why']} (all in manifest.json)"
        )
    click.echo(str(store))


def print_estimate(found: "Estimate", out: Path) -> None:
    """Disk and time."""
    from alphaflow_cli.engine.progress import duration, size

    shape = "x".join(str(length) for length in found.latent)
    click.echo(f"pictures: {found.images:,}, {found.todo:,} to do in {found.shards:,} shards, latents {shape}")
    click.echo(f"disk: {size(found.bytes_needed)} needed, {size(found.bytes_free)} free")
    rate = f"{found.images_per_second:.1f} pictures/s, tried on {found.tried}"
    click.echo(f"time: {duration(found.seconds)} ({rate})")
    click.echo(str(out))
