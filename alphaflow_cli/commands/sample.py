"""`alphaflow sample`: pictures from a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from alphaflow_cli.commands.common import (
    BATCH,
    PROCESSES,
    Destination,
    autoencoder_option,
    decoder_option,
    examples,
)
from alphaflow_cli.commands.walking import walk_options
from alphaflow_cli.text import shorten

if TYPE_CHECKING:
    from alphaflow_cli.sample.generator import DecoderChoice

EXAMPLES = examples(
    "alphaflow sample runs/quickstart --grid grid.png",
    "alphaflow sample runs/quickstart --seeds 0-9 --classes 3,7 --nfe 2 --out pictures",
    "alphaflow sample runs/quickstart --nfe 1 --nfe 2 --nfe 4 --grid steps.png",
)

MOST_SEEDS = 1_000_000  # the pictures of one command are held in memory


def to_seeds(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    """0-63, 5, or a comma-separated list of both."""
    found: list[int] = []
    for part in value.split(","):
        low, dash, high = part.strip().partition("-")
        first, last = (int(s) if s.isdecimal() and len(s) <= 20 else None for s in (low, high if dash else low))
        if first is None or last is None or last < first:
            raise click.BadParameter(f"{shorten(value, 60)!r}: seeds are numbers and ranges such as 0-63 or 1,5,9.")
        if last >= 2**64:
            raise click.BadParameter(f"{shorten(value, 60)!r}: seeds lie below 2^64.")
        if len(found) + last - first >= MOST_SEEDS:
            raise click.BadParameter(
                f"{shorten(value, 60)!r}: more than {MOST_SEEDS:,} pictures; sample them in several commands."
            )
        found.extend(range(first, last + 1))
    return found


@click.command("sample", epilog=EXAMPLES)
@click.argument("checkpoint", metavar="CKPT")
@click.option(
    "--seeds", callback=to_seeds, default="0-63", metavar="SEEDS", show_default=True, help="One picture per seed."
)
@click.option("--classes", default="", help="Numbers or names, comma-separated, in turn. Default: drawn per seed.")
@walk_options(nfe="Network evaluations per picture; repeat to compare. Default: 1.")
@click.option("--weights", type=click.Choice(["ema", "raw"]), default="ema", show_default=True, help="Which weights.")
@autoencoder_option
@decoder_option
@click.option("--out", type=Destination(is_folder=True), help="Folder for one PNG per picture.")
@click.option("--grid", type=Destination(), help="One PNG with all of them.")
@click.option("--latents", type=Destination(), help="The network's own latents as .npy (n, C, h, w).")
@click.option("--batch", type=BATCH, default=64, show_default=True, help="Pictures at once.")
@click.option("--processes", type=PROCESSES, help="Processes to share the work. Default: one per GPU.")
def command(
    checkpoint: str,
    seeds: list[int],
    classes: str,
    nfe: tuple[int, ...],
    sampler: str,
    times: list[float] | None,
    guidance: float | None,
    guidance_channels: int | None,
    weights: str,
    autoencoder: str,
    decoder: "DecoderChoice",
    out: Path | None,
    grid: Path | None,
    latents: Path | None,
    batch: int,
    processes: int | None,
) -> None:
    """Draw pictures from CKPT: a file, a run folder, or a Hub id user/repo[@revision].

    The picture of a seed is the same whatever the batch, the order and the number of processes.
    """
    if times is not None and nfe:
        raise click.UsageError("--times and --nfe exclude each other: the grid says how many steps there are.")
    if latents is not None and len(nfe) > 1:
        raise click.UsageError("--latents wants one --nfe.")
    from alphaflow_cli.sample.write import SampleRequest, sample_to_files

    request = SampleRequest(
        checkpoint=checkpoint, seeds=seeds, classes=classes, nfe=nfe or (1,), sampler=sampler, times=times,
        guidance=guidance, guidance_channels=guidance_channels, weights=weights, autoencoder=autoencoder,
        decoder=decoder, out=out, grid=grid, latents=latents, batch=batch, processes=processes or 0,
    )  # fmt: skip
    for path in sample_to_files(request):
        click.echo(path)
