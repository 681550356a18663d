"""`alphaflow eval`: numbers with their protocol."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from alphaflow_cli.commands.common import examples, json_option, print_json, print_table
from alphaflow_cli.commands.measuring import Metrics, Weights, batch_option, metrics_option, weights_option

if TYPE_CHECKING:
    from alphaflow_cli.engine.results import Evaluation

EXAMPLES = examples(
    "alphaflow eval glyphs:300 --metrics fd-tiny --reference glyphs:1000",
    "alphaflow eval samples.npz --metrics fid,kid,is --reference cifar10.safetensors --json",
)


@click.command(epilog=EXAMPLES)
@click.argument("images")
@metrics_option
@click.option("--reference", metavar="FILE|SOURCE", help="Reference statistics, or the real pictures themselves.")
@click.option("--images", "limit", type=click.IntRange(min=1), help="Only so many pictures, taken evenly.")
@batch_option
@weights_option
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=Path("evals"), show_default=True,
    help="Folder for results, history and unfinished work.",
)  # fmt: skip
@click.option("--markdown", is_flag=True, help="Print a Markdown table for a README instead.")
@json_option
def command(
    images: str,
    metrics: Metrics,
    reference: str | None,
    limit: int | None,
    batch: int,
    weights: Weights,
    out: Path,
    markdown: bool,
    as_json: bool,
) -> None:
    """Measure pictures: FID, FDD, FCD, FD-tiny, KID, IS, precision and recall.

    IMAGES is a folder, a zip, a tar, a .npz with arr_0, hf://datasets/NAME, or glyphs:N. They are measured as they are,
    never resized. Every number is printed with its protocol; running the same command again resumes.
    """
    from alphaflow_cli.engine import evaluate as engine
    from alphaflow_cli.engine.pictures import open_pictures
    from alphaflow_cli.engine.processes import join_processes
    from alphaflow_cli.engine.results import save_results

    if markdown and as_json:
        raise click.UsageError("--markdown and --json exclude each other")
    source = open_pictures(images, size=None, limit=limit)
    processes = join_processes()
    chosen = metrics or engine.default_metrics(reference)
    extractors = engine.build_extractors(chosen, processes.device, weights)
    ruler = engine.Ruler(extractors, processes, out, batch)
    engine.check_count(source)
    found = None
    if reference is not None:
        found = engine.find_reference(
            reference, source.size, ruler, opened=lambda size: open_pictures(str(reference), size=size, limit=None)
        )
    evaluation = engine.evaluate(source, chosen, ruler, reference=found)
    if evaluation is None:
        return
    path = out / evaluation.id / "results.json"
    save_results(path, out / "history.jsonl", [evaluation])
    _print(evaluation, path, markdown=markdown, as_json=as_json)


def _print(evaluation: "Evaluation", path: Path, *, markdown: bool, as_json: bool) -> None:
    from alphaflow_cli.engine import results

    if as_json:
        print_json({**results.document([evaluation]), "path": str(path)})
        return
    for warning in evaluation.warnings:
        click.echo(f"warning: {warning}", err=True)
    for note, names in results.notes(evaluation).items():
        click.echo(f"note: {', '.join(names)}: {note}", err=True)
    spent = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in evaluation.seconds.items())
    click.echo(f"time: {spent}", err=True)
    if markdown:
        click.echo(results.markdown([evaluation]), nl=False)
    else:
        rows: list[tuple[str, ...]] = [(row.name, results.told_value(row), row.told()) for row in evaluation.rows]
        print_table(rows, head=("metric", "value", "protocol"))
    click.echo(str(path))
