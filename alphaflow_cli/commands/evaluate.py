"""`alphaflow eval`: numbers with their protocol, of a checkpoint or of pictures."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from alphaflow_cli.commands.common import (
    autoencoder_option,
    begin,
    check_source,
    checkpoint_argument,
    decoder_option,
    device_option,
    examples,
    json_option,
    print_json,
    print_table,
    processes_option,
    share,
    tell,
    threads_option,
)
from alphaflow_cli.commands.labelling import given_labelling, image_column_option
from alphaflow_cli.commands.measuring import (
    Metrics,
    Weights,
    batch_option,
    metrics_option,
    reference_option,
    weights_option,
)
from alphaflow_cli.commands.values import IMAGES, Destination
from alphaflow_cli.commands.walking import walk_options
from alphaflow_cli.recipe.schema import LabelDraw

if TYPE_CHECKING:
    from alphaflow_cli.evaluate.evaluate import EvalRequest, Report
    from alphaflow_cli.evaluate.results import Evaluation
    from alphaflow_cli.runtime.processes import Processes
    from alphaflow_cli.sample.generator import DecoderChoice

OF_CHECKPOINTS = "--nfe, --sampler, --times, --guidance, --interval, --draw, --repeat, --autoencoder and --decoder"
EXAMPLES = examples(
    "alphaflow eval runs/quickstart --nfe 1 --nfe 2",
    "alphaflow eval runs/b2 --metrics fid,fdd --reference imagenet.safetensors --processes 8",
    "alphaflow eval shapes:300 --metrics fd-tiny --reference shapes:1000",
    "alphaflow eval samples.npz --metrics fid,kid,is --reference cifar10.safetensors --json",
)


@click.command("eval", epilog=EXAMPLES)
@checkpoint_argument("subject", "CKPT|IMAGES")
@walk_options(nfe="Evaluations per picture; repeatable. Default: the recipe's.")
@click.option("--sweep-midpoint", is_flag=True, help="Two steps, with the midpoint at 0.1, 0.2, … 0.9.")
@metrics_option
@reference_option("Reference statistics, or the real pictures themselves.")
@click.option("--images", type=IMAGES, help="Number of pictures. Default: the recipe's; for IMAGES, all.")
@click.option(
    "--draw", type=click.Choice(["random", "balanced"]), help="How the labels of generated pictures are drawn."
)
@click.option(
    "--repeat",
    type=click.IntRange(1, 100),
    default=1,
    metavar="N",
    help="Measure N sets, each of new seeds: mean and spread.",
)
@autoencoder_option
@decoder_option
@image_column_option
@batch_option
@processes_option
@device_option
@threads_option
@weights_option
@click.option(
    "--out", type=Destination(is_folder=True, holds_weights=True), help="Folder. Default: the run's, else evals."
)
@click.option("--markdown", is_flag=True, help="Print a Markdown table for a README instead.")
@json_option
def command(
    subject: str,
    nfe: tuple[int, ...],
    sampler: str,
    times: list[float] | None,
    guidance: float | None,
    guidance_channels: int | None,
    interval: tuple[float, float] | None,
    sweep_midpoint: bool,
    metrics: Metrics,
    reference: str | None,
    images: int | None,
    draw: LabelDraw | None,
    repeat: int,
    autoencoder: str,
    decoder: "DecoderChoice",
    batch: int | None,
    processes: int | None,
    device: str | None,
    weights: Weights,
    out: Path | None,
    markdown: bool,
    as_json: bool,
) -> None:
    """Measure a checkpoint or pictures: FID, FDD, FCD, FD-tiny, KID, IS, precision and recall.

    CKPT is a file, a run folder, or a Hub id. IMAGES is a folder, archives, parquet, a .npz with arr_0, hf://datasets/NAME,
    or shapes:N, never resized. Every number is printed with its protocol; running the same command again resumes.
    """
    if (markdown and as_json) or (times is not None and nfe) or (sweep_midpoint and (nfe or times)):
        raise click.UsageError("--markdown and --json exclude each other; so do --nfe, --times and --sweep-midpoint.")
    begin_with(subject)
    from alphaflow_cli.evaluate.evaluate import EvalRequest

    share(work_on(EvalRequest(
        checkpoint=subject, nfe=nfe, sampler=sampler, times=times, guidance=guidance, interval=interval,
        guidance_channels=guidance_channels, sweep_midpoint=sweep_midpoint, metrics=metrics, reference=reference,
        images=images, draw=draw, autoencoder=autoencoder, decoder=decoder, batch=batch, weights=weights, out=out,
        repeat=repeat, image_column=given_labelling().columns.image,
    )), partial(show_report, markdown=markdown, as_json=as_json), processes, device)  # fmt: skip


def begin_with(subject: str) -> None:
    """Refuse what leads nowhere, and say what begins, before anything is loaded."""
    from alphaflow_cli.model.find import check_address, is_checkpoint

    (check_address if is_checkpoint(subject) else check_source)(subject)
    begin(f"eval {subject}")


def work_on(request: "EvalRequest") -> "Callable[[Processes], Report | None]":
    """Choose how to measure the subject: as a checkpoint, or as pictures, which refuse the options of checkpoints."""
    from alphaflow_cli.evaluate.evaluate import evaluate_checkpoint, evaluate_pictures
    from alphaflow_cli.model.find import is_checkpoint

    if is_checkpoint(request.checkpoint):
        return partial(evaluate_checkpoint, request)
    steps = (request.nfe, request.times, request.sweep_midpoint, request.guidance is not None)
    of_checkpoints = any((*steps, request.guidance_channels, request.interval, request.draw, request.autoencoder))
    if of_checkpoints or request.repeat > 1 or request.sampler != "auto" or request.decoder != "auto":
        raise click.UsageError(f"{request.checkpoint} is a source of pictures: {OF_CHECKPOINTS} are for checkpoints.")
    return partial(evaluate_pictures, request)


def show_report(report: "Report", *, markdown: bool, as_json: bool) -> None:
    """Print the table, the picture and the file; warnings and notes go to stderr."""
    from alphaflow_cli.evaluate import results

    if as_json:
        print_json({**results.document(report.evaluations), "path": str(report.results)})
        return
    shown: set[str] = set()
    for evaluation in report.evaluations:
        tell_notes(evaluation, shown)
    if markdown:
        click.echo(results.markdown(report.evaluations), nl=False)
    else:
        print_table(score_table(report.evaluations), head=("metric", "value", "protocol"))
    if report.picture is not None:
        click.echo(str(report.picture))
    click.echo(str(report.results))


def score_table(evaluations: Sequence["Evaluation"]) -> list[tuple[str, ...]]:
    """One row of the table for every number, with its protocol."""
    from alphaflow_cli.evaluate import results

    return [(row.name, results.value_text(row), row.protocol()) for each in evaluations for row in each.rows]


def tell_notes(evaluation: "Evaluation", before: set[str]) -> None:
    """Print warnings, notes and what took how long on stderr; what was printed before is not repeated."""
    from alphaflow_cli.evaluate import results

    lines = [f"warning: {warning}" for warning in evaluation.warnings]
    lines += [f"note: {', '.join(names)}: {note}" for note, names in results.notes(evaluation).items()]
    for line in dict.fromkeys(lines):
        if line not in before:
            tell(line, err=True)
    before.update(lines)
    spent = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in evaluation.seconds.items())
    click.echo(f"time: {spent}", err=True)
