"""`alphaflow report`: one page of a run, or of several."""

from pathlib import Path

import click

from alphaflow_cli.commands.common import begin, examples
from alphaflow_cli.commands.values import Destination, UserPath

EXAMPLES = examples(
    "alphaflow report runs/quickstart",
    "alphaflow report runs/b2 -o b2.html",
    "alphaflow report runs/b2 runs/meanflow-b2 -o compare.html",
)


@click.command("report", epilog=EXAMPLES)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=UserPath())
@click.option("-o", "--out", type=Destination(), help="The page. Default: RUN/report.html; of several: compare.html")
def command(runs: tuple[Path, ...], out: Path | None) -> None:
    """Make one self-contained HTML page of a run.

    Recipe and what differs from the shipped one, alpha and its phases, curves, the conflict where it was recorded,
    samples over time, scores with their protocols, environment, commands. It needs no network and opens anywhere.

    Of several runs, the page compares them: samples of equal seeds, scores side by side, curves over each other, and
    what differs in their recipes.
    """
    from alphaflow_cli.model.find import check_run

    if out and out.suffix.lower() not in ("", ".html", ".htm"):
        raise click.BadParameter(f"{str(out)!r} must end in .html", param_hint="-o")
    for run in runs:
        check_run(run)
    begin(f"report {' '.join(map(str, runs))}")
    if len(runs) == 1:
        from alphaflow_cli.report.run import write_report

        click.echo(str(write_report(runs[0], out or runs[0] / "report.html")))
        return
    from alphaflow_cli.report.compare import write_comparison

    click.echo(str(write_comparison(runs, out or Path("compare.html"))))
