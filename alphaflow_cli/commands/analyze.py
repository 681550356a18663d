"""`alphaflow analyze`: the conflict between the objective's two halves, measured."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from alphaflow_cli.commands.common import (
    begin,
    check_checkpoint,
    checkpoint_argument,
    device_option,
    examples,
    json_option,
    print_json,
    print_table,
    processes_option,
    share,
    tell,
)
from alphaflow_cli.commands.values import BATCH, SEED, Destination, UserPath, WholeWithin
from alphaflow_cli.commands.walking import averages_option

EXAMPLES = examples(
    "alphaflow analyze runs/quickstart --batches 50",
    "alphaflow analyze runs/b2 --data latents/imagenet --all-checkpoints",
    "alphaflow analyze model.safetensors --data latents/cifar10 --batch 128 --json",
)
NAMES = {"tfm": "∇L_TFM", "tc": "∇L_TC", "fm": "∇L_FM'", "mean_flow": "∇L_TFM + ∇L_TC"}


@click.command("analyze", epilog=EXAMPLES)
@checkpoint_argument("address", "CKPT|RUN")
@click.option("--data", type=UserPath(), help="Latent store. Default: the recipe's, or RUN/latents.")
@click.option(
    "--batches",
    type=WholeWithin(1, 1_000_000),
    default=100,
    show_default=True,
    help="Batches to measure. Give more later to go on.",
)
@click.option("--batch", type=BATCH, default=64, show_default=True, help="Rows of a batch, all r < t.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of rows, noise and times.")
@averages_option
@click.option("--all-checkpoints", is_flag=True, help="Analyze every checkpoint that the run kept.")
@processes_option
@device_option
@click.option("--out", type=Destination(is_folder=True), help="Folder for numbers and pictures. Default: RUN/analysis.")
@json_option
def command(
    address: str,
    data: Path | None,
    batches: int,
    batch: int,
    seed: int,
    weights: str,
    all_checkpoints: bool,
    processes: int | None,
    device: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure the conflict between the objective's two halves at a checkpoint.

    The gradients of L_TFM, of L_TC and of the border case L_FM' (r = t) on the same batches: their cosines with
    percentiles, their sizes, per block and per range of t - r; and the weighted gradient's size over alpha. Running
    the same command again resumes; docs/understanding.md says how to read it.
    """
    check_checkpoint(address)
    begin(f"analyze {address}")
    from alphaflow_cli.analyze.analyze import AnalyzeRequest, analyze

    request = AnalyzeRequest(
        address=address, data=data, out=out, batches=batches, batch=batch, seed=seed, weights=weights,
        all_checkpoints=all_checkpoints,
    )  # fmt: skip
    share(partial(analyze, request), lambda made: show_analysis(*made, as_json=as_json), processes, device)


def show_analysis(document: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    """Print the numbers of every checkpoint, and where the pictures and the document are."""
    if as_json:
        print_json({**document, "path": str(folder / "conflict.json")})
        return
    for checkpoint in document["checkpoints"]:
        _print(checkpoint)
    for picture in document["pictures"]:
        click.echo(picture)
    click.echo(str(folder / "conflict.json"))


def _print(checkpoint: dict[str, Any]) -> None:
    size = f"{checkpoint['batches']} × {checkpoint['rows_per_batch']} rows"
    tell(f"{checkpoint['recipe']}, step {checkpoint['step']}, {checkpoint['weights']} weights, {size}")
    shown = []
    for pair, spread in checkpoint["cosines"].items():
        a, b = pair.split(".")
        shown.append((f"cos({NAMES[a]}, {NAMES[b]})", *_cells(spread)))
    shown += [(f"|{NAMES[name]}|", *_cells(spread)) for name, spread in checkpoint["norms"].items()]
    print_table(shown, head=("", "5%", "median", "95%"))
    share = checkpoint["share_below_-0.4"]
    if share is not None:
        click.echo(f"cos({NAMES['tfm']}, {NAMES['tc']}) is below -0.4 in {share:.0%} of the batches")


def _cells(spread: dict[str, float | None]) -> tuple[str, ...]:
    values = (spread[name] for name in ("p5", "p50", "p95"))
    return tuple("none" if value is None else f"{value:.4g}" for value in values)
