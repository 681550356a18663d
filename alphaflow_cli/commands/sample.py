"""`alphaflow sample`: pictures from a checkpoint."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import click

from alphaflow_cli.commands.common import (
    autoencoder_option,
    begin,
    check_checkpoint,
    checkpoint_argument,
    decoder_option,
    device_option,
    examples,
    processes_option,
    share,
    threads_option,
)
from alphaflow_cli.commands.values import BATCH, Destination
from alphaflow_cli.commands.walking import averages_option, walk_options
from alphaflow_cli.text import counted, shorten

if TYPE_CHECKING:
    from alphaflow_cli.sample.generator import DecoderChoice

EXAMPLES = examples(
    "alphaflow sample runs/quickstart",
    "alphaflow sample runs/quickstart --seeds 0-9 --classes 3,7 --nfe 2 --out pictures",
    "alphaflow sample runs/quickstart --nfe 1 --nfe 2 --nfe 4 --grid steps.png",
    "alphaflow sample runs/b2 --seeds 0-49999 --out samples.npz --processes 8",
)

MOST_SEEDS = 100_000_000  # more is a slip of the hand
ONE_PICTURE = (".png", ".jpg", ".jpeg", ".webp", ".gif")  # a folder of such a name is not what was meant
OTHER_FILES = (".npy", ".tar", ".zip")


class Seeds(Sequence[int]):
    """The seeds of ranges such as 0-63,70: as many as one likes take no memory."""

    def __init__(self, ranges: Sequence[range]) -> None:
        self.ranges = ranges

    def __len__(self) -> int:
        return sum(len(each) for each in self.ranges)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        if isinstance(place, int):
            return self[range(len(self))[place] : range(len(self))[place] + 1][0]
        start, stop, _ = place.indices(len(self))
        taken: list[int] = []
        for each in self.ranges:
            taken.extend(each[max(start, 0) : max(stop, 0)])
            start, stop = start - len(each), stop - len(each)
        return taken[:: place.step or 1]

    def __str__(self) -> str:
        return ",".join(f"{each[0]}-{each[-1]}" if len(each) > 1 else str(each[0]) for each in self.ranges)


def to_seeds(ctx: click.Context, param: click.Parameter, value: str) -> Seeds:
    """0-63, 5, or a comma-separated list of both."""
    ranges: list[range] = []
    for part in value.split(","):
        low, dash, high = part.strip().partition("-")
        first, last = (int(s) if s.isdecimal() and len(s) <= 20 else None for s in (low, high if dash else low))
        if first is None or last is None or last < first:
            raise click.BadParameter(f"{shorten(value, 60)!r}: seeds are numbers and ranges such as 0-63 or 1,5,9.")
        if last >= 2**64:
            raise click.BadParameter(f"{shorten(value, 60)!r}: seeds lie below 2^64.")
        ranges.append(range(first, last + 1))
    if sum(each.stop - each.start for each in ranges) > MOST_SEEDS:
        raise click.BadParameter(f"{shorten(value, 60)!r}: more than {MOST_SEEDS:,} pictures.")
    return Seeds(ranges)


class PicturesOut(click.ParamType):  # type: ignore[type-arg]
    """A folder for PNG files, or one .npz file."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if path.suffix.lower() in (*ONE_PICTURE, *OTHER_FILES) and not path.is_dir():
            grid = f"; for one picture of all: --grid {path}" if path.suffix.lower() in ONE_PICTURE else ""
            self.fail(f"{str(path)!r}: --out is a folder for pictures, or FILE.npz{grid}.", param, ctx)
        if path.suffix.lower() == ".npz" != path.suffix and not path.is_dir():
            self.fail(f"{str(path)!r}: write .npz in small letters; a folder would be made of this name.", param, ctx)
        return Destination(is_folder=path.suffix != ".npz").convert(value, param, ctx)


class LatentsOut(Destination):
    """An .npy file: what numpy writes under another name is not found again."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = super().convert(value, param, ctx)
        if path.suffix != ".npy":
            self.fail(f"{str(path)!r}: latents are a file .npy.", param, ctx)
        return path


@click.command("sample", epilog=EXAMPLES)
@checkpoint_argument("checkpoint", "CKPT")
@click.option(
    "--seeds", callback=to_seeds, default="0-63", metavar="SEEDS", show_default=True, help="One picture per seed."
)
@click.option("--classes", default="", help="Numbers or names, comma-separated, in turn. Default: drawn per seed.")
@walk_options(nfe="Network evaluations per picture; repeat to compare. Default: 1.")
@averages_option
@autoencoder_option
@decoder_option
@click.option("--compile", "compiled", is_flag=True, help="Compile the decoder: for 12,000 pictures and more on a GPU.")
@click.option("--out", type=PicturesOut(), help="Folder for one PNG per picture, or FILE.npz for one array of all.")
@click.option("--grid", type=Destination(), help="One picture of all, at most the first 1,000: .png, .jpg or .webp.")
@click.option("--latents", type=LatentsOut(), help="The network's own latents as .npy (n, C, h, w).")
@click.option("--batch", type=BATCH, default=64, show_default=True, help="Pictures at once.")
@processes_option
@device_option
@threads_option
def command(
    checkpoint: str,
    seeds: Seeds,
    classes: str,
    nfe: tuple[int, ...],
    sampler: str,
    times: list[float] | None,
    guidance: float | None,
    guidance_channels: int | None,
    interval: tuple[float, float] | None,
    weights: str,
    autoencoder: str,
    decoder: "DecoderChoice",
    compiled: bool,
    out: Path | None,
    grid: Path | None,
    latents: Path | None,
    batch: int,
    processes: int | None,
    device: str | None,
) -> None:
    """Draw pictures from CKPT: a file, a run folder, or a Hub id user/repo[@revision].

    The picture of a seed is the same whatever the batch, the order and the number of processes. Running the same
    command again resumes. Without --out, --grid and --latents, a grid goes into the run, or beside a checkpoint file.
    """
    check_steps(nfe, times, one=latents or (out if out is not None and out.suffix == ".npz" else None))
    check_checkpoint(checkpoint, classes)
    grid = grid if out or grid or latents else grid_beside(checkpoint)
    begin(f"sample {checkpoint}: {counted(len(seeds), 'picture')}")
    from alphaflow_cli.sample.plan import SampleRequest, check_request
    from alphaflow_cli.sample.write import sample_to_files

    request = SampleRequest(
        checkpoint=checkpoint, seeds=seeds, classes=classes, nfe=nfe or (1,), sampler=sampler, times=times,
        guidance=guidance, guidance_channels=guidance_channels, interval=interval, weights=weights,
        autoencoder=autoencoder, decoder=decoder, compiled=compiled, out=out, grid=grid, latents=latents, batch=batch,
    )  # fmt: skip
    check_request(request)
    share(partial(sample_to_files, request), print_paths, processes, device)


def grid_beside(checkpoint: str) -> Path:
    """Where a grid goes that was given no place: into the run, or beside the checkpoint."""
    from alphaflow_cli.model.find import default_grid

    return Destination().convert(default_grid(checkpoint), None, None)


def check_steps(nfe: tuple[int, ...], times: list[float] | None, *, one: Path | None) -> None:
    """Refuse two ways to say the steps, and several numbers of steps for `one` file that holds a single array."""
    if times is not None and nfe:
        raise click.UsageError("--times and --nfe exclude each other: the grid says how many steps there are.")
    if len(nfe) > 1 and one is not None:
        raise click.UsageError(f"{'--out FILE.npz' if one.suffix == '.npz' else '--latents'} wants one --nfe.")


def print_paths(paths: Sequence[Path]) -> None:
    """Print what was written, one path a line."""
    for path in paths:
        click.echo(path)
